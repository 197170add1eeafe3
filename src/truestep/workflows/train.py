"""Train a model from settings: the data, model, trainer and companions of one run."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from truestep.observe.log import METRICS
from truestep.observe.page import write_report
from truestep.observe.plots import draw_plots
from truestep.observe.sinks import as_json
from truestep.shell import command
from truestep.storage import DISK_FULL, StorageError, explain
from truestep.training.diagnosis import NonFiniteError
from truestep.training.trainer import Trainer
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
from truestep.workflows.session import Session
from truestep.workflows.sources import epochs_text, require_same_data

_ONE_SIGNAL_SECONDS = 1.0  # the same signal again within these is the same wish, sent twice


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
    check_room(config, directory)
    return _train(config, directory, say)


def _train(config: RunConfig, existing: Path | None, say: Say) -> Outcome:
    """Train in an existing run's directory, or in a new one."""
    runs = existing.parent if existing else Path(config.run.directory)
    training = build(config, runs, say, existing)
    trainer = training.trainer
    with _stopped_by_signals(trainer), contextlib.ExitStack() as stack:
        directory = existing or claim_directory(config.run, config.data.sources)
        training = training.named(directory.name)
        stack.enter_context(RunLock(directory))
        if existing is not None:
            _go_on(training, directory, say)
        write_run_files(directory, training.config, training.facts, training.data.tokenizer)
        session = stack.enter_context(Session(directory, training))
        pin_memory = trainer.device.type == "cuda"
        batches = stack.enter_context(Prefetch(training.loader, pin_memory=pin_memory))
        try:
            session.catch_up()
            with memory_explained(trainer, training.loader.batch_at(0), directory):
                trainer.fit(batches)
        except Exception as error:
            _save_what_is_left(session, directory, error)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                remedy = f"make room, then go on with: {command('train', '--resume', directory)}"
                raise StorageError(f"{error}; {remedy}") from None
            raise
        session.save()
        session.close()
        if len(training.data.prepared) > 1:
            say(epochs_text(training.loader, trainer.step))
        if trainer.step:
            draw_plots(directory)
            write_report(directory)
    stopped = trainer.stop_reason if trainer.step < trainer.config.num_steps else None
    return Outcome(directory, trainer.step, stopped)


def _save_what_is_left(session: Session, directory: Path, error: Exception) -> None:
    """Write a bundle, the last whole step and the log; what fails is said: `error` is to be told.

    Nothing is saved in the middle of an update.
    """
    training, say = session.training, session.display.say
    trainer = training.trainer
    tasks: list[Callable[[], object]] = []
    if isinstance(error, NonFiniteError):
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
    metrics = {name: as_json(value) for name, value in error.metrics.as_record().items()}
    diagnosis = {**error.diagnosis.as_record(), "text": str(error.diagnosis)}
    facts = {**training.saved_facts(), "metrics": metrics, "diagnosis": diagnosis}
    bundle = save_bundle(training.trainer, error.batch, directory / BUNDLES, facts=facts)
    say(f"{bundle} holds that step; see it again with:")
    say(f"  {command('replay', bundle)}")


def _go_on(training: Training, directory: Path, say: Say) -> None:
    """Load the newest good checkpoint; a run that was stopped before its first begins anew."""
    trainer, facts, checkpoints = training.trainer, training.facts, directory / CHECKPOINTS
    facts["started"] = read_run_facts(directory).get("started", facts["started"])
    newest = newest_checkpoint(checkpoints, say)
    if newest is not None:
        saved = load_checkpoint(newest, trainer)
        require_same_data(saved, facts)
        say_what_changed(saved, facts, say)
        record_changes(directory, trainer.step, saved_config(directory), training.config)
        trainer.skipped_in_a_row = count_skipped(directory, trainer.step)
        say(f"going on from {newest}")
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
    else:  # it begins anew
        forget_changes(directory)


@contextlib.contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end `fit` after its step; a second one leaves at once.

    The same one twice within a second counts once: `timeout make train` sends it to the whole
    process group, and make passes it on; a closed terminal and its shell both hang up.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        numbers.append(signal.SIGHUP)
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def stop(number: int, _: object) -> None:
        if trainer.stop_reason is None:
            trainer.stop(signal.Signals(number).name)
            with contextlib.suppress(OSError):  # the terminal itself may be what has gone
                os.write(
                    2, b"\nstopping after this step; once more, a second later, leaves at once\n"
                )

    before = [signal.signal(number, stop) for number in numbers]
    before_told = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    # Handlers wait for the main thread to come out of a long product; this thread does not.
    leaving = threading.Thread(target=_leave_at_the_second, args=(heard, numbers), daemon=True)
    leaving.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_told)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        os.write(told, bytes(1))  # no signal: the thread ends, whoever else has the pipe
        leaving.join()
        os.close(told)
        os.close(heard)


def _leave_at_the_second(heard: int, numbers: list[signal.Signals]) -> None:
    """Read signals as they come, and leave at the second, unless it is the first one sent twice."""
    first, since = None, 0.0
    while number := os.read(heard, 1)[0]:
        now = time.monotonic()
        if number not in numbers:
            continue
        if first is None:
            first, since = number, now
        elif number != first or now - since > _ONE_SIGNAL_SECONDS:
            os._exit(128 + number)
