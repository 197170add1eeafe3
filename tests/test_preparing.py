"""Preparing much text: by any number of processes, and on from where an earlier one was killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import FAULTS, Died, FaultyStorage
from test_formats import jsonl, many
from test_prepare import texts_of

from truestep.cli import main
from truestep.data import progress as progress_module
from truestep.data.bpe import BytePairs
from truestep.data.formats import CorpusError
from truestep.data.prepare import prepare
from truestep.data.progress import Progress
from truestep.data.tokenizer import ByteTokenizer
from truestep.data.tokens import open_prepared
from truestep.data.workers import WorkerError, count_workers, do_jobs
from truestep.storage import StorageError

BYTES = ByteTokenizer()
PARTS = 2000  # bytes, so that a little text has many parts


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def only(directory, *names):
    return sorted(os.listdir(directory)) == sorted(names)


@pytest.fixture
def source(tmp_path):
    """Files of text and of documents, of unequal sizes; one is no text, one is empty."""
    place = tmp_path / "source"
    place.mkdir()
    for i in range(12):
        (place / f"{i:02}.txt").write_text(f"text {i} of <|endoftext|>\n" * (10 + 25 * (i % 4)))
    for i in range(4):
        lines = many(40)[10 * i : 10 * i + 10 + i]
        (place / f"{i}.jsonl").write_text(jsonl(lines))
    (place / "bad.txt").write_bytes(b"\xff")
    (place / "empty.txt").touch()
    return str(place / "*")


@pytest.mark.parametrize("tokenizer", [BYTES, BytePairs(300)], ids=["bytes", "pairs"])
def test_any_number_of_workers_and_parts_of_any_size_write_the_same(tmp_path, source, tokenizer):
    def run(name, **options):
        data = prepare(source, tmp_path / name, tokenizer=tokenizer, shard_tokens=900, **options)
        return contents(data.directory), data

    one, data = run("one", part_bytes=PARTS)
    assert len(data.manifest["train"]["shards"]) >= 8
    for workers in (2, 3) if tokenizer is BYTES else (2,):
        assert run(f"w{workers}", part_bytes=PARTS, workers=workers)[0] == one
        shutil.rmtree(tmp_path / f"w{workers}")
    whole = run("whole")[1]
    assert whole.fingerprint == data.fingerprint
    for split in ("train", "validation"):  # shards end where parts do; ids and names are the same
        ours, theirs = getattr(data, split), getattr(whole, split)
        assert ours.read(0, len(ours)).tolist() == theirs.read(0, len(theirs)).tolist()
        for position in range(0, len(ours), 97):
            assert ours.document_at(position) == theirs.document_at(position)
    assert only(tmp_path, "source", "one", "whole")


def test_a_validation_of_its_own_is_hashed_and_written_by_the_workers_too(tmp_path, source):
    validation = f"{Path(source).parent}/3.jsonl"
    options = {"tokenizer": BYTES, "validation": validation, "part_bytes": PARTS}
    one, two = (prepare(source, tmp_path / str(n), workers=n, **options) for n in (1, 2))
    assert contents(one.directory) == contents(two.directory)
    assert texts_of(one.validation) == many(40)[30:43]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_operation_is_made_up_for_by_the_same_call(tmp_path, fault):
    place, target = tmp_path / "source", tmp_path / "out" / "data"
    place.mkdir()
    for i in range(3):
        (place / f"{i}.txt").write_text(f"text {i}\n" * 40)
    options = {"tokenizer": BYTES, "part_bytes": 300, "shard_tokens": 250}
    whole = FaultyStorage()
    prepare(str(place), target, storage=whole, **options)
    expected = contents(target)
    assert only(target.parent, "data")
    for fail_at in range(0, len(whole.operations), 1 if fault == "death" else 3):
        for path in target.parent.iterdir():
            shutil.rmtree(path)
        storage = FaultyStorage(fail_at, fault)
        try:
            prepare(str(place), target, storage=storage, **options)
        except (OSError, Died):
            if fault == "power loss":
                storage.lose_power()
        if not target.exists():
            prepare(str(place), target, **options)
        assert contents(target) == expected
        assert all(name == "data" or name.startswith(".tmp-") for name in os.listdir(target.parent))


def test_what_was_done_is_not_done_again(tmp_path, source):
    target = tmp_path / "out"
    first = FaultyStorage()
    prepare(source, target, tokenizer=BYTES, part_bytes=PARTS, storage=first)
    creates = first.operations.count("create")
    expected = contents(target)
    shutil.rmtree(target)
    stop = len(first.operations) * 2 // 3
    with pytest.raises(Died):
        prepare(
            source, target, tokenizer=BYTES, part_bytes=PARTS, storage=FaultyStorage(stop, "death")
        )
    second, said = FaultyStorage(), []
    prepare(source, target, tokenizer=BYTES, part_bytes=PARTS, storage=second, say=said.append)
    assert contents(target) == expected
    assert second.operations.count("create") < creates / 2
    assert any(line.startswith("going on with what lies in") for line in said)


def test_other_text_or_settings_begin_anew(tmp_path, source):
    target, said = tmp_path / "out", []
    options = {"part_bytes": PARTS, "say": said.append}
    with pytest.raises(Died):
        prepare(source, target, tokenizer=BYTES, storage=FaultyStorage(150, "death"), **options)
    with pytest.raises(Died):
        prepare(
            source, target, tokenizer=BytePairs(300), storage=FaultyStorage(9, "death"), **options
        )
    assert "beginning anew: text or settings are not those" in "\n".join(said)
    edited = Path(source).parent / "00.txt"
    edited.write_text(edited.read_text() + "one more line\n")
    del said[:]
    data = prepare(source, target, tokenizer=BytePairs(300), **options)
    assert "beginning anew" in "\n".join(said)
    text = "".join(texts_of_ids(data))
    assert "one more line" in text


def texts_of_ids(data):
    for split in (data.train, data.validation):
        yield data.tokenizer.decode(split.read(0, len(split)))


COMMAND = """
import sys
from pathlib import Path
from truestep.data.prepare import prepare
from truestep.data.tokenizer import ByteTokenizer

