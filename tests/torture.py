"""What `make torture` does: kills, power losses and damage by the thousand, and a table of it.

It exits with 1 if any law was broken. Interrupted, it ends what it started and tells what it has.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from corruptions import corrupt_checkpoint, corrupt_data
from kills import random_kills
from power_loss import lose_power
from sweep import sweep

_FAULTS = ("kill", "disk full", "error after the effect", "short write")
_EVERY_SECONDS = 3.0


class Reporter:
    """Prints a line every few seconds while a part goes on, and keeps its latest figures."""

    def __init__(self, part: str) -> None:
        self.figures: dict[str, Any] = {}
        self._part, self._started = part, time.monotonic()
        self._told = self._started

    def __call__(self, figures: dict[str, Any]) -> None:
        self.figures = figures
        now = time.monotonic()
        if now - self._told >= _EVERY_SECONDS:
            self._told = now
            counts = {**figures, **figures.get("laws", {})}
            line = ", ".join(f"{k} {v:,}" for k, v in counts.items() if isinstance(v, int))
            print(f"{self._part}: {line.replace('_', ' ')} ({now - self._started:.0f} s)")
            sys.stdout.flush()


def hostile() -> dict[str, Any]:
    """Type a command at every hostile file of `hostile.py`, and count what went wrong."""
    from hostile import judge_all, make_place

    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        made = Path(scratch, "made")
        make_place(made)
        found = judge_all(made, Path(scratch))
    wrongs = [(name, wrong) for name, problems in found.items() for wrong in problems]
    executed = sum(wrong == "the canary exists" for _, wrong in wrongs)
    return {
        "files": len(found),
        "laws": {"code_executions": executed, "other_wrongs": len(wrongs) - executed},
        "failures": [f"{name}: {wrong}" for name, wrong in wrongs],
    }


def run_parts(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], bool]:
    """Run every part and return what each found, and whether it was interrupted.

    The kills come first: they are sent from a process that has computed nothing yet.
    """
    half = options.corruptions // 2
    parts: dict[str, Callable[[Reporter], dict[str, Any]]] = {
        "random kills": lambda tell: random_kills(options.kills, seed=options.seed, progress=tell),
        "sweep": lambda tell: sweep(_FAULTS, progress=tell),
        "power loss": lambda tell: lose_power(
            limit=options.states, seeds=options.power_loss_seeds, progress=tell
        ),
        "damaged checkpoint": lambda tell: corrupt_checkpoint(
            options.corruptions - half, seed=options.seed, progress=tell
        ),
        "damaged data": lambda tell: corrupt_data(half, seed=options.seed, progress=tell),
        "hostile files": lambda tell: hostile(),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        tell = Reporter(name)
        try:
            found[name] = part(tell)
        except KeyboardInterrupt:
            found[name] = {**tell.figures, "interrupted": True}
            return found, True
    return found, False


def broken_laws(found: dict[str, dict[str, Any]]) -> int:
    """Count what must not be; a second hash of one configuration counts, too."""
    count = 0
    for figures in found.values():
        count += sum(figures.get("laws", {}).values())
        count += sum(n - 1 for n in figures.get("distinct_final_hashes", {}).values())
    return count


def print_table(found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'':44}{'found':>12}")
    for part, figures in found.items():
        print(part)
        for name, value in figures.items():
            if isinstance(value, dict):
                print(f"  {name.replace('_', ' ')}")
                for key, number in value.items():
                    print(f"    {str(key).replace('_', ' '):40}{number:>12,}")
            elif isinstance(value, list):
                for line in value:
                    print(f"  {name.replace('_', ' ')}: {line}")
            else:
                print(f"  {name.replace('_', ' '):42}{value:>12,}")


def commit() -> dict[str, Any]:
    """Return which source this is, and whether it was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../src", ".")
    return {"commit": git("rev-parse", "HEAD") or "unknown", "changed": bool(changed)}


def main() -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--corruptions", type=int, default=100_000)
    parser.add_argument("--states", type=int, default=400, help="at most, after each operation")
    parser.add_argument("--power-loss-seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    started, source = time.monotonic(), commit()
    found, interrupted = run_parts(options)
    broken = broken_laws(found)
    print_table(found)
    seconds = round(time.monotonic() - started, 1)
    print(f"\n{broken} laws broken in {seconds:,} s{', interrupted' * interrupted}")
    if options.output is not None and not interrupted:
        record = {
            **source,
            "machine": f"{platform.system()} {platform.machine()}, {processor_name()}",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("truestep", "torch", "numpy", "safetensors")},
            },
            "seed": options.seed,
            "seconds": seconds,
            "laws_broken": broken,
            "parts": found,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 130 if interrupted else int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
