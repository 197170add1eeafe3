"""How text is stored: compressed or not, and as one document a file or many.

What reads Parquet, Arrow and zstd is in the extra `data`, and imported where it is needed.
"""

import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

RecordForm = Literal["jsonl", "parquet", "arrow"]
_RECORD_FORMS: dict[str, RecordForm] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = frozenset({".gz", ".zst"})
_STORED_BYTES = 2**12  # of zstd at a time: a frame may hold a thousand times its size
_ROWS = 256  # documents of a table in memory at a time


class CorpusError(ValueError):
    """A source that gives no text, or not the text it should."""


class DamagedError(CorpusError):
    """A file of documents, or a compressed one, that is not what its name says: never skipped."""


def is_compressed(path: Path) -> bool:
    """Return whether a file is decompressed as it is read; its name decides."""
    return path.suffix.lower() in _COMPRESSIONS


def inner_suffix(path: Path) -> str:
    """Return the suffix of what is stored, in lower case: `.jsonl` of `a.jsonl.gz`."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def record_form(path: Path) -> RecordForm | None:
    """Return how a file of many documents is stored; none for one whose text is one document."""
    form = _RECORD_FORMS.get(inner_suffix(path))
    return None if is_compressed(path) and form != "jsonl" else form


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed where its name ends in .gz or .zst.

    Errors: CorpusError for a file that cannot be read; DamagedError for bytes that are not what
    the name says, or end too early.
    """
    try:
        with path.open("rb") as stored:
            yield _decompressed(path, stored)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise CorpusError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def skip(stream: BinaryIO, num_bytes: int) -> None:
    """Go so many bytes on from the start of what `open_bytes` gave."""
    if stream.seekable():
        stream.seek(num_bytes)
        return
    while num_bytes > 0 and (data := stream.read(min(num_bytes, 2**20))):
        num_bytes -= len(data)


def stat_of(path: Path) -> os.stat_result:
    """Return what the file system knows of a file. Errors: CorpusError where it is not there."""
    try:
        return path.stat()
    except OSError as error:
        raise CorpusError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def size_of(path: Path) -> int:
    """Return how many bytes a file has when it is decompressed. Errors: as for `open_bytes`."""
    if not is_compressed(path):
        return stat_of(path).st_size
    with open_bytes(path) as stream:
        return sum(len(data) for data in iter(lambda: stream.read(2**20), b""))


def read_records(
    form: RecordForm, path: Path, field: str, numbers: Iterable[int] | None = None
) -> Iterator[tuple[int, str]]:
    """Yield number and text of the documents of a file: its lines or rows, counted from 1.

    `field` names the text of a line or the column. With `numbers`, which rise, only these.
    Errors: DamagedError naming file and line, or row.
    """
    rows: Iterator[bytes | str] = _lines(path) if form == "jsonl" else _rows(form, path, field)
    wanted = iter(itertools.count(1) if numbers is None else numbers)
    following = next(wanted, None)
    for number, row in enumerate(rows, 1):
        if following is None:
            return
        if number == following:
            following = next(wanted, None)
            place = f"{str(path)!r}, {'line' if form == 'jsonl' else 'row'} {number}"
            text = _text_of_line(row, field, place) if isinstance(row, bytes) else row
            _check(text, place)
            yield number, text


def _lines(path: Path) -> Iterator[bytes]:
    with open_bytes(path) as stream:
        for number, line in enumerate(stream):
            yield line if number else line.removeprefix(b"\xef\xbb\xbf")


def _text_of_line(line: bytes, field: str, place: str) -> str:
    """Return the text in one line of JSON; a blank line has none."""
    if line.isspace() or not line:
        return ""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{place}: not JSON ({error}); correct the line") from None
    if not isinstance(record, dict):
        raise DamagedError(
            f"{place}: expected an object with the text under {field!r}, found "
            f"{type(record).__name__}; correct the line"
        )
    if field not in record:
        raise _no_field(place, field, record)
    text = record[field]
    if not isinstance(text, str):
        raise DamagedError(
            f"{place}: expected text under {field!r}, found {type(text).__name__}; correct the "
            "line or give another text_field"
        )
    return text


def _no_field(place: str, field: str, fields: Iterable[str]) -> DamagedError:
    found = ", ".join(repr(name) for name in itertools.islice(fields, 8)) or "nothing"
    return DamagedError(
        f"{place}: text_field={field!r} is not there; found {found}: give another text_field"
    )


def _check(text: str, place: str) -> None:
    if "\0" in text:
        raise DamagedError(f"{place}: NUL, which text does not contain; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DamagedError(f"{place}: half of a surrogate pair, which is no text") from None


def _rows(form: RecordForm, path: Path, field: str) -> Iterator[str]:
    """Yield the text of each row of a table; one without text is empty."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise missing(f"{str(path)!r}", "pyarrow") from None
    try:
        if form == "parquet":
            table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
            _check_column(path, field, table.schema_arrow)
            batches = table.iter_batches(_ROWS, columns=[field], use_threads=False)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.OSFile(str(path)))
            _check_column(path, field, batches.schema)
        for batch in batches:
            column = batch.column(batch.schema.get_field_index(field))
            for start in range(0, len(column), _ROWS):
                yield from (text or "" for text in column.slice(start, _ROWS).to_pylist())
    except CorpusError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # pyarrow's own word for bytes that do not decompress
            raise _damaged(path, error) from None
        raise CorpusError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def _check_column(path: Path, field: str, schema: Any) -> None:
    if field not in schema.names:
        raise _no_field(repr(str(path)), field, schema.names)
    if (kind := str(schema.field(field).type)) not in {"string", "large_string", "string_view"}:
        raise DamagedError(
            f"{str(path)!r}: text_field={field!r} is a column of {kind}, not of text; give another"
        )


def _decompressed(path: Path, stored: io.BufferedReader) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        stream: Any = gzip.GzipFile(fileobj=stored, mode="rb")
    elif path.suffix.lower() == ".zst":
        stream = io.BufferedReader(_Zstd(path, stored))
    else:
        stream = stored
    opened: BinaryIO = stream
    return opened


class _Zstd(io.RawIOBase):
    """What a .zst file holds: frame after frame, the last of which must be whole."""

    def __init__(self, path: Path, stored: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing(f"{str(path)!r}", "zstandard") from None
        self._path, self._stored, self._failure = path, stored, zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._stored.read(_STORED_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise _damaged(self._path, EOFError("it ends within a frame"))
                return 0
            self._frame = self._frame or self._frames.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._failure as error:
                raise _damaged(self._path, error) from None
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        given = self._output[: len(buffer)]
        buffer[: len(given)] = given
        self._output = self._output[len(given) :]
        return len(given)


def _damaged(path: Path, error: Exception) -> DamagedError:
    reason = " ".join(str(error).split())
    return DamagedError(
        f"{str(path)!r} is cut short, damaged or no {path.suffix} ({reason}); fetch it again"
    )


def missing(what: str, package: str) -> CorpusError:
    """Return the error about a package of the extra `data` that is not installed."""
    return CorpusError(
        f'{what} needs {package}, which is not installed; pip install "truestep[data]"'
    )
