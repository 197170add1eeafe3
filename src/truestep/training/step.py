"""One step that is right: forward, loss, backward and update."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truestep import runtime
from truestep.batch import Batch, check_token_ids
from truestep.compiler import parts_of, resolve_compile
from truestep.config import TrainingConfig
from truestep.distributed import process
from truestep.training.compose import build_optimizer, build_schedule, resolve_settings
from truestep.training.diagnosis import Diagnosis, diagnose
from truestep.training.feed import fit_inputs
from truestep.training.forward import ForwardLoss
from truestep.training.guard import BufferGuard, UpdateGuard
from truestep.training.optim import clear_gradients, clip_gradients, set_learning_rates, update
from truestep.training.probe import ModelFacts, probe
from truestep.training.readback import Readback
from truestep.training.reduction import ExactReduction, Reduction, resolve_lanes
from truestep.training.schedule import Schedule

NEVER = 2**62  # steps in a row: a single step halts nothing


class Launched(NamedTuple):
    """A step whose numbers may still be on their way from the device."""

    step: int
    batch: Batch
    numbers: Readback
    learning_rate: float


class Stepper:
    """Updates a model once from a batch: all that a step needs, and what it leaves behind.

    `step` counts the updates so far. Errors: ValueError for a device that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        optimizer: torch.optim.Optimizer | None,
        schedule: Schedule | None,
        device: str | torch.device,
    ) -> None:
        runtime.keep_freed_memory()
        self.device = runtime.resolve_device(str(device))
        self.model = model.to(self.device)
        self.precision = runtime.resolve_precision(config.precision, model, self.device)
        self.config = resolve_settings(config, self.precision, self.device)
        self.optimizer = optimizer or build_optimizer(model, self.config)
        self.schedule = schedule or build_schedule(self.config)
        self.processes = process.current()
        self.reduction = Reduction(model, self.processes)  # `prepare` makes the one asked for
        self.step = 0
        self.facts: ModelFacts | None = None  # what `prepare` learns from the first batch
        self.mid_update = False  # an exception left the state between two steps
        self.stop_asked = False  # of this process
        self._forward: ForwardLoss | None = None  # `prepare` makes it
        self._guard = UpdateGuard(NEVER, 0, self.device)
        self._buffers = BufferGuard(model)
        self._steps_taken = 0
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def _step(self, batch: Batch, buffers: list[Tensor]) -> Launched:
        """Forward, loss, backward and update: the whole of training is here."""
        on_device = batch.to(self.device)
        shared = self._exchange(batch, on_device.num_targets)
        num_tokens = shared["num_tokens"]  # of the whole global batch
        clear_gradients(self.model, self.optimizer)
        with self._micro_batches(on_device) as micro_batches:
            losses = [
                self._forward_backward(micro_batch, num_tokens) for micro_batch in micro_batches
            ]
            loss = self.reduction.total(losses)  # over all processes, as the gradients are
            grad_norm = self._clip_gradients()  # measured even when clipping is off
            finite = loss.isfinite() & grad_norm.isfinite()
            learning_rate = set_learning_rates(self.optimizer, self.schedule, self.step)
            self.mid_update = True
            skipped, halted = self._guard.judge(finite, num_tokens)
            update(self.optimizer, skipped)
        self._buffers.restore(buffers, skipped)  # as they were before the forward
        clear_gradients(self.model, self.optimizer)
        self.step += 1
        self._steps_taken += 1
        self.mid_update = False
        numbers = Readback(loss=loss, grad_norm=grad_norm, skipped=skipped, halted=halted, **shared)
        return Launched(self.step, batch, numbers, learning_rate)

    def prepare(self, batch: Any) -> None:
        """Resolve what depends on a batch's shape; the first step does it if nobody did."""
        batch = fit_inputs(Batch.of(batch), self.model)
        self.facts = probe(self.model, batch)
        flops = self.facts.flops_per_token if self.facts else 0.0
        rows = len(batch.tokens) * self.processes.size
        run_flops = flops * rows * batch.tokens.shape[1] * self.config.num_steps
        compilation = resolve_compile(
            self.config.compile,
            self.device,
            run_flops,
            has_layers=bool(parts_of(self.model)),
        )
        lanes = resolve_lanes(self.config.lanes, rows)
        resolved = {"compile": compilation, "lanes": lanes}
        self.config = self.config.model_copy(update=resolved)
        if self.config.reduction == "exact":
            self.reduction = ExactReduction(self.model, self.processes, lanes)
        self._forward = ForwardLoss(
            self.model, self.config, self.precision, self.device, self.reduction.wrapped
        )

    def token_losses(self, batch: Any) -> Tensor:
        """Return the loss [B, T] of each target, as the next step would compute it from `batch`.

        With that step's dropout, but uncompiled; 0 where a target is ignored. Nothing is updated.
        """
        batch = self._checked(Batch.of(batch)).to(self.device)
        forward = self._prepared()
        with forward.rehearsal(batch, self.micro_batch_size(batch), self.step) as micro_batches:
            return torch.cat([forward.token_losses(part) for part in micro_batches])

    def diagnose(self, batch: Any) -> Diagnosis:
        """Return where the first number that is not finite comes from, if the next step has one.

        The step is computed once more, uncompiled, which need not give the same bits. Nothing is
        updated.
        """
        batch = self._checked(Batch.of(batch)).to(self.device)
        forward, num_tokens = self._prepared(), batch.num_targets
        with forward.rehearsal(batch, self.micro_batch_size(batch), self.step) as micro_batches:
            return diagnose(
                self.model,
                ((part.index, partial(forward.eager, part, num_tokens)) for part in micro_batches),
            )

    def _checked(self, batch: Batch) -> Batch:
        """Return the batch as the model takes it, or refuse it before the device sees it."""
        if self._forward is None:
            self.prepare(batch)
        if self.facts is not None:
            check_token_ids(batch, self.facts.vocab_size)
        return fit_inputs(batch, self.model)

    def _prepared(self) -> ForwardLoss:
        assert self._forward is not None
        return self._forward

    def _exchange(self, batch: Batch, num_targets: Tensor) -> dict[str, Tensor]:
        """Return what processes add up before a step: its targets and hash, and who has to stop."""
        own = batch.hash()
        sums = self.processes.sums(num_targets, self.stop_asked, int(own or "0", 16))
        shared = dict(zip(("num_tokens", "stops", "batch_hash"), sums, strict=True))
        if own is None:
            del shared["batch_hash"]
        return shared

    @contextlib.contextmanager
    def _micro_batches(self, batch: Batch) -> Iterator[Iterable[Batch]]:
        size = self.micro_batch_size(batch)
        with self._prepared().micro_batches(batch, size, self.step) as micro_batches:
            yield self.reduction.each(micro_batches, -(-len(batch.tokens) // size))

    def micro_batch_size(self, batch: Batch) -> int:
        """Return how many rows of a batch one backward pass takes."""
        return self.reduction.micro_batch_size(len(batch.tokens), self.config.micro_batch_size)

    def _forward_backward(self, batch: Batch, num_tokens: Tensor) -> Tensor:
        """Add this micro-batch's share of the gradient; return its share of the loss."""
        forward = self._prepared()
        with forward.running():
            loss = forward(batch, num_tokens)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _clip_gradients(self) -> Tensor:
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        max_norm = self.config.max_grad_norm
        return clip_gradients(gradients, None if max_norm == "off" else max_norm).to(self.device)
