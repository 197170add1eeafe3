"""The memory that a step takes, learnt without taking it."""

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from truestep.batch import Batch
from truestep.loss import LOGITS_PER_CHUNK, DeferredLogits, compute_loss, linear_cross_entropy_sum
from truestep.machine import free_bytes
from truestep.runtime import attention_kernels, computing, module_modes
from truestep.training.muon import MuonAdamW
from truestep.training.optim import trainable_parameters
from truestep.training.probe import logits_of, traced

# How the numbers are held: as a trainer's precision has it, or as a GPU would, in bfloat16 and with
# fused attention.
Arithmetic = Literal["float32", "bfloat16", "gpu"]

# Resident memory of a step to the sum of its tensors. On a CPU the heap has holes: it was 1.2 to
# 1.45 times the sum in one go and up to 1.6 in several micro-batches, whose gradients lie between.
_WASTE = {"cpu": 1.7, "gpu": 1.25}


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
    """Bytes of one micro-batch: all its tensors, and the logits among them, in float32.

    `needed` is what that takes of the machine, allocators included.
    """

    total: int
    logits: int
    needed: int


class StateBytes(NamedTuple):
    """Bytes that training holds between steps, or that every step has; `moments` once there are."""

    weights: int
    gradients: int
    moments: int


def footprint(model: nn.Module, batch: Batch, size: int, arithmetic: Arithmetic) -> Footprint:
    """Return the most that forward, loss and backward of a micro-batch hold at one time.

    That is every tensor beside parameters and batch, when not compiled, gradients included: those
    of the micro-batches before, too, where `size` is not the whole batch. `batch` gives the length,
    `size` the rows, also more than it has. Nothing is computed: fake tensors have only shapes.

    Errors: NotTraceableError.
    """
    device = next(model.parameters()).device
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with (
        traced(model),
        module_modes(model, training=True),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
    ):
        state = {
            name: fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
            for name, tensor in own.items()
        }

        def rows(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor)[:1].expand(size, *tensor.shape[1:]).to(device).clone()

        tokens, targets = rows(batch.tokens), rows(batch.targets)
        inputs = {name: rows(value) for name, value in batch.inputs.items()}
        with (
            _kernels(arithmetic, device, tokens.shape[1]),
            _Ledger([*state.values(), tokens, targets, *inputs.values()]) as ledger,
        ):
            if size < len(batch.tokens):
                for tensor in state.values():
                    tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None
            with _casting(arithmetic, device):
                logits = logits_of(torch.func.functional_call(model, state, (tokens,), inputs))
            loss = _loss(logits, targets)
            loss.backward()  # type: ignore[no-untyped-call] # untyped in torch
    count = logits.shape.numel()
    if isinstance(logits, DeferredLogits):
        count = min(count, LOGITS_PER_CHUNK)
    waste = _WASTE["cpu" if device.type == "cpu" and arithmetic != "gpu" else "gpu"]
    return Footprint(ledger.peak, 4 * count, int(waste * ledger.peak))


def _loss(logits: Tensor | DeferredLogits, targets: Tensor) -> Tensor:
    if not isinstance(logits, DeferredLogits):
        return compute_loss(logits, targets)
    hidden = logits.hidden.flatten(0, 1)
    if hidden.dtype == torch.float16:  # which stands for bfloat16, and has a loss of its own
        hidden = hidden.bfloat16()
    return linear_cross_entropy_sum(hidden, logits.weight, targets.flatten(), only_memory=True)


def _kernels(
    arithmetic: Arithmetic, device: torch.device, num_keys: int
) -> AbstractContextManager[None]:
    if arithmetic == "gpu":
        return nullcontext()
    return attention_kernels(arithmetic, device, num_keys)


def _casting(arithmetic: Arithmetic, device: torch.device) -> AbstractContextManager[Any]:
    if arithmetic == "gpu":  # as wide as bfloat16, for which a CPU may have other ways
        return torch.autocast("cpu", torch.float16)
    return computing(arithmetic, device)


def copy_bytes(state: StateBytes, device: torch.device) -> int:
    """Return what a checkpoint takes while it is written: on a CPU a copy of what is saved."""
    return state.weights + state.moments if device.type == "cpu" else 0


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> StateBytes:
    """Return what training holds beside a micro-batch.

    An optimizer that has not stepped yet has two moments to come for every number that is trained,
    as Adam's kind, and Muon one.
    """
    trained = _bytes_of(trainable_parameters(model))
    moments = held_moments(optimizer)
    if not moments:
        once = optimizer.param_groups[-1]["params"] if isinstance(optimizer, MuonAdamW) else []
        moments = 2 * trained - _bytes_of(once)
    return StateBytes(_bytes_of(model.parameters()), trained, moments)


def bytes_to_come(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return what training takes beside a micro-batch: moments, and on a CPU a copy to be saved."""
    state = state_bytes(model, optimizer)
    copy = copy_bytes(state, next(model.parameters()).device)
    return state.moments - held_moments(optimizer) + copy


def room_for_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Return the bytes that are free for a micro-batch, all to come put aside; None if unknown."""
    free = free_bytes(next(model.parameters()).device)
    return None if free is None else max(0, free - bytes_to_come(model, optimizer))


def held_moments(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state by now."""
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    return _bytes_of(value for value in values if isinstance(value, Tensor))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
