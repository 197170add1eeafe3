"""Measure a trained model on the text it was validated on, or on another."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from truestep.batch import Batch
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.data.document_mask import with_positions
from truestep.data.loader import Tokens, evaluation_batches
from truestep.data.survey import readable_documents
from truestep.data.tokenizer import Tokenizer
from truestep.data.tokens import dtype_of, is_prepared, open_prepared
from truestep.loss import LOGITS_PER_CHUNK
from truestep.observe.text import count
from truestep.training.evaluate import Evaluation, evaluate, weighted
from truestep.workflows.sources import (
    Sources,
    data_facts,
    document_end,
    open_data,
    require_same_data,
)
from truestep.workflows.trained import load_trained


def batches_to_evaluate(
    config: RunConfig,
    split: Tokens,
    num_windows: int | None = None,
    *,
    document_end: int | None = None,
) -> Iterator[Batch]:
    """Return batches of windows that take no more memory than a step of training, or of one window.

    Evaluation has all logits of a batch at one time, and them in float32, and these for the
    softmax, where training of many ids has a chunk.
    With `document_end` the batches have `with_positions`. `num_windows` and errors: as for
    `evaluation_batches`.
    """
    length, vocab_size = config.model.context_length, int(config.model.vocab_size)
    rows = min(int(config.training.micro_batch_size), config.data.batch_size)
    most = LOGITS_PER_CHUNK // (4 * length * vocab_size)
    batches = evaluation_batches(
        split,
        context_length=length,
        batch_size=max(1, min(rows, most)),
        num_windows=num_windows,
    )
    if document_end is None:
        return batches
    return (with_positions(batch, document_end) for batch in batches)


def evaluate_sources(
    config: RunConfig, data: Sources, num_windows: int | None, evaluate: Callable[..., Evaluation]
) -> Evaluation:
    """Return the loss over a run's validation text by a function such as `Trainer.evaluate`.

    Several sources share the windows equally, and count in proportion to their weights, as in
    training. None for `num_windows` is all of the text.
    """
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes)
    end = document_end(config, data.tokenizer)
    results: dict[str, Evaluation] = {}
    for number, (name, split) in enumerate(data.validation.items()):
        share = None
        if num_windows is not None:
            first, end = (n * num_windows // len(data.validation) for n in (number, number + 1))
            share = max(1, end - first)
        batches = batches_to_evaluate(config, split, share, document_end=end)
        results[name] = evaluate(batches, token_bytes=token_bytes)
    return weighted(results, data.weights)


class _Text:
    """Tokens in memory: every document of a source, each with its end."""

    def __init__(self, source: str, field: str, tokenizer: Tokenizer, say: Say) -> None:
        dtype, end = dtype_of(tokenizer.vocab_size), [tokenizer.end_of_document]
        pieces = [
            np.concatenate([tokenizer.encode(document.read()), end]).astype(dtype)
            for document in readable_documents(source, say, field)
        ]
        self._tokens = np.concatenate(pieces)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        return self._tokens[start:stop].astype(np.int64)


def evaluate_run(
    directory: Path, source: str | None, device: str, checkpoint: str, say: Say
) -> Evaluation:
    """Return and say the loss of a run's model on `source`, or on its own validation text.

    Errors: RunError for a run without a good checkpoint; CorpusError for a source without text.
    """
    trained = load_trained(directory, say, device, checkpoint)
    tokenizer = trained.tokenizer
    measure = partial(evaluate, trained.model)
    at = f"{directory} at step {trained.step} on"
    if source is None:
        prepared = open_data(trained.config, directory.parent, say, tokenizer)
        require_same_data(trained.facts, data_facts(trained.config, prepared))
        say(f"{at} its validation text:")
        result = evaluate_sources(trained.config, prepared, None, measure)
    else:
        data: Tokens
        if is_prepared(source):
            data = open_prepared(Path(source), tokenizer).validation
            say(f"{at} the validation of {source}:")
        else:
            data = _Text(source, trained.config.data.text_field, tokenizer, say)
            say(f"{at} {source}:")
        end = document_end(trained.config, tokenizer)
        batches = batches_to_evaluate(trained.config, data, document_end=end)
        result = measure(batches, token_bytes=torch.from_numpy(tokenizer.token_bytes))
    perplexity = math.exp(min(result.loss, 700.0))
    tokens = count(result.num_tokens, "token")
    say(f"  loss {result.loss:.4f} nats a token, perplexity {perplexity:.3f} ({tokens})")
    if result.bits_per_byte is not None:
        say(f"  {result.bits_per_byte:.4f} bits per byte")
    for name, loss in result.by_source.items():
        say(f"  {name}: loss {loss:.4f}")
    return result
