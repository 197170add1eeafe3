"""The permutation behind the order of the data (law 16)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.data.order import order_key, permute

MASK = 2**64 - 1


def mix(z):
    """Splitmix64's finalizer, written from the paper with plain integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def inverse(value, size, key):
    """Run the rounds backwards, walking the cycle backwards until inside [0, size)."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = [mix((key + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, 9)]
    while True:
        left, right = value >> half, value & (2**half - 1)
        for round_key in reversed(keys):
            left, right = right ^ (mix((left + round_key) & MASK) >> (64 - half)), left
        value = left << half | right
        if value < size:
            return value


def chi_square(counts):
    """How many standard deviations Pearson's statistic is from its mean."""
    counts = np.asarray(counts, dtype=float).ravel()
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


def test_permutation_is_a_bijection_for_every_size_up_to_4096():
    for size in range(1, 4097):
        seen = np.zeros(size, dtype=bool)
        seen[permute(np.arange(size), size, key=size * 7919)] = True
        assert seen.all(), size


@given(st.integers(1, 10**13), st.integers(0, MASK), st.data())
@settings(deadline=None)
def test_permutation_is_undone_by_its_inverse_at_any_size(size, key, data):
    index = data.draw(st.integers(0, size - 1))
    image = permute(index, size, key)
    assert 0 <= image < size
    assert inverse(image, size, key) == index


@pytest.mark.parametrize("size", [10**6 + 1, 2**30, 2**30 + 1, 10**12, 2**62])
def test_large_permutations_never_send_two_indices_to_one(size):
    start = np.random.default_rng(size).integers(0, size - 20_000)
    images = permute(np.arange(start, start + 20_000), size, key=3)
    assert images.min() >= 0
    assert images.max() < size
    assert np.unique(images).size == images.size


def test_an_array_gives_what_its_indices_give_one_by_one():
    indices = np.arange(100)
    together = permute(indices, 1000, 5)
    assert together.dtype == np.int64
    assert together.tolist() == [permute(int(i), 1000, 5) for i in indices]
    assert indices.tolist() == list(range(100))


def test_the_order_is_the_same_in_every_release():
    assert order_key(0, "train", 0) == 12842785393611421367
    assert order_key(1234, "stdlib", 7) == 4525291287232980619
    assert permute(np.arange(10), 10, 0).tolist() == [1, 6, 4, 7, 2, 5, 0, 3, 8, 9]
    assert permute(np.arange(5), 10**12, order_key(0, "train", 0)).tolist() == [
        418708708067,
        788119105381,
        571193971967,
        983195176620,
        243451298337,
    ]


def test_keys_differ_by_seed_source_and_epoch():
    keys = {order_key(*k) for k in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]}
    assert len(keys) == 4
    assert order_key(1, "1", 11) != order_key(11, "1", 1)


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_every_index_is_sent_everywhere_by_some_key(size):
    indices = np.arange(4)
    keys = [order_key(seed, "x", 0) for seed in range(2000)]
    images = np.array([permute(indices, size, key) for key in keys])  # (keys, indices)
    for column in images.T:
        assert abs(chi_square(np.bincount(column * 10 // size, minlength=10))) < 4


@pytest.mark.parametrize("size", [2**18, 2**18 + 1, 300_007])
def test_neighbours_are_sent_to_unrelated_places(size):
    images = permute(np.arange(size), size, order_key(1, "train", 0))
    for lag in (1, 2, 16):
        first, second = images[:-lag], images[lag:]
        pairs = np.bincount(first * 16 // size * 16 + second * 16 // size, minlength=256)
        assert abs(chi_square(pairs)) < 4
        # The correlation of n independent pairs has standard deviation 1/sqrt(n).
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(size)


def test_orders_of_two_epochs_are_unrelated():
    size = 100_003
    first, second = (permute(np.arange(size), size, order_key(0, "train", e)) for e in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(size)
    assert (first == second).sum() < 10


def test_indices_and_sizes_outside_are_refused():
    for index, size in [(-1, 5), (5, 5), (0, 0), (0, 2**62 + 1)]:
        with pytest.raises(ValueError, match="permute"):
            permute(index, size, 0)
