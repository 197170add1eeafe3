"""`truestep train`."""

import os
import signal
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from truestep.cli import say_when_interrupted
from truestep.cli.options import RunOptions, given, say
from truestep.config import RunConfig, resolve
from truestep.settings import ConfigError, Problem, nearest, settings
from truestep.shell import command

_NO_OPTIONS = RunOptions()


def train(
    config: Path | None = None,
    /,
    *,
    data: Annotated[
        tuple[str, ...], Parameter(alias="-d", negative_iterable=(), show_default=False)
    ] = (),
    resume: str | None = None,
    override: Annotated[tuple[str, ...], Parameter(negative_iterable=())] = (),
    options: Annotated[RunOptions, Parameter(name="*", negative_iterable=())] = _NO_OPTIONS,
) -> int:
    """Train a model on text, or go on with a run.

    Every setting below may stand in the config file, in the environment (as
    TRUESTEP_TRAINING__LEARNING_RATE) or on the command line; the later wins.

    Parameters
    ----------
    config
        A TOML or JSON file of settings.
    data
        What to train on: a text file, a directory, or a built-in corpus. Short for --data.source;
        several, each with a --data of its own, are mixed by --data.weights.
    resume
        Go on with a run: its directory, or auto for the newest one (a new run, if there is none).
    override
        A setting that may change what is trained when a run goes on, such as training.seed; once
        for each.
    options
        The settings.

    """
    explicit = given(options, data)
    allowed = _overridden(override, resume)
    chosen = resolve(explicit, os.environ, config)

    from truestep.workflows.history import settings_now
    from truestep.workflows.run import RunError, find_run
    from truestep.workflows.train import resume as resume_run
    from truestep.workflows.train import train as train_run

    directory = None
    if resume is not None:
        try:
            directory = find_run(resume, chosen.run)
        except RunError as error:
            if resume != "auto":
                raise
            say(f"{error}; starting a new one")
    if directory is None:
        outcome = train_run(chosen, say)
    else:
        say_when_interrupted(f"go on with: {command('train', '--resume', directory)}")
        if explicit.get("run", {}).get("name", directory.name) != directory.name:
            raise RunError(f"run.name cannot change in {directory}; leave it out, or move the run")
        base = settings_now(directory, say).model_dump(mode="json")
        chosen = resolve(explicit, os.environ, config, base)
        outcome = resume_run(chosen, directory, say, allowed)
    return _conclude(outcome.directory, outcome.step, outcome.stopped_by)


def _overridden(override: tuple[str, ...], resume: str | None) -> frozenset[str]:
    """Return the settings that may change, by name. Errors: ConfigError for one that is none."""
    known = [setting.name for setting in settings(RunConfig)]
    names = frozenset(name.replace("-", "_") for name in override)
    for name in sorted(names.difference(known)):
        text = f"--override {name} names no setting{nearest(name, known)}"
        raise ConfigError([Problem((), text)])
    if names and resume is None:
        text = "--override allows a change when a run goes on; give --resume, too"
        raise ConfigError([Problem((), text)])
    return names


def _conclude(directory: Path, step: int, stopped_by: str | None) -> int:
    """Say where everything lies and what to try next; return the exit code."""
    if stopped_by is not None:
        say(f"stopped by {stopped_by} at step {step}; nothing is lost. Go on with:")
        say(f"  {command('train', '--resume', directory)}")
        return 128 + signal.Signals[stopped_by].value
    say(f"checkpoint  {directory}/checkpoints/step-{step}")
    say(f"plot        {directory}/plots/loss.png")
    say(f"report      {directory}/report.html")
    say("Try next:")
    say(f"  {command('sample', directory, '--tokens', '500')}")
    say(f"  {command('evaluate', directory)}")
    say(f"  {command('train', '--data', 'your.txt')}")
    return 0
