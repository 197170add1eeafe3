"""SIGKILL, for real, at any moment of a training run; then what is left is judged.

A process of its own, `python tests/kills.py`; it prints what it found as JSON.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crashes import memory_directory
from forks import DEADLINE_SECONDS, Progress, fork, prepare_to_fork, wait_for
from victims import IDLE, LEFTOVERS, PLANS, SAVING, TRAINING, Board, Plan, Victim, go_on

from truestep.checkpoint.commit import DamagedCheckpointError, list_checkpoints, verify_checkpoint
from truestep.storage import TEMPORARY_PREFIX

_CLOCK = ("_seconds", "_per_second")  # how the fields of a record end that no two runs share
_SLOTS = 2
_OFTEN = {"data", "forward", "backward", "update", "log", "evaluate", "create", "write", "sync"}


def file_system(path: Path) -> str:
    """The kind of file system that a path is on, where the system says."""
    mounts = Path("/proc/self/mounts")
    lines = mounts.read_text().splitlines() if mounts.exists() else []
    found = {point: kind for _, point, kind, *_ in map(str.split, lines)}
    for parent in [path.resolve(), *path.resolve().parents]:
        if str(parent) in found:
            return found[str(parent)]
    return "unknown"


def digest_of(directory: Path, plan: Plan) -> str:
    """Hash what a finished run ends with: parameters, optimizer state and log, without clocks."""
    digest = hashlib.sha256()
    checkpoint = directory / "checkpoints" / f"step-{plan.num_steps}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        digest.update((checkpoint / name).read_bytes())
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        record = {k: v for k, v in json.loads(line).items() if not k.endswith(_CLOCK)}
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


@dataclass
class Figures:
    """What is counted. All under `laws` must be 0, but for the hashes: one a configuration."""

    kills: int = 0
    kills_in_saves: int = 0
    kills_by_phase: Counter = field(default_factory=Counter)
    saves_killed_by_phase: Counter = field(default_factory=Counter)
    commits_before_kills: int = 0
    runs_finished: int = 0
    corrupt_commits: int = 0
    lost_commits: int = 0
    failed_processes: int = 0
    hangs: int = 0
    hashes: dict[Plan, set[str]] = field(default_factory=dict)
    wrong_ends: int = 0
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "kills_in_saves": self.kills_in_saves,
            "kills_by_phase": {name: self.kills_by_phase[name] for name in TRAINING},
            "saves_killed_by_phase": {name: self.saves_killed_by_phase[name] for name in SAVING},
            "commits_before_kills": self.commits_before_kills,
            "runs_finished": self.runs_finished,
            "distinct_final_hashes": {
                plan.optimizer: len(hashes) for plan, hashes in self.hashes.items()
            },
            "laws": {
                "corrupt_commits": self.corrupt_commits,
                "lost_commits": self.lost_commits,
                "wrong_ends": self.wrong_ends,
                "failed_processes": self.failed_processes,
                "hangs": self.hangs,
            },
            "failures": self.failures[:5],
        }


class Slot:
    """One line of victims: it forks them, kills them and judges what they leave."""

    def __init__(self, place: Path, chooser: random.Random, figures: Figures) -> None:
        self._place, self._chooser, self._figures = place, chooser, figures
        self._board = Board()
        self._errors = place / "error.txt"
        self._wishes: list[str] = []  # phases still to kill at
        self._wish = ""
        self._lifetime = 0.2  # seconds, of a victim that nobody kills; learned
        self._runs = 0
        self._child: int | None = None
        self._new_run()

    def _new_run(self) -> None:
        self._directory = self._place / f"run-{self._runs}"
        self._directory.mkdir()
        self.plan = PLANS[self._runs % len(PLANS)]
        self._committed = 0
        self._runs += 1

    def start(self, *, to_be_killed: bool) -> None:
        """Fork a victim, to be killed at a moment or at a phase."""
        chooser, hold, self._kill_at = self._chooser, None, None
        self._started = time.monotonic()
        if to_be_killed and chooser.random() < 0.5:
            self._kill_at = self._started + chooser.uniform(0, 1.1 * self._lifetime)
        elif to_be_killed:
            hold = self._next_wish()
        count = 1
        if hold in _OFTEN:
            count = chooser.randint(1, 4)
        self._board.clear()
        self._board.committed = self._committed
        self.arrivals, arrived = os.pipe()
        self._errors.unlink(missing_ok=True)
        victim = Victim(self._board, arrived, hold, count)
        self._child = fork(lambda: go_on(self._directory, self.plan, victim), self._errors)
        os.close(arrived)  # so that the other end closes with the child

    def _next_wish(self) -> str:
        """Return a phase to kill at that was not had yet; a leftover's as soon as there is one."""
        if not self._wishes:
            self._wishes = [*TRAINING, *SAVING]
            self._chooser.shuffle(self._wishes)
        leftover = any((self._directory / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"))
        possible = [phase for phase in self._wishes if (phase in LEFTOVERS) <= leftover]
        possible.sort(key=lambda phase: phase in LEFTOVERS)
        self._wish = possible[-1] if possible else "sync"  # which leaves a leftover
        return self._wish

    @property
    def idle(self) -> bool:
        return self._child is None

    def next_event(self) -> float:
        """When something is to be done even if the victim says nothing."""
        return self._started + DEADLINE_SECONDS if self._kill_at is None else self._kill_at

    def attend(self, *, spoken: bool) -> None:
        """Do what is due: kill the victim, or see how it ended."""
        now = time.monotonic()
        if spoken and os.read(self.arrivals, 1):  # it waits where it was told to
            if self._wish in self._wishes:
                self._wishes.remove(self._wish)
            self._kill_at = now + self._chooser.choice([0.0, self._chooser.uniform(0, 0.005)])
        elif spoken:
            self._end()
        elif now >= self.next_event():
            assert self._child is not None
            os.kill(self._child, signal.SIGKILL)
            if self._kill_at is None:
                self._figures.hangs += 1
                self._figures.failures.append(
                    f"hangs: {self._board.training}, {self._board.saving}"
                )
            self._end()

    def kill(self) -> None:
        """End the victim, whatever it does; nothing is counted."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = None

    def _end(self) -> None:
        assert self._child is not None
        _, status = os.waitpid(self._child, 0)
        self._child = None
        os.close(self.arrivals)
        figures = self._figures
        self._judge_checkpoints()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            figures.kills += 1
            figures.kills_by_phase[self._board.training] += 1
            if self._board.saving != IDLE:
                figures.kills_in_saves += 1
                figures.saves_killed_by_phase[self._board.saving] += 1
            figures.commits_before_kills += self._committed > 0
        elif status == 0:
            self._lifetime += (time.monotonic() - self._started - self._lifetime) / 4
            self._judge_end()
            figures.runs_finished += 1
            shutil.rmtree(self._directory)
            self._new_run()
        else:
            figures.failed_processes += 1
            said = self._errors.read_text() if self._errors.exists() else ""
            figures.failures.append(f"status {status}: {said}")
            self._new_run()

    def _judge_checkpoints(self) -> None:
        """Every listed checkpoint is whole, and what was committed is there or superseded."""
        self._committed = self._board.committed
        newest = 0
        for step, path in list_checkpoints(self._directory / "checkpoints"):
            try:
                verify_checkpoint(path)
            except DamagedCheckpointError as error:
                self._figures.corrupt_commits += 1
                self._figures.failures.append(str(error))
            else:
                newest = step
        if newest < self._committed:
            self._figures.lost_commits += 1
            self._figures.failures.append(f"step {self._committed} was committed, {newest} found")

    def _judge_end(self) -> None:
        """The run has ended with the bits of the run that nobody killed, and tidily."""
        figures, checkpoints = self._figures, self._directory / "checkpoints"
        digest = digest_of(self._directory, self.plan)
        figures.wrong_ends += digest not in figures.hashes[self.plan]
        figures.hashes[self.plan].add(digest)
        if list(checkpoints.glob(f"{TEMPORARY_PREFIX}*")) or list(checkpoints.glob(".bad-*")):
            figures.wrong_ends += 1
            figures.failures.append(f"left: {sorted(p.name for p in checkpoints.iterdir())}")


@contextlib.contextmanager
def places() -> Iterator[list[Path]]:
    """Where runs lie: on the disk of temporary files, where fsync is real, and in memory."""
    with tempfile.TemporaryDirectory(prefix="truestep-") as disk, memory_directory() as memory:
        yield [Path(disk), Path(memory)]


def random_kills(
    kills: int, *, seed: int = 0, progress: Progress = lambda figures: None
) -> dict[str, Any]:
    """Kill runs at random moments and in every phase, `kills` times; all of them end the same.

    Half of the kills come after a random time, half where a victim waits at a phase in turn. The
    last runs are then left to end.
    """
    prepare_to_fork()
    started, figures = time.monotonic(), Figures()
    with places() as directories, contextlib.ExitStack() as stack:
        for plan in PLANS:
            whole = directories[1] / plan.optimizer
            whole.mkdir()
            errors = directories[1] / "error.txt"
            wait_for(fork(lambda: go_on(whole, plan, Victim(Board())), errors), errors)  # noqa: B023 - forked at once
            figures.hashes[plan] = {digest_of(whole, plan)}
        slots = []
        for number in range(_SLOTS):
            place = directories[number % len(directories)]
            chooser = random.Random(f"{seed} {number}")
            slots.append(Slot(place, chooser, figures))
            stack.callback(slots[-1].kill)
        systems = [file_system(directory) for directory in directories]
        last: set[int] = set()  # slots whose victims are no longer killed
        told = 0.0
        while True:
            for number, slot in enumerate(slots):
                if slot.idle and figures.kills + sum(not s.idle for s in slots) < kills:
                    slot.start(to_be_killed=True)
                elif slot.idle and figures.kills >= kills and number not in last:
                    last.add(number)
                    slot.start(to_be_killed=False)
            busy = [slot for slot in slots if not slot.idle]
            if not busy:
                break
            pause = max(0.0, min(slot.next_event() for slot in busy) - time.monotonic())
            spoken, _, _ = select.select([slot.arrivals for slot in busy], [], [], pause)
            for slot in busy:
                slot.attend(spoken=slot.arrivals in spoken)
            if time.monotonic() - told > 2:
                told = time.monotonic()
                progress(figures.as_dict())
    seconds = round(time.monotonic() - started, 1)
    return {**figures.as_dict(), "file_systems": systems, "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    json.dump(random_kills(options.kills, seed=options.seed), sys.stdout)
