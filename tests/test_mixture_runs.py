"""Runs over several sources: settings, training, resuming, and every command after it."""

import json
import math
import re
from pathlib import Path

import pytest
from test_cli import log_of, weights_of, workplace  # noqa: F401 a fixture, used by its name

from truestep import ConfigError
from truestep.cli import main
from truestep.config import resolve
from truestep.data.mixture import PERIOD
from truestep.data.tokens import open_prepared
from truestep.training.evaluate import Evaluation, weighted
from truestep.workflows.inspect import inspect_step
from truestep.workflows.sources import short_names

WORDS = {
    "fox": "the quick brown fox jumps over the lazy dog\n" * 90,
    "numbers": "".join(f"{i} and {i * i}\n" for i in range(150)),
    "vowels": "a e i o u, aeiou. " * 60,
}
MIX = ["--data", "fox.txt", "-d", "numbers.txt", "--data", "vowels.txt"]
WEIGHTED = [*MIX, "--data.weights", "6", "3", "1"]


@pytest.fixture(autouse=True)
def texts(workplace):  # noqa: F811
    for name, text in WORDS.items():
        Path(f"{name}.txt").write_text(text)


def train(*arguments):
    return main(["train", "tiny.toml", *arguments])


def facts_of(run):
    return json.loads(Path(run, "manifest.json").read_text())


def streams(run="runs/fox-mix-1"):
    """The bytes of each source's text to train on, from the shards as they lie there."""
    found = {}
    for path in Path(run).parent.glob(".data/*"):
        split = open_prepared(path).train
        found[f"{path.name.rpartition('-')[0]}.txt"] = bytes(split.read(0, len(split)).tolist())
    return found


@pytest.fixture
def run(capsys):
    assert train(*WEIGHTED) == 0
    return Path("runs/fox-mix-1")


