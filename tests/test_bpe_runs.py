"""A run on byte pairs, as a stranger types it: its tokenizer goes with it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from test_cli import TINY, log_of, weights_of
from tokenizers import trainers

from truestep.cli import main
from truestep.data.tokenizer import load_tokenizer
from truestep.model.generate import generate

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
    assert main(["evaluate"]) == 0  # with its own tokenizer, not one learnt anew
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


@pytest.fixture
def another_library(monkeypatch):
    """From now on, the library learns other pairs from the same text."""

    def change():
        trainer = partial(trainers.BpeTrainer, min_frequency=200)
        monkeypatch.setattr("tokenizers.trainers.BpeTrainer", trainer)

    return change


def facts_of(run):
    return json.loads(Path(run, "manifest.json").read_text())


def test_a_run_goes_on_with_its_own_tokenizer_whatever_the_library_would_learn(
    another_library, capsys
):
    assert train() == 0
    whole = weights_of("runs/text-1", 12)
    shutil.rmtree("runs/text-1/checkpoints/step-12")
    another_library()
    shutil.rmtree("runs/.data")
    for command in (["replay", "--step", "6"], ["inspect", "--step", "3"], ["evaluate"]):
        assert main(command) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "runs/text-1"]) == 0
    assert "learning" not in capsys.readouterr().out
    assert weights_of("runs/text-1", 12) == whole
    assert train() == 0  # a new run learns its own, and neither is taken for the other's
    assert "learning" in capsys.readouterr().out
    first, second = (facts_of(f"runs/text-{number}") for number in (1, 2))
    assert first["tokenizer_fingerprint"] != second["tokenizer_fingerprint"]
    assert first["data_fingerprint"] == second["data_fingerprint"]
    for run in ("runs/text-1", "runs/text-2"):
        assert main(["train", "--resume", run]) == 0
        assert main(["verify", run]) == 0


def test_a_run_without_its_tokenizer_learns_it_again_and_says_so(capsys):
    assert train() == 0
    path = Path("runs/text-1/tokenizer.json")
    definition = path.read_bytes()
    whole = weights_of("runs/text-1", 12)
    for spoil in (path.unlink, lambda: path.write_bytes(definition[:-1])):
        spoil()
        shutil.rmtree("runs/.data")
        shutil.rmtree("runs/text-1/checkpoints/step-12")
        capsys.readouterr()
        assert main(["train", "--resume", "runs/text-1"]) == 0
        assert "going on without the run's own tokenizer" in capsys.readouterr().out
        assert weights_of("runs/text-1", 12) == whole
        assert path.read_bytes() == definition


def test_another_tokenizer_than_the_run_s_is_refused_with_a_remedy_that_helps(
    another_library, capsys
):
    assert train() == 0
    path = Path("runs/text-1/tokenizer.json")
    definition = path.read_bytes()
    path.unlink()
    shutil.rmtree("runs/.data")
    another_library()
    assert main(["train", "--resume", "runs/text-1"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "is not read with the tokenizer this run began with" in error
    assert "restore tokenizer.json in the run, or in a prepared source" in error
    path.write_bytes(definition)
    assert main(["train", "--resume", "runs/text-1"]) == 0


def test_a_source_prepared_with_another_tokenizer_is_refused(another_library, capsys):
    prepare = ["prepare", "text.txt", "--out", "prepared", "--tokenizer", "bpe-290"]
    assert main(prepare) == 0
    assert main(["train", "tiny.toml", "--data", "prepared"]) == 0
    shutil.move("prepared", "first")
    another_library()
    assert main(prepare) == 0
    assert main(["train", "--resume", "runs/prepared-1"]) == 2
    assert "is not read with the tokenizer this run began with" in capsys.readouterr().err
    shutil.rmtree("prepared")
    shutil.move("first", "prepared")
    assert main(["train", "--resume", "runs/prepared-1"]) == 0


@pytest.mark.parametrize(
    "content", ["{", "[" * 100_000, '{"normalizer": "\x1b[31m"}', "\x00", "null", ""]
)
def test_a_hostile_tokenizer_is_refused_in_one_line_by_its_hash(content, capsys):
    assert train() == 0
    Path("runs/text-1/tokenizer.json").write_text(content)
    capsys.readouterr()
    for command in ("sample", "evaluate"):
        assert main([command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "tokenizer.json is not the tokenizer that was recorded with it" in line
    assert main(["verify"]) == 1
    assert "BAD  tokenizer.json" in capsys.readouterr().out


def test_another_tokenizer_is_refused_wherever_the_run_is_used(capsys):
    assert train() == 0
    path = Path("runs/text-1/tokenizer.json")
    definition = json.loads(path.read_text())
    definition["model"]["merges"].reverse()
    path.write_text(json.dumps(definition))
    for command in ("sample", "evaluate"):
        assert main([command]) == 2
        err = capsys.readouterr().err
        assert "tokenizer.json is not the tokenizer that was recorded with it" in err
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
    assert "tokenizer=words must be bytes or bpe-N" in capsys.readouterr().err


def test_a_space_at_the_end_of_a_prompt_belongs_to_the_word_that_comes(capsys, monkeypatch):
    """Byte pairs keep a space with its word: after one by itself the model writes nonsense."""
    assert train() == 0
    asked = []

    def look(model, tokens, **options):
        asked.append((tokens.tolist(), options["first_tokens"]))
        return generate(model, tokens, **options)

    monkeypatch.setattr("truestep.workflows.trained.generate", look)
    pieces = {}
    for prompt in ("def ", "def", " ", "pass\n    "):
        capsys.readouterr()
        assert main(["sample", "--prompt", prompt, "--tokens", "4"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(prompt)
        assert not out.startswith(prompt + " ") or prompt == "def"
        tokenizer = load_tokenizer("bpe-290", Path("runs/text-1"))
        ids, first = asked.pop()
        pieces[prompt] = tokenizer.decode(ids), first and {tokenizer.decode([n])[0] for n in first}
    assert pieces == {
        "def ": ("def", {" "}),
        "def": ("def", None),
        " ": ("", {" "}),
        "pass\n    ": ("pass\n   ", {" "}),
    }
