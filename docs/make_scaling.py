"""Write docs/scaling.md, of which every figure in a table is computed: `make docs`."""

import math
from pathlib import Path
from typing import NamedTuple

from truestep.config import RunConfig, resolve
from truestep.gpus import ASSUMED_UTILIZATION, GPUS
from truestep.workflows.resources import count_parameters, run_flops

GPU = GPUS["h100"]
NODE = 8  # GPUs
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and direction, of a GPU and of a link between nodes
LATENCY = 10e-6  # s, of a message
BUCKET = 25 * 2**20  # bytes, as torch's DistributedDataParallel cuts gradients by default
BACKWARD = 2 / 3  # of a step
WINDOW = 2048  # tokens
MICRO_BATCH = 4 * WINDOW  # tokens of a GPU, at most
SIZES = (8, 64, 256, 1024)

ROUND_TRIP = 1e-4  # s, of a question to the store
DISK, SHARED = 1e9, 10e9  # bytes a second, of one writer and of all readers
FILE_SECONDS = 1e-3  # to learn the size of a file on a shared file system
FAILURE_HOURS = 50_000  # of a GPU

HEAD = """# Scaling

What was shown on how many processes, and what is only computed. This page is made by `make docs`.

## Shown

Everything here was seen in processes of one machine, on a CPU, by gloo.

| processes | what | by |
|---|---|---|
| 1, 2, 4 | one update of the whole batch; by `reduction = "exact"` the same bits | `tests/test_parallel.py` |
| 1, 2, 4 | a run that goes on with another number of them, kills, hangs and signals on the way, and ends with the bits of one process | `tests/test_launch.py` |
| 2 | the commands of [examples/cluster/](../examples/cluster) under torchrun: a run begins once, ends on SIGTERM with its step saved, and goes on | `tests/test_cluster.py` |
| 8 | exact sums have the bits of one process; tried by hand, in no test | |

**Not shown**: several machines, several GPUs, NCCL, a network file system, and so any speed of several processes.

## Computed

A model on paper: none of the figures below was measured, and each rests on these assumptions.

- **Models**: the reference model, with layers, widths and batches close to those of GPT-3's sizes, windows of {window:,} tokens, 50,304 ids, embeddings tied but for the largest. Parameters and arithmetic are counted as `truestep plan` does: six FLOPs a weight and token, and attention.
- **GPU**: {gpu}, {tera:,.0f} TFLOP/s in bfloat16 by its data sheet, of which a step takes {mfu:.0%}; two thirds of a step are backward. Micro-batches of at most {micro:,} tokens. Eight GPUs a node.
- **Links**: {nvlink:.0f} GB/s by NVLink within a node and {network:.0f} GB/s (400 Gb/s) by a link between nodes, each way; a node has eight of these, one for each GPU, or one for all. No link slows down with distance or load. A message takes {latency:.0f} µs.
- **fast**: gradients are summed in float32 (by bfloat16 the bytes would be half): 2(n-1)/n · 4 bytes a parameter leave each of n GPUs. GPUs of a node add up first, each then carries its eighth to other nodes, and back. A bucket of 25 MiB waits for 2 log2(n) messages. All buckets but the last may hide behind the backward of the last micro-batch, the only one that exchanges anything.
- **efficiency**: the time of the arithmetic over that with the part of the exchange that does not hide. The update, validation, saving and slow machines are left out; they lower it.

### One batch, more GPUs

The batch stays what it is, so that n GPUs train the same run; a GPU needs one window at least.

| model | batch | GPUs | tokens a GPU | ms of arithmetic | MB sent by a GPU | ms of exchange, eight links | efficiency, eight links | one link |
|---|---|---|---|---|---|---|---|---|
"""

WEAK_HEAD = """
### A batch that grows with the GPUs

{tokens:,} tokens a GPU, in micro-batches of {micro:,}. Whether a batch of so many tokens still trains as well, this model cannot say.

| model | GPUs | tokens a step | efficiency, eight links | one link |
|---|---|---|---|---|
"""

EXACT_HEAD = """
### What `exact` costs

`reduction = "exact"` sends the whole gradient once for each doubling of the processes: 4 log2(n) bytes a parameter, where `fast` sends less than 8. No level hides behind another, nor behind the backward. Up to 8 processes, the number of lanes that `auto` chooses at most, that is one node and its fast links; beyond it, every further level goes over the network in full.

| model | GPUs | MB sent by a GPU, fast | exact | ms of exchange, fast | exact |
|---|---|---|---|---|---|
"""

MEMORY_HEAD = """
### Memory

16 bytes a parameter for float32 parameters, gradients and two moments, in every process, activations not counted. {gpu} offers {room:.0f} GB. Sharded models are planned, not built: the same 16 bytes over n GPUs; in return parameters (2 bytes in bfloat16) travel twice and gradients once, three passes of (n-1)/n in place of the two of `fast`, for every micro-batch. A process that goes on with a run holds the checkpoint once more in the machine's own memory, and its larger file twice: 20 bytes a parameter, eight times a node.

| model | GB of a GPU | fits | sharded over 8 | over 64 | GB of a node's memory, to go on |
|---|---|---|---|---|---|
"""

