"""Names and texts with control characters, from the text to the page: shown, never obeyed."""

import json
import re
from pathlib import Path

import pytest
from test_cli import TINY

from truestep.cli import main

CONTROLS = "\x1b[31m\x1b]0;title\x07\x9b\u202e\u2066<script>alert(1)</script>&\r"
NAME = f"te\nxt {CONTROLS}".replace("/", "")
TEXTS = NAME


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path(TEXTS).mkdir()
    for number in range(12):
        text = f"{CONTROLS}\nline {number}\n" * 40
        (Path(TEXTS) / f"{NAME}-{number}.txt").write_text(text)
    (Path(TEXTS) / f"bad {NAME}.txt").write_bytes(b"\xff")
    (Path(TEXTS) / f"other.{NAME}").write_text("of another kind")


def assert_harmless(text):
    assert all(line.isprintable() for line in text.replace("\t", " ").split("\n")), ascii(text)


def test_hostile_names_texts_and_prompts_are_shown_and_never_obeyed(capsys):
    command = ["train", "tiny.toml", "--data", TEXTS, "--run.sample-prompt", CONTROLS]
    assert main([*command, "--training.num-steps", "2", "--run.evaluate-every", "1"]) == 0
    (run,) = [path for path in Path("runs").iterdir() if not path.name.startswith(".")]
    assert re.fullmatch("[A-Za-z0-9_-]+", run.name)
    assert main(["sample", "--tokens", "20", "--prompt", CONTROLS]) == 0
    assert main(["evaluate", "--data", TEXTS]) == 0
    assert main(["report"]) == 0
    assert main(["verify"]) == 0
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    assert_harmless(captured.err)
    assert "skipped" in captured.out
    for name in ("metrics.jsonl", "samples.jsonl", "manifest.json", "config.toml"):
        if name != "config.toml":  # TOML escapes control characters, and leaves the others
            assert_harmless((run / name).read_text())
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", (run / name).read_text())
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"] == CONTROLS
    page = (run / "report.html").read_text()
    assert_harmless(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", f"missing {CONTROLS}\n"],
        ["train", "--run.name", CONTROLS],
        ["train", "--run.device", CONTROLS],
        ["train", "--resume", CONTROLS],
        ["train", "--run.directory", f"{TEXTS}/{NAME}-1.txt"],
        ["train", f"{NAME}.toml"],
        ["train", f"--{NAME}", "1"],
        ["train", "--training.seed", NAME],
        ["train", "--override", NAME, "--resume", "auto"],
        ["train", "tiny.toml", "--data.source", f"{TEXTS}/bad {NAME}.txt"],
        ["prepare", NAME, "--out", NAME],
        ["prepare", TEXTS, "--out", f"{TEXTS}/{NAME}-1.txt"],
        ["sample", NAME],
        ["evaluate", NAME],
        ["report", NAME],
        ["verify", NAME],
        [NAME],
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:30],
)
def test_an_error_about_a_hostile_name_is_one_harmless_line(arguments, capsys):
    assert main(arguments) in {1, 2}
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    error = captured.err.split("\n")
    assert len(error) == 2, ascii(captured.err)
    assert error[0].startswith("error: ")
    assert error[0].isprintable(), ascii(error[0])
