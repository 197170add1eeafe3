"""The command line: one thin file a command, each imported only when it is called."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 runtime, 2 usage, 130 and 143 signals."""
    if threading.current_thread() is not threading.main_thread():
        return _run(arguments)
    # Libraries that are being imported swallow KeyboardInterrupt, or break on it.
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _run(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: Sequence[str] | None) -> int:
    if sys.stdout is None:  # closed by whoever started the command
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 for the whole process
    from truestep.cli.app import run

    return run(sys.argv[1:] if arguments is None else list(arguments))


def say_when_interrupted(text: str | None) -> None:
    """Add what to do next to what is said when a signal ends this command at once.

    None: say nothing at all, in a process that leaves that to another.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            said = None if text is None else f"; {text}"
            signal.signal(number, functools.partial(_leave, text=said))


def _leave(number: int, _: object, text: str | None = "") -> None:
    storage = sys.modules.get("truestep.storage")
    if remove_unfinished := getattr(storage, "remove_unfinished", None):  # not while it is imported
        remove_unfinished()
    if text is not None:
        os.write(2, f"error: interrupted{text}\n".encode("ascii", "backslashreplace"))
    os._exit(128 + number)