BREAKS = """
## What breaks first

Computed, too, of the code as it is, roughly in the order in which a growing run meets it:

1. **The memory of a GPU**, at any number of them: {largest} needs {needed:.0f} GB of {room:.0f}. Data parallel alone does not train it.
2. **The network where a node has one link**: {middle} on 256 GPUs has an efficiency of {one:.0%} there, against {eight:.0%} by eight links.
3. **The batch**: {smallest} has {windows} windows in a step and so no work for more GPUs than that; long before, micro-batches are too small to hide the exchange or to keep a GPU busy, which a fixed {mfu:.0%} overlooks. A larger batch helps until it is beyond what the gradient's noise rewards (the critical batch of McCandlish et al., 2018).
4. **Going on**: every process reads the whole checkpoint, 12 bytes a parameter. {middle}: {checkpoint:.0f} GB, on 1,024 GPUs {read:.0f} TB, {minutes:.0f} minutes at an assumed {shared:.0f} GB/s for all. One that reads and tells the others would end that.
5. **Machines that fail**: at one failure in {hours:,} hours of a GPU (assumed), one of 1,024 fails every {every:.0f} hours. Each time costs the steps since the last save, `run.process_timeout_seconds` where a machine just vanishes, a start, and the reading above.
6. **Saving**: the first process alone writes, in the background: {middle} takes {write:.0f} s at an assumed {disk:.0f} GB/s. Saves cannot follow one another faster.
7. **A corpus of many shards**: 100,000 files, whose sizes every process asks for at its start, at an assumed {file_ms:.0f} ms, are {shards:.0f} s; a file server that is asked {opens:.0f} million times by 1,024 processes may take far longer.
8. **The pulse**: every second the first process asks one store for the pulse of each other, two questions of an assumed {trip:.1f} ms: {pulse:.2f} s for 1,024. It falls behind at about {most:,} processes; that delays what it notices, no step.
"""


class Model(NamedTuple):
    """A model and its batch, in tokens."""

    name: str
    config: RunConfig

    @property
    def parameters(self) -> int:
        """Return how many it has."""
        shape = self.config.model.model_copy(update={"vocab_size": 50304})
        return count_parameters(shape)

    @property
    def batch(self) -> int:
        """Return the tokens of a step."""
        return self.config.data.batch_size * WINDOW

    def seconds(self, tokens: int) -> float:
        """Return what one GPU computes on so many tokens."""
        return (
            run_flops(self.config)
            / self.batch
            * tokens
            / GPU.flops_per_second
            / ASSUMED_UTILIZATION
        )


def model(name: str, layers: int, heads: int, width: int, windows: int, *, tied: bool) -> Model:
    """Return a reference model whose batch has so many windows."""
    shape = {"num_layers": layers, "num_heads": heads, "width": width, "context_length": WINDOW}
    told = {
        "model": {**shape, "tie_embeddings": tied},
        "data": {"batch_size": windows, "tokenizer": "bpe-50304"},
        "training": {"num_steps": 1, "warmup_steps": 0},
    }
    return Model(name, resolve(told, {}, None))


MODELS = [
    model("124M", 12, 12, 768, 256, tied=True),
    model("1.3B", 24, 16, 2048, 512, tied=True),
    model("7B", 32, 32, 4096, 1024, tied=False),
]


