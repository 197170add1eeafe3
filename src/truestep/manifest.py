"""A directory of files that appears whole or not at all, and the manifest that says what is in it.

It is written under a temporary name, each file is hashed and fsynced, `manifest.json` comes last,
sealed with its own hash, and one rename makes all of it visible.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from truestep.storage import (
    BLOCK_BYTES,
    LOCAL,
    UNFINISHED,
    FileRecord,
    Storage,
    StorageError,
    discard,
    read_file,
    temporary_path,
    write_file,
)

MANIFEST = "manifest.json"
_LIMIT_BYTES = 256 * 2**20  # a hostile manifest cannot exhaust memory
_SEAL = "content_sha256"  # of the rest of the manifest


class OtherVersionError(StorageError):
    """A manifest says it is of a version that is not read here; it may be intact."""


class DirectoryWriter:
    """Writes a directory that appears at `target` whole, or not at all.

    Use as a context: leaving it without `commit` removes what was written. `begun` is another
    directory on the same file system to write in, which stays where it is left without `commit`.
    """

    def __init__(self, target: Path, storage: Storage = LOCAL, begun: Path | None = None) -> None:
        self.target = target
        self.storage = storage
        self.temporary = begun or temporary_path(target)
        self._stays = begun is not None
        self.files: dict[str, FileRecord] = {}

    def __enter__(self) -> "DirectoryWriter":
        self.storage.make_directory(self.temporary)
        if not self._stays:
            UNFINISHED.add(self.temporary)
        return self

    def write(self, name: str, chunks: Iterable[Any]) -> FileRecord:
        """Write one file of the directory; its record goes into the manifest."""
        self.files[name] = write_file(self.storage, self.temporary / name, chunks)
        return self.files[name]

    def keep_only(self, pattern: str) -> None:
        """Remove what an earlier process left, but for files of such names."""
        for path in sorted(set(self.temporary.iterdir()) - set(self.temporary.glob(pattern))):
            self.storage.remove(path)

    def adopt(self, path: Path, name: str, record: FileRecord) -> None:
        """Move a file of this record here, if an earlier process has not done so.

        Errors: StorageError where it is in neither place.
        """
        if path.exists():
            self.storage.rename(path, self.temporary / name)
        elif not (self.temporary / name).exists():
            raise StorageError(f"{path}: the file is missing")
        self.files[name] = record

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
        try:
            if not self._stays:
                discard(self.storage, self.temporary)
        finally:
            UNFINISHED.discard(self.temporary)


def read_manifest(
    directory: Path, expected: tuple[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """Return a directory's manifest and the records of its files.

    Errors: StorageError for a manifest that is missing, not JSON, not as it was sealed, or that
    names a file outside; OtherVersionError, before seal and structure are looked at, for one that
    says it is of the expected format and of another version than the expected one.
    """
    path = directory / MANIFEST
    data = read_file(path, limit=_LIMIT_BYTES)
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
