"""How far a long piece of work is, how fast it goes and how long it will take."""

import time
from collections.abc import Callable

from truestep.observe.text import format_duration

_EVERY_SECONDS = 10.0


class Progress:
    """Counts bytes and says so every ten seconds, with what is left of `total`.

    Time is told from what was done here: what an earlier process has done is `before`.
    """

    def __init__(
        self, verb: str, total: int, say: Callable[[str], object], before: int = 0
    ) -> None:
        self._verb, self._total, self._say = verb, total, say
        self._before, self.done = before, 0
        self._started = self._said = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count further bytes."""
        self.done += num_bytes
        now = time.monotonic()
        if now - self._said >= _EVERY_SECONDS:
            self._said = now
            self._say(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """Return where the work stands after so many seconds."""
        rate = self.done / seconds
        reached = min(self._before + self.done, self._total)
        left = (self._total - reached) / rate if rate else float("inf")
        return (
            f"{self._verb}: {_megabytes(reached)} of {_megabytes(self._total)} MB, "
            f"{rate / 1e6:,.1f} MB/s, {format_duration(left)} left"
        )

    def summary(self) -> str:
        """Return what was done here, in which time, and how fast."""
        seconds = time.monotonic() - self._started
        return (
            f"{self._verb}: {_megabytes(self.done)} MB in {format_duration(seconds)}, "
            f"{self.done / seconds / 1e6:,.1f} MB/s"
        )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.{0 if num_bytes >= 1e7 else 1}f}"
