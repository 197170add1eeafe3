"""The shapes of docs/performance.md, and the arithmetic in a step of each."""

from dataclasses import dataclass

import torch

from truestep import GPTConfig
from truestep.batch import Batch


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
    def mlp_width(self) -> int:
        """SwiGLU's width: three matrices of it hold as many weights as GPT's two of 4 x width."""
        return 8 * round(self.width / 3)

    @property
    def flops(self) -> float:
        """FLOPs of a step: 6 N a token and 12 L d T for attention, N = 12 L d^2 + V d."""
        weights = 12 * self.num_layers * self.width**2 + self.vocab_size * self.width
        attention = 12 * self.num_layers * self.width * self.context_length
        return float((6 * weights + attention) * self.tokens)

    def config(self) -> GPTConfig:
        """The reference model of this shape."""
        return GPTConfig(
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            width=self.width,
            tie_embeddings=self.tied,
        )

    def batch(self, step: int) -> Batch:
        """Return the random tokens of a step, the same for every variant."""
        generator = torch.Generator().manual_seed(step)
        shape = (self.batch_size, self.context_length + 1)
        return Batch.of(torch.randint(self.vocab_size, shape, generator=generator))


WORKLOADS = {
    "W1": Workload(6, 6, 384, 65, 256, 16),
    "W2": Workload(4, 8, 256, 50257, 256, 8, tied=True),
    "W3": Workload(4, 4, 128, 65, 256, 12),
    # For a GPU: GPT-2's smallest and largest shape.
    "G1": Workload(12, 12, 768, 50257, 1024, 16, tied=True),
    "G2": Workload(48, 25, 1600, 50257, 1024, 4, tied=True),
}
