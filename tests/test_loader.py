"""Batches as a function of the step (law 15)."""

import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.batch import Batch
from truestep.data.loader import Prefetch, WindowLoader, evaluation_batches
from truestep.data.shards import write_split
from truestep.data.tokens import TokenSplit
from truestep.loss import IGNORE_INDEX
from truestep.manifest import DirectoryWriter, read_manifest


class Places:
    """A vocabulary so large that in a test's text every token has an id of its own."""

    name = "places"
    vocab_size = 2**20
    end_of_document = 2**20 - 1
    token_bytes = np.ones(2**20, dtype=np.int64)
    fingerprint = "0" * 64

    def encode(self, text):
        raise AssertionError("ids are written as they are")

    decode = encode


@pytest.fixture(scope="module")
def split_of(tmp_path_factory):
    """Build a split whose token at position p is p + 1, and the end of the document at last."""
    made = {}

    def build(num_tokens, shard_tokens=7):
        if (num_tokens, shard_tokens) not in made:
            target = tmp_path_factory.mktemp("split") / "data"
            ids = np.arange(1, num_tokens, dtype=np.int64)
            with DirectoryWriter(target) as writer:
                record = write_split(writer, "train", [("a", [ids])], Places(), shard_tokens)
                writer.commit({})
            _, files = read_manifest(target)
            made[num_tokens, shard_tokens] = TokenSplit(
                target, record, files, dtype="uint32", vocab_size=Places.vocab_size
            )
        return made[num_tokens, shard_tokens]

    return build


def text(num_tokens):
    return [*range(1, num_tokens), Places.end_of_document]


def targets_of(batches):
    return sorted(int(i) for batch in batches for i in batch.targets.flatten() if i >= 0)


def same(a, b):
    return (
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.index == b.index
    )


sizes = st.tuples(st.integers(2, 150), st.integers(1, 20), st.integers(1, 9)).filter(
    lambda sizes: sizes[0] > sizes[1]
)


