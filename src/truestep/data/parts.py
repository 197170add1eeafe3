"""A long preparation in parts: files are hashed, and shards written, by several processes.

Every part is a directory that appears whole or not at all; one that is there is not done again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int64

from truestep.data.corpus import Say
from truestep.data.documents import Document, Record, TextFile
from truestep.data.formats import stat_of
from truestep.data.hashing import ROW, Hashed, HashedFiles, changed, hash_files
from truestep.data.progress import Progress
from truestep.data.shards import write_split
from truestep.data.tokenizer import Tokenizer
from truestep.data.tokens import SplitRecord
from truestep.data.workers import Report, do_jobs
from truestep.manifest import MANIFEST, DirectoryWriter, read_manifest
from truestep.storage import Storage, StorageError, discard, read_file

PART_BYTES = 2**26
"""Of files, or of text: what is done again after a kill, by each worker, unless one file is more"""

_ROWS = "rows.bin"
Item = TypeVar("Item")


@dataclass
class _Part(Generic[Item]):
    """Files, or documents of files, and the directory that what is made of them has."""

    path: Path
    items: list[Item]
    num_bytes: int


@dataclass(frozen=True)
class Workshop:
    """Where parts lie, and who makes them."""

    place: Path
    storage: Storage
    workers: int
    part_bytes: int
    say: Say

    def hash_files(self, what: str, files: list[TextFile]) -> HashedFiles:
        """Return what documents the files have, read by all workers; `what` names the parts.

        Errors: DamagedError for a file that must not be skipped.
        """
        sizes = [stat_of(file.path).st_size for file in files]
        parts = self._parts(f"hashes-{what}", files, sizes)
        jobs = [partial(_save_hashes, part.items, part.path, self.storage) for part in parts]
        self._do("reading", jobs, parts)
        found = [_read_hashes(part.items, part.path) for part in parts]
        return HashedFiles(
            [member for each in found for member in each.members],
            [problem for each in found for problem in each.problems],
        )

    def write_splits(
        self, splits: dict[str, list[Hashed]], tokenizer: Tokenizer, shard_tokens: int
    ) -> dict[str, list[Path]]:
        """Write the shards of all splits; return the directories they lie in, in order.

        Errors: CorpusError for text that is not what was hashed.
        """
        write = partial(
            _write_part, tokenizer=tokenizer, shard_tokens=shard_tokens, storage=self.storage
        )
        parts = {
            split: self._parts(split, members, [member.num_bytes for member in members])
            for split, members in splits.items()
        }
        pairs = [(split, part) for split, some in parts.items() for part in some]
        jobs = [partial(write, split, part.items, path=part.path) for split, part in pairs]
        self._do("tokenizing", jobs, [part for _, part in pairs])
        return {split: [part.path for part in some] for split, some in parts.items()}

    def _parts(self, name: str, items: list[Item], sizes: list[int]) -> "list[_Part[Item]]":
        """Cut items, in their order, into parts of `part_bytes` or little more."""
        parts: list[_Part[Item]] = []
        for item, size in zip(items, sizes, strict=True):
            if not parts or parts[-1].num_bytes >= self.part_bytes:
                parts.append(_Part(self.place / f"{name}-{len(parts):05d}", [], 0))
            parts[-1].items.append(item)
            parts[-1].num_bytes += size
        return parts

    def _do(
        self, verb: str, jobs: Sequence[Callable[[Report], None]], parts: "list[_Part[Item]]"
    ) -> None:
        """Do the jobs of those parts that are not there."""
        left = [i for i, part in enumerate(parts) if not (part.path / MANIFEST).is_file()]
        total, missing = (
            sum(part.num_bytes for part in some) for some in (parts, [parts[i] for i in left])
        )
        progress = Progress(verb, total, self.say, total - missing)
        for _ in do_jobs([jobs[i] for i in left], _call, self.workers, progress.add):
            pass
        if missing >= self.part_bytes:
            self.say(progress.summary())


def join_parts(paths: Sequence[Path], split: str, writer: DirectoryWriter) -> SplitRecord:
    """Move the shards of all parts to `writer`, with one list of documents; return the record."""
    shards: list[str] = []
    records = []
    for path in paths:
        manifest, files = read_manifest(path)
        record = SplitRecord.model_validate(manifest["split"])
        records.append(record)
        for name in record.shards:
            shards.append(f"{split}-{len(shards):05d}.bin")
            try:
                writer.adopt(path / name, shards[-1], files[name])
            except StorageError as error:  # a power loss between two directories
                discard(writer.storage, path)
                raise StorageError(f"{error}; the same command makes this part again") from None
    documents = f"{split}-documents.jsonl"
    writer.write(documents, _documents(paths, records))
    return SplitRecord(
        shards=shards,
        documents=documents,
        num_tokens=sum(record.num_tokens for record in records),
        num_documents=sum(record.num_documents for record in records),
        num_bytes=sum(record.num_bytes for record in records),
    )


def _documents(paths: Sequence[Path], records: Sequence[SplitRecord]) -> Iterator[bytes]:
    """Yield the lines of the documents of all parts, with starts in the whole split."""
    start = 0
    for path, record in zip(paths, records, strict=True):
        with (path / record.documents).open("rb") as stream:
            while lines := stream.readlines(2**20):
                entries = [json.loads(line) for line in lines]
                moved = (json.dumps({**e, "start": e["start"] + start}) + "\n" for e in entries)
                yield "".join(moved).encode()
        start += record.num_tokens


def _call(job: Callable[[Report], None], report: Report) -> None:
    job(report)


def _save_hashes(files: list[TextFile], path: Path, storage: Storage, report: Report) -> None:
    found = hash_files(files, report)
    places = {file: number for number, file in enumerate(files)}
    with DirectoryWriter(path, storage) as writer:
        writer.write(_ROWS, [member.rows.view(np.uint8) for member in found.members])
        counts = [[places[member.file], len(member.rows)] for member in found.members]
        writer.commit({"counts": counts, "problems": found.problems})


def _read_hashes(files: list[TextFile], path: Path) -> HashedFiles:
    manifest, records = read_manifest(path)
    rows = np.frombuffer(read_file(path / _ROWS, records[_ROWS]), dtype=ROW)
    counts = manifest["counts"]
    ends = np.cumsum([count for _, count in counts], dtype=np.int64)[:-1]
    members = [
        Hashed(files[place], own)
        for (place, _), own in zip(counts, np.split(rows, ends) if counts else [], strict=True)
    ]
    return HashedFiles(members, manifest["problems"])


def _write_part(
    split: str,
    members: list[Hashed],
    report: Report,
    *,
    tokenizer: Tokenizer,
    shard_tokens: int,
    path: Path,
    storage: Storage,
) -> None:
    documents = (
        (document.name, _encoded(document, sha256, tokenizer, report))
        for member in members
        for document, sha256 in member.documents()
    )
    with DirectoryWriter(path, storage) as writer:
        record = write_split(writer, split, documents, tokenizer, shard_tokens)
        writer.commit({"split": record.model_dump()})


def _encoded(
    document: Document | Record, sha256: bytes, tokenizer: Tokenizer, report: Report
) -> Iterator[Int64[np.ndarray, "_"]]:
    """Yield the ids of a document, and make sure that it is the text that was hashed."""
    digest = hashlib.sha256()

    def watch(data: bytes) -> None:
        digest.update(data)
        report(len(data))

    for piece in document.pieces(watch):
        yield tokenizer.encode(piece)
    if digest.digest() != sha256:
        raise changed(document)
