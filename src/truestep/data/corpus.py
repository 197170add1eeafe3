"""What text there is: a file, a directory or a built-in corpus, read in place.

Text is UTF-8 without NUL. Line ends stay as they are; a byte order mark that opens a file is
dropped.
"""

import difflib
import errno
import glob
import importlib.util
import itertools
import os
import sysconfig
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from truestep.data import hugging_face
from truestep.data.documents import Document, RecordFile, TextFile
from truestep.data.formats import CorpusError, inner_suffix, is_compressed, record_form
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

Say = Callable[[str], object]


def find_files(source: str, field: str = "text", say: Say = lambda _: None) -> list[TextFile]:
    """Return the files of text in a file, a directory, a pattern or a built-in corpus, by name.

    Below a directory these are files with a suffix of prose or code, or without any, and where
    there are none, those of many documents and compressed ones; hidden ones are skipped, and links
    to directories are not followed. A pattern, as `data/**/*.jsonl.gz`, takes whatever it matches.
    A path that exists wins over a pattern and a built-in name. `field` names the text of a line of
    JSON, or the column of a table. Datasets of the library `datasets` are `hf:NAME:SPLIT`, or a
    directory that `save_to_disk` wrote. `say` is told what was found and what was skipped. No text
    is read yet.

    Errors: CorpusError naming the source and what is wrong with it.
    """
    if os.path.isfile(source):
        if os.path.getsize(source) == 0:
            raise CorpusError(f"{source!r} is empty; give a file with text")
        return [_text_file(Path(source).name, Path(source), field)]
    if os.path.isdir(source):
        if hugging_face.is_saved(source):
            return list(hugging_face.saved_files(source, field))
        return _files_below(
            source, {"": Path(source)}, _TEXT_SUFFIXES, frozenset(), field=field, say=say
        )
    if source not in BUILT_IN:
        if os.path.lexists(source):
            raise CorpusError(f"{source!r} {_oddity(source)}")
        if source.startswith(hugging_face.PREFIX):
            return list(hugging_face.named_files(source, field))
        if is_pattern(source):
            return _files_of_pattern(source, field, say)
        raise CorpusError(
            f"{source!r} is neither a file, a directory nor one of "
            f"{', '.join(BUILT_IN)}{_place(source)}{_nearest(source)}"
        )
    roots = {
        "stdlib": lambda: {"": _stdlib()},
        "torch-src": lambda: {"torch/": _torch()},
        "docstrings": lambda: {"stdlib/": _stdlib(), "torch/": _torch()},
    }[source]()
    files = _files_below(
        source, roots, frozenset({".py"}), _SKIPPED_IN_PACKAGES, field=field, say=say
    )
    if source == "docstrings":
        return [replace(f, form="docstrings") for f in files if isinstance(f, Document)]
    return files


def is_pattern(source: str) -> bool:
    """Return whether a source names files by `*` or `?`, if no file has this very name."""
    return "*" in source or "?" in source


def _text_file(name: str, path: Path, field: str) -> TextFile:
    form = record_form(path)
    return Document(name, path) if form is None else RecordFile(name, path, form, field)


def _files_of_pattern(source: str, field: str, say: Say) -> list[TextFile]:
    fixed = Path(*itertools.takewhile(lambda part: not is_pattern(part), Path(source).parts))
    paths = [Path(path) for path in glob.glob(source, recursive=True)]
    found = [path for path in paths if path.is_file() and path.stat().st_size]
    if not found:
        raise CorpusError(
            f"{source!r} matches no file with text{_place(source)}; `**` stands for directories"
        )
    say(f"{source}: {count(len(found), 'file')}")
    files = [_text_file(path.relative_to(fixed).as_posix(), path, field) for path in found]
    return sorted(files, key=lambda file: file.name)


def _files_below(
    source: str,
    roots: dict[str, Path],
    suffixes: frozenset[str],
    skipped_directories: frozenset[str],
    *,
    field: str,
    say: Say,
) -> list[TextFile]:
    """Return the text below each root, named with the root's prefix."""
    plain: list[TextFile] = []
    others: list[TextFile] = []  # of many documents, or compressed
    skipped = Counter[str]()
    for prefix, root in roots.items():
        for directory, names, entries in os.walk(
            root, onerror=lambda _: skipped.update(["unreadable directory"])
        ):
            if set(entries) >= _RUN_FILES:  # what a run writes must not become its own text
                skipped["run of truestep"] += 1
                names.clear()
                continue
            names[:] = [n for n in names if not n.startswith(".") and n not in skipped_directories]
            for name in entries:
                path = Path(directory, name)
                suffix = path.suffix.lower()
                # _sysconfigdata is generated by the machine that built Python.
                if name.startswith((".", "_sysconfigdata")):
                    skipped["hidden or generated"] += 1
                    continue
                file = _text_file(prefix + path.relative_to(root).as_posix(), path, field)
                if suffix in suffixes and path.is_file():
                    plain.append(file)
                elif suffixes is _TEXT_SUFFIXES and _is_packed(path) and path.is_file():
                    others.append(file)
                else:
                    skipped[repr(suffix) if suffix else "no suffix"] += 1
    files, hint = plain or others, ""
    if plain and others:
        skipped.update(repr(file.path.suffix.lower()) for file in others)
        example = os.path.join(source, "**", f"*{others[0].path.suffix}")
        hint = f"; {example!r} would take those of one kind alone"
    kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.most_common(4))
    others_text = f"; skipped {skipped.total()} of other kinds: {kinds}" if skipped else ""
    places = " and ".join(repr(str(root)) for root in roots.values())
    if not files:
        raise CorpusError(f"{source!r} has no text files in {places}{others_text}; give another")
    say(f"{source}: {count(len(files), 'file')} in {places}{others_text}{hint}")
    return sorted(files, key=lambda file: file.name)


def _is_packed(path: Path) -> bool:
    """Return whether a file holds many documents, or compressed text."""
    if record_form(path) is not None:
        return True
    return is_compressed(path) and inner_suffix(path) in _TEXT_SUFFIXES


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
