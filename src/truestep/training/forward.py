"""The forward unit of a step: cast, model and loss, compiled as one or in parts where it pays."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from truestep import compiler, runtime
from truestep.batch import Batch
from truestep.config import TrainingConfig
from truestep.loss import DeferredLogits, compute_loss, token_losses
from truestep.training.guard import BufferGuard
from truestep.training.probe import logits_of


def _loss(
    logits: Float[Tensor, "B T V"] | DeferredLogits,
    targets: Int[Tensor, "B T"],
    num_tokens: Int[Tensor, ""],
) -> Float[Tensor, ""]:
    return compute_loss(logits, targets, num_tokens=num_tokens)


class ForwardLoss:
    """Computes a micro-batch's share of the loss: the only place where training runs the model.

    `config` gives seed, determinism and compilation; "auto" is not compiled. `wrapped` makes of
    the forward one whose gradients are added up over several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        precision: Literal["float32", "bfloat16"],
        device: torch.device,
        wrapped: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda forward: forward,
    ) -> None:
        def ending_in(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            # A closure over these alone: nothing that varies by step is traced.
            def forward_loss(
                tokens: Tensor, targets: Tensor, inputs: dict[str, Tensor], num_tokens: Tensor
            ) -> Tensor:
                with runtime.computing(precision, device):
                    logits = logits_of(model(tokens, **inputs))
                return loss(logits, targets, num_tokens)

            return forward_loss

        self._model, self._config = model, config
        self._precision, self._device = precision, device
        self._call = self._eager = ending_in(_loss)
        self._parts: compiler.CompiledParts | None = None
        if config.compile == "on":
            self._call = compiler.compiled(self._eager, device)
        elif config.compile == "layers":
            self._parts = compiler.CompiledParts(model, device)
            self._call = ending_in(compiler.compiled(_loss, device, "the loss"))
        self._call = wrapped(self._call)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a forward and of its backward, which may run layers once more."""
        return contextlib.nullcontext() if self._parts is None else self._parts.running()

    @contextlib.contextmanager
    def micro_batches(self, batch: Batch, size: int, step: int) -> Iterator[Iterator[Batch]]:
        """Train on the micro-batches, of `size` rows, of a step's batch that is on the device.

        Train mode and deterministic algorithms last as long as the context; the random state and
        the choice of kernels as long as each micro-batch.
        """

        def each() -> Generator[Batch]:
            for part in batch.split(size):
                # Seeded by global position: dropout is a function of the step, with no state.
                with (
                    runtime.seeded(self._device, self._config.seed, step, part.index),
                    runtime.attention_kernels(self._precision, self._device, part.tokens.shape[1]),
                ):
                    yield part

        with (
            runtime.EXCLUSIVE,
            runtime.module_modes(self._model, training=True),
            runtime.deterministic_algorithms(self._config.deterministic == "on"),
            # Closed here: a generator left in a seeded step would set the random state back later.
            contextlib.closing(each()) as micro_batches,
        ):
            yield micro_batches

    @contextlib.contextmanager
    def rehearsal(self, batch: Batch, size: int, step: int) -> Iterator[Iterator[Batch]]:
        """Go through the same, and leave no trace in the model's buffers."""
        guard = BufferGuard(self._model)
        buffers = guard.copy()
        try:
            with self.micro_batches(batch, size, step) as micro_batches:
                yield micro_batches
        finally:
            guard.restore(buffers)

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
