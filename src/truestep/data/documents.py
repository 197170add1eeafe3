"""Documents: the texts in a file, of which there is one or many, read a piece at a time."""

import ast
import codecs
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from truestep.data.formats import (
    CorpusError,
    RecordForm,
    open_bytes,
    read_records,
    size_of,
    skip,
)

_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Document:
    """A text: bytes start to stop of a file, or the docstrings of a Python file.

    `name` is the file's path below the source, with `/` on every system. Bytes are those of the
    decompressed file.
    """

    number: ClassVar[int] = 0

    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    form: Literal["text", "docstrings"] = "text"

    def documents(self, numbers: Iterable[int] | None = None) -> "Iterator[Document]":
        """Yield the one document that this is."""
        yield self

    def read(self) -> str:
        """Return the whole text; Python that does not parse has no docstrings.

        Errors: CorpusError naming the file and the first byte that is not text.
        """
        return "".join(self.pieces())

    def pieces(self, watch: Callable[[bytes], object] | None = None) -> Iterator[str]:
        """Yield the text in pieces of about 1 MiB, cut after a line where there is one.

        `watch`, if given, is called with all the bytes that the text is made from.
        """
        source = self.source_pieces()
        if watch is not None:
            source = _watched(source, watch)
        if self.form == "text":
            yield from source
        elif text := _docstrings("".join(source)):
            yield text

    def source_pieces(self) -> Iterator[str]:
        """Yield what stands in the file, in pieces, before anything is extracted from it."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        position, carry, data = self.start, "", b"begin"
        with open_bytes(self.path) as stream:
            skip(stream, position)
            while data:
                first = position - len(decoder.getstate()[0])  # byte that is decoded next
                room = _PIECE_BYTES if self.stop is None else self.stop - position
                data = stream.read(min(room, _PIECE_BYTES))
                position += len(data)
                text = self._decode(decoder, data, first)
                text = carry + (text.removeprefix("\ufeff") if first == 0 else text)
                cut = text.rfind("\n") + 1 or len(text)
                if cut and data:
                    yield text[:cut]
                carry = text[cut:] if data else text
        if carry:
            yield carry

    def cut_tail(self) -> "tuple[Document, Document] | None":
        """Return the document without about its last tenth, and that tenth.

        The cut is at the line start nearest to nine tenths, if one leaves at least half and at
        most one and a half tenths, else between two characters. None for a single character, and
        for a document that is not the whole text of its file.
        """
        size = size_of(self.path)
        tail = max(1, size // 10)
        wanted, reach = size - tail, min(tail // 2, _PIECE_BYTES)
        if self.form != "text" or (self.start, self.stop) != (0, None) or wanted <= 0:
            return None
        first = max(0, wanted - reach - 3)  # a character has 4 bytes at most
        with open_bytes(self.path) as stream:
            skip(stream, first)
            block = stream.read(wanted + reach - first + 1)
        middle = wanted - first
        ends = (block.rfind(b"\n", middle - reach, middle), block.find(b"\n", middle, -1))
        line_starts = [end + 1 for end in ends if end >= 0]
        cut = min(line_starts, key=lambda start: abs(start - middle), default=middle)
        while cut and block[cut] & 0xC0 == 0x80:  # within a character
            cut -= 1
        cut += first
        return (replace(self, stop=cut), replace(self, start=cut)) if cut else None

    def _decode(self, decoder: codecs.IncrementalDecoder, data: bytes, first: int) -> str:
        """Decode further bytes; `first` is the file's offset of those not decoded so far."""
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{str(self.path)!r}: byte {first + error.start} is not UTF-8 text; convert the "
                "file, for example with iconv"
            ) from None
        if (nul := text.find("\0")) >= 0:
            raise CorpusError(
                f"{str(self.path)!r}: byte {first + len(text[:nul].encode())} is NUL, which text "
                "does not contain; is this a binary file?"
            )
        return text


@dataclass(frozen=True)
class Record:
    """A document of a file that holds many: a line of JSON, a row of a table.

    `name` is the file's with the `number` of the line or row, counted from 1: `a.jsonl:17`.
    """

    name: str
    path: Path
    number: int
    text: str

    def read(self) -> str:
        """Return the whole text."""
        return self.text

    def pieces(self, watch: Callable[[bytes], object] | None = None) -> Iterator[str]:
        """Yield the text in pieces, as `Document.pieces` does."""
        pieces = self.source_pieces()
        return pieces if watch is None else _watched(pieces, watch)

    def source_pieces(self) -> Iterator[str]:
        """Yield the text in pieces of at most 1 Mi characters, cut after a line where there is one.

        No tokenizer is given more at a time.
        """
        start, text = 0, self.text
        while len(text) - start > _PIECE_BYTES:
            stop = text.rfind("\n", start, start + _PIECE_BYTES) + 1 or start + _PIECE_BYTES
            yield text[start:stop]
            start = stop
        if start < len(text):
            yield text[start:]


@dataclass(frozen=True)
class RecordFile:
    """A file of many documents; `field` names the text of a line of JSON, or the column."""

    name: str
    path: Path
    form: RecordForm
    field: str

    def documents(self, numbers: Iterable[int] | None = None) -> Iterator[Record]:
        """Yield the documents in their order; with `numbers`, which rise, only these.

        Memory holds one line, or a few rows. Errors: DamagedError naming file and line, or row.
        """
        for number, text in read_records(self.form, self.path, self.field, numbers):
            yield Record(f"{self.name}:{number}", self.path, number, text)


TextFile = Document | RecordFile


def _watched(pieces: Iterator[str], watch: Callable[[bytes], object]) -> Iterator[str]:
    for piece in pieces:
        watch(piece.encode())
        yield piece


def _docstrings(source: str) -> str:
    """Return the docstrings of a module, its classes and functions, a blank line between two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the escapes of other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, RecursionError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    text = "\n\n".join(docstring for docstring in found if docstring)
    # Escapes in a string may stand for what text does not contain: NUL and lone surrogates.
    text = text.replace("\0", "").encode(errors="ignore").decode()
    return text + "\n" if text else ""
