"""Loss curves of a workload in float32 eager and in what a user gets by default, on the same text.

    python benchmarks/curves.py --workload W3 --data TEXT --output result.json

Both start from the same weights and see the same batches, as bytes modulo the vocabulary. Their
losses are compared step by step, and as means over ten steps. `--litgpt` trains litgpt's model of
the shape instead of the reference model, if it is installed.
"""

import argparse
import json
from pathlib import Path

import torch
from machine import facts
from peers import litgpt_model
from workloads import WORKLOADS, Workload

from truestep import GPT, Trainer, TrainingConfig

_MEAN_STEPS = 10


def reference_model(workload: Workload) -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT(workload.config())


def curve(
    model: torch.nn.Module, workload: Workload, text: torch.Tensor, config: TrainingConfig
) -> list[float]:
    """Return the loss of each step."""
    trainer = Trainer(model, config, sinks=[])
    losses = []
    for step in range(config.num_steps):
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
    parser.add_argument("--litgpt", action="store_true", help="train litgpt's model")
    parser.add_argument("--output", type=Path, help="where to write the curves as JSON")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    data = torch.frombuffer(bytearray(options.data.read_bytes()), dtype=torch.uint8).long()
    text = data % workload.vocab_size
    make_model = litgpt_model if options.litgpt else reference_model
    common = TrainingConfig(num_steps=options.steps, learning_rate=1e-3)
    float32 = common.model_copy(update={"precision": "float32", "compile": "off"})
    exact = curve(make_model(workload), workload, text, float32)
    compiled = common.model_copy(update={"compile": "on"})  # whatever the number of steps
    default = curve(make_model(workload), workload, text, compiled)
    differences = torch.tensor(default, dtype=torch.float64) - torch.tensor(exact)
    means = differences.unfold(0, _MEAN_STEPS, _MEAN_STEPS).mean(1)
    result = {
        **facts(),
        "workload": options.workload,
        "model": "litgpt's" if options.litgpt else "GPT",
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
