"""A forensic bundle: the state before a step, and that step's batch, to see it happen again."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep.batch import Batch
from truestep.checkpoint.commit import (
    FORMAT,
    VERSION,
    damage_named,
    holds_files,
    read_checkpoint_manifest,
)
from truestep.checkpoint.lock import CheckpointError
from truestep.checkpoint.snapshot import BATCH_FILE, Resumable, take_snapshot
from truestep.checkpoint.state import load_checkpoint
from truestep.checkpoint.tensors import read_safetensors
from truestep.manifest import DirectoryWriter
from truestep.storage import LOCAL, Storage

_INPUT = "inputs/"


def save_bundle(
    trainer: Resumable,
    batch: Batch,
    directory: str | Path,
    *,
    facts: Mapping[str, Any] = {},
    storage: Storage = LOCAL,
) -> Path:
    """Save the state of a run with the batch of its next step, and return the bundle's path.

    It is a directory `step-N-before` below `directory`, N being that next step; a number is added
    where there is another one. The same bytes are not written twice. Errors: as `save_checkpoint`.
    """
    inputs = {_INPUT + name: value for name, value in batch.inputs.items()}
    tensors = {"tokens": batch.tokens, "targets": batch.targets, **inputs}
    snapshot = take_snapshot(trainer, facts, extra={BATCH_FILE: tensors})
    name = f"step-{trainer.step + 1}-before"
    number, target = 1, Path(directory) / name
    while os.path.lexists(target):
        if holds_files(target, snapshot.files()):
            return target
        number += 1
        target = target.with_name(f"{name}-{number}")
    with DirectoryWriter(target, storage) as writer:
        for file, chunks in snapshot.files().items():
            writer.write(file, chunks)
        manifest = {"format": FORMAT, "version": VERSION, "step": snapshot.step}
        writer.commit({**snapshot.content, **manifest})
    return target


def load_bundle(path: str | Path, trainer: Resumable) -> tuple[Batch, dict[str, Any]]:
    """Bring a trainer to the state in a bundle; return the batch to give it, and the facts.

    Errors: as `load_checkpoint`.
    """
    batch = read_batch(Path(path))
    return batch, load_checkpoint(path, trainer)


def is_bundle(path: Path) -> bool:
    """Return whether this directory is a bundle, sound or not."""
    return (path / BATCH_FILE).exists()


def read_batch(path: Path) -> Batch:
    """Return the batch of a bundle. Errors: as `load_checkpoint`."""
    _, files = read_checkpoint_manifest(path)
    if BATCH_FILE not in files:
        raise CheckpointError(f"{path} holds no {BATCH_FILE}: it is a checkpoint, not a bundle")
    with damage_named():
        tensors = read_safetensors(path / BATCH_FILE, files[BATCH_FILE])
    inputs = {
        name.removeprefix(_INPUT): tensor
        for name, tensor in tensors.items()
        if name.startswith(_INPUT)
    }
    try:
        return Batch(tensors["tokens"], tensors["targets"], inputs)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / BATCH_FILE} holds no batch: {error}") from None
