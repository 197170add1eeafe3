"""How long a person waits before the first step: commands, imports, and compilation.

    python benchmarks/startup.py --workloads W1 W2 W3 --output result.json

Each case is a process of its own. Commands and imports are medians over some repeats; the first
step of a workload is taken five times: uncompiled, and compiled whole and by layers, each with an
empty cache and with the one that the time before has filled.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import argument_parser, environment_of_cache, own_environment, positive, write
from workloads import WORKLOADS

from truestep.compiler import Compilation

_COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import truestep": ["-c", "import truestep"],
    "import truestep.Trainer": ["-c", "from truestep import GPT, Trainer"],
    "truestep --help": ["-m", "truestep", "--help"],
    "truestep train --help": ["-m", "truestep", "train", "--help"],
}


# What is compiled, and the cases that share a cache, which the first of them finds empty.
_FIRST_STEPS: dict[Compilation, tuple[str, ...]] = {
    "off": ("uncompiled",),
    "on": ("cold", "warm"),
    "layers": ("cold, by layers", "warm, by layers"),
}


def first_step(name: str, compile_: Compilation) -> None:
    """Print the seconds that the first step and the one after it take, in this process."""
    from throughput import truestep_step

    step = truestep_step(WORKLOADS[name], "auto", compile_)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


def run(arguments: list[str], cache: str | None = None) -> tuple[float, str]:
    """Return how long a Python process took, and the last line it wrote."""
    environment = own_environment() if cache is None else environment_of_cache(Path(cache))
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return time.perf_counter() - start, done.stdout.strip().rpartition("\n")[2]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W3"])
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--first-step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        first_step(*options.first_step)
        return
    times: dict[str, list[float]] = {command: [] for command in _COMMANDS}
    for _ in range(options.repeats):
        for command, arguments in _COMMANDS.items():
            times[command].append(run(arguments)[0])
    for command, seconds in times.items():
        print(f"{command:26}{statistics.median(seconds):8.2f} s  (least {min(seconds):.2f})")
    firsts = []
    for name in options.workloads:
        for compile_, cases in _FIRST_STEPS.items():
            with tempfile.TemporaryDirectory() as cache:
                arguments = [__file__, "--first-step", name, compile_]
                for case in cases:
                    first, second = json.loads(run(arguments, cache)[1])
                    row = {"workload": name, "case": case, "first": first, "second": second}
                    firsts.append(row)
                    print(f"{name} {case:23}{first:8.2f} s  (the step after it {second:.2f})")
    write(options.output, {"commands": times, "first_steps": firsts})


if __name__ == "__main__":
    main()
