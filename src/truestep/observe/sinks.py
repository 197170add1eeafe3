"""Where records go while a run trains: the console, and the log file that is the truth."""

import contextlib
import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from truestep.observe.log import SOURCE_LOSS, read_records
from truestep.observe.text import encodable, printable_line
from truestep.storage import LOCAL, Storage, StorageError, replace_file

_READER_GONE = {errno.EPIPE, errno.EIO}  # a closed pipe, a closed terminal

_FORMATS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad norm {:.2f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "validation_loss": "validation loss {:.4f}",
    "validation_bits_per_byte": "{:.4f} bits per byte",
}


class Sink(Protocol):
    """Takes the records of a run: one an update, one a validation."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record; it is not kept or changed."""

    def close(self) -> None:
        """Finish; nothing is written afterwards. A second call does nothing."""


def format_record(record: Mapping[str, Any]) -> str:
    """Return a training or validation record as one plain line."""
    parts = [f"step {record['step']}"]
    parts += [form.format(record[name]) for name, form in _FORMATS.items() if name in record]
    parts += [
        f"{printable_line(name.removeprefix(SOURCE_LOSS))} {value:.4f}"
        for name, value in record.items()
        if name.startswith(SOURCE_LOSS)
    ]
    if record.get("skipped"):
        parts.append("update skipped")
    return "  ".join(parts)


def is_notable(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is shown however rarely lines are printed."""
    return "validation_loss" in record or bool(record.get("skipped"))


def print_line(stream: TextIO, text: str) -> None:
    """Write a line that any encoding can take, at once.

    When whoever read the stream has left, what follows goes nowhere: a run outlives its reader.
    """
    try:
        stream.write(f"{encodable(text, stream.encoding)}\n")
        stream.flush()
    except OSError as error:
        if error.errno not in _READER_GONE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class ConsoleSink:
    """Prints plain lines: the first step, every `every`-th, each validation and skipped update."""

    def __init__(self, every: int = 1, stream: TextIO | None = None) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 step")
        self.every = every
        self.stream = sys.stdout if stream is None else stream
        self._begun = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Print the record if its turn has come."""
        if is_notable(record) or record["step"] % self.every == 0 or not self._begun:
            print_line(self.stream, format_record(record))
        self._begun = True

    def close(self) -> None:
        """Do nothing: every line is out already, and the stream belongs to the caller."""


class JsonlSink:
    """Appends records to a file of JSON lines, each on its way to the disk before `write` returns.

    Opening cuts the file back to the records of steps <= `from_step`, which stay byte for byte, so
    that no step stands twice after a resume. Floats are written as their shortest round-trip text,
    non-finite ones as the strings "nan", "inf" and "-inf".

    With `say`, a record that the disk does not take is no error: it is told once, the record waits
    in memory and is written before the next one; `sync` and `close` then raise what is still wrong.
    With `lenient`, a corrupt line and all after it are dropped: nothing vouches for them.
    Errors: StorageError (an OSError) of one line for a disk that fails; ValueError for a file with
    a corrupt line.
    """

    def __init__(
        self,
        path: Path,
        *,
        from_step: int = 0,
        say: Callable[[str], object] | None = None,
        lenient: bool = False,
        storage: Storage = LOCAL,
    ) -> None:
        self.path = path
        self._say = say
        self._waiting = b""
        self._lock = threading.Lock()  # `sync` may be called from the thread that saves
        try:
            _cut_back(path, from_step, storage, lenient=lenient)
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed(error) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one flat record; when the disk fails, nothing of it remains there."""
        values = {key: as_json(value) for key, value in record.items()}
        # ASCII: a terminal that shows the file finds no control or bidirectional character in it.
        line = f"{json.dumps(values, allow_nan=False)}\n".encode("ascii")
        with self._lock:
            told = bool(self._waiting)
            self._waiting += line
            try:
                self._flush()
            except StorageError as error:
                if self._say is None:
                    self._waiting = b""
                    raise
                if not told:
                    self._say(f"{error}; its records wait in memory")

    def sync(self) -> None:
        """Return only when every record is on the medium, under the name it was opened by.

        Errors: StorageError, too, for a file that was moved or removed since.
        """
        with self._lock:
            self._flush()
        descriptor = self._stream.fileno()
        try:
            os.fsync(descriptor)  # not under the lock: whoever writes need not wait for the disk
            here = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except OSError as error:
            raise self._failed(error) from None
        if not here:
            raise StorageError(f"{self.path}: another file was put in its place")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            try:
                if not self._stream.closed:
                    self._flush()
            finally:
                self._stream.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        data, end = memoryview(self._waiting), self._stream.seek(0, 2)
        try:
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                self._stream.truncate(end)
            raise self._failed(error) from None
        self._waiting = b""

    def _failed(self, error: OSError) -> StorageError:
        failed = StorageError(f"{self.path}: cannot be written: {error.strerror or error}")
        failed.errno = error.errno
        return failed


def _cut_back(path: Path, from_step: int, storage: Storage, *, lenient: bool) -> None:
    """Remove records of later steps and a torn end, atomically.

    What a checkpoint vouches for was synced; what comes after it may be anything after a power
    loss, and goes. Errors: ValueError for a line that cannot be read before that.
    """
    kept, reached = [], 0
    try:
        for line, record in read_records(path):
            if record["step"] <= from_step:
                kept.append(line)
                reached = max(reached, record["step"])
    except ValueError:
        if not lenient and not 0 < from_step <= reached:
            raise
    if path.exists() and sum(map(len, kept)) != path.stat().st_size:
        replace_file(storage, path, b"".join(kept))


def as_json(value: Any) -> Any:
    """Return a non-finite float as a string: JSON has no number for it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
