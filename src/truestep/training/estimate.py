"""What training will take, measured in a few steps of it that nobody keeps."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from truestep.batch import Batch
from truestep.gpus import ASSUMED_UTILIZATION, GPU
from truestep.machine import forget_peak, measure_peak_flops
from truestep.metrics import model_flops_utilization
from truestep.observe.text import format_bytes
from truestep.training.footprint import (
    Footprint,
    StateBytes,
    footprint,
    room_for_a_step,
    state_bytes,
)
from truestep.training.micro_batch import largest_micro_batch, largest_that_fits
from truestep.training.probe import NotTraceableError
from truestep.training.trainer import Trainer

_LEAST_ROUNDS, _LEAST_SECONDS, _MOST_SECONDS = 5, 5.0, 60.0  # after the first two steps
_PART_SECONDS = 20.0  # up to there a step is measured as a whole
_PROCESS_BYTES = 2**30  # of a GPU: driver, kernels, the allocator's gaps


@dataclass(frozen=True)
class Memory:
    """Bytes that a step takes, uncompiled; `logits` are part of `activations`."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int


@dataclass(frozen=True)
class Estimate:
    """What a trainer's steps take, in seconds where it is time; None where it cannot be told.

    `first_step` holds what compiling takes. `step` is the median of those after it.
    """

    num_parameters: int
    flops_per_token: float | None
    tokens_per_step: int
    micro_batch_size: int
    memory: Memory | None
    largest_micro_batch: int | None
    first_step: float
    step: float
    peak_flops_per_second: float

    @property
    def tokens_per_second(self) -> float:
        """How much text training reads."""
        return self.tokens_per_step / self.step

    @property
    def utilization(self) -> float | None:
        """The share of the machine's matmul rate that a step reaches (MFU)."""
        if self.flops_per_token is None:
            return None
        return model_flops_utilization(
            self.tokens_per_second, self.flops_per_token, self.peak_flops_per_second
        )


