"""How the time of a step grows: with batch, context, width, vocabulary, micro-batches and corpus.

    python benchmarks/growth.py --output result.json

One size varies at a time around a small model; every point is the median of several steps as a
user gets them, compiled. The corpus costs only the arithmetic of its order, to 10^12 tokens.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from machine import argument_parser, write
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig
from truestep.data.loader import WindowLoader
from truestep.runtime import keep_freed_memory

_SECONDS_A_POINT = 2.0
_BASE = replace(WORKLOADS["W3"], batch_size=16)
SWEEPS = {
    "batch_size": (1, 2, 4, 8, 16, 32, 64),
    "context_length": (64, 128, 256, 512, 1024, 2048, 4096),
    "width": (64, 128, 256, 512, 768),
    "vocab_size": (64, 256, 1024, 4096, 8192, 16384, 32768, 65536),
    "micro_batches": (1, 2, 4, 8, 16),
    "corpus_tokens": (10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12),
}


class _Counted:
    """A corpus of any length whose tokens are computed."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    def read(self, start: int, stop: int) -> Any:
        return np.arange(start, stop) % 256


def step_of(workload: Workload, micro_batches: int = 1) -> Callable[[], object]:
    torch.manual_seed(0)
    config = TrainingConfig(
        compile="on", micro_batch_size=max(1, workload.batch_size // micro_batches)
    )
    trainer = Trainer(GPT(workload.config()), config, sinks=[])
    return lambda: trainer.training_step(workload.batch(trainer.step))


def batch_of(num_tokens: int) -> Callable[[], object]:
    loader = WindowLoader(_Counted(num_tokens), context_length=256, batch_size=16)
    steps = iter(np.random.default_rng(0).integers(10**9, size=10**6).tolist())
    return lambda: loader.batch_at(next(steps))


def point(sweep: str, value: int) -> Callable[[], object]:
    """Return what is timed where `sweep` has this value."""
    torch.compiler.reset()
    if sweep == "corpus_tokens":
        return batch_of(value)
    if sweep == "micro_batches":
        return step_of(_BASE, value)
    sizes: dict[str, Any] = {sweep: value}
    workload = replace(_BASE, **sizes)
    if sweep == "context_length":  # as many tokens, so that only attention grows
        workload = replace(workload, batch_size=max(1, _BASE.tokens // value))
    if sweep == "width":
        workload = replace(workload, num_heads=value // 32)
    return step_of(workload)


def median_seconds(step: Callable[[], object]) -> float:
    for _ in range(2):
        step()
    seconds: list[float] = []
    while sum(seconds) < _SECONDS_A_POINT or len(seconds) < 5:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    options = parser.parse_args()
    keep_freed_memory()
    points = []
    for sweep in options.sweeps:
        for value in SWEEPS[sweep]:
            seconds = median_seconds(point(sweep, value))
            points.append({"sweep": sweep, "value": value, "seconds": seconds})
            print(f"{sweep:16}{value:16,}{seconds * 1e3:12.2f} ms", flush=True)
    write(options.output, {"points": points})


if __name__ == "__main__":
    main()
