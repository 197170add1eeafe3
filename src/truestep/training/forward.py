"""The forward unit of a step: cast, model and loss as one function, compiled where that pays."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from truestep import compiler, runtime
from truestep.batch import Batch
from truestep.loss import compute_loss, token_losses
from truestep.training.probe import logits_of


class ForwardLoss:
    """Computes a micro-batch's share of the loss: the only place where training runs the model."""

    def __init__(
        self,
        model: nn.Module,
        precision: Literal["float32", "bfloat16"],
        device: torch.device,
        *,
        compiled: bool,
    ) -> None:
        # A closure over these alone: nothing that varies by step is traced.
        def forward_loss(
            tokens: Tensor, targets: Tensor, inputs: dict[str, Tensor], num_tokens: Tensor
        ) -> Tensor:
            with runtime.computing(precision, device):
                logits = logits_of(model(tokens, **inputs))
            return compute_loss(logits, targets, num_tokens=num_tokens)

        self._model, self._precision, self._device = model, precision, device
        self._eager: Callable[..., Tensor] = forward_loss
        self._call = compiler.compiled(forward_loss, device) if compiled else forward_loss

    def __call__(self, batch: Batch, num_tokens: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """Return this micro-batch's share of the loss, connected to the graph."""
        return self._call(batch.tokens, batch.targets, dict(batch.inputs), num_tokens)

    def eager(self, batch: Batch, num_tokens: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the same uncompiled, where hooks on modules run."""
        return self._eager(batch.tokens, batch.targets, dict(batch.inputs), num_tokens)

    def token_losses(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Return the loss of each target by itself, uncompiled and without a graph."""
        with torch.no_grad():
            with runtime.computing(self._precision, self._device):
                logits = logits_of(self._model(batch.tokens, **batch.inputs))
            return token_losses(logits, batch.targets)
