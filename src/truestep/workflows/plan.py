"""What a run will cost, and whether it fits: measured in a few steps of it, before it runs."""

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from truestep import compiler, runtime
from truestep.checkpoint.snapshot import take_snapshot
from truestep.config import RunConfig, TrainingConfig
from truestep.data.corpus import Say
from truestep.gpus import GPU
from truestep.machine import device_name, peak_bytes
from truestep.storage import LOCAL, replace_file, unfinished
from truestep.training.estimate import Estimate, computed_estimate, estimate
from truestep.training.schedule import resolve_decay_steps
from truestep.workflows.build import Training, build
from truestep.workflows.run import RunError
from truestep.workflows.session import Session
from truestep.workflows.sources import open_data

_ROUNDS = 3  # of validation, save and step: W2's peak grows with them, 1,131 to 1,203 MiB
COMPILED = {"on": "compiled", "layers": "compiled by layers", "off": "not compiled"}


@dataclass(frozen=True)
class Plan:
    """A run before it is run, times in seconds; `config` has what was found instead of auto.

    `start` is from the command to the first step, of text that is prepared; `validation` that of
    each on the way, `last_validation` of that after the last update, over all of the text. What
    was `computed` knows none of them. `train_tokens` is all the text there is; `shares` has, of
    several sources, the share of the windows and the tokens of each.
    """

    config: RunConfig
    estimate: Estimate
    start: float
    validation: float
    last_validation: float
    peak_bytes: int | None
    machine: str
    train_tokens: int
    shares: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    computed: bool = False

    def seconds(self, num_steps: int) -> float:
        """Return how long a run of so many steps takes, from the command to its last update."""
        validations = (num_steps - 1) // self.config.run.evaluate_every
        steps = self.estimate.first_step + (num_steps - 1) * self.estimate.step
        return self.start + steps + validations * self.validation

    def steps_within(self, seconds: float) -> int:
        """Return the most steps that take no longer; 0 if not even one does."""
        low, high = 0, 1
        while self.seconds(high) <= seconds:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle)
        return low


class _Silent:
    """A display that shows nothing."""

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def plan(config: RunConfig, say: Say, loaded_in: float = 0.0) -> Plan:
    """Build what a run would train with, train a few steps of it, and return what it will cost.

    Nothing is left behind but the prepared text, which the run needs, too. `loaded_in` says how
    many seconds the command took up to here.
    Errors: as for `build`.
    """
    open_data(config, Path(config.run.directory), say)  # the run finds it prepared
    return _plan_of_prepared(config, say, loaded_in)


def _plan_of_prepared(config: RunConfig, say: Say, loaded_in: float = 0.0) -> Plan:
    """Return the same where the text is prepared."""
    began = time.perf_counter()
    training = build(config, Path(config.run.directory), lambda _: None)
    trainer = training.trainer
    start = loaded_in + time.perf_counter() - began
    compiled = COMPILED[trainer.config.compile]
    say(f"measuring a few steps, {compiled}; this takes a minute or more")
    found = estimate(trainer, training.loader.batch_at)
    if trainer.skipped_in_a_row:
        raise RunError(
            f"training.learning_rate={trainer.config.learning_rate}: the loss or its gradient was "
            f"not finite in step {trainer.step} of the measurement, as it would be in the run; "
            "lower it"
        )
    resolved = training.config.training.model_copy(
        update={"micro_batch_size": found.micro_batch_size}
    )
    planned = training.config.model_copy(update={"training": resolved})
    training = replace(training, config=planned)
    validation, last = _seconds_of_validations(training)
    _train_beside_a_copy(training)
    machine, peak = device_name(trainer.device), peak_bytes(trainer.device)
    tokens, shares = training.data.train_tokens, training.data.shares()
    return Plan(planned, found, start, validation, last, peak, machine, tokens, shares)


def plan_on(config: RunConfig, gpu: GPU, say: Say) -> Plan:
    """Return what a run would cost on a GPU that is not here, computed from its data sheet.

    In bfloat16; nothing is trained. Settings that only the GPU can tell stay auto.
    Errors: as for `build` and `computed_estimate`; RunError for settings that ask for float32, or
    for another device.
    """
    asked = config.training
    if config.run.device not in {"auto", "cuda"}:
        raise RunError(
            f"run.device={config.run.device}, but the plan is for a GPU; give --run.device auto, "
            "or plan without --gpu"
        )
    if asked.precision == "float32":
        raise RunError(
            "training.precision=float32, but a data sheet is computed in bfloat16; give "
            "--training.precision auto, or plan on the GPU itself"
        )
    here = asked.model_copy(
        update={
            "compile": "off",
            "micro_batch_size": config.data.batch_size,
            "precision": "float32",
        }
    )
    cpu = config.run.model_copy(update={"device": "cpu"})
    with runtime.uninitialized():  # no value of a weight matters, and many take long to draw
        training = build(
            config.model_copy(update={"training": here, "run": cpu}),
            Path(config.run.directory),
            say,
            trains=False,
            gpu=gpu,
        )
    say("computing what a step takes")
    found = computed_estimate(
        training.trainer, training.loader.batch_at(0), gpu, asked.micro_batch_size
    )
    there = training.config.training.model_copy(
        update={
            "compile": asked.compile,
            "micro_batch_size": found.micro_batch_size,
            "precision": "bfloat16",
            "deterministic": asked.deterministic,
        }
    )
    memory = found.memory
    assert memory is not None
    peak = memory.weights + memory.gradients + memory.moments + memory.activations
    planned = config.model_copy(
        update={"training": there, "model": training.config.model, "data": training.config.data}
    )
    machine = f"{gpu.title}, by its data sheet"
    tokens, shares = training.data.train_tokens, training.data.shares()
    return Plan(planned, found, 0.0, 0.0, 0.0, peak, machine, tokens, shares, computed=True)