if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]), tokenizer=ByteTokenizer(), part_bytes=2000,
            workers=int(sys.argv[3]), say=lambda line: print(line, flush=True))
"""


@pytest.fixture
def much(tmp_path):
    place = tmp_path / "much"
    place.mkdir()
    for i in range(16):
        lines = [f"document {i} {j}, with some words\n" * (1 + j % 9) for j in range(100)]
        (place / f"{i:02}.jsonl").write_text(jsonl(lines))
    return str(place)


def parts_in(place):
    try:
        names = os.listdir(place)
    except FileNotFoundError:  # not yet, or not any more
        names = []
    return sum(not name.startswith(".") and "-" in name for name in names)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_killed_again_and_again_ends_as_one_that_was_not(tmp_path, much, workers):
    script = tmp_path / "script.py"
    script.write_text(COMMAND)
    whole, target, begun = (tmp_path / name for name in ("whole", "target", ".tmp-target-begun"))
    command = [sys.executable, str(script), much]
    subprocess.run([*command, str(whole), str(workers)], check=True, stdout=subprocess.DEVNULL)
    done, kills = [0], 0
    while not target.exists():
        with subprocess.Popen(
            [*command, str(target), str(workers)], stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                if parts_in(begun) >= done[-1] + 12:
                    process.kill()
            kills += process.returncode == -signal.SIGKILL
            assert process.returncode in {0, -signal.SIGKILL}
        done.append(parts_in(begun))
    assert contents(target) == contents(whole)
    assert kills >= 2
    assert done[:-1] == sorted(done[:-1])  # nothing that was done is lost
    left = {"much", "script.py", "target", "whole", begun.name if begun.exists() else "much"}
    assert only(tmp_path, *left)  # the last kill may come when there is nothing left to lose


def test_a_second_process_is_refused_while_the_first_one_prepares(tmp_path, much):
    target = tmp_path / "target"

    def during(line):
        if line.startswith("validation"):
            with pytest.raises(StorageError, match="another process is preparing it; wait for it"):
                prepare(much, target, tokenizer=BYTES, part_bytes=PARTS)

    prepare(much, target, tokenizer=BYTES, part_bytes=PARTS, say=during)
    assert open_prepared(target).train.num_documents > 500


# Jobs in processes of their own.


def square(job, report):
    report(job)
    if job == 13:
        raise CorpusError("thirteen")
    if job == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_job_is_done_once_and_told_of(workers):
    told = []
    found = dict(do_jobs(range(10), square, workers, told.append))
    assert found == {job: job * job for job in range(10)}
    assert sum(told) == sum(range(10))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_job_is_raised_here(workers):
    with pytest.raises(CorpusError, match="thirteen"):
        list(do_jobs([1, 13, 2], square, workers, lambda _: None))


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(WorkerError, match=r"ended from outside \(exit code -9\).*fewer workers"):
        list(do_jobs([1, 17, 2], square, 2, lambda _: None))


ORPHANS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from test_preparing import linger
from truestep.data.workers import do_jobs

if __name__ == "__main__":
    list(do_jobs([1, 2], linger, 2, lambda number: print(number, flush=True)))
"""


def linger(job, report):
    report(2**23 + os.getpid())
    time.sleep(100)


def test_workers_end_with_the_process_they_work_for_in_the_middle_of_a_job(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(process.stdout.readline()) - 2**23 for _ in range(2)]
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        process.kill()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_workers_than_one_are_refused(tmp_path, workers, capsys, source):
    with pytest.raises(ValueError, match=rf"workers={workers} must be at least 1, or auto"):
        count_workers(workers)
    command = ["prepare", source, "--out", str(tmp_path / "out"), "--workers", str(workers)]
    assert main(command) == 2
    assert f"workers={workers} must be at least 1" in capsys.readouterr().err
    assert count_workers("auto") == len(os.sched_getaffinity(0))


def test_progress_tells_rate_and_time_left_of_what_is_done_here(monkeypatch):
    clock, said = [100.0], []
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = Progress("tokenizing", 100_000_000, said.append, before=40_000_000)
    progress.add(5_000_000)
    assert said == []
    clock[0] = 110.0
    progress.add(15_000_000)
    clock[0] = 120.0
    assert said == ["tokenizing: 60 of 100 MB, 2.0 MB/s, 0:20 left"]
    assert progress.summary() == "tokenizing: 20 MB in 0:20, 1.0 MB/s"
