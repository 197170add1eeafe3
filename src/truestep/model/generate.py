"""Writing with the reference model, one token at a time."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from truestep.model.attention import KVCache
from truestep.model.gpt import GPT
from truestep.runtime import module_modes


def generate(
    model: GPT,
    tokens: Shaped[Tensor, "*batch T"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    first_tokens: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield the ids of tokens that continue the prompt `tokens` ([T] or [1, T]).

    Temperature 0 takes the likeliest token. `top_k` keeps the k likeliest; of these, `top_p` keeps
    the fewest that hold this share of the probability. `stop_token` ends the text and is not
    yielded; the first new token is one of `first_tokens`, if given. When the context is full, the
    model reads the last half of it again and goes on. A model may have more ids than its tokenizer:
    those from `vocab_size` on are not drawn.

    The same seed gives the same text; torch's own generators are not used, and between two tokens
    every module is in the mode the caller gave it. The caller's autocast applies.

    Errors: TypeError or ValueError at the call; ValueError on the way if logits are not finite.
    """
    largest = model.head.out_features
    vocab_size = largest if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= largest:
        raise ValueError(f"vocab_size={vocab_size} must be 1 to the model's {largest}")
    history = _check_prompt(tokens, largest)
    _check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"stop_token={stop_token} must be an id from 0 to {vocab_size - 1}")
    if first_tokens is not None and not all(0 <= t < vocab_size for t in first_tokens or (-1,)):
        raise ValueError(
            f"first_tokens={list(first_tokens)} must be one or more ids, 0 to {vocab_size - 1}"
        )
    generator = torch.Generator().manual_seed(seed)  # on the CPU: one text on every device

    def continuation() -> Iterator[int]:
        first = first_tokens
        for padded in _next_logits(model, history, max_new_tokens):
            logits = padded[:vocab_size]
            if first is not None:
                refused = torch.ones_like(logits, dtype=torch.bool)
                refused[list(first)] = False
                logits.masked_fill_(refused, -math.inf)
                first = None
            token = _sample(logits, temperature, top_k, top_p, generator)
            if token == stop_token:
                return
            yield token
            history.append(token)

    return continuation()


def _next_logits(
    model: GPT, history: list[int], max_new_tokens: int
) -> Iterator[Float[Tensor, "V"]]:
    """Yield the logits after `history`, to which the caller appends a token after each."""
    context_length = model.config.context_length
    device = model.embedding.weight.device
    cache, unread = KVCache(), history[-context_length:]
    for _ in range(max_new_tokens):
        if cache.length + len(unread) > context_length:
            cache, unread = KVCache(), history[-max(1, context_length // 2) :]
        with torch.no_grad(), module_modes(model, training=False):
            logits = model(torch.tensor([unread], device=device), cache)[0, -1]
        if not logits.isfinite().all():
            raise ValueError(
                "the model's logits are not finite, so no token can be drawn; "
                "load a checkpoint from before the training diverged"
            )
        yield logits.cpu().double()
        unread = history[-1:]


def _sample(
    logits: Float[Tensor, "V"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """Draw a token id from softmax(logits / temperature), cut to the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = logits.sort(descending=True, stable=True)
    # Less the largest, a tiny temperature overflows to -inf alone, never to inf - inf.
    probabilities = ((logits - logits[0])[:top_k] / temperature).softmax(dim=0)
    if top_p is not None:  # Holtzman et al. 2020, eq. 2: the nucleus
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities.where(before < top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _check_prompt(tokens: Tensor, vocab_size: int) -> list[int]:
    """Return the prompt as a list of ids, or say what is wrong with it."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens have dtype {tokens.dtype}; token ids must be integers")
    if tokens.dim() not in (1, 2) or (tokens.dim() == 2 and len(tokens) != 1):
        raise ValueError(
            f"tokens have shape {list(tokens.shape)}; one prompt is [T] or [1, T]: "
            "call generate for each row"
        )
    prompt: list[int] = tokens.flatten().tolist()
    if not prompt:
        raise ValueError(
            "tokens are empty, but a model continues at least one token; "
            "give one, such as a newline or the token that starts a document"
        )
    for position, token in enumerate(prompt):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"tokens[{position}] = {token} is outside the model's vocabulary of {vocab_size}; "
                f"ids must be 0 to {vocab_size - 1}: use the tokenizer the model was trained with"
            )
    return prompt


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    rules = [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0; try 200"),
        (
            "temperature",
            temperature,
            0 <= temperature < math.inf,
            "finite and at least 0; 0 takes the likeliest token",
        ),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None for every token"),
        (
            "top_p",
            top_p,
            top_p is None or 0 < top_p <= 1,
            "above 0 and at most 1, or None for every token",
        ),
        ("seed", seed, 0 <= seed < 2**63, "at least 0 and below 2**63"),
    ]
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name}={value} must be {rule}")
