"""Save the state of a run, and bring a run to a saved state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from truestep.checkpoint.commit import (
    DamagedCheckpointError,
    commit_checkpoint,
    damage_named,
    read_checkpoint_manifest,
)
from truestep.checkpoint.lock import CheckpointError, unwritable_named
from truestep.checkpoint.snapshot import (
    BATCH_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Content,
    ModelState,
    OptimizerContent,
    Resumable,
    model_state,
    optimized_parameters,
    take_snapshot,
)
from truestep.checkpoint.tensors import describe, read_safetensors
from truestep.manifest import MANIFEST
from truestep.storage import LOCAL, FileRecord, Storage


def save_checkpoint(
    trainer: Resumable,
    directory: str | Path,
    *,
    facts: Mapping[str, Any] = {},
    keep: int = 2,
    storage: Storage = LOCAL,
) -> Path:
    """Save the state of a run as `directory/step-N` and return that path.

    `facts` is JSON that `load_checkpoint` returns, such as the resolved config and the data's
    fingerprint. At least `keep` (2 or more) checkpoints stay; older ones are removed afterwards.
    What has been saved already is left as it is.

    Errors: CheckpointError for state that cannot be saved without pickle, if another state of this
    step or another process is here, or if nothing can be written here; OSError when the disk fails.
    Older checkpoints are untouched.
    """
    snapshot = take_snapshot(trainer, facts)
    with unwritable_named(Path(directory)):
        return commit_checkpoint(
            Path(directory),
            snapshot.step,
            snapshot.files(),
            snapshot.content,
            keep=keep,
            storage=storage,
        )


def load_checkpoint(path: str | Path, trainer: Resumable) -> dict[str, Any]:
    """Bring a trainer to the state in a `step-N` directory and return the facts saved with it.

    Everything is verified first: after an error nothing has changed. Parameters and buffers are
    filled in place; of the optimizer only the state is set, never a hyperparameter. Memory: the
    saved state once more, and its largest file twice.

    Errors: DamagedCheckpointError for a file that is not what it was; CheckpointError naming the
    tensor, what was expected and what was found, if the checkpoint is of another model.
    """
    path = Path(path)
    content, files = _read_content(path)
    with damage_named():
        tensors = read_safetensors(path / MODEL_FILE, files[MODEL_FILE])
        state_tensors = read_safetensors(path / OPTIMIZER_FILE, files[OPTIMIZER_FILE])
    model = model_state(trainer.model)
    _require_same(path / MODEL_FILE, expected=model, found=ModelState(tensors, content.tied))
    states = _planned_states(path, content.optimizer, trainer.optimizer, model, state_tensors)
    # Nothing below can fail for what the checkpoint holds.
    _fill(model, tensors)
    for parameter, state in states.items():
        if state:
            live_state = trainer.optimizer.state[parameter]  # the same dict: another may share it
            live_state.clear()
            live_state.update(state)
        else:
            trainer.optimizer.state.pop(parameter, None)
    trainer.step = content.step
    return content.facts


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Fill a model from a `step-N` directory, to use it as it is, and return the saved facts.

    Errors: as for `load_checkpoint`; after one nothing has changed.
    """
    content, files = _read_content(path)
    with damage_named():
        tensors = read_safetensors(path / MODEL_FILE, files[MODEL_FILE])
    live = model_state(model)
    _require_same(path / MODEL_FILE, expected=live, found=ModelState(tensors, content.tied))
    _fill(live, tensors)
    return content.facts


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts saved with a checkpoint; its tensors are not read. Errors: as above."""
    return _read_content(path)[0].facts


def _read_content(path: Path) -> tuple[Content, dict[str, FileRecord]]:
    manifest, files = read_checkpoint_manifest(path)
    content = _checked_content(path, manifest)
    if files.keys() - {BATCH_FILE} != {MODEL_FILE, OPTIMIZER_FILE}:
        raise CheckpointError(
            f"{path / MANIFEST}: expected the files {MODEL_FILE} and {OPTIMIZER_FILE}, "
            f"found {sorted(files)}"
        )
    return content, files


def _fill(model: ModelState, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, live in model.tensors.items():
            live.copy_(tensors[name])


def _checked_content(path: Path, manifest: dict[str, Any]) -> Content:
    try:
        return Content.model_validate(manifest)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise DamagedCheckpointError(
            f"{path / MANIFEST}: {field!r}: {detail['msg'].lower()}"
        ) from None


def _require_same(path: Path, *, expected: ModelState, found: ModelState) -> None:
    """Compare names, shapes, dtypes and ties."""
    wanted, given = (
        {name: describe(tensor) for name, tensor in state.tensors.items()}
        | {name: f"tied to {first!r}" for name, first in state.tied.items()}
        for state in (expected, found)
    )
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected {wanted.get(name, 'none')}, found "
                f"{given.get(name, 'none')}; build the model with the settings it was saved with"
            )


def _planned_states(
    path: Path,
    content: OptimizerContent,
    optimizer: torch.optim.Optimizer,
    model: ModelState,
    tensors: dict[str, Tensor],
) -> dict[nn.Parameter, dict[str, Any]]:
    """Return the new state of every parameter, on its device; `tensors` is used up on the way."""
    if content.kind != type(optimizer).__name__:
        raise CheckpointError(
            f"{path / MANIFEST}: optimizer: expected {type(optimizer).__name__}, "
            f"found {content.kind!r}; use the optimizer it was saved with"
        )
    states: dict[nn.Parameter, dict[str, Any]] = {}
    owners: dict[str, tuple[nn.Parameter, dict[str, Any]]] = {}
    for name, parameter, group in optimized_parameters(optimizer, model):
        states[parameter] = {}
        if name is not None:
            owners[name] = (parameter, group)
    numbers, on_cpu = set(content.numbers), set(content.on_cpu)
    for entry in sorted(tensors):
        tensor = tensors.pop(entry)
        name, _, key = entry.rpartition("/")
        if name not in owners:
            raise CheckpointError(
                f"{path / OPTIMIZER_FILE}: state {entry!r}: expected none, found "
                f"{describe(tensor)}; give the optimizer the parameters it was saved with"
            )
        parameter, group = owners[name]
        if entry in numbers:
            states[parameter][key] = _number(path, entry, tensor)
            continue
        device = torch.device("cpu") if entry in on_cpu else parameter.device
        if key == "step" and ("fused" in group or "capturable" in group):
            # Where torch's own optimizers want it, whatever device it was saved from.
            on_device = group.get("fused") or group.get("capturable")
            device = parameter.device if on_device else torch.device("cpu")
        states[parameter][key] = _placed(tensor, parameter, device)
    return states


def _number(path: Path, entry: str, tensor: Tensor) -> float:
    if tensor.dim() != 0 or tensor.dtype not in {torch.float64, torch.int64, torch.bool}:
        raise DamagedCheckpointError(
            f"{path / OPTIMIZER_FILE}: state {entry!r}: expected a number, found {describe(tensor)}"
        )
    return tensor.item()


def _placed(tensor: Tensor, parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Copy state to a device, laid out in memory as its parameter is.

    A fused kernel walks parameter, gradient and moments side by side: other strides, other values.
    """
    if tensor.shape == parameter.shape:
        new = torch.empty_like(parameter.detach(), dtype=tensor.dtype, device=device)
    else:
        new = torch.empty_like(tensor, device=device)
    return new.copy_(tensor)
