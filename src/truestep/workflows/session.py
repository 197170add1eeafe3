"""What accompanies the steps of a run: its log, display, validation, samples and checkpoints."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from truestep.checkpoint.commit import Validation
from truestep.checkpoint.writer import CheckpointWriter
from truestep.data.corpus import Say
from truestep.machine import measure_peak_flops
from truestep.metrics import StepMetrics
from truestep.observe.display import Display, open_display
from truestep.observe.log import METRICS, SOURCE_LOSS, read_records
from truestep.observe.sinks import JsonlSink
from truestep.observe.spikes import SpikeWatch
from truestep.training.companion import every
from truestep.training.evaluate import Evaluation
from truestep.training.trainer import Trainer
from truestep.workflows.build import Training
from truestep.workflows.evaluate import evaluate_sources
from truestep.workflows.history import record_changes
from truestep.workflows.run import CHECKPOINTS, SAMPLES, write_run_files
from truestep.workflows.trained import write_text


class Session:
    """Attaches itself to a trainer whose step is where the run goes on; use it as a context.

    A disk that takes neither records nor checkpoints is reported, and training goes on: records
    wait in memory, and the run ends once `max_failed_saves` saves in a row have failed. `display`
    stands in for the one on the console.
    """

    def __init__(self, directory: Path, training: Training, display: Display | None = None) -> None:
        self.training = training
        self._directory = directory
        self._validation: tuple[int, Validation] | None = None  # of that step
        self._stack = contextlib.ExitStack()
        self.say: Say
        self._open(display)
        run = training.config.run
        training.trainer.companions = [
            every(run.evaluate_every, self.validate),
            every(run.save_every, lambda *_: self._save()),
        ]

    def _open(self, display: Display | None) -> None:
        """Open files and display, and give them to the trainer."""
        directory, training = self._directory, self.training
        config, trainer = training.config, training.trainer
        peak = measure_peak_flops(
            trainer.device,
            torch.bfloat16 if trainer.precision == "bfloat16" else torch.float32,
        )
        with contextlib.ExitStack() as stack:
            self.display = display or open_display(
                config.training.num_steps,
                every=config.run.log_every,
                flops_per_token=trainer.facts.flops_per_token if trainer.facts else None,
                peak_flops_per_second=peak and peak * trainer.processes.size,
            )
            stack.callback(self.display.close)
            say = self.say = self.display.say
            self._log = JsonlSink(directory / METRICS, from_step=trainer.step, say=say)
            stack.callback(self._log.close)
            self._samples = JsonlSink(
                directory / SAMPLES, from_step=trainer.step, say=say, lenient=True
            )
            stack.callback(self._samples.close)
            self._writer = CheckpointWriter(
                directory / CHECKPOINTS,
                keep=config.run.keep_checkpoints,
                keep_best=config.run.keep_best_checkpoints,
                max_failures=config.run.max_failed_saves,
                say=say,
                before_commit=self._log.sync,  # a checkpoint never knows more than the log
            )
            stack.callback(self._writer.close)
            spikes = SpikeWatch(directory, say, from_step=trainer.step)
            stack.callback(self._detach)
            self._stack = stack.pop_all()
        trainer.sinks = [self._log, self._writer, self.display, spikes]
        trainer.when_resized = self._record_size

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the trainer, wait for the last save, close files. Errors: OSError of that save."""
        self._stack.close()

    def _detach(self) -> None:
        trainer = self.training.trainer
        trainer.sinks, trainer.companions, trainer.when_resized = [], [], lambda: None

    def catch_up(self) -> None:
        """Validate the step the run goes on from, where a signal cut its validation off."""
        config, trainer = self.training.config, self.training.trainer
        step = trainer.step
        due = step % config.run.evaluate_every == 0 or step == config.training.num_steps
        if not step or not due:
            return

        def is_validated() -> bool:
            records = (record for _, record in read_records(self._log.path))
            return any("validation_loss" in r and r["step"] == step for r in records)

        validated = trainer.processes.from_first("validated", lambda: str(is_validated()))
        if validated == "False":
            self.validate(trainer)

    def save(self) -> None:
        """Have the state of this step written, once more if a save of it under way fails."""
        self._writer.wait()
        self._save()

    def wait(self) -> None:
        """Return once nothing is being saved. Errors: as for `CheckpointWriter.check`."""
        self._writer.wait()

    def _save(self) -> None:
        """Have the state of this step written, with its validation loss if it was measured."""
        training = self.training
        step, validation = self._validation or (-1, None)
        self._writer.save(
            training.trainer,
            facts=training.saved_facts(),
            validation=validation if step == training.trainer.step else None,
        )

    def _record_size(self) -> None:
        """Write down, durably, that the steps from here on have smaller micro-batches.

        A checkpoint comes first: whoever goes on, goes on from where the size changed.
        """
        before, trainer = self.training, self.training.trainer
        if trainer.step:
            self.save()
            self._writer.wait()
        config = before.config.model_copy(update={"training": trainer.config})
        self.training = replace(before, config=config)
        record_changes(self._directory, trainer.step, before.config, config)
        write_run_files(self._directory, config, before.facts, before.data.tokenizer)

    def validate(self, trainer: Trainer, _: StepMetrics | None = None) -> None:
        """Validate, let the model write, and save what may be the best.

        Whoever stopped the run waits only for what ranks its checkpoint: `catch_up` does the rest.
        """
        run, step = self.training.config.run, trainer.step
        last = step >= self.training.config.training.num_steps
        stopping = trainer.stopping
        if not stopping:
            result = self.evaluate(None if last else run.evaluation_windows)
            record: dict[str, Any] = {"step": step, "validation_loss": result.loss}
            by_source = {f"{SOURCE_LOSS}{name}": loss for name, loss in result.by_source.items()}
            bits = {"validation_bits_per_byte": result.bits_per_byte}
            trainer.log({**record, **bits, **by_source})
            self._write_sample(step)
        if run.keep_best_checkpoints:
            if last or stopping:  # comparable with those before only over the same windows
                result = self.evaluate(run.evaluation_windows)
            if math.isfinite(result.loss):
                self._validation = step, Validation(result.loss, result.num_tokens)
            self._save()

    def evaluate(self, num_windows: int | None) -> Evaluation:
        """Return the loss over so many windows of the validation text; None: over all of it."""
        training = self.training
        evaluate = training.trainer.evaluate
        return evaluate_sources(training.config, training.data, num_windows, evaluate)

    def _write_sample(self, step: int) -> None:
        run, training = self.training.config.run, self.training
        text = write_text(
            training.model,
            training.data.tokenizer,
            run.sample_prompt,
            max_new_tokens=run.sample_tokens,
            seed=training.config.training.seed,
        )
        self._samples.write({"step": step, "prompt": run.sample_prompt, "text": text})
        self.display.sample(step, run.sample_prompt, text)


class Follower(Session):
    """The session of a process that is not the first: it computes, and leaves writing to that."""

    def _open(self, _: Display | None) -> None:
        self.say = lambda _: None
        self._stack.callback(self._detach)

    def save(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def _save(self) -> None:
        pass

    def _write_sample(self, step: int) -> None:
        pass
