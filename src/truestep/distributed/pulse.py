"""Which of several processes still live: they tell each other through their store."""

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

from truestep.distributed.process import Processes

_BEAT_SECONDS = 1.0
_SURE_SECONDS = 3 * _BEAT_SECONDS  # whoever lives has told so within these
_DONE = "done"


class ProcessLostError(RuntimeError):
    """Another process has ended, and this one cannot go on without it."""


class Pulse:
    """Tells the others that this process lives, and learns when one of them does not.

    The first process hears all, and the others hear it. If one has said nothing for
    `timeout_seconds` (it was stopped, or its machine is gone), `lost` is called with a message,
    from a thread: the main one may be waiting for it. One that was killed is noticed sooner, by an
    error in what the processes do together; `explain` says whose end that comes from.
    """

    def __init__(
        self, place: Processes, timeout_seconds: float, lost: Callable[[str], object]
    ) -> None:
        self._place, self._timeout, self._lost = place, timeout_seconds, lost
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        if place.size > 1:
            self._thread.start()

    def __enter__(self) -> "Pulse":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._place.size > 1:
            self._closed.set()
            self._thread.join()
            self._end(_DONE if error is None else str(error) or type(error).__name__)

    def explain(self) -> str | None:
        """Return whose end an error of this process comes from, if another's; it takes a while."""
        others = [rank for rank in range(self._place.size) if rank != self._place.rank]
        if not others:
            return None
        try:
            before, until = self._pulses(others), time.monotonic() + _SURE_SECONDS
            while time.monotonic() < until:
                for rank in others:
                    if (reason := self._get(f"end {rank}")) not in {"", _DONE}:
                        return f"process {rank}: {reason}"
                time.sleep(_BEAT_SECONDS / 5)
            after = self._pulses(others)
            gone = [r for r in others if before[r] == after[r] and not self._get(f"end {r}")]
        except RuntimeError:  # the store has gone, and the first process with it
            gone = [0] * (self._place.rank > 0)
        return f"{_processes(gone)} gone: killed, or no longer to be reached" if gone else None

    def _beat(self) -> None:
        place, beats = self._place, 0
        watched = range(1, place.size) if place.rank == 0 else [0]
        heard, since = dict.fromkeys(watched, ""), dict.fromkeys(watched, time.monotonic())
        while not self._closed.wait(_BEAT_SECONDS):
            beats += 1
            try:
                place.store.set(f"pulse {place.rank}", str(beats))
                pulses = self._pulses(watched)
            except RuntimeError:
                pulses = heard
            now = time.monotonic()
            since.update({rank: now for rank in watched if pulses[rank] != heard[rank]})
            heard = pulses
            silent = [rank for rank in watched if now - since[rank] > self._timeout]
            if silent and not all(self._get(f"end {rank}") == _DONE for rank in silent):
                text = f"{_processes(silent)} silent for {self._timeout:g} s"
                self._end(text)
                self._lost(text)
                return

    def _pulses(self, ranks: "range | list[int]") -> dict[int, str]:
        return {rank: self._get(f"pulse {rank}") for rank in ranks}

    def _get(self, key: str) -> str:
        store = self._place.store
        return store.get(key).decode() if store.check([key]) else ""

    def _end(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # nobody is left to be told
            self._place.store.set(f"end {self._place.rank}", reason)


def _processes(ranks: list[int]) -> str:
    """Return `process 3 is` or `processes 3 and 5 are`."""
    if len(ranks) == 1:
        return f"process {ranks[0]} is"
    return f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} are"
