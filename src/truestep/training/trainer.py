"""The trainer: the loop around a step, what it logs, and whom it calls."""

import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from truestep.batch import Batch, hash_text
from truestep.config import TrainingConfig
from truestep.machine import accelerator_is_full
from truestep.metrics import StepMetrics
from truestep.observe.sinks import ConsoleSink, Sink
from truestep.training.companion import Companion
from truestep.training.compose import check_arguments
from truestep.training.diagnosis import Diagnosis, NonFiniteError
from truestep.training.evaluate import Evaluation, evaluate
from truestep.training.feed import StepData, batches_from
from truestep.training.guard import UpdateGuard
from truestep.training.optim import clear_gradients, set_learning_rates
from truestep.training.schedule import Schedule
from truestep.training.step import NEVER, Launched, Stepper


class Trainer(Stepper):
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
        super().__init__(model, config, optimizer, schedule, device)
        self.companions = companions
        speaks = sinks is None and self.processes.rank == 0
        self.sinks: list[Sink] = [ConsoleSink()] if speaks else list(sinks or ())
        self.runs_ahead = self.device.type != "cpu"  # `fit` reads a step while the next one runs
        self.stop_reason: str | None = None
        self.skipped_in_a_row = 0  # steps up to now whose loss or gradient was not finite
        self.in_step = False  # an exception came out of a step
        self.when_resized: Callable[[], object] = lambda: None
        self._in_flight: list[Launched] = []  # by `fit`, up to `_end`
        self._end = 0
        self.stopping = False  # `fit` ends after this step: so all processes have agreed
        self._clock = 0.0  # when the time that the next record reports began

    def training_step(self, batch: Any) -> StepMetrics:
        """Update the parameters once from `batch`, log the loss, and return the step's metrics.

        `batch` is anything that `Batch.of` takes; of several processes, each gives its own rows, as
        `Batch.part` returns them. A loss or gradient that is not finite, and a batch without a
        target, change nothing; `metrics.skipped` says so.
        """
        self._clock = time.perf_counter()
        return self._report(self._launch(batch))[0]

    def _launch(self, batch: Any) -> Launched:
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
        if not self.stop_asked:  # a signal may come before the first step
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
                    if self.step >= end or self.stopping:
                        break
            self._land(0)
        except NonFiniteError:
            self._in_flight.clear()  # launched after it, and halted: these updated nothing
            raise
        finally:
            self._guard = UpdateGuard(NEVER, 0, self.device)
            self.stop_asked = self.stopping = False
            left, self._in_flight = self._in_flight, []
            for launched in left:  # an exception came between: what was done is still logged
                metrics, halted = self._report(launched)
                if halted:
                    self._rewind(metrics.step - 1)
                    break

    def stop(self, reason: str) -> None:
        """End `fit` after the current step; `stop_reason` keeps the reason.

        Of several processes one is enough. What it asks in a companion, all do after that step;
        what it asks in between (in a signal's handler), after the step that they begin next.
        """
        self.stop_reason, self.stop_asked = reason, True
        if self.processes.size == 1:
            self.stopping = True

    def evaluate(self, batches: Iterable[Any], *, token_bytes: Tensor | None = None) -> Evaluation:
        """Return the loss over all batches in this trainer's precision; training is untouched.

        Several processes share the work: each has to ask, with the same batches.
        """
        return evaluate(
            self.model,
            (self._checked(Batch.of(batch)) for batch in batches),
            token_bytes=token_bytes,
            precision=self.precision,
            processes=self.processes,
        )

    def log(self, record: dict[str, Any]) -> None:
        """Write a record to every sink."""
        for sink in self.sinks:
            sink.write(record)

    def _diagnosed(self, batch: Batch) -> Diagnosis:
        """Diagnose, unless that itself fails: it takes more memory than the step did."""
        try:
            return self.diagnose(batch)
        except Exception:  # noqa: BLE001 the model's own hooks may raise anything
            return Diagnosis("not diagnosed")

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

    def _report(self, launched: Launched) -> tuple[StepMetrics, bool]:
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
            batch_hash=hash_text(int(numbers["batch_hash"])) if "batch_hash" in numbers else None,
        )
        if metrics.num_tokens:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.skipped else 0
        self.log(metrics.as_record())
        self._agree_to_stop(int(numbers["stops"]))
        self._clock = time.perf_counter()
        return metrics, bool(numbers["halted"])

    def _agree_to_stop(self, asking: int) -> None:
        """Stop after this step if any process asks; all are told the same number."""
        if asking:
            self.stopping = True
            self.stop_reason = self.stop_reason or "another process"

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

    def _finish(self, launched: Launched) -> None:
        """Log a step of `fit`, stop at a number that is not finite, and call its companions."""
        metrics, halted = self._report(launched)
        if halted:
            self._rewind(metrics.step - 1)
            raise NonFiniteError(metrics, launched.batch, self._diagnosed(launched.batch))
        if self._due(metrics.step):
            for companion in self.companions:
                if metrics.step % companion.interval == 0 or metrics.step == self._end:
                    companion.function(self, metrics)
            if self.processes.size > 1:
                none = torch.zeros((), dtype=torch.int64, device=self.device)
                self._agree_to_stop(int(self.processes.sums(none, self.stop_asked)[1]))
        self._clock = time.perf_counter()  # what companions took is no part of a step
