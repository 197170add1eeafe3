"""Saving in the background: off the critical path, and as safe as in the foreground."""

import os
import threading
import time

import pytest
import torch
from faults import FaultyStorage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from truestep import Trainer, TrainingConfig, every
from truestep.checkpoint.commit import (
    Validation,
    best_checkpoints,
    commit_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    validation_of,
)
from truestep.checkpoint.lock import CheckpointError
from truestep.checkpoint.state import load_checkpoint, save_checkpoint
from truestep.checkpoint.writer import CheckpointWriter
from truestep.storage import LOCAL, LocalStorage, StorageError


class Gate(LocalStorage):
    """A disk on which every sync waits until the gate is opened."""

    def __init__(self):
        self.opened = threading.Event()
        self.reached = threading.Event()

    def sync(self, descriptor):
        self.reached.set()
        assert self.opened.wait(30)
        super().sync(descriptor)


@pytest.fixture
def trainer(bigram):
    return Trainer(bigram(), TrainingConfig(precision="float32", compile="off"), sinks=[])


def bits(trainer):
    tensors = [*trainer.model.parameters()]
    for state in [trainer.optimizer.state[parameter] for parameter in trainer.model.parameters()]:
        tensors += [state[key] for key in sorted(state)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_training_goes_on_while_a_save_waits_for_the_disk_and_the_saved_bits_are_those_of_the_step(
    tmp_path, trainer, bigram, windows
):
    gate = Gate()
    with CheckpointWriter(tmp_path, storage=gate) as writer:
        trainer.training_step(windows())
        before = bits(trainer)
        writer.save(trainer)
        assert gate.reached.wait(30)
        for _ in range(3):
            trainer.training_step(windows())  # changes every parameter and moment in place
            writer.check()
        assert not equal(bits(trainer), before)
        assert list_checkpoints(tmp_path) == []  # it exists only once it is durable
        gate.opened.set()
    other = Trainer(bigram(9), trainer.config, sinks=[])
    load_checkpoint(tmp_path / "step-1", other)
    assert other.step == 1
    assert equal(bits(other), before)


def test_at_most_one_save_is_in_flight_and_the_next_waits_for_it(tmp_path, trainer, windows):
    gate = Gate()
    with CheckpointWriter(tmp_path, storage=gate) as writer:
        trainer.training_step(windows())
        writer.save(trainer)
        trainer.training_step(windows())
        second = threading.Thread(target=writer.save, args=[trainer])
        second.start()
        assert gate.reached.wait(30)
        time.sleep(0.05)
        assert second.is_alive()
        assert len(list(tmp_path.glob(".tmp-*"))) == 1
        gate.opened.set()
        second.join(30)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]


def test_a_save_in_the_foreground_waits_for_the_one_in_flight_and_spares_its_files(
    tmp_path, trainer, windows
):
    gate = Gate()
    with CheckpointWriter(tmp_path, storage=gate) as writer:
        trainer.training_step(windows())
        writer.save(trainer)
        assert gate.reached.wait(30)
        trainer.training_step(windows())
        foreground = threading.Thread(target=save_checkpoint, args=[trainer, tmp_path])
        foreground.start()
        time.sleep(0.05)
        assert foreground.is_alive()
        gate.opened.set()
        foreground.join(30)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]


def test_a_step_that_is_saved_already_is_not_written_twice(tmp_path, trainer, windows):
    storage = FaultyStorage()
    with CheckpointWriter(tmp_path, storage=storage) as writer:
        trainer.training_step(windows())
        writer.save(trainer)
        writer.save(trainer)
        writer.wait()
        count = len(storage.operations)
        writer.save(trainer)
    assert len(storage.operations) == count > 10


def test_a_step_that_is_being_saved_is_left_out_without_waiting(tmp_path, trainer, windows):
    gate = Gate()
    with CheckpointWriter(tmp_path, storage=gate) as writer:
        trainer.training_step(windows())
        writer.save(trainer)
        assert gate.reached.wait(30)
        writer.save(trainer)  # as a periodic save does after a validation's
        assert list_checkpoints(tmp_path) == []
        gate.opened.set()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("other_trainer", [False, True])
def test_the_same_step_of_another_training_is_not_taken_for_the_saved_one(
    tmp_path, trainer, bigram, windows, other_trainer
):
    with CheckpointWriter(tmp_path) as writer:
        for _ in range(2):
            trainer.training_step(windows())
            writer.save(trainer)
        writer.wait()
        if other_trainer:
            trainer = Trainer(bigram(), trainer.config, sinks=[])
        load_checkpoint(tmp_path / "step-1", trainer)
        trainer.training_step(windows(5))
        writer.save(trainer)
        with pytest.raises(CheckpointError, match="step-2 holds another state of this step"):
            writer.wait()


