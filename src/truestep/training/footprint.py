"""The memory that a step takes, learnt without taking it."""

import contextlib
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from truestep.batch import Batch
from truestep.loss import LOGITS_PER_CHUNK, DeferredLogits, compute_loss
from truestep.machine import free_bytes
from truestep.observe.text import format_bytes
from truestep.runtime import attention_kernels, computing, module_modes
from truestep.training.probe import logits_of

# The resident memory of a step on a CPU was 1.2 times the sum of its tensors: allocators round up.
_WASTE = 1.25


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call] # untyped in torch
    """Counts the bytes of every tensor that comes to be and of those that go, but for `given`."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.peak = 0
        self._now = 0
        self._held = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())  # views share theirs
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._held:
            self._held[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, identity: int) -> None:
        self._now -= self._held.pop(identity)


class Footprint(NamedTuple):
    """Bytes of one micro-batch: all its tensors, and the logits among them, in float32."""

    total: int
    logits: int


def footprint(
    model: nn.Module,
    batch: Batch,
    size: int,
    precision: Literal["float32", "bfloat16"],
    on_gpu: bool = False,
) -> Footprint:
    """Return the most that forward, loss and backward of a micro-batch hold at one time.

    That is every tensor beside parameters and batch, gradients included, when not compiled; `batch`
    gives the length, `size` the rows, also more than it has. Nothing is computed: fake tensors have
    only shapes. With `on_gpu`, as a GPU would in bfloat16: attention holds no square of the length.

    Errors: RuntimeError or AssertionError for a model that does not run so, because what it does
    depends on the values.
    """
    device = next(model.parameters()).device
    rows = _rows(batch, size)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with module_modes(model, training=True), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state = {
            name: fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
            for name, tensor in own.items()
        }
        tokens, targets = (fake.from_tensor(t).to(device) for t in (rows.tokens, rows.targets))
        inputs = {name: fake.from_tensor(value).to(device) for name, value in rows.inputs.items()}
        if on_gpu:  # as wide as bfloat16, for which a CPU may have other ways
            attention: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            arithmetic: contextlib.AbstractContextManager[Any] = torch.autocast(
                "cpu", torch.float16
            )
        else:
            attention = attention_kernels(precision, device, tokens.shape[1])
            arithmetic = computing(precision, device)
        with attention, _Ledger([*state.values(), tokens, targets, *inputs.values()]) as ledger:
            with arithmetic:
                output = torch.func.functional_call(model, state, (tokens,), inputs)
            logits = logits_of(output)
            loss = compute_loss(logits, targets)
            loss.backward()  # type: ignore[no-untyped-call] # untyped in torch
    count = logits.shape.numel()
    if isinstance(logits, DeferredLogits):
        count = min(count, LOGITS_PER_CHUNK)
    return Footprint(ledger.peak, 4 * count)


def _rows(batch: Batch, size: int) -> Batch:
    """Return a batch of so many rows like the first ones."""
    index = torch.arange(size) % len(batch.tokens)
    inputs = {name: value[index.to(value.device)] for name, value in batch.inputs.items()}
    index = index.to(batch.tokens.device)
    return Batch(batch.tokens[index], batch.targets[index], inputs)


def needed_bytes(
    model: nn.Module,
    batch: Batch,
    size: int,
    precision: Literal["float32", "bfloat16"],
    on_gpu: bool = False,
) -> int:
    """Return what a micro-batch takes of the machine, allocators included. Errors: as above."""
    return int(_WASTE * footprint(model, batch, size, precision, on_gpu).total)


def bytes_to_come(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return what training takes beside a micro-batch: moments, gradients, a copy to be saved."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    copy = 3 * parameters if next(model.parameters()).device.type == "cpu" else 0
    accumulated = parameters  # the gradients of the micro-batches before
    return max(0, 2 * parameters - moment_bytes(optimizer)) + copy + accumulated


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return what an optimizer's state takes by now."""
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def largest_micro_batch(
    model: nn.Module,
    batch: Batch,
    room: int,
    precision: Literal["float32", "bfloat16"],
    on_gpu: bool = False,
) -> int:
    """Return the most rows, to one in fifty, of a micro-batch that takes up to `room` bytes.

    0 if not even one does. Errors: as for `footprint`.
    """
    low, high = 0, 1
    while (needed := needed_bytes(model, batch, high, precision, on_gpu)) <= room:
        # Nearly proportional: the next guess lies just above what fits.
        low, high = high, max(high + 1, high * room // needed + high // 50)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        fits = needed_bytes(model, batch, middle, precision, on_gpu) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def largest_divisor(
    model: nn.Module, batch: Batch, below: int, room: int, precision: Literal["float32", "bfloat16"]
) -> int:
    """Return the most rows `below` a number that divide the batch and take up to `room` bytes.

    0 if there are none. Errors: as for `footprint`.
    """
    sizes = [size for size in range(1, below) if len(batch.tokens) % size == 0]
    count = bisect_right(sizes, room, key=lambda n: needed_bytes(model, batch, n, precision))
    return sizes[count - 1] if count else 0


def micro_batch_that_fits(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    precision: Literal["float32", "bfloat16"],
) -> int | Literal["auto"]:
    """Return "auto" where a step of the whole batch fits into what is free, or is not known to.

    Else the most rows that divide the batch and fit, which is said by a warning; 1 if none do.
    """
    free = free_bytes(next(model.parameters()).device)
    if free is None:
        return "auto"
    room, rows = max(0, free - bytes_to_come(model, optimizer)), len(batch.tokens)
    try:
        needed = needed_bytes(model, batch, rows, precision)
        if needed <= room:
            return "auto"
        size = largest_divisor(model, batch, rows, room, precision) or 1
    except (RuntimeError, AssertionError):  # the model does not run on fake tensors
        return "auto"
    warnings.warn(
        f"a step of {rows} rows needs about {format_bytes(needed)}, and {format_bytes(room)} are "
        f"free: it is split into micro-batches of {size}; but for dropout, loss and gradient stay",
        stacklevel=2,
    )
    return size
