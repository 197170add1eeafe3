"""`truestep verify`: every stored byte is looked at, and nothing is changed."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from sealing import reseal
from test_cli import train, workplace  # noqa: F401 the fixture is used by its name
from test_replay import tree

from truestep import Trainer, load_checkpoint, save_checkpoint
from truestep.checkpoint.tensors import safetensors_chunks
from truestep.cli import main


def verified(capsys, *arguments):
    capsys.readouterr()
    code = main(["verify", *map(str, arguments)])
    out = capsys.readouterr()
    assert code in {0, 1}, out.err
    return code, out.out


@pytest.fixture
def run():
    assert train("--run.keep-best-checkpoints", "0") == 0
    return Path("runs/text-1")


def test_an_intact_run_checkpoint_and_data_verify_and_are_left_alone(capsys, run):
    before = tree("runs")
    (data,) = Path("runs/.data").iterdir()
    for arguments in ([], [run], [run / "checkpoints/step-8"], [data]):
        code, out = verified(capsys, *arguments)
        assert code == 0, out
        assert "BAD" not in out
        assert "everything is as it was written" in out.splitlines()[-1]
    assert tree("runs") == before
    code, out = verified(capsys)
    for name in ("step-8", "step-12", "train-00000.bin", "metrics.jsonl: steps 1 to 12"):
        assert f"ok   {name}" in out or f"/{name}" in out or name in out


def test_one_changed_byte_anywhere_is_found_and_its_file_named(capsys, run):
    chosen = random.Random(0)
    vouched = [
        *run.glob("checkpoints/step-*/*"),
        *[path for path in Path("runs/.data").glob("*/*") if path.is_file()],
    ]
    assert len(vouched) == 11
    for path in vouched:
        good = path.read_bytes()
        position = chosen.randrange(len(good))
        while chr(good[position]) in " \n":  # white space of a manifest says nothing
            position = chosen.randrange(len(good))
        damaged = bytearray(good)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        code, out = verified(capsys, run)
        assert code == 1, f"{path} at {position}"
        bad = [line for line in out.splitlines() if line.startswith("BAD")]
        assert bad
        assert all(path.name in line or path.parent.name in line for line in bad), out
        if path.suffix in {".safetensors", ".bin"}:
            assert re.search(rf"{path.name}: bytes 0 to {len(good) - 1} are not", bad[0]), bad
        path.write_bytes(good)
    assert verified(capsys, run)[0] == 0


def test_one_damaged_data_file_is_one_damage_and_its_path_is_said_once(capsys, run):
    (data,) = Path("runs/.data").iterdir()
    shard = data / "train-00000.bin"
    size = shard.stat().st_size
    os.truncate(shard, size - 9)
    for path, place in ((run, f"{data}: "), (data, "")):
        code, out = verified(capsys, path)
        assert code == 1
        lines = out.splitlines()
        bad = f"BAD  {place}train-00000.bin: expected {size} bytes, found {size - 9}"
        assert [line for line in lines if line.startswith("BAD")] == [bad]
        skipped = "tokens: not read, because train-00000.bin is damaged"
        assert f"--   {place}train {skipped}" in lines
        assert f"--   {place}validation {skipped}" in lines
        assert lines[-1] == f"{path}: 1 damaged"
    (data / "manifest.json").write_text("{}")
    bad = [line for line in verified(capsys, run)[1].splitlines() if line.startswith("BAD")]
    assert len(bad) == 1
    assert bad[0].startswith(f"BAD  {data}: manifest.json: not a manifest")


def test_one_of_a_kind_is_counted_as_one(capsys, run):
    (data,) = Path("runs/.data").iterdir()
    sample = (run / "samples.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "samples.jsonl").write_text(sample)
    out = verified(capsys, run)[1].splitlines()
    assert "ok   samples.jsonl: 1 sample" in out
    assert any(
        re.fullmatch(f"ok   {data}: train tokens: [0-9,]+ ids in 1 document", s) for s in out
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "config.toml").write_text("[training]\nseed = 'x'"), "config.toml"),
        (lambda run: (run / "manifest.json").unlink(), "manifest.json"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste'), "steps 1 to 1"),
        (lambda run: drop_line(run, 4), "step 6 follows step 4"),
        (lambda run: drop_line(run, 4, twice=True), "step 5 follows step 5"),
        (lambda run: (run / "samples.jsonl").write_text("[]\n"), "samples.jsonl: line 1"),
        (lambda run: (run / "changes.jsonl").write_text('{"step": 1}\n'), "names no change"),
        (lambda run: (run / "checkpoints/step-8/extra").write_text(""), "'extra' is not in"),
        (lambda run: (run / "checkpoints/step-8/model.safetensors").unlink(), "missing"),
    ],
)
def test_what_is_wrong_in_a_run_is_named(capsys, run, spoil, words):
    spoil(run)
    code, out = verified(capsys, run)
    assert words in out, out
    assert code == (0 if words == "steps 1 to 1" else 1)  # a torn last line was never committed


def drop_line(run, index, *, twice=False):
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if "grad_norm" in line]
    lines[index : index + 1] = [lines[index]] * 2 if twice else []
    path.write_text("".join(lines))


def test_a_checkpoint_whose_hashes_agree_but_whose_shapes_do_not_is_bad(capsys, run):
    path = run / "checkpoints/step-12"
    data = b"".join(map(bytes, safetensors_chunks({"norm.weight": torch.ones(3)})))
    (path / "model.safetensors").write_bytes(data)
    reseal(path)
    code, out = verified(capsys, path)
    assert code == 1
    assert "expected" in out
    assert "found none" in out


def test_a_checkpoint_of_the_users_own_trainer_is_compared_by_hash(
    capsys, bigram, windows, tmp_path
):
    trainer = Trainer(bigram(), sinks=[])
    trainer.training_step(windows())
    path = save_checkpoint(trainer, tmp_path / "mine")
    code, out = verified(capsys, path)
    assert code == 0
    assert "shapes were not compared" in out
    assert load_checkpoint(path, trainer) == {}


def test_an_id_outside_the_vocabulary_is_found_though_the_hash_agrees(capsys, run):
    (data,) = Path("runs/.data").iterdir()
    manifest = json.loads((data / "manifest.json").read_text())
    reseal(data, vocab_size=manifest["vocab_size"] - 1)
    code, out = verified(capsys, data)
    assert code == 1
    assert "vocab_size: expected 256" in out


def test_a_path_that_is_none_of_these_is_a_usage_error(capsys):
    for path in ("nowhere", "text.txt", "."):
        assert main(["verify", path]) == 2
        assert "neither a run, a checkpoint nor prepared data" in capsys.readouterr().err
