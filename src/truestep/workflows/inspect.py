"""Show what a run was trained on at one step, token by token, with what each cost."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from truestep.data.corpus import Say
from truestep.data.mixture import Row
from truestep.data.tokens import TokenSplit
from truestep.observe.inspection import InspectedDocument, InspectedWindow, Inspection
from truestep.workflows.build import Training
from truestep.workflows.replay import logged_steps, require_logged, run_to, training_at
from truestep.workflows.run import RunError


def inspect_step(directory: Path, step: int, say: Say) -> Inspection:
    """Recompute a run up to a step and return its batch with the loss of every token.

    The losses are those of training: before the update, with its dropout; but uncompiled.
    Errors: RunError for a step that the run has not made, and as for `replay`.
    """
    record = require_logged(logged_steps(directory), directory, step)
    training = training_at(directory, step - 1, say)
    batch = training.loader.batch_at(step - 1)
    if batch.hash() != record.get("batch_hash"):
        raise RunError(
            f"the batch of step {step} is not the one that {directory} logged: settings or text "
            "have changed since; restore them"
        )
    run_to(training, step - 1, say)
    losses = training.trainer.token_losses(batch)
    windows = tuple(
        _inspected(training, number, row, losses[number].double().cpu().numpy())
        for number, row in enumerate(training.loader.rows_at(step - 1))
    )
    return Inspection(
        run=str(directory),
        step=step,
        loss=float(losses.sum(dtype=torch.float64) / batch.num_targets),
        logged_loss=_number(record, "loss"),
        learning_rate=_number(record, "learning_rate"),
        grad_norm=_number(record, "grad_norm"),
        windows=windows,
    )


def _inspected(
    training: Training, number: int, row: Row, losses: Float[np.ndarray, "T"]
) -> InspectedWindow:
    split, tokenizer = training.data.train[row.source], training.data.tokenizer
    start = row.window * training.loader.context_length
    ids = split.read(start, min(start + len(losses) + 1, len(split)))  # the last one is short
    ends = np.flatnonzero(ids == tokenizer.end_of_document).tolist()
    return InspectedWindow(
        row=number,
        window=row.window,
        documents=_documents(split, start, [0, *(end + 1 for end in ends if end + 1 < len(ids))]),
        pieces=tuple(tokenizer.pieces(ids)),
        losses=losses[: len(ids) - 1],
        is_target=np.ones(len(ids) - 1, dtype=bool),
        ends=frozenset(ends),
        source=row.source if len(training.data.prepared) > 1 else None,
    )


def _documents(split: TokenSplit, start: int, offsets: list[int]) -> tuple[InspectedDocument, ...]:
    """Return the document that runs at each offset of a window, where a new one begins or not."""
    found = []
    for offset in offsets:
        name, begin = split.document_at(start + offset)
        found.append(InspectedDocument(name, offset, start + offset - begin))
    return tuple(found)


def _number(record: dict[str, Any], name: str) -> float | None:
    return None if record.get(name) is None else float(record[name])
