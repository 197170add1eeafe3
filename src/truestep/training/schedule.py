"""Learning-rate schedules: pure functions of the step, so that there is nothing to save.

A schedule maps the index of an update (0 for the first) to a factor in [0, 1] of the peak rate.
The warm-up rises linearly and reaches the peak with its last update; its first is above 0.
"""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int], float]


def constant(*, warmup_steps: int = 0) -> Schedule:
    """Return a schedule that stays at its peak after the warm-up."""
    return lambda step: _warmup(step, warmup_steps)


def warmup_cosine(*, warmup_steps: int, num_steps: int, final_factor: float = 0.1) -> Schedule:
    """Return half a cosine from the peak down to `final_factor`, reached by the last update.

    Source: Loshchilov & Hutter 2017 (SGDR), eq. 5, without restarts.
    """
    start, end = max(warmup_steps - 1, 0), num_steps - 1

    def factor(step: int) -> float:
        if step <= start:
            return _warmup(step, warmup_steps)
        progress = min((step - start) / (end - start), 1.0) if end > start else 1.0
        return _between(1.0, final_factor, (1.0 - math.cos(math.pi * progress)) / 2.0)

    return factor


def warmup_stable_decay(
    *,
    warmup_steps: int,
    num_steps: int,
    decay_steps: int | Literal["auto"] = "auto",
    final_factor: float = 0.1,
) -> Schedule:
    """Return the peak until `decay_steps` before the end, then a straight line to `final_factor`.

    auto decays over the last fifth. Source: Hu et al. 2024 (MiniCPM), section 4.
    """
    length = resolve_decay_steps(decay_steps, warmup_steps, num_steps)
    start = num_steps - 1 - length

    def factor(step: int) -> float:
        if step <= start or step < warmup_steps:
            return _warmup(step, warmup_steps)
        return _between(1.0, final_factor, min((step - start) / length, 1.0))

    return factor


def resolve_decay_steps(
    decay_steps: int | Literal["auto"], warmup_steps: int, num_steps: int
) -> int:
    """Return the length of the decay; auto is the last fifth of the run."""
    if decay_steps == "auto":
        return max(min(num_steps // 5, num_steps - warmup_steps), 1)
    return decay_steps


def _warmup(step: int, warmup_steps: int) -> float:
    return min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0


def _between(first: float, last: float, progress: float) -> float:
    """Interpolate so that both ends are exact in floating point."""
    return (1.0 - progress) * first + progress * last
