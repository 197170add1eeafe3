"""How many rows one backward pass takes: as many as fit into memory."""

import warnings
from bisect import bisect_right
from typing import Literal

import torch
from torch import nn

from truestep.batch import Batch
from truestep.machine import free_bytes
from truestep.observe.text import count, format_bytes
from truestep.training.footprint import Arithmetic, bytes_to_come, needed_bytes


def divisors(number: int, limit: int) -> list[int]:
    """Return the divisors of a number up to a limit, in order."""
    return [size for size in range(1, min(number, limit) + 1) if number % size == 0]


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest of them; 0 for a limit below 1."""
    return max(divisors(number, limit), default=0)


def largest_micro_batch(model: nn.Module, batch: Batch, room: int, arithmetic: Arithmetic) -> int:
    """Return the most rows, to one in fifty, of a step in one go that takes up to `room` bytes.

    0 if not even one does. Errors: as for `footprint`.
    """
    inputs = {name: value[:1] for name, value in batch.inputs.items()}
    batch = Batch(batch.tokens[:1], batch.targets[:1], inputs)  # every size is a whole step of it

    def needed(rows: int) -> int:
        return needed_bytes(model, batch, rows, arithmetic)

    low, least = 1, needed(1)
    if least > room:
        return 0
    high = 2
    while (most := needed(high)) <= room:
        # Nearly a straight line: a guess just below where it ends, and one just above. Few rows may
        # take nothing beside the gradients: a guess is never beyond proportion, which is too low.
        per_row = max(1, (most - least) // (high - low))
        low, least = high, most
        linear = 99 * (room - most) // (100 * per_row)
        high += max(1, high // 50, min(linear, high * (room - most) // most))
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= room else (low, middle)
    return low


def largest_that_fits(
    model: nn.Module, batch: Batch, room: int, arithmetic: Arithmetic, limit: int
) -> int:
    """Return the most rows, up to `limit`, that divide the batch and take up to `room` bytes.

    0 if there are none. Errors: as for `footprint`.
    """
    rows = len(batch.tokens)
    if limit >= rows and needed_bytes(model, batch, rows, arithmetic) <= room:
        return rows  # which may take less than a part of it: that finds gradients there
    sizes = divisors(rows, min(limit, rows - 1))
    fitting = bisect_right(sizes, room, key=lambda n: needed_bytes(model, batch, n, arithmetic))
    return sizes[fitting - 1] if fitting else 0


def micro_batch_that_fits(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    precision: Literal["float32", "bfloat16"],
) -> int | Literal["auto"]:
    """Return "auto" where a step of the whole batch fits into what is free, or is not known to.

    Else the most rows that divide the batch and fit, or 1 where none do, said by a warning.
    """
    free = free_bytes(next(model.parameters()).device)
    if free is None:
        return "auto"
    room, rows = max(0, free - bytes_to_come(model, optimizer)), len(batch.tokens)
    try:
        needed = needed_bytes(model, batch, rows, precision)
        if needed <= room:
            return "auto"
        size = largest_that_fits(model, batch, room, precision, limit=rows - 1)
        least = needed_bytes(model, batch, 1, precision)
    except (RuntimeError, AssertionError):  # the model does not run on fake tensors
        return "auto"
    if size:
        split = (
            f"it is split into micro-batches of {size:,}, which changes neither loss nor gradient, "
            "only where dropout falls"
        )
    else:
        alone = f"even one row needs about {format_bytes(least)} and" if rows > 1 else "it"
        split = f"{alone} may not fit; use a smaller model or shorter windows"
    warnings.warn(
        f"a step of {count(rows, 'row')} needs about {format_bytes(needed)}, and "
        f"{format_bytes(room)} are free: {split}",
        stacklevel=2,
    )
    return size or 1
