"""Loss spikes: found from the log alone, and reported as they happen."""

import math
import shlex
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from truestep.observe.log import METRICS, read_records
from truestep.observe.text import printable_line
from truestep.shell import command

WINDOW_STEPS = 100  # finite losses that a step is compared with
MIN_STEPS = 20  # fewer do not say what is normal
CALM_STEPS = 10  # a rise is over after so many finite losses that are not high
# Of 26,400 steps of small byte models at batches of 128 to 2,048 tokens, two exceed these, both of
# rare text (a table of accented letters, lists of addresses); normal noise never did.
MIN_DEVIATIONS = 8.0
MIN_NATS = 0.3
# The standard deviation of a normal distribution for one median absolute deviation (MAD):
# Rousseeuw & Croux 1993, "Alternatives to the Median Absolute Deviation", eq. 1.1.
_DEVIATION_PER_MAD = 1.4826


class Spike(NamedTuple):
    """A step whose loss stands out from those before it.

    `expected` is their median, `deviations` how many of their robust standard deviations the loss
    lies above it, infinite where they are all the same.
    """

    step: int
    loss: float
    expected: float
    deviations: float


def find_spikes(steps: Shaped[np.ndarray, "N"], losses: Float[np.ndarray, "N"]) -> list[Spike]:
    """Return the loss spikes of a run, in order.

    A loss is high if it lies more than MIN_DEVIATIONS robust standard deviations and more than
    MIN_NATS above the median of the last WINDOW_STEPS losses. A spike is a high loss after
    CALM_STEPS that were not: a sustained rise is one spike, at its first step, and is over once
    the losses came back or have become what is normal. Losses that are not finite do not exist
    here (the guard reports them); after fewer than MIN_STEPS losses, nothing is known to be high.
    """
    recent = _Recent()
    pairs = zip(steps.tolist(), losses.tolist(), strict=True)
    return [spike for step, loss in pairs if (spike := recent.add(step, loss)) is not None]


class SpikeWatch:
    """A sink that reports each spike of a run as it happens, in one line.

    What came before `from_step` is read from the run's log, so that a resumed run reports what it
    would have reported without the interruption.
    Errors: ValueError for a log with a corrupt line.
    """

    def __init__(self, run: Path, report: Callable[[str], object], *, from_step: int = 0) -> None:
        self._run = run
        self._report = report
        self._recent = _Recent()
        # What is older than this has no influence: see `_Recent`.
        last: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS + CALM_STEPS)
        for _, record in read_records(run / METRICS):
            loss = _training_loss(record)
            if record["step"] <= from_step and math.isfinite(loss):
                last.append((record["step"], loss))
        for step, loss in last:
            self._recent.add(step, loss)

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record of the log; report it if it is a spike."""
        spike = self._recent.add(record["step"], _training_loss(record))
        if spike is not None:
            self._report(format_spike(spike, self._run))

    def close(self) -> None:
        """Do nothing: every spike has been reported."""


def format_spike(spike: Spike, run: Path) -> str:
    """Return what a person needs to know of a spike, with the command that shows its text."""
    return (
        f"loss spike at step {spike.step}: {spike.loss:.3f}, {spike.deviations:.1f} deviations "
        f"above the median {spike.expected:.3f} of the steps before it; see what was in it: "
        f"{printable_line(command('inspect', run, '--step', str(spike.step)))}"
    )


def inspect_command(spike: Spike, run: Path) -> str:
    """Return the command that shows what a spike's step was trained on, for any machine's shell."""
    return printable_line(f"truestep inspect {shlex.quote(str(run))} --step {spike.step}")


class _Recent:
    """The last finite losses, in the order of time and of size; it remembers nothing else.

    Whether a step is a spike depends on the WINDOW_STEPS + CALM_STEPS finite losses before it, and
    on no other.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque()
        self._sorted: list[float] = []
        self._calm = CALM_STEPS  # finite losses since the last high one

    def add(self, step: int, loss: float) -> Spike | None:
        """Compare a step with those before it, then count it among them."""
        if not math.isfinite(loss):
            return None
        spike = self._compare(step, loss)
        self._calm, calm = (self._calm + 1, self._calm) if spike is None else (0, self._calm)
        self._losses.append(loss)
        insort(self._sorted, loss)
        if len(self._losses) > WINDOW_STEPS:
            del self._sorted[bisect_left(self._sorted, self._losses.popleft())]
        return spike if calm >= CALM_STEPS else None

    def _compare(self, step: int, loss: float) -> Spike | None:
        """Return the step as a spike if its loss is high."""
        if len(self._losses) < MIN_STEPS:
            return None
        expected = median(self._sorted)
        if not loss - expected > MIN_NATS:  # nearly every step ends here
            return None
        deviation = _DEVIATION_PER_MAD * median(abs(past - expected) for past in self._sorted)
        deviations = (loss - expected) / deviation if deviation else math.inf
        return Spike(step, loss, expected, deviations) if deviations > MIN_DEVIATIONS else None


def _training_loss(record: Mapping[str, Any]) -> float:
    """Return the loss of an update's record, and NaN for a record of anything else."""
    return float(record.get("loss", math.nan))
