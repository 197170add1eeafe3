"""What `truestep plan` predicts beside what the run then shows: time of a step, and peak memory.

    python benchmarks/plan.py --output result.json

On the standard library's source. Memory is what the system says of a process, a plan's and then a
run's, in so many pairs, each with a compile cache that is empty. For the time, a plan and a run
stand side by side, compiled whole, and in turns one works while the other is stopped: the plan
measures its steps as often as there are turns, each time between two stretches of the run, whose
steps are those of its log. With `--gpu`, what is computed from that GPU's data sheet stands beside
them.
What stands in the output with the same settings is not measured again.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from machine import (
    argument_parser,
    earlier,
    environment_of_cache,
    facts,
    own_environment,
    positive,
    write,
)
from recipe import merged
from workloads import WORKLOADS

from truestep.gpus import GPUS

_BOTH = ("predicted", "seen")
_STEPS = 24  # of the run whose memory is looked at
_SKIPPED = 10  # of the other, before the first stretch
_STRETCH_SECONDS = 6.0  # of the run, before and after each measurement of the plan, which takes 5
_PLAN = """
import json, sys
from pathlib import Path
from truestep.config import resolve
from truestep.gpus import find_gpu
from truestep.workflows.plan import plan, plan_on
config, *gpu = sys.argv[1:]
settings = resolve({}, {}, Path(config))
say = lambda _: None
found = plan_on(settings, find_gpu(*gpu), say) if gpu else plan(settings, say)
print(json.dumps({"seconds": found.estimate.step, "bytes": found.peak_bytes}))
"""
_RUN = """
import sys
from truestep.cli import main
from truestep.machine import peak_bytes
from truestep.runtime import resolve_device
if main(sys.argv[1:]) != 0:
    raise SystemExit("the run failed")
print(peak_bytes(resolve_device("auto")))
"""
# The same plan, whose measurement is made once more for every line that it is given.
_PLAN_IN_TURNS = (
    """
import sys
from truestep.training import estimate
measured = estimate._measured
def in_turns(*arguments):
    found = measured(*arguments)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(measured(*arguments)[1], flush=True)
    return found
