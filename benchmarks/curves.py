"""Loss curves of a workload in float32 eager and in what a user gets by default, on the same text.

    python benchmarks/curves.py --workload W3 --data TEXT --output result.json

Both start from the same weights and see the same batches, as bytes modulo the vocabulary. Their
losses are compared step by step, and as means over ten steps. `--control` does so for float32 from
weights moved by a thousandth, a rounding of bfloat16: how far apart the training itself takes two
curves. `--litgpt` trains litgpt's model of the shape instead of the reference model, if it is
installed.
"""

import torch
from machine import argument_parser, existing, positive, write
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


def moved_by_a_thousandth(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape))
    return model


def compare(name: str, losses: list[float], exact: list[float]) -> dict[str, float]:
    """Print and return how far a curve is from the exact one."""
    differences = torch.tensor(losses, dtype=torch.float64) - torch.tensor(exact)
    means = differences.unfold(0, _MEAN_STEPS, _MEAN_STEPS).mean(1)
    found = {
        "last_loss": losses[-1],
        "largest": float(differences.abs().max()),
        "largest_of_means": float(means.abs().max()),
        "mean": float(differences.mean()),
    }
    print(
        f"{name}: last loss {losses[-1]:.4f}, in float32 {exact[-1]:.4f}; largest difference "
        f"{found['largest']:.5f}, of means over {_MEAN_STEPS} steps "
        f"{found['largest_of_means']:.5f}, mean {found['mean']:+.6f}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W3")
    parser.add_argument("--data", type=existing, required=True, help="a text file")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--learning-rate", type=float, default=TrainingConfig().learning_rate)
    parser.add_argument("--control", action="store_true", help="float32 from moved weights, too")
    parser.add_argument("--litgpt", action="store_true", help="train litgpt's model")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    data = torch.frombuffer(bytearray(options.data.read_bytes()), dtype=torch.uint8).long()
    text = data % workload.vocab_size
    make_model = litgpt_model if options.litgpt else reference_model
    common = TrainingConfig(num_steps=options.steps, learning_rate=options.learning_rate)
    float32 = common.model_copy(update={"precision": "float32", "compile": "off"})
    exact = curve(make_model(workload), workload, text, float32)
    compiled = common.model_copy(update={"compile": "on"})  # whatever the number of steps
    default = curve(make_model(workload), workload, text, compiled)
    result = {
        "workload": options.workload,
        "model": "litgpt's" if options.litgpt else "GPT",
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "float32": exact,
        "default": default,
        "differences": compare("by default", default, exact),
    }
    if options.control:
        moved = curve(moved_by_a_thousandth(make_model(workload)), workload, text, float32)
        result["control"] = compare("float32 from moved weights", moved, exact)
    write(options.output, result)


if __name__ == "__main__":
    main()
