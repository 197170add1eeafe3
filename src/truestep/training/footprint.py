"""The memory that a step takes, learnt without taking it."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from truestep.batch import Batch
from truestep.loss import compute_loss
from truestep.runtime import attention_kernels, computing, module_modes
from truestep.training.probe import logits_of


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


def step_bytes(
    model: nn.Module, batch: Batch, size: int, precision: Literal["float32", "bfloat16"]
) -> int:
    """Return the most that forward, loss and backward of a micro-batch hold at one time.

    That is every tensor beside parameters and batch, gradients included, when not compiled; `batch`
    gives the length, `size` the rows. Nothing is computed: fake tensors have only shapes.

    Errors: RuntimeError or AssertionError for a model that does not run so, because what it does
    depends on the values.
    """
    device = next(model.parameters()).device
    rows = next(batch.split(size))
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with module_modes(model, training=True), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state = {
            name: fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
            for name, tensor in own.items()
        }
        tokens, targets = (fake.from_tensor(t).to(device) for t in (rows.tokens, rows.targets))
        inputs = {name: fake.from_tensor(value).to(device) for name, value in rows.inputs.items()}
        attention = attention_kernels(precision, device, tokens.shape[1])
        with attention, _Ledger([*state.values(), tokens, targets, *inputs.values()]) as ledger:
            with computing(precision, device):
                output = torch.func.functional_call(model, state, (tokens,), inputs)
            loss = compute_loss(logits_of(output), targets)
            loss.backward()  # type: ignore[no-untyped-call] # untyped in torch
    peak: int = ledger.peak
    return peak
