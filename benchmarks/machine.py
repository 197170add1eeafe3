"""What every benchmark shares: its arguments, and what a figure was measured on."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import truestep
from truestep.machine import device_name, processor_name
from truestep.runtime import resolve_device

_PEERS = ("litgpt", "transformers", "lightning")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that knows `--output`, and refuses it before anything is measured."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=_new_file, help="where to write the figures as JSON")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 or more")
    return int(text)


def existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def _new_file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is in no directory that exists")
    return Path(text)


def write(path: Path | None, record: dict[str, Any]) -> None:
    """Write the figures and what they were measured on, if a path was given."""
    if path is not None:
        path.write_text(json.dumps({**facts(), **record}, indent=1) + "\n", encoding="utf-8")


def earlier(path: Path | None, name: str) -> list[dict[str, Any]]:
    """Return what stands in the output by now, to go on from there.

    Errors: SystemExit for figures of another machine or another torch.
    """
    if path is None or not path.exists():
        return []
    record, now = json.loads(path.read_text(encoding="utf-8")), facts()
    for field in ("machine", "torch"):
        if record[field] != now[field]:
            raise SystemExit(
                f"{path} has figures of {field} {record[field]}, and here it is {now[field]}; give "
                "another --output"
            )
    found: list[dict[str, Any]] = record[name]
    return found


def own_environment() -> dict[str, str]:
    """Return this process's environment without settings of truestep."""
    return {name: value for name, value in os.environ.items() if "TRUESTEP" not in name}


def environment_of_cache(cache: Path) -> dict[str, str]:
    """Return the same where `cache` is all that the compiler remembers: its headers lie in TMPDIR.

    Compiled code lies there as well, unless TORCHINDUCTOR_CACHE_DIR says otherwise.
    """
    return own_environment() | {"TMPDIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache)}


def facts() -> dict[str, Any]:
    """Return commit, versions and machine."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    device = resolve_device("auto")
    machine = f"{platform.machine()}, {processor_name()}"
    return {
        "commit": commit,
        "truestep": truestep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": {name: version for name in _PEERS if (version := _version(name))},
        "machine": machine if device.type == "cpu" else f"{machine}, {device_name(device)}",
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