class Full(LocalStorage):
    """A disk that is full for as long as it is told to be."""

    full = False

    def write(self, descriptor, data):
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(descriptor, data)


def test_a_failed_save_is_reported_at_the_next_step_and_training_goes_on(
    tmp_path, trainer, windows
):
    said, disk = [], Full()
    with CheckpointWriter(tmp_path, say=said.append, storage=disk) as writer:
        trainer.training_step(windows())
        writer.save(trainer)
        writer.wait()
        disk.full = True
        trainer.sinks = [writer]  # as a run has it: told at the next step
        for failures in (1, 2):
            trainer.training_step(windows())
            writer.save(trainer)
            while not writer._in_flight.done():
                time.sleep(0.001)
            trainer.training_step(windows())
            assert len(said) == failures
            assert f"saving failed ({failures} of 3)" in said[-1]
            assert "No space left on device" in said[-1]
            assert newest_checkpoint(tmp_path, said.append) == tmp_path / "step-1"
        disk.full = False
        writer.save(trainer)  # a success starts the count again
        writer.wait()
        disk.full = True
        trainer.training_step(windows())
        writer.save(trainer)
        writer.wait()
        assert "saving failed (1 of 3)" in said[-1]
        disk.full = False
        writer.save(trainer)  # the same step may be tried again
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5, 6]


def by_a_file(directory):
    """Put a file where the checkpoints were, which even root cannot save into."""
    moved = directory.rename(directory.with_name("moved"))
    directory.write_text("")

    def undo():
        directory.unlink()
        moved.rename(directory)

    return undo


def by_permissions(directory):
    """Let nobody write what is there, as a disk that the kernel remounts read-only after errors."""
    modes = [(path, path.stat().st_mode) for path in (directory / ".lock", directory)]
    for path, mode in modes:
        path.chmod(mode & ~0o222)
    return lambda: [path.chmod(mode) for path, mode in modes]


@pytest.mark.parametrize(
    "close_off",
    [
        by_a_file,
        pytest.param(
            by_permissions,
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere"),
        ),
    ],
)
def test_a_directory_that_cannot_be_written_any_more_counts_as_any_other_failed_save(
    tmp_path, trainer, windows, close_off
):
    said, place = [], tmp_path / "checkpoints"
    with CheckpointWriter(place, say=said.append) as writer:
        trainer.training_step(windows())
        writer.save(trainer)
        writer.wait()
        undo = close_off(place)
        for failures in (1, 2):
            trainer.training_step(windows())
            writer.save(trainer)
            writer.wait()
            assert f"saving failed ({failures} of 3): {place}" in said[-1]
        undo()
        writer.save(trainer)
    assert [step for step, _ in list_checkpoints(place)] == [1, 3]


class Stuck(LocalStorage):
    """A disk that removes nothing for as long as it is told to."""

    stuck = True

    def __init__(self, operation):
        self.operation = operation

    def rename(self, source, target):
        prunes = target.name.startswith(".tmp-")
        if self.stuck and prunes and self.operation == "rename":
            raise OSError(5, "Input/output error", str(source))
        super().rename(source, target)

    def remove(self, path):
        if self.stuck and self.operation == "remove":
            raise OSError(5, "Input/output error", str(path))
        super().remove(path)


@pytest.mark.parametrize("operation", ["rename", "remove"])
def test_a_save_that_is_durable_has_not_failed_where_an_old_one_cannot_be_removed(
    tmp_path, trainer, windows, operation
):
    said, disk = [], Stuck(operation)
    with CheckpointWriter(tmp_path, max_failures=1, say=said.append, storage=disk) as writer:
        for _ in range(4):
            trainer.training_step(windows())
            writer.save(trainer)
            writer.wait()
        assert {3, 4} <= {step for step, _ in list_checkpoints(tmp_path)}
        disk.stuck = False
        trainer.training_step(windows())
        writer.save(trainer)  # which removes what was left
    assert said == []
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]
    assert not list(tmp_path.glob(".tmp-*"))


def test_it_gives_up_after_so_many_failures_in_a_row(tmp_path, trainer, windows):
    said, disk = [], Full()
    disk.full = True
    trainer.companions = [every(1, lambda t, _: writer.save(t))]
    with CheckpointWriter(tmp_path, max_failures=4, say=said.append, storage=disk) as writer:
        with pytest.raises(OSError, match="No space left"):
            trainer.fit([windows()], num_steps=100)
        assert len(said) == 4
        assert trainer.step in {4, 5}


