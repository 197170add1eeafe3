"""Do learning rates found on a small model serve a larger one? Widths of 64, 128 and 256.

    python benchmarks/transfer.py --output docs/figures/transfer.json
    python benchmarks/transfer.py --output docs/figures/transfer.json --factors 0.5 1 2 --seeds 1 2

Each width trains by the recipe of configs/quickstart.toml, on bytes, with both of its learning
rates multiplied alike. A trial that stands in the output is not made again. On two cores
`--jobs 2 --threads 1` is the fastest; more threads than cores are ten times slower.
"""

import itertools
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from machine import argument_parser, earlier, facts, positive, write
from recipe import BASE, merged, trials

HEADS = {64: 1, 128: 2, 256: 4}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
RATES = ("learning_rate", "muon_learning_rate")


def settings(
    base: dict[str, Any], width: int, factor: float, steps: int, seed: int
) -> dict[str, Any]:
    """Return the recipe at a width with its learning rates multiplied."""
    training = base["training"]
    change = {
        "training": {name: factor * training[name] for name in RATES}
        | {"num_steps": steps, "decay_steps": 2 * steps // 5, "seed": seed},
        "model": {"width": width, "num_heads": HEADS[width]},
        "data": {"tokenizer": "bytes"},
    }
    return merged(base, change)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", default="stdlib", help="what to train on")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=positive, default=1, help="trials at one time")
    parser.add_argument("--threads", type=positive, help="of a trial")
    options = parser.parse_args()
    results = earlier(options.output, "trials")
    base = tomllib.loads(BASE.read_text(encoding="utf-8"))
    base["data"]["source"] = options.data
    if options.threads:
        base["run"]["threads"] = options.threads
    keys = []
    for seed, width, factor in itertools.product(options.seeds, HEADS, options.factors):
        key = {"data": options.data, "width": width, "factor": factor, "seed": seed}
        key["settings"] = settings(base, width, factor, options.steps, seed)
        if not any(key.items() <= result.items() for result in results):
            keys.append(key)
    commit = facts()["commit"]
    with tempfile.TemporaryDirectory() as runs:
        for key, found in trials(keys, Path(runs), options.jobs):
            place = {name: key[name] for name in ("data", "width", "factor", "seed")}
            results = [result for result in results if not place.items() <= result.items()]
            results.append({**key, **found, "commit": commit})
            print(
                f"width {key['width']} x{key['factor']} seed {key['seed']}: "
                f"{found['bits_per_byte']:.4f}",
                flush=True,
            )
            write(options.output, {"trials": results})


if __name__ == "__main__":
    main()
