"""Do something of your own while training: one shape of hook serves them all."""

import torch

from truestep import GPT, GPTConfig, StepMetrics, Trainer, TrainingConfig, every


def main() -> list[str]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, context_length=32, num_layers=2, num_heads=2, width=32))
    windows = torch.arange(33).repeat(8, 1)
    notes = []

    def weight_norm(trainer: Trainer, metrics: StepMetrics) -> None:
        norm = torch.nn.utils.get_total_norm(list(trainer.model.parameters()))
        notes.append(f"step {metrics.step}: the weights have norm {float(norm.detach()):.2f}")

    def stop_when_good(trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.loss < 1.0:
            trainer.stop("the loss is below 1")

    trainer = Trainer(
        model,
        TrainingConfig(learning_rate=1e-2),
        companions=[every(10, weight_norm), every(1, stop_when_good)],
    )
    trainer.fit([windows], num_steps=100)
    notes.append(f"stopped at step {trainer.step}: {trainer.stop_reason}")
    return notes


if __name__ == "__main__":
    print("\n".join(main()))
