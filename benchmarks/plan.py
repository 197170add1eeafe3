"""What `truestep plan` predicts beside what the run then shows: time of a step, and peak memory.

    python benchmarks/plan.py --output result.json

Plan and run are processes of their own, in turns, on the standard library's source: once with a
compile cache each that is empty, and then with what the run left in its own. The step of a run is
the median of its log after the first ten; peak memory is what the system says of the process.
With `--gpu`, what is computed from that GPU's data sheet stands beside them.
What stands in the output with the same settings is not measured again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import tomllib
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

_SKIPPED = 10
_PLAN = """
import json, sys
from pathlib import Path
from truestep.config import resolve
from truestep.workflows.plan import plan
found = plan(resolve({}, {}, Path(sys.argv[1])), lambda _: None)
print(json.dumps({"seconds": found.estimate.step, "bytes": found.peak_bytes}))
"""
_COMPUTE = """
import json, sys
from pathlib import Path
from truestep.config import resolve
from truestep.gpus import find_gpu
from truestep.workflows.plan import plan_on
found = plan_on(resolve({}, {}, Path(sys.argv[1])), find_gpu(sys.argv[2]), lambda _: None)
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


def computed(config: Path, gpu: str) -> dict[str, Any]:
    """Return what a plan computes for a GPU that is not here."""
    command = [sys.executable, "-W", "ignore", "-c", _COMPUTE, str(config), gpu]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, env=own_environment()))
    return found


def predicted(config: Path, cache: Path) -> dict[str, Any]:
    """Return what the plan says."""
    command = [sys.executable, "-W", "ignore", "-c", _PLAN, str(config)]
    said = subprocess.check_output(command, env=environment_of_cache(cache))
    found: dict[str, Any] = json.loads(said)
    return found


def seen(config: Path, run: Path, cache: Path) -> dict[str, Any]:
    """Return what the run shows."""
    command = [sys.executable, "-W", "ignore", "-c", _RUN, "train", str(config)]
    command += ["--run.name", run.name]
    said = subprocess.check_output(command, env=environment_of_cache(cache))
    peak = int(said.splitlines()[-1])
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [r["step_seconds"] for r in map(json.loads, lines) if "step_seconds" in r]
    return {"seconds": statistics.median(seconds[_SKIPPED:]), "bytes": peak}


def in_turns(config: Path, runs: Path, turns: int) -> dict[str, Any]:
    """Return the median seconds of plans and runs, and the bytes of the first of each."""
    caches = runs / "cache-plan", runs / "cache-run"
    for cache in caches:
        cache.mkdir()
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for turn in range(turns):
        before = predicted(config, caches[1 if turn else 0])
        found.append((before, seen(config, runs / f"run-{turn}", caches[1])))
    return {
        name: {
            "seconds": statistics.median(each["seconds"] for each in of),
            "each_seconds": [each["seconds"] for each in of],
            "bytes": of[0]["bytes"],
        }
        for name, of in zip(("predicted", "seen"), zip(*found, strict=True), strict=True)
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=60)
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument(
        "--configs", nargs="+", choices=[*CONFIGS, *GPU_CONFIGS], default=list(CONFIGS)
    )
    parser.add_argument("--gpu", choices=list(GPUS), help="compute it from this data sheet, too")
    options = parser.parse_args()
    results = earlier(options.output, "configs")
    for name in options.configs:
        # Both compile or neither: a run of so few steps would leave it.
        length = {"num_steps": options.steps, "warmup_steps": 0, "decay_steps": "auto"}
        settings = merged((CONFIGS | GPU_CONFIGS)[name], {"training": {**length, "compile": "on"}})
        key = {"name": name, "settings": settings, "gpu": options.gpu, "turns": options.turns}
        if any(key.items() <= found.items() for found in results):
            continue
        with tempfile.TemporaryDirectory() as place:
            config = Path(place, "config.toml")
            # A short text to validate on: what a run does after its last step is not measured.
            here = {
                "run": {"directory": place, "evaluate_every": options.steps // 2},
                "data": {"validation": shutil.copy(argparse.__file__, f"{place}/held-out.txt")},
            }
            config.write_text(tomli_w.dumps(merged(settings, here)), encoding="utf-8")
            found = {**key, "commit": facts()["commit"]}
            if options.gpu:
                found["computed"] = computed(config, options.gpu)
            found |= in_turns(config, Path(place), options.turns)
        results = [old for old in results if (old["name"], old["gpu"]) != (name, options.gpu)]
        results.append(found)
        ratios = [found["predicted"][key] / found["seen"][key] for key in ("seconds", "bytes")]
        print(
            f"{name:34}{found['predicted']['seconds'] * 1e3:9.1f}"
            f"{found['seen']['seconds'] * 1e3:9.1f} ms {ratios[0]:6.2f}"
            f"{found['predicted']['bytes'] / 2**20:9,.0f}{found['seen']['bytes'] / 2**20:9,.0f} MiB"
            f" {ratios[1]:6.2f}",
            flush=True,
        )
        write(options.output, {"configs": results})


if __name__ == "__main__":
    main()
