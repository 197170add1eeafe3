"""Token shards: the prepared form of a corpus, read at any place; `shards.py` writes it.

A prepared directory holds, for each split, shards of little-endian ids and a list of documents.
Shards are read by pread and never mapped: a file cut short under a map kills the process, a short
read can be named.
"""

import os
import weakref
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int64, Integer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from truestep.data.document_list import DocumentList
from truestep.data.tokenizer import DEFINITION, Tokenizer, load_tokenizer
from truestep.manifest import MANIFEST, OtherVersionError, read_manifest
from truestep.storage import FileRecord, StorageError

FORMAT = "truestep tokens"
FORMAT_VERSION = 2  # 1 had neither seals nor checksums of blocks
_SHARDS = "train-*.bin"
_A_LIST = "train-documents.jsonl"
_OPEN_SHARDS = 64  # descriptors a split holds at most

Count = Annotated[int, Field(ge=0, le=2**60)]


class SplitRecord(BaseModel):
    """What a manifest says of one split."""

    model_config = ConfigDict(strict=True)

    shards: list[Annotated[str, Field(pattern=r"^[a-z]+-[0-9]{5,9}\.bin$")]]
    documents: Annotated[str, Field(pattern=r"^[a-z]+-documents\.jsonl$")]
    num_tokens: Count
    num_documents: Count
    num_bytes: Count


class _TokenizerRecord(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(max_length=1000)]
    fingerprint: str


class _Manifest(BaseModel):
    """What the manifest of a prepared directory must have, beside storage's `files`."""

    model_config = ConfigDict(strict=True)

    format: Literal["truestep tokens"]
    version: Literal[2]
    source: str
    tokenizer: _TokenizerRecord
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    dtype: Literal["uint8", "uint16", "uint32"]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    train: SplitRecord
    validation: SplitRecord


class _Descriptor:
    """An open file that closes with its last user: a thread may still read what was evicted."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Unlike __del__, also at the end of a program, when its modules are emptied.
        weakref.finalize(self, os.close, self.number)


class TokenSplit:
    """The token ids of one split, across its shards; reading is safe from several threads.

    `num_bytes` counts the UTF-8 bytes of its text: what bits per byte are divided by.
    """

    def __init__(
        self,
        directory: Path,
        record: SplitRecord,
        files: Mapping[str, FileRecord],
        *,
        dtype: str,
        vocab_size: int,
    ) -> None:
        self.num_documents = record.num_documents
        self.num_bytes = record.num_bytes
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._vocab_size = vocab_size
        if len(set(record.shards)) < len(record.shards):
            raise StorageError(f"{directory / MANIFEST}: shards: a shard is listed twice")
        self._shards = [directory / name for name in record.shards]
        self._starts = [0]  # of every shard, in tokens, and the end of the last
        for path in self._shards:
            self._starts.append(self._starts[-1] + self._shard_tokens(path, files))
        if len(self) != record.num_tokens:
            raise StorageError(
                f"{directory / MANIFEST}: expected shards of {record.num_tokens} tokens, "
                f"found {len(self)}"
            )
        path = directory / record.documents
        self._documents = DocumentList(path, _record_of(path, files), record.num_documents)
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(_Descriptor)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """Return the ids at positions start to stop - 1.

        Errors: StorageError naming the shard, for bytes that are missing and for an id that is
        not in the vocabulary; ValueError for positions outside the split.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens {start}:{stop} are outside the split's {len(self)}")
        ids = np.empty(stop - start, dtype=np.int64)
        position = start
        shard = bisect_right(self._starts, start) - 1
        while position < stop:
            end = min(stop, self._starts[shard + 1])
            ids[position - start : end - start] = self._read_shard(
                shard, position - self._starts[shard], end - position
            )
            position, shard = end, shard + 1
        return ids

    def document_at(self, position: int) -> tuple[str, int]:
        """Return the name of the document that holds `position`, and where it starts.

        Errors: ValueError for a position outside the split, StorageError for a damaged list.
        """
        if not 0 <= position < len(self):
            raise ValueError(f"position {position} is outside the split's {len(self)} tokens")
        return self._documents.at(position)

    def _read_shard(self, shard: int, offset: int, count: int) -> Integer[np.ndarray, "N"]:
        path, width = self._shards[shard], self._dtype.itemsize
        descriptor = self._open(path)
        parts, missing = [], count * width
        while missing:
            part = os.pread(descriptor.number, missing, (offset + count) * width - missing)
            if not part:
                raise StorageError(
                    f"{path}: expected {count * width} bytes at offset {offset * width}, "
                    f"found {count * width - missing}; the file was cut short: prepare it again"
                )
            parts.append(part)
            missing -= len(part)
        ids = np.frombuffer(b"".join(parts), dtype=self._dtype)
        if ids.size and ids.max() >= self._vocab_size:
            wrong = int(np.flatnonzero(ids >= self._vocab_size)[0])
            raise StorageError(
                f"{path}: the id {ids[wrong]} at offset {(offset + wrong) * width} is outside the "
                f"vocabulary of {self._vocab_size}; prepare the text again"
            )
        return ids

    def _shard_tokens(self, path: Path, files: Mapping[str, FileRecord]) -> int:
        """Return how many tokens a shard holds, once its file has the size it must have."""
        size, width = _record_of(path, files).size, self._dtype.itemsize
        if size % width:
            raise StorageError(f"{path}: {size} bytes are not a whole number of {self._dtype.name}")
        return size // width


