"""Where what is prepared lies until all of it is done: beside its target, under a hidden name."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from truestep.data.corpus import Say
from truestep.data.documents import TextFile
from truestep.data.formats import stat_of
from truestep.storage import (
    TEMPORARY_PREFIX,
    Storage,
    StorageError,
    discard,
    read_file,
    replace_file,
    temporary_path,
    unfinished,
)

OUT = f"{TEMPORARY_PREFIX}out"
"""What becomes the target, in a workplace."""

_JOB = "job.json"
_LOCK = ".lock"


@contextmanager
def fresh_place(target: Path, storage: Storage) -> Iterator[Path]:
    """Yield a new directory beside `target` that is removed on leaving."""
    place = temporary_path(target)
    try:
        storage.make_directory(place)
        with unfinished(place):
            yield place
    finally:
        discard(storage, place)


@contextmanager
def kept_place(target: Path, storage: Storage, job: dict[str, Any], say: Say) -> Iterator[Path]:
    """Yield a directory beside `target` that stays until it is left without an error.

    What a process that died has left there is found again, if its `job` was the same; else it is
    removed. Errors: StorageError if another process is in it.
    """
    place = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-begun")
    storage.make_directory(place)
    lock = FileLock(place / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise StorageError(
            f"{target}: another process is preparing it; wait for it or name another directory"
        ) from None
    try:
        _take_up(place, storage, json.dumps(job, sort_keys=True).encode(), say)
        try:
            yield place
        except Exception:
            say(f"what was done stays in {str(place)!r}; the same command goes on from there")
            raise
        discard(storage, place)
    finally:
        lock.release()


def _take_up(place: Path, storage: Storage, job: bytes, say: Say) -> None:
    """Leave in `place` what belongs to this job alone."""
    others = [path for path in place.iterdir() if path.name != _LOCK]
    if (place / _JOB).is_file() and read_file(place / _JOB) == job:
        say(f"going on with what lies in {str(place)!r}")
        others = [p for p in others if p.name.startswith(TEMPORARY_PREFIX) and p.name != OUT]
    elif others:
        say(f"beginning anew: text or settings are not those of {str(place)!r}")
    for path in others:
        storage.remove(path)
    if not (place / _JOB).is_file():
        replace_file(storage, place / _JOB, job)


def identity(files: list[TextFile]) -> str:
    """Return a hash that changes with names, forms, sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        status = stat_of(file.path)
        entry = [file.name, file.form, str(file.path), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()
