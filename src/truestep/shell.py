"""Commands as a person can type them again, in the shell this program was called from."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """Return this program called with `words`, each quoted; a path is never taken for an option."""
    return " ".join([_program(), *(_quoted(word) for word in words)])


def _quoted(word: str | Path) -> str:
    dashed = isinstance(word, Path) and str(word).startswith("-")
    return shlex.quote(f"./{word}" if dashed else str(word))


def _program() -> str:
    if shutil.which("truestep"):
        return "truestep"
    called = Path(sys.argv[0])
    if called.name == "truestep":  # installed, but in no directory of PATH
        return shlex.quote(_shorter(called))
    return f"{shlex.quote(_shorter(Path(sys.executable)))} -m truestep"


def _shorter(path: Path) -> str:
    return min(os.path.relpath(path), str(path.absolute()), key=len)
