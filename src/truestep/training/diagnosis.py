"""Where a number that is not finite came from: the step is run once more, and watched."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from truestep.batch import Batch
from truestep.compiler import uncompiled
from truestep.metrics import StepMetrics
from truestep.training.guard import BufferGuard
from truestep.training.optim import clip_gradients
from truestep.training.watch import Watch, is_finite, is_finite_or_mask, owner_of


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Where the first number of a step that is not finite came from.

    `module` is the qualified name of the first bad module ("" for the model itself) and `kind` its
    class ("" if it was no module). `micro_batch` is the position of its first row in the global
    batch, -1 if it was no single one. `parameters`, in model order, held such numbers (phase
    "parameters": buffers, too), or else their gradients did.
    """

    phase: Literal[
        "parameters",
        "forward",
        "loss",
        "backward",
        "gradient norm",
        "not reproduced",
        "not diagnosed",
    ]
    module: str = ""
    kind: str = ""
    micro_batch: int = -1
    parameters: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self) | {"parameters": list(self.parameters)}

    def __str__(self) -> str:
        who = f"{self.module or 'the model itself'} ({self.kind})" if self.kind else "the loss"
        more = f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else ""
        names = ", ".join(self.parameters[:3]) + more
        what = {
            "parameters": f"{who} is the first to hold a value that is not finite, in {names}",
            "forward": f"{who} returned the first value that is not finite",
            "loss": "the first value that is not finite is the loss itself",
            "backward": f"{who} gave the first gradient that is not finite; it spoilt {names}",
            "gradient norm": "every gradient is finite, but their norm overflows",
            "not reproduced": "run once more, the step gave finite numbers only",
            "not diagnosed": "running the step once more failed",
        }[self.phase]
        at = f", micro-batch at row {self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"{self.phase}: {what}{at}"


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not finite; parameters and optimizer state were left unchanged.

    `metrics` and `batch` are that step's, `diagnosis` says where it came from.
    """

    def __init__(self, metrics: StepMetrics, batch: Batch, diagnosis: Diagnosis) -> None:
        self.metrics, self.batch, self.diagnosis = metrics, batch, diagnosis
        super().__init__(
            f"step {metrics.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}; nothing "
            f"was updated. {diagnosis}. Lower learning_rate or check this step's data"
        )


def diagnose(
    model: nn.Module, micro_batches: Iterable[tuple[int, Callable[[], Tensor]]]
) -> Diagnosis:
    """Run a step's forward and backward once more and say where its numbers stop being finite.

    Each pair is a micro-batch's first row and a function that returns its share of the loss,
    connected to the graph; modes, precision and seeds are the caller's. Each loss goes backward
    before the next function is called; none is called after the first that is not finite.
    Gradients add up as in the step and are cleared before and after; persistent buffers are put
    back. A value of minus infinity that needs no gradient is a mask, and counts as finite.
    """
    with _put_back(model), uncompiled(), contextlib.closing(Watch(model)) as watch:
        tensors = (*model.named_parameters(), *model.named_buffers())
        if held := tuple(name for name, tensor in tensors if not is_finite_or_mask(tensor)):
            return Diagnosis("parameters", *owner_of(model, held[0]), parameters=held)
        for index, share_of_loss in micro_batches:
            if found := _run(model, watch, index, share_of_loss):
                return found
        norm = clip_gradients([p.grad for p in model.parameters() if p.grad is not None], None)
        return Diagnosis("not reproduced" if is_finite(norm) else "gradient norm")


def _run(
    model: nn.Module, watch: Watch, index: int, share_of_loss: Callable[[], Tensor]
) -> Diagnosis | None:
    """Run a micro-batch forward and backward; return what made it other than finite, if it is."""
    watch.begin()
    loss = share_of_loss()
    watch.claim([loss])
    # Backward, too, if the forward was bad: what that spoils is part of the answer, and a value
    # that reaches neither the loss nor a gradient spoilt nothing.
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = tuple(name for name, gradient in gradients if not is_finite(gradient))
    if is_finite(loss) and not bad:
        return None
    if watch.forward is not None:
        return Diagnosis("forward", *watch.forward, index, bad)
    if not is_finite(loss):
        return Diagnosis("loss", micro_batch=index, parameters=bad)
    # No node sees finite shares overflow when they are added up in `.grad`.
    return Diagnosis("backward", *(watch.backward or owner_of(model, bad[0])), index, bad)


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Clear gradients before and after, and put persistent buffers back."""
    guard, device = BufferGuard(model), next(model.parameters()).device
    buffers = guard.copy()
    model.zero_grad()
    try:
        yield
    finally:
        model.zero_grad()
        guard.restore(buffers, torch.ones((), dtype=torch.bool, device=device))
