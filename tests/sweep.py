"""Every operation of a save as the last one of its process, or as the one that fails.

A process of its own, `python tests/sweep.py`; it prints what it found as JSON.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crashes import memory_directory
from faults import FaultyStorage
from forks import Progress, end_of, fork, prepare_to_fork, wait_for
from power_loss import advance, files_of, new_run, problems_with_saves
from victims import IDLE, Board, WatchedStorage

from truestep import CheckpointWriter, load_checkpoint, save_checkpoint
from truestep.storage import LocalStorage


class Killer:
    """Kills its own process when a storage enters an operation for the `number`-th time."""

    def __init__(self, number: int | None) -> None:
        self._number = number
        self.phases: list[str] = []

    def __call__(self, phase: str) -> None:
        if phase in {"between operations", IDLE}:
            return
        if len(self.phases) == self._number:
            os.kill(os.getpid(), signal.SIGKILL)
        self.phases.append(phase)


def save_third_step(directory: Path, mode: str, storage: LocalStorage) -> None:
    """Go on from step 2 and save step 3, in the foreground or in the background."""
    run = new_run()
    load_checkpoint(directory / "step-2", run)
    advance(run)
    if mode == "foreground":
        save_checkpoint(run, directory, storage=storage)
    else:
        with CheckpointWriter(directory, storage=storage, say=lambda text: None) as writer:
            writer.save(run)


def sweep(
    faults: tuple[str, ...] = ("kill",), *, progress: Progress = lambda figures: None
) -> dict[str, Any]:
    """Have every operation of a save be the last one, or fail; both modes of saving.

    `kill` also comes in the middle of each write and of the removal of a directory. The others are
    faults of `FaultyStorage`.
    """
    prepare_to_fork()
    started = time.monotonic()
    counts: Counter = Counter()
    phases, failures = Counter(), []
    with memory_directory() as memory:
        root = Path(memory)
        base, errors, board = root / "base" / "checkpoints", root / "error.txt", Board()

        def save_two() -> None:
            run = new_run()
            for _ in range(2):
                advance(run)
                save_checkpoint(run, base)

        wait_for(fork(save_two, errors), errors)

        def attempt(name: str, mode: str, storage: Callable[[], LocalStorage]) -> tuple[int, Path]:
            directory = root / name / "checkpoints"
            shutil.copytree(base, directory)
            board.clear()
            child = fork(lambda: save_third_step(directory, mode, storage()), errors)
            return end_of(child), directory

        # What a save does when nobody disturbs it, told through a file.
        totals: dict[tuple[str, str], list[str]] = {}
        for mode in ("foreground", "background"):
            for fault in faults:
                log, directory = root / "phases.json", root / f"whole-{mode}-{fault}"
                shutil.copytree(base, directory)

                def whole(mode=mode, fault=fault, log=log, directory=directory):
                    killer = Killer(None)
                    storage = WatchedStorage(killer) if fault == "kill" else FaultyStorage()
                    save_third_step(directory, mode, storage)
                    log.write_text(json.dumps(killer.phases or storage.operations))

                wait_for(fork(whole, errors), errors)
                totals[mode, fault] = json.loads(log.read_text())
        saved = {1: base, 2: base, 3: directory}
        history = {step: files_of(saved[step] / f"step-{step}") for step in saved}

        def commit(step: int) -> None:
            board.committed = step

        for (mode, fault), operations in totals.items():
            for number, operation in enumerate(operations):

                def storage(number=number, fault=fault):
                    if fault == "kill":
                        return WatchedStorage(Killer(number), commit)
                    return FaultyStorage(number, fault)

                status, directory = attempt(f"{mode}-{fault}-{number}", mode, storage)
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                returned = status == 0 or board.committed == 3
                marks = [(kind, step) for step in (1, 2) for kind in ("started", "committed")]
                marks += [("started", 3)]
                marks += [("committed", 3)] if returned else []
                problems = problems_with_saves(directory, history, marks)
                if fault == "kill" and not killed:
                    problems.append("it was not killed")
                counts[fault] += 1
                phases.update([operation] if fault == "kill" else [])
                failures += [f"{mode}, {fault} at {number}, {operation}: {p}" for p in problems]
                shutil.rmtree(directory.parent)
                progress({"attempts": sum(counts.values())})
    return {
        "attempts": dict(counts),
        "kills_by_phase": dict(phases),
        "laws": {"broken": len(failures)},
        "failures": failures[:5],
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    json.dump(sweep(), sys.stdout)
