"""Evaluation: the exact mean loss over all targets, leaving training as it was."""

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from truestep.batch import Batch
from truestep.distributed.process import ALONE, Processes
from truestep.loss import IGNORE_INDEX, compute_loss
from truestep.runtime import (
    EXCLUSIVE,
    attention_kernels,
    computing,
    module_modes,
    random_state_kept,
)
from truestep.training.feed import fit_inputs
from truestep.training.probe import logits_of


@dataclass(frozen=True)
class Evaluation:
    """A validation result.

    `loss` is the mean over every target of every batch, in nats. `bits_per_byte` is the whole cost
    of the targets over the bytes of text they stand for, `num_bytes`: comparable between
    tokenizers. `by_source` has the loss of each of several sources.
    """

    loss: float
    num_tokens: int
    bits_per_byte: float | None
    num_bytes: int = 0
    by_source: Mapping[str, float] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    token_bytes: Int[Tensor, "V"] | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    processes: Processes = ALONE,
) -> Evaluation:
    """Return the loss of `model` over all batches, weighted by tokens, not by batches.

    Several `processes`, each given all the batches, share the work and come to the same bits.

    `token_bytes[id]` is the number of bytes a token id stands for; without it there are no bits
    per byte. Modes of all modules and the default random generators are as before afterwards.
    The model runs uncompiled: sharing a compiled function's shapes would move training's gradients.

    Errors: ValueError if no batch holds a target.
    """
    device = next(model.parameters()).device
    losses: list[float] = []  # of each batch, 0 for one that another process computes
    num_tokens, num_bytes = 0, 0
    modes = module_modes(model, training=False)
    with EXCLUSIVE, modes, random_state_kept(device), torch.no_grad():
        for number, given in enumerate(batches):
            batch = fit_inputs(Batch.of(given), model)
            valid = batch.targets[batch.targets != IGNORE_INDEX]
            if token_bytes is not None:
                num_bytes += int(token_bytes[valid.cpu()].sum())
            num_tokens += valid.numel()
            losses.append(0.0)
            if number % processes.size != processes.rank:
                continue
            batch = batch.to(device)
            num_keys = batch.tokens.shape[1]
            with attention_kernels(precision, device, num_keys), computing(precision, device):
                logits = logits_of(model(batch.tokens, **batch.inputs))
            losses[-1] = float(compute_loss(logits, batch.targets, num_tokens=1))
    if not num_tokens:
        raise ValueError("nothing to evaluate: no batch holds a target; give more text")
    if processes.size > 1:
        losses = processes.sum(torch.tensor(losses, dtype=torch.float64, device=device)).tolist()
    total = functools.reduce(operator.add, losses)  # not `sum`, which compensates since Python 3.12
    bits = total / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(total / num_tokens, num_tokens, bits, num_bytes)


def weighted(evaluations: Mapping[str, Evaluation], weights: Sequence[float]) -> Evaluation:
    """Return the loss of a token drawn from sources in proportion to weights; of one, its own.

    However much of each was evaluated.
    """
    if len(evaluations) == 1:
        return next(iter(evaluations.values()))
    results, total = list(evaluations.values()), math.fsum(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / total

    loss = mean(result.loss for result in results)
    bytes_per_token = mean(result.num_bytes / result.num_tokens for result in results)
    return Evaluation(
        loss,
        sum(result.num_tokens for result in results),
        loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        sum(result.num_bytes for result in results),
        {name: result.loss for name, result in evaluations.items()},
    )
