"""A run on byte pairs, as a stranger types it: its tokenizer goes with it."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import TINY, log_of, weights_of

from truestep.cli import main

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Sum:\n    pass\n" * 150


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "tiny.toml").write_text(TINY.replace("[data]", '[data]\ntokenizer = "bpe-290"'))


def train(*arguments):
    return main(["train", "tiny.toml", "--data", "text.txt", *arguments])


def test_a_run_writes_evaluates_and_verifies_with_its_own_tokenizer(capsys):
    assert train() == 0
    run = Path("runs/text-1")
    assert json.loads((run / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    capsys.readouterr()
    shutil.rmtree("runs/.data")  # what it was prepared from is not asked
    assert main(["sample", "--prompt", "def add", "--tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("def add")
    assert main(["evaluate", "--data", "text.txt"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["evaluate"]) == 0  # learnt anew, and the same
    last = [record for record in log_of(run) if "validation_loss" in record][-1]
    assert f"{last['validation_bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    assert main(["verify"]) == 0
    assert "ok   tokenizer.json: 290 ids, and the one the run began with" in capsys.readouterr().out
    assert main(["inspect", "--step", "3"]) == 0
    assert main(["replay", "--step", "6"]) == 0


def test_a_resumed_run_has_the_same_bits():
    assert train() == 0
    whole = weights_of("runs/text-1", 12)
    shutil.rmtree("runs/text-1/checkpoints/step-12")
    assert main(["train", "--resume", "runs/text-1"]) == 0
    assert weights_of("runs/text-1", 12) == whole


def test_another_tokenizer_is_refused_wherever_the_run_is_used(capsys):
    assert train() == 0
    path = Path("runs/text-1/tokenizer.json")
    definition = json.loads(path.read_text())
    definition["model"]["merges"].reverse()
    path.write_text(json.dumps(definition))
    for command in ("sample", "evaluate"):
        assert main([command]) == 2
        err = capsys.readouterr().err
        assert "tokenizer.json is not the tokenizer this run began with" in err
    assert main(["verify"]) == 1
    assert "BAD  tokenizer.json" in capsys.readouterr().out
    path.unlink()
    assert main(["sample"]) == 1
    assert "tokenizer.json" in capsys.readouterr().err


def test_the_tokenizer_may_not_change_on_resume(capsys):
    assert train() == 0
    assert main(["train", "--resume", "auto", "--data.tokenizer", "bytes"]) == 2
    assert "data.tokenizer was bpe-290 in this run" in capsys.readouterr().err


def test_a_prepared_directory_brings_its_tokenizer(capsys):
    assert main(["prepare", "text.txt", "--out", "prepared", "--tokenizer", "bpe-290"]) == 0
    Path("tiny.toml").write_text(TINY)
    assert main(["train", "tiny.toml", "--data", "prepared"]) == 0
    assert 'tokenizer = "bpe-290"' in Path("runs/prepared-1/config.toml").read_text()
    capsys.readouterr()
    assert main(["train", "tiny.toml", "--data", "prepared", "--data.tokenizer", "bytes"]) == 2
    assert (
        "data.tokenizer=bytes, but prepared was prepared with bpe-290; leave it at auto"
        in capsys.readouterr().err
    )
    assert main(["prepare", "text.txt", "--out", "other", "--tokenizer", "words"]) == 2
    assert "use bytes, or bpe-N" in capsys.readouterr().err
