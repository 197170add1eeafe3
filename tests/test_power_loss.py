"""Whatever a disk makes of what was not synced: the old or the new, whole, never neither.

The first half shows that the model can fail: it finds what is wrong with protocols that are.
"""

import json
import random

import pytest
from crashes import Disk, Journal, Operation
from power_loss import SCENARIOS, advance, files_of, new_run, prepared_data, replaced_file, saves

from truestep import save_checkpoint
from truestep.manifest import MANIFEST
from truestep.storage import TEMPORARY_PREFIX

LIMIT = 16  # states after each operation
FEW = 3  # nothing that was not synced, all of it, and one drawn: they find what is wrong


class WithoutFileSync(Journal):
    def sync(self, descriptor):
        pass


class WithoutParentSync(Journal):
    """Syncs what is inside the directory that is written, and not the one that it appears in."""

    def sync_directory(self, path):
        if path.name.startswith(TEMPORARY_PREFIX):
            super().sync_directory(path)


class WithoutInnerSync(Journal):
    def sync_directory(self, path):
        if not path.name.startswith(TEMPORARY_PREFIX):
            super().sync_directory(path)


class SyncedTooLate(Journal):
    """Renames first and syncs the files afterwards."""

    def __init__(self, root):
        super().__init__(root)
        self._open = []

    def sync(self, descriptor):
        self._open.append(descriptor)

    def close(self, descriptor):
        pass

    def rename(self, source, target):
        super().rename(source, target)
        while self._open:
            super().sync(self._open[0])
            super().close(self._open.pop(0))


class PruneWithoutSync(Journal):
    """Does not make sure that a name is gone before what it names is removed."""

    _pruning = False

    def rename(self, source, target):
        self._pruning = target.name.startswith(TEMPORARY_PREFIX)
        super().rename(source, target)

    def sync_directory(self, path):
        if not self._pruning:
            super().sync_directory(path)


def save_in_place_with_the_manifest_first(journal, directory):
    run, history = new_run(), {}
    scratch = directory.parent.parent / "scratch"  # where each state is saved to be copied
    for step in range(1, 4):
        advance(run)
        path = save_checkpoint(run, scratch)
        history[step] = files_of(path)
        files = {MANIFEST: (path / MANIFEST).read_bytes(), **history[step]}
        journal.mark(("started", step))
        write_in_place(journal, directory / f"step-{step}", files)
        journal.mark(("committed", step))
    return history


def write_in_place(journal, target, files):
    journal.make_directory(target)
    for name, content in files.items():
        descriptor = journal.create(target / name)
        journal.write(descriptor, memoryview(content))
        journal.sync(descriptor)
        journal.close(descriptor)
    journal.sync_directory(target)


@pytest.mark.parametrize(
    ("journal", "found"),
    [
        (WithoutFileSync, {"neither the old nor the new is left"}),
        (WithoutParentSync, {"neither the old nor the new is left", "a commit is lost"}),
        (WithoutInnerSync, {"neither the old nor the new is left", "a commit is lost"}),
        (SyncedTooLate, {"a damaged checkpoint is listed"}),
        (PruneWithoutSync, {"a damaged checkpoint is listed"}),
    ],
)
def test_the_model_finds_what_is_wrong_with_a_careless_save(journal, found):
    problems = saves(journal, limit=FEW).problems.keys()
    assert found <= problems
    assert "a checkpoint was set aside silently" not in problems


def test_the_model_finds_what_is_wrong_with_a_manifest_that_is_written_first():
    problems = saves(save=save_in_place_with_the_manifest_first, limit=FEW).problems
    assert problems.keys() == {"a damaged checkpoint is listed"}


@pytest.mark.parametrize(
    ("journal", "found"),
    [
        (WithoutFileSync, "neither the old nor the new is left"),
        (WithoutParentSync, "the new content is lost"),
        (SyncedTooLate, "neither the old nor the new is left"),
    ],
)
def test_the_model_finds_what_is_wrong_with_a_careless_replacement(journal, found):
    assert found in replaced_file(journal, limit=LIMIT).problems


@pytest.mark.parametrize(
    ("journal", "found"),
    [
        (WithoutFileSync, "half of the data is visible"),
        (WithoutParentSync, "what was prepared is lost"),
        (WithoutInnerSync, "half of the data is visible"),
        (SyncedTooLate, "half of the data is visible"),
    ],
)
def test_the_model_finds_what_is_wrong_with_careless_preparing(journal, found):
    assert (
        found
        in prepared_data(journal, limit=FEW if journal is not SyncedTooLate else LIMIT).problems
    )


def states(before, *operations):
    """Every state after these operations, as text."""
    disk = Disk(before)
    for operation in operations:
        disk.do(operation)
    return {json.dumps(tree, default=bytes.decode) for tree in disk.states(10**6, random.Random(0))}


def test_the_model_says_what_posix_allows():
    create, sync = Operation("create", "a", file=0), Operation("sync", file=0)
    write = Operation("write", value=b"x", file=0)
    assert states({}, create) == {"{}", '{"a": ""}'}
    synced = states({}, create, write, sync)
    assert synced == {"{}", '{"a": "x"}'}  # the file is synced, its name is not
    named = states({}, create, Operation("sync_directory", ""), write)
    assert {"{}"} & named == set()
    assert {'{"a": ""}', '{"a": "x"}', '{"a": "\\u0000"}'} <= named
    moved = states({"d": None, "d/a": b"x", "e": b"y"}, Operation("rename", "d", "f"))
    assert moved == {'{"d": null, "d/a": "x", "e": "y"}', '{"e": "y", "f": null, "f/a": "x"}'}
    replaced = states({"a": b"x", "b": b"y"}, Operation("rename", "a", "b"))
    assert replaced == {'{"a": "x", "b": "y"}', '{"b": "x"}'}


def test_the_model_keeps_no_order_between_what_was_not_synced():
    # Made and moved: the move may be there without the making, and the second without the first.
    first, second = Operation("create", "a", file=0), Operation("create", "b", file=1)
    both = states({}, first, second, Operation("rename", "a", "c"))
    names = {frozenset(json.loads(state)) for state in both}
    assert names == {frozenset(n) for n in ["", "a", "b", "c", "ab", "bc"]}
    emptied = states({"d": None, "d/a": b"x"}, Operation("remove", "d/a"), Operation("remove", "d"))
    assert emptied == {"{}", '{"d": null}', '{"d": null, "d/a": "x"}'}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_after_a_power_loss_at_any_moment_it_is_the_old_or_the_new(scenario):
    outcome = SCENARIOS[scenario](limit=LIMIT)
    assert outcome.problems == {}
    assert outcome.states > 20