def test_a_mixture_trains_and_tells_of_each_source(run, capsys):
    out = capsys.readouterr().out
    records = [record for record in log_of(run) if "validation_loss" in record]
    assert [record["step"] for record in records] == [6, 12]
    for record in records:
        losses = [record[f"validation_loss/{name}.txt"] for name in WORDS]
        mean = sum(w * loss for w, loss in zip((6, 3, 1), losses, strict=True)) / 10
        assert record["validation_loss"] == pytest.approx(mean, rel=1e-12)
        assert f"fox.txt {losses[0]:.4f}  numbers.txt {losses[1]:.4f}" in out
    sources = facts_of(run)["sources"]
    assert [source["name"] for source in sources] == [f"{name}.txt" for name in WORDS]
    assert [source["turns"] for source in sources] == [39322, 19661, 6553]  # of 65536
    (line,) = [line for line in out.splitlines() if line.startswith("tokens read by source")]
    read = [
        int(part.split()[1].replace(",", "")) // 16 for part in line.split(": ")[1].split("), ")
    ]
    assert sum(read) == 48
    for count, source in zip(read, sources, strict=True):
        assert abs(count - 48 * source["turns"] / PERIOD) < 1
    windows = -(-(sources[2]["train_tokens"] - 1) // 16)
    assert line.endswith(f"({read[2] / windows:.2f} epochs)")


def test_every_row_of_a_step_is_the_text_of_its_source(run):
    held = streams()
    seen = set()
    for step in (1, 12):
        for window in inspect_step(run, step, lambda _: None).windows:
            text = held[window.source][16 * window.window :][:17].replace(b"\0", b"").decode()
            assert "".join(window.pieces) == text
            assert {document.name for document in window.documents} == {window.source}
            seen.add(window.source)
    assert len(seen) == 3


def test_inspection_names_the_source_in_text_and_page(run, capsys):
    assert main(["inspect", str(run), "--step", "3"]) == 0
    assert " of fox.txt\n" in capsys.readouterr().out
    assert " of fox.txt<" in (run / "inspections/step-3.html").read_text()


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not():
    same = ["--training.schedule", "constant"]
    assert train(*WEIGHTED, *same, "--run.name", "whole") == 0
    assert train(*WEIGHTED, *same, "--run.name", "half", "--training.num-steps", "5") == 0
    assert main(["train", "--resume", "runs/half", "--training.num-steps", "12"]) == 0
    assert weights_of("runs/half", 12) == weights_of("runs/whole", 12)
    assert [r["batch_hash"] for r in log_of("runs/half") if "loss" in r] == [
        r["batch_hash"] for r in log_of("runs/whole") if "loss" in r
    ]


def test_every_command_works_with_a_mixture(run, capsys):
    capsys.readouterr()
    assert main(["replay", str(run), "--step", "1", "--to", "12"]) == 0
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("train tokens") == 3
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    logged = [r for r in log_of(run) if "validation_loss" in r][-1]
    tolerance = 1e-3  # it is in float32, validation in the arithmetic of training
    (loss,) = re.findall(r"  loss (\S+) nats", out)
    assert float(loss) == pytest.approx(logged["validation_loss"], abs=tolerance)
    for name in WORDS:
        (loss,) = re.findall(rf"  {name}.txt: loss (\S+)\n", out)
        assert float(loss) == pytest.approx(logged[f"validation_loss/{name}.txt"], abs=tolerance)
    assert main(["report", str(run)]) == 0


def test_the_settings_of_a_run_repeat_it_from_another_directory(run, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = ["--run.directory", "../runs", "--run.name", "again"]
    assert main(["train", "../runs/fox-mix-1/config.toml", *again]) == 0
    assert weights_of("../runs/again", 12) == weights_of("../runs/fox-mix-1", 12)


def test_changed_text_is_refused_by_the_name_of_its_source(run, capsys):
    Path("numbers.txt").write_text(WORDS["numbers"].replace("7", "8", 1))
    assert main(["train", "--resume", str(run)]) == 2
    assert "data.source=numbers.txt is not the text this run began with" in capsys.readouterr().err
    Path("numbers.txt").write_text(WORDS["numbers"])
    Path("numbers.txt").rename("moved.txt")
    moved = ["-d", "fox.txt", "-d", "moved.txt", "-d", "vowels.txt"]
    assert main(["train", "--resume", str(run), *moved]) == 2  # a document has another name
    assert "data.source=moved.txt is not the text" in capsys.readouterr().err


def test_sources_in_another_order_and_other_weights_are_refused(run, capsys):
    other = ["-d", "numbers.txt", "-d", "fox.txt", "-d", "vowels.txt"]
    assert main(["train", "--resume", str(run), *other]) == 2
    assert "is not the text this run began with" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--data.weights", "1", "1", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.weights was [6.0, 3.0, 1.0] in this run and is now [1.0")
    assert "--override data.weights" in error


def test_without_weights_all_sources_are_read_equally_often(capsys):
    assert train(*MIX) == 0
    sources = facts_of("runs/fox-mix-1")["sources"]
    total = sum(source["train_tokens"] for source in sources)
    for source in sources:
        assert abs(source["turns"] - PERIOD * source["train_tokens"] / total) < 1
    settings = resolve({}, {}, Path("runs/fox-mix-1/config.toml"))
    assert settings.data.weights == tuple(source["train_tokens"] for source in sources)


def test_the_first_source_gives_the_byte_pairs_of_all(capsys):
    assert train(*WEIGHTED, "--data.tokenizer", "bpe-280") == 0
    assert capsys.readouterr().out.count("learning 280 byte pairs") == 1
    tokenizers = {open_prepared(p).tokenizer.fingerprint for p in Path("runs/.data").iterdir()}
    assert len(tokenizers) == 1
    assert train(*WEIGHTED, "--data.tokenizer", "bpe-280") == 0
    assert "learning" not in capsys.readouterr().out
    assert weights_of("runs/fox-mix-1", 12) == weights_of("runs/fox-mix-2", 12)
    assert main(["train", "--resume", "runs/fox-mix-1"]) == 0
    assert main(["prepare", "fox.txt", "-o", "prepared", "--tokenizer", "bytes"]) == 0
    capsys.readouterr()
    assert train("--data", "numbers.txt", "--data", "prepared", "--data.tokenizer", "bpe-280") == 2
    error = capsys.readouterr().err
    assert "data.source=prepared was prepared with another tokenizer than numbers.txt" in error


def test_a_named_validation_is_that_of_all(capsys):
    Path("held.txt").write_text("quite another text\n" * 40)
    assert train(*WEIGHTED, "--data.validation", "held.txt") == 0
    last = log_of("runs/fox-mix-1")[-1]
    assert "validation_loss" in last
    assert not any(name.startswith("validation_loss/") for name in last)
    assert facts_of("runs/fox-mix-1")["validation_tokens"] == 40 * 19 + 1


def test_a_plan_says_how_often_each_source_is_read(capsys, monkeypatch):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    assert main(["plan", "tiny.toml", *WEIGHTED, "--out", "plan.toml"]) == 0
    out = capsys.readouterr().out
    tokens = len(streams("runs/none")["vowels.txt"])
    times = 12 * 4 * 16 * 0.1 / tokens
    assert f"10.0% of vowels.txt, {tokens:,} tokens; read {times:.2f} times\n" in out
    assert main(["train", "plan.toml"]) == 0
    assert resolve({}, {}, Path("plan.toml")).data.weights == (6, 3, 1)


def test_a_source_may_stand_in_a_file_the_environment_or_the_command_line():
    Path("mix.toml").write_text('[data]\nsource = ["a", "b.txt"]\nweights = [1, 2.5]\n')
    config = resolve({}, {}, Path("mix.toml"))
    assert config.data.sources == ("a", "b.txt")
    assert config.data.weights == (1, 2.5)
    environment = {"TRUESTEP_DATA__SOURCE": '["c", "d"]', "TRUESTEP_DATA__WEIGHTS": "[3, 4]"}
    config = resolve({}, environment, Path("mix.toml"))
    assert (config.data.sources, config.data.weights) == (("c", "d"), (3, 4))
    assert resolve({}, {"TRUESTEP_DATA__SOURCE": "2024"}).data.source == "2024"
    assert resolve({"data": {"source": ["a"]}}, {}).data.source == "a"
    one = resolve({"data": {"source": "c", "weights": "auto"}}, {}, Path("mix.toml"))
    assert (one.data.sources, one.data.weights) == (("c",), "auto")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "fox.txt", "--data", "fox.txt"], "source=fox.txt is named twice"),
        (["--data", "fox.txt", "-d", "./fox.txt"], "is the same text as fox.txt; name it once"),
        (["--data", "fox.txt", "-d", "nothing.txt"], "'nothing.txt' is neither a file"),
        (["-d", "fox.txt", "--data.weights", "1", "2"], "must be one number for each source"),
        (["--data", "fox.txt", "-d", "numbers.txt", "--data.weights", "1"], "and there are 2 in"),
        (["--data", "fox.txt", "-d", "numbers.txt", "--data.weights", "1", "0"], "greater than 0"),
        (["--data", "fox.txt", "-d", "numbers.txt", "--data.weights", "1", "nan"], "finite number"),
        (["--data", "fox.txt", "-d", "short.txt"], "short.txt: the text has"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_one_line(arguments, words, capsys):
    Path("short.txt").write_text("too short\n")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(Path("runs").glob("*-mix*"))


def test_an_empty_list_of_sources_is_refused():
    with pytest.raises(ConfigError, match=r"source=\[\] names no text"):
        resolve({"data": {"source": []}}, {})


def test_the_loss_of_a_mixture_is_that_of_a_token_drawn_from_it():
    bits = math.log(2)
    one = Evaluation(2 * bits, 100, 2.0, 100)  # a byte a token
    other = Evaluation(6 * bits, 10, 3.0, 20)  # two bytes a token
    result = weighted({"one": one, "other": other}, [3.0, 1.0])
    assert result.loss == pytest.approx(3 * bits)
    assert result.bits_per_byte == pytest.approx(3 / 1.25)
    assert (result.num_tokens, result.num_bytes) == (110, 120)
    assert weighted({"one": one}, [0.3, 0.7]) is one


def test_names_of_sources_are_short_and_each_its_own():
    sources = ["stdlib", "/a/books", "/b/books", "c/books-2", "/d/books/"]
    assert short_names(sources) == ["stdlib", "books", "books-2", "books-2-2", "books-3"]
