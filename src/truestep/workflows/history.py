"""Which settings each step of a run was trained with, and which of them may change on the way.

`config.toml` holds the settings of now, `changes.jsonl` what was changed after which step.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from truestep.checkpoint.commit import DamagedCheckpointError, list_checkpoints
from truestep.checkpoint.state import read_facts
from truestep.config import RunConfig
from truestep.observe.log import METRICS, read_records
from truestep.observe.sinks import JsonlSink
from truestep.settings import Config, ConfigError, Problem, Setting, settings, shown, validate
from truestep.workflows.run import CHECKPOINTS, RunError, read_run_config

CHANGES = "changes.jsonl"
_FACTS = {"config": dict, "data_fingerprint": str, "torch": str, "machine": str}


def difference(old: Config, new: Config) -> list[tuple[Setting, Any, Any]]:
    """Return each setting whose value differs, with its old and its new value."""
    return [
        (setting, _value(old, setting.name), _value(new, setting.name))
        for setting in settings(type(new))
        if _value(old, setting.name) != _value(new, setting.name)
    ]


def trajectory_changes(old: RunConfig, new: RunConfig) -> list[tuple[Setting, Any, Any]]:
    """Return those differences that change what is trained from here on."""
    constant = old.training.schedule == new.training.schedule == "constant"
    return [
        change
        for change in difference(old, new)
        if change[0].kept_on_resume
        # A constant schedule does not look at the end of the run.
        and not (constant and change[0].name == "training.num_steps")
    ]


def refuse_changes(old: RunConfig, new: RunConfig, allowed: Collection[str] = ()) -> None:
    """Refuse every change of a setting that a resumed run must keep; those `allowed` may change.

    Errors: ConfigError with a line for each: the old value, the new one and the remedy.
    """
    texts = [
        f"{setting.name} was {shown(before)} in this run and is now {shown(after)}, which "
        f"changes what is trained; leave it out, or allow it by --override {setting.name}"
        for setting, before, after in trajectory_changes(old, new)
        if setting.name not in allowed
    ]
    if texts:
        raise ConfigError([Problem((), text) for text in texts])


def _value(config: Config, name: str) -> Any:
    for key in name.split("."):
        config = getattr(config, key)
    return config


def record_changes(
    directory: Path, step: int, before: RunConfig, after: RunConfig, *, resuming: bool = True
) -> None:
    """Write down, durably, what changes of what is trained after `step`.

    Where a run goes on from `step`, what it had changed from there on before counts no more.
    """
    changes = trajectory_changes(before, after)
    if not changes and not (directory / CHANGES).exists():
        return
    sink = JsonlSink(directory / CHANGES, from_step=step - 1 if resuming else step)
    try:
        for setting, old, new in changes:
            sink.write({"step": step, "setting": setting.name, "before": old, "after": new})
        sink.sync()
    finally:
        sink.close()


def settings_of(checkpoint: Path, facts: Mapping[str, Any]) -> RunConfig:
    """Return the settings saved with a checkpoint of a run.

    Errors: RunError for one that was not saved by a run; ConfigError for values that cannot be.
    """
    if missing := [name for name in _FACTS if not isinstance(facts.get(name), _FACTS[name])]:
        raise RunError(
            f"{checkpoint} was not saved by truestep train: its facts have no {missing[0]}; a run "
            "goes on only from its own checkpoints"
        )
    return validate(RunConfig, {str(checkpoint): facts["config"]})


def saved_config(directory: Path) -> RunConfig:
    """Return the settings a run was last trained with, as its checkpoints and changes have them.

    A run without a readable checkpoint has only its `config.toml`.
    Errors: as `config_at`.
    """
    path = directory / CHANGES
    for step, checkpoint in reversed(list_checkpoints(directory / CHECKPOINTS)):
        with contextlib.suppress(DamagedCheckpointError):
            facts = read_facts(checkpoint)
            values = settings_of(checkpoint, facts).model_dump(mode="json")
            for section, name, record in _read_changes(path, values):
                if record["step"] >= step:
                    values[section][name] = record["after"]
            return validate(RunConfig, {str(checkpoint): values})
    return read_run_config(directory)


def config_at(directory: Path, step: int) -> RunConfig:
    """Return the settings that update `step` of a run was made with, 1 for the first.

    Errors: ConfigError or ValueError naming the file, for one that was tampered with.
    """
    values = read_run_config(directory).model_dump(mode="json")
    path = directory / CHANGES
    for section, name, record in reversed(list(_read_changes(path, values))):
        if record["step"] >= step:
            values[section][name] = record["before"]
    return validate(RunConfig, {f"{path} at step {step}": values})


def _read_changes(path: Path, values: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield section and name of each changed setting, which `values` must have, and its record."""
    for _, record in read_records(path):
        section, _, name = str(record.get("setting")).partition(".")
        if name not in values.get(section, ()) or not {"before", "after"} <= record.keys():
            raise ValueError(f"{path}: {record} names no change of a setting; restore the file")
        yield section, name, record


def next_change(directory: Path, step: int) -> int | None:
    """Return the first step from `step` on after which settings were changed, if there is one."""
    steps = [record["step"] for _, record in read_records(directory / CHANGES)]
    return min((changed for changed in steps if changed >= step), default=None)


def logged_up_to(directory: Path) -> int:
    """Return the last step up to which the log has every step once, in order."""
    last = 0
    for _, record in read_records(directory / METRICS):
        if "validation_loss" not in record:
            if record["step"] != last + 1:
                break
            last += 1
    return last


def count_skipped(directory: Path, step: int) -> int:
    """Return how many steps in a row, up to and with `step`, were skipped as not finite."""
    in_a_row = 0
    for _, record in read_records(directory / METRICS):
        if record["step"] <= step and record.get("num_tokens"):
            in_a_row = in_a_row + 1 if record.get("skipped") else 0
    return in_a_row