estimate._measured = in_turns
"""
    + _PLAN
)


def _of_workload(name: str) -> dict[str, Any]:
    """The shape of a workload, on bytes where its vocabulary is smaller."""
    workload = WORKLOADS[name]
    shape = workload.config().model_dump(exclude={"num_kv_heads", "mlp_width"})
    shape["vocab_size"] = max(256, workload.vocab_size)
    return {"model": shape, "data": {"batch_size": workload.batch_size}}


def _of_file(name: str) -> dict[str, Any]:
    """The settings of a recipe."""
    text = (Path(__file__).parents[1] / "configs" / name).read_text(encoding="utf-8")
    return tomllib.loads(text)


CONFIGS: dict[str, dict[str, Any]] = {
    "W1": _of_workload("W1"),
    "W2": _of_workload("W2"),
    "W3": _of_workload("W3"),
    "Muon on 4,096 byte pairs": {
        "training": {"optimizer": "muon"},
        "model": {"qk_norm": True},
        "data": {"tokenizer": "bpe-4096", "batch_size": 8},
    },
    "context 1024, four micro-batches": {
        "training": {"micro_batch_size": 2},
        "model": {"context_length": 1024},
        "data": {"batch_size": 8},
    },
    "float32, grouped heads, dropout": {
        "training": {"precision": "float32"},
        "model": {"width": 192, "num_heads": 6, "num_kv_heads": 2, "dropout": 0.1},
        "data": {"batch_size": 8},
    },
}
GPU_CONFIGS = {"configs/gpu-evening.toml": _of_file("gpu-evening.toml")}


def predicted(config: Path, environment: dict[str, str], *gpu: str) -> dict[str, Any]:
    """Return what the plan says of this machine, or of a GPU that is not here."""
    said = subprocess.check_output(_command(_PLAN, str(config), *gpu), env=environment)
    found: dict[str, Any] = json.loads(said)
    return found


def peaks(config: Path, name: str) -> tuple[int, int]:
    """Return the bytes that a plan says and those of a run of that name.

    The run validates and saves five times on the way.
    """
    command = _command(_RUN, "train", str(config), "--run.name", name)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        said = predicted(config, environment_of_cache(Path(cache)))["bytes"]
        seen = subprocess.check_output(command, env=environment_of_cache(Path(other)))
    return said, int(seen.splitlines()[-1])


def side_by_side(config: Path, place: Path, turns: int) -> list[tuple[float, float]]:
    """Return the seconds of a step as the plan says them and as the run has them, of each turn."""
    endless = ["--training.num-steps", "1000000", "--run.name", "long"]
    endless += ["--run.evaluate-every", "1000000", "--run.save-every", "1000000"]
    endless += ["--run.log-every", "1000000"]  # nobody reads what it says
    log = place / "long" / "metrics.jsonl"
    found = []
    with _started(_command(_PLAN_IN_TURNS, str(config)), place) as plan:
        assert plan.stdout.readline() == "ready\n"
        with _started(_command(_RUN, "train", str(config), *endless), place) as run:
            while len(_step_seconds(log)) < _SKIPPED:
                time.sleep(0.5)
                assert run.poll() is None
            os.killpg(run.pid, signal.SIGSTOP)
            before = _stretch(run.pid, log)
            for _ in range(turns):
                plan.stdin.write("\n")
                plan.stdin.flush()
                said = float(plan.stdout.readline())
                after = _stretch(run.pid, log)
                found.append((said, statistics.median(before + after)))
                before = after
    return found


@contextlib.contextmanager
def _started(command: list[str], place: Path) -> Iterator[Any]:
    """Start a process, and end it with all that it has started."""
    with subprocess.Popen(
        command,
        env=_environment(place),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)


def _stretch(group: int, log: Path) -> list[float]:
    """Let the run go on for a while, and return the seconds of its whole steps in that."""
    before = len(_step_seconds(log))
    os.killpg(group, signal.SIGCONT)
    time.sleep(_STRETCH_SECONDS)
    os.killpg(group, signal.SIGSTOP)
    return _step_seconds(log)[before + 1 :]  # the first has stood still since the last stretch


def _step_seconds(log: Path) -> list[float]:
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    return [r["step_seconds"] for r in map(json.loads, lines) if "step_seconds" in r]


def _command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", program, *arguments]


def _environment(place: Path) -> dict[str, str]:
    """Return that of a plan, and of the run that finds what it compiled."""
    cache = place / "cache"
    cache.mkdir(exist_ok=True)
    return environment_of_cache(cache)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--turns", type=positive, default=9)
    parser.add_argument("--pairs", type=positive, default=3, help="of which memory is looked at")
    parser.add_argument(
        "--configs", nargs="+", choices=[*CONFIGS, *GPU_CONFIGS], default=list(CONFIGS)
    )
    parser.add_argument("--gpu", choices=list(GPUS), help="compute it from this data sheet, too")
    options = parser.parse_args()
    results = earlier(options.output, "configs")
    for name in options.configs:
        # Both compile or neither: so short a run would leave it.
        length = {"num_steps": _STEPS, "warmup_steps": 0, "decay_steps": "auto"}
        settings = merged((CONFIGS | GPU_CONFIGS)[name], {"training": {**length, "compile": "on"}})
        key = {"name": name, "settings": settings, "gpu": options.gpu}
        key |= {"turns": options.turns, "pairs": options.pairs}
        if any(key.items() <= found.items() for found in results):
            continue
        with tempfile.TemporaryDirectory() as place:
            config = Path(place, "config.toml")
            # A short text to validate on: what a run does after its last step is not measured.
            here = {
                "run": {"directory": place, "evaluate_every": _STEPS // 6},
                "data": {"validation": shutil.copy(argparse.__file__, f"{place}/validation.txt")},
            }
            config.write_text(tomli_w.dumps(merged(settings, here)), encoding="utf-8")
            found = {**key, "commit": facts()["commit"]}
            if options.gpu:
                found["computed"] = predicted(config, own_environment(), options.gpu)
            pairs = [peaks(config, f"short-{i}") for i in range(options.pairs)]
            found["bytes"] = dict(zip(_BOTH, zip(*pairs, strict=True), strict=True))
            turns = side_by_side(config, Path(place), options.turns)
            found["seconds"] = dict(zip(_BOTH, zip(*turns, strict=True), strict=True))
        results = [old for old in results if (old["name"], old["gpu"]) != (name, options.gpu)]
        results.append(found)
        ratios = [said / seen for said, seen in turns]
        said, seen = (statistics.median(found["bytes"][of]) for of in _BOTH)
        print(
            f"{name:34} {1e3 * statistics.median(found['seconds']['predicted']):8,.1f} ms a step, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the "
            f"run's; {said / 2**20:,.0f} MiB, {said / seen:.2f}",
            flush=True,
        )
        write(options.output, {"configs": results})


if __name__ == "__main__":
    main()
