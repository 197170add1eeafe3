"""Buffers that a skipped step must leave as they were."""

import torch
from torch import Tensor, nn


class BufferGuard:
    """Holds a model's persistent buffers, such as BatchNorm's averages, through one step.

    The forward changes them before it is known whether the step counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [
            (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def copy(self) -> list[Tensor]:
        """Return copies of all of them as they are now."""
        return [self._buffer(slot).clone() for slot in self._slots]

    def restore(self, before: list[Tensor], skipped: Tensor) -> None:
        """Put them back where the device flag says so, without the host reading it."""
        for slot, old in zip(self._slots, before, strict=True):
            buffer = self._buffer(slot)
            buffer.copy_(torch.where(skipped, old, buffer))

    @staticmethod
    def _buffer(slot: tuple[dict[str, Tensor | None], str]) -> Tensor:
        buffer = slot[0][slot[1]]
        assert buffer is not None
        return buffer
