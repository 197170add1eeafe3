"""Write docs/performance.md from the figures in docs/figures: `make docs`."""

import json
import statistics
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent / "figures"
# The ratios to reach in steps per second, to nanoGPT's own path and to litgpt's default, and the
# utilisation, set on a processor whose bfloat16 products are 4.6 times as fast as its float32's.
TARGETS = {"W1": (4.1, 1.7, 0.75), "W2": (4.4, 2.0, 0.70), "W3": (3.9, 2.1, 0.58)}
NAMES = {
    "nanoGPT": "nanoGPT, float32 eager (its path on a CPU)",
    "nanoGPT compiled": "nanoGPT, float32 compiled",
    "transformers bfloat16": "transformers' Llama, bfloat16 autocast",
    "litgpt": "litgpt, its default: bf16-mixed, compiled",
    "litgpt's model in truestep": "litgpt's model, trained by truestep",
    "truestep float32 eager": "truestep, float32 eager",
    "truestep float32 compiled": "truestep, float32 compiled",
    "truestep bfloat16 eager": "truestep, bfloat16 eager",
    "truestep": "**truestep, bfloat16 compiled** (what `auto` chooses for a long run)",
}

HEAD = """# Performance

How long a training step takes beside other trainers', on the same shapes and tokens, with the same optimizer, clipping at 1.0 and no dropout; that it computes the same; what it costs beside its arithmetic, and how that grows.
"""

TARGETS_TEXT = """One figure for each run. The ratios to reach were set on a processor whose bfloat16 products are 4.6 times as fast as its float32's. Where they are about 2.3 times as fast, as here, no step at any utilisation reaches those to nanoGPT, nor those to litgpt on W1 and W2; utilisation carries over.

| | MFU | steps a second, to nanoGPT | at 100% MFU | to litgpt | at 100% MFU |
|---|---|---|---|---|---|"""

CURVES = {
    "W1": "W1",
    "W3": "W3",
    "W3-1e-3": "W3",
    "litgpt": "W3, litgpt's model",
}
CURVES_TEXT = """`python benchmarks/curves.py --workload W1 --data TEXT`: 200 steps from the same weights on the same batches of tiny Shakespeare's bytes, in float32 uncompiled and as a user gets it. To agree is to stay within 0.001, which W3 does, with the reference model and with litgpt's. Where learning is fast, on W1 and at a higher rate, the training itself drives two curves apart, whatever the arithmetic: float32 from weights moved by a thousandth, about a rounding of bfloat16, goes as far or farther.

| | learning rate | last loss in float32 | here | largest difference of single steps | of means of ten | mean |
|---|---|---|---|---|---|---|"""

MEMORY_TEXT = """`python benchmarks/memory.py --vocab 4096 16384 50257 131072 --rows 2048 8192`: forward and backward of head and loss in bfloat16, compiled, 256 wide: all logits at once, and deferred. What the process held beyond its inputs at the peak, in MiB, and the median of seven times, in ms. Deferred, no more than 2²⁵ logits exist at one time; what still grows with the rows is the hidden states' gradient, with the vocabulary the weight's.

| vocabulary | rows | MiB at once | deferred | ms at once | deferred | ratio |
|---|---|---|---|---|---|---|"""

MEMORY_PLOT = (
    "![peak memory and time against the vocabulary and against the chunk](figures/memory.png)"
)

GROWTH_TEXT = """
## How the time of a step grows

`python benchmarks/growth.py`: one size varies at a time around 4 layers of width 128, 16 rows of 256 tokens and 65 ids; each point is the median of several compiled steps. The corpus costs the arithmetic of its order alone, which permutes the next power of four and walks on until it is among the windows: up to four tries for each.

![time of a step against batch, context, width, vocabulary, micro-batches and corpus](figures/growth.png)
"""

OVERHEAD_TEXT = """`python benchmarks/overhead.py --workloads W3 W1`: the same compiled pass, clipping and fused AdamW in a bare loop, in `training_step`, and in `fit` with data prepared by a thread and a log file; they take turns at every step, and the median of the differences counts.

| | | ms a step | beyond the bare loop |
|---|---|---|---|"""

STARTUP_TEXT = """`python benchmarks/startup.py --workloads W1 W2 W3`: seconds of a process of its own, median (and least) of nine.

| | seconds |
|---|---|"""

QUICKSTART_TEXT = """`python benchmarks/quickstart.py --caches cold cold cold warm` ({machine}): `make train` but for its installation, each time with text and tokenizer prepared anew, and the compiler's cache empty (cold) or as the run before has left it (warm). Seconds from the start of the process, validation on the way included; bits per byte of the whole validation text.

| cache | first update | last update | ms a step | steps | bits per byte |
|---|---|---|---|---|---|"""

