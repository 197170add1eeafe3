"""The log is the truth: bit for bit, cut back on resume, whole after a kill or a full disk."""

import ast
import io
import json
import math
import resource
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import training

import truestep.observe
from truestep.observe.log import read_metrics, read_records
from truestep.observe.sinks import ConsoleSink, JsonlSink
from truestep.storage import LocalStorage, StorageError


def validation(step, loss=2.25):
    return {"step": step, "validation_loss": loss, "validation_bits_per_byte": loss / math.log(2)}


def write(path, records, **options):
    sink = JsonlSink(path, **options)
    for record in records:
        sink.write(record)
    sink.close()


def bits(value):
    return struct.pack("<d", value)


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_every_float_comes_back_bit_for_bit(tmp_path_factory, losses):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, [training(step, loss) for step, loss in enumerate(losses, 1)], from_step=0)
    read = read_metrics(path).training["loss"]
    for written, found in zip(losses, read, strict=True):
        assert bits(found) == bits(written) or (math.isnan(written) and math.isnan(found))


def test_a_log_is_strict_json_with_non_finite_floats_as_strings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [training(1, math.nan, grad_norm=math.inf), training(2, -math.inf)])

    def refuse(constant):
        raise AssertionError(constant)

    first, second = (
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    )
    assert (first["loss"], first["grad_norm"], second["loss"]) == ("nan", "inf", "-inf")


def test_columns_hold_what_was_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [training(1), validation(1), training(2, 2.0, skipped=True, num_tokens=2**40)]
    write(path, records)
    columns, checks = read_metrics(path)
    assert columns["step"].tolist() == [1, 2]
    assert columns["skipped"].tolist() == [False, True]
    assert columns["num_tokens"].tolist() == [1000, 2**40]
    assert checks["validation_loss"].tolist() == [2.25]
    assert checks["validation_bits_per_byte"].tolist() == [records[1]["validation_bits_per_byte"]]


def test_a_resume_at_any_step_leaves_exactly_the_records_up_to_it(tmp_path):
    records = [r for step in range(1, 9) for r in (training(step, 1 / step), validation(step))]
    whole = tmp_path / "whole.jsonl"
    write(whole, records)
    lines = whole.read_bytes().splitlines(keepends=True)
    for step in range(10):
        path = tmp_path / f"{step}.jsonl"
        path.write_bytes(whole.read_bytes())
        JsonlSink(path, from_step=step).close()
        expected = [line for line, r in zip(lines, records, strict=True) if r["step"] <= step]
        assert path.read_bytes() == b"".join(expected)
        write(path, [r for r in records if r["step"] > step], from_step=step)
        assert path.read_bytes() == whole.read_bytes()


def test_a_kill_within_a_line_loses_that_line_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [training(1), training(2)])
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for size in range(first, len(data)):
        path.write_bytes(data[:size])
        assert read_metrics(path).training["step"].tolist() == [1]
        JsonlSink(path, from_step=5).close()
        assert path.read_bytes() == data[:first]


