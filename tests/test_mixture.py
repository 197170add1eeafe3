"""Mixing sources in exact proportions (laws 15 and 16)."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.data.loader import WindowLoader
from truestep.data.mixture import PERIOD, Mixture, MixtureLoader, turns_of
from truestep.loss import IGNORE_INDEX

weights = st.lists(
    st.one_of(st.floats(1e-9, 1e9), st.integers(1, 5).map(float)), min_size=1, max_size=12
)


class Numbers:
    """A text whose token at position p is `first` + p: no two texts of a test share a token."""

    def __init__(self, num_tokens, first=0):
        self.num_tokens, self.first = num_tokens, first

    def __len__(self):
        return self.num_tokens

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return np.arange(self.first + start, self.first + stop)


def texts(*sizes):
    return {f"text {i}": Numbers(size, 10_000 * i) for i, size in enumerate(sizes)}


def loader_of(sizes, shares, **options):
    return MixtureLoader(texts(*sizes), shares, **{"context_length": 5, "batch_size": 4} | options)


def order_of(mixture):
    return mixture.sources_between(0, PERIOD)


def worst_error(order, turns):
    """How far any source ever is from its share, in turns: an exact fraction, over all prefixes."""
    worst = Fraction(0)
    length = np.arange(1, len(order) + 1)
    for source, number in enumerate(turns):
        # In units of 1/PERIOD of a turn, which makes every error a whole number.
        errors = np.cumsum(order == source) * PERIOD - length * number
        worst = max(worst, Fraction(int(np.abs(errors).max()), PERIOD))
    return worst


def test_shares_are_those_of_largest_remainders_where_nobody_has_too_little():
    """The oracle: of all divisions into whole turns, none is nearer to the exact shares."""
    for shares in [(1, 1, 1), (3, 5), (0.7, 0.2, 0.1), (1, 2, 3, 4, 5, 6, 7), (10, 1e-4)]:
        exact = [Fraction(share) * PERIOD / sum(map(Fraction, shares)) for share in shares]
        turns = turns_of(shares)
        assert sum(turns) == PERIOD
        error = sum(abs(a - b) for a, b in zip(exact, turns, strict=True))
        for more, fewer in itertools.permutations(range(len(turns)), 2):
            other = list(turns)
            other[more] += 1
            other[fewer] -= 1
            assert error <= sum(abs(a - b) for a, b in zip(exact, other, strict=True))


@given(weights)
@settings(deadline=None)
def test_every_source_has_a_turn_and_all_of_them_a_period(shares):
    turns = turns_of(shares)
    assert sum(turns) == PERIOD
    assert min(turns) >= 1
    for (a, first), (b, second) in itertools.permutations(zip(shares, turns, strict=True), 2):
        assert a < b or first >= second - 1  # of two equal remainders one is the first
    if min(shares) * PERIOD >= sum(shares):
        exact = [Fraction(share) * PERIOD / sum(map(Fraction, shares)) for share in shares]
        assert all(abs(a - b) < 1 for a, b in zip(exact, turns, strict=True))


def test_too_little_for_a_turn_has_one_and_more_sources_than_turns_are_refused():
    assert turns_of([1.0, 1e-30, 1e-300]) == [PERIOD - 2, 1, 1]
    assert turns_of([1.0] * PERIOD) == [1] * PERIOD
    with pytest.raises(ValueError, match="65537 sources to mix; give 1 to 65536"):
        turns_of([1.0] * (PERIOD + 1))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"weights=.* must be a positive number"):
            turns_of([1.0, wrong])


@given(weights)
@settings(deadline=None, max_examples=60)
def test_no_source_is_ever_a_whole_turn_ahead_or_behind(shares):
    mixture = Mixture(shares)
    order = order_of(mixture)
    assert np.bincount(order, minlength=len(shares)).tolist() == mixture.turns
    bound = 1 - Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else 0
    assert worst_error(order, mixture.turns) <= bound  # Tijdeman's, the best there is


@pytest.mark.parametrize("number", [2, 100, 1000])
def test_nor_with_many_sources_of_very_unequal_weights(number):
    shares = np.random.default_rng(number).pareto(0.5, number) + 1e-6
    mixture = Mixture(shares.tolist())
    assert worst_error(order_of(mixture), mixture.turns) <= 1 - Fraction(1, 2 * number - 2)


@given(weights, st.integers(0, 3), st.integers(0, PERIOD - 1))
@settings(deadline=None, max_examples=30)
def test_seeking_counts_what_came_before(shares, period, turn):
    mixture = Mixture(shares)
    position = period * PERIOD + turn
    before = mixture.sources_between(0, position)
    (source,) = mixture.sources_between(position, position + 1)
    counts = np.bincount(before, minlength=len(shares)).tolist()
    assert mixture.counts_before(position) == counts
    assert mixture.place_of(position) == counts[source]


def test_a_place_far_away_is_exact():
    mixture = Mixture([0.7, 0.3])
    far = 10**30 * PERIOD
    assert mixture.counts_before(far) == [10**30 * turns for turns in mixture.turns]
    assert sum(mixture.counts_before(far + 12_345)) == far + 12_345


@given(
    st.integers(7, 60), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**40), st.integers(0)
)
@settings(deadline=None)
def test_one_source_gives_the_bits_it_has_alone(num_tokens, length, batch_size, step, seed):
    sizes = {"context_length": length, "batch_size": batch_size, "seed": seed % 2**63}
    alone = WindowLoader(Numbers(num_tokens), **sizes)
    mixed = MixtureLoader({"text": Numbers(num_tokens)}, [0.3], **sizes)
    one, other = alone.batch_at(step), mixed.batch_at(step)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.targets, other.targets)
    assert [row.window for row in mixed.rows_at(step)] == alone.windows_at(step).tolist()


@given(
    st.lists(st.tuples(st.integers(7, 60), st.floats(0.05, 1)), min_size=2, max_size=4).map(
        lambda pairs: tuple(zip(*pairs, strict=True))
    ),
    st.integers(1, 7),
    st.integers(0, 2**62),
)
@settings(deadline=None, max_examples=30)
def test_each_source_goes_through_its_own_epochs_without_loss_or_repetition(
    sources, batch_size, seed
):
    sizes, shares = sources
    loader = loader_of(sizes, shares, batch_size=batch_size, seed=seed)
    seen = {name: [] for name in loader.splits}
    for step in range(1200 // batch_size):
        batch = loader.batch_at(step)
        for row, (tokens, targets) in zip(
            loader.rows_at(step), zip(batch.tokens, batch.targets, strict=True), strict=True
        ):
            ids = targets[targets != IGNORE_INDEX].tolist()
            first = loader.splits[row.source].first
            assert ids == list(
                range(first + 5 * row.window + 1, first + 1 + 5 * row.window + len(ids))
            )
            assert tokens[: len(ids)].tolist() == [token - 1 for token in ids]
            seen[row.source].append(ids)
    counts = {name: len(windows) for name, windows in seen.items()}
    for number, (name, windows) in enumerate(seen.items()):
        split = loader.splits[name]
        num_windows = -(-(len(split) - 1) // 5)
        for start in range(0, len(windows) - num_windows + 1, num_windows):
            epoch = sorted(itertools.chain(*windows[start : start + num_windows]))
            assert epoch == list(range(split.first + 1, split.first + len(split)))
        share = Fraction(turns_of(shares)[number], PERIOD)
        assert abs(len(windows) - share * sum(counts.values())) < 1


def test_sources_of_one_size_have_orders_of_their_own_and_the_seed_changes_them():
    def windows(seed):
        rows = loader_of([501, 501], [1, 1], batch_size=200, seed=seed).rows_at(0)
        return [
            tuple(row.window for row in rows if row.source == name) for name in ("text 0", "text 1")
        ]

    assert len({*windows(0), *windows(1)}) == 4


@given(st.integers(1, 9), st.integers(0, 10**7), st.data())
@settings(deadline=None, max_examples=50)
def test_parts_add_up_to_the_same_global_batch_in_any_order(batch_size, step, data):
    loader = loader_of([60, 33, 7], [0.5, 0.3, 0.2], batch_size=batch_size, seed=5)
    whole = loader.batch_at(step)
    parts = data.draw(st.integers(1, batch_size))
    pieces = {}
    for part in data.draw(st.permutations(range(parts))):
        pieces[part] = loader.batch_at(step, part=part, parts=parts)
        assert pieces[part].index == part * batch_size // parts
    for field in ("tokens", "targets"):
        rows = torch.cat([getattr(pieces[part], field) for part in range(parts)])
        assert torch.equal(rows, getattr(whole, field))
    again = loader_of([60, 33, 7], [0.5, 0.3, 0.2], batch_size=batch_size, seed=5)
    assert torch.equal(again.batch_at(step).tokens, whole.tokens)


def test_epochs_are_counted_for_each_source():
    loader = loader_of([51, 26], [0.75, 0.25], batch_size=8)
    assert loader.turns_before(0) == {"text 0": 0, "text 1": 0}
    assert loader.turns_before(10) == {"text 0": 60, "text 1": 20}
    assert [loader.num_windows(name) for name in ("text 0", "text 1")] == [10, 5]


def test_what_cannot_be_mixed_is_refused_by_name():
    with pytest.raises(ValueError, match=r"text 1: the text has 4 tokens, fewer than the 6"):
        loader_of([51, 4], [1, 1])
    loader = loader_of([51, 26], [1, 1])
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        loader.batch_at(-1)
    with pytest.raises(ValueError, match="part=3 of parts=2"):
        loader.batch_at(0, part=3, parts=2)


def test_the_arrangement_is_the_same_in_every_release():
    assert turns_of([0.7, 0.2, 0.1]) == [45875, 13107, 6554]
    mixture = Mixture([0.7, 0.2, 0.1])
    first = [0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 0, 1, 0, 0, 2, 0, 0, 1, 0]
    assert mixture.sources_between(0, 20).tolist() == first
    assert mixture.sources_between(PERIOD - 5, PERIOD + 5).tolist() == [2, 0, 0, 1, 0, *first[:5]]
    assert mixture.place_of(12_345) == 1234
    loader = loader_of([1000, 1000], [0.7, 0.3], seed=1)
    assert [row.window for row in loader.rows_at(3)] == [125, 91, 46, 180]
