"""Compute steps of a run once more, and compare them with its log bit for bit."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from truestep.checkpoint.bundle import load_bundle, read_batch
from truestep.checkpoint.commit import DamagedCheckpointError, list_checkpoints
from truestep.checkpoint.state import load_checkpoint, read_facts
from truestep.data.corpus import Say
from truestep.observe.log import METRICS, read_records
from truestep.observe.sinks import as_json
from truestep.runtime import configure_process
from truestep.training.diagnosis import NonFiniteError
from truestep.workflows.build import (
    Training,
    build,
    build_trainer,
    say_what_changed,
)
from truestep.workflows.history import config_at, count_skipped, next_change, settings_of
from truestep.workflows.run import CHECKPOINTS, RunError, read_run_facts
from truestep.workflows.sources import require_same_data

# What must have the same bits; the rest of a record depends on the clock.
_COMPARED = ("batch_hash", "learning_rate", "num_tokens", "loss", "grad_norm", "skipped")
_SECONDS_BETWEEN_LINES = 5.0


class Difference(NamedTuple):
    """The first thing of a step that is not as it was logged."""

    step: int
    field: str
    logged: Any
    replayed: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.field} was {self.logged} and is now {self.replayed}"


class _Collector:
    """A sink that keeps records and says now and then how far it is."""

    def __init__(self, last: int, say: Say) -> None:
        self.records: dict[int, Mapping[str, Any]] = {}
        self._last, self._say, self._told = last, say, time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        self.records[record["step"]] = record
        if time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._say(f"  step {record['step']} of {self._last}")

    def close(self) -> None:
        pass


def replay(directory: Path, first: int, last: int, say: Say) -> list[Difference]:
    """Recompute steps `first` to `last` of a run from the nearest checkpoint; nothing is written.

    Returns the first difference of each step that is not as it was logged.
    Errors: RunError for steps that the run has not made, or made under several settings.
    """
    logged = logged_steps(directory)
    for step in (first, last):
        require_logged(logged, directory, step)
    if first > last:
        raise RunError(f"--to {last} is before --step {first}; use a later step")
    if (change := next_change(directory, first)) is not None and change < last:
        raise RunError(
            f"settings were changed after step {change}; replay up to it with --to {change}, and "
            f"from --step {change + 1} on by itself"
        )
    training = training_at(directory, first - 1, say)
    say(f"recomputing steps {training.trainer.step + 1} to {last}")
    replayed = run_to(training, last, say)
    differences = [
        difference
        for step in range(first, last + 1)
        if (difference := compare(logged[step], replayed[step])) is not None
    ]
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    if differences:
        say(f"{steps}: {len(differences)} differ, the first one thus:")
        say(f"  {differences[0]}")
    else:
        say(f"{steps}: batch, learning rate, loss and gradient norm have the logged bits")
    return differences


def replay_bundle(path: Path, say: Say) -> list[Difference]:
    """Recompute the step of a forensic bundle, say where it goes wrong, and compare.

    Errors: RunError for a directory that is none.
    """
    facts = read_facts(path)
    if not all(isinstance(facts.get(name), dict) for name in ("config", "metrics", "diagnosis")):
        raise RunError(
            f"{path} was not written by truestep train: it has no settings to build a model from; "
            "load it in Python, by load_bundle"
        )
    config = settings_of(path, facts)
    configure_process(config.run.threads)
    _, trainer = build_trainer(config)
    trainer.prepare(read_batch(path))
    batch, _ = load_bundle(path, trainer)
    diagnosis = trainer.diagnose(batch)
    metrics = trainer.training_step(batch)
    say(f"step {metrics.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}")
    say(f"  then: {facts['diagnosis'].get('text')}")
    say(f"  now:  {diagnosis}")
    difference = compare(facts["metrics"], metrics.as_record())
    say(f"  {difference}" if difference else "  the same bits as in the run")
    return [difference] if difference else []


def compare(logged: Mapping[str, Any], replayed: Mapping[str, Any]) -> Difference | None:
    """Return the first value that is not, to the last bit, what was logged."""
    for field in _COMPARED:
        now = as_json(replayed.get(field))
        if repr(logged.get(field)) != repr(now):
            return Difference(replayed["step"], field, logged.get(field), now)
    return None


def logged_steps(directory: Path) -> dict[int, dict[str, Any]]:
    """Return the log's record of each update."""
    records = (record for _, record in read_records(directory / METRICS))
    return {record["step"]: record for record in records if "validation_loss" not in record}


def training_at(directory: Path, step: int, say: Say) -> Training:
    """Return a run at its nearest checkpoint up to `step`, for `run_to` to bring it on from there.

    Without a checkpoint it has its initial weights. Nothing in the run's directory changes.
    Errors: RunError where settings were changed between every checkpoint and the step.
    """
    training = build(config_at(directory, step + 1), directory.parent, say, directory, trains=False)
    trainer = training.trainer
    facts = training.facts
    require_same_data(read_run_facts(directory), facts)
    before = [found for found in list_checkpoints(directory / CHECKPOINTS) if found[0] <= step]
    for _, path in reversed(before):
        try:
            saved = load_checkpoint(path, trainer)
        except DamagedCheckpointError as error:
            say(f"{error}; trying the checkpoint before it")
            continue
        settings_of(path, saved)
        require_same_data(saved, facts)
        say_what_changed(saved, training.facts, say)
        say(f"starting from {path}")
        break
    else:
        reason = "every checkpoint before is damaged" if before else "no checkpoint comes before"
        say(f"starting from the initial weights: {reason}")
    change = next_change(directory, trainer.step + 1)
    if change is not None and change <= step:
        raise RunError(
            f"settings were changed after step {change}, and no checkpoint from there to step "
            f"{step} is left; choose a step up to {change}, or one after the next checkpoint"
        )
    trainer.skipped_in_a_row = count_skipped(directory, trainer.step)
    return training


def run_to(training: Training, step: int, say: Say) -> dict[int, Mapping[str, Any]]:
    """Train up to a step and return the record of each, the last one perhaps not finite."""
    collector = _Collector(step, say)
    training.trainer.sinks = [collector]
    try:
        if training.trainer.step < step:
            training.trainer.fit(training.loader, num_steps=step)
    except NonFiniteError:
        if step not in collector.records:
            raise
    return collector.records


def require_logged(logged: dict[int, dict[str, Any]], directory: Path, step: int) -> dict[str, Any]:
    """Return the log's record of a step. Errors: RunError for a step that it does not have."""
    if step not in logged:
        first, last = min(logged, default=0), max(logged, default=-1)
        whole = "steps" if len(logged) == last - first + 1 else f"{len(logged)} of the steps"
        has = f"it has {whole} {first} to {last}" if logged else "it has no steps"
        raise RunError(f"step {step} is not in the log of {directory}: {has}")
    return logged[step]
