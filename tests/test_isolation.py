"""Law 18 through the command: looking at a run, at any interval, leaves its bits as they are."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import TINY, log_of, weights_of

from truestep import load_checkpoint, save_checkpoint
from truestep.cli import main
from truestep.config import resolve
from truestep.workflows.build import build
from truestep.workflows.session import Session

STEPS = 12
LOOKS = {
    "rarely": {"evaluate": 1000, "save": 1000, "log": 1000, "windows": 1, "tokens": 1, "best": 0},
    "at every step": {"evaluate": 1, "save": 1, "log": 1, "windows": 9, "tokens": 30, "best": 1},
    "now and then": {"evaluate": 3, "save": 5, "log": 4, "windows": 2, "tokens": 7, "best": 2},
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("TRUESTEP_"):
            monkeypatch.delenv(name)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    Path("tiny.toml").write_text(TINY)


def train(name, look):
    """Train by the command; return the bits it ends with and its losses."""
    run = {
        "evaluate-every": look["evaluate"],
        "save-every": look["save"],
        "log-every": look["log"],
        "evaluation-windows": look["windows"],
        "sample-tokens": look["tokens"],
        "keep-best-checkpoints": look["best"],
        "sample-prompt": "a" * look["best"],
    }
    options = [word for key, value in run.items() for word in (f"--run.{key}", str(value))]
    command = ["train", "tiny.toml", "--data", "text.txt", "--run.name", name]
    assert main([*command, *options]) == 0
    records = [record for record in log_of(f"runs/{name}") if "loss" in record]
    return weights_of(f"runs/{name}", STEPS), records


def test_evaluating_sampling_logging_saving_and_plotting_leave_every_bit_of_the_training():
    bits, records = train("rarely", LOOKS["rarely"])
    assert len(records) == STEPS
    for name in ("at every step", "now and then"):
        again, same = train(name.replace(" ", "-"), LOOKS[name])
        assert again == bits, name
        assert same == records, name
    assert len(list(Path("runs/at-every-step/checkpoints").glob("step-*"))) >= 2
    assert len(Path("runs/at-every-step/samples.jsonl").read_text().splitlines()) == STEPS
    # And nothing at all beside the steps: no display, log, validation, sample or checkpoint.
    options = {"data": {"source": "text.txt"}}
    training = build(resolve(options, {}, Path("tiny.toml")), Path("runs"), lambda _: None)
    torch.rand(7)
    training.trainer.fit(training.loader)
    save_checkpoint(training.trainer, "runs/nothing/checkpoints")
    assert weights_of("runs/nothing", STEPS) == bits


@pytest.mark.xdist_group("compile")
def test_the_same_holds_for_a_compiled_run():
    # One trainer, compiled once, that goes back to step 0 in between; one shape of micro-batch.
    training = build(
        resolve(
            {
                "data": {"source": "text.txt"},
                "training": {"compile": "on", "micro_batch_size": 4, "num_steps": 6},
            },
            {},
            Path("tiny.toml"),
        ),
        Path("runs"),
        lambda _: None,
    )
    trainer = training.trainer
    assert trainer.config.compile == "on"
    save_checkpoint(trainer, "start")
    ends = []
    for name, look in LOOKS.items():
        run = training.config.run.model_copy(
            update={
                "evaluate_every": look["evaluate"],
                "save_every": look["save"],
                "evaluation_windows": look["windows"],
                "sample_tokens": look["tokens"],
                "keep_best_checkpoints": look["best"],
            }
        )
        looked_at = replace(training, config=training.config.model_copy(update={"run": run}))
        directory = Path("runs", name.replace(" ", "-"))
        directory.mkdir()
        load_checkpoint("start/step-0", trainer)
        with Session(directory, looked_at) as session:
            trainer.fit(training.loader)
            session.save()
        records = [record for record in log_of(directory) if "loss" in record]
        assert len(records) == 6
        ends.append((weights_of(directory, 6), records))
    assert ends[0] == ends[1] == ends[2]
