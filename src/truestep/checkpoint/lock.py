"""One process at a time in a run: a lock that dies with its holder, and the holder's name."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from truestep.storage import LOCAL, read_file

_HOLDER_LIMIT_BYTES = 4096
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR}


class CheckpointError(RuntimeError):
    """A checkpoint or its directory cannot be used as asked."""


@contextmanager
def unwritable_named(directory: Path) -> Iterator[None]:
    """Turn the refusal to write into a directory into a CheckpointError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise CheckpointError(
            f"{directory} cannot be written: {error.strerror}; choose a directory you may write to"
        ) from None


class RunLock:
    """A `DirectoryLock` for all of a run: a directory that cannot be written is a CheckpointError.

    At its beginning the user can choose another; later it is a disk that fails, and OSError.
    """

    def __init__(self, directory: Path) -> None:
        self._lock = DirectoryLock(directory)

    def __enter__(self) -> "RunLock":
        with unwritable_named(self._lock.directory):
            self._lock.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.__exit__(*exception)


class DirectoryLock:
    """Keeps every other process out of a directory, from entering to leaving.

    One process may enter again while it is inside. A process that dies leaves it, however it dies.

    Errors: CheckpointError at once, naming the holder, if another process is inside; OSError for a
    directory that cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._holder = directory / ".lock.json"
        self._lock: FileLock | None = None
        self._outermost = False

    def __enter__(self) -> "DirectoryLock":
        try:
            LOCAL.make_directory(self.directory)
            # One lock object for all of this process, so that entering again is counted.
            self._lock = FileLock(
                self.directory.resolve() / ".lock", thread_local=False, is_singleton=True
            )
            self._outermost = not self._lock.is_locked
            self._lock.acquire(blocking=False)
        except Timeout:
            raise CheckpointError(
                f"{self.directory} is in use by {self._name_holder()}; "
                "wait for it, stop it or choose another directory"
            ) from None
        if self._outermost:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
            try:
                self._holder.unlink(missing_ok=True)  # a link there is not written through
                with self._holder.open("x", encoding="utf-8") as file:
                    json.dump(holder, file)
            except OSError:
                self._lock.release()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outermost:
            with suppress(OSError):  # nobody reads it while nobody is inside
                self._holder.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()

    def _name_holder(self) -> str:
        """Return who is inside, as the file beside the lock says; it may be a moment behind."""
        try:
            holder = json.loads(read_file(self._holder, limit=_HOLDER_LIMIT_BYTES))
            text = f"process {holder['pid']} on {holder['host']} since {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"
        return text if text.isprintable() else "another process"
