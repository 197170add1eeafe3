"""What a process that is going to be killed does, and how it tells where it is until it dies.

A victim tells its phase in memory that it shares with its parent: one byte for the thread that
trains, one for the thread that saves. It can be told to wait, for its death, at a given phase.
"""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from truestep import (
    GPT,
    CheckpointWriter,
    GPTConfig,
    JsonlSink,
    Trainer,
    TrainingConfig,
    every,
    load_checkpoint,
)
from truestep.checkpoint.commit import Validation, newest_checkpoint
from truestep.data.loader import WindowLoader, evaluation_batches
from truestep.storage import TEMPORARY_PREFIX, LocalStorage

TRAINING = [
    *("start", "load", "open the log", "data", "forward", "backward", "update", "log"),
    *("evaluate", "wait for the save before", "stage", "close"),
]
LEFTOVERS = ["remove a leftover", "half a removed leftover"]  # of a save that was killed
SAVING = [
    *("make the directory", "create", "write", "half a write", "sync", "rename"),
    *("sync the directory", "between operations", *LEFTOVERS),
    *("prune: rename", "prune: sync the directory", "prune: remove", "prune: half a remove"),
]
IDLE = "no save"  # of the thread that saves: before its first, or what it saved last is durable
PHASES = [*TRAINING, *SAVING, IDLE]


