"""Train a model of your own: any module that maps tokens [B, T] to logits [B, T, V]."""

import torch
from torch import Tensor, nn

from truestep import Trainer, TrainingConfig


class RecurrentModel(nn.Module):
    """A GRU over token embeddings."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.recurrence(self.embedding(tokens))  # (B, T, D)
        logits: Tensor = self.head(hidden)  # (B, T, V)
        return logits


def main() -> float:
    torch.manual_seed(0)
    text = "the cat sat on the mat and the dog sat on the log. " * 40
    ids = torch.tensor(list(text.encode()))
    windows = ids.unfold(0, 33, 32)  # [N, T+1]: neighbours share one token

    model = RecurrentModel(vocab_size=256, width=64)
    trainer = Trainer(model, TrainingConfig(learning_rate=1e-2, precision="float32"))
    for _ in range(30):
        metrics = trainer.training_step(windows)
    return metrics.loss


if __name__ == "__main__":
    main()