def exchange_seconds(size: float, gpus: int, links: int) -> float:
    """Return how long n GPUs take to sum `size` bytes each, by `links` links of a node."""
    within, nodes = min(gpus, NODE), max(1, gpus // NODE)
    return (
        2 * (within - 1) / within * size / NVLINK
        + 2 * (nodes - 1) / nodes * size / links / NETWORK
        + 2 * math.log2(gpus) * LATENCY
    )


def fast_seconds(parameters: int, gpus: int, links: int) -> tuple[int, float]:
    """Return how many buckets there are, and the seconds of each."""
    count = math.ceil(4 * parameters / BUCKET)
    return count, exchange_seconds(4 * parameters / count, gpus, links)


def efficiency(of: Model, tokens: int, gpus: int, links: int) -> float:
    """Return the share of a step that is arithmetic.

    Buckets are ready one after another in the backward: either the last one alone ends after it,
    or all follow one another without a pause from when the first is ready.
    """
    arithmetic = of.seconds(tokens)
    count, each = fast_seconds(of.parameters, gpus, links)
    left = BACKWARD * of.seconds(min(tokens, MICRO_BATCH)) * (1 - 1 / count)
    return arithmetic / (arithmetic + max(each, count * each - left))


def exact_seconds(parameters: int, gpus: int) -> float:
    """Return the seconds of every level of the tree, none of which hides, by eight links."""
    size = 4 * parameters
    levels = round(math.log2(gpus))
    near = min(levels, round(math.log2(NODE)))
    buckets = math.ceil(size / BUCKET)
    return near * size / NVLINK + (levels - near) * size / NETWORK + buckets * levels * LATENCY


def sent(parameters: int, gpus: int) -> float:
    """Return the megabytes that leave a GPU in a sum of gradients."""
    return 2 * (gpus - 1) / gpus * 4e-6 * parameters


def one_batch() -> str:
    """Return the rows for a batch that stays."""
    rows = ""
    for of in MODELS:
        for gpus in SIZES:
            tokens = of.batch // gpus
            start = f"| {of.name} | {of.batch:,} | {gpus:,} |"
            if tokens < WINDOW:
                rows += f"{start} no window for each | | | | | |\n"
                continue
            milliseconds = 1e3 * math.prod(fast_seconds(of.parameters, gpus, NODE))
            cells = [f"{tokens:,}", f"{1e3 * of.seconds(tokens):,.0f}"]
            cells += [f"{sent(of.parameters, gpus):,.0f}", f"{milliseconds:,.0f}"]
            cells += [f"{efficiency(of, tokens, gpus, links):.0%}" for links in (NODE, 1)]
            rows += f"{start} {' | '.join(cells)} |\n"
    return (
        rows + f"\n{MODELS[-1].name} does not fit, see below: its rows say what the links allow.\n"
    )


def growing_batch() -> str:
    """Return the table of a batch that grows."""
    tokens = 4 * MICRO_BATCH
    rows = "".join(
        f"| {of.name} | {gpus:,} | {tokens * gpus:,} "
        f"| {efficiency(of, tokens, gpus, NODE):.0%} | {efficiency(of, tokens, gpus, 1):.0%} |\n"
        for of in MODELS
        for gpus in SIZES
    )
    return WEAK_HEAD.format(tokens=tokens, micro=MICRO_BATCH) + rows


def exact() -> str:
    """Return the table of both ways to add up."""
    rows = ""
    for of in MODELS[:2]:
        for gpus in (2, 4, 8, 64):
            n = of.parameters
            both = [sent(n, gpus), math.log2(gpus) * 4e-6 * n]
            both += [1e3 * math.prod(fast_seconds(n, gpus, NODE)), 1e3 * exact_seconds(n, gpus)]
            rows += f"| {of.name} | {gpus} | {' | '.join(f'{value:,.0f}' for value in both)} |\n"
    return EXACT_HEAD + rows


def memory() -> str:
    """Return the table of bytes."""
    rows = ""
    for of in MODELS:
        held = 16 * of.parameters
        cells = [f"{held / 1e9:.1f}", "yes" if held < GPU.memory_bytes else "**no**"]
        cells += [f"{held / n / 1e9:.1f}" for n in (8, 64)]
        cells.append(f"{NODE * 20 * of.parameters / 1e9:,.0f}")
        rows += f"| {of.name} | {' | '.join(cells)} |\n"
    return MEMORY_HEAD.format(gpu=GPU.title, room=GPU.memory_bytes / 1e9) + rows


def breaks() -> str:
    """Return what breaks first."""
    smallest, middle, largest = MODELS
    saved, most = 12 * middle.parameters, max(SIZES)
    return BREAKS.format(
        smallest=smallest.name,
        middle=middle.name,
        largest=largest.name,
        needed=16e-9 * largest.parameters,
        room=GPU.memory_bytes / 1e9,
        one=efficiency(middle, middle.batch // 256, 256, 1),
        eight=efficiency(middle, middle.batch // 256, 256, NODE),
        windows=smallest.batch // WINDOW,
        mfu=ASSUMED_UTILIZATION,
        checkpoint=saved / 1e9,
        read=most * saved / 1e12,
        minutes=most * saved / SHARED / 60,
        shared=SHARED / 1e9,
        hours=FAILURE_HOURS,
        every=FAILURE_HOURS / most,
        write=saved / DISK,
        disk=DISK / 1e9,
        file_ms=1e3 * FILE_SECONDS,
        shards=1e5 * FILE_SECONDS,
        opens=1e5 * most / 1e6,
        trip=1e3 * ROUND_TRIP,
        pulse=2 * most * ROUND_TRIP,
        most=round(1 / ROUND_TRIP / 2),
    )


def make_scaling() -> str:
    """Return the page."""
    head = HEAD.format(
        window=WINDOW,
        gpu=GPU.title,
        tera=GPU.flops_per_second / 1e12,
        mfu=ASSUMED_UTILIZATION,
        micro=MICRO_BATCH,
        nvlink=NVLINK / 1e9,
        network=NETWORK / 1e9,
        latency=1e6 * LATENCY,
    )
    return head + one_batch() + growing_batch() + exact() + memory() + breaks()


if __name__ == "__main__":
    (Path(__file__).parent / "scaling.md").write_text(make_scaling())
