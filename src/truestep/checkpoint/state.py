"""What a checkpoint holds: parameters with persistent buffers, optimizer state, step.

Everything else of a run is a pure function of config, data and step, so hyperparameters are not
here: learning rates come from the config and the step.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from truestep.checkpoint.commit import (
    CheckpointError,
    DamagedCheckpointError,
    commit_checkpoint,
    damage_named,
    read_checkpoint_manifest,
)
from truestep.checkpoint.tensors import describe, read_safetensors, safetensors_chunks, unstorable
from truestep.storage import LOCAL, MANIFEST, FileRecord, Storage

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


class Resumable(Protocol):
    """What can be saved and loaded: a trainer, or anything shaped like one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int


class _OptimizerContent(BaseModel):
    """What the manifest says of the optimizer, beside its file of "<parameter>/<key>" tensors."""

    model_config = ConfigDict(strict=True)

    kind: str
    numbers: list[str]
    """State that was a Python number: stored as a float64, int64 or bool tensor without shape."""
    on_cpu: list[str]
    """State that was on the CPU although its parameter was not."""


class _Content(BaseModel):
    """What the manifest says beside format, version and files."""

    model_config = ConfigDict(strict=True)

    step: int
    tied: dict[str, str]
    """Every name of a tensor but its first -> the first, under which it is stored."""
    optimizer: _OptimizerContent
    facts: dict[str, Any]


class _ModelState(NamedTuple):
    tensors: dict[str, Tensor]  # the live ones, under the first of their names
    tied: dict[str, str]


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
    step or another process is here; OSError when the disk fails. Older checkpoints are untouched.
    """
    model = _model_state(trainer.model)
    tensors, content = _optimizer_state(trainer.optimizer, model)
    manifest = {
        "torch": str(torch.__version__),
        "tied": model.tied,
        "optimizer": content.model_dump(),
        "facts": dict(facts),
    }
    files = {
        MODEL_FILE: safetensors_chunks(model.tensors),
        OPTIMIZER_FILE: safetensors_chunks(tensors),
    }
    directory = Path(directory)
    return commit_checkpoint(directory, trainer.step, files, manifest, keep=keep, storage=storage)


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
    model = _model_state(trainer.model)
    _require_same(path / MODEL_FILE, expected=model, found=_ModelState(tensors, content.tied))
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
    live = _model_state(model)
    _require_same(path / MODEL_FILE, expected=live, found=_ModelState(tensors, content.tied))
    _fill(live, tensors)
    return content.facts


def _read_content(path: Path) -> tuple[_Content, dict[str, FileRecord]]:
    manifest, files = read_checkpoint_manifest(path)
    content = _checked_content(path, manifest)
    if files.keys() != {MODEL_FILE, OPTIMIZER_FILE}:
        raise CheckpointError(
            f"{path / MANIFEST}: expected the files {MODEL_FILE} and {OPTIMIZER_FILE}, "
            f"found {sorted(files)}"
        )
    return content, files


def _fill(model: _ModelState, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, live in model.tensors.items():
            live.copy_(tensors[name])


def _model_state(model: nn.Module) -> _ModelState:
    """Return the live parameters and persistent buffers under their plain names."""
    wrapped = _wrapped_names(model)
    state = _ModelState({}, {})
    first_names: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        parts = key.split(".")
        prefixes = (".".join(parts[: end + 1]) for end in range(len(parts)))
        name = ".".join(
            part
            for part, prefix in zip(parts, prefixes, strict=True)
            if part != "_orig_mod" and prefix not in wrapped  # torch.compile's, DDP's
        )
        reason = "it is extra state" if parts[-1] == "_extra_state" else unstorable(tensor)
        if name in state.tensors or name in state.tied:
            reason = "another tensor has this name"
        if reason:
            raise CheckpointError(f"tensor {name!r} of the model cannot be saved: {reason}")
        first = first_names.setdefault(id(tensor), name)
        if first == name:
            state.tensors[name] = tensor
        else:
            state.tied[name] = first
    return state


def _wrapped_names(model: nn.Module) -> set[str]:
    """Return the names of modules that are a parallel wrapper's `module`, not the model's own."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return {
        f"{name}.module".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, wrappers)
    }


def _optimized_parameters(
    optimizer: torch.optim.Optimizer, model: _ModelState
) -> Iterator[tuple[str | None, nn.Parameter, dict[str, Any]]]:
    """Yield each parameter's name (None: the model does not have it), itself and its group."""
    names = {id(tensor): name for name, tensor in model.tensors.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names.get(id(parameter)), parameter, group


def _optimizer_state(
    optimizer: torch.optim.Optimizer, model: _ModelState
) -> tuple[dict[str, Tensor], _OptimizerContent]:
    """Return the live state tensors by "<parameter>/<key>", and what the manifest says of them."""
    tensors: dict[str, Tensor] = {}
    content = _OptimizerContent(kind=type(optimizer).__name__, numbers=[], on_cpu=[])
    for name, parameter, _ in _optimized_parameters(optimizer, model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if name is None:
                raise CheckpointError(
                    f"the optimizer updates a parameter {describe(parameter)} that the model does "
                    "not have; build it from the model's parameters"
                )
            entry = f"{name}/{key}"
            if type(value) in {bool, int, float}:
                dtype = torch.float64 if isinstance(value, float) else None
                tensors[entry] = torch.tensor(value, dtype=dtype)
                content.numbers.append(entry)
                continue
            reason = unstorable(value)
            if not isinstance(key, str) or "/" in key:
                reason = "its key is not a plain string"
            if reason:
                raise CheckpointError(f"optimizer state {entry!r} cannot be saved: {reason}")
            tensors[entry] = value
            if value.device.type == "cpu" and parameter.device.type != "cpu":
                content.on_cpu.append(entry)
    return tensors, content


def _checked_content(path: Path, manifest: dict[str, Any]) -> _Content:
    try:
        return _Content.model_validate(manifest)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise DamagedCheckpointError(
            f"{path / MANIFEST}: {field!r}: {detail['msg'].lower()}"
        ) from None


def _require_same(path: Path, *, expected: _ModelState, found: _ModelState) -> None:
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
    content: _OptimizerContent,
    optimizer: torch.optim.Optimizer,
    model: _ModelState,
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
    for name, parameter, group in _optimized_parameters(optimizer, model):
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
