"""Train on data of your own: an object whose batch is a function of the step can be resumed."""

import torch

from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig


class Additions:
    """Sums such as 27+45=72, made on the fly; only the digits after the = are targets."""

    characters = "0123456789+= "

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def batch_at(self, step: int) -> Batch:
        """Return the batch of a step: the same one whenever it is asked for."""
        generator = torch.Generator().manual_seed(step)
        numbers = torch.randint(10, 50, (self.batch_size, 2), generator=generator).tolist()
        rows = [[*map(self.characters.index, f"{a}+{b}={a + b}")] for a, b in numbers]
        windows = torch.tensor(rows)  # [B, T+1]
        targets = windows[:, 1:].clone()
        targets[:, :5] = -100  # IGNORE_INDEX: the question is given, not predicted
        return Batch(windows[:, :-1], targets)


def main() -> float:
    torch.manual_seed(0)
    data = Additions(batch_size=64)
    shape = GPTConfig(
        vocab_size=len(data.characters), context_length=16, num_layers=2, num_heads=2, width=32
    )
    trainer = Trainer(GPT(shape), TrainingConfig(learning_rate=3e-3))
    trainer.fit(data, num_steps=60)
    return trainer.evaluate([data.batch_at(10_000)]).loss


if __name__ == "__main__":
    main()
