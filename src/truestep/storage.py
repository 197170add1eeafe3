"""Durable bytes: everything that must last is written here, so that a fault can be injected here.

What a writer that died leaves behind has a name that begins with `.tmp-`, and is never read.
"""

import errno
import hashlib
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
TEMPORARY_PREFIX = ".tmp-"
BLOCK_BYTES = 2**20
UNFINISHED: set[Path] = set()
"""Directories that a signal, which ends the process at once, must not leave behind."""


class StorageError(OSError):
    """A stored file is missing, short, unreadable or not what its manifest says."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file.

    `blocks` holds the CRC-32 of every BLOCK_BYTES: the hash proves damage, they tell where it is.
    """

    size: int
    sha256: str
    blocks: tuple[int, ...]


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


def explain(error: Exception) -> str:
    """Return what failed in one line, the file first where it is known."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def write_file(storage: Storage, path: Path, chunks: Iterable[Any]) -> FileRecord:
    """Create `path` from byte-like chunks, durably, and return its size and hash.

    Errors: whatever the storage raises; a write that makes no progress is an OSError.
    """
    digest, size = hashlib.sha256(), 0
    blocks: list[int] = []
    descriptor = storage.create(path)
    try:
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            digest.update(data)
            for block in _blocks_of(data, BLOCK_BYTES - size % BLOCK_BYTES):
                begins = size % BLOCK_BYTES == 0
                blocks.append(zlib.crc32(block, 0 if begins else blocks.pop()))
                size += len(block)
            while data:
                written = storage.write(descriptor, data)
                if written <= 0:
                    raise StorageError(f"{path}: the disk took none of {len(data)} bytes")
                data = data[written:]
        storage.sync(descriptor)
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    finally:
        storage.close(descriptor)
    return FileRecord(size, digest.hexdigest(), tuple(blocks))


def _blocks_of(data: memoryview, first: int = BLOCK_BYTES) -> Iterator[memoryview]:
    """Yield `data` in pieces that end where blocks do, `first` bytes before the first such end."""
    start, end = 0, first
    while start < len(data):
        yield data[start:end]
        start, end = end, end + BLOCK_BYTES


def replace_file(storage: Storage, path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part."""
    temporary = temporary_path(path)
    try:
        write_file(storage, temporary, [data])
        storage.rename(temporary, path)
    finally:
        discard(storage, temporary)
    storage.sync_directory(path.parent)


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Have a local directory removed where a signal ends the process at once."""
    UNFINISHED.add(path)
    try:
        yield
    finally:
        UNFINISHED.discard(path)


def remove_unfinished() -> None:
    """Remove what is UNFINISHED, before a process ends without unwinding.

    First it loses the name by which another thread may be about to commit it.
    """
    for path in tuple(UNFINISHED):
        doomed = temporary_path(path)
        with suppress(OSError):
            path.rename(doomed)
            shutil.rmtree(doomed)


def discard(storage: Storage, path: Path) -> None:
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
    if record is not None and hashlib.sha256(data).hexdigest() != record.sha256:
        raise _difference(path, record, _blocks_of(memoryview(data)))
    return data


def verify_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record, in constant memory.

    Errors: StorageError naming the file, what was expected and what was found, and where.
    """
    with _open(path, record) as (stream, _):
        if hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
            stream.seek(0)
            raise _difference(path, record, iter(lambda: stream.read(BLOCK_BYTES), b""))


def _difference(
    path: Path, record: FileRecord, blocks: Iterable[bytes | memoryview]
) -> StorageError:
    """Return what is wrong with a file whose hash is not the recorded one, with the first place."""
    for number, (block, expected) in enumerate(zip(blocks, record.blocks, strict=False)):
        if zlib.crc32(block) != expected:
            start = number * BLOCK_BYTES
            end = min(start + BLOCK_BYTES, record.size) - 1
            return StorageError(f"{path}: bytes {start} to {end} are not those that were written")
    return StorageError(f"{path}: its bytes do not have the sha256 of its manifest")


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
