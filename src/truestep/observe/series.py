"""What happens to a column before it is drawn: smoothing, thinning, limits, ticks."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

Scale = Literal["linear", "log"]

SMOOTHING_STEPS = 100


def smooth(values: Float[np.ndarray, "N"], window: int = SMOOTHING_STEPS) -> Float[np.ndarray, "N"]:
    """Return at each point the mean of the last tenth of the points so far, at most `window`.

    The first points are left as they are, so that the steep beginning is not blurred. Points that
    are not finite do not count; where none counts, the result is NaN.
    """
    finite = np.isfinite(values)
    length = np.clip(np.arange(1, len(values) + 1) // 10, 1, window)
    total = _sums_of_last(np.where(finite, values, 0.0), length, window)
    count = _sums_of_last(finite.astype(float), length, window)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _sums_of_last(
    values: Float[np.ndarray, "N"], length: Shaped[np.ndarray, "N"], window: int
) -> Float[np.ndarray, "N"]:
    """Return at each point the sum of the last `length` <= `window` values.

    Each sum is taken by itself: in differences of running sums, one huge value would drown all
    that follow.
    """
    padded = np.concatenate([np.zeros(window), values])
    views = np.lib.stride_tricks.sliding_window_view(padded, window)[1:]
    begin = 10 * window  # from here on, length is window
    counted = np.arange(window) >= window - length[:begin, None]
    head = np.where(counted, views[:begin], 0.0).sum(axis=1)
    return np.concatenate([head, views[begin:].sum(axis=1)])


def decimate(
    steps: Shaped[np.ndarray, "N"], values: Float[np.ndarray, "N"], num_buckets: int = 400
) -> tuple[Shaped[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    """Return at most five points of each bucket: first, least, greatest, last, and one gap.

    A gap is a value that is not finite. What the eye sees at `num_buckets` pixels stays the same.
    """
    if len(values) <= 5 * num_buckets:
        return steps, values
    width = math.ceil(len(values) / num_buckets)
    rows = math.ceil(len(values) / width)
    padded = np.full(rows * width, np.nan)
    padded[: len(values)] = values
    table = padded.reshape(rows, width)
    finite = np.isfinite(table)
    picks = np.stack(
        [
            np.zeros(rows, dtype=np.int64),
            np.where(finite, table, np.inf).argmin(axis=1),
            np.where(finite, table, -np.inf).argmax(axis=1),
            (~finite).argmax(axis=1),  # 0, the first point, where there is no gap
            np.full(rows, width - 1),
        ]
    )
    index = np.unique(np.minimum(picks + np.arange(rows) * width, len(values) - 1))
    return steps[index], values[index]


def ticks(low: float, high: float, scale: Scale = "linear", num: int = 5) -> list[float]:
    """Return about `num` round numbers in [low, high]; on a log scale, low must be positive."""
    if scale == "log":
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1,)):
            marks = [digit * 10.0**power for power in powers for digit in digits]
            marks = [mark for mark in marks if low <= mark <= high]
            if 1 < len(marks) <= 2 * num:
                return marks
        if len(marks) > 1:
            return marks[:: math.ceil(len(marks) / num)]
    power = 10.0 ** math.floor(math.log10((high - low) / num))
    unit = next(n * power for n in (1, 2, 5, 10) if (high - low) / (n * power) <= num)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [n * unit for n in range(first, last + 1)]
