"""Durable bytes: everything that must last is written here, so that a fault can be injected here.

A directory of files appears whole or not at all: it is written under a temporary name, each file is
hashed and fsynced, `manifest.json` comes last, and one rename makes it visible. What a writer that
died leaves behind has a name that begins with `.tmp-`, and is never read.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
_MANIFEST_LIMIT_BYTES = 256 * 2**20  # a hostile manifest cannot exhaust memory


class StorageError(OSError):
    """A stored file is missing, short, unreadable or not what its manifest says."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file."""

    size: int
    sha256: str


class Storage(Protocol):
    """The operations that may fail; every one that writes passes through here."""

    def make_directory(self, path: Path) -> None:
        """Create `path` and its parents, durably; an existing directory is fine."""

    def create(self, path: Path) -> int:
        """Create `path`, which must not exist, and return a descriptor open for writing."""

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write at least one byte of `data` and return how many were written."""

    def sync(self, descriptor: int) -> None:
        """Return only when the file's bytes are on the medium."""

    def close(self, descriptor: int) -> None:
        """Close the descriptor."""

    def rename(self, source: Path, target: Path) -> None:
        """Move `source` to `target` in one step, replacing a file but no directory with content."""

    def sync_directory(self, path: Path) -> None:
        """Return only when the directory's entries are on the medium."""

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory."""


class LocalStorage:
    """The local file system."""

    def make_directory(self, path: Path) -> None:
        """Create `path` and its parents, durably; an existing directory is fine."""
        if not path.is_dir():
            self.make_directory(path.parent)
            path.mkdir(exist_ok=True)
            self.sync_directory(path.parent)

    def create(self, path: Path) -> int:
        """Create `path`, which must not exist, and return a descriptor open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write at least one byte of `data` and return how many were written."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Return only when the file's bytes are on the medium."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close the descriptor."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move `source` to `target` in one step, replacing a file but no directory with content."""
        source.replace(target)

    def sync_directory(self, path: Path) -> None:
        """Return only when the directory's entries are on the medium."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


LOCAL = LocalStorage()


def temporary_path(target: Path) -> Path:
    """Return a fresh name beside `target` that no reader looks at."""
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}")


def write_file(storage: Storage, path: Path, chunks: Iterable[Any]) -> FileRecord:
    """Create `path` from byte-like chunks, durably, and return its size and hash.

    Errors: whatever the storage raises; a write that makes no progress is an OSError.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = storage.create(path)
    try:
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            digest.update(data)
            size += len(data)
            while data:
                written = storage.write(descriptor, data)
                if written <= 0:
                    raise StorageError(f"{path}: the disk took none of {len(data)} bytes")
                data = data[written:]
        storage.sync(descriptor)
    finally:
        storage.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def replace_file(storage: Storage, path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part."""
    temporary = temporary_path(path)
    try:
        write_file(storage, temporary, [data])
        storage.rename(temporary, path)
    finally:
        _discard(storage, temporary)
    storage.sync_directory(path.parent)


class DirectoryWriter:
    """Writes a directory that appears at `target` whole, or not at all.

    Use as a context: leaving it without `commit` removes what was written.
    """

    def __init__(self, target: Path, storage: Storage = LOCAL) -> None:
        self.target = target
        self.storage = storage
        self.temporary = temporary_path(target)
        self.files: dict[str, FileRecord] = {}

    def __enter__(self) -> "DirectoryWriter":
        self.storage.make_directory(self.temporary)
        return self

    def write(self, name: str, chunks: Iterable[Any]) -> FileRecord:
        """Write one file of the directory; its record goes into the manifest."""
        self.files[name] = write_file(self.storage, self.temporary / name, chunks)
        return self.files[name]

    def commit(self, manifest: dict[str, Any]) -> None:
        """Add `manifest.json` (with `files`) last, then make the directory visible."""
        files = {name: asdict(record) for name, record in self.files.items()}
        text = json.dumps({**manifest, "files": files}, indent=1, allow_nan=False)
        write_file(self.storage, self.temporary / MANIFEST, [text.encode()])
        self.storage.sync_directory(self.temporary)
        self.storage.rename(self.temporary, self.target)
        self.storage.sync_directory(self.target.parent)

    def __exit__(self, *exception: object) -> None:
        _discard(self.storage, self.temporary)


def _discard(storage: Storage, path: Path) -> None:
    """Remove what an unfinished write left; where that fails too, its name keeps readers away."""
    with suppress(OSError):
        if path.exists():
            storage.remove(path)


def read_file(path: Path, record: FileRecord | None = None, limit: int | None = None) -> bytes:
    """Return the bytes of `path`, compared with `record` if one is given.

    Errors: StorageError naming the file, what was expected and what was found.
    """
    with _open(path, record) as (stream, size):
        if limit is not None and size > limit:
            raise StorageError(f"{path}: {size} bytes is more than the {limit} allowed here")
        data = stream.read(size)
    if len(data) != size:
        raise StorageError(f"{path}: expected {size} bytes, found {len(data)}")
    if record is not None:
        _compare(path, record, hashlib.sha256(data).hexdigest())
    return data


def verify_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record, in constant memory.

    Errors: StorageError naming the file, what was expected and what was found.
    """
    with _open(path, record) as (stream, _):
        _compare(path, record, hashlib.file_digest(stream, "sha256").hexdigest())


def read_manifest(directory: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """Return a directory's manifest and the records of its files.

    Errors: StorageError for a manifest that is missing, not JSON, or names a file outside.
    """
    path = directory / MANIFEST
    data = read_file(path, limit=_MANIFEST_LIMIT_BYTES)
    try:
        manifest = json.loads(data)
        files = {name: _file_record(record) for name, record in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
    for name in files:
        # Not printable: a NUL or half a surrogate pair is no file name, a newline hides the rest.
        if Path(name).name != name or not name.isprintable() or name in {"", ".", ".."}:
            raise StorageError(f"{path}: {name!r} is not a plain file name")
    return manifest, files


def _file_record(value: Any) -> FileRecord:
    size, sha256 = value["size"], value["sha256"]
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("a file's size must be a count and its sha256 64 hexadecimal digits")
    return FileRecord(size, sha256)


def _compare(path: Path, record: FileRecord, sha256: str) -> None:
    if sha256 != record.sha256:
        raise StorageError(f"{path}: expected sha256 {record.sha256}, found {sha256}")


@contextmanager
def _open(path: Path, record: FileRecord | None) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file, as long as its record says, and yield it with its size."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{path}: not a regular file")
            if record is not None and status.st_size != record.size:
                raise StorageError(f"{path}: expected {record.size} bytes, found {status.st_size}")
            yield stream, status.st_size
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{path}: the file is missing") from None
    except OSError as error:
        # A bad sector or a directory is the file's fault; a denied permission is not.
        if error.errno in {errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENXIO}:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        raise


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would wait for its writer
