"""What every test shares: shapes checked at run time, and small, repeatable machines."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

# Checks every jaxtyping shape of these modules at run time. Not those whose functions run inside
# compiled units, where a wrapper would break the graph, nor `Batch`, which has its own errors.
install_import_hook(["truestep.model.generate", "truestep.training.evaluate"], "beartype.beartype")


# Two test processes share two cores, and each starts processes of its own.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


class Bigram(torch.nn.Module):
    """The smallest language model: a row of logits for each token."""

    def __init__(self, vocab_size=11, width=8, dropout=0.0):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.norm = torch.nn.LayerNorm(width)
        self.hidden = torch.nn.Linear(width, width)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(width, vocab_size)

    def forward(self, tokens):
        hidden = torch.tanh(self.hidden(self.norm(self.embedding(tokens))))
        return self.head(self.dropout(hidden))


@pytest.fixture
def bigram():
    """Build a seeded Bigram."""

    def build(seed=0, **shape):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Bigram(**shape)

    return build


@pytest.fixture
def windows():
    """Build seeded random windows [B, T+1]."""

    def build(batch_size=4, length=8, vocab_size=11, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, (batch_size, length + 1), generator=generator)

    return build
