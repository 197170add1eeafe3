"""Running out of memory: recognised, explained, and answered with a size that would fit.

What a step needs is computed on fake tensors, which have shapes and take no memory; what there was
to take is measured before the first step.
"""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.observe.text import format_bytes
from truestep.shell import command

if TYPE_CHECKING:  # an error is explained without waiting for torch
    from truestep.batch import Batch
    from truestep.training.trainer import Trainer

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "cublas_status_alloc_failed",
)


class MemoryExhaustedError(RuntimeError):
    """Memory ran out while a run was training: one line with a size that would fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; torch has no one type for it."""
    if isinstance(error, MemoryExhaustedError):
        return False  # explained already
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    )


def explain_out_of_memory(error: BaseException) -> str:
    """Return one line about memory that ran out where nothing more is known."""
    match = re.search(r"allocate (\d+) bytes|allocate (\d[\d.]* [KMGTPE]iB)", str(error))
    amount = "what is needed"
    if match:
        amount = format_bytes(int(match[1])) if match[1] else match[2]
    return (
        f"out of memory: {amount} could not be had; use a smaller model, a shorter "
        "model.context_length or a smaller data.batch_size"
    )


@contextlib.contextmanager
def memory_explained(trainer: "Trainer", batch: "Batch", directory: Path) -> Iterator[None]:
    """Turn running out of memory inside into one line with a `micro_batch_size` that would fit.

    To be entered before the first step of a trainer in the run at `directory`; `batch` is like
    those to come. What the failed step held is given back before the error leaves.
    Errors: MemoryExhaustedError.
    """
    from truestep.training.footprint import room_for_a_step

    room = room_for_a_step(trainer.model, trainer.optimizer)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        trainer.model.zero_grad()
        size = trainer.micro_batch_size(batch)
        place = f"in step {trainer.step + 1}" if trainer.in_step else f"after step {trainer.step}"
        raise MemoryExhaustedError(
            f"out of memory {place} with micro_batch_size={size}: "
            + _advice(trainer, batch, size, room, directory)
        ) from None


def _advice(
    trainer: "Trainer", batch: "Batch", size: int, room: int | None, directory: Path
) -> str:
    """Return what would fit, in figures, and the command to go on with."""
    from truestep.training.footprint import footprint
    from truestep.training.micro_batch import largest_that_fits
    from truestep.training.probe import NotTraceableError

    unknown = "use a smaller training.micro_batch_size or a smaller model"
    if room is None:
        return unknown
    model, precision = trainer.model, trainer.precision

    def needed(size: int) -> int:
        return footprint(model, batch, size, precision).needed

    try:
        least = needed(1)
        fitting = largest_that_fits(model, batch, room, precision, limit=size - 1)
    except NotTraceableError:
        return unknown
    if not fitting:
        return (
            f"one window needs about {format_bytes(least)}, and {format_bytes(room)} were free; "
            "use a smaller model or a shorter model.context_length"
        )
    return (
        f"it needs about {format_bytes(needed(size))}, and {format_bytes(room)} were free; "
        f"{fitting} needs {format_bytes(needed(fitting))}: go on with "
        + command(
            *("train", "--resume", directory, "--training.micro-batch-size", str(fitting)),
            *("--override", "training.micro_batch_size"),
        )
    )
