import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from faults import FAULTS, Died, FaultyStorage
from sealing import record_of, sealed

from truestep.manifest import MANIFEST, DirectoryWriter, read_manifest
from truestep.storage import (
    LOCAL,
    TEMPORARY_PREFIX,
    FileRecord,
    StorageError,
    read_file,
    remove_unfinished,
    replace_file,
    verify_file,
    write_file,
)

CONTENT = b"old or new, never neither"
RECORD = record_of(CONTENT)


def fail_everywhere(operation, make_place):
    """Run `operation(storage, place)` with every fault at every I/O operation; yield what is left.

    Yields (place, whether it returned) with a fresh place each time.
    """
    counted = FaultyStorage()
    operation(counted, make_place())
    assert len(counted.operations) > 4
    for fault in FAULTS:
        for fail_at in range(len(counted.operations)):
            storage, place = FaultyStorage(fail_at, fault), make_place()
            returned = False
            try:
                operation(storage, place)
                returned = True
            except (OSError, Died):
                pass
            if fault == "power loss":
                storage.lose_power()
            yield place, returned


@pytest.fixture
def make_place(tmp_path):
    """Build empty directories."""
    counter = iter(range(10**6))

    def make():
        place = tmp_path / f"place-{next(counter)}"
        place.mkdir()
        return place

    return make


@pytest.mark.parametrize("largest_write", [1, 7, 2**30])
def test_every_byte_arrives_however_few_the_disk_takes_at_a_time(tmp_path, largest_write):
    chunks = [b"", CONTENT[:3], bytearray(CONTENT[3:9]), memoryview(CONTENT)[9:]]
    storage = FaultyStorage(largest_write=largest_write)
    assert write_file(storage, tmp_path / "file", chunks) == RECORD
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert read_file(tmp_path / "file", RECORD) == CONTENT
    verify_file(tmp_path / "file", RECORD)


def test_a_disk_that_takes_nothing_is_an_error_and_not_a_hang(tmp_path):
    storage = FaultyStorage(largest_write=0)
    with pytest.raises(StorageError, match="took none of 25 bytes"):
        write_file(storage, tmp_path / "file", [CONTENT])


def test_an_existing_file_is_never_written_into(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_file(LOCAL, tmp_path / "file", [CONTENT])
    assert (tmp_path / "file").read_bytes() == b"precious"


def write_directory(storage, place):
    with DirectoryWriter(place / "target", storage) as writer:
        writer.write("a", [CONTENT])
        writer.write("b", [CONTENT, CONTENT])
        writer.commit({"name": "value"})


def test_a_directory_appears_whole_or_not_at_all_whatever_fails(make_place):
    outcomes = set()
    for place, returned in fail_everywhere(write_directory, make_place):
        there = (place / "target").exists()
        outcomes.add((there, returned))
        assert there or not returned
        if there:
            manifest, files = read_manifest(place / "target")
            assert manifest["name"] == "value"
            assert read_file(place / "target" / "a", files["a"]) == CONTENT
            assert read_file(place / "target" / "b", files["b"]) == CONTENT * 2
    assert {(True, False), (False, False)} <= outcomes


def test_what_was_committed_survives_a_power_loss(make_place):
    storage, place = FaultyStorage(), make_place()
    write_directory(storage, place)
    (place / "file").write_bytes(b"old")
    replace_file(storage, place / "file", CONTENT)
    storage.lose_power()
    assert sorted(os.listdir(place / "target")) == ["a", "b", MANIFEST]
    assert read_file(place / "target" / "a", RECORD) == CONTENT
    assert read_file(place / "file", RECORD) == CONTENT


def test_a_failed_directory_leaves_nothing_behind(make_place):
    storage, place = FaultyStorage(7, "disk full"), make_place()
    with pytest.raises(OSError, match="injected"):
        write_directory(storage, place)
    assert os.listdir(place) == []


def test_what_a_signal_removes_cannot_be_committed_meanwhile(tmp_path, monkeypatch):
    """By the thread of a save: its directory would appear under its name without its files."""
    remove = shutil.rmtree
    with DirectoryWriter(tmp_path / "target") as writer:
        writer.write("a", [CONTENT])

        def remove_while_it_is_committed(path):
            with pytest.raises(FileNotFoundError):
                writer.commit({})
            remove(path)

        monkeypatch.setattr(shutil, "rmtree", remove_while_it_is_committed)
        remove_unfinished()
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_replaced(make_place):
    place = make_place()
    write_directory(LOCAL, place)
    (place / "target" / "a").write_bytes(b"precious")
    with pytest.raises(OSError, match="not empty"):
        write_directory(LOCAL, place)
    assert (place / "target" / "a").read_bytes() == b"precious"
    assert os.listdir(place) == ["target"]


def test_a_replaced_file_is_the_old_or_the_new_whatever_fails(make_place):
    def make():
        place = make_place()
        (place / "file").write_bytes(b"old")
        return place

    def replace(storage, place):
        replace_file(storage, place / "file", CONTENT)

    seen = set()
    for place, returned in fail_everywhere(replace, make):
        found = (place / "file").read_bytes()
        assert found in {b"old", CONTENT}
        assert found == CONTENT or not returned
        seen.add(found)
    assert seen == {b"old", CONTENT}


@pytest.mark.parametrize("check", [read_file, verify_file])
def test_a_file_that_is_not_what_its_record_says_is_named(tmp_path, check):
    path = tmp_path / "file"

    def refused(content, message):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        with pytest.raises(StorageError, match=message) as caught:
            check(path, RECORD)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    for length in range(len(CONTENT)):
        refused(CONTENT[:length], f"expected 25 bytes, found {length}")
    refused(CONTENT + b"x", "expected 25 bytes, found 26")
    for bit in range(8 * len(CONTENT)):
        flipped = bytearray(CONTENT)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(flipped, "bytes 0 to 24 are not those that were written")


@pytest.mark.parametrize("check", [read_file, verify_file])
def test_damage_is_named_by_the_first_block_that_holds_it(tmp_path, check):
    block = 2**20
    content = bytearray(random.Random(0).randbytes(2 * block + 5))
    record = write_file(LOCAL, tmp_path / "file", [content[:3], b"", content[3:]])
    assert record == record_of(content)
    for position, where in [
        (0, "bytes 0 to 1048575 "),
        (block - 1, "bytes 0 to 1048575 "),
        (block, "bytes 1048576 to 2097151 "),
        (2 * block + 4, "bytes 2097152 to 2097156 "),
    ]:
        damaged = bytearray(content)
        damaged[position] ^= 1
        damaged[-1] ^= 2  # a later one is not named
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(StorageError, match=f"damaged: {where}are not those that were written"):
            check(tmp_path / "damaged", record)


@pytest.mark.parametrize("sizes", [[0], [1], [2**20], [2**20 + 1], [2**20 - 1, 2, 2**20], [1] * 9])
def test_the_record_does_not_depend_on_how_the_bytes_arrive(tmp_path, sizes):
    chunks = [random.Random(size).randbytes(size) for size in sizes]
    assert write_file(LOCAL, tmp_path / "file", chunks) == record_of(b"".join(chunks))


@pytest.mark.parametrize("check", [read_file, verify_file])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, check):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("fifo", "not a regular file"),
        ("directory", "cannot be read: Is a directory"),
        ("loop", "cannot be read: Too many"),
        ("absent", "missing"),
        ("fifo/below", "missing"),
    ]:
        with pytest.raises(StorageError, match=message):
            check(tmp_path / name, RECORD)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file of Linux that gives EIO")