@pytest.mark.parametrize(
    "garbage", [b"\0" * 40 + b"\n", b'{"step": 4, "lo\n{"step": 5}\n', b"\xff\n"]
)
def test_garbage_behind_the_steps_of_a_checkpoint_goes_as_a_power_loss_leaves_it(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    write(path, [training(step) for step in range(1, 4)])
    whole = path.read_bytes()
    path.write_bytes(whole + garbage)
    with pytest.raises(ValueError, match="line 4"):  # step 4 was vouched for, and is not there
        JsonlSink(path, from_step=4)
    assert path.read_bytes() == whole + garbage
    JsonlSink(path, from_step=3).close()
    assert path.read_bytes() == whole
    path.write_bytes(garbage)  # no checkpoint says that this is a log at all
    with pytest.raises(ValueError, match="line 1"):
        JsonlSink(path)
    assert path.read_bytes() == garbage


def test_each_record_is_on_disk_before_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(1, 4):
        sink.write(training(step))
        assert read_metrics(path).training["step"].tolist() == [*range(1, step + 1)]
    sink.close()


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": "1"}', '{"loss": 1}', "\xff", "[" * 9999])
def test_a_corrupt_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(training(1))
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    for read in (read_metrics, JsonlSink):
        with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: [^\n]*$"):
            read(path)


@pytest.mark.parametrize("value", ["high", None, [1], 2**70])
def test_a_value_that_is_no_number_is_named_by_its_line(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(training(1, num_tokens=value)) + "\n")
    with pytest.raises(ValueError, match=r"line 1: num_tokens is not a number; [^\n]+$"):
        read_metrics(path)


def test_a_missing_or_empty_log_has_empty_columns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        columns, checks = read_metrics(path)
        assert {len(column) for column in (columns | checks).values()} == {0}
        assert columns["loss"].dtype == np.float64
        path.touch()


def test_a_failing_disk_is_one_line_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [training(1)])
    whole = path.read_bytes()
    sink = JsonlSink(path, from_step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))  # room for half a line
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written: [^\n]+$"):
            sink.write(training(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    sink.write(training(3))  # the disk has room again
    sink.close()
    assert read_metrics(path).training["step"].tolist() == [1, 3]


def test_with_a_listener_records_wait_in_memory_until_the_disk_takes_them(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    sink = JsonlSink(path, say=said.append)
    sink.write(training(1))
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
        for step in (2, 3, 4):
            sink.write(training(step))
            assert path.read_bytes() == whole
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written"):
            sink.sync()  # whoever must know that it is all there is told that it is not
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (told,) = said
    assert told.endswith("its records wait in memory")
    sink.sync()
    assert read_metrics(path).training["step"].tolist() == [1, 2, 3, 4]
    sink.write(training(5))
    sink.close()
    sink.close()
    assert read_metrics(path).training["step"].tolist() == [1, 2, 3, 4, 5]


def test_what_the_disk_never_took_is_an_error_at_the_end(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", say=lambda text: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        sink.write(training(1))
        with pytest.raises(StorageError, match="cannot be written"):
            sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_cut_back_leaves_the_old_log(tmp_path):
    class FullDisk(LocalStorage):
        def write(self, descriptor, data):
            raise OSError(28, "No space left on device")

    path = tmp_path / "metrics.jsonl"
    write(path, [training(step) for step in range(1, 5)])
    whole = path.read_bytes()
    with pytest.raises(StorageError, match=r"No space left on device$"):
        JsonlSink(path, from_step=2, storage=FullDisk())
    assert path.read_bytes() == whole
    assert [*tmp_path.iterdir()] == [path]


def test_samples_survive_with_any_characters(tmp_path):
    path = tmp_path / "samples.jsonl"
    text = "".join(map(chr, range(256))) + "\u202e\ud800\u2028😀"
    write(path, [{"step": 1, "prompt": "\x1b[2J", "text": text}])
    assert path.read_bytes().isascii()
    ((_, record),) = read_records(path)
    assert (record["prompt"], record["text"]) == ("\x1b[2J", text)


def test_the_console_says_loss_and_speed():
    stream = io.StringIO()
    record = training(10, 3.14159, grad_norm=0.521, tokens_per_second=12345.4)
    ConsoleSink(stream=stream).write(record)
    expected = "step 10  loss 3.1416  grad norm 0.52  lr 3.0e-04  12,345 tokens/s\n"
    assert stream.getvalue() == expected


def test_the_console_never_hides_a_validation_or_a_skipped_update():
    stream = io.StringIO()
    sink = ConsoleSink(every=10, stream=stream)
    for step in range(1, 21):
        sink.write(training(step, math.nan if step == 7 else 2.0, skipped=step == 7))
    sink.write(validation(20))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "7", "10", "20", "20"]
    assert "loss nan" in lines[1]
    assert lines[1].endswith("update skipped")
    assert "validation loss 2.2500  3.2461 bits per byte" in lines[-1]


def test_a_lenient_log_drops_what_cannot_be_read_and_goes_on(tmp_path):
    path = tmp_path / "samples.jsonl"
    good = b'{"step": 250}\n'
    path.write_bytes(good + bytes(30) + b'\n{"step": 300}\n')
    with pytest.raises(ValueError, match="line 2"):
        JsonlSink(path, from_step=400)
    sink = JsonlSink(path, from_step=400, lenient=True)
    sink.write({"step": 500})
    sink.close()
    assert path.read_bytes() == good + b'{"step": 500}\n'


def test_a_record_is_written_while_the_log_is_being_synced(tmp_path, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def slow(descriptor):
        reached.set()
        assert go_on.wait(30)

    monkeypatch.setattr("truestep.observe.sinks.os.fsync", slow)
    sink = JsonlSink(tmp_path / "log.jsonl")
    saver = threading.Thread(target=sink.sync)
    saver.start()
    assert reached.wait(30)
    sink.write({"step": 1})  # would wait for ever under the lock
    go_on.set()
    saver.join(30)
    sink.close()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "with its directory"])
def test_a_log_that_is_gone_from_its_place_cannot_be_synced(tmp_path, how):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    sink = JsonlSink(path)
    sink.write({"step": 1, "loss": 2.0})
    sink.sync()
    if how == "with its directory":
        shutil.rmtree(path.parent)
    else:
        path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        path.write_text("another")
    message = "another file was put in its place" if how == "replaced" else "No such file"
    with pytest.raises(StorageError, match=message):
        sink.sync()
    sink.close()


def test_observing_never_imports_torch_or_anything_of_a_trainer():
    folder = Path(truestep.observe.__file__).parent
    allowed = tuple(
        f"truestep.{name}"
        for name in ("observe", "metrics", "settings", "setting_sources", "shell", "storage")
    )
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            elif not isinstance(node, ast.Import):
                continue
            for name in names:
                assert name.split(".")[0] != "torch", path
                assert not name.startswith("matplotlib.pyplot"), path
                assert not name.startswith("truestep") or name.startswith(allowed), path
