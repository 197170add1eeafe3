"""What a run needs of the machine, known before it is built."""

from pathlib import Path

from truestep.config import DataConfig, GPTConfig, RunConfig
from truestep.data.tokenizer import ByteTokenizer, find_tokenizer
from truestep.data.tokens import is_prepared, open_prepared
from truestep.model.gpt import resolve_shape

_FLOAT32_BYTES = 4


def count_parameters(shape: GPTConfig) -> int:
    """Return how many numbers the reference model of this shape trains; `vocab_size` is a number.

    Tied embeddings count once.
    """
    shape = resolve_shape(shape)
    vocab_size, kv_heads, mlp_width = (
        int(size) for size in (shape.vocab_size, shape.num_kv_heads, shape.mlp_width)
    )
    width, head = shape.width, shape.width // shape.num_heads
    attention = 2 * width * width + 2 * width * kv_heads * head + (2 * head if shape.qk_norm else 0)
    layer = attention + 3 * width * mlp_width + 2 * width
    embeddings = vocab_size * width * (1 if shape.tie_embeddings else 2)
    return embeddings + shape.num_layers * layer + width


def run_flops(config: RunConfig) -> int:
    """Return about what a run computes, known before there is a model to count it in."""
    shape = _with_vocabulary(config)
    weights = count_parameters(shape)
    if not shape.tie_embeddings:  # of which looking up is no product
        weights -= int(shape.vocab_size) * shape.width
    attention = 12 * shape.num_layers * shape.width * shape.context_length
    tokens = config.training.num_steps * config.data.batch_size * shape.context_length
    return (6 * weights + attention) * tokens


def checkpoint_bytes(config: RunConfig) -> int:
    """Return what one checkpoint of a run holds at least: parameters and moments in float32."""
    shape = _with_vocabulary(config)
    copies = 3 if config.training.optimizer == "adamw" else 2  # Muon has one moment, not two
    return _FLOAT32_BYTES * copies * count_parameters(shape)


def _with_vocabulary(config: RunConfig) -> GPTConfig:
    if config.model.vocab_size != "auto":
        return config.model
    return config.model.model_copy(update={"vocab_size": _vocab_size(config.data)})


def _vocab_size(data: DataConfig) -> int:
    """Return how many ids the tokenizer has, or at most will have."""
    if is_prepared(data.sources[0]):
        return open_prepared(Path(data.sources[0])).tokenizer.vocab_size
    if data.tokenizer == "auto":
        return ByteTokenizer.vocab_size
    return find_tokenizer(data.tokenizer).vocab_size


def num_checkpoints(config: RunConfig) -> int:
    """Return how many checkpoints lie beside each other at most: a new one before an old one goes.

    A short run makes fewer.
    """
    run, num_steps = config.run, config.training.num_steps
    saves = -(-num_steps // run.save_every)
    if run.keep_best_checkpoints:  # then every validation saves, too
        saves += -(-num_steps // run.evaluate_every)
    return min(saves, run.keep_checkpoints + run.keep_best_checkpoints + 1)
