"""Muon for the hidden matrices of a model, paired with AdamW for the rest."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from truestep.training.optim import trainable_parameters

# The polynomial's slope at 0 is as steep as it can be; its values near 1 wander from 0.7 to 1.2.
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7

# Numbers whose matrices are made orthogonal in one product, in 80 MiB of float32 at most for what
# is on the way: beyond, a product is long enough.
_NUMBERS_AT_ONCE = 2**22


def hidden_matrices(model: nn.Module, head: nn.Module) -> list[nn.Parameter]:
    """Return what Muon takes: matrices except embeddings, what is tied to them, and the head.

    `head` is the layer that produces the logits.
    Errors: ValueError for a model without such a matrix.
    """
    others = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module is head
        for parameter in module.parameters(recurse=False)
    }
    matrices = [p for p in trainable_parameters(model) if p.dim() == 2 and id(p) not in others]
    if not matrices:
        raise ValueError(
            f"optimizer=muon finds no hidden matrix in {type(model).__name__}: every matrix is an "
            "embedding or the head; use optimizer=adamw"
        )
    return matrices


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are brought to singular values near 1: Jordan et al. 2024, "Muon".

    Every parameter is a matrix. `torch.optim.Muon` iterates in bfloat16 alone, which a CPU without
    such products does at a hundredth of its rate: a step of W3's layers over 4,096 ids took 0.96 s
    on two Zen 3 cores, and takes 0.37. Here `dtype` is a choice; the state is as torch's.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        self._dtype = dtype
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_dtype": self._dtype}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # there is none
        """Update every matrix once, by Nesterov's momentum of its gradient, made orthogonal."""
        for group in self.param_groups:
            momentum = group["momentum"]
            for matrices in _of_one_shape(group["params"]):
                updates = torch.stack([self._direction(m, momentum) for m in matrices])
                rows, columns = matrices[0].shape
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for matrix, update in zip(matrices, orthogonal(updates), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-rate)

    def _direction(self, matrix: Tensor, momentum: float) -> Float[Tensor, "M N"]:
        """Take the gradient into the average, and return where momentum leads."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        gradient: Any = matrix.grad
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction: Tensor = gradient.lerp(average, momentum).to(self._dtype)
        return direction


def _of_one_shape(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Collect matrices that have a gradient by shape, at most _NUMBERS_AT_ONCE in a list."""
    trained = sorted((m for m in matrices if m.grad is not None), key=lambda m: m.shape)
    for _, alike in groupby(trained, key=lambda m: m.shape):
        same = list(alike)
        count = max(1, _NUMBERS_AT_ONCE // max(1, same[0].numel()))
        yield from (same[i : i + count] for i in range(0, len(same), count))


def orthogonal(matrices: Float[Tensor, "K M N"]) -> Float[Tensor, "K M N"]:
    """Return about U V^T of each singular value decomposition U S V^T, in the matrices' own dtype.

    Source: Jordan et al. 2024: five Newton-Schulz steps of an odd polynomial of degree five. All at
    once: the 28 small matrices of W3 take 6 ms in bfloat16 on two cores, one after another 21.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)  # no singular value above 1
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, as one optimizer with one state.

    `defaults` and every group but the last are AdamW's; the last is Muon's.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, rest: torch.optim.AdamW, matrices: Muon) -> None:
        self._adamw, self._muon = rest, matrices
        super().__init__([*rest.param_groups, *matrices.param_groups], rest.defaults)
        self._share()

    def _share(self) -> None:
        """Let both halves work on this optimizer's own groups and state."""
        self._adamw.param_groups = self.param_groups[:-1]
        self._muon.param_groups = self.param_groups[-1:]
        self._adamw.state = self._muon.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw, "_muon": self._muon}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this pair."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Update every parameter once."""
        loss = self._adamw.step(closure)
        self._muon.step()
        return loss
