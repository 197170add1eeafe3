"""What happens beside the steps: one shape of hook for evaluating, saving, drawing, stopping."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from truestep.metrics import StepMetrics

if TYPE_CHECKING:
    from truestep.training.trainer import Trainer


class Companion(NamedTuple):
    """A function that `fit` calls every `interval` updates, and after the last."""

    interval: int
    function: Callable[["Trainer", StepMetrics], object]


def every(interval: int, function: Callable[["Trainer", StepMetrics], object]) -> Companion:
    """Have `fit` call `function(trainer, metrics)` every `interval` updates and after the last."""
    if interval < 1:
        raise ValueError(f"every({interval}, …) counts updates between calls; use 1 or more")
    return Companion(interval, function)