def estimate(trainer: Trainer, batch_at: Callable[[int], Any]) -> Estimate:
    """Train a few steps and return what they took; the trainer is of no use afterwards.

    `batch_at(step)` gives batches of the size and length that training will have, in any form that
    `Batch.of` takes. The trainer's sinks see nothing of it.
    Errors: TypeError for what is no trainer; else as for `Trainer.training_step`.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}; give a Trainer: estimate(Trainer(model), …)"
        )
    trainer.sinks = []

    def batch_of(step: int) -> Batch:
        return Batch.of(batch_at(step))

    dtype = torch.bfloat16 if trainer.precision == "bfloat16" else torch.float32
    peak_flops_per_second = measure_peak_flops(trainer.device, dtype)
    forget_peak(trainer.device)  # those matrices are no part of a run
    first = batch_of(0)
    trainer.prepare(first)
    largest = _largest_micro_batch(trainer, first)
    first_step, step = _measured(trainer, first, batch_of)
    try:
        held = footprint(trainer.model, first, trainer.micro_batch_size(first), trainer.precision)
    except NotTraceableError:
        held = None
    return Estimate(
        num_parameters=sum(p.numel() for p in trainer.model.parameters()),
        flops_per_token=trainer.facts.flops_per_token if trainer.facts else None,
        tokens_per_step=first.tokens.numel(),
        micro_batch_size=trainer.micro_batch_size(first),
        memory=_memory(state_bytes(trainer.model, trainer.optimizer), held) if held else None,
        largest_micro_batch=largest,
        first_step=first_step,
        step=step,
        peak_flops_per_second=peak_flops_per_second,
    )


def _measured(
    trainer: Trainer, first: Batch, batch_at: Callable[[int], Batch]
) -> tuple[float, float]:
    """Return the seconds of the first step, and of those after it.

    A step of many micro-batches that takes long is put together from steps of one and of several.
    """
    rows, size = len(first.tokens), trainer.micro_batch_size(first)
    if rows % size or len(trainer.reduction.shortened(first, size, 1).tokens) == rows:
        size = rows  # the last of them has a shape of its own, or there is no shorter step

    def seconds(num_rows: int) -> float:
        batch = next(batch_at(trainer.step).split(num_rows))
        start = time.perf_counter()
        trainer.training_step(batch)
        return time.perf_counter() - start

    beginning, second = seconds(size), seconds(size)
    parts = rows // size
    several = min(parts, max(2, int(_PART_SECONDS / second)))
    if several >= parts:
        step = _medians(lambda: (seconds(rows),))[0]
    else:
        one, more = _medians(lambda: (seconds(size), seconds(several * size)))
        step = max(more, one + (parts - 1) * (more - one) / (several - 1))
    return max(beginning, step + beginning - second), step


def _medians(measure: Callable[[], tuple[float, ...]]) -> list[float]:
    """Return the median of each of the seconds that are measured together, several times."""
    rounds: list[tuple[float, ...]] = []
    spent = 0.0
    while spent < (_LEAST_SECONDS if len(rounds) >= _LEAST_ROUNDS else _MOST_SECONDS):
        rounds.append(measure())
        spent += sum(rounds[-1])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def computed_estimate(
    trainer: Trainer, batch: Batch, gpu: GPU, micro_batch_size: int | Literal["auto"] = "auto"
) -> Estimate:
    """Return what steps would take on a GPU that is not here, by its data sheet; nothing is run.

    `trainer` has its model on a CPU. The time of a step is its matrix products at
    ASSUMED_UTILIZATION; what does not fit into memory is split, if `micro_batch_size` is auto.
    Errors: ValueError for a model that does not run on fake tensors, or micro-batches, of one row
    if they are auto, that do not fit.
    """
    trainer.prepare(batch)
    model, state = trainer.model, state_bytes(trainer.model, trainer.optimizer)
    # What a process itself holds, and what it keeps between steps.
    room = gpu.memory_bytes - _PROCESS_BYTES - state.weights - state.moments
    try:
        largest = largest_micro_batch(model, batch, room, "gpu")
        rows = len(batch.tokens)
        fitting = largest_that_fits(model, batch, room, "gpu", limit=rows)
        size = (fitting or 1) if micro_batch_size == "auto" else min(micro_batch_size, rows)
        held = footprint(model, batch, size, "gpu")
    except NotTraceableError:
        held = None
    if held is None or trainer.facts is None:
        raise ValueError(
            f"{type(model).__name__} does not run on tensors without values: what it takes cannot "
            "be computed; plan it on the GPU itself"
        )
    if held.needed > room:
        asked = "one window" if micro_batch_size == "auto" else f"training.micro_batch_size={size}"
        raise ValueError(
            f"{asked} needs {format_bytes(held.needed)} beside weights and moments, and "
            f"{format_bytes(max(0, room))} of the {gpu.title} are left; use "
            + (str(fitting) if fitting else "a smaller model or a shorter model.context_length")
        )
    tokens, flops = batch.tokens.numel(), trainer.facts.flops_per_token
    step = flops * tokens / (ASSUMED_UTILIZATION * gpu.flops_per_second)
    return Estimate(
        num_parameters=sum(p.numel() for p in model.parameters()),
        flops_per_token=flops,
        tokens_per_step=tokens,
        micro_batch_size=size,
        memory=_memory(state, held),
        largest_micro_batch=largest,
        first_step=step,
        step=step,
        peak_flops_per_second=gpu.flops_per_second,
    )


def _largest_micro_batch(trainer: Trainer, batch: Batch) -> int | None:
    """Return how many rows fit into what is free now; None where that cannot be told."""
    room = room_for_a_step(trainer.model, trainer.optimizer)
    if room is None:
        return None
    try:
        return largest_micro_batch(trainer.model, batch, room, trainer.precision)
    except NotTraceableError:
        return None


def _memory(state: StateBytes, held: Footprint) -> Memory:
    activations = max(0, held.total - state.gradients)
    return Memory(state.weights, state.gradients, state.moments, activations, held.logits)
