"""The loss: next-token cross-entropy, exact in float32 and safe on every mask."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE_INDEX = -100

# Logits that exist at one time: 128 MiB in float32, compiled.
LOGITS_PER_CHUNK = 2**25


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
        total = linear_cross_entropy_sum(hidden, logits.weight, labels)
    else:
        total = _cross_entropy(logits.flatten(0, 1), labels).sum()
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
        losses = _linear_cross_entropy(logits.hidden.flatten(0, 1), logits.weight, labels)
    else:
        losses = _cross_entropy(logits.flatten(0, 1), labels)
    return losses.view(targets.shape)


def _cross_entropy(logits: Float[Tensor, "N V"], labels: Int[Tensor, "N"]) -> Tensor:
    """Return each row's cross-entropy, in float32 at least."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def _chunks(
    hidden: Float[Tensor, "N D"], labels: Int[Tensor, "N"], vocab_size: int
) -> Iterator[tuple[Float[Tensor, "M D"], Int[Tensor, "M"]]]:
    """Cut rows and labels into parts whose logits are small enough to exist at one time."""
    count = max(1, -(-len(hidden) * vocab_size // LOGITS_PER_CHUNK))
    return zip(hidden.chunk(count), labels.chunk(count), strict=True)


def _linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """Return each row's cross-entropy of `hidden @ weight.T`, computed in the dtype of `hidden`."""
    chunks = _chunks(hidden, labels, len(weight))
    weight = weight.to(hidden.dtype)
    return torch.cat([_cross_entropy(F.linear(rows, weight), part) for rows, part in chunks])


def linear_cross_entropy_sum(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "N"],
    *,
    only_memory: bool = False,
) -> Float[Tensor, ""]:
    """Sum the cross-entropy of `hidden @ weight.T`, with gradients if they are wanted.

    Where it is `only_memory` that counts, of chunks between the first and the last nothing is made
    but what stays.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return _linear_cross_entropy(hidden, weight, labels).sum()
    if hidden.dtype == torch.float16:  # its range does not hold what is unnormalised
        hidden = hidden.float()
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, only_memory)  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward, where a chunk's logits are: none is stored or made twice.

    Head and loss of W2, compiled, on one Zen 4 core: 1.31 s when backward made them again, 1.02 s
    with all logits at once, 0.90 s so.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        labels: Int[Tensor, "N"],
        only_memory: bool,
    ) -> Float[Tensor, ""]:
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        product_weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        weight_grad = None
        if ctx.needs_input_grad[1]:  # a frozen head costs no product
            weight_grad = torch.zeros(weight.shape[::-1], dtype=sum_dtype, device=weight.device)
        hidden_grads: list[Tensor] = []
        chunks = list(_chunks(hidden, labels, len(weight)))
        for index, (rows, part) in enumerate(chunks):
            if only_memory and 0 < index < len(chunks) - 1:
                hidden_grads.append(torch.empty_like(rows, dtype=sum_dtype))
                continue
            if hidden_grads:
                # Adds nothing. Asked for now, the last chunk's gradient no longer holds the sums
                # that came with it: the compiler else keeps those of every chunk from the 60th on.
                total = total + 0 * hidden_grads[-1][0, 0].nan_to_num()
            total, hidden_grad, weight_grad = _chunk_with_gradients(
                rows, product_weight, part, weight_grad, total
            )
            hidden_grads.append(hidden_grad)
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True, but what forward computed has no graph
            raise RuntimeError("deferred logits can be differentiated once; use plain logits")
        (hidden_grad, weight_grad), (hidden_dtype, weight_dtype) = ctx.saved_tensors, ctx.dtypes
        if weight_grad is not None:
            weight_grad = (weight_grad.T * grad).to(weight_dtype).contiguous()
        return (hidden_grad * grad).to(hidden_dtype), weight_grad, None, None


@torch.compiler.nested_compile_region  # compiled once, however many chunks there are
def _chunk_with_gradients(
    rows: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "M"],
    weight_grad: Float[Tensor, "D V"] | None,
    total: Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], Float[Tensor, "M D"], Float[Tensor, "D V"] | None]:
    """Return `total` with the loss, the gradient of `rows`, and `weight_grad` with what they add.

    Added up here, since outside a compiler holds the parts of all chunks to add them at once.
    Softmax minus one-hot enters the products unnormalised, which saves a pass over the logits: what
    divides it belongs to a row.
    """
    sum_dtype = torch.promote_types(rows.dtype, torch.float32)
    counts = labels != IGNORE_INDEX
    columns = torch.where(counts, labels, 0)
    columns = torch.where(columns < 0, len(weight), columns)  # refused, where -1 is the last
    at_label = torch.arange(len(labels), device=labels.device), columns
    logits = F.linear(rows, weight)  # (M, V)
    of_label = logits[at_label].to(sum_dtype)[:, None]  # (M, 1)
    top = logits.amax(1, keepdim=True).to(sum_dtype)
    exps = logits.to(sum_dtype).sub_(top).exp_()
    normaliser = exps.sum(1, keepdim=True)
    losses = torch.where(counts, (normaliser.log() + (top - of_label))[:, 0], 0)
    # Before rounding: what a likely label leaves of 1 is far less than bfloat16 resolves there.
    left = (of_label - top).exp() - normaliser
    exps = exps.to(rows.dtype)
    exps[at_label] = left[:, 0].to(rows.dtype)
    share = torch.where(counts[:, None], 1 / normaliser, 0)
    hidden_grad = (exps @ weight).to(sum_dtype) * share
    if weight_grad is not None:
        # This way round: 198 GFLOP/s, not 165, where V is no multiple of 64 (bfloat16, Zen 4).
        weight_grad = weight_grad + (rows.to(sum_dtype) * share).to(rows.dtype).T @ exps
    return total + losses.sum(), hidden_grad, weight_grad


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