@dataclass(frozen=True)
class PreparedData:
    """A prepared directory, open for reading."""

    directory: Path
    manifest: dict[str, Any]
    train: TokenSplit
    validation: TokenSplit
    tokenizer: Tokenizer
    fingerprint: str


def is_prepared(directory: str | Path) -> bool:
    """Return whether this is a prepared directory; other directories have a manifest.json, too."""
    directory = Path(directory)
    return os.path.isfile(directory / MANIFEST) and (
        os.path.isfile(directory / _A_LIST) or any(directory.glob(_SHARDS))
    )


def open_prepared(directory: Path, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Open a prepared directory; `tokenizer` defaults to the one its manifest names.

    Errors: StorageError naming the file, what was expected and what was found.
    """
    path = directory / MANIFEST
    try:
        manifest, files = read_manifest(directory, (FORMAT, FORMAT_VERSION))
    except OtherVersionError as error:
        raise StorageError(f"{error}; prepare the text again") from None
    try:
        checked = _Manifest.model_validate(manifest)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise StorageError(f"{path}: {field}: {detail['msg'].lower()}") from None
    if tokenizer is None:
        try:
            name, fingerprint = checked.tokenizer.name, checked.tokenizer.fingerprint
            tokenizer = load_tokenizer(name, directory, files.get(DEFINITION), fingerprint)
        except ValueError as error:
            raise StorageError(f"{path}: {error}") from None
    expected = {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype_of(tokenizer.vocab_size),
    }
    found = {
        "tokenizer": checked.tokenizer.fingerprint,
        "vocab_size": checked.vocab_size,
        "dtype": checked.dtype,
    }
    for key, value in expected.items():
        if found[key] != value:
            raise StorageError(
                f"{path}: {key}: expected {value!r} as the tokenizer {tokenizer.name!r} has it, "
                f"found {found[key]!r}; prepare the text again"
            )
    train, validation = (
        TokenSplit(directory, record, files, dtype=checked.dtype, vocab_size=checked.vocab_size)
        for record in (checked.train, checked.validation)
    )
    return PreparedData(directory, manifest, train, validation, tokenizer, checked.fingerprint)


def dtype_of(vocab_size: int) -> Literal["uint8", "uint16", "uint32"]:
    """Return the narrowest type that holds every id of a vocabulary."""
    if vocab_size <= 2**8:
        return "uint8"
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _record_of(path: Path, files: Mapping[str, FileRecord]) -> FileRecord:
    """Return the record of a file that is there and has its recorded size."""
    record = files.get(path.name)
    if record is None:
        raise StorageError(f"{path.parent / MANIFEST}: files: no record of {path.name}")
    try:
        status = path.stat()
    except FileNotFoundError:
        raise StorageError(f"{path}: the file is missing") from None
    if not S_ISREG(status.st_mode):
        raise StorageError(f"{path}: expected a file, found something else")
    if status.st_size != record.size:
        raise StorageError(f"{path}: expected {record.size} bytes, found {status.st_size}")
    return record
