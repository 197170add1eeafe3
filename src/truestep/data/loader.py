"""Batches as a pure function of the step, and a thread that computes them ahead of time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int64

from truestep.batch import Batch
from truestep.data.order import order_key, permute
from truestep.loss import IGNORE_INDEX


class Tokens(Protocol):
    """A sequence of token ids: a split of prepared data, or anything like it."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def read(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """Return the ids of tokens `start` to `stop`."""


class BatchSource(Protocol):
    """Anything that has a batch at every step."""

    def batch_at(self, step: int, *, part: int = 0, parts: int = 1) -> Batch:
        """Return one part of the global batch of a step."""


class WindowLoader:
    """The windows of a split, in an order of their own every epoch.

    Window i reads tokens [iT, iT+T]: neighbours share one token, so that every token but the first
    is a target exactly once an epoch. The last window is padded. A batch may hold the end of one
    epoch and the start of the next.

    Errors: ValueError for a split shorter than one window.
    """

    def __init__(
        self,
        split: Tokens,
        *,
        context_length: int,
        batch_size: int,
        seed: int = 0,
        source: str = "train",
    ) -> None:
        _check_sizes(context_length, batch_size)
        if len(split) < context_length + 1:
            raise ValueError(
                f"the text has {len(split)} tokens, fewer than the {context_length + 1} of one "
                f"window with context_length={context_length}; use a shorter context or more text"
            )
        self.split = split
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.source = source
        self.num_windows = _num_windows(split, context_length)

    def batch_at(self, step: int, *, part: int = 0, parts: int = 1) -> Batch:
        """Return rows [part * B // parts, (part + 1) * B // parts) of a step's global batch."""
        first, end = rows_of_part(self.batch_size, part, parts)
        start = step * self.batch_size
        windows = self.windows_between(start + first, start + end)
        return read_rows([(self.split, w) for w in windows.tolist()], self.context_length, first)

    def windows_at(self, step: int) -> Int64[np.ndarray, "B"]:
        """Return which windows the global batch of a step holds."""
        return self.windows_between(step * self.batch_size, (step + 1) * self.batch_size)

    def windows_between(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """Return the windows that positions start to stop - 1 read, counted from step 0.

        Each is a permuted place in the epoch of its position.
        """
        if start < 0:
            raise ValueError(f"step={start // self.batch_size} must be at least 0")
        windows = []
        position = start
        while position < stop:
            epoch, place = divmod(position, self.num_windows)
            places = np.arange(place, min(place + stop - position, self.num_windows))
            key = order_key(self.seed, self.source, epoch)
            windows.append(permute(places, self.num_windows, key))
            position += places.size
        return np.concatenate(windows)


class Prefetch:
    """Computes the batches of the next steps in a thread, around anything that has `batch_at`.

    It is a cache and no more: every order of asking gives the same batches, and an error comes up
    at the step that it belongs to. `source` is only called from the thread. With `pin_memory` the
    batches lie in memory that an accelerator copies from asynchronously.
    """

    def __init__(self, source: BatchSource, *, depth: int = 2, pin_memory: bool = False) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1 to compute ahead")
        self._source = source
        self._depth = depth
        self._pin_memory = pin_memory
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._batches: dict[tuple[int, int, int], Future[Batch]] = {}

    def batch_at(self, step: int, *, part: int = 0, parts: int = 1) -> Batch:
        """Return the source's batch, and have those of the next steps computed.

        Errors: those of the source; RuntimeError after `close`.
        """
        wanted = [(step + ahead, part, parts) for ahead in range(self._depth + 1)]
        for key in self._batches.keys() - wanted:
            self._batches.pop(key).cancel()
        for key in wanted:
            if key not in self._batches:
                self._batches[key] = self._worker.submit(self._compute, *key)
        return self._batches.pop(wanted[0]).result()

    def close(self) -> None:
        """End the thread; what it had computed is forgotten."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._batches.clear()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _compute(self, step: int, part: int, parts: int) -> Batch:
        batch = self._source.batch_at(step, part=part, parts=parts)
        if not self._pin_memory:
            return batch
        inputs = {name: value.pin_memory() for name, value in batch.inputs.items()}
        return replace(
            batch,
            tokens=batch.tokens.pin_memory(),
            targets=batch.targets.pin_memory(),
            inputs=inputs,
        )


def evaluation_batches(
    split: Tokens, *, context_length: int, batch_size: int, num_windows: int | None = None
) -> Iterator[Batch]:
    """Return batches of all windows in order, or of `num_windows` evenly spread over the split.

    The choice depends on nothing but the sizes. Every batch has `batch_size` rows: the last one is
    filled up with rows that have no target. A split shorter than a window gives one, padded.

    Errors: ValueError for a split of fewer than 2 tokens.
    """
    _check_sizes(context_length, batch_size)
    if len(split) < 2:
        raise ValueError(f"the text to evaluate on has {len(split)} tokens; at least 2 are needed")
    if num_windows is not None and num_windows < 1:
        raise ValueError(f"num_windows={num_windows} must be at least 1")
    total = _num_windows(split, context_length)
    count = total if num_windows is None else min(num_windows, total)

    def batch_from(first: int) -> Batch:
        shares = range(first, min(first + batch_size, count))
        windows = [(2 * i + 1) * total // (2 * count) for i in shares]  # the middle of each
        rows = [(split, window) for window in windows]
        return read_rows(rows, context_length, first, num_rows=batch_size)

    return (batch_from(first) for first in range(0, count, batch_size))


def _check_sizes(context_length: int, batch_size: int) -> None:
    for name, value in (("context_length", context_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _num_windows(split: Tokens, context_length: int) -> int:
    """Return how many windows it takes for every token but the first to be a target."""
    return -(-(len(split) - 1) // context_length)


def rows_of_part(batch_size: int, part: int, parts: int) -> tuple[int, int]:
    """Return the first row of a part of a global batch, and the row after its last.

    Errors: ValueError for a part that such a batch does not have.
    """
    if not (1 <= parts <= batch_size and 0 <= part < parts):
        raise ValueError(
            f"part={part} of parts={parts} is not a part of batch_size={batch_size}; "
            "use 0 <= part < parts <= batch_size"
        )
    return part * batch_size // parts, (part + 1) * batch_size // parts


def read_rows(
    windows: Sequence[tuple[Tokens, int]],
    context_length: int,
    index: int,
    num_rows: int | None = None,
) -> Batch:
    """Return windows, each of a split, as rows, with rows without targets up to `num_rows`."""
    shape = (num_rows or len(windows), context_length)
    tokens = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, (split, window) in enumerate(windows):
        start = window * context_length
        ids = split.read(start, min(start + context_length + 1, len(split)))
        tokens[row, : ids.size - 1] = ids[:-1]
        targets[row, : ids.size - 1] = ids[1:]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), index=index)
