"""`truestep inspect`: the very text of a step, with the losses that training had there."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import TINY, workplace  # noqa: F401 the fixture is used by its name
from test_replay import tree

from truestep.cli import main
from truestep.workflows.inspect import inspect_step

TEXTS = {f"part-{i}.txt": f"{i}: a text of its own, " * (5 + i) + "é\n" for i in range(12)}


@pytest.fixture
def run():
    """A run over several documents, with dropout, micro-batches and epochs that end in a batch."""
    Path("texts").mkdir()
    for name, text in TEXTS.items():
        Path("texts", name).write_text(text)
    longer = TINY.replace("num_steps = 12", "num_steps = 40")
    Path("tiny.toml").write_text(longer)
    assert main(["train", "tiny.toml", "--data", "texts"]) == 0
    return Path("runs/texts-1")


def logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.mark.parametrize("step", [1, 9, 31, 40])
def test_a_step_is_shown_with_the_text_it_was_trained_on_and_the_losses_it_had(run, step):
    inspection = inspect_step(run, step, lambda text: None)
    record = logged(run)[step]
    assert inspection.loss == pytest.approx(record["loss"], rel=1e-5)
    assert inspection.logged_loss == record["loss"]
    assert inspection.num_targets == record["num_tokens"]
    losses = np.concatenate([window.losses for window in inspection.windows])
    assert losses.mean() == pytest.approx(record["loss"], rel=1e-5)
    # The oracle: the documents as they stand in the files, one after the other, NUL after each.
    (data,) = Path("runs/.data").iterdir()
    lines = (data / "train-documents.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    stream = b"".join(TEXTS[name].encode() + b"\0" for name in names)
    for window in inspection.windows:
        start = 16 * window.window
        held = stream[start : start + 17]
        assert len(window.pieces) == len(held)
        assert "".join(window.pieces) == held.replace(b"\0", b"").decode(errors="replace")
        assert window.ends == {i for i, byte in enumerate(held) if byte == 0}
        for document in window.documents:
            text = TEXTS[document.name].encode() + b"\0"
            rest = text[document.position :]
            assert held[document.offset :].startswith(rest[: 17 - document.offset])
        assert len(window.documents) == 1 + held[:-1].count(0)


def test_the_command_prints_the_worst_first_and_writes_a_page_that_needs_nothing(capsys, run):
    before = tree("runs")
    capsys.readouterr()
    assert main(["inspect", str(run), "--step", "31"]) == 0
    out = capsys.readouterr().out
    assert "windows by mean loss, worst first" in out
    assert any(name in out for name in TEXTS)
    page = run / "inspections/step-31.html"
    assert str(page) in out
    html = page.read_text()
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    after = tree("runs")
    assert after.pop(page)
    assert after == before


def test_a_step_that_was_not_made_is_refused_in_one_line(capsys, run):
    for step, words in [("41", "step 41 is not in the log"), ("0", "0"), ("x", "x")]:
        capsys.readouterr()
        assert main(["inspect", str(run), "--step", step]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert main(["inspect", str(run)]) == 2
    assert "--step" in capsys.readouterr().err
