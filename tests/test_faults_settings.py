"""Going on with a run whose settings or text have changed: refused by name, or taken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import TINY, weights_of

from truestep import RunConfig
from truestep.cli import main
from truestep.config import resolve
from truestep.settings import ConfigError, settings
from truestep.workflows.history import refuse_changes

SETTINGS = {setting.name: setting for setting in settings(RunConfig)}
KEPT = [name for name, setting in SETTINGS.items() if setting.kept_on_resume]
FREE = [name for name, setting in SETTINGS.items() if not setting.kept_on_resume]
# Where the next value by type would break a rule between settings, or be no device at all.
OTHERS = {
    "training.lanes": 1,
    "model.width": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 1,
    "run.device": "meta",
    "data.tokenizer": "bpe-300",
    "data.weights": [2.0],
    "training.optimizer": "muon",
}
TEXTS = {f"{name}.txt": f"the {name} fox jumps over the lazy dog\n" * 60 for name in "abcde"}


def nested(name, value):
    section, key = name.split(".")
    return {section: {key: value}}


def value_of(config, name):
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def another(name, value):
    """A value that the setting may have and that is not `value`; None if there is no other."""
    if name in OTHERS:
        return OTHERS[name]
    choices = [part[1:-1] for part in SETTINGS[name].type.split(" or ") if part[0] == '"']
    if isinstance(value, str) and choices and "str" not in SETTINGS[name].type:
        return next((c for c in choices if c not in {value, "auto"}), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, tuple):
        return [part / 2 for part in value]
    return value + 1 if isinstance(value, int) else value / 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a finished run, and the text it read."""
    place = tmp_path_factory.mktemp("finished")
    (place / "texts").mkdir()
    for name, text in TEXTS.items():
        (place / "texts" / name).write_text(text)
    (place / "tiny.toml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        arguments = ["--data", "texts", "--model.num-kv-heads", "2", "--run.name", "run"]
        assert main(["train", "tiny.toml", *arguments]) == 0
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of all that, to be spoilt; the run knows its text by an absolute path."""
    place = shutil.copytree(finished, tmp_path / "place")
    config = place / "runs/run/config.toml"
    config.write_text(config.read_text().replace(str(finished), str(place)))
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    yield place
    torch.set_num_threads(threads)


def resume_with(changes, *arguments):
    Path("changes.json").write_text(json.dumps(changes))
    return main(["train", "changes.json", "--resume", "runs/run", *arguments])


def content_of(directory):
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in paths if not path.name.startswith(".lock")}


@pytest.mark.parametrize("name", ["training.seed", "model.dropout", "data.batch_size"])
def test_a_changed_or_missing_line_of_the_run_s_own_settings_is_refused(place, name, capsys):
    path = place / "runs/run/config.toml"
    key = name.split(".")[1]
    lines = path.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key} ="))
    for other in (f"{key} = {0.5 if key == 'dropout' else 7}", ""):
        path.write_text("\n".join(other if each == line else each for each in lines))
        if key != "seed" or other:  # without its line, the seed is what it was
            before = content_of(place / "runs")
            assert main(["train", "--resume", "runs/run"]) == 2
            assert f"error: {name} was " in capsys.readouterr().err
            assert content_of(place / "runs") == before


def test_a_change_that_was_allowed_stays_so_until_it_is_in_a_checkpoint(place, monkeypatch, capsys):
    def no_room(*_):
        raise OSError("no training today")

    longer = ["--training.num-steps", "20", "--override", "training.num-steps"]
    with monkeypatch.context() as patch:
        patch.setattr("truestep.training.trainer.Trainer.fit", no_room)
        assert main(["train", "--resume", "runs/run", *longer]) == 1
    assert "no training today" in capsys.readouterr().err
    assert main(["train", "--resume", "runs/run"]) == 0
    changes = [json.loads(line) for line in Path("runs/run/changes.jsonl").read_text().splitlines()]
    assert [(c["setting"], c["after"]) for c in changes] == [("training.num_steps", 20)]
    assert main(["verify", "runs/run"]) == 0


def test_the_name_of_a_run_cannot_change_on_the_way(place, capsys):
    assert main(["train", "--resume", "runs/run", "--run.name", "other"]) == 2
    assert "run.name cannot change in runs/run; leave it out" in capsys.readouterr().err
    assert main(["train", "--resume", "runs/run", "--run.name", "run"]) == 0


def test_every_setting_has_another_value(place):
    config = resolve({}, {}, Path("runs/run/config.toml"))
    for name in SETTINGS:
        other = nested(name, another(name, value_of(config, name)))
        changed = resolve(other, {}, base=config.model_dump(mode="json"))
        assert value_of(changed, name) != value_of(config, name)


@pytest.mark.parametrize("name", KEPT)
def test_a_changed_setting_that_the_bits_depend_on_is_refused_unless_overridden(
    place, name, capsys
):
    config = resolve({}, {}, Path("runs/run/config.toml"))
    old = value_of(config, name)
    new = another(name, old)
    before = content_of(place / "runs")
    assert resume_with(nested(name, new)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith(f"error: {name} was ")
    for value in (old, new):
        shown = list(value) if isinstance(value, tuple) else value
        error_without_quotes = error.replace("(", "[").replace(")", "]").replace("'", "")
        assert str(shown).casefold() in error_without_quotes.casefold()
    assert f"--override {name}" in error
    # With the override it comes as far as the text, which is gone: nothing is trained here.
    shutil.rmtree("texts")
    assert resume_with(nested(name, new), "--override", name) == 2
    assert "texts' is neither a file" in capsys.readouterr().err
    other = next(kept for kept in KEPT if kept != name)
    assert resume_with(nested(name, new), "--override", other) == 2
    assert f"{name} was " in capsys.readouterr().err
    assert content_of(place / "runs") == before


@pytest.mark.parametrize("name", FREE)
def test_a_changed_setting_that_no_bit_depends_on_is_taken(place, name, capsys):
    shutil.rmtree("texts")
    new = another(name, value_of(resolve({}, {}, Path("runs/run/config.toml")), name))
    assert resume_with(nested(name, new)) == 2
    error = capsys.readouterr().err
    assert "is neither a file" in error
    assert "override" not in error


def test_all_settings_that_no_bit_depends_on_may_change_at_once_and_none_does(place):
    same_rate = ["--training.schedule", "constant"]
    texts = ["--data", "texts", *same_rate]
    assert main(["train", "tiny.toml", *texts, "--run.name", "whole"]) == 0
    part = ["--run.name", "part", "--training.num-steps", "5"]
    assert main(["train", "tiny.toml", *texts, *part]) == 0
    config = resolve({}, {}, Path("runs/part/config.toml"))
    changes = {section: {} for section in RunConfig.model_fields}
    changes["training"]["num_steps"] = 12
    for name in FREE:
        section, key = name.split(".")
        if section != "data":  # there the fingerprint decides
            changes[section][key] = another(name, value_of(config, name))
    Path("changes.json").write_text(json.dumps(changes))
    assert main(["train", "changes.json", "--resume", "runs/part"]) == 0
    assert weights_of("runs/part", 12) == weights_of("runs/whole", 12)


def test_all_refused_changes_are_said_at_once_and_only_those():
    old = resolve({}, {})
    new = resolve(
        {
            "training": {"seed": 3, "betas": [0.5, 0.6]},
            "model": {"width": 64},
            "run": {"log_every": 3},
        },
        {},
    )
    with pytest.raises(ConfigError) as caught:
        refuse_changes(old, new, {"model.width"})
    assert [problem.text for problem in caught.value.problems] == [
        f"training.{name}, which changes what is trained; leave it out, or allow it by "
        f"--override training.{name.split()[0]}"
        for name in (
            "betas was [0.9, 0.95] in this run and is now [0.5, 0.6]",
            "seed was 0 in this run and is now 3",
        )
    ]
    refuse_changes(old, old)
    refuse_changes(old, new, {"model.width", "training.seed", "training.betas"})
    with pytest.raises(ConfigError) as caught:
        refuse_changes(old, new)
    names = [problem.text.split()[0] for problem in caught.value.problems]
    assert names == ["training.betas", "training.seed", "model.width"]


def test_each_problem_is_one_printable_line_whatever_a_name_holds(place, capsys):
    hostile = "\x1b[31m\n\u202e"
    with pytest.raises(ConfigError) as caught:
        resolve({"training": {hostile: 1, "seed": -1}, hostile: {"a": 1}}, {})
    assert all(problem.text.isprintable() for problem in caught.value.problems)
    Path("changes.json").write_text(json.dumps({"training": {hostile: 1, "seed": -1}}))
    assert main(["train", "changes.json"]) == 2
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    assert [line.partition(" ")[0] for line in lines] == ["error:", "error:"]
    assert all(line.isprintable() for line in lines)


def edit(texts):
    (texts / "b.txt").write_text(TEXTS["b.txt"].replace("lazy", "busy", 1))


def swap(texts):
    (texts / "b.txt").write_text(TEXTS["c.txt"])
    (texts / "c.txt").write_text(TEXTS["b.txt"])


def rename(texts):
    (texts / "b.txt").rename(texts / "bb.txt")


def reorder(texts):
    (texts / "b.txt").rename(texts / "z.txt")


def cut_lines_in_another_order(texts):
    first, *rest = TEXTS["b.txt"].replace("fox", "hen", 1).splitlines(keepends=True)
    (texts / "b.txt").write_text("".join([*rest, first]))


def add(texts):
    (texts / "f.txt").write_text("one more\n")


def remove(texts):
    (texts / "b.txt").unlink()


def touch_only(texts):
    """Not a change: the same text at another time, with a file beside it that is no text."""
    (texts / "b.txt").touch()
    (texts / "picture.png").write_bytes(b"\x89PNG")


CHANGES = [edit, swap, rename, reorder, cut_lines_in_another_order, add, remove]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_text_that_was_edited_reordered_or_renamed_is_refused_by_its_fingerprint(
    place, change, capsys
):
    change(place / "texts")
    before = content_of(place / "runs/run")
    capsys.readouterr()
    assert main(["train", "--resume", "runs/run"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "is not the text this run began with, or a file has another name (fin" in error
    assert "restore it, or start a new run" in error
    assert content_of(place / "runs/run") == before


def test_text_that_is_still_the_same_is_taken_wherever_it_lies(place, capsys):
    touch_only(place / "texts")
    assert main(["train", "--resume", "runs/run"]) == 0
    Path("texts").rename("moved")
    assert main(["train", "--resume", "runs/run", "--data", "moved"]) == 0
