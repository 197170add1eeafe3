"""From the gradients and losses of micro-batches to those of a step, over all processes."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from truestep.batch import Batch
from truestep.distributed.process import Processes

Forward = Callable[..., Tensor]
T = TypeVar("T")

_MOST_LANES = 8


def resolve_lanes(setting: int | Literal["auto"], rows: int) -> int:
    """Return how many lanes the rows of a global batch are cut into; auto: as many as can be."""
    return math.gcd(rows, _MOST_LANES) if setting == "auto" else setting


class Reduction:
    """Adds up what micro-batches come to, one after another in this process, and then over all.

    More than one process exchange gradients by torch's DistributedDataParallel, in the backward of
    the last micro-batch. They are summed, never averaged: each is a share of the loss's already.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self._model, self._processes = model, processes
        self._parallel: DistributedDataParallel | None = None

    def micro_batch_size(self, rows: int, asked: int | Literal["auto"]) -> int:
        """Return how many of this process's `rows` one backward pass takes."""
        return rows if asked == "auto" else min(asked, rows)

    def lane(self, batch: Batch) -> Batch:
        """Return the rows of this process's batch that its micro-batches have to divide."""
        return batch

    def at_most(self, size: int, rows: int) -> int:
        """Return the largest micro-batch up to `size` of a lane of so many rows; 0 if none."""
        return min(size, rows)

    def shortened(self, batch: Batch, size: int, count: int) -> Batch:
        """Return the first `count` micro-batches together, or as many rows as a step must have."""
        return next(batch.split(count * size))

    def wrapped(self, forward: Forward) -> Forward:
        """Return the forward whose backward adds up the gradients of all processes."""
        if self._processes.size == 1:
            return forward
        buffers = any(True for _ in self._model.buffers())
        self._parallel = DistributedDataParallel(
            _Unit(self._model, forward), forward_sync_buffers=buffers, gradient_as_bucket_view=True
        )
        self._parallel.register_comm_hook(None, self._exchange)
        return self._parallel

    def each(self, micro_batches: Iterable[Batch], count: int) -> Iterator[Batch]:
        """Yield the `count` micro-batches, and prepare for the backward of each."""
        for number, micro_batch in enumerate(micro_batches, 1):
            if self._parallel is not None:
                # What `no_sync` sets, too.
                self._parallel.require_backward_grad_sync = number == count
            yield micro_batch

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the loss of the step from the shares of this process's micro-batches."""
        return self._processes.sum(functools.reduce(torch.add, losses))

    def _exchange(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Add up a bucket of gradients over all processes: DistributedDataParallel's hook."""
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return summed


class ExactReduction(Reduction):
    """Adds up along one fixed tree, so that 1, 2, 4 and more processes come to the same bits.

    The rows of the global batch are cut into `lanes`, a power of two that the number of processes
    divides. Micro-batches of a lane add up in order, lanes in pairs, pairs in pairs of pairs, and
    so on: first those of one process, then those of processes at distances 1, 2, 4.
    """

    def __init__(self, model: nn.Module, processes: Processes, lanes: int) -> None:
        super().__init__(model, processes)
        if lanes % processes.size:
            raise ValueError(
                f"lanes={lanes} cannot be shared by {processes.size} processes; use a number of "
                f"processes that is a power of two, up to {lanes}"
            )
        self._lanes = lanes // processes.size
        self._tree = _Tree[dict[Tensor, Tensor]](_add_gradients)

    def micro_batch_size(self, rows: int, asked: int | Literal["auto"]) -> int:
        """Return the same, of the rows of one lane. Errors: ValueError where it does not divide."""
        in_lane, rest = divmod(rows, self._lanes)
        if rest:
            raise ValueError(
                f"{rows} rows cannot be cut into {self._lanes} lanes; use a batch size that is a "
                "multiple of lanes, or fewer lanes"
            )
        if asked == "auto" or asked >= in_lane:
            return in_lane
        if in_lane % asked:
            raise ValueError(
                f"micro_batch_size={asked} does not divide the {in_lane} rows of a lane, as "
                "reduction=exact needs; use a divisor"
            )
        return asked

    def lane(self, batch: Batch) -> Batch:
        """Return one of this process's lanes, of which all have the same number of rows."""
        return batch.part(0, self._lanes)

    def at_most(self, size: int, rows: int) -> int:
        """Return the largest divisor of `rows` up to `size`; 0 if that is 0."""
        return next((n for n in range(min(size, rows), 0, -1) if rows % n == 0), 0)

    def shortened(self, batch: Batch, size: int, count: int) -> Batch:
        """Return the whole batch: every lane has rows."""
        del size, count
        return batch

    def each(self, micro_batches: Iterable[Batch], count: int) -> Iterator[Batch]:
        """Yield the `count` micro-batches, as many in each lane, and put a lane's sum aside."""
        in_lane = count // self._lanes
        self._tree.clear()
        for number, micro_batch in enumerate(super().each(micro_batches, count), 1):
            yield micro_batch
            if number == count:
                break
            if number % in_lane == 0:
                self._tree.add(_taken_gradients(self._model))
        if self._parallel is None:
            self._fold({p: p.grad for p in self._model.parameters() if p.grad is not None})
        self._tree.clear()

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the loss of the step, added up like its gradients."""
        in_lane = len(losses) // self._lanes
        tree = _Tree[Tensor](torch.add)
        for first in range(0, len(losses), in_lane):
            tree.add(functools.reduce(torch.add, losses[first : first + in_lane]))
        (total,) = tree.parts()
        total = total.clone()
        self._processes.sum_in_pairs(total)
        return total

    def _fold(self, gradients: dict[Tensor, Tensor]) -> None:
        """Add what the other lanes of this process came to, in place, to those of its last."""
        for aside in self._tree.parts():
            for parameter, gradient in gradients.items():
                if parameter in aside:
                    gradient.add_(aside[parameter])

    def _exchange(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self._fold(dict(zip(bucket.parameters(), bucket.gradients(), strict=True)))
        self._processes.sum_in_pairs(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


class _Tree(Generic[T]):
    """Adds up a sequence in pairs, pairs of pairs and so on, as its parts come.

    A binary counter: it holds at most one sum of each size.
    """

    def __init__(self, add: Callable[[T, T], T]) -> None:
        self._add = add
        self._parts: list[tuple[int, T]] = []

    def add(self, part: T) -> None:
        """Take the next part, and complete every pair that it completes."""
        size = 1
        while self._parts and self._parts[-1][0] == size:
            part = self._add(self._parts.pop()[1], part)
            size *= 2
        self._parts.append((size, part))

    def parts(self) -> list[T]:
        """Return the sums that wait for their other half, the smallest and last first."""
        return [part for _, part in reversed(self._parts)]

    def clear(self) -> None:
        """Forget them."""
        self._parts.clear()


def _taken_gradients(model: nn.Module) -> dict[Tensor, Tensor]:
    """Take every gradient out of the model."""
    gradients: dict[Tensor, Tensor] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients[parameter] = parameter.grad
            parameter.grad = None
    return gradients


def _add_gradients(
    first: dict[Tensor, Tensor], second: dict[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    for parameter, gradient in second.items():
        first[parameter] = first[parameter].add_(gradient) if parameter in first else gradient
    return first


class _Unit(nn.Module):
    """A model with the forward that ends in the loss, as one module."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, *arguments: Any) -> Tensor:
        return self._forward(*arguments)
