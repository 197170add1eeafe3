"""Loss curves of a workload in float32 eager and in what a user gets by default, on the same text.

    python benchmarks/curves.py --workload W3 --data TEXT --output result.json

Both start from the same weights and see the same batches, as bytes modulo the vocabulary. Their
losses are compared step by step, and as means over ten steps.
"""

import argparse
import json
from pathlib import Path
from typing import Literal

import torch
from machine import facts
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig

_MEAN_STEPS = 10


def curve(
    workload: Workload,
    text: torch.Tensor,
    steps: int,
    precision: Literal["auto", "float32"],
    compile_: Literal["on", "off"],
) -> list[float]:
    """Return the loss of each step."""
    torch.manual_seed(0)
    config = TrainingConfig(
        precision=precision, compile=compile_, num_steps=steps, learning_rate=1e-3
    )
    trainer = Trainer(GPT(workload.config()), config, sinks=[])
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        last = len(text) - workload.context_length - 1
        starts = torch.randint(last, (workload.batch_size, 1), generator=generator)
        windows = text[starts + torch.arange(workload.context_length + 1)]
        losses.append(trainer.training_step(windows).loss)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W3")
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="where to write the curves as JSON")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    data = torch.frombuffer(bytearray(options.data.read_bytes()), dtype=torch.uint8).long()
    text = data % workload.vocab_size
    exact = curve(workload, text, options.steps, "float32", "off")
    default = curve(workload, text, options.steps, "auto", "on")
    differences = torch.tensor(default, dtype=torch.float64) - torch.tensor(exact)
    means = differences.unfold(0, _MEAN_STEPS, _MEAN_STEPS).mean(1)
    result = {
        **facts(),
        "workload": options.workload,
        "steps": options.steps,
        "largest_difference": float(differences.abs().max()),
        "largest_difference_of_means": float(means.abs().max()),
        "mean_difference": float(differences.mean()),
        "float32": exact,
        "default": default,
    }
    print(
        f"{options.workload}: last losses {exact[-1]:.4f} (float32) and {default[-1]:.4f}; largest "
        f"difference {result['largest_difference']:.5f}, of means over {_MEAN_STEPS} steps "
        f"{result['largest_difference_of_means']:.5f}, mean {result['mean_difference']:+.6f}"
    )
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
