"""Hash documents, a piece of text at a time, and keep what is known of them in little memory."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from truestep.data.documents import Document, Record, TextFile
from truestep.data.formats import CorpusError, DamagedError, is_compressed, stat_of
from truestep.data.workers import Report

ROW = np.dtype([("number", "<u8"), ("num_bytes", "<u8"), ("sha256", "u1", 32)])
"""A document as it was when it was first read; many are one array, of 48 bytes each."""


@dataclass(frozen=True)
class Hashed:
    """Documents of one file, as they were when they were first read: an array of ROW."""

    file: TextFile
    rows: np.ndarray

    @property
    def num_bytes(self) -> int:
        """The bytes of all their text."""
        return int(self.rows["num_bytes"].sum())

    def documents(self) -> Iterator[tuple[Document | Record, bytes]]:
        """Yield each document, and the sha256 that it had. Errors: CorpusError for one missing."""
        hashes = (row.tobytes() for row in self.rows["sha256"])
        for document in self.file.documents(map(int, self.rows["number"])):
            yield document, next(hashes)
        if next(hashes, None) is not None:
            raise changed(self.file)

    def those(self, mask: np.ndarray) -> "list[Hashed]":
        """Return those documents that the mask says, in a list; nothing for none."""
        return [Hashed(self.file, self.rows[mask])] if mask.any() else []


@dataclass(frozen=True)
class HashedFiles:
    """The documents of files, and why others are no text."""

    members: list[Hashed]
    problems: list[str]


def changed(file: TextFile | Record) -> CorpusError:
    """Return the error about a file that is not what it was."""
    return CorpusError(f"{str(file.path)!r} was changed while it was being prepared; prepare again")


def hash_files(files: Iterable[TextFile], report: Report = lambda _: None) -> HashedFiles:
    """Read files and return the documents that are text, and not empty.

    `report` is told of bytes as they are read. Errors: DamagedError.
    """
    members: list[Hashed] = []
    problems: list[str] = []
    for file in files:
        try:
            member = hash_file(file, report)
        except DamagedError:
            raise
        except CorpusError as error:
            problems.append(str(error))
        else:
            members += [member] if member.rows.size else []
    return HashedFiles(members, problems)


def hash_file(file: TextFile, report: Report = lambda _: None) -> Hashed:
    """Read a file and return what documents it has; empty ones do not count.

    Errors: CorpusError for a file that is not text.
    """
    rows = np.fromiter(_rows(file, report), dtype=ROW)
    return Hashed(file, rows[rows["num_bytes"] > 0])


def _rows(file: TextFile, report: Report) -> Iterator[tuple[int, int, np.ndarray]]:
    grows = is_compressed(file.path) or file.form in {"parquet", "arrow"}
    reported, size = 0, stat_of(file.path).st_size
    for document in file.documents():
        digest, num_bytes = hashlib.sha256(), 0
        for piece in document.source_pieces():
            data = piece.encode()
            digest.update(data)
            num_bytes += len(data)
            if not grows:  # where stored bytes are few, they are told at the end
                reported += len(data)
                report(len(data))
        yield document.number, num_bytes, np.frombuffer(digest.digest(), dtype=np.uint8)
    report(size - reported)
