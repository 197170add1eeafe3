"""Fork victims from a process that has imported everything and computed nothing.

A process forked after a threaded backward hangs, so whoever forks is a process of its own.
"""

import contextlib
import gc
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # an optimizer's first step imports it, which takes a second
from victims import warm_up

DEADLINE_SECONDS = 120  # a victim that lives longer hangs

Progress = Callable[[dict[str, Any]], object]  # is told the figures so far


def fork(function: Callable[[], object], errors: Path) -> int:
    """Run `function` in a forked child and return its process id; an exception goes to a file."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
            signal.alarm(2 * DEADLINE_SECONDS)  # should the parent die before it can
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            errors.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return child


def end_of(child: int) -> int:
    """Wait for a child and return its status; if the wait is interrupted, the child is killed."""
    try:
        return os.waitpid(child, 0)[1]
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise


def wait_for(child: int, errors: Path) -> None:
    """Wait until a child that nobody kills has ended well."""
    status = end_of(child)
    if status != 0:
        said = errors.read_text() if errors.exists() else f"status {status}"
        raise RuntimeError(f"a process that nobody killed failed: {said}")


def prepare_to_fork() -> None:
    """Leave as little as possible to be copied when a child touches it."""
    torch.set_num_threads(1)
    warm_up()
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a thread was started"
    gc.collect()
    gc.freeze()
