"""Which document stands where in a split, looked up in a list that is never held in memory."""

import json
from bisect import bisect_right
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from truestep.storage import FileRecord, StorageError, verify_file

_LAST_START = 2**60
_STRIDE = 1024  # lines from one entry of the index to the next


class _Index(NamedTuple):
    """Of every 1024th line: where its document starts, in tokens, and it itself, in bytes."""

    starts: np.ndarray
    offsets: np.ndarray


class DocumentList:
    """The names and starts of the documents of a split: lines of JSON, in their order.

    Looked up first, the file is read once and checked; 16 bytes stay for every 1024 documents.
    """

    def __init__(self, path: Path, record: FileRecord, num_documents: int) -> None:
        self._path, self._record, self._num_documents = path, record, num_documents
        self._index: _Index | None = None

    def at(self, position: int) -> tuple[str, int]:
        """Return the name of the document that holds a token of the split, and where it starts.

        Errors: StorageError for a damaged list.
        """
        index = self._index or self._read()
        self._index = index
        block = bisect_right(index.starts, position) - 1
        with self._path.open("rb") as stream:
            stream.seek(int(index.offsets[block]))
            found = [self._entry(line) for line in islice(stream, _STRIDE)]
        return found[bisect_right(found, position, key=lambda entry: entry[1]) - 1]

    def _read(self) -> _Index:
        verify_file(self._path, self._record)
        starts, offsets = [], []
        number, offset, last, rising = 0, 0, -1, True
        with self._path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                _, start = self._entry(line)
                rising = rising and last < start <= _LAST_START and (number > 1 or start == 0)
                if (number - 1) % _STRIDE == 0:
                    starts.append(start)
                    offsets.append(offset)
                last, offset = start, offset + len(line)
        if number != self._num_documents or not number or not rising:
            raise StorageError(
                f"{self._path}: expected {self._num_documents} documents with rising starts from "
                f"0, found {number}"
            )
        return _Index(np.array(starts, dtype=np.int64), np.array(offsets, dtype=np.int64))

    def _entry(self, line: bytes) -> tuple[str, int]:
        try:
            record = json.loads(line)
            return str(record["name"]), int(record["start"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise StorageError(
                f"{self._path}: not a list of documents ({type(error).__name__})"
            ) from None
