"""Write docs/performance.md from the figures in docs/throughput-cpu.json: `make docs`."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# The ratios to reach in steps per second, to nanoGPT's own path and to litgpt's default, and the
# utilisation, set on a processor whose bfloat16 products are 4.6 times as fast as its float32's.
TARGETS = {"W1": (4.1, 1.7, 0.75), "W2": (4.4, 2.0, 0.70), "W3": (3.9, 2.1, 0.58)}
NAMES = {
    "nanoGPT": "nanoGPT, float32 eager (its path on a CPU)",
    "nanoGPT compiled": "nanoGPT, float32 compiled",
    "transformers bfloat16": "transformers' Llama, bfloat16 autocast",
    "litgpt": "litgpt, its default: bf16-mixed, compiled",
    "truestep float32 eager": "truestep, float32 eager",
    "truestep bfloat16 eager": "truestep, bfloat16 eager",
    "truestep": "**truestep, bfloat16 compiled** (what `auto` chooses here)",
}

HEAD = """# Performance

How long a training step takes beside other trainers', on the same shapes and tokens, with the same optimizer, clipping at 1.0 and no dropout.
"""

KNOWN = """
In float32 truestep is slower than nanoGPT: RMSNorm, rotary positions and the three matrices of SwiGLU cost more passes over memory than LayerNorm and GELU do, for the same matrix products. In bfloat16, and compiled, that is won back. Compilation takes 20 to 40 seconds the first time; `auto` compiles where the whole run is at least 2·10¹³ FLOPs, about a minute of two cores.

## What is known to pay
- bfloat16 arithmetic with float32 parameters: 1.5 to 1.8 times float32 on a processor whose bfloat16 products are 2.3 times as fast.
- Attention by plain matrix products in bfloat16 up to a context of 2048, on a CPU, a block of queries at a time with only the keys that it sees, and backward written out. With its four projections, forward and backward on one core: 16 ms where all queries at once take 20 and torch's fused attention 36 (12 x 4 x 256 x 32), 103 instead of 112 and 158 (16 x 6 x 256 x 64).
- Head and loss of a large vocabulary with the gradients computed where the logits are: 0.90 s on one core where all logits at once take 1.02 s, and computing them again in backward 1.31 s (2048 x 256 x 50257). No more than 2²⁵ logits exist at one time.
- Compiling cast, model and loss as one graph: 1.15 to 1.3 times.
- glibc's allocator told to keep memory between steps: see `runtime.keep_freed_memory`.
- Fused AdamW.
- Samples are written in float32: under bfloat16 each token would cast all weights anew, which takes twice as long.

## What brought nothing
- Compiling a block once and reusing it for every layer: no less time to compile four layers, and no faster a step.
- Padding the vocabulary to a multiple of 64, once the weight's gradient is computed transposed.
- One matrix product for queries, keys and values, or for gate and up: the single ones already run at the rate of large products.
- Cutting the queries into blocks and leaving backward to autograd: what it saves goes into adding up the gradients of slices.
"""


def figures(record: dict[str, Any]) -> str:
    """Return what was measured, and on what."""
    workloads = record["workloads"]
    rounds = len(workloads[0]["results"][0]["seconds"])
    peers = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    peaks = "; ".join(
        f"{work['workload']} {work['peak_gflops']['float32']:,} and "
        f"{work['peak_gflops']['bfloat16']:,}"
        for work in workloads
    )
    command = "python benchmarks/throughput.py --workloads W1 W2 W3 --nanogpt PATH \\\n"
    command += (
        f"    --peers litgpt transformers --rounds {rounds} --output docs/throughput-cpu.json"
    )
    return (
        f"\n```\n{command}\n```\n\n{record['machine']}, {record['threads']} threads; torch "
        f"{record['torch']}, Python {record['python']}, {peers}; commit {record['commit']}. All "
        "variants run in turn within each round, in one process with the allocator set alike; "
        f"figures are medians of {rounds} rounds. The machine is shared and noisy (the "
        "[raw figures](throughput-cpu.json) have every round): read ratios, and trust them to "
        "about a tenth. MFU is measured against the machine's own matrix products in each round, "
        f"in GFLOP/s of float32 and bfloat16: {peaks}.\n"
    )


def shapes(workloads: list[dict[str, Any]]) -> str:
    """Return the table of the workloads."""
    rows = "".join(
        f"| {work['workload']}{', tied' if work['tied'] else ''} | {work['num_layers']} | "
        f"{work['num_heads']} | {work['width']} | {work['vocab_size']} | "
        f"{work['context_length']} | {work['batch_size']} | {work['flops'] / 1e9:.1f} |\n"
        for work in workloads
    )
    return (
        "\n| | layers | heads | width | vocabulary | context | batch | GFLOP a step |\n"
        f"|---|---|---|---|---|---|---|---|\n{rows}\n"
        "FLOPs = 6·N·tokens + 12·L·d·T·tokens with N = 12·L·d² + V·d.\n"
    )


def steps(workloads: list[dict[str, Any]]) -> str:
    """Return the table of step times."""
    results = {
        work["workload"]: {row["variant"]: row for row in work["results"]} for work in workloads
    }
    head = " | ".join(results)
    rows = ""
    for variant, name in NAMES.items():
        cells = [
            f"{row['median_seconds'] * 1e3:,.0f} ({row['ratio']:.2f}, {row['mfu']:.0%})"
            for row in (found.get(variant) for found in results.values())
            if row is not None
        ]
        if len(cells) == len(results):
            rows += f"| {name} | {' | '.join(cells)} |\n"
    return f"\n| ms a step (ratio to nanoGPT, MFU) | {head} |\n|---|{'---|' * len(results)}\n{rows}"


def targets(workloads: list[dict[str, Any]]) -> str:
    """Return the table of what was to be reached, and whether it was."""
    rows = ""
    for work in workloads:
        found = {row["variant"]: row for row in work["results"]}
        to_nanogpt, to_litgpt, mfu = TARGETS[work["workload"]]
        ours = found["truestep"]
        peaks = work["peak_gflops"]
        most = peaks["bfloat16"] / peaks["float32"] / found["nanoGPT"]["mfu"]
        beside = found["litgpt"]["median_seconds"] / ours["median_seconds"]
        rows += (
            f"| {work['workload']} | {ours['mfu']:.0%} (≥ {mfu:.0%}) | {ours['ratio']:.2f} "
            f"(≥ {to_nanogpt}; at 100 % of the products' rate {most:.2f}) | {beside:.2f} "
            f"(≥ {to_litgpt}) |\n"
        )
    return (
        "\n## Targets\n\nThe ratios to reach were set on a processor whose bfloat16 products are "
        "4.6 times as fast as its float32's. Where they are about 2.3 times as fast, as here, no "
        "step at any utilisation reaches those to nanoGPT; utilisation carries over.\n\n"
        "| | MFU | steps a second, to nanoGPT | to litgpt |\n|---|---|---|---|\n" + rows
    )


def make_performance() -> str:
    """Return the page."""
    record = json.loads((HERE / "throughput-cpu.json").read_text(encoding="utf-8"))
    workloads = record["workloads"] = sorted(record["workloads"], key=lambda w: w["workload"])
    tables = shapes(workloads) + steps(workloads) + targets(workloads)
    return HEAD + figures(record) + tables + KNOWN


if __name__ == "__main__":
    (HERE / "performance.md").write_text(make_performance(), encoding="utf-8")