class Board:
    """What a victim tells, still legible after its death."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 16)  # anonymous and shared with every fork
        self.clear()

    def clear(self):
        self._memory[:2] = bytes([PHASES.index("start"), PHASES.index(IDLE)])
        self.committed = 0

    def tell(self, phase):
        self._memory[int(phase not in TRAINING)] = PHASES.index(phase)

    @property
    def training(self):
        return PHASES[self._memory[0]]

    @property
    def saving(self):
        return PHASES[self._memory[1]]

    @property
    def committed(self):
        """The last step that is durable as far as the victim can know."""
        return int.from_bytes(self._memory[8:16], "little")

    @committed.setter
    def committed(self, step):
        self._memory[8:16] = step.to_bytes(8, "little")


class Victim:
    """Tells the board each phase; at the `count`-th time of the phase `hold` it waits to be killed.

    That it waits it says through the descriptor `arrived`.
    """

    def __init__(self, board, arrived=None, hold=None, count=1):
        self.board = board
        self._arrived, self._hold, self._count = arrived, hold, count
        self._evaluating = False

    def enter(self, phase):
        if self._evaluating and phase in TRAINING:
            return
        self.board.tell(phase)
        if phase == self._hold:
            self._count -= 1
            if self._count == 0:
                os.write(self._arrived, b".")
                time.sleep(10**6)  # this thread alone: the other goes on

    def evaluate(self, trainer, batches):
        self.enter("evaluate")
        self._evaluating = True
        result = trainer.evaluate(batches)
        self._evaluating = False
        return result


class WatchedStorage(LocalStorage):
    """The local file system; calls `enter` before every operation and in the middle of some.

    `commit` is called with the step of a checkpoint once its name is durable.
    """

    def __init__(self, enter, commit=lambda step: None):
        self._enter, self._commit = enter, commit
        self._doomed = set()
        self._visible = None

    def make_directory(self, path):
        self._enter("make the directory")
        super().make_directory(path)
        self._enter("between operations")

    def create(self, path):
        self._enter("create")
        descriptor = super().create(path)
        self._enter("between operations")
        return descriptor

    def write(self, descriptor, data):
        self._enter("write")
        written = super().write(descriptor, data[: len(data) // 2]) if len(data) > 1 else 0
        self._enter("half a write")
        written += super().write(descriptor, data[written:])
        self._enter("between operations")
        return written

    def sync(self, descriptor):
        self._enter("sync")
        super().sync(descriptor)
        self._enter("between operations")

    def rename(self, source, target):
        prunes = target.name.startswith(TEMPORARY_PREFIX)
        self._enter("prune: rename" if prunes else "rename")
        super().rename(source, target)
        if prunes:
            self._doomed.add(target)
        else:
            self._visible = target
        self._enter("between operations")

    def sync_directory(self, path):
        self._enter("prune: sync the directory" if self._doomed else "sync the directory")
        super().sync_directory(path)
        if self._visible is not None and path == self._visible.parent:
            self._commit(int(self._visible.name.removeprefix("step-")))
            self._visible = None
            self._enter(IDLE)  # unless there is something to prune
        else:
            self._enter("between operations")

    def remove(self, path):
        prunes = path in self._doomed
        self._doomed.discard(path)
        self._enter("prune: remove" if prunes else "remove a leftover")
        if path.is_dir():
            next(path.iterdir(), path / "nothing").unlink(missing_ok=True)
            self._enter("prune: half a remove" if prunes else "half a removed leftover")
        super().remove(path)
        self._enter(IDLE if prunes else "between operations")


# The training that is killed again and again.


@dataclass(frozen=True)
class Plan:
    """One kind of run: everything its final bits depend on."""

    optimizer: str
    save_every: int
    evaluate_every: int = 2
    num_steps: int = 7


PLANS = [Plan("adamw", save_every=2), Plan("muon", save_every=3)]


class Counting:
    """Tokens that need no file."""

    def __len__(self):
        return 700

    def read(self, start, stop):
        return torch.arange(start, stop).mul(7).remainder(31).numpy()


class TellingLoader:
    def __init__(self, loader, enter):
        self._loader, self._enter = loader, enter

    def batch_at(self, step):
        self._enter("data")
        return self._loader.batch_at(step)


class TellingSink:
    def __init__(self, sink, enter):
        self._sink, self._enter = sink, enter

    def write(self, record):
        self._enter("log")
        self._sink.write(record)
        self._enter("data")


def build(plan, victim):
    """A seeded model with dropout; accumulation with a ragged last micro-batch; a schedule."""
    shape = GPTConfig(
        vocab_size=31, context_length=8, num_layers=1, num_heads=2, width=16, dropout=0.2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = GPT(shape)
    config = TrainingConfig(
        optimizer=plan.optimizer,
        micro_batch_size=3,
        schedule="wsd",
        warmup_steps=2,
        num_steps=plan.num_steps,
        learning_rate=1e-2,
        precision="float32",
        compile="off",
    )
    trainer = Trainer(model, config, device="cpu", sinks=[])
    model.register_forward_pre_hook(lambda *_: victim.enter("forward"))
    model.register_forward_hook(lambda *_: victim.enter("backward"))
    schedule = trainer.schedule  # asked between backward and update

    def telling_schedule(step):
        victim.enter("update")
        return schedule(step)

    trainer.schedule = telling_schedule
    return trainer


def warm_up():
    """Have what every victim would do first done: imports, and the trainer's look at the model.

    That is a forward pass without values: nothing is computed, and no thread is started.
    """
    for plan in PLANS:
        trainer = build(plan, Victim(Board()))
        trainer.prepare(WindowLoader(Counting(), context_length=8, batch_size=5).batch_at(0))


def refuse_to_speak(message):
    raise AssertionError(f"a kill made a checkpoint look damaged, or a save fail: {message}")


def go_on(directory: Path, plan: Plan, victim: Victim) -> None:
    """Bring the run in `directory` to its end, from wherever it was left."""
    victim.enter("start")
    checkpoints = directory / "checkpoints"
    trainer = build(plan, victim)
    victim.enter("load")
    newest = newest_checkpoint(checkpoints, refuse_to_speak)
    if newest is not None:
        load_checkpoint(newest, trainer)
    victim.enter("open the log")
    log = JsonlSink(directory / "metrics.jsonl", from_step=trainer.step)

    def commit(step):
        victim.board.committed = step

    writer = CheckpointWriter(
        checkpoints,
        keep=2,
        keep_best=1,
        say=refuse_to_speak,
        before_commit=log.sync,
        storage=WatchedStorage(victim.enter, commit),
    )
    tokens = Counting()
    loader = WindowLoader(tokens, context_length=8, batch_size=5, seed=3)
    measured = {}

    def evaluate(trainer, metrics):
        batches = evaluation_batches(tokens, context_length=8, batch_size=4, num_windows=8)
        result = victim.evaluate(trainer, batches)
        measured[metrics.step] = Validation(result.loss, result.num_tokens)
        trainer.log({"step": metrics.step, "validation_loss": result.loss})

    def save(trainer, metrics):
        victim.enter("wait for the save before")
        writer.wait()
        victim.enter("stage")
        writer.save(trainer, facts={"plan": plan.optimizer}, validation=measured.get(metrics.step))
        victim.enter("data")

    trainer.sinks = [TellingSink(log, victim.enter), writer]
    trainer.companions = [every(plan.evaluate_every, evaluate), every(plan.save_every, save)]
    trainer.fit(TellingLoader(loader, victim.enter))
    writer.save(trainer)  # of a run that was at its end already, too
    victim.enter("close")
    writer.close()
    log.close()
