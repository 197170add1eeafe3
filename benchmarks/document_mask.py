"""What it costs to keep documents from seeing each other: a step with the mask, over one without.

    python benchmarks/document_mask.py --output result.json

Both take turns in one process, on the same tokens, with a document every 200 tokens or so; seconds
are those of the processor, on one thread, uncompiled.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from machine import argument_parser, positive, write
from workloads import WORKLOADS, Workload

from truestep import GPT, Batch, Trainer, TrainingConfig
from truestep.data.document_mask import with_positions
from truestep.runtime import keep_freed_memory

_W3 = WORKLOADS["W3"]
CASES = {"W3": _W3, "W3, 1 row of 1,024 tokens": replace(_W3, context_length=1024, batch_size=1)}
_MEAN_DOCUMENT = 200


def batch_of(workload: Workload, step: int) -> Batch:
    """Return random tokens in which an end of a document, id 0, stands now and then."""
    batch = workload.batch(step)
    generator = torch.Generator().manual_seed(step)
    ends = torch.rand(batch.tokens.shape, generator=generator) < 1 / _MEAN_DOCUMENT
    return replace(batch, tokens=batch.tokens.clamp(min=1).masked_fill(ends, 0))


def ratio(workload: Workload, precision: Any, turns: int) -> dict[str, float]:
    """Return the median seconds of a step without and with the mask, and of their ratios."""
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        config = TrainingConfig(compile="off", precision=precision)
        trainers.append(Trainer(GPT(workload.config()), config, sinks=()))
    times: list[tuple[float, float]] = []
    for turn in range(turns + 2):
        pair = []
        for trainer, masked in zip(trainers, (False, True), strict=True):
            start = time.process_time()
            batch = batch_of(workload, turn)
            trainer.training_step(with_positions(batch, 0) if masked else batch)
            pair.append(time.process_time() - start)
        times.append((pair[0], pair[1]))
    plain, masked_times = (statistics.median(each) for each in zip(*times[2:], strict=True))
    ratios = [after / before for before, after in times[2:]]
    return {
        "plain_seconds": round(plain, 4),
        "masked_seconds": round(masked_times, 4),
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--turns", type=positive, default=20)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    points = []
    for name, workload in CASES.items():
        for precision in ("float32", "bfloat16"):
            found = ratio(workload, precision, options.turns)
            points.append({"case": name, "precision": precision, **found})
            print(points[-1], flush=True)
    write(options.output, {"turns": options.turns, "points": points})


if __name__ == "__main__":
    main()
