"""Causal attention: rotary positions, grouped queries, and a cache for writing."""

import functools
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from truestep.model.layers import Linear, RMSNorm

# On a CPU in bfloat16, up to this many keys, plain products beat torch's fused attention. Forward
# and backward with its four projections on one Zen 4 core (AVX512-BF16), batch x heads x context x
# head: 12x4x256x32 16 ms against 36, 16x6x256x64 103 against 158.
_PLAIN_KEYS = 2048
# They leave out keys that a block of queries cannot see: all at once they take 20 and 112 ms.
_QUERY_BLOCKS, _MIN_BLOCK = 4, 64


class KVCache:
    """Keys and values of the tokens a model has read, so that each is read once.

    Give the same cache to successive forwards of one model; `length` counts the tokens in it.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D] of new tokens to what `layer` has stored, and return all of it."""
        if layer in self._stored:
            old_keys, old_values = self._stored[layer]
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        self._stored[layer] = keys, values
        return keys, values


class RotaryPositions(nn.Module):
    """Tables of the rotation of each pair of features at each position: Su et al. 2021, eq. 15.

    Feature i is paired with i + head_dim / 2, as the Llama of `transformers` has it.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, context_length: int, head_dim: int, theta: float) -> None:
        super().__init__()
        self.context_length, self.head_dim, self.theta = context_length, head_dim, theta
        self._make_tables(torch.empty(0))

    def _make_tables(self, like: Tensor) -> None:
        """Store the tables on the device of `like`, in its dtype but no coarser than float32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        positions = torch.arange(self.context_length, dtype=torch.float64)
        angles = torch.outer(positions, self.theta**-exponents)  # (T, D/2)
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(like.device, dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Make the tables anew where `.to()`, `.double()` or `.bfloat16()` would convert them.

        Positions rounded to bfloat16 are wrong, and tables widened to float64 no more than float32.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # untyped in torch
        self._make_tables(self.cos)
        return self

    def forward(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (T, 1, D/2) of positions `start` to `end`."""
        return self.cos[start:end, None], self.sin[start:end, None]

    def at(self, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, T, 1, D/2) of positions."""
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]


def rotate(x: Float[Tensor, "B T H D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H D"]:
    """Turn each pair of features by the angle of its position, in the dtype of the tables."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def attend(
    queries: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B G S D"],
    values: Float[Tensor, "B G S D"],
    starts: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T D"]:
    """Return for each query the average of the values up to it, weighted by softmax(q·k/√D).

    The T queries are the last of the S positions; each of G key heads serves H/G query heads. With
    `starts`, where T = S, a query sees no key before its start.
    """
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    bfloat16_on_cpu = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    if bfloat16_on_cpu and num_keys <= _PLAIN_KEYS:
        return _attend_by_matmuls(queries, keys, values, starts)
    mask = None
    if starts is not None:
        places = torch.arange(num_keys, device=queries.device)
        seen = (places >= starts[:, :, None]) & (places <= places[:, None])  # (B, T, S)
        mask = seen[:, None]
    elif 1 < num_queries < num_keys:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device)
        mask = mask.tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and num_queries == num_keys,
        enable_gqa=keys.shape[1] != queries.shape[1],
    )


def _attend_by_matmuls(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None
) -> Tensor:
    """Attend with plain matrix products; torch's softmax of bfloat16 computes in float32."""
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    queries = queries / math.sqrt(queries.shape[3])
    output: Tensor = _BlockedAttention.apply(queries, keys, values, starts)  # type: ignore[no-untyped-call]
    return output


class _BlockedAttention(torch.autograd.Function):
    """Attends a block of queries at a time, each with only the keys that it sees.

    Backward is written out because autograd's own, of so many slices, takes back what this saves:
    20 ms as above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Float[Tensor, "B H T D"],
        keys: Float[Tensor, "B H S D"],
        values: Float[Tensor, "B H S D"],
        starts: Int[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        before = keys.shape[2] - queries.shape[2]
        size = max(_MIN_BLOCK, -(-queries.shape[2] // _QUERY_BLOCKS))
        shares, outputs, start = [], [], 0
        for block in torch.split(queries, size, dim=2):
            end = start + block.shape[2]
            seen = before + end  # by the last query of the block
            future = block.new_full((end - start, seen), -math.inf).triu(before + start + 1)
            scores = block @ keys[:, :, :seen].transpose(2, 3) + future  # (B, H, block, seen)
            if starts is not None:
                places = torch.arange(seen, device=keys.device)
                past = places < starts[:, start:end, None]  # (B, block, seen)
                scores = scores.masked_fill(past[:, None], -math.inf)
            shares.append(scores.softmax(dim=-1))
            outputs.append(shares[-1] @ values[:, :, :seen])
            start = end
        ctx.save_for_backward(queries, keys, values, *shares)
        return torch.cat(outputs, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "B H T D"]) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True, but the shares have no graph
            raise RuntimeError("attention by blocks can be differentiated once; use float32")
        queries, keys, values, *shares = ctx.saved_tensors
        sizes = [share.shape[2] for share in shares]
        query_grads, key_grads, value_grads = [], [], []
        for share, block, block_grad in zip(
            shares, torch.split(queries, sizes, dim=2), torch.split(grad, sizes, dim=2), strict=True
        ):
            seen = share.shape[3]
            share_grad = block_grad @ values[:, :, :seen].transpose(2, 3)
            # As autograd calls it: one pass in float32, compiled or not.
            score_grad = torch._softmax_backward_data(share_grad, share, -1, share.dtype)
            query_grads.append(score_grad @ keys[:, :, :seen])
            key_grads.append(score_grad.transpose(2, 3) @ block)
            value_grads.append(share.transpose(2, 3) @ block_grad)
        return torch.cat(query_grads, dim=2), _add_up(key_grads), _add_up(value_grads), None


def _add_up(parts: list[Tensor]) -> Tensor:
    """Add gradients [B, H, seen, D] of ever more keys, in float32."""
    sums, start = [], 0
    for number, part in enumerate(parts):
        end = part.shape[2]
        wide = [each[:, :, start:end].float() for each in parts[number:]]
        sums.append(functools.reduce(torch.add, wide).to(part.dtype))
        start = end
    return torch.cat(sums, dim=2)


class Attention(nn.Module):
    """Grouped-query attention: Ainslie et al. 2023; with one group a head, multi-head attention.

    `qk_norm_eps` switches RMSNorm of each head's queries and keys on, before the rotation.
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, qk_norm_eps: float | None
    ) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.q = Linear(width, width)
        self.k = Linear(width, num_kv_heads * self.head_dim)
        self.v = Linear(width, num_kv_heads * self.head_dim)
        self.o = Linear(width, width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(self.head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, qk_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: tuple[Tensor, Tensor],
        cache: KVCache | None,
        starts: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return what each position reads from itself and the ones before it, from its start."""
        heads = (-1, self.head_dim)
        queries = rotate(self.q_norm(self.q(x).unflatten(-1, heads)), *rotation)  # (B, T, H, D/H)
        keys = rotate(self.k_norm(self.k(x).unflatten(-1, heads)), *rotation)
        values = self.v(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D/H)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        if cache is not None:
            keys, values = cache.extend(self, keys, values)
        output: Tensor = self.o(attend(queries, keys, values, starts).transpose(1, 2).flatten(2))
        return output
