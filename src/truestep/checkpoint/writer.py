"""Save in the background: training goes on while one thread brings a checkpoint to the disk."""

import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from truestep.checkpoint.commit import Validation, commit_checkpoint
from truestep.checkpoint.snapshot import Resumable, Snapshot, take_snapshot
from truestep.storage import LOCAL, Storage, explain


class CheckpointWriter:
    """Saves checkpoints into `directory` from a thread of its own, at most one at a time.

    `save` copies the state in memory and returns; if the save of another step is still under way,
    it waits for that first. A checkpoint exists only once all of it is on the disk. What became of
    a save is told at the next step: give the writer to a trainer among its sinks, or call `check`.
    A save that fails is reported by `say` and training goes on; the older checkpoints are
    untouched. The error is raised after `max_failures` in a row, and by `close` if the last save
    failed.

    `before_commit` runs in the thread before each save, for what must be on the disk first.
    Memory: the saved state once more, from `save` until it is written.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        keep_best: int = 0,
        max_failures: int = 3,
        say: Callable[[str], object] = print,
        before_commit: Callable[[], object] = lambda: None,
        storage: Storage = LOCAL,
    ) -> None:
        self.directory = Path(directory)
        self._keep, self._keep_best, self._max_failures = keep, keep_best, max_failures
        self._say, self._before_commit, self._storage = say, before_commit, storage
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="truestep-checkpoint")
        self._in_flight: Future[Path] | None = None
        self._saved: tuple[object, ...] | None = None  # the mark of what is saved or in flight
        self._failures = 0
        self._error: OSError | None = None

    def save(
        self,
        trainer: Resumable,
        *,
        facts: Mapping[str, Any] = {},
        validation: Validation | None = None,
    ) -> None:
        """Copy the state and have it written; what is being or has been saved is left out at once.

        One that is under way may still fail: to have it tried again then, `wait` before.
        Errors: as `check`, of the save before; CheckpointError for state that cannot be saved.
        """
        self.check()
        mark = _mark(trainer)
        if mark == self._saved:
            return
        self.wait()
        snapshot = take_snapshot(trainer, facts, validation).staged()
        self._saved = mark
        self._in_flight = self._worker.submit(self._commit, snapshot)

    def check(self) -> None:
        """Report a save that has ended, without waiting for one that has not.

        Errors: OSError after `max_failures` failed saves in a row; CheckpointError at once, for a
        checkpoint of this step that is damaged or of another state.
        """
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is in flight. Errors: as `check`."""
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        try:
            in_flight.result()
        except OSError as error:
            self._saved = None  # this step may be tried again
            self._failures = min(self._failures + 1, self._max_failures)
            self._say(f"saving failed ({self._failures} of {self._max_failures}): {explain(error)}")
            gives_up = self._failures >= self._max_failures
            self._error = None if gives_up else error  # for `close`, unless a later save succeeds
            if gives_up:
                raise
        else:
            self._failures, self._error = 0, None

    def write(self, record: Mapping[str, Any]) -> None:
        """Do as `check`: what a trainer calls after each step. The record is not looked at."""
        self.check()

    def close(self) -> None:
        """Wait for the last save and end the thread.

        Errors: as `check`, and OSError if the last save failed.
        """
        try:
            self.wait()
            if self._error is not None:
                raise self._error
        finally:
            self._error = None
            self._worker.shutdown()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _commit(self, snapshot: Snapshot) -> Path:
        self._before_commit()
        return commit_checkpoint(
            self.directory,
            snapshot.step,
            snapshot.files(),
            snapshot.content,
            keep=self._keep,
            keep_best=self._keep_best,
            storage=self._storage,
        )


def _mark(trainer: Resumable) -> tuple[object, ...]:
    """Return what is equal for the same state of the same training, without reading that state.

    One training never comes to a step twice, unless something is loaded between: that writes to the
    parameters from outside, and torch counts such writes in their versions.
    """
    versions = [parameter._version for parameter in trainer.model.parameters()]
    return trainer.step, weakref.ref(trainer.model), versions
