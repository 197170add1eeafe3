"""The protocol: after any fault the newest checkpoint is the old one or the new one, complete.

A checkpoint is a directory `step-N`, written under a `.tmp-` name and renamed once all of it is on
the medium. It is never changed afterwards: only renamed (`.bad-` when it proves damaged) or pruned.
"""

import hashlib
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from truestep.checkpoint.lock import CheckpointError, DirectoryLock
from truestep.manifest import MANIFEST, DirectoryWriter, OtherVersionError, read_manifest
from truestep.storage import (
    LOCAL,
    TEMPORARY_PREFIX,
    FileRecord,
    Storage,
    StorageError,
    temporary_path,
    verify_file,
)

FORMAT = "truestep checkpoint"
VERSION = 2  # 1 had neither seals nor checksums of blocks

_MIN_KEEP = 2  # the newest, and one to go back to if it proves damaged
_BAD_PREFIX = ".bad-"
_STEP = re.compile("step-(0|[1-9][0-9]*)")
_SAVING = threading.Lock()  # its lock lets a process in twice; a save under way is no leftover


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what it was when it was written, or never was one."""


class Validation(NamedTuple):
    """What a model was measured at when it was saved: finite, comparable over the same tokens."""

    loss: float
    num_tokens: int


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
    tried. Errors: CheckpointError for one that says it is of a format this version does not read.
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


def best_checkpoints(paths: Sequence[Path], count: int) -> list[Path]:
    """Return the `count` checkpoints of least validation loss, the best first, the older of equals.

    Losses compare over the same tokens only: those that the last validated one of `paths` has.
    """
    *_, newest = [[], *_ranked(paths)]
    return newest[:count]


def _ranked(paths: Sequence[Path]) -> list[list[Path]]:
    """Return checkpoints from best to worst, a list for each number of tokens they compare over.

    The last list is that of the last validated one of `paths`.
    """
    groups: dict[int, list[tuple[float, int, Path]]] = {}
    for number, path in enumerate(paths):
        if validation := validation_of(path):
            group = groups.pop(validation.num_tokens, [])
            groups[validation.num_tokens] = [*group, (validation.loss, number, path)]
    return [[path for _, _, path in sorted(group)] for group in groups.values()]


def validation_of(path: Path) -> Validation | None:
    """Return what a checkpoint's manifest says of its validation loss, None if nothing sound."""
    try:
        manifest, _ = read_checkpoint_manifest(path)
        validation = Validation(**manifest["validation"])
    except (CheckpointError, KeyError, TypeError):
        return None
    sound = type(validation.loss) is float and type(validation.num_tokens) is int
    return validation if sound and math.isfinite(validation.loss) else None


def commit_checkpoint(
    directory: Path,
    step: int,
    files: Mapping[str, Iterable[Any]],
    content: Mapping[str, Any],
    *,
    keep: int,
    keep_best: int = 0,
    storage: Storage = LOCAL,
) -> Path:
    """Write `files` (name to byte-like chunks) as `directory/step-<step>` and return its path.

    `content` is what the manifest says beside the files; its `validation` ranks the checkpoint.
    Afterwards those that are neither among the `keep` newest nor the `keep_best` best over the same
    tokens are removed, those of later steps excepted; what the disk does not let go is tried again
    at the next save. If this very state has been committed it stays, and nothing is written.

    Errors: OSError when the disk fails, and what was committed before is untouched;
    CheckpointError if another process writes here, or if there is a checkpoint of this step that
    is damaged or of another state.
    """
    if keep < _MIN_KEEP:
        raise ValueError(f"keep={keep} must be at least {_MIN_KEEP}: one to go back to")
    path = directory / f"step-{step}"
    manifest = {**content, "format": FORMAT, "version": VERSION, "step": step}
    with _SAVING, DirectoryLock(directory):
        with suppress(PermissionError):  # one may write below what one may not read
            # Whoever made `directory`, or the log beside it, may have died before this.
            storage.sync_directory(directory.parent)
        _remove_leftovers(directory, storage)
        if os.path.lexists(path):
            verify_checkpoint(path)
            if not holds_files(path, files):
                raise CheckpointError(
                    f"{path} holds another state of this step; save into another directory, or "
                    "remove it"
                )
            storage.sync_directory(directory)  # its own save may have died before this
        else:
            with DirectoryWriter(path, storage) as writer:
                for name, chunks in files.items():
                    writer.write(name, chunks)
                writer.commit(manifest)
        with suppress(OSError):  # reading the old ones: the new one is durable, nothing has failed
            so_far = [old for number, old in list_checkpoints(directory) if number <= step]
            groups = _ranked(so_far) if keep_best else []
            kept = {*so_far[-keep:], *(old for group in groups for old in group[:keep_best])}
            if len(groups) > 1:  # the last validated one tells over which tokens the best is asked
                kept.add(max(groups[-1], key=so_far.index))
            _prune([old for old in so_far if old not in kept], storage)
    return path


def _remove_leftovers(directory: Path, storage: Storage) -> None:
    """Remove what unfinished saves left; what cannot be removed is left to the next save."""
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            # One that was a checkpoint must not have its old name back once it is half removed.
            storage.sync_directory(directory)
            storage.remove(leftover)


def holds_files(path: Path, files: Mapping[str, Iterable[Any]]) -> bool:
    """Say whether a checkpoint is one of just these bytes, as its manifest has it."""
    try:
        _, records = read_checkpoint_manifest(path)
    except CheckpointError:
        return False
    return records.keys() == files.keys() and all(
        records[name].sha256 == _sha256(chunks) for name, chunks in files.items()
    )


def _sha256(chunks: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _prune(checkpoints: Sequence[Path], storage: Storage) -> None:
    """Remove checkpoints so that, half removed, none looks like one even after a power loss.

    What cannot be removed is left to the next save.
    """
    for path in checkpoints:
        with suppress(OSError):
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
        if not (path / MANIFEST).exists() and (inside := list_checkpoints(path)):
            raise StorageError(
                f"{path} holds checkpoints; give one of them, such as {inside[-1][1]}"
            )
        manifest, files = read_manifest(path, (FORMAT, VERSION))
        entries = {entry.name: entry for entry in os.scandir(path)}
        for name, entry in entries.items():
            if not entry.is_file(follow_symlinks=False):
                raise StorageError(f"{path / ascii(name)[1:-1]}: not a regular file")
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
    """Turn what storage finds wrong with a file into a DamagedCheckpointError.

    Another version is nothing wrong: a plain CheckpointError.
    """
    try:
        yield
    except OtherVersionError as error:
        raise CheckpointError(f"{error}; read it with the truestep that wrote it") from None
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
