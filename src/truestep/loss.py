"""The loss: next-token cross-entropy, exact in float32 and safe on every mask."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100

# Rows whose logits exist at one time: 1024 x 50304 in float32 is 196 MiB.
_ROWS_PER_CHUNK = 1024


class DeferredLogits(NamedTuple):
    """Logits not yet multiplied out: `hidden @ weight.T`, without ever holding [B, T, V]."""

    hidden: Float[Tensor, "B T D"]
    weight: Float[Tensor, "V D"]

    @property
    def shape(self) -> torch.Size:
        """The shape the logits would have, (B, T, V)."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))


def compute_loss(
    logits: Float[Tensor, "B T V"] | DeferredLogits,
    targets: Int[Tensor, "B T"],
    *,
    num_tokens: int | Int[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy of the targets over `num_tokens`, in nats.

    `targets[b, t]` is the token that follows `tokens[b, t]`: already shifted, so logits at t are
    compared with targets at t. Positions with IGNORE_INDEX (-100) cost nothing and get exactly zero
    gradient. `num_tokens` defaults to the number of positions that count; a trainer passes the
    count of the whole global batch, so that micro-batches add up to the one-big-batch loss.
    The result is float32 (float64 for float64 logits); if every target is ignored it is 0,
    connected to the graph.

    Logits must be finite where they are ignored, too: NaN there has a gradient of NaN.
    Errors: ValueError or TypeError for shapes or dtypes that do not fit, IndexError for a target
    outside the vocabulary.
    """
    _check(logits, targets)
    labels = targets.flatten().long()
    if isinstance(logits, DeferredLogits):
        hidden = logits.hidden.flatten(0, 1)
        total = _chunked_sum(hidden, logits.weight.to(hidden.dtype), labels)
    else:
        total = _cross_entropy_sum(logits.flatten(0, 1), labels)
    if num_tokens is None:
        num_tokens = (labels != IGNORE_INDEX).sum()
    # Zero targets cost zero, not 0/0 = NaN as torch's own mean has it (pytorch#116349).
    count = num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
    return total / count


def token_losses(
    logits: Float[Tensor, "B T V"] | DeferredLogits, targets: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return the cross-entropy of each target by itself, in nats; 0 where it is IGNORE_INDEX.

    Their sum over the number of targets is `compute_loss`. Errors: as there.
    """
    _check(logits, targets)
    labels = targets.flatten().long()
    if isinstance(logits, DeferredLogits):
        hidden = logits.hidden.flatten(0, 1)
        weight = logits.weight.to(hidden.dtype)
        chunks = zip(
            torch.split(hidden, _ROWS_PER_CHUNK), torch.split(labels, _ROWS_PER_CHUNK), strict=True
        )
        losses = torch.cat([_cross_entropy(F.linear(rows, weight), part) for rows, part in chunks])
    else:
        losses = _cross_entropy(logits.flatten(0, 1), labels)
    return losses.view(targets.shape)


def _cross_entropy(logits: Float[Tensor, "N V"], labels: Int[Tensor, "N"]) -> Tensor:
    """Return each row's cross-entropy, in float32 at least."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def _cross_entropy_sum(logits: Float[Tensor, "N V"], labels: Int[Tensor, "N"]) -> Tensor:
    """Sum over rows: the per-row losses are added by torch's pairwise sum."""
    return _cross_entropy(logits, labels).sum()


def _chunked_sum(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, "N"]
) -> Tensor:
    """Multiply out and reduce a chunk of rows at a time; backward computes each chunk again."""

    def chunk_sum(rows: Tensor, weight: Tensor, chunk_labels: Tensor) -> Tensor:
        return _cross_entropy_sum(F.linear(rows, weight), chunk_labels)

    chunks = zip(
        torch.split(hidden, _ROWS_PER_CHUNK), torch.split(labels, _ROWS_PER_CHUNK), strict=True
    )
    sums = [
        checkpoint(chunk_sum, rows, weight, part, use_reentrant=False, preserve_rng_state=False)
        for rows, part in chunks
    ]
    return torch.stack(sums).sum()


def _check(logits: Tensor | DeferredLogits, targets: Tensor) -> None:
    shape = tuple(logits.shape)
    dtype = logits.hidden.dtype if isinstance(logits, DeferredLogits) else logits.dtype
    if len(shape) != 3:
        raise ValueError(f"logits have shape {list(shape)}; they must be [B, T, V]")
    if not dtype.is_floating_point:
        raise TypeError(f"logits have dtype {dtype}; they must be floating point")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(f"targets have dtype {targets.dtype}; they must be integer token ids")
    if tuple(targets.shape) != shape[:2]:
        raise ValueError(
            f"targets have shape {list(targets.shape)} but logits {list(shape)}; "
            f"targets must be [B, T] = {list(shape[:2])}"
        )
