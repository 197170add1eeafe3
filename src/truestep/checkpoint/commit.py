"""The protocol: after any fault the newest checkpoint is the old one or the new one, complete.

A checkpoint is a directory `step-N`, written under a `.tmp-` name and renamed once all of it is on
the medium. It is never changed afterwards: only renamed (`.bad-` when it proves damaged) or pruned.
"""

import errno
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from truestep.storage import (
    LOCAL,
    MANIFEST,
    TEMPORARY_PREFIX,
    DirectoryWriter,
    FileRecord,
    Storage,
    StorageError,
    read_file,
    read_manifest,
    temporary_path,
    verify_file,
)

FORMAT = "truestep checkpoint"
VERSION = 1

_MIN_KEEP = 2  # the newest, and one to go back to if it proves damaged
_BAD_PREFIX = ".bad-"
_STEP = re.compile("step-(0|[1-9][0-9]*)")
_HOLDER_LIMIT_BYTES = 4096
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR}


class CheckpointError(RuntimeError):
    """A checkpoint or its directory cannot be used as asked."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what it was when it was written, or never was one."""


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every committed checkpoint, oldest first, none of them verified."""
    if not directory.is_dir():
        return []
    matches = [(_STEP.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_checkpoint(
    directory: Path, say: Callable[[str], object], storage: Storage = LOCAL
) -> Path | None:
    """Return the newest checkpoint whose every file is what it was when written, or None.

    A damaged one is renamed to `.bad-step-N-…`, which `say` is told, and the next older one is
    tried. Errors: CheckpointError for an intact one of a format this version does not read.
    """
    damaged = False
    for _, path in reversed(list_checkpoints(directory)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            say(f"damaged checkpoint: {error}; {_set_aside(path, storage)}")
            damaged = True
            continue
        if damaged:
            say(f"using {path}, the newest intact checkpoint")
        return path
    if damaged:
        say(f"{directory}: no intact checkpoint is left")
    return None


def commit_checkpoint(
    directory: Path,
    step: int,
    files: Mapping[str, Iterable[Any]],
    content: Mapping[str, Any],
    *,
    keep: int,
    storage: Storage,
) -> Path:
    """Write `files` (name to byte-like chunks) as `directory/step-<step>` and return its path.

    `content` is what the manifest says beside the files. Afterwards older checkpoints than the
    `keep` newest are removed; those of later steps are not touched. If this very state has been
    committed it stays as it is, and nothing is written.

    Errors: OSError when the disk fails, and what was committed before is untouched;
    CheckpointError if another process writes here, or if there is a checkpoint of this step that
    is damaged or of another state.
    """
    if keep < _MIN_KEEP:
        raise ValueError(f"keep={keep} must be at least {_MIN_KEEP}: one to go back to")
    path = directory / f"step-{step}"
    manifest = {**content, "format": FORMAT, "version": VERSION, "step": step}
    with RunLock(directory):
        for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):  # of writers that died
            storage.remove(leftover)
        if os.path.lexists(path):
            verify_checkpoint(path)
            _require_same_files(path, files)
            storage.sync_directory(directory)  # its own save may have died before this
        else:
            with DirectoryWriter(path, storage) as writer:
                for name, chunks in files.items():
                    writer.write(name, chunks)
                writer.commit(manifest)
        _prune(
            [old for number, old in list_checkpoints(directory) if number <= step][:-keep], storage
        )
    return path


def _require_same_files(path: Path, files: Mapping[str, Iterable[Any]]) -> None:
    """Refuse to take the state of another training for this one."""
    _, records = read_checkpoint_manifest(path)
    for name, chunks in files.items():
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        if records[name].sha256 != digest.hexdigest():
            raise CheckpointError(
                f"{path} holds another state of this step (its {name} differs); save into "
                "another directory, or remove it"
            )


def _prune(checkpoints: Sequence[Path], storage: Storage) -> None:
    """Remove checkpoints so that, half removed, none looks like one even after a power loss."""
    for path in checkpoints:
        doomed = temporary_path(path)
        storage.rename(path, doomed)
        storage.sync_directory(path.parent)
        storage.remove(doomed)


def verify_checkpoint(path: Path) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Errors: DamagedCheckpointError naming the file, what was expected and what was found;
    CheckpointError for a format that this version does not read.
    """
    _, files = read_checkpoint_manifest(path)
    with damage_named():
        for name, record in files.items():
            verify_file(path / name, record)


def read_checkpoint_manifest(path: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """Return a checkpoint's manifest and the records of its files, which are not read.

    Errors: as `verify_checkpoint`.
    """
    with damage_named():
        if path.is_symlink() or not path.is_dir():
            raise StorageError(f"{path}: not a checkpoint directory")
        entries = {entry.name: entry for entry in os.scandir(path)}
        for name, entry in entries.items():
            if not entry.is_file(follow_symlinks=False):
                raise StorageError(f"{path / ascii(name)}: not a regular file")
        manifest, files = read_manifest(path)
        if unlisted := sorted(entries.keys() - files.keys() - {MANIFEST}):
            raise StorageError(f"{path}: {unlisted[0]!a} is not in {MANIFEST}")
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path / MANIFEST}: expected {FORMAT!r} version {VERSION}, found {found[0]!a} "
            f"version {found[1]!a}; read it with the truestep that wrote it"
        )
    step, match = manifest.get("step"), _STEP.fullmatch(path.name)
    if type(step) is not int or step < 0 or (match and step != int(match[1])):
        raise DamagedCheckpointError(f"{path / MANIFEST}: step {step!a} is not that of {path.name}")
    return manifest, files


@contextmanager
def damage_named() -> Iterator[None]:
    """Turn what storage finds wrong with a file into a DamagedCheckpointError."""
    try:
        yield
    except StorageError as error:
        raise DamagedCheckpointError(str(error)) from None


def _set_aside(path: Path, storage: Storage) -> str:
    """Rename a damaged checkpoint and return what was done, for a message."""
    target = path.with_name(f"{_BAD_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        storage.rename(path, target)
    except OSError as error:  # a read-only run can still be resumed from an older one
        return f"it cannot be set aside: {error.strerror or error}"
    return f"set aside as {target.name}"


class RunLock:
    """Keeps every other process out of a directory, from entering to leaving.

    One process may enter again while it is inside. A process that dies leaves it, however it dies.

    Errors: CheckpointError at once, naming the holder, if another process is inside, and for a
    directory that cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._holder = directory / ".lock.json"
        self._lock: FileLock | None = None
        self._outermost = False

    def __enter__(self) -> "RunLock":
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
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            raise CheckpointError(
                f"{self.directory} cannot be written: {error.strerror}; "
                "choose a directory you may write to"
            ) from None
        if self._outermost:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
            try:
                self._holder.write_text(json.dumps(holder), encoding="utf-8")
            except OSError:
                self._lock.release()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outermost:
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
