"""Durable bytes: everything that must last is written here, so that a fault can be injected here.

A directory of files appears whole or not at all: it is written under a temporary name, each file is
hashed and fsynced, `manifest.json` comes last, sealed with its own hash, and one rename makes all
of it visible. What a writer that died leaves behind has a name that begins with `.tmp-`, and is
never read.
"""

import errno
import hashlib
import json
import os
import re
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
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
BLOCK_BYTES = 2**20
_MANIFEST_LIMIT_BYTES = 256 * 2**20  # a hostile manifest cannot exhaust memory
_SEAL = "content_sha256"  # of the rest of the manifest


class StorageError(OSError):
    """A stored file is missing, short, unreadable or not what its manifest says."""


class OtherVersionError(StorageError):
    """A manifest says it is of a version that is not read here; it may be intact."""


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
        """Add `manifest.json` (with `files`, and sealed) last, then make the directory visible."""
        files = {name: vars(record) for name, record in self.files.items()}
        # Read back at once: the seal is of the values as a reader will have them, keys as strings.
        content = json.loads(json.dumps({**manifest, "files": files}, allow_nan=False))
        text = json.dumps({**content, _SEAL: _seal(content)}, indent=1)
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


def read_manifest(
    directory: Path, expected: tuple[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """Return a directory's manifest and the records of its files.

    Errors: StorageError for a manifest that is missing, not JSON, not as it was sealed, or that
    names a file outside; OtherVersionError, before seal and structure are looked at, for one that
    says it is of the expected format and of another version than the expected one.
    """
    path = directory / MANIFEST
    data = read_file(path, limit=_MANIFEST_LIMIT_BYTES)
    try:
        manifest = json.loads(data)
        if expected is not None and manifest.get("format") == expected[0]:
            _require_version(path, manifest, *expected)
        sealed = manifest.pop(_SEAL) == _seal(manifest)
        files = {name: _file_record(record) for name, record in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
    if not sealed:
        raise StorageError(f"{path}: its content does not match its {_SEAL}")
    for name in files:
        # Not printable: a NUL or half a surrogate pair is no file name, a newline hides the rest.
        if Path(name).name != name or not name.isprintable() or name in {"", ".", ".."}:
            raise StorageError(f"{path}: {name!r} is not a plain file name")
    return manifest, files


def _require_version(
    path: Path, manifest: dict[str, Any], expected_format: str, version: int
) -> None:
    """Refuse another version; one that is no number is left to the seal, as damage would be."""
    found = manifest.get("version")
    if type(found) is int and found != version:
        raise OtherVersionError(
            f"{path}: expected {expected_format!r} version {version}, found version {found}"
        )


def _seal(content: dict[str, Any]) -> str:
    """Hash JSON content in canonical form, so that no flipped bit in a manifest can pass."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _file_record(value: Any) -> FileRecord:
    size, sha256, blocks = value["size"], value["sha256"], tuple(value["blocks"])
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("a file's size must be a count and its sha256 64 hexadecimal digits")
    if len(blocks) != -(-size // BLOCK_BYTES) or any(type(block) is not int for block in blocks):
        raise ValueError("a file's blocks must be one whole number for each of its blocks")
    return FileRecord(size, sha256, blocks)


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
