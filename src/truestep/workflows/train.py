"""Train a model from settings: the data, model, trainer and companions of one run."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from truestep.checkpoint.bundle import save_bundle
from truestep.checkpoint.commit import newest_checkpoint
from truestep.checkpoint.lock import RunLock
from truestep.checkpoint.state import load_checkpoint
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.data.loader import Prefetch
from truestep.distributed import process
from truestep.distributed.pulse import ProcessLostError, Pulse
from truestep.observe.log import METRICS
from truestep.observe.page import write_report
from truestep.observe.plots import draw_plots
from truestep.observe.sinks import as_json
from truestep.shell import command
from truestep.storage import DISK_FULL, StorageError, explain
from truestep.training.diagnosis import NonFiniteError
from truestep.workflows.build import Training, build, say_what_changed
from truestep.workflows.history import (
    count_skipped,
    forget_changes,
    logged_up_to,
    record_changes,
    refuse_changes,
    saved_config,
)
from truestep.workflows.memory import memory_explained
from truestep.workflows.run import (
    BUNDLES,
    CHECKPOINTS,
    RunError,
    check_new_run,
    check_room,
    claim_directory,
    read_run_facts,
    write_run_files,
)
from truestep.workflows.session import Follower, Session
from truestep.workflows.signals import stopped_by_signals
from truestep.workflows.sources import epochs_text, require_same_data


@dataclass(frozen=True)
class Outcome:
    """How a training session ended; `stopped_by` names the signal, if it was one."""

    directory: Path
    step: int
    stopped_by: str | None


def train(config: RunConfig, say: Say) -> Outcome:
    """Train a new run.

    Nothing is written into its directory before data, model and first batch have proved good.
    Errors: ValueError or OSError of one line; NonFiniteError after the run was saved.
    """
    if process.current().rank == 0:
        check_new_run(config.run)
        check_room(config, Path(config.run.directory))
    return _train(config, None, say)


def resume(
    config: RunConfig, directory: Path, say: Say, override: frozenset[str] = frozenset()
) -> Outcome:
    """Go on with a run from its newest good checkpoint, bit for bit.

    Errors: ConfigError for settings that would change the trained bits and are not in `override`.
    """
    refuse_changes(saved_config(directory), config, override)
    if process.current().rank == 0:
        check_room(config, directory)
    return _train(config, directory, say)


def _train(config: RunConfig, existing: Path | None, say: Say) -> Outcome:
    """Train in an existing run's directory, or in a new one."""
    runs = existing.parent if existing else Path(config.run.directory)
    training = build(config, runs, say, existing)
    trainer, place = training.trainer, training.trainer.processes

    def claimed() -> str:
        directory = existing or claim_directory(config.run, config.data.sources)
        place.remember("run", str(directory))
        return str(directory)

    with (
        stopped_by_signals(trainer, speaks=place.rank == 0),
        contextlib.ExitStack() as stack,
    ):
        directory = Path(place.from_first("directory", claimed))
        training = training.named(directory.name)
        if place.rank == 0:
            stack.enter_context(RunLock(directory))
        if existing is not None:
            _go_on(training, directory, say)
        if place.rank == 0:
            write_run_files(directory, training.config, training.facts, training.data.tokenizer)
        pulse = stack.enter_context(_pulse(training, directory))
        session = stack.enter_context((Follower if place.rank else Session)(directory, training))
        pin_memory = trainer.device.type == "cuda"
        batches = stack.enter_context(Prefetch(training.loader, pin_memory=pin_memory))
        try:
            session.catch_up()
            with memory_explained(trainer, training.loader.batch_at(0), directory):
                trainer.fit(batches)
        except Exception as error:
            trainer.stop("an error")
            theirs = pulse.explain() if isinstance(error, RuntimeError) else None
            _save_what_is_left(session, directory, error)
            if theirs is not None:
                raise ProcessLostError(_without_others(theirs, trainer.step, directory)) from error
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                remedy = f"make room, then go on with: {command('train', '--resume', directory)}"
                raise StorageError(f"{error}; {remedy}") from None
            raise
        session.save()
        session.close()
        if len(training.data.prepared) > 1:
            say(epochs_text(training.loader, trainer.step))
        if trainer.step and place.rank == 0:
            draw_plots(directory)
            write_report(directory)
    stopped = trainer.stop_reason if trainer.step < trainer.config.num_steps else None
    return Outcome(directory, trainer.step, stopped)


