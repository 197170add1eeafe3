"""The model of a run, with the weights of one of its checkpoints, and what it writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truestep.checkpoint.commit import (
    DamagedCheckpointError,
    best_checkpoints,
    list_checkpoints,
)
from truestep.checkpoint.state import load_model
from truestep.config import RunConfig
from truestep.data.bpe import BytePairTokenizer
from truestep.data.corpus import Say
from truestep.data.tokenizer import Tokenizer
from truestep.model.generate import generate
from truestep.model.gpt import GPT
from truestep.runtime import resolve_device
from truestep.shell import command
from truestep.workflows.run import CHECKPOINTS, RunError, read_run_config, read_tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a run's newest good checkpoint."""

    directory: Path
    config: RunConfig
    model: GPT
    tokenizer: Tokenizer
    step: int
    facts: dict[str, Any]  # saved with the checkpoint


def load_trained(
    directory: Path, say: Say, device: str = "auto", checkpoint: str = "newest"
) -> TrainedModel:
    """Return the model of a run's newest checkpoint that verifies; nothing on disk changes.

    `checkpoint` may also be "best", by validation loss, or a step, which are taken alone.
    Errors: RunError for a run without a good checkpoint, or without the one that was asked for.
    """
    config = read_run_config(directory)
    model = GPT(config.model).to(resolve_device(device))
    for step, path in _candidates(directory, checkpoint):
        try:
            facts = load_model(path, model)
        except DamagedCheckpointError as error:
            say(f"{error}; trying the checkpoint before it")
            continue
        tokenizer = read_tokenizer(directory, config, facts)
        return TrainedModel(directory, config, model, tokenizer, step, facts)
    raise RunError(
        f"{directory} has no good checkpoint"
        + (
            ": every one is damaged"
            if list_checkpoints(directory / CHECKPOINTS)
            else f" yet; go on with: {command('train', '--resume', directory)}"
        )
    )


def _candidates(directory: Path, checkpoint: str) -> list[tuple[int, Path]]:
    """Return the checkpoints to try in turn, by step and path."""
    found = list_checkpoints(directory / CHECKPOINTS)
    if checkpoint == "newest" or not found:
        return found[::-1]
    best = best_checkpoints([path for _, path in found], 1)
    chosen = [
        (step, path)
        for step, path in found
        if str(step) == checkpoint or (checkpoint == "best" and path in best)
    ]
    if not chosen:
        steps = ", ".join(str(step) for step, _ in found)
        raise RunError(
            f"--checkpoint {checkpoint}: {directory} has none such; use newest, best (if it was "
            f"validated) or one of the steps {steps}"
        )
    return chosen


def write_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Return what the model writes after `prompt`, or as a document of its own.

    In float32: under bfloat16 each token would cast all weights anew, which takes twice as long.
    A space at the end of the prompt belongs to the token that comes: byte pairs keep it with its
    word, and after a space by itself a model has never seen one.
    """
    device = next(model.parameters()).device
    if not prompt.isascii() and prompt != prompt.encode("utf-8", "replace").decode():
        raise RunError("the prompt is not UTF-8 text; check the terminal's encoding")
    first_tokens, read = None, prompt
    if isinstance(tokenizer, BytePairTokenizer) and prompt.endswith(" "):
        first_tokens, read = tokenizer.starting_with(b" "), prompt[:-1]
    ids = tokenizer.encode(read) if read else [tokenizer.end_of_document]
    written = generate(
        model,
        torch.as_tensor(ids, dtype=torch.long, device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_token=tokenizer.end_of_document,
        first_tokens=first_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    text = tokenizer.decode(list(written))
    return text[1:] if first_tokens else text
