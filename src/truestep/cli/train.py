"""`truestep train`."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from truestep.cli import say_when_interrupted
from truestep.cli.app import ARGUMENTS, RUNTIME, fail
from truestep.cli.options import RunOptions, given, say
from truestep.config import RunConfig, resolve
from truestep.settings import ConfigError, Problem, nearest, settings
from truestep.shell import command

if TYPE_CHECKING:
    from truestep.data.corpus import Say
    from truestep.distributed.process import Processes
    from truestep.workflows.train import Outcome

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
    processes: int = 1,
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
    processes
        Train in so many processes of this machine. On several machines, use torchrun: torchrun
        --nnodes 2 --nproc-per-node 8 ... -m truestep train CONFIG.
    options
        The settings.

    """
    explicit = given(options, data)
    allowed = _overridden(override, resume)
    chosen = resolve(explicit, os.environ, config)
    if processes < 1:
        raise ConfigError([Problem((), f"--processes={processes} must be at least 1")])

    from truestep.distributed.process import is_started_by_torchrun, meeting

    if processes > 1 and not is_started_by_torchrun():
        from truestep.distributed.launch import launch

        logs = Path(chosen.run.directory) / ".logs"
        return launch(processes, ARGUMENTS.get(), logs, lambda text: fail(text, RUNTIME))
    with meeting() as place, _silent_after_an_error(place):
        tell = say if place.rank == 0 else _say_nothing
        if place.rank:
            say_when_interrupted(None)
        found = place.from_first("resume", lambda: _run_to_go_on_with(resume, chosen, place))
        if found:
            return _go_on(Path(found), explicit, config, allowed, tell)
        from truestep.workflows.train import train as train_run

        return _conclude(train_run(chosen, tell), tell)


@contextlib.contextmanager
def _silent_after_an_error(place: "Processes") -> Iterator[None]:
    """Once one of several processes has failed, the launcher ends it: that is no news."""
    try:
        yield
    except Exception:
        if place.size > 1:
            say_when_interrupted(None)
        raise


def _say_nothing(_: str) -> None:
    """Leave speaking to the first process."""


def _run_to_go_on_with(resume: str | None, chosen: RunConfig, place: "Processes") -> str:
    """Return the directory of an existing run to go on with, or nothing for a new run."""
    from truestep.workflows.run import CONFIG, RunError, find_run

    restarted = place.recall("run")
    if restarted and (Path(restarted) / CONFIG).is_file():
        return restarted
    if resume is None:
        return ""
    try:
        return str(find_run(resume, chosen.run))
    except RunError as error:
        if resume != "auto":
            raise
        say(f"{error}; starting a new one")
        return ""


def _go_on(
    directory: Path,
    explicit: dict[str, Any],
    config: Path | None,
    allowed: frozenset[str],
    say: "Say",
) -> int:
    from truestep.workflows.history import settings_now
    from truestep.workflows.run import RunError
    from truestep.workflows.train import resume as resume_run

    say_when_interrupted(f"go on with: {command('train', '--resume', directory)}")
    if explicit.get("run", {}).get("name", directory.name) != directory.name:
        raise RunError(f"run.name cannot change in {directory}; leave it out, or move the run")
    base = settings_now(directory, say).model_dump(mode="json")
    chosen = resolve(explicit, os.environ, config, base)
    return _conclude(resume_run(chosen, directory, say, allowed), say)


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


def _conclude(outcome: "Outcome", say: "Say") -> int:
    """Say where everything lies and what to try next; return the exit code."""
    directory, stopped_by = outcome.directory, outcome.stopped_by
    if stopped_by is not None:
        say(f"stopped by {stopped_by} at step {outcome.step}; nothing is lost. Go on with:")
        say(f"  {command('train', '--resume', directory)}")
        known = stopped_by in signal.Signals.__members__  # else the signal was another process's
        return 128 + (signal.Signals[stopped_by] if known else signal.SIGTERM).value
    say(f"checkpoint  {directory}/checkpoints/step-{outcome.step}")
    say(f"plot        {directory}/plots/loss.png")
    say(f"report      {directory}/report.html")
    say("Try next:")
    say(f"  {command('sample', directory, '--tokens', '500')}")
    say(f"  {command('evaluate', directory)}")
    say(f"  {command('train', '--data', 'your.txt')}")
    return 0
