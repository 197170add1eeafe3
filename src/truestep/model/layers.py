"""The parts of a transformer block that know nothing of positions: matrices, norm, SwiGLU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """Multiply by a matrix without bias, in the dtype of the input.

    The parameter keeps its own dtype; its cast is part of the graph, so gradients arrive in it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch E"]:
        """Return `x @ weight.T`."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square and scale: Zhang & Sennrich 2019, eq. 4.

    Computed in float32 at least, returned in the dtype of the input.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the normalised input."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """The gated feed-forward layer: Shazeer 2020, eq. 6, without biases."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate = Linear(width, mlp_width)
        self.up = Linear(width, mlp_width)
        self.down = Linear(mlp_width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return `down(silu(gate(x)) * up(x))`."""
        output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return output