def plan_within(config: RunConfig, seconds: float, say: Say, loaded_in: float = 0.0) -> Plan:
    """Return the plan of a run of as many steps as the time has room for.

    Where compiling is left to auto and may pay, it is tried beside no compiling.
    Errors: RunError where not one step fits into it.
    """
    if config.training.compile != "auto":
        return filled(plan(config, say, loaded_in), seconds, config.training)
    result = filled(plan(_compiling(config, "off"), say, loaded_in), seconds, config.training)
    found, steps = result.estimate, result.config.training.num_steps
    flops = (found.flops_per_token or 0.0) * found.tokens_per_step * steps
    device = runtime.resolve_device(result.config.run.device)
    began = time.perf_counter()
    compilation = compiler.resolve_compile("auto", device, flops, has_layers=True)
    if compilation == "off":
        return result
    probed_in = time.perf_counter() - began  # as the run will
    say("compiling may pay in that time")
    gc.collect()  # the first trainer holds itself, and would be in the second's way
    other = _plan_of_prepared(_compiling(config, compilation), say)
    # What the first of them waited for, imports above all, the run will as well.
    other = filled(replace(other, start=result.start + probed_in), seconds, config.training)
    if other.config.training.num_steps <= steps:
        return result
    # What a CPU's first plan has freed is kept: where the second takes no more, its own is unknown.
    known = device.type != "cpu" or (other.peak_bytes or 0) > (result.peak_bytes or 0)
    return other if known else replace(other, peak_bytes=None)


def _compiling(config: RunConfig, setting: compiler.Compilation) -> RunConfig:
    training = config.training.model_copy(update={"compile": setting})
    return config.model_copy(update={"training": training})


def filled(plan: Plan, seconds: float, asked: TrainingConfig) -> Plan:
    """Return the plan with as many steps as fit into the time, by the schedule that was asked for.

    Errors: RunError if not one fits.
    """
    steps = plan.steps_within(seconds)
    if not steps:
        raise RunError(
            f"not one step fits into {seconds:.3g} s: the first one ends after "
            f"{plan.seconds(1):.0f} s; give more minutes, or a smaller model"
        )
    training = with_steps(plan.config.training, asked, steps)
    return replace(plan, config=plan.config.model_copy(update={"training": training}))


def with_steps(plain: TrainingConfig, asked: TrainingConfig, num_steps: int) -> TrainingConfig:
    """Return `plain` settings for another number of steps, of which warm-up and decay keep theirs.

    That is their share of the steps that were `asked` for; a decay of auto is that of the new run.
    """
    warmup_steps = num_steps * asked.warmup_steps // asked.num_steps
    if asked.decay_steps == "auto":
        decay_steps = resolve_decay_steps("auto", warmup_steps, num_steps)
    else:
        decay_steps = max(1, num_steps * asked.decay_steps // asked.num_steps)
    changes = {"num_steps": num_steps, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
    return TrainingConfig.model_validate(plain.model_dump() | changes)


def _seconds_of_validations(training: Training) -> tuple[float, float]:
    """Return how long one on the way takes, with its sample and its copy to save, and the last.

    Of several, with a save and a step after each: what a step has freed lies in pieces, among which
    a validation and a save find less and less room. As in a run, the save of one has ended before
    the next.
    """
    run, trainer = training.config.run, training.trainer
    longer = training.config.training.model_copy(update={"num_steps": trainer.step + _ROUNDS + 1})
    goes_on = replace(training, config=training.config.model_copy(update={"training": longer}))
    with (
        tempfile.TemporaryDirectory(dir=run.directory, prefix=".plan-") as place,
        unfinished(Path(place)),
        Session(Path(place), goes_on, _Silent()) as session,
    ):
        began = time.perf_counter()
        session.evaluate(run.evaluation_windows)
        over_windows = time.perf_counter() - began
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            session.validate(trainer)
            times.append(time.perf_counter() - began)
            if not run.keep_best_checkpoints:  # validating saves where there are
                session.save()
            _train_shortly(training)
            session.wait()
        on_the_way = statistics.median(times)
    windows = run.evaluation_windows * training.config.model.context_length
    over_all = over_windows * max(1.0, training.data.validation_tokens / windows)
    ranking = over_windows if run.keep_best_checkpoints else 0.0  # is over the same as before
    return on_the_way, on_the_way - over_windows + over_all + ranking


def _train_beside_a_copy(training: Training) -> None:
    """Train while the state is there once more: a save in the background may take that long."""
    copy = take_snapshot(training.trainer, {}).staged()
    _train_shortly(training)
    del copy


def _train_shortly(training: Training) -> None:
    """Train on two micro-batches, or all there are: gradients are there from the second on."""
    trainer = training.trainer
    batch = training.loader.batch_at(trainer.step)
    size = trainer.micro_batch_size(batch)
    trainer.training_step(trainer.reduction.shortened(batch, size, 2))


def write_config(path: Path, config: RunConfig) -> None:
    """Write settings to a file that `truestep train` takes.

    Errors: RunError where it cannot be written.
    """
    try:
        replace_file(LOCAL, path, tomli_w.dumps(config.model_dump(mode="json")).encode())
    except OSError as error:
        raise RunError(f"out={path} cannot be written: {error.strerror}; choose another") from None
