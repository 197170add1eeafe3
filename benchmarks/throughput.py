"""Time of a training step on the workloads of docs/performance.md, beside other trainers'.

    python benchmarks/throughput.py --nanogpt PATH --peers litgpt transformers --output result.json

Each round runs a few steps of every variant in turn, and the matrix products that the utilisation
is measured against, so that a machine that slows down slows all of them. Figures are medians over
the rounds. Every variant trains the same shape on the same tokens, with AdamW, clipping at 1.0 and
no dropout, in one process whose allocator is set alike for all.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from machine import argument_parser, existing, facts, positive, write
from peers import Step, litgpt_model, litgpt_step, nanogpt_step, transformers_step
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig
from truestep.compiler import Compilation
from truestep.machine import measure_peak_flops
from truestep.runtime import keep_freed_memory, resolve_device

Precision = Literal["auto", "float32", "bfloat16"]
_OWN_VARIANTS: tuple[tuple[str, Precision, Compilation], ...] = (
    ("truestep float32 eager", "float32", "off"),
    ("truestep float32 compiled", "float32", "on"),
    ("truestep bfloat16 eager", "bfloat16", "off"),
    ("truestep", "auto", "on"),
)
_PEAK_DTYPES = ("float32", "bfloat16")
_SECONDS_A_ROUND = 1.5  # of each variant, at least
_WARMUP_STEPS = 3  # steps before the clock starts: they compile and fill caches


def truestep_step(
    workload: Workload,
    precision: Precision,
    compile_: Compilation,
    model: torch.nn.Module | None = None,
) -> Step:
    """The reference model, or another, in a Trainer that logs nothing."""
    torch.manual_seed(0)
    config = TrainingConfig(precision=precision, compile=compile_)
    trainer = Trainer(model or GPT(workload.config()), config, sinks=[])
    return lambda: trainer.training_step(workload.batch(trainer.step)).loss


Make = Callable[[Workload], Step]


def variants_of(nanogpt: Path | None, peers: list[str]) -> dict[str, Make]:
    """Return how to make every variant; the first is what the others are compared with."""
    variants: dict[str, Make] = {}
    if nanogpt is not None:
        variants["nanoGPT"] = partial(nanogpt_step, path=nanogpt, compiled=False)
        variants["nanoGPT compiled"] = partial(nanogpt_step, path=nanogpt, compiled=True)
    if "transformers" in peers:
        variants["transformers bfloat16"] = transformers_step
    if "litgpt" in peers:
        variants["litgpt"] = litgpt_step
        variants["litgpt's model in truestep"] = lambda workload: truestep_step(
            workload, "auto", "on", litgpt_model(workload)
        )
    for name, precision, compile_ in _OWN_VARIANTS:
        variants[name] = partial(truestep_step, precision=precision, compile_=compile_)
    return variants


def measure(variants: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds a step of each round, every variant in turn."""
    steps_a_round = {}
    for name, step in variants.items():
        print(f"warming up {name}", flush=True)
        for _ in range(_WARMUP_STEPS):
            step()
        start = time.perf_counter()
        step()
        steps_a_round[name] = max(2, round(_SECONDS_A_ROUND / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    device = resolve_device("auto")
    for _ in range(rounds):
        for name, step in variants.items():
            start = time.perf_counter()
            for _ in range(steps_a_round[name]):
                step()
            seconds[name].append((time.perf_counter() - start) / steps_a_round[name])
        for dtype in _PEAK_DTYPES:
            peak = measure_peak_flops(device, getattr(torch, dtype))
            seconds.setdefault(f"peak {dtype}", []).append(1 / peak)
    return seconds


def run(name: str, rounds: int, variants: dict[str, Make]) -> dict[str, Any]:
    """Measure one workload, print its table and return it."""
    torch.compiler.reset()
    workload = WORKLOADS[name]
    seconds = measure({each: make(workload) for each, make in variants.items()}, rounds)
    peaks = {dtype: 1 / statistics.median(seconds.pop(f"peak {dtype}")) for dtype in _PEAK_DTYPES}
    base = statistics.median(next(iter(seconds.values())))
    results = []
    print(f"\n{name}  {asdict(workload)}  {workload.flops / 1e9:.1f} GFLOP a step")
    print(", ".join(f"{dtype} products {peak / 1e9:.0f} GFLOP/s" for dtype, peak in peaks.items()))
    print(f"{'':27}{'ms a step':>10}{'tokens/s':>10}{'MFU':>6}{'ratio':>7}   min-max ms")
    for variant, times in seconds.items():
        median = statistics.median(times)
        dtype = "float32" if variant.startswith("nanoGPT") or "float32" in variant else "bfloat16"
        row = {
            "variant": variant,
            "median_seconds": median,
            "seconds": times,
            "tokens_per_second": workload.tokens / median,
            "mfu": workload.flops / median / peaks[dtype],
            "ratio": base / median,
        }
        results.append(row)
        print(
            f"{variant:27}{median * 1e3:10.1f}{row['tokens_per_second']:10,.0f}{row['mfu']:6.0%}"
            f"{row['ratio']:7.2f}   {min(times) * 1e3:.0f}-{max(times) * 1e3:.0f}",
            flush=True,
        )
    peak_gflops = {dtype: round(peak / 1e9) for dtype, peak in peaks.items()}
    shape = {"workload": name, **asdict(workload), "flops": workload.flops}
    return {**shape, "peak_gflops": peak_gflops, "results": results}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W3"])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--nanogpt", type=existing, help="a checkout of nanoGPT, to compare with")
    parser.add_argument(
        "--peers", nargs="+", choices=["litgpt", "transformers"], default=[], help="if installed"
    )
    parser.add_argument(
        "--variants", nargs="+", help="only those of these names, where not all fit into memory"
    )
    options = parser.parse_args()
    keep_freed_memory()  # for every variant alike
    print(json.dumps(facts()))
    variants = variants_of(options.nanogpt, options.peers)
    if options.variants:
        if unknown := set(options.variants) - set(variants):
            parser.error(f"--variants {sorted(unknown)} are unknown; there are {list(variants)}")
        variants = {name: variants[name] for name in options.variants}
    workloads = [run(name, options.rounds, variants) for name in options.workloads]
    write(options.output, {"workloads": workloads})


if __name__ == "__main__":
    main()
