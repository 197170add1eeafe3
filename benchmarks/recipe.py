"""Search for a recipe: as many tries with Muon as with AdamW, one seed, then three.

    python benchmarks/recipe.py --output docs/figures/recipe.json
    python benchmarks/recipe.py --output docs/figures/recipe.json --best 3 --seeds 0 1 2

A trial is `truestep train` with the settings of configs/quickstart.toml and those of its name, for
as many steps as are said there; what counts is the bits per byte of the whole validation text. A
trial that stands in the output with the same settings is not made again, so a sweep that was cut
off goes on. On two cores `--jobs 2 --threads 1` is the fastest.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tomli_w
from machine import argument_parser, earlier, facts, own_environment, positive, write

from truestep.data.prepare import prepare_once
from truestep.data.tokenizer import find_tokenizer

BASE = Path(__file__).parents[1] / "configs" / "quickstart.toml"
STEPS = 900  # of 3072 tokens, as quickstart.toml had it: what shorter trials prefer loses there
_TEXT = ("source", "tokenizer")
Settings = dict[str, Any]


def _settings(steps: int = STEPS, decay: float = 0.4, **flat: Any) -> Settings:
    """Return settings by section, from `section__name=value`."""
    nested: Settings = {"training": {"num_steps": steps, "decay_steps": int(decay * steps)}}
    for name, value in flat.items():
        section, _, key = name.partition("__")
        nested.setdefault(section, {})[key] = value
    return nested


# What both optimizers are tried with. Where a change takes another time for a step, it has as many
# steps as take the same time in all.
_SHARED: dict[str, Settings] = {
    "start": _settings(),
    "half the batch, twice the steps": _settings(2 * STEPS, data__batch_size=6),
    "decay over three quarters, to 0": _settings(
        decay=0.75, training__final_learning_rate_factor=0.0
    ),
    "decay over a fifth": _settings(decay=0.2),
    "context 128": _settings(940, model__context_length=128, data__batch_size=24),
    "context 512": _settings(880, model__context_length=512, data__batch_size=6),
    "4 heads": _settings(840, model__num_heads=4),
    "6 layers": _settings(680, model__num_layers=6),
    "3 layers": _settings(1070, model__num_layers=3),
    "2 layers": _settings(1320, model__num_layers=2),
    "embeddings apart from the head": _settings(model__tie_embeddings=False),
    "rotary base 1,000,000": _settings(model__rope_theta=1e6),
}
_ADAMW = {"optimizer": "adamw", "learning_rate": 2e-3}

CONFIGS: dict[str, dict[str, Settings]] = {
    "muon": _SHARED
    | {
        "embeddings and norms 1.2e-2": _settings(training__learning_rate=1.2e-2),
        "matrices 0.01": _settings(training__muon_learning_rate=0.01),
        "matrices 0.04": _settings(training__muon_learning_rate=0.04),
        "rotary base 500": _settings(model__rope_theta=500.0),
    },
    "adamw": {
        name: settings | {"training": _ADAMW | settings["training"]}
        for name, settings in (
            _SHARED
            | {
                "rate 1e-3": _settings(training__learning_rate=1e-3),
                "rate 5e-3": _settings(training__learning_rate=5e-3),
                "betas 0.9, 0.99": _settings(training__betas=[0.9, 0.99]),
                "scaled projections": _settings(model__residual_init="scaled"),
            }
        ).items()
    },
    # The start with Muon, less one of its ingredients; others are "4 heads" and "embeddings apart".
    "without": {
        "bytes": _settings(1240, data__tokenizer="bytes"),
        "queries and keys as they are": _settings(model__qk_norm=False),
        "blocks that begin at random": _settings(model__residual_init="scaled"),
        "a constant rate": _settings(training__schedule="constant"),
    },
}


def merged(base: Settings, change: Settings) -> Settings:
    """Return settings by section with those of another on top."""
    return {name: base.get(name, {}) | change.get(name, {}) for name in base.keys() | change.keys()}


def trial(settings: Settings, runs: Path) -> dict[str, Any]:
    """Train a run of its own and return what it reached, and how long it took."""
    run: Settings = {
        "directory": str(runs),
        "evaluate_every": 10**6,
        "save_every": 10**6,
        "keep_best_checkpoints": 0,
        "sample_tokens": 1,
    }
    with tempfile.TemporaryDirectory(dir=runs, prefix=".trial-") as place:
        run["name"] = f"trial-{Path(place).name.removeprefix('.trial-')}"
        config = Path(place, "config.toml")
        config.write_text(tomli_w.dumps(merged(settings, {"run": run})), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "truestep", "train", str(config)]
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=own_environment())
        seconds = time.perf_counter() - began
        text = (runs / run["name"] / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    steps = sorted(r["step_seconds"] for r in records if "step_seconds" in r)
    return {
        "bits_per_byte": records[-1]["validation_bits_per_byte"],
        "step_ms": round(1e3 * steps[len(steps) // 2], 1),
        "seconds": round(seconds, 1),
    }


def trials(
    keys: Iterable[dict[str, Any]], runs: Path, jobs: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Make the trial of each key's settings, `jobs` at a time, and yield each as it ends."""
    keys = list(keys)
    for source, name in {tuple(key["settings"]["data"][n] for n in _TEXT) for key in keys}:
        # Once for all: of trials that begin together each would do it.
        prepare_once(source, runs / ".data", tokenizer=find_tokenizer(name), say=print)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(trial, key["settings"], runs): key for key in keys}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def best(results: list[dict[str, Any]], group: str, count: int) -> list[str]:
    """Return the names of the trials with the least bits per byte on seed 0."""
    of_group = [r for r in results if (r["group"], r["seed"]) == (group, 0)]
    return [r["name"] for r in sorted(of_group, key=lambda r: r["bits_per_byte"])[:count]]


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Say whether two trials have one place in the table, whatever their settings."""
    return all(first[name] == second[name] for name in ("group", "name", "seed", "data"))


def wanted(options: argparse.Namespace, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the trials that were asked for and are not among the results."""
    base = tomllib.loads(BASE.read_text(encoding="utf-8"))
    base["run"] = {"threads": options.threads} if options.threads else {}
    for group in options.groups:
        names = options.names or list(CONFIGS[group])
        if options.best:
            here = [r for r in results if r["data"] == options.data]
            names = best(here, group, options.best)
            if not names:
                raise SystemExit(f"--best: no trial of {group} on {options.data} with seed 0 yet")
        for seed in options.seeds:
            for name in (name for name in names if name in CONFIGS[group]):
                own: Settings = {"training": {"seed": seed}, "data": {"source": options.data}}
                key = {"group": group, "name": name, "seed": seed, "data": options.data}
                key["settings"] = merged(merged(base, CONFIGS[group][name]), own)
                if not any(key.items() <= result.items() for result in results):
                    yield key


def main() -> None:
    parser: argparse.ArgumentParser = argument_parser(__doc__)
    parser.add_argument("--data", default="stdlib", help="what to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--groups", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    every = sorted({name for configs in CONFIGS.values() for name in configs})
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--best", type=positive, help="only so many, those best on seed 0")
    some.add_argument("--names", nargs="+", choices=every, help="only these", metavar="NAME")
    parser.add_argument("--jobs", type=positive, default=1, help="trials at one time")
    parser.add_argument("--threads", type=positive, help="of a trial")
    options = parser.parse_args()
    results = earlier(options.output, "trials")
    commit = facts()["commit"]
    with tempfile.TemporaryDirectory() as runs:
        keys = list(wanted(options, results))
        for key, found in trials(keys, Path(runs), options.jobs):
            results = [result for result in results if not _same(result, key)]
            results.append({**key, **found, "commit": commit})
            write(options.output, {"trials": results})
            print(
                f"{key['group']:7} {key['name']:34} seed {key['seed']} "
                f"{found['bits_per_byte']:.4f} bits per byte {found['step_ms']:8.1f} ms a step "
                f"{found['seconds']:6.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