QUICKSTART_CELLS = (
    ("first_update", 0),
    ("last_update", 0),
    ("step_ms", 0),
    ("steps", 0),
    ("bits_per_byte", 4),
)

FIRST_STEP_HEAD = """The first step, with the compiler's cache empty, and filled by the run before:

| | | seconds to the first step | the step after it |
|---|---|---|---|"""

FLOAT32 = """
## What is known

In float32 truestep is slower than nanoGPT: RMSNorm, rotary positions and the three matrices of SwiGLU cost more passes over memory than LayerNorm and GELU do, for the same matrix products. In bfloat16, and compiled, that is won back. Compilation of the whole takes 35 to 50 seconds the first time; it is earned back after 1,000 steps of W3 (2·10¹³ FLOPs; with 4,096 ids after 530, 1.5·10¹³), 250 of W1 or 290 of W2 (6 to 7·10¹³). One layer compiled for all takes half of that or less, and its steps are 2 to 7% longer. `auto` compiles layers where the run is at least 1.5·10¹³ FLOPs, a minute or two of two cores, and the whole from 1.5·10¹⁴ on; of a model that does not name its layers, the whole from 2.5·10¹³ on.
"""

# Single measurements, on the machine above unless another is said; each was taken once, interleaved.
KNOWN = """- Attention by plain matrix products in bfloat16, on a CPU; the reference model's a block of queries at a time with only the keys that it sees, and backward written out. With its four projections, forward and backward on one core: 16 ms where all queries at once take 20 and torch's fused attention 36 (12 x 4 x 256 x 32), 103 instead of 112 and 158 (16 x 6 x 256 x 64).
- For another module the same, all queries at once, through `torch.nn.attention.sdpa_kernel` up to 512 keys: litgpt's model, compiled, takes 94 ms instead of 117 for a step of W3, and 873 instead of 990 of W1. With 1024 keys it would take 345 instead of 318 (one core).
- Head and loss of a large vocabulary with the gradients computed where the logits are: 0.90 s on one core where all logits at once take 1.02 s, and computing them again in backward 1.31 s (2048 x 256 x 50257). No more than 2²⁵ logits exist at one time.
- glibc's allocator told to keep memory between steps: see `runtime.keep_freed_memory`.
- Matrices of one shape made orthogonal together: 8 ms instead of 25 for Muon's update of W3 in bfloat16, 149 instead of 193 of W1 (two cores with AMX).
- The head left to the loss from 4,096 ids on: a step of W3's layers takes 0.93 of the time (two cores with AMX).
- Fused AdamW.
- Samples are written in float32: under bfloat16 each token would cast all weights anew, which takes twice as long.

**To bring nothing:**
- Compiling a block once inside the whole by `torch.compiler.nested_compile_region`: no less time to compile four layers, no faster a step, and in torch 2.13 wrong gradients.
- Padding the vocabulary to a multiple of 64, once the weight's gradient is computed transposed.
- One matrix product for queries, keys and values, or for gate and up: the single ones already run at the rate of large products.
- Cutting the queries into blocks and leaving backward to autograd: what it saves goes into adding up the gradients of slices.
- The compiler's wrapper in C++, its memory planning, its choice of threads by size, larger pieces per thread; huge pages for tensors (W3, two cores: all within 3% or slower).
- Chunks of 2²⁴ or 2²⁶ logits: 1.10 and 1.09 times the time of a W2 step.

**Where the rest of W3 goes**, on one core, where a step takes 134 ms and products at the machine's rate would take 91: 74 ms matrix products (198 of 215 GFLOP/s), 21 ms products of attention, 11 ms softmax and its mask, 6 ms SwiGLU, 5 ms norms, 4 ms rotations, 3 ms copies for products of slices, 1 ms AdamW, 5 ms between kernels, the rest in small ones. On two cores each of some 400 parallel regions waits for the slower core; where a neighbour on the machine takes a slice of one, that is most of what is lost.
"""


