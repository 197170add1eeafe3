"""What text there is: a file, a directory or a built-in corpus, read in place.

Text is UTF-8 without NUL. Line ends stay as they are; a byte order mark that opens a file is
dropped.
"""

import ast
import codecs
import difflib
import errno
import importlib.util
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from truestep.observe.text import count

BUILT_IN = ("stdlib", "torch-src", "docstrings")

# Prose and code; README, LICENSE and Makefile have no suffix. Data and settings (json, csv, toml,
# log) are left out.
_PROSE = ".txt .text .md .markdown .rst .adoc .org .tex .html .htm .xml .srt"
_CODE = (
    ".py .pyi .ipynb .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .js .jsx .mjs .ts .tsx .go .rs"
    " .rb .php .sh .bash .zsh .sql .r .jl .lua .pl .pm .scala .kt .swift .hs .ml .mli .el .lisp"
    " .clj .ex .exs .erl .cs .fs .f90 .m .asm .s .tcl .vim .cmake .mk .proto .css .scss"
)
_TEXT_SUFFIXES = frozenset(["", *_PROSE.split(), *_CODE.split()])
_SKIPPED_IN_PACKAGES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_RUN_FILES = {"config.toml", "manifest.json", "metrics.jsonl"}
_PIECE_BYTES = 2**20

Say = Callable[[str], object]


class CorpusError(ValueError):
    """A source that gives no text, or not the text it should."""


@dataclass(frozen=True)
class Document:
    """A text: bytes start to stop of a file, or the docstrings of a Python file.

    `name` is the file's path below the source, with `/` on every system.
    """

    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    form: Literal["text", "docstrings"] = "text"

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
        try:
            with self.path.open("rb") as stream:
                stream.seek(position)
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
        except OSError as error:
            raise CorpusError(f"{str(self.path)!r} cannot be read: {error.strerror}") from None
        if carry:
            yield carry

    def cut_tail(self) -> "tuple[Document, Document] | None":
        """Return the document without about its last tenth, and that tenth.

        The cut is at the line start nearest to nine tenths, if one leaves at least half and at
        most one and a half tenths, else between two characters. None for a single character, and
        for a document that is not the whole text of its file.
        """
        size = self.path.stat().st_size
        tail = max(1, size // 10)
        wanted, reach = size - tail, min(tail // 2, _PIECE_BYTES)
        if self.form != "text" or (self.start, self.stop) != (0, None) or wanted <= 0:
            return None
        first = max(0, wanted - reach - 3)  # a character has 4 bytes at most
        with self.path.open("rb") as stream:
            stream.seek(first)
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


def find_documents(source: str, say: Say = lambda _: None) -> list[Document]:
    """Return the documents of a text file, a directory of text or a built-in corpus, by name.

    Below a directory these are files with a suffix of prose or code, or without any; hidden ones
    are skipped, and links to directories are not followed. A path that exists wins over a built-in
    name. `say` is told what was found and what was skipped. Nothing is read yet.

    Errors: CorpusError naming the source and what is wrong with it.
    """
    if os.path.isfile(source):
        if os.path.getsize(source) == 0:
            raise CorpusError(f"{source!r} is empty; give a file with text")
        return [Document(Path(source).name, Path(source))]
    if os.path.isdir(source):
        return _documents_below(source, {"": Path(source)}, _TEXT_SUFFIXES, frozenset(), say)
    if source not in BUILT_IN:
        if os.path.lexists(source):
            raise CorpusError(f"{source!r} {_oddity(source)}")
        raise CorpusError(
            f"{source!r} is neither a file, a directory nor one of "
            f"{', '.join(BUILT_IN)}{_place(source)}{_nearest(source)}"
        )
    roots = {
        "stdlib": lambda: {"": _stdlib()},
        "torch-src": lambda: {"torch/": _torch()},
        "docstrings": lambda: {"stdlib/": _stdlib(), "torch/": _torch()},
    }[source]()
    documents = _documents_below(source, roots, frozenset({".py"}), _SKIPPED_IN_PACKAGES, say)
    if source == "docstrings":
        return [replace(document, form="docstrings") for document in documents]
    return documents


def _documents_below(
    source: str,
    roots: dict[str, Path],
    suffixes: frozenset[str],
    skipped_directories: frozenset[str],
    say: Say,
) -> list[Document]:
    """Return the text below each root, named with the root's prefix."""
    documents, skipped = [], Counter[str]()
    for prefix, root in roots.items():
        for directory, names, files in os.walk(
            root, onerror=lambda _: skipped.update(["unreadable directory"])
        ):
            if set(files) >= _RUN_FILES:  # what a run writes must not become its own text
                skipped["run of truestep"] += 1
                names.clear()
                continue
            names[:] = [n for n in names if not n.startswith(".") and n not in skipped_directories]
            for name in files:
                path = Path(directory, name)
                suffix = path.suffix.lower()
                # _sysconfigdata is generated by the machine that built Python.
                if name.startswith((".", "_sysconfigdata")):
                    skipped["hidden or generated"] += 1
                elif suffix not in suffixes or not path.is_file():
                    skipped[repr(suffix) if suffix else "no suffix"] += 1
                else:
                    documents.append(Document(prefix + path.relative_to(root).as_posix(), path))
    kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.most_common(4))
    others = f"; skipped {skipped.total()} of other kinds: {kinds}" if skipped else ""
    places = " and ".join(repr(str(root)) for root in roots.values())
    if not documents:
        raise CorpusError(f"{source!r} has no text files in {places}{others}; give another")
    say(f"{source}: {count(len(documents), 'file')} in {places}{others}")
    return sorted(documents, key=lambda document: document.name)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _torch() -> Path:
    """Return where torch's source lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError("torch is not installed, so there is no source of it; use stdlib")
    return Path(spec.submodule_search_locations[0])


def _oddity(source: str) -> str:
    """Return what a path is that is there, but neither a file nor a directory, and the remedy."""
    try:
        os.stat(source)
    except FileNotFoundError:
        return "is a link that leads nowhere; give the file itself"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself; give the file itself"
        return f"cannot be read: {error.strerror}"
    return "is a pipe or a device, not a file; write its text to a file and give that"


def _place(source: str) -> str:
    with suppress(OSError):  # the working directory may be gone
        return "" if os.path.isabs(source) else f"; looked for in {os.getcwd()!r}"
    return ""


def _nearest(source: str) -> str:
    parent = os.path.dirname(source)
    try:
        siblings = [os.path.join(parent, name) for name in os.listdir(parent or ".")]
    except (OSError, ValueError):
        siblings = []
    matches = difflib.get_close_matches(source, [*BUILT_IN, *siblings], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


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
