"""Torch's cache of compiled libraries, which outlives runs, and what a kill leaves in it."""

import contextlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

# Of the header of a 64-bit ELF file: where the section headers begin, their size and their number.
_SECTIONS = struct.Struct("<40xQ10xHH2x")


def discard_cut_libraries(cache: Path) -> list[Path]:
    """Remove every library that a killed compiler left cut short, and return their paths.

    Torch takes any file there is for a whole one, and would fail to load it in every later run.
    One that another process is writing just now stays: it holds torch's lock of that name.
    """
    return [
        path for path in cache.glob("*/*.so") if not _is_whole(path) and _discarded(cache, path)
    ]


def _is_whole(path: Path) -> bool:
    """Return whether a library reaches up to its last part, the section headers."""
    try:
        with path.open("rb") as stream:
            header, size = stream.read(_SECTIONS.size), path.stat().st_size
    except OSError:  # gone meanwhile
        return True
    if not sys.platform.startswith("linux"):
        return size > 0
    if len(header) < _SECTIONS.size or not header.startswith(b"\x7fELF"):
        return False
    begin, each, count = _SECTIONS.unpack(header)
    return bool(0 < begin <= begin + each * count <= size)


def _discarded(cache: Path, path: Path) -> bool:
    with _locked(cache / "locks" / f"{path.name.partition('.')[0]}.lock") as locked:
        if locked and not _is_whole(path):
            path.unlink(missing_ok=True)
        return locked


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
