"""Saves, replaced files and prepared data through a loss of power: what must hold in every state.

Each scenario takes the journal of real work, has the model of `crashes` say what may be left of it,
puts that on a disk and returns how many states it looked at and what was wrong in them.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from crashes import Journal, crash_everywhere, memory_directory, read_tree, write_tree

from truestep import CheckpointWriter, JsonlSink
from truestep.checkpoint.commit import (
    DamagedCheckpointError,
    Validation,
    commit_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    verify_checkpoint,
)
from truestep.data.prepare import prepare
from truestep.data.tokenizer import ByteTokenizer
from truestep.manifest import MANIFEST
from truestep.storage import TEMPORARY_PREFIX, replace_file

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 0.5}  # step -> validation loss; the best moves twice
OLD, NEW = b"the old content", b"new and a little longer"


@dataclass
class Outcome:
    """How many states were looked at, and each problem with the number of states that have it."""

    states: int = 0
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, problems: list[str]) -> None:
        self.states += 1
        for problem in problems:
            self.problems[problem] = self.problems.get(problem, 0) + 1


def look_everywhere(
    journal: Journal, limit: int, seed: int, look: Callable[[Path, list], list[str]]
) -> Outcome:
    """Put every state on a disk and call `look` with its place and the marks before the crash."""
    outcome = Outcome()
    with memory_directory() as memory:
        for number, (tree, marks) in enumerate(crash_everywhere(journal, limit, seed)):
            place = Path(memory) / str(number)
            write_tree(place, tree)
            outcome.add(look(place, marks))
            shutil.rmtree(place)
    return outcome


# Saves.


def new_run() -> SimpleNamespace:
    """The least that can be saved: a model of one tensor, an optimizer with state and a step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return SimpleNamespace(model=model, optimizer=optimizer, step=0)


def advance(run: SimpleNamespace) -> None:
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + run.step)
    run.optimizer.step()
    run.step += 1


def files_of(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.name != MANIFEST}


def save_with_writer(journal: Journal, directory: Path) -> dict[int, dict[str, bytes]]:
    """Save every step of LOSSES with the two newest and the best kept; return what was saved."""
    run, history = new_run(), {}
    with CheckpointWriter(directory, keep=2, keep_best=1, storage=journal) as writer:
        for step, loss in LOSSES.items():
            advance(run)
            journal.mark(("started", step))
            writer.save(run, validation=Validation(loss, 8))
            writer.wait()
            journal.mark(("committed", step))
            history[step] = files_of(directory / f"step-{step}")
    return history


def saves(
    make_journal: Callable[[Path], Journal] = Journal,
    save: Callable[[Journal, Path], dict[int, dict[str, bytes]]] = save_with_writer,
    *,
    limit: int,
    seed: int = 0,
) -> Outcome:
    """Lose power at every moment of some saves."""
    with memory_directory() as memory:
        root = Path(memory) / "run"
        (root / "checkpoints").mkdir(parents=True)
        journal = make_journal(root)
        history = save(journal, root / "checkpoints")

        def look(place: Path, marks: list) -> list[str]:
            return problems_with_saves(place / "checkpoints", history, marks)

        return look_everywhere(journal, limit, seed, look)


def problems_with_saves(
    directory: Path, history: dict[int, dict[str, bytes]], marks: list
) -> list[str]:
    """Compare a directory of checkpoints with what was saved, then save once more."""
    committed = [step for kind, step in marks if kind == "committed"]
    started = [step for kind, step in marks if kind == "started"]
    problems, intact = [], []
    for step, path in list_checkpoints(directory):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError:
            problems.append("a damaged checkpoint is listed")
        else:
            intact.append(step)
            if files_of(path) != history[step]:
                problems.append("a checkpoint holds other bytes than were saved")

    said: list[str] = []
    newest = newest_checkpoint(directory, said.append)
    if len(list(directory.glob(".bad-*"))) != sum("set aside as" in line for line in said):
        problems.append("a checkpoint was set aside silently")
    if newest is None and committed:
        problems.append("neither the old nor the new is left")
    elif newest is not None and int(newest.name[5:]) not in {*committed[-1:], *started[-1:]}:
        problems.append("a commit is lost")

    there = committed + [step for step in started[-1:] if step in intact and step not in committed]
    best = sorted(there, key=lambda step: (LOSSES[step], step))[:1]
    if not {*there[-2:]} <= set(intact):
        problems.append("one of the last two is lost")
    if not {*best} <= set(intact):
        problems.append("the best is lost")

    step = started[-1] if started else min(history)
    commit_checkpoint(directory, step, {n: [b] for n, b in history[step].items()}, {}, keep=2)
    newest = newest_checkpoint(directory, said.append)
    leftovers = list(directory.glob(f"{TEMPORARY_PREFIX}*"))
    if newest != directory / f"step-{step}" or files_of(newest) != history[step] or leftovers:
        problems.append("the next save does not make it good")
    return problems


