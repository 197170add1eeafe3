"""The reference model: a decoder-only transformer that is Llama, or with QK-norm Qwen3."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from truestep.config import GPTConfig
from truestep.loss import DeferredLogits
from truestep.model.attention import Attention, KVCache, RotaryPositions
from truestep.model.layers import Linear, RMSNorm, SwiGLU

INIT_STD = 0.02  # Radford et al. 2019 (GPT-2); its residual projections by 1/sqrt(2 layers) less

# From here on a training forward leaves the head to `compute_loss`. On two cores with AMX a step of
# W3's layers takes 0.93 of the time so (0.87 with 8192 ids; with 1024, 0.97, near the noise), in
# float32 and uncompiled 0.93 to 0.97; and the float32 logits of 4096 tokens would be 64 MiB.
DEFERRED_VOCAB_SIZE = 4096


class Block(nn.Module):
    """One layer: attention and SwiGLU, each normalised before and added to the residual stream."""

    def __init__(
        self, attention: Attention, mlp: SwiGLU, width: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = mlp
        self.dropout = _dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: tuple[Tensor, Tensor],
        cache: KVCache | None,
        starts: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the residual stream after this layer."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, cache, starts))
        output: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return output


class GPT(nn.Module):
    """A language model: from tokens to the logits of the token that follows each.

    `config` is the given one with every auto resolved. Initial weights come from torch's global
    generator. The parameters keep their dtype; a forward under `torch.autocast` casts them and
    keeps the residual stream in autocast's dtype, and norms, rotations and softmax in float32.

    Errors: ValueError for `vocab_size="auto"`, and for more tokens than `context_length`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config = resolve_shape(config)
        # mypy cannot see that nothing is "auto" any more.
        vocab_size, mlp_width = int(config.vocab_size), int(config.mlp_width)
        width, eps = config.width, config.norm_eps
        blocks = [
            Block(
                Attention(
                    width,
                    config.num_heads,
                    int(config.num_kv_heads),
                    qk_norm_eps=eps if config.qk_norm else None,
                ),
                SwiGLU(width, mlp_width),
                width,
                eps,
                config.dropout,
            )
            for _ in range(config.num_layers)
        ]
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = _dropout(config.dropout)
        self.rotary = RotaryPositions(
            config.context_length, width // config.num_heads, config.rope_theta
        )
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(width, eps)
        self.head = Linear(width, vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
        scale = 0.0 if config.residual_init == "zero" else (2 * config.num_layers) ** -0.5
        for block in blocks:
            for projection in (block.attention.o, block.mlp.down):
                nn.init.normal_(projection.weight, std=INIT_STD * scale)

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compiled_parts(self) -> list[nn.Module]:
        """Return the modules that `compile=layers` compiles, one of each class for all.

        Those of a class differ only in the values of their parameters.
        """
        return [*self.layers, self.norm]

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        positions: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | DeferredLogits:
        """Return the logits of the token after each; with a cache, `tokens` continue what it holds.

        With `positions`, 0 where a document begins and one more at each token after it, every
        document is read as if it were alone.
        In training mode a vocabulary of DEFERRED_VOCAB_SIZE or more gives DeferredLogits.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"{end} tokens are more than context_length={self.config.context_length}; "
                "give fewer, or train a model of a longer context"
            )
        dtype = _compute_dtype(self.embedding.weight)
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.dropout(self.embedding(tokens).to(dtype))  # (B, T, D)
            starts = None
            if positions is None:
                rotation = self.rotary(start, end)
            else:
                rotation = self.rotary.at(positions)
                starts = torch.arange(end, device=tokens.device) - positions  # of each document
            for layer in self.layers:
                x = layer(x, rotation, cache, starts)
            x = self.norm(x)
            if cache is not None:
                cache.length = end
            if self.training and self.head.out_features >= DEFERRED_VOCAB_SIZE:
                return DeferredLogits(x, self.head.weight)
            logits: Tensor = self.head(x)
            return logits


def resolve_shape(config: GPTConfig) -> GPTConfig:
    """Return `config` with the automatic sizes in numbers.

    Errors: ValueError if `vocab_size` is "auto": only the tokenizer knows it.
    """
    if config.vocab_size == "auto":
        raise ValueError(
            "vocab_size='auto' is not known without data; give the tokenizer's number of tokens, "
            "256 for bytes"
        )
    sizes = {}
    if config.num_kv_heads == "auto":
        sizes["num_kv_heads"] = config.num_heads
    if config.mlp_width == "auto":
        # Three matrices of 8/3 width hold as many weights as GPT's two of 4 x width.
        sizes["mlp_width"] = 8 * round(config.width / 3)
    return config.model_copy(update=sizes)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on; like autocast, leave float64 alone."""
    device_type = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share > 0 else nn.Identity()  # the identity draws nothing at all