def test_closing_raises_the_error_of_the_last_save(tmp_path, trainer, windows):
    disk = Full()
    disk.full = True
    writer = CheckpointWriter(tmp_path, say=lambda text: None, storage=disk)
    trainer.training_step(windows())
    writer.save(trainer)
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_a_checkpoint_of_another_state_is_refused_at_the_next_step(
    tmp_path, trainer, bigram, windows
):
    trainer.training_step(windows())
    with CheckpointWriter(tmp_path) as writer:
        writer.save(trainer)
    other = Trainer(bigram(1), trainer.config, sinks=[])
    other.training_step(windows())
    with (
        pytest.raises(CheckpointError, match="holds another state of this step"),
        CheckpointWriter(tmp_path) as writer,
    ):
        writer.save(other)


def test_what_must_be_on_the_disk_first_is_there_or_nothing_is_committed(
    tmp_path, trainer, windows
):
    def fail():
        raise StorageError("the log cannot be synced")

    said = []
    trainer.training_step(windows())
    writer = CheckpointWriter(tmp_path, say=said.append, before_commit=fail)
    writer.save(trainer)
    with pytest.raises(StorageError, match="the log cannot"):
        writer.close()
    assert list_checkpoints(tmp_path) == []


def test_at_every_operation_a_failing_disk_costs_a_report_and_nothing_else(
    tmp_path, trainer, windows
):
    counted = FaultyStorage()
    trainer.training_step(windows())
    with CheckpointWriter(tmp_path / "counted", storage=counted) as writer:
        writer.save(trainer)
    for fault in ("disk full", "error after the effect", "short write"):
        for fail_at in range(len(counted.operations)):
            said, place = [], tmp_path / f"{fault}-{fail_at}"
            with CheckpointWriter(
                place, say=said.append, storage=FaultyStorage(fail_at, fault)
            ) as writer:
                writer.save(trainer)
                writer.wait()
                writer.save(trainer)  # where the first failed
            assert len(said) <= 1
            assert newest_checkpoint(place, said.append) == place / "step-1"
            assert not list(place.glob(".tmp-*"))


losses = st.lists(
    st.one_of(st.none(), st.tuples(st.sampled_from([1.0, 1.5, 2.0, 2.5]), st.sampled_from([7, 9]))),
    min_size=1,
    max_size=8,
)


@example(history=[(1.0, 7), (1.0, 9), (1.5, 7), None, None], keep_best=1)  # back to the first
@given(history=losses, keep_best=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_the_best_checkpoints_stay_and_are_never_replaced_by_worse_ones(
    tmp_path_factory, history, keep_best
):
    directory = tmp_path_factory.mktemp("best")
    for step, measured in enumerate(history, start=1):
        validation = measured and Validation(*measured)._asdict()
        content = {"validation": validation, "facts": {}}
        commit_checkpoint(
            directory, step, {"a": [b"x"]}, content, keep=2, keep_best=keep_best, storage=LOCAL
        )
        # The oracle: among all that were ever measured over the same tokens, by loss and then age.
        measured_ones = [(s, *m) for s, m in enumerate(history[:step], start=1) if m is not None]
        best = {}  # number of tokens -> steps
        for tokens in {num_tokens for _, _, num_tokens in measured_ones}:
            ranked = sorted((loss, s) for s, loss, n in measured_ones if n == tokens)
            best[tokens] = [s for _, s in ranked[:keep_best]]
        left = {s for s, _ in list_checkpoints(directory)}
        # It tells which of several groups `best` means.
        last = {measured_ones[-1][0]} if len(best) > 1 else set()
        assert left == last.union({step, max(step - 1, 1)}, *best.values())
        paths = [path for _, path in list_checkpoints(directory)]
        answer = [int(path.name[5:]) for path in best_checkpoints(paths, keep_best)]
        assert answer == (best[measured_ones[-1][2]] if measured_ones else [])


def test_losses_over_other_tokens_are_not_compared(tmp_path):
    measured = [Validation(1.0, 7), Validation(5.0, 9), None, None]
    for step, validation in enumerate(measured, start=1):
        content = {"validation": validation and validation._asdict(), "facts": {}}
        commit_checkpoint(tmp_path, step, {"a": [b"x"]}, content, keep=2, keep_best=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2, 3, 4]
    paths = [path for _, path in list_checkpoints(tmp_path)]
    assert best_checkpoints(paths, 1) == [tmp_path / "step-2"]


@pytest.mark.parametrize(
    "validation",
    [None, {}, [], "x", {"loss": 1, "num_tokens": 2}, {"loss": 1.0, "num_tokens": True}, {"a": 1}],
)
def test_a_validation_that_is_none_ranks_nothing(tmp_path, validation):
    content = {"validation": validation, "facts": {}}
    path = commit_checkpoint(tmp_path, 1, {"a": [b"x"]}, content, keep=2)
    assert validation_of(path) is None
    assert best_checkpoints([path], 1) == []
