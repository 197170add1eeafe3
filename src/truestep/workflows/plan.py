"""What a run will cost, and whether it fits: measured in a few steps of it, before it runs."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from truestep import compiler, runtime
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.gpus import ASSUMED_UTILIZATION, GPU
from truestep.machine import peak_bytes, processor_name
from truestep.observe.text import count, format_bytes, format_duration
from truestep.storage import LOCAL, replace_file
from truestep.training.estimate import Estimate, computed_estimate, estimate
from truestep.workflows.build import Training, build
from truestep.workflows.run import RunError
from truestep.workflows.session import Session

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Plan:
    """A run before it is run, times in seconds; `config` has every auto in plain values.

    `start` is from the command to the first step, `validation` that of each on the way. What was
    `computed` knows neither.
    """

    config: RunConfig
    estimate: Estimate
    start: float
    validation: float
    peak_bytes: int | None
    machine: str
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


def plan(config: RunConfig, say: Say) -> Plan:
    """Build what a run would train with, train a few steps of it, and return what it will cost.

    Nothing is left behind but the prepared text, which the run needs, too.
    Errors: as for `build`.
    """
    began = time.perf_counter()
    training = build(config, Path(config.run.directory), say)
    start = time.perf_counter() - began
    found = estimate(training.trainer, training.loader.batch_at)
    validation = _seconds_of_validation(training)
    device = training.trainer.device
    machine = processor_name() if device.type == "cpu" else str(device)
    return Plan(training.config, found, start, validation, peak_bytes(device), machine)


def plan_on(config: RunConfig, gpu: GPU, say: Say) -> Plan:
    """Return what a run would cost on a GPU that is not here, computed from its data sheet.

    Nothing is trained. Errors: as for `build` and `computed_estimate`.
    """
    here = {
        "training": config.training.model_copy(
            update={
                "compile": "off",
                "micro_batch_size": config.data.batch_size,
                "precision": "float32",
            }
        ),
        "run": config.run.model_copy(update={"device": "cpu"}),
    }
    training = build(config.model_copy(update=here), Path(config.run.directory), say)
    found = computed_estimate(training.trainer, training.loader.batch_at(0), gpu)
    there = {
        "training": config.training.model_copy(
            update={
                "compile": "on",
                "micro_batch_size": training.trainer.config.micro_batch_size,
                "precision": "bfloat16",
            }
        ),
        "model": training.config.model,
        "data": training.config.data,
    }
    memory = found.memory
    assert memory is not None
    peak = memory.weights + memory.gradients + memory.moments + memory.activations
    machine = f"{gpu.title}, by its data sheet"
    return Plan(config.model_copy(update=there), found, 0.0, 0.0, peak, machine, computed=True)


def plan_within(config: RunConfig, seconds: float, say: Say) -> Plan:
    """Return the plan of a run of as many steps as the time has room for.

    Where compiling is left to auto and may pay, both ways are tried.
    Errors: RunError where not one step fits into it.
    """
    if config.training.compile != "auto":
        return filled(plan(config, say), seconds)
    result = filled(plan(_compiling(config, "off"), say), seconds)
    found, steps = result.estimate, result.config.training.num_steps
    flops = (found.flops_per_token or 0.0) * found.tokens_per_step * steps
    device = runtime.resolve_device(result.config.run.device)
    if not compiler.resolve_compile("auto", device, flops):
        return result
    other = filled(plan(_compiling(config, "on"), say), seconds)
    return other if other.config.training.num_steps > steps else result


def _compiling(config: RunConfig, setting: Literal["on", "off"]) -> RunConfig:
    training = config.training.model_copy(update={"compile": setting})
    return config.model_copy(update={"training": training})


def filled(plan: Plan, seconds: float) -> Plan:
    """Return the plan with as many steps as fit into the time. Errors: RunError if none does."""
    steps = plan.steps_within(seconds)
    if not steps:
        raise RunError(
            f"not one step fits into {format_duration(seconds)}: the first one ends after "
            f"{plan.seconds(1):.0f} s; give more minutes, or a smaller model"
        )
    training = plan.config.training.model_copy(update={"num_steps": steps})
    return replace(plan, config=plan.config.model_copy(update={"training": training}))


def _seconds_of_validation(training: Training) -> float:
    """Return how long one validation takes, with its sample and the save that follows it."""
    with (
        tempfile.TemporaryDirectory(dir=training.config.run.directory, prefix=".plan-") as place,
        Session(Path(place), training, _Silent()) as session,
    ):
        began = time.perf_counter()
        session.validate(training.trainer)
        return time.perf_counter() - began


def write_config(path: Path, config: RunConfig) -> None:
    """Write settings to a file that `truestep train` takes."""
    replace_file(LOCAL, path, tomli_w.dumps(config.model_dump(mode="json")).encode())


def lines_of(plan: Plan, price_per_hour: float | None = None) -> Iterator[str]:
    """Yield the plan as a person reads it."""
    config, found = plan.config, plan.estimate
    compiled = "compiled" if config.training.compile == "on" else "not compiled"
    yield f"machine     {plan.machine}, {config.training.precision}, {compiled}"
    yield f"parameters  {found.num_parameters:,}"
    tokens = f"{found.tokens_per_step:,} tokens a step"
    if found.flops_per_token is None:
        yield f"arithmetic  unknown for this model; {tokens}"
    else:
        per_step = found.flops_per_token * found.tokens_per_step
        yield (
            f"arithmetic  {_short(found.flops_per_token)}FLOP a token, "
            f"{_short(per_step)}FLOP a step; {tokens}"
        )
    if (memory := found.memory) is not None:
        yield (
            f"memory      weights {format_bytes(memory.weights)}, gradients "
            f"{format_bytes(memory.gradients)}, moments {format_bytes(memory.moments)}, "
            f"activations {format_bytes(memory.activations)} (logits {format_bytes(memory.logits)})"
        )
    if plan.peak_bytes is not None:
        yield f"            {format_bytes(plan.peak_bytes)} at the peak of the whole process"
    if found.largest_micro_batch is not None:
        most = count(found.largest_micro_batch, "window")
        size = config.training.micro_batch_size
        yield f"            a micro-batch of up to {most} fits; it has {size}"
    utilization = "" if found.utilization is None else f", MFU {found.utilization:.0%}"
    if plan.computed:
        yield f"            computed at an assumed MFU of {ASSUMED_UTILIZATION:.0%}, not measured"
    yield (
        f"speed       {1e3 * found.step:,.1f} ms a step, {found.tokens_per_second:,.0f} tokens/s"
        f"{utilization} of {_short(found.peak_flops_per_second)}FLOP/s"
    )
    steps = config.training.num_steps
    seconds = plan.seconds(steps)
    if plan.computed:
        yield (
            f"time        {format_duration(seconds)} for {count(steps, 'step')} alone: without "
            "start, compilation and validation"
        )
    else:
        yield _time(plan, seconds)
    if price_per_hour is not None:
        yield f"cost        {seconds / 3600 * price_per_hour:,.2f} at {price_per_hour:g} an hour"


def _time(plan: Plan, seconds: float) -> str:
    """Return the line that takes a run's time apart."""
    steps, found = plan.config.training.num_steps, plan.estimate
    return (
        f"time        {format_duration(seconds)} for {count(steps, 'step')}: {plan.start:.1f} s to "
        f"start, {found.first_step:.1f} s the first step, {plan.validation:.1f} s each of "
        f"{count((steps - 1) // plan.config.run.evaluate_every, 'validation')} on the way"
    )


def _short(value: float) -> str:
    """Return a number with three digits and a prefix: 18.1 G."""
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
