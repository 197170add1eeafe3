"""What `make train` reaches, and after how many seconds, with the compiler's cache empty and full.

    python benchmarks/quickstart.py --caches cold cold cold warm --output result.json

Each run is a process of its own that prepares text and tokenizer anew. Seconds count from the start
of the process to its first and its last update, validation on the way included; bits per byte are
those of the whole validation text at the end. A warm cache is what the run before has left.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from machine import argument_parser, earlier, environment_of_cache, existing, facts, write
from recipe import BASE

_INTERVAL = 0.1  # seconds between two looks at the log


def measured(config: Path, runs: Path, cache: Path) -> dict[str, Any]:
    """Train once and return what was reached, and when."""
    command = [sys.executable, "-m", "truestep", "train", str(config)]
    command += ["--run.directory", str(runs), "--run.name", "run"]
    steps = tomllib.loads(config.read_text(encoding="utf-8"))["training"]["num_steps"]
    log, updates, first, last = runs / "run" / "metrics.jsonl", 0, 0.0, 0.0
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment_of_cache(cache))
    while process.poll() is None:
        time.sleep(_INTERVAL)
        if updates < steps and log.exists():
            updates = log.read_text(encoding="utf-8").count("step_seconds")
            last = time.perf_counter() - began
            first = first or (last if updates else 0.0)
    if process.returncode or updates != steps:
        raise SystemExit(f"{' '.join(command)} failed, or ended before its last step was seen")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seconds = sorted(r["step_seconds"] for r in records if "step_seconds" in r)
    return {
        "first_update": round(first, 1),
        "last_update": round(last, 1),
        "step_ms": round(1e3 * seconds[len(seconds) // 2], 1),
        "steps": len(seconds),
        "bits_per_byte": records[-1]["validation_bits_per_byte"],
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", type=existing, default=BASE)
    caches = ("cold", "warm")
    parser.add_argument("--caches", nargs="+", choices=caches, default=["cold", "warm"])
    options = parser.parse_args()
    if options.caches[0] == "warm":
        parser.error("--caches warm first: no run before has filled the cache; begin with cold")
    results = earlier(options.output, "runs")
    settings = tomllib.loads(options.config.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place, "cache")
        for number, kind in enumerate(options.caches):
            if kind == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir(exist_ok=True)
            runs, commit = Path(place, f"runs-{number}"), facts()["commit"]
            found = measured(options.config, runs, cache)
            results.append({"cache": kind, "settings": settings, **found, "commit": commit})
            print(
                f"{kind:6}{found['first_update']:8.1f} s to the first update, "
                f"{found['last_update']:.1f} s to the last, {found['step_ms']} ms a step, "
                f"{found['bits_per_byte']:.4f} bits per byte",
                flush=True,
            )
            write(options.output, {"runs": results})


if __name__ == "__main__":
    main()
