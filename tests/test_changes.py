"""A change of settings that a kill cuts off: the run goes on, wholly with the old or the new."""

import json
import shutil
from itertools import count
from pathlib import Path

import pytest
from faults import Died
from test_accelerator_memory import LIKE, full_in_one_step  # noqa: F401 the fixture is used
from test_cli import log_of, train, weights_of, workplace  # noqa: F401 the fixture is used

from truestep.cli import main
from truestep.storage import LocalStorage
from truestep.workflows.run import read_run_config
from truestep.workflows.session import Session

# Not the writes in between: they go to files whose names nobody reads.
OPERATIONS = ("make_directory", "create", "sync", "rename", "sync_directory", "remove")


class Mortal:
    """A process that dies at the `number`-th operation counted: no later one has an effect."""

    def __init__(self, patch, number):
        self.counts, self._left = False, number
        for name in OPERATIONS:
            patch.setattr(LocalStorage, name, self._mortal(getattr(LocalStorage, name)))

    def _mortal(self, operation):
        def perform(*arguments):
            if self._left == 0 and self.counts:
                raise Died
            self._left -= self.counts
            return operation(*arguments)

        return perform

    def counting(self, function):
        """Let operations count while `function` runs; one that dies never leaves it."""

        def counted(*arguments):
            self.counts = True
            function(*arguments)
            self.counts = False

        return counted


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Leave out what takes most of the time and has no part in this."""
    for name in ("train.draw_plots", "train.write_report", "session.measure_peak_flops"):
        monkeypatch.setattr(f"truestep.workflows.{name}", lambda *_: None)


def changes_of(run):
    return [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("full_in_one_step")
@pytest.mark.filterwarnings("ignore:the memory of cpu ended")
def test_a_kill_while_a_smaller_size_is_written_down_leaves_a_run_that_ends_with_the_same_bits(
    monkeypatch, capsys
):
    assert train(*LIKE, "--run.name", "whole") == 0
    whole = Path("runs/whole")
    log, weights = log_of(whole), weights_of(whole, 12)
    for number in count():
        run = Path(f"runs/cut-{number}")
        with monkeypatch.context() as patch:
            record_size = Mortal(patch, number).counting(Session._record_size)
            patch.setattr(Session, "_record_size", record_size)
            try:
                assert train(*LIKE, "--run.name", run.name) == 0
                break
            except Died:
                pass
        capsys.readouterr()
        assert main(["verify", str(run)]) == 0, capsys.readouterr().out
        assert main(["train", "--resume", str(run)]) == 0, (number, capsys.readouterr().err)
        assert log_of(run) == log
        assert weights_of(run, 12) == weights
        assert changes_of(run) == changes_of(whole)
        assert read_run_config(run).training == read_run_config(whole).training
    assert number > 20


@pytest.fixture
def resumed_with(monkeypatch):
    """Go on with a run and other settings, up to the `number`-th operation; True if it died."""

    def resume(run, number, settings):
        arguments = []
        for name, value in settings.items():
            option = f"training.{name}".replace("_", "-")
            arguments += [f"--{option}", str(value), "--override", option]
        with monkeypatch.context() as patch:
            mortal = Mortal(patch, number)
            mortal.counts = True
            whole = Session.__init__

            def begun(*arguments):
                mortal.counts = False
                whole(*arguments)

            patch.setattr(Session, "__init__", begun)
            try:
                assert main(["train", "--resume", str(run), *arguments]) == 0
            except Died:
                return True
            return False

    return resume


OLD = {"learning_rate": 1e-2, "weight_decay": 0.1}
NEW = {"learning_rate": 2e-2, "weight_decay": 0.2}
NEWER = {"learning_rate": 3e-2, "weight_decay": 0.3}


def settings_of(run):
    training = read_run_config(run).training
    return {name: getattr(training, name) for name in OLD}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("not begun", NEWER),
        *[("cut off", second) for second in (NEWER, OLD, {})],
        *[("done", second) for second in (OLD, {})],
    ],
)
def test_a_kill_while_a_change_is_written_down_leaves_the_old_or_the_new_settings(
    resumed_with, capsys, first, second
):
    """`first`: how far an earlier resume came with a change that no checkpoint has yet."""
    assert train() == 0
    base = Path("runs/text-1")
    if first == "cut off":
        for number in count():
            run = shutil.copytree(base, Path(f"runs/first-{number}"))
            assert resumed_with(run, number, NEW)
            if (run / "changes.jsonl").exists():
                base = run
                break
        assert settings_of(base) == OLD
    elif first == "done":
        assert not resumed_with(base, -1, NEW)
    before = OLD if first == "not begun" else NEW
    for number in count():
        run = shutil.copytree(base, Path(f"runs/second-{number}"))
        if not resumed_with(run, number, second):
            break
        capsys.readouterr()
        assert main(["verify", str(run)]) == 0, capsys.readouterr().out
        assert main(["train", "--resume", str(run)]) == 0, (number, capsys.readouterr().err)
        assert settings_of(run) in (before, second or before)
        assert main(["verify", str(run)]) == 0
    assert settings_of(run) == (second or before)
    assert number > 5


def test_another_value_in_the_settings_than_a_change_left_or_found_is_refused(resumed_with, capsys):
    assert train() == 0
    run = Path("runs/text-1")
    assert not resumed_with(run, -1, NEW)
    path = run / "config.toml"
    text = path.read_text()
    assert "\nlearning_rate = 0.02\n" in text

    def resume_having(rate):
        path.write_text(text.replace("\nlearning_rate = 0.02\n", f"\nlearning_rate = {rate}\n"))
        capsys.readouterr()
        return main(["train", "--resume", str(run)])

    assert resume_having(0.03) == 2
    assert "training.learning_rate was 0.02 in this run and is now 0.03" in capsys.readouterr().err
    assert resume_having(0.01) == 0  # as where a kill came before the new value
    said = "has training.learning_rate still as 0.01, but changes.jsonl changed it to 0.02"
    assert said in capsys.readouterr().out
    assert settings_of(run) == NEW
    longer = ["--training.num-steps", "14", "--override", "training.num-steps"]
    assert main(["train", "--resume", str(run), *longer]) == 0
    text = path.read_text()
    assert resume_having(0.01) == 2  # a checkpoint has the new one
    assert "training.learning_rate was 0.02 in this run and is now 0.01" in capsys.readouterr().err
