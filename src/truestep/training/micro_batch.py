"""How many rows one backward pass takes: as many as fit into memory."""

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from truestep.batch import Batch
from truestep.observe.text import count, format_bytes
from truestep.training.footprint import Arithmetic, footprint, room_for_a_step
from truestep.training.probe import NotTraceableError


def largest_micro_batch(model: nn.Module, batch: Batch, room: int, arithmetic: Arithmetic) -> int:
    """Return the most rows, to one in fifty, of a step in one go that takes up to `room` bytes.

    0 if not even one does. Errors: as for `footprint`.
    """
    needed = _whole_steps(model, batch, arithmetic)
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

    Where that is less than half of what would fit, as for a prime number of rows, those that make
    the fewest parts, the last of them shorter. 0 if not one fits. Errors: as for `footprint`.
    """
    rows = len(batch.tokens)
    if limit >= rows and _whole_steps(model, batch, arithmetic)(rows) <= room:
        return rows  # which may take less than a part of it: that finds gradients there

    def needed(size: int) -> int:
        return footprint(model, batch, size, arithmetic).needed

    sizes = [size for size in range(1, min(limit, rows - 1) + 1) if rows % size == 0]
    fitting = bisect_right(sizes, room, key=needed)
    if not fitting:
        return 0
    size = sizes[fitting - 1]
    above = next(n for n in range(size + 1, rows + 1) if rows % n == 0)
    ceiling = min(above - 1, limit)
    if ceiling < 2 * size:
        return size
    counts = range(-(-rows // ceiling), rows // size + 1)
    fewest = bisect_left(counts, True, key=lambda n: needed(-(-rows // n)) <= room)
    most = -(-rows // counts[fewest])
    return most if most >= 2 * size else size


def _whole_steps(model: nn.Module, batch: Batch, arithmetic: Arithmetic) -> Callable[[int], int]:
    """Return what a step in one go takes as a function of its rows, which are like the batch's."""
    inputs = {name: value[:1] for name, value in batch.inputs.items()}
    row = Batch(batch.tokens[:1], batch.targets[:1], inputs)
    return lambda rows: footprint(model, row, rows, arithmetic).needed


def micro_batch_that_fits(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    precision: Literal["float32", "bfloat16"],
    asked: int | Literal["auto"],
) -> int:
    """Return how many rows a micro-batch is to have: those asked for, or by auto the most.

    By auto that is the whole batch where it fits into what is free, or is not known to; else what
    `largest_that_fits` says, or 1 where nothing does. A warning says what does not fit.
    """
    rows, room = len(batch.tokens), room_for_a_step(model, optimizer)
    wanted = rows if asked == "auto" else asked
    if room is None:
        return wanted
    try:
        if wanted >= rows:
            needed = _whole_steps(model, batch, precision)(rows)
        else:
            needed = footprint(model, batch, wanted, precision).needed
        if needed <= room:
            return wanted
        size = largest_that_fits(model, batch, room, precision, limit=min(wanted, rows) - 1)
        least = footprint(model, batch, 1, precision).needed
    except NotTraceableError:
        return wanted
    if asked != "auto":
        one = f", and one row {format_bytes(least)}" if wanted > 1 else ""
        warnings.warn(
            f"training.micro_batch_size={asked} needs about {format_bytes(needed)}{one}; "
            f"{format_bytes(room)} are free, and it may not fit; "
            + (
                f"training.micro_batch_size={size} would"
                if size
                else "use a smaller model or shorter windows"
            ),
            stacklevel=2,
        )
        return wanted
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
