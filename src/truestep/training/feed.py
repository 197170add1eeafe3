"""Where the batches of a run come from, and whether they fit the model."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import nn

from truestep.batch import Batch
from truestep.distributed.process import ALONE, Processes


@runtime_checkable
class StepData(Protocol):
    """Data whose position is one integer."""

    def batch_at(self, step: int) -> Any:
        """Return the global batch of update `step`, 0 for the first."""


def batches_from(
    data: StepData | Iterable[Any], step: int, *, resumed: bool, processes: Processes = ALONE
) -> Iterator[Any]:
    """Yield this process's share of the batches of updates `step`, `step + 1` and so on.

    Without end: an iterable that can be iterated again (a list, a DataLoader) starts over when it
    ends. All processes are given the same data, and take rows of their own from each batch; where
    `batch_at` has parts, it computes no more than those.
    Errors: ValueError for an iterable in a resumed run, since it has no position, or one that
    ends for good; TypeError for anything else.
    """
    if isinstance(data, StepData):
        share = _share_at(data, processes)
        while True:
            yield share(step)
            step += 1
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data of type {type(data).__name__} has no batch_at(step) and cannot be iterated; "
            "give an object with batch_at, or an iterable of batches"
        )
    if resumed:
        raise ValueError(
            f"this run was resumed at step {step}, but an iterable has no position to go on from; "
            "give data with batch_at(step) -> batch"
        )
    while True:
        empty = True
        for batch in data:
            empty = False
            yield _share(batch, processes)
        if empty or iter(data) is data:
            raise ValueError(
                "data ended before the last step; repeat it, give a list or a DataLoader, "
                "which start over, or lower num_steps"
            )


def _share_at(data: StepData, processes: Processes) -> Callable[[int], Any]:
    """Return the function from a step to this process's share of its batch."""
    if processes.size == 1:
        return data.batch_at
    if "parts" in inspect.signature(data.batch_at).parameters:
        parts: Any = {"part": processes.rank, "parts": processes.size}
        return functools.partial(data.batch_at, **parts)
    return lambda step: _share(data.batch_at(step), processes)


def _share(batch: Any, processes: Processes) -> Any:
    if processes.size == 1:
        return batch
    return Batch.of(batch).part(processes.rank, processes.size)


def fit_inputs(batch: Batch, model: nn.Module) -> Batch:
    """Return the batch with just the keyword inputs that the model's forward takes.

    A model without `attention_mask` still trains on right-padded rows: in a causal model nothing
    before the padding sees it, and `Batch.of` made it no target.
    Errors: TypeError naming a key that the forward does not take.
    """
    if not batch.inputs:
        return batch
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return batch
    inputs = dict(batch.inputs)
    mask = None if "attention_mask" in parameters else inputs.pop("attention_mask", None)
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            f"attention_mask pads on the left, and {type(model).__name__}.forward takes no "
            "attention_mask; pad on the right"
        )
    for name in inputs:
        if name not in parameters:
            raise TypeError(
                f"batch key {name!r} is not a parameter of {type(model).__name__}.forward; "
                "remove it from the batch"
            )
    return replace(batch, inputs=inputs)