def _pulse(training: Training, directory: Path) -> Pulse:
    """Return what ends this process, as its main thread may never, when another is silent."""

    def leave(text: str) -> None:
        line = f"error: {_without_others(text, training.trainer.step, directory)}\n"
        os.write(2, line.encode("ascii", "backslashreplace"))
        os._exit(1)

    timeout = training.config.run.process_timeout_seconds
    return Pulse(training.trainer.processes, timeout, leave)


def _without_others(what: str, step: int, directory: Path) -> str:
    remedy = command("train", "--resume", directory)
    return f"{what}; training ended at step {step}: go on with: {remedy}"


def _save_what_is_left(session: Session, directory: Path, error: Exception) -> None:
    """Write a bundle, the last whole step and the log; what fails is said: `error` is to be told.

    Nothing is saved in the middle of an update.
    """
    training, say = session.training, session.say
    trainer = training.trainer
    tasks: list[Callable[[], object]] = []
    if isinstance(error, NonFiniteError) and trainer.processes.rank == 0:
        tasks.append(partial(_write_bundle, training, directory, error, say))
    if trainer.step and not trainer.mid_update:
        if all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters()):
            tasks.append(session.save)
        else:
            say(
                f"the parameters of step {trainer.step} are not finite and are not saved; lower "
                "training.learning_rate"
            )
    for task in (*tasks, session.close):
        try:
            task()
        except (OSError, RuntimeError, MemoryError) as failed:  # CheckpointError is one
            say(f"then this failed, too: {explain(failed)}")


def _write_bundle(training: Training, directory: Path, error: NonFiniteError, say: Say) -> None:
    """Write down a step that was not finite, so that it can be seen again."""
    trainer, batch, diagnosis = training.trainer, error.batch, error.diagnosis
    if trainer.processes.size > 1:  # whose batch it was, is not known yet
        batch = training.loader.batch_at(trainer.step)
        diagnosis = trainer.diagnose(batch)
    metrics = {name: as_json(value) for name, value in error.metrics.as_record().items()}
    told = {**diagnosis.as_record(), "text": str(diagnosis)}
    facts = {**training.saved_facts(), "metrics": metrics, "diagnosis": told}
    bundle = save_bundle(trainer, batch, directory / BUNDLES, facts=facts)
    say(f"{bundle} holds that step; see it again with:")
    say(f"  {command('replay', bundle)}")


def _go_on(training: Training, directory: Path, say: Say) -> None:
    """Load the newest good checkpoint; a run that was stopped before its first begins anew."""
    trainer, facts, checkpoints = training.trainer, training.facts, directory / CHECKPOINTS
    facts["started"] = read_run_facts(directory).get("started", facts["started"])
    place = trainer.processes
    found = place.from_first("checkpoint", lambda: str(newest_checkpoint(checkpoints, say) or ""))
    if found:
        saved = load_checkpoint(Path(found), trainer)
        require_same_data(saved, facts)
        say_what_changed(saved, facts, say)
        if place.rank == 0:
            record_changes(directory, trainer.step, saved_config(directory), training.config)
        trainer.skipped_in_a_row = count_skipped(directory, trainer.step)
        say(f"going on from {found}")
        logged = logged_up_to(directory)
        if logged < trainer.step:
            say(
                f"{directory / METRICS} is damaged: it lacks steps from {logged + 1} on, of "
                f"{trainer.step}; they stay lost to plots, replay and inspect"
            )
        if trainer.step >= trainer.config.num_steps:
            say(
                f"there is nothing left to train: it is at step {trainer.step} of "
                f"{trainer.config.num_steps}; for more, add --training.num-steps N"
                + (
                    ""
                    if trainer.config.schedule == "constant"
                    else " --override training.num_steps (its learning rates depend on it)"
                )
            )
    elif any(checkpoints.glob(".bad-*")):
        raise RunError(
            f"{directory} has no intact checkpoint left to go on from; start a new run, or "
            f"remove {checkpoints} to train this one again from its first step"
        )
    elif place.rank == 0:  # it begins anew
        forget_changes(directory)
