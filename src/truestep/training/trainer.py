"""The trainer: one step that is right, and the loop around it."""

import contextlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truestep import runtime
from truestep.batch import Batch, check_token_ids
from truestep.compiler import parts_of, resolve_compile
from truestep.config import TrainingConfig
from truestep.distributed import process
from truestep.machine import accelerator_is_full
from truestep.metrics import StepMetrics
from truestep.observe.sinks import ConsoleSink, Sink
from truestep.training.companion import Companion
from truestep.training.compose import (
    build_optimizer,
    build_schedule,
    check_arguments,
    resolve_settings,
)
from truestep.training.diagnosis import Diagnosis, NonFiniteError, diagnose
from truestep.training.evaluate import Evaluation, evaluate
from truestep.training.feed import StepData, batches_from, fit_inputs
from truestep.training.forward import ForwardLoss
from truestep.training.guard import BufferGuard, UpdateGuard
from truestep.training.optim import clear_gradients, clip_gradients, set_learning_rates, update
from truestep.training.probe import ModelFacts, probe
from truestep.training.readback import Readback
from truestep.training.reduction import ExactReduction, Reduction, resolve_lanes
from truestep.training.schedule import Schedule

_NEVER = 2**62  # steps in a row: a single step halts nothing


class _Launched(NamedTuple):
    """A step whose numbers may still be on their way from the device."""

    step: int
    batch: Batch
    numbers: Readback
    learning_rate: float