def figures(records: list[dict[str, Any]]) -> str:
    """Return what was measured, and on what; the tables are of the first run."""
    record = records[0]
    workloads = record["workloads"]
    files = ", ".join(f"[run {n}](figures/throughput-{n}.json)" for n in range(1, len(records) + 1))
    rounds = len(workloads[0]["results"][0]["seconds"])
    peers = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    peaks = "; ".join(
        f"{work['workload']} {work['peak_gflops']['float32']:,} and "
        f"{work['peak_gflops']['bfloat16']:,}"
        for work in workloads
    )
    command = "python benchmarks/throughput.py --workloads W1 W2 W3 --nanogpt PATH \\\n"
    command += (
        f"    --peers litgpt transformers --rounds {rounds} --output docs/figures/throughput-1.json"
    )
    return (
        f"\n```\n{command}\n```\n\n{record['machine']}, {record['threads']} threads; torch "
        f"{record['torch']}, Python {record['python']}, {peers}; commit {record['commit']}. All "
        "variants run in turn within each round, in one process with the allocator set alike; "
        f"figures are medians of {rounds} rounds. nanoGPT and litgpt fuse AdamW on a GPU only; "
        "nanoGPT's vocabulary is 50,304 on W2, as in its own script. The machine is shared and "
        f"noisy ({files}, with every round): read ratios, and trust them to about a tenth. MFU is measured against the machine's own matrix products in each round, "
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
    """Return the table of step times; a variant that some workload lacks is left out."""
    results = {
        work["workload"]: {row["variant"]: row for row in work["results"]} for work in workloads
    }
    head = " | ".join(results)
    rows = ""
    for variant, name in NAMES.items():
        cells = [
            f"{_milliseconds(row)} ({row['ratio']:.2f}, {row['mfu']:.0%})"
            for row in (found.get(variant) for found in results.values())
            if row is not None
        ]
        if len(cells) == len(results):
            rows += f"| {name} | {' | '.join(cells)} |\n"
    title = "median ms a step, least to most of the rounds (ratio to nanoGPT, MFU)"
    return f"\n| {title} | {head} |\n|---|{'---|' * len(results)}\n{rows}"


def _milliseconds(row: dict[str, Any]) -> str:
    least, most = min(row["seconds"]) * 1e3, max(row["seconds"]) * 1e3
    return f"{row['median_seconds'] * 1e3:,.0f}, {least:,.0f} to {most:,.0f}"


def gains(workloads: list[dict[str, Any]]) -> str:
    """Return what bfloat16 and compiling bring to truestep's own step, from the table."""
    sentences = []
    for name, slow, fast in (
        ("bfloat16 arithmetic with float32 parameters", "float32 eager", "bfloat16 eager"),
        ("Compiling cast, model and loss as one graph, in bfloat16", "bfloat16 eager", ""),
        ("The same in float32", "float32 eager", "float32 compiled"),
    ):
        factors = []
        for work in workloads:
            found = {row["variant"]: row["median_seconds"] for row in work["results"]}
            factors.append(found[f"truestep {slow}"] / found[f"truestep {fast}".strip()])
        listed = ", ".join(f"{factor:.2f}" for factor in factors)
        sentences.append(f"- {name}: {listed} times as many steps a second on W1, W2, W3.\n")
    return "\n**To pay:**\n" + "".join(sentences)


def readme_rows() -> str:
    """Return the rows of the table in the README, from the first run."""
    workloads, rows = load_run("throughput-1")["workloads"], ""
    for name, variant in (
        ("nanoGPT, float32 eager", "nanoGPT"),
        ("litgpt, bfloat16 compiled", "litgpt"),
        ("**truestep**, bfloat16 compiled", "truestep"),
    ):
        found = [
            next(row for row in work["results"] if row["variant"] == variant) for work in workloads
        ]
        cells = " | ".join(f"{row['ratio']:.2f}" for row in found)
        rows += f"| {name} | {cells} |\n"
    return rows


def targets(runs: list[list[dict[str, Any]]]) -> str:
    """Return the table of what was to be reached, what was in each run, and what no step could."""
    rows = ""
    for works in zip(*runs, strict=True):
        to_nanogpt, to_litgpt, mfu = TARGETS[works[0]["workload"]]
        cells: list[list[str]] = [[], [], [], [], []]
        for work in works:
            found = {row["variant"]: row for row in work["results"]}
            own, nanogpt, litgpt = found["truestep"], found["nanoGPT"], found["litgpt"]
            rates = work["peak_gflops"]
            cells[0].append(f"{own['mfu']:.0%}")
            cells[1].append(f"{own['ratio']:.2f}")
            cells[2].append(f"{rates['bfloat16'] / rates['float32'] / nanogpt['mfu']:.2f}")
            cells[3].append(f"{litgpt['median_seconds'] / own['median_seconds']:.2f}")
            cells[4].append(f"{1 / litgpt['mfu']:.2f}")
        used, ratio, most, beside, most_beside = (" and ".join(cell) for cell in cells)
        rows += (
            f"| {works[0]['workload']} | {used} (≥ {mfu:.0%}) | {ratio} (≥ {to_nanogpt}) | {most} "
            f"| {beside} (≥ {to_litgpt}) | {most_beside} |\n"
        )
    return f"\n## Targets\n\n{TARGETS_TEXT}\n{rows}"


def curves() -> str:
    """Return how far the losses by default are from float32's, and those of the control."""
    rows = ""
    for name, case in CURVES.items():
        record = load(f"curves-{name}")
        found = {f"{case}, by default": record["differences"]}
        if "control" in record:
            found["the same in float32, from weights moved by a thousandth"] = record["control"]
        for label, numbers in found.items():
            rows += (
                f"| {label} | {record['learning_rate']:g} | {record['float32'][-1]:.4f} | "
                f"{numbers['last_loss']:.4f} | {numbers['largest']:.5f} | "
                f"{numbers['largest_of_means']:.5f} | {numbers['mean']:+.6f} |\n"
            )
    return f"\n## The same loss\n\n{CURVES_TEXT}\n{rows}\n![loss curves](figures/curves.png)\n"


def memory() -> str:
    """Return peak and time of head and loss."""
    cases = load("memory-vocabulary")["cases"]
    rows = ""
    for plain in (case for case in cases if case["form"] == "plain"):
        [own] = [
            case
            for case in cases
            if case["form"] == "deferred"
            and (case["rows"], case["vocab"]) == (plain["rows"], plain["vocab"])
        ]
        rows += (
            f"| {plain['vocab']:,} | {plain['rows']:,} | {plain['peak_bytes'] / 2**20:,.0f} | "
            f"{own['peak_bytes'] / 2**20:,.0f} | {plain['seconds'] * 1e3:,.0f} | "
            f"{own['seconds'] * 1e3:,.0f} | {own['seconds'] / plain['seconds']:.2f} |\n"
        )
    return f"\n## Memory of head and loss\n\n{MEMORY_TEXT}\n{rows}\n{MEMORY_PLOT}\n"


def overhead() -> str:
    """Return what a step costs beside its arithmetic."""
    rows = "".join(
        f"| {row['workload']} | {row['form']} | {row['median_seconds'] * 1e3:,.1f} | "
        f"{row['added_seconds'] * 1e3:+.2f} ({row['added_share']:+.1%}) |\n"
        for row in load("overhead")["results"]
    )
    return f"\n## Beside the arithmetic\n\n{OVERHEAD_TEXT}\n{rows}"


def startup() -> str:
    """Return how long a person waits before the first step."""
    record = load("startup")
    rows = "".join(
        f"| `{command}` | {statistics.median(seconds):.2f} ({min(seconds):.2f}) |\n"
        for command, seconds in record["commands"].items()
    )
    firsts = "".join(
        f"| {step['workload']} | {step['case']} | {step['first']:.1f} | {step['second']:.2f} |\n"
        for step in record["first_steps"]
    )
    return f"\n## Start-up\n\n{STARTUP_TEXT}\n{rows}\n{FIRST_STEP_HEAD}\n{firsts}"


def quickstart() -> str:
    """Return what `make train` reaches, and when."""
    record = load("quickstart")
    text = QUICKSTART_TEXT.format(machine=record["machine"])
    rows = ""
    newest = record["runs"][-1]["settings"]
    same = [run for run in record["runs"] if run["settings"] == newest]
    for cache in dict.fromkeys(run["cache"] for run in same):
        runs = [run for run in same if run["cache"] == cache]
        cells = (_spread([run[key] for run in runs], digits) for key, digits in QUICKSTART_CELLS)
        rows += f"| {cache}, {len(runs)} | {' | '.join(cells)} |\n"
    return f"\n## make train\n\n{text}\n{rows}"


def _spread(values: list[float], digits: int) -> str:
    """Return the median, and the least and the most where they differ."""
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def is_measured(name: str) -> bool:
    """Tell whether there are figures to make a section of."""
    return (FIGURES / f"{name}.json").exists()


def load(name: str) -> Any:
    """Return the figures of one benchmark."""
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def load_run(name: str) -> Any:
    """Return the figures of a run of throughput.py, W1 first."""
    record = load(name)
    record["workloads"].sort(key=lambda work: work["workload"])
    return record


def make_performance() -> str:
    """Return the page."""
    records = [load_run(path.stem) for path in sorted(FIGURES.glob("throughput-*.json"))]
    runs = [record["workloads"] for record in records]
    tables = shapes(runs[0]) + steps(runs[0]) + targets(runs)
    sections = {
        "curves-W1": curves,
        "memory-chunk": memory,
        "growth": lambda: GROWTH_TEXT,
        "overhead": overhead,
        "startup": startup,
        "quickstart": quickstart,
    }
    rest = "".join(make() for name, make in sections.items() if is_measured(name))
    return HEAD + figures(records) + tables + rest + FLOAT32 + gains(runs[0]) + KNOWN


if __name__ == "__main__":
    (FIGURES.parent / "performance.md").write_text(make_performance(), encoding="utf-8")