@given(sizes, st.integers(0, 2**63), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_every_token_but_the_first_is_a_target_exactly_once_an_epoch(
    split_of, sizes, seed, shard_tokens
):
    num_tokens, context_length, _ = sizes
    split = split_of(num_tokens, shard_tokens)
    loader = WindowLoader(split, context_length=context_length, batch_size=1, seed=seed)
    ids = text(num_tokens)
    for epoch in (0, 1):
        first = epoch * loader.num_windows
        batches = [loader.batch_at(first + i) for i in range(loader.num_windows)]
        assert targets_of(batches) == ids[1:]  # ids rise with the position
        for batch in batches:
            valid = batch.targets[0] != IGNORE_INDEX
            tokens, targets = batch.tokens[0][valid].tolist(), batch.targets[0][valid].tolist()
            start = ids.index(tokens[0])
            assert ids[start : start + len(tokens) + 1] == [*tokens, targets[-1]]
            assert targets[:-1] == tokens[1:]
            assert (batch.tokens[0][~valid] == 0).all()
            assert valid.tolist() == sorted(valid.tolist(), reverse=True)  # padding comes last


@given(sizes, st.integers(0, 30), st.integers(0, 3), st.data())
@settings(deadline=None)
def test_parts_and_micro_batches_add_up_to_the_same_global_batch(split_of, sizes, step, seed, data):
    num_tokens, context_length, batch_size = sizes
    loader = WindowLoader(
        split_of(num_tokens), context_length=context_length, batch_size=batch_size, seed=seed
    )
    whole = loader.batch_at(step)
    parts = data.draw(st.integers(1, batch_size))
    micro = data.draw(st.integers(1, batch_size))
    pieces = [
        piece
        for part in range(parts)
        for piece in loader.batch_at(step, part=part, parts=parts).split(micro)
    ]
    assert torch.equal(torch.cat([piece.tokens for piece in pieces]), whole.tokens)
    assert torch.equal(torch.cat([piece.targets for piece in pieces]), whole.targets)
    rows = 0
    for piece in pieces:
        assert piece.index == rows
        rows += len(piece.tokens)


def test_batches_are_the_same_in_any_order_of_asking_and_in_another_loader(split_of):
    def build():
        return WindowLoader(split_of(100), context_length=6, batch_size=5, seed=3)

    loader = build()
    in_order = [loader.batch_at(step) for step in range(12)]
    for step in np.random.default_rng(0).permutation(12).tolist():
        assert same(loader.batch_at(step), in_order[step])
        assert same(build().batch_at(step), in_order[step])


def test_a_batch_goes_on_into_the_next_epoch_without_a_gap(split_of):
    loader = WindowLoader(split_of(100), context_length=10, batch_size=4, seed=0)  # 10 windows
    one_by_one = WindowLoader(split_of(100), context_length=10, batch_size=1, seed=0)
    windows = np.concatenate([loader.windows_at(step) for step in range(15)])
    assert windows.tolist() == [int(one_by_one.windows_at(i)[0]) for i in range(60)]
    epochs = windows.reshape(6, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    starts = loader.batch_at(2).tokens[:, 0].tolist()  # rows 8 and 9, then 0 and 1 of the next
    assert starts == [window * 10 + 1 for window in windows[8:12].tolist()]


def test_seed_and_source_change_the_order(split_of):
    orders = {
        tuple(
            WindowLoader(
                split_of(149), context_length=3, batch_size=40, seed=seed, source=source
            ).windows_at(0)
        )
        for seed, source in [(0, "a"), (1, "a"), (0, "b")]
    }
    assert len(orders) == 3


def test_a_step_far_away_is_as_good_as_the_first(split_of):
    loader = WindowLoader(split_of(100), context_length=10, batch_size=4, seed=0)
    far = 5 * 10**15  # a multiple of the 10 windows: an epoch starts here
    windows = np.concatenate([loader.windows_at(far + step) for step in range(5)])
    assert (np.sort(windows.reshape(2, 10)) == np.arange(10)).all()
    assert len(loader.batch_at(10**30).tokens) == 4


def test_a_text_shorter_than_a_window_is_refused_with_the_remedy(split_of):
    with pytest.raises(ValueError, match=r"9 tokens.*context_length=9; use a shorter context"):
        WindowLoader(split_of(9), context_length=9, batch_size=1)
    batch = WindowLoader(split_of(9), context_length=8, batch_size=1).batch_at(0)
    assert [*batch.tokens[0].tolist(), int(batch.targets[0, -1])] == text(9)


def test_arguments_outside_are_refused_by_name(split_of):
    split = split_of(100)
    for sizes in ({"context_length": 0, "batch_size": 1}, {"context_length": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="=0 must be at least 1"):
            WindowLoader(split, **sizes)
        with pytest.raises(ValueError, match="=0 must be at least 1"):
            evaluation_batches(split, **sizes)
    loader = WindowLoader(split, context_length=5, batch_size=4)
    with pytest.raises(ValueError, match="step=-1"):
        loader.batch_at(-1)
    for part, parts in [(-1, 2), (2, 2), (0, 0), (0, 5)]:
        with pytest.raises(ValueError, match=f"part={part} of parts={parts}"):
            loader.batch_at(0, part=part, parts=parts)
    with pytest.raises(ValueError, match="num_windows=0"):
        evaluation_batches(split, context_length=5, batch_size=4, num_windows=0)


@given(sizes)
@settings(deadline=None)
def test_evaluation_sees_every_target_once_in_batches_of_one_shape(split_of, sizes):
    num_tokens, context_length, batch_size = sizes
    batches = list(
        evaluation_batches(
            split_of(num_tokens), context_length=context_length, batch_size=batch_size
        )
    )
    assert {tuple(batch.tokens.shape) for batch in batches} == {(batch_size, context_length)}
    assert targets_of(batches) == text(num_tokens)[1:]
    seen = [int(i) for batch in batches for i in batch.targets.flatten() if i >= 0]
    assert seen == sorted(seen)
    assert [batch.index for batch in batches] == [i * batch_size for i in range(len(batches))]


@given(sizes, st.integers(1, 200))
@settings(deadline=None)
def test_a_choice_of_evaluation_windows_is_spread_evenly(split_of, sizes, num_windows):
    num_tokens, context_length, batch_size = sizes
    batches = list(
        evaluation_batches(
            split_of(num_tokens),
            context_length=context_length,
            batch_size=batch_size,
            num_windows=num_windows,
        )
    )
    rows = [row for batch in batches for row in batch.targets if row[0] != IGNORE_INDEX]
    total = -(-(num_tokens - 1) // context_length)
    count = min(num_windows, total)
    assert len(rows) == count
    starts = [text(num_tokens).index(int(row[0])) - 1 for row in rows]
    windows = np.array(starts) // context_length
    assert np.unique(windows).size == count
    shares = (np.arange(count) + 0.5) * total / count
    assert (np.abs(windows - shares) <= 1).all()
    assert {tuple(batch.tokens.shape) for batch in batches} == {(batch_size, context_length)}


def test_a_tiny_validation_text_is_evaluated_in_one_padded_window(split_of):
    (batch,) = evaluation_batches(split_of(4), context_length=50, batch_size=3)
    assert targets_of([batch]) == text(4)[1:]
    assert batch.tokens.shape == (3, 50)
    with pytest.raises(ValueError, match="0 tokens; at least 2"):
        evaluation_batches(split_of(1), context_length=50, batch_size=3)


class Recorder:
    """Batches that say which step they are of; one step fails. Records who asked for what."""

    def __init__(self, failing=-1):
        self.failing = failing
        self.asked = []
        self.threads = set()
        self.alive = weakref.WeakSet()

    def batch_at(self, step, *, part=0, parts=1):
        self.asked.append(step)
        self.threads.add(threading.get_ident())
        if step == self.failing:
            raise OSError(f"no step {step}")
        ids = torch.full((2, 3), step * 100 + part * 10 + parts)
        batch = Batch(ids, ids, index=part)
        self.alive.add(batch)
        return batch


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), max_size=25), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_prefetching_changes_no_batch_in_any_order_of_asking(requests, depth):
    with Prefetch(Recorder(), depth=depth) as prefetch:
        for step, part in requests:
            expected = Recorder().batch_at(step, part=part, parts=2)
            assert same(prefetch.batch_at(step, part=part, parts=2), expected)


def test_prefetching_works_ahead_in_one_thread_and_computes_nothing_twice():
    recorder = Recorder()
    prefetch = Prefetch(recorder, depth=2)
    for step in range(5):
        prefetch.batch_at(step)
    while 6 not in recorder.asked:  # the worker is still at it
        pass
    prefetch.close()
    assert recorder.asked == [0, 1, 2, 3, 4, 5, 6]
    assert recorder.threads.isdisjoint({threading.get_ident()})
    assert len(recorder.threads) == 1


def test_prefetching_holds_no_more_batches_than_it_should():
    recorder = Recorder()
    with Prefetch(recorder, depth=2) as prefetch:
        for step in range(0, 200, 10):
            prefetch.batch_at(step)
        prefetch.batch_at(190)
        assert len(recorder.alive) <= 4  # two ahead, two that a change of step may leave


def test_an_error_of_a_prefetched_step_comes_up_at_that_step():
    with Prefetch(Recorder(failing=3)) as prefetch:
        for step in (0, 1, 2, 4, 1, 2):
            assert int(prefetch.batch_at(step).tokens[0, 0]) == step * 100 + 1
        for _ in range(2):
            with pytest.raises(OSError, match="no step 3"):
                prefetch.batch_at(3)
        assert int(prefetch.batch_at(4).tokens[0, 0]) == 401


def test_closing_ends_the_thread():
    before = threading.active_count()
    prefetch = Prefetch(Recorder())
    prefetch.batch_at(0)
    prefetch.close()
    prefetch.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="shutdown"):
        prefetch.batch_at(1)
    with pytest.raises(ValueError, match="depth=0"):
        Prefetch(Recorder(), depth=0)