class Trainer:
    """Trains any module that maps tokens [B, T] to logits [B, T, V].

    The model may return a tensor, `DeferredLogits`, or an object with `.logits`. `optimizer` and
    `schedule` replace those that `config` names; `companions` are made by `every`; `sinks` receive
    every record (default: lines on the console). `step` counts the updates so far; `when_resized`
    is called before a step for which an accelerator's memory did not suffice is made again.

    Errors: ValueError for a model without trainable parameters, or a device that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Schedule | None = None,
        device: str | torch.device = "auto",
        companions: Iterable[Companion] = (),
        sinks: Iterable[Sink] | None = None,
    ) -> None:
        config = config or TrainingConfig()
        companions = list(companions)
        check_arguments(model, config, optimizer, companions)
        runtime.keep_freed_memory()
        self.device = runtime.resolve_device(str(device))
        self.model = model.to(self.device)
        self.precision = runtime.resolve_precision(config.precision, model, self.device)
        self.config = resolve_settings(config, self.precision, self.device)
        self.optimizer = optimizer or build_optimizer(model, self.config)
        self.schedule = schedule or build_schedule(self.config)
        self.processes = process.current()
        self.reduction = Reduction(model, self.processes)  # `prepare` makes the one asked for
        self.companions = companions
        speaks = sinks is None and self.processes.rank == 0
        self.sinks: list[Sink] = [ConsoleSink()] if speaks else list(sinks or ())
        self.runs_ahead = self.device.type != "cpu"  # `fit` reads a step while the next one runs
        self.step = 0
        self.stop_reason: str | None = None
        self.facts: ModelFacts | None = None  # what `prepare` learns from the first batch
        self.skipped_in_a_row = 0  # steps up to now whose loss or gradient was not finite
        self._forward: ForwardLoss | None = None  # `prepare` makes it
        self._in_flight: list[_Launched] = []  # by `fit`, up to `_end`
        self._end = 0
        self._guard = UpdateGuard(_NEVER, 0, self.device)
        self._buffers = BufferGuard(model)
        self.in_step = False  # an exception came out of a step
        self.mid_update = False  # and left the state between two of them
        self.when_resized: Callable[[], object] = lambda: None
        self._stopping = False
        self._steps_taken = 0
        self._clock = 0.0  # when the time that the next record reports began
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def training_step(self, batch: Any) -> StepMetrics:
        """Update the parameters once from `batch`, log the loss, and return the step's metrics.

        `batch` is anything that `Batch.of` takes; of several processes, each gives its own rows, as
        `Batch.part` returns them. A loss or gradient that is not finite, and a batch without a
        target, change nothing; `metrics.skipped` says so.
        """
        self._clock = time.perf_counter()
        return self._report(self._launch(batch))[0]

    def _step(self, batch: Batch, buffers: list[Tensor]) -> _Launched:
        """Forward, loss, backward and update: the whole of training is here."""
        on_device = batch.to(self.device)
        num_tokens = self.processes.sum(on_device.num_targets)  # of the whole global batch
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
        numbers = Readback(
            loss=loss, grad_norm=grad_norm, num_tokens=num_tokens, skipped=skipped, halted=halted
        )
        return _Launched(self.step, batch, numbers, learning_rate)

    def _launch(self, batch: Any) -> _Launched:
        """Make a step, which leaves no trace if it fails before its update.

        Where the memory of an accelerator ends, the step is made again in smaller micro-batches,
        once those before it have been read, logged and found to be finite.
        """
        batch = self._checked(Batch.of(batch))
        buffers = self._buffers.copy()
        while True:
            self.in_step = True
            try:
                launched = self._step(batch, buffers)
            except BaseException as error:
                if self.mid_update:
                    raise
                self._buffers.restore(buffers)
                clear_gradients(self.model, self.optimizer)
                # Where there are other processes, they are in the middle of this step.
                if self.processes.size > 1 or not accelerator_is_full(error):
                    raise
                size = self.micro_batch_size(batch)
                smaller = self.reduction.at_most(size // 2, len(self.reduction.lane(batch).tokens))
                if not smaller:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors
            else:
                self.in_step = False
                return launched
            self.in_step = False
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
            self._land(0)
            self._resize(batch, smaller)

    def fit(self, data: StepData | Iterable[Any], num_steps: int | None = None) -> None:
        """Train up to step `num_steps` (default: the config's), calling the companions on the way.

        `data` has `batch_at(step)`, or is an iterable of batches. On an accelerator the record of
        a step is written while the next one runs; companions and the end wait for it.
        Errors: NonFiniteError at a loss or gradient that is not finite, unless it is one of
        `max_skipped_steps` in a row; `step` is then the one before it, and so is all state.
        """
        end = self.config.num_steps if num_steps is None else num_steps
        if not isinstance(end, int) or end < 1:
            raise ValueError(f"num_steps={end} must be a whole number of updates, 1 or more")
        resumed = self.step != self._steps_taken
        if not self._stopping:  # a signal may come before the first step
            self.stop_reason = None
        self._guard = UpdateGuard(self.config.max_skipped_steps, self.skipped_in_a_row, self.device)
        self._clock = time.perf_counter()
        self._end = end
        try:
            if self.step < end:
                batches = batches_from(data, self.step, resumed=resumed, processes=self.processes)
                for batch in batches:
                    self._in_flight.append(self._launch(batch))
                    self._land(1 if self.runs_ahead and not self._due(self.step) else 0)
                    if self.step >= end or self._stopping:
                        break
            self._land(0)
        except NonFiniteError:
            self._in_flight.clear()  # launched after it, and halted: these updated nothing
            raise
        finally:
            self._guard, self._stopping = UpdateGuard(_NEVER, 0, self.device), False
            left, self._in_flight = self._in_flight, []
            for launched in left:  # an exception came between: what was done is still logged
                metrics, halted = self._report(launched)
                if halted:
                    self._rewind(metrics.step - 1)
                    break

    def stop(self, reason: str) -> None:
        """End `fit` after the current step; `stop_reason` keeps the reason."""
        self.stop_reason, self._stopping = reason, True

    def evaluate(self, batches: Iterable[Any], *, token_bytes: Tensor | None = None) -> Evaluation:
        """Return the loss over all batches in this trainer's precision; training is untouched."""
        checked = (self._checked(Batch.of(batch)) for batch in batches)
        return evaluate(self.model, checked, token_bytes=token_bytes, precision=self.precision)

    def log(self, record: dict[str, Any]) -> None:
        """Write a record to every sink."""
        for sink in self.sinks:
            sink.write(record)

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

    def _diagnosed(self, batch: Batch) -> Diagnosis:
        """Diagnose, unless that itself fails: it takes more memory than the step did."""
        try:
            return self.diagnose(batch)
        except Exception:  # noqa: BLE001 the model's own hooks may raise anything
            return Diagnosis("not diagnosed")

    # The parts of a step.

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

    @contextlib.contextmanager
    def _micro_batches(self, batch: Batch) -> Iterator[Iterable[Batch]]:
        size = self.micro_batch_size(batch)
        with self._prepared().micro_batches(batch, size, self.step) as micro_batches:
            yield self.reduction.each(micro_batches, -(-len(batch.tokens) // size))

    def micro_batch_size(self, batch: Batch) -> int:
        """Return how many rows of a batch one backward pass takes."""
        return self.reduction.micro_batch_size(len(batch.tokens), self.config.micro_batch_size)

    def _resize(self, batch: Batch, smaller: int) -> None:
        """Make micro-batches smaller from this step on, and say so."""
        warnings.warn(
            f"the memory of {self.device} ended in step {self.step + 1} with micro-batches of "
            f"{self.micro_batch_size(batch):,} rows: from here on they have {smaller:,}, which "
            "changes neither loss nor gradient, only where dropout falls",
            stacklevel=2,
        )
        self.config = self.config.model_copy(update={"micro_batch_size": smaller})
        self.when_resized()

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

    # What a step tells.

    def _report(self, launched: _Launched) -> tuple[StepMetrics, bool]:
        """Read the step's numbers from the device and log them; return whether it halts, too."""
        numbers = launched.numbers.read()
        metrics = StepMetrics(
            step=launched.step,
            loss=numbers["loss"],
            grad_norm=numbers["grad_norm"],
            learning_rate=launched.learning_rate,
            num_tokens=int(numbers["num_tokens"]),
            step_seconds=time.perf_counter() - self._clock,
            skipped=bool(numbers["skipped"]),
            batch_hash=self.processes.sum_of_hashes(launched.batch.hash()),
        )
        if metrics.num_tokens:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.skipped else 0
        self.log(metrics.as_record())
        self._clock = time.perf_counter()
        return metrics, bool(numbers["halted"])

    def _rewind(self, step: int) -> None:
        """Go back to the last step that counted: those launched after it changed nothing."""
        self._steps_taken -= self.step - step
        self.step = step
        self.skipped_in_a_row -= 1
        if step:
            set_learning_rates(self.optimizer, self.schedule, step - 1)

    def _due(self, step: int) -> bool:
        return any(step % c.interval == 0 or step == self._end for c in self.companions)

    def _land(self, still_in_flight: int) -> None:
        """Finish the oldest steps of `fit`, until only so many are in flight."""
        while len(self._in_flight) > still_in_flight:
            self._finish(self._in_flight.pop(0))

    def _finish(self, launched: _Launched) -> None:
        """Log a step of `fit`, stop at a number that is not finite, and call its companions."""
        metrics, halted = self._report(launched)
        if halted:
            self._rewind(metrics.step - 1)
            raise NonFiniteError(metrics, launched.batch, self._diagnosed(launched.batch))
        for companion in self.companions:
            if metrics.step % companion.interval == 0 or metrics.step == self._end:
                companion.function(self, metrics)
        self._clock = time.perf_counter()  # what companions took is no part of a step