def save_in_a_new_directory(*, limit: int, seed: int = 0) -> Outcome:
    """Save into a directory, beside a log, that somebody made and did not live to sync."""
    with memory_directory() as memory:
        root = Path(memory) / "run"
        root.mkdir()
        journal = Journal(root)
        log = journal.create(root / "metrics.jsonl")
        journal.make_unsynced(root / "checkpoints")
        run, history = new_run(), {}
        for _ in range(2):
            advance(run)
            journal.write(log, memoryview(b'{"step": %d}\n' % run.step))
            journal.mark(("started", run.step))
            with CheckpointWriter(
                root / "checkpoints", before_commit=lambda: journal.sync(log), storage=journal
            ) as writer:
                writer.save(run)
            journal.mark(("committed", run.step))
            history[run.step] = files_of(root / "checkpoints" / f"step-{run.step}")
        journal.close(log)

        def look(place: Path, marks: list) -> list[str]:
            newest = newest_checkpoint(place / "checkpoints", lambda text: None)
            step = int(newest.name[5:]) if newest else 0
            log = place / "metrics.jsonl"
            known = log.read_bytes().count(b"\n") if log.exists() else 0
            problems = ["a checkpoint knows more than the log"] if known < step else []
            if step not in {mark[1] for mark in marks[-2:]} | {0} or (
                step == 0 and ("committed", 1) in marks
            ):
                problems.append("a commit is lost")
            return problems

        return look_everywhere(journal, limit, seed, look)


# Files that are replaced.


def replaced_file(
    make_journal: Callable[[Path], Journal] = Journal, *, limit: int, seed: int = 0
) -> Outcome:
    """Lose power at every moment of replacing one file: a run's settings, its manifest."""
    with memory_directory() as memory:
        root = Path(memory) / "run"
        root.mkdir()
        (root / "config.toml").write_bytes(OLD)
        journal = make_journal(root)
        journal.largest_write = 5
        replace_file(journal, root / "config.toml", NEW)
        journal.mark("returned")

        def look(place: Path, marks: list) -> list[str]:
            names = {path.name for path in place.iterdir()}
            if not all(n == "config.toml" or n.startswith(TEMPORARY_PREFIX) for n in names):
                return ["a file is left that readers look at"]
            found = (place / "config.toml").read_bytes() if "config.toml" in names else None
            if found not in {OLD, NEW}:
                return ["neither the old nor the new is left"]
            return ["the new content is lost"] if marks and found != NEW else []

        return look_everywhere(journal, limit, seed, look)


def cut_back_log(*, limit: int, seed: int = 0) -> Outcome:
    """Lose power at every moment of cutting a log back to step 3, and open it again."""
    lines = [b'{"step": %d, "loss": 2.5}\n' % step for step in range(1, 7)]
    with memory_directory() as memory:
        root = Path(memory) / "run"
        root.mkdir()
        (root / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 7, "lo')
        journal = Journal(root, largest_write=20)
        JsonlSink(root / "metrics.jsonl", from_step=3, storage=journal).close()
        journal.mark("returned")

        def look(place: Path, marks: list) -> list[str]:
            log = place / "metrics.jsonl"
            problems = []
            if marks and log.read_bytes() != b"".join(lines[:3]):
                problems.append("the cut is lost")
            JsonlSink(log, from_step=3).close()
            if log.read_bytes() != b"".join(lines[:3]):
                problems.append("a record is lost")
            return problems

        return look_everywhere(journal, limit, seed, look)


# Prepared data.


def prepared_data(
    make_journal: Callable[[Path], Journal] = Journal, *, limit: int, seed: int = 0
) -> Outcome:
    """Lose power at every moment of preparing a corpus, and prepare it again where it is absent."""
    tokenizer = ByteTokenizer()
    with memory_directory() as memory:
        source = Path(memory) / "text"
        source.mkdir()
        for number in range(12):
            (source / f"{number}.txt").write_text(f"text {number}, and a little more of it\n" * 2)
        root, below = Path(memory) / "runs", Path("new", "cache", "text-1")
        root.mkdir()
        journal = make_journal(root)
        options = {"tokenizer": tokenizer, "shard_tokens": 300}
        prepare(str(source), root / below, storage=journal, **options)
        journal.mark("returned")
        expected = read_tree(root / below)

        def look(place: Path, marks: list) -> list[str]:
            target = place / below
            problems = ["what was prepared is lost"] if marks and not target.exists() else []
            if not target.exists():
                prepare(str(source), target, **options)
            if read_tree(target) != expected:
                problems.append("half of the data is visible")
            return problems

        return look_everywhere(journal, limit, seed, look)


SCENARIOS = {
    "saves": saves,
    "first saves of a run": save_in_a_new_directory,
    "a replaced file": replaced_file,
    "a log cut back": cut_back_log,
    "prepared data": prepared_data,
}


def lose_power(
    *, limit: int, seeds: int, progress: Callable[[dict[str, Any]], object] = lambda figures: None
) -> dict[str, Any]:
    """Go through every scenario with each of so many seeds, and count."""
    started, states, failures = time.monotonic(), dict.fromkeys(SCENARIOS, 0), []
    for seed in range(seeds):
        for name, scenario in SCENARIOS.items():
            outcome = scenario(limit=limit, seed=seed)
            states[name] += outcome.states
            failures += [f"{name}: {problem}, {n}" for problem, n in outcome.problems.items()]
            progress({"states": sum(states.values()), "seeds": seed})
    return {
        "states": sum(states.values()),
        "by_scenario": states,
        "laws": {"broken": len(failures)},
        "failures": failures[:5],
        "seconds": round(time.monotonic() - started, 1),
    }
