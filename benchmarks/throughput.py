"""Steps per second on the workloads of docs/performance.md, variants interleaved in one run.

    python benchmarks/throughput.py --workloads W1 W2 W3 --nanogpt PATH --output result.json

Each round runs a few steps of every variant in turn, so that a machine that slows down slows all of
them; the figure is the median over the rounds. Every variant trains the same shape on the same
tokens, with AdamW and clipping at 1.0.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import truestep
from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig
from truestep.runtime import (
    keep_freed_memory,
    measure_peak_flops,
    processor_name,
    resolve_device,
)

Step = Callable[[], float]  # one update, returning its loss


@dataclass(frozen=True)
class Workload:
    """The shape of a model and of its batch."""

    num_layers: int
    num_heads: int
    width: int
    vocab_size: int
    context_length: int
    batch_size: int
    tied: bool = False

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context_length

    @property
    def flops(self) -> float:
        """FLOPs of a step: 6 N a token and 12 L d T for attention, N = 12 L d^2 + V d."""
        weights = 12 * self.num_layers * self.width**2 + self.vocab_size * self.width
        attention = 12 * self.num_layers * self.width * self.context_length
        return float((6 * weights + attention) * self.tokens)

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        shape = (self.batch_size, self.context_length + 1)
        return Batch.of(torch.randint(self.vocab_size, shape, generator=generator))


WORKLOADS = {
    "W1": Workload(6, 6, 384, 65, 256, 16),
    "W2": Workload(4, 8, 256, 50257, 256, 8, tied=True),
    "W3": Workload(4, 4, 128, 65, 256, 12),
}


def truestep_step(
    workload: Workload,
    precision: Literal["float32", "bfloat16"],
    compile_: Literal["on", "off"],
) -> Step:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=workload.vocab_size,
            context_length=workload.context_length,
            num_layers=workload.num_layers,
            num_heads=workload.num_heads,
            width=workload.width,
            tie_embeddings=workload.tied,
        )
    )
    trainer = Trainer(model, TrainingConfig(precision=precision, compile=compile_), sinks=[])
    return lambda: trainer.training_step(workload.batch(trainer.step)).loss


def nanogpt_step(workload: Workload, path: Path) -> Step:
    """nanoGPT's own model and optimizer, stepped as its train.py does: float32 on a CPU."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    device = resolve_device("auto")
    model = module.GPT(
        module.GPTConfig(
            block_size=workload.context_length,
            vocab_size=workload.vocab_size,
            n_layer=workload.num_layers,
            n_head=workload.num_heads,
            n_embd=workload.width,
            dropout=0.0,
            bias=False,
        )
    ).to(device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device.type)
    steps = iter(range(10**9))

    def step() -> float:
        batch = workload.batch(next(steps)).to(device)
        _, loss = model(batch.tokens.contiguous(), batch.targets.contiguous())  # it views them
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def measure(variants: dict[str, Step], rounds: int, steps_a_round: int) -> dict[str, list[float]]:
    """Return the seconds a step of each round, every variant in turn."""
    for step in variants.values():  # compiles and fills caches
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            start = time.perf_counter()
            for _ in range(steps_a_round):
                step()
            seconds[name].append((time.perf_counter() - start) / steps_a_round)
    return seconds


def run(name: str, rounds: int, nanogpt: Path | None, peaks: dict[str, float]) -> dict[str, Any]:
    workload = WORKLOADS[name]
    variants: dict[str, Step] = {}
    if nanogpt is not None:
        variants["nanoGPT float32 eager"] = nanogpt_step(workload, nanogpt)
    variants["truestep float32 eager"] = truestep_step(workload, "float32", "off")
    variants["truestep bfloat16 eager"] = truestep_step(workload, "bfloat16", "off")
    variants["truestep bfloat16 compiled"] = truestep_step(workload, "bfloat16", "on")
    steps_a_round = 2 if workload.flops > 1e11 else 8
    seconds = measure(variants, rounds, steps_a_round)
    base = statistics.median(next(iter(seconds.values())))
    results = []
    print(f"\n{name}  {asdict(workload)}  {workload.flops / 1e9:.1f} GFLOP a step")
    print(f"{'':32}{'ms a step':>10}{'tokens/s':>10}{'MFU':>6}{'ratio':>7}   min-max ms")
    for variant, times in seconds.items():
        median = statistics.median(times)
        peak = peaks["bfloat16" if "bfloat16" in variant else "float32"]
        row = {
            "variant": variant,
            "median_seconds": median,
            "seconds": times,
            "tokens_per_second": workload.tokens / median,
            "mfu": workload.flops / median / peak,
            "ratio": base / median,
        }
        results.append(row)
        print(
            f"{variant:32}{median * 1e3:10.1f}{row['tokens_per_second']:10,.0f}{row['mfu']:6.0%}"
            f"{row['ratio']:7.2f}   {min(times) * 1e3:.0f}-{max(times) * 1e3:.0f}"
        )
    return {"workload": name, **asdict(workload), "flops": workload.flops, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W3"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to compare with")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    keep_freed_memory()  # for every variant alike
    device = resolve_device("auto")
    peaks = {
        name: measure_peak_flops(device, dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "commit": commit,
        "truestep": truestep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {processor_name()}",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "peak_gflops": {name: round(peak / 1e9) for name, peak in peaks.items()},
    }
    print(json.dumps(facts))
    workloads = [run(name, options.rounds, options.nanogpt, peaks) for name in options.workloads]
    if options.output is not None:
        options.output.write_text(json.dumps({**facts, "workloads": workloads}, indent=1) + "\n")


if __name__ == "__main__":
    main()
