"""Train with an optimizer and a schedule of your own."""

import torch

from truestep import GPT, GPTConfig, Trainer


def main() -> float:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, context_length=32, num_layers=2, num_heads=2, width=32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)

    def triangle(step: int) -> float:
        """Return the share of the peak learning rate: up for 10 steps, then down for 20."""
        return min((step + 1) / 10, max(30 - step, 1) / 20)

    trainer = Trainer(model, optimizer=optimizer, schedule=triangle)
    windows = torch.arange(33).repeat(8, 1)  # each token is the one before plus one
    for _ in range(30):
        metrics = trainer.training_step(windows)
    return metrics.loss


if __name__ == "__main__":
    main()
