"""The order of the data: a keyed permutation, computed at any place without the places before.

Nothing is stored and nothing is shuffled, so seeking costs the same everywhere. The values are
part of every run's trajectory: they are pinned by a test and never change with a release.
"""

import hashlib
from typing import overload

import numpy as np
from jaxtyping import Int64, Integer, UInt64

_NUM_ROUNDS = 8
_MAX_SIZE = 2**62
# splitmix64: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def order_key(seed: int, source: str, epoch: int) -> int:
    """Return the 64-bit key of one epoch's order of one source."""
    text = f"{seed}\n{epoch}\n{source}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@overload
def permute(index: int, size: int, key: int) -> int: ...
@overload
def permute(index: Integer[np.ndarray, "N"], size: int, key: int) -> Int64[np.ndarray, "N"]: ...
def permute(
    index: int | Integer[np.ndarray, "N"], size: int, key: int
) -> int | Int64[np.ndarray, "N"]:
    """Return where a permutation of [0, size), chosen by `key`, sends each index.

    A Feistel network permutes the smallest domain of an even number of bits that holds `size`;
    an image outside [0, size) is sent through again until it falls inside (cycle walking: Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains"), fewer than 4 times on average.

    Errors: ValueError for a size below 1 or an index outside [0, size).
    """
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"size={size} must be 1 to 2**62 to be permuted")
    indices = np.atleast_1d(np.asarray(index))
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        raise ValueError(f"an index to permute is outside [0, {size})")
    values = _walk(indices.astype(np.uint64), size, _round_keys(key)).astype(np.int64)
    return values if isinstance(index, np.ndarray) else int(values[0])


def _walk(
    values: UInt64[np.ndarray, "N"], size: int, round_keys: list[int]
) -> UInt64[np.ndarray, "N"]:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(values, half_bits, round_keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _feistel(values[outside], half_bits, round_keys)
        values[outside] = walked
        outside = outside[walked >= size]
    return values


def _feistel(
    values: UInt64[np.ndarray, "N"], half_bits: int, round_keys: list[int]
) -> UInt64[np.ndarray, "N"]:
    """Permute [0, 4**half_bits): each round is undone by itself, whatever the mixing gives."""
    left, right = values >> half_bits, values & ((1 << half_bits) - 1)
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) >> (64 - half_bits))  # uint64 wraps
    return (left << half_bits) | right


def _round_keys(key: int) -> list[int]:
    """Return the first values of the splitmix64 stream that starts at `key`."""
    keys = np.arange(1, _NUM_ROUNDS + 1, dtype=np.uint64) * _GOLDEN + (key % 2**64)
    return [int(round_key) for round_key in _mix(keys)]


def _mix(values: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    """Apply splitmix64's finalizer in place: every bit of the input moves every bit."""
    values ^= values >> 30
    values *= _MULTIPLIER_1
    values ^= values >> 27
    values *= _MULTIPLIER_2
    values ^= values >> 31
    return values
