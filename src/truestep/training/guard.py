"""Which updates do not count, and the buffers that these must leave as they were."""

import torch
from torch import Tensor, nn


class UpdateGuard:
    """Decides on the device which updates are skipped, so that the host need not wait for it.

    An update whose loss or gradient is not finite is skipped, and so is one without a target, which
    counts neither way. After more than `limit` that are not finite in a row it halts: none after
    them updates anything.
    """

    def __init__(self, limit: int, skipped_in_a_row: int, device: torch.device) -> None:
        self._limit = limit
        self._in_a_row = torch.full((), skipped_in_a_row, device=device)
        self._halted = torch.zeros((), dtype=torch.bool, device=device)

    def judge(self, finite: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return two flags: that this update leaves everything as it was, and that it halts."""
        counts = num_tokens > 0
        in_a_row = torch.where(finite, 0, self._in_a_row + 1)
        self._in_a_row = torch.where(counts, in_a_row, self._in_a_row)
        self._halted = self._halted | (counts & ~finite & (self._in_a_row > self._limit))
        return self._halted | ~finite | ~counts, self._halted


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

    def restore(self, before: list[Tensor], skipped: Tensor | None = None) -> None:
        """Put them back; where there is a device flag, if it says so, without the host reading it.

        Without one nothing is allocated: memory may have ended.
        """
        for slot, old in zip(self._slots, before, strict=True):
            buffer = self._buffer(slot)
            buffer.copy_(old if skipped is None else torch.where(skipped, old, buffer))

    @staticmethod
    def _buffer(slot: tuple[dict[str, Tensor | None], str]) -> Tensor:
        buffer = slot[0][slot[1]]
        assert buffer is not None
        return buffer
