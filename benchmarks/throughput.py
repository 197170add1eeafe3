"""Time of a training step on the workloads of docs/performance.md, beside other trainers'.

    python benchmarks/throughput.py --nanogpt PATH --peers litgpt transformers --output result.json

Each round runs a few steps of every variant in turn, and the matrix products that the utilisation
is measured against, so that a machine that slows down slows all of them. Figures are medians over
the rounds. Every variant trains the same shape on the same tokens, with AdamW, clipping at 1.0 and
no dropout, in one process whose allocator is set alike for all.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from machine import facts
from peers import Step, litgpt_model, litgpt_step, nanogpt_step, transformers_step
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig
from truestep.runtime import keep_freed_memory, measure_peak_flops, resolve_device

_SECONDS_A_ROUND = 1.5  # of each variant, at least
_WARMUP_STEPS = 3  # steps before the clock starts: they compile and fill caches


def truestep_step(
    workload: Workload,
    precision: Literal["auto", "float32", "bfloat16"],
    compile_: Literal["on", "off"],
    model: torch.nn.Module | None = None,
) -> Step:
    """The reference model, or another, in a Trainer that logs nothing."""
    torch.manual_seed(0)
    config = TrainingConfig(precision=precision, compile=compile_)
    trainer = Trainer(model or GPT(workload.config()), config, sinks=[])
    return lambda: trainer.training_step(workload.batch(trainer.step)).loss


def variants_of(workload: Workload, nanogpt: Path | None, peers: list[str]) -> dict[str, Step]:
    """Return every variant by name; the first is what the others are compared with."""
    variants: dict[str, Step] = {}
    if nanogpt is not None:
        variants["nanoGPT"] = nanogpt_step(workload, nanogpt, compiled=False)
        variants["nanoGPT compiled"] = nanogpt_step(workload, nanogpt, compiled=True)
    if "transformers" in peers:
        variants["transformers bfloat16"] = transformers_step(workload)
    if "litgpt" in peers:
        variants["litgpt"] = litgpt_step(workload)
        model = litgpt_model(workload)
        variants["litgpt's model in truestep"] = truestep_step(workload, "auto", "on", model)
    variants["truestep float32 eager"] = truestep_step(workload, "float32", "off")
    variants["truestep float32 compiled"] = truestep_step(workload, "float32", "on")
    variants["truestep bfloat16 eager"] = truestep_step(workload, "bfloat16", "off")
    variants["truestep"] = truestep_step(workload, "auto", "on")
    return variants


def measure(variants: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds a step of each round, every variant in turn."""
    steps_a_round = {}
    for name, step in variants.items():
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
        for dtype in (torch.float32, torch.bfloat16):
            key = f"peak {str(dtype).removeprefix('torch.')}"
            seconds.setdefault(key, []).append(1 / measure_peak_flops(device, dtype))
    return seconds


def run(name: str, rounds: int, nanogpt: Path | None, peers: list[str]) -> dict[str, Any]:
    """Measure one workload, print its table and return it."""
    torch.compiler.reset()
    workload = WORKLOADS[name]
    seconds = measure(variants_of(workload, nanogpt, peers), rounds)
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


_PEAK_DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W3"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to compare with")
    parser.add_argument(
        "--peers", nargs="+", choices=["litgpt", "transformers"], default=[], help="if installed"
    )
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    keep_freed_memory()  # for every variant alike
    about = facts()
    print(json.dumps(about))
    workloads = [
        run(name, options.rounds, options.nanogpt, options.peers) for name in options.workloads
    ]
    if options.output is not None:
        options.output.write_text(json.dumps({**about, "workloads": workloads}, indent=1) + "\n")


if __name__ == "__main__":
    main()
