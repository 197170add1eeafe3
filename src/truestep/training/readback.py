"""Numbers of a step on their way from the device to the host, while the next step runs."""

import torch
from torch import Tensor

_PINNED_DEVICES = {"cuda", "xpu"}


class Readback:
    """Starts to copy 0-d tensors to the host, and waits for them only where they are read.

    On a GPU the copies stand in its queue behind the step, with an event behind them: what
    is launched afterwards does not delay them, as it would a plain `.item()`.
    """

    def __init__(self, **numbers: Tensor) -> None:
        self._numbers = numbers
        self._event: torch.Event | None = None
        device = next(iter(numbers.values())).device
        if device.type in _PINNED_DEVICES:
            self._numbers = {
                name: torch.empty((), dtype=number.dtype, pin_memory=True).copy_(
                    number, non_blocking=True
                )
                for name, number in numbers.items()
            }
            self._event = torch.Event(device)
            # Of its own device: another may be the current one.
            self._event.record(torch.accelerator.current_stream(device))

    def read(self) -> dict[str, float]:
        """Return the numbers (int and bool are floats, too) by name."""
        if self._event is not None:
            self._event.synchronize()
        return {name: number.item() for name, number in self._numbers.items()}