def test_a_bad_sector_is_said_to_be_in_the_file():
    with pytest.raises(StorageError, match="/proc/self/mem: cannot be read: Input/output error"):
        verify_file(Path("/proc/self/mem"), FileRecord(0, RECORD.sha256, ()))


def test_a_read_is_bounded(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert read_file(tmp_path / "file", limit=25) == CONTENT
    with pytest.raises(StorageError, match="25 bytes is more than the 24"):
        read_file(tmp_path / "file", limit=24)


GOOD = {"size": 1, "sha256": "0" * 64, "blocks": [0]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        "null",
        "\x80",
        sealed({"files": []}),
        sealed({"files": {"a": 1}}),
        sealed({"files": {"a": {"size": 1}}}),
        '{"files": {"a": {"size": Infinity, "sha256": "", "blocks": []}}, "content_sha256": ""}',
        '{"files": {"a": {"size": 1e999, "sha256": "", "blocks": []}}, "content_sha256": ""}',
        json.dumps({"files": {"a": GOOD}}),
        json.dumps({"files": {"a": GOOD}, "content_sha256": "0" * 64}),
        "[" * 10**5,
        '{"files":' * 10**5,
        *(
            sealed({"files": {"a": {**GOOD, **wrong}}})
            for wrong in [
                {"size": -1},
                {"size": 1.0},
                {"size": True},
                {"size": "1"},
                {"sha256": "0" * 63},
                {"sha256": "G" * 64},
                {"sha256": 0},
                {"blocks": []},
                {"blocks": [0, 0]},
                {"blocks": ["0"]},
                {"blocks": 0},
            ]
        ),
        *(
            sealed({"files": {name: GOOD}})
            for name in [
                "../a",
                "/a",
                "a/b",
                "..",
                ".",
                "",
                "a\0b",
                "a\nb",
                "\ud800",
                "a/",
                "a\u202eb",
            ]
        ),
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(StorageError) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / MANIFEST) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_new_directory_is_on_the_medium_with_all_its_parents(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(type(LOCAL), "sync_directory", lambda _, path: synced.append(path))
    LOCAL.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]
    LOCAL.make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_unfinished_files_have_a_name_that_readers_skip(make_place):
    storage, place = FaultyStorage(4, "death"), make_place()
    with pytest.raises(Died):
        write_directory(storage, place)
    assert all(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(place))
    assert os.listdir(place) != []
