"""A run that ends well when a signal asks it to."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from truestep.training.trainer import Trainer

_ONE_SIGNAL_SECONDS = 1.0  # the same signal again within these is the same wish, sent twice


@contextlib.contextmanager
def stopped_by_signals(trainer: Trainer, *, speaks: bool = True) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end `fit` after its step; a second one leaves at once.

    The same one twice within a second counts once: `timeout make train` sends it to the whole
    process group, and make passes it on; a closed terminal and its shell both hang up.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        numbers.append(signal.SIGHUP)
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def stop(number: int, _: object) -> None:
        if trainer.stop_reason is None:
            trainer.stop(signal.Signals(number).name)
            if not speaks:
                return
            with contextlib.suppress(OSError):  # the terminal itself may be what has gone
                os.write(
                    2, b"\nstopping after this step; once more, a second later, leaves at once\n"
                )

    before = [signal.signal(number, stop) for number in numbers]
    before_told = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    # Handlers wait for the main thread to come out of a long product; this thread does not.
    leaving = threading.Thread(target=_leave_at_the_second, args=(heard, numbers), daemon=True)
    leaving.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_told)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        os.write(told, bytes(1))  # no signal: the thread ends, whoever else has the pipe
        leaving.join()
        os.close(told)
        os.close(heard)


def _leave_at_the_second(heard: int, numbers: list[signal.Signals]) -> None:
    """Read signals as they come, and leave at the second, unless it is the first one sent twice."""
    first, since = None, 0.0
    while number := os.read(heard, 1)[0]:
        now = time.monotonic()
        if number not in numbers:
            continue
        if first is None:
            first, since = number, now
        elif number != first or now - since > _ONE_SIGNAL_SECONDS:
            os._exit(128 + number)
