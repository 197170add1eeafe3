"""Do jobs in several processes, which end with the one that started them however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, TypeVar

_REPORT_BYTES = 2**22  # done between two messages about it

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int], object]
"""Is told of every further number of bytes that were done."""
Work = Callable[[Job, Report], Result]


class WorkerError(RuntimeError):
    """A process that worked was ended from outside."""


def count_workers(workers: int | Literal["auto"]) -> int:
    """Return how many processes are meant; auto: one for each core this process may use.

    Errors: ValueError for fewer than one.
    """
    if workers == "auto":
        own = getattr(os, "sched_getaffinity", None)
        return len(own(0)) if own else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1, or auto")
    return workers


def do_jobs(
    jobs: Sequence[Job], work: Work[Job, Result], workers: int, report: Report
) -> Iterator[tuple[int, Result]]:
    """Yield number and result of each job as it is done, in any order.

    One worker is this process itself; further ones are started afresh, and are sent jobs, `work`
    and results as bytes, one at a time. `report` is called in this process.
    Errors: whatever `work` raises; WorkerError for a process that was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for number, job in enumerate(jobs):
            yield number, work(job, report)
        return
    context = multiprocessing.get_context("spawn")  # what runs here may hold locks and threads
    waiting = iter(enumerate(jobs))
    begun: dict[Connection, tuple[SpawnProcess, int]] = {}  # and the job that it does
    processes: list[SpawnProcess] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()  # so that a process that died ends the pipe
            begun[ours] = (process, _send_next(ours, waiting))
        while begun:
            for pipe in wait(list(begun)):
                assert isinstance(pipe, Connection)
                process, number = begun[pipe]
                kind, value = _receive(pipe, process)
                if kind == "bytes":
                    report(value)
                    continue
                if kind == "error":
                    raise value
                yield number, value
                following = _send_next(pipe, waiting)
                begun[pipe] = (process, following)
                if following < 0:
                    del begun[pipe]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _send_next(pipe: Connection, waiting: Iterator[tuple[int, Any]]) -> int:
    """Send the next job and return its number; -1 where there is none."""
    number, job = next(waiting, (-1, None))
    if number >= 0:
        pipe.send(job)
    return number


def _receive(pipe: Connection, process: SpawnProcess) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise WorkerError(
            f"a worker was ended from outside (exit code {process.exitcode}), as happens where "
            "memory ends; use fewer workers"
        ) from None
    return message


def _serve(pipe: Connection, work: Work[Job, Result]) -> None:
    """Do one job after another, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that is waited for answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    done = 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if abs(done) >= _REPORT_BYTES:
            pipe.send(("bytes", done))
            done = 0

    with suppress(EOFError, ConnectionError):
        while True:
            job = pipe.recv()
            try:
                result = work(job, report)
            except Exception as error:  # noqa: BLE001 raised again where it is waited for
                pipe.send(("error", error))
            else:
                pipe.send(("bytes", done))
                done = 0
                pipe.send(("result", result))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
