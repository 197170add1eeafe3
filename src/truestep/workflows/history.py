"""Which settings each step of a run was trained with, and which of them may change on the way.

`config.toml` holds the settings of now, `changes.jsonl` what was changed after which step.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from truestep.checkpoint.commit import DamagedCheckpointError, list_checkpoints
from truestep.checkpoint.state import read_facts
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.observe.log import METRICS, read_records
from truestep.settings import Config, ConfigError, Problem, Setting, settings, shown, validate
from truestep.storage import LOCAL, replace_file
from truestep.workflows.run import CHECKPOINTS, CONFIG, RunError, read_run_config

CHANGES = "changes.jsonl"
_FACTS = {"config": dict, "data_fingerprint": str, "torch": str, "machine": str}

_Change = tuple[str, str, dict[str, Any]]  # section, name and record


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


def record_changes(directory: Path, step: int, before: RunConfig, after: RunConfig) -> None:
    """Write down what changes of what is trained after `step`, durably, all of it or nothing.

    Changes of later steps, which a run that goes on from `step` makes again, count from `step` on.
    """
    path = directory / CHANGES
    found = [record for _, record in read_records(path)]
    records = [{**record, "step": min(record["step"], step)} for record in found]
    records += [
        {"step": step, "setting": setting.name, "before": old, "after": new}
        for setting, old, new in trajectory_changes(before, after)
    ]
    if records != found:
        lines = [f"{json.dumps(record, allow_nan=False)}\n" for record in records]
        replace_file(LOCAL, path, "".join(lines).encode("ascii"))


def forget_changes(directory: Path) -> None:
    """Remove what was changed on the way: a run that begins anew has none."""
    if (directory / CHANGES).exists():
        LOCAL.remove(directory / CHANGES)
        LOCAL.sync_directory(directory)


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
    return _saved(directory)[0]


def settings_now(directory: Path, say: Say) -> RunConfig:
    """Return the settings in a run's `config.toml`, brought up to date where a kill cut that off.

    A change stands in `changes.jsonl` first. So a setting that still is what it was before one that
    no checkpoint has yet is taken as changed, which is said; any other difference stays, for
    `refuse_changes` to find.
    Errors: as `config_at`.
    """
    config, (saved, changes) = read_run_config(directory), _saved(directory)
    values = config.model_dump(mode="json")
    for setting, last, found in trajectory_changes(saved, config):
        section, _, name = setting.name.partition(".")
        earlier = [r["before"] for where, key, r in changes if (where, key) == (section, name)]
        if values[section][name] in earlier:
            values[section][name] = last
            say(
                f"{directory / CONFIG} has {setting.name} still as {shown(found)}, but {CHANGES} "
                f"changed it to {shown(last)}, which is taken"
            )
    return validate(RunConfig, {str(directory / CONFIG): values})


def _saved(directory: Path) -> tuple[RunConfig, list[_Change]]:
    """Return the settings a run was last trained with, and the changes that no checkpoint has."""
    for step, checkpoint in reversed(list_checkpoints(directory / CHECKPOINTS)):
        with contextlib.suppress(DamagedCheckpointError):
            values = settings_of(checkpoint, read_facts(checkpoint)).model_dump(mode="json")
            since = [c for c in _read_changes(directory / CHANGES, values) if c[2]["step"] >= step]
            for section, name, record in since:
                values[section][name] = record["after"]
            return validate(RunConfig, {str(checkpoint): values}), since
    return read_run_config(directory), []


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


def _read_changes(path: Path, values: dict[str, Any]) -> Iterator[_Change]:
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
