"""What a step costs beside its arithmetic: a bare loop, `Trainer.training_step` and `Trainer.fit`.

    python benchmarks/overhead.py --workloads W3 --output result.json

All three run the same compiled forward pass, the same clipping and the same fused AdamW; the bare
loop nothing else. `fit` reads windows of a token file that a thread prepares, and logs each step
to a file. They take turns at every step, and the median of the differences counts.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import argument_parser, positive, write
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig
from truestep.data.loader import Prefetch, WindowLoader
from truestep.observe.sinks import JsonlSink
from truestep.runtime import deterministic_algorithms, keep_freed_memory
from truestep.training.optim import clip_gradients

_WARMUP_STEPS = 5


class _Tokens:
    """Random tokens in memory, read as those of a corpus are."""

    def __init__(self, vocab_size: int) -> None:
        self._ids = np.random.default_rng(0).integers(vocab_size, size=10**6)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int, stop: int) -> Any:
        return self._ids[start:stop]


def trainer_of(workload: Workload, log: Path | None) -> Trainer:
    torch.manual_seed(0)
    sinks = [] if log is None else [JsonlSink(log)]
    return Trainer(GPT(workload.config()), TrainingConfig(compile="on"), sinks=sinks)


def measure(workload: Workload, steps: int, directory: Path) -> dict[str, list[float]]:
    """Return the seconds of each step, by form."""
    loader = Prefetch(
        WindowLoader(
            _Tokens(workload.vocab_size),
            context_length=workload.context_length,
            batch_size=workload.batch_size,
        )
    )
    bare, stepped = trainer_of(workload, None), trainer_of(workload, None)
    fitted = trainer_of(workload, directory / "metrics.jsonl")
    batch = loader.batch_at(0)
    bare.prepare(batch)
    parameters = list(bare.model.parameters())

    def bare_step(_: int) -> object:
        assert bare._forward is not None
        bare.optimizer.zero_grad()
        with deterministic_algorithms(bare.config.deterministic == "on"):
            loss: Any = bare._forward(batch, batch.num_targets)
            loss.backward()
            clip_gradients([p.grad for p in parameters if p.grad is not None], 1.0)
            return bare.optimizer.step()

    forms: dict[str, Callable[[int], object]] = {
        "bare loop": bare_step,
        "training_step": lambda step: stepped.training_step(batch),
        "fit": lambda step: fitted.fit(loader, step + 1),
    }
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for step in range(_WARMUP_STEPS + steps):
        for form, run in forms.items():
            start = time.perf_counter()
            run(step)
            seconds[form].append(time.perf_counter() - start)
    return {form: times[_WARMUP_STEPS:] for form, times in seconds.items()}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W3"])
    parser.add_argument("--steps", type=positive, default=200)
    options = parser.parse_args()
    keep_freed_memory()
    results = []
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as directory:
            seconds = measure(WORKLOADS[name], options.steps, Path(directory))
        base = statistics.median(seconds["bare loop"])
        for form, times in seconds.items():
            added = statistics.median(
                own - other for own, other in zip(times, seconds["bare loop"], strict=True)
            )
            median = statistics.median(times)
            results.append({"workload": name, "form": form, "median_seconds": median})
            results[-1] |= {"added_seconds": added, "added_share": added / base}
            print(
                f"{name}  {form:14}{median * 1e3:8.1f} ms  {added * 1e3:+6.2f} ms  "
                f"{added / base:+.1%}"
            )
    write(options.output, {"steps": options.steps, "results": results})


if __name__ == "__main__":
    main()
