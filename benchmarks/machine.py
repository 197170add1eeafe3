"""What a figure was measured on, for the JSON of every benchmark."""

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

import truestep
from truestep.runtime import processor_name, resolve_device

_PEERS = ("litgpt", "transformers", "lightning")


def facts() -> dict[str, Any]:
    """Return commit, versions and machine."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "truestep": truestep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": {name: version for name in _PEERS if (version := _version(name))},
        "machine": f"{platform.machine()}, {processor_name()}",
        "device": str(resolve_device("auto")),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
