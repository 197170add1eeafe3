"""What a checkpoint holds: parameters with persistent buffers, optimizer state, step.

Everything else of a run is a pure function of config, data and step, so hyperparameters are not
here: learning rates come from the config and the step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from truestep.checkpoint.commit import Validation
from truestep.checkpoint.lock import CheckpointError
from truestep.checkpoint.tensors import describe, safetensors_chunks, unstorable

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
BATCH_FILE = "batch.safetensors"


class Resumable(Protocol):
    """What can be saved and loaded: a trainer, or anything shaped like one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int


class OptimizerContent(BaseModel):
    """What the manifest says of the optimizer, beside its file of "<parameter>/<key>" tensors."""

    model_config = ConfigDict(strict=True)

    kind: str
    numbers: list[str]
    """State that was a Python number: stored as a float64, int64 or bool tensor without shape."""
    on_cpu: list[str]
    """State that was on the CPU although its parameter was not."""


class Content(BaseModel):
    """What the manifest says beside format, version and files."""

    model_config = ConfigDict(strict=True)

    step: int
    tied: dict[str, str]
    """Every name of a tensor but its first -> the first, under which it is stored."""
    optimizer: OptimizerContent
    validation: dict[str, Any] | None = None
    """The loss at this step and over how many tokens, if it was measured: it ranks checkpoints."""
    facts: dict[str, Any]


class ModelState(NamedTuple):
    """A model's parameters and persistent buffers."""

    tensors: dict[str, Tensor]  # the live ones, under the first of their names
    tied: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one step: the tensors of each file, and what the manifest says."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    content: Mapping[str, Any]

    def staged(self) -> "Snapshot":
        """Return a copy in the host's own memory, which further steps do not change."""
        tensors = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in entries.items()}
            for file, entries in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def files(self) -> dict[str, Iterator[Any]]:
        """Return the bytes of each file, in chunks."""
        return {file: safetensors_chunks(tensors) for file, tensors in self.tensors.items()}


def take_snapshot(
    trainer: Resumable,
    facts: Mapping[str, Any],
    validation: Validation | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] = {},
) -> Snapshot:
    """Return the live state of a run, not yet copied, with the tensors of further files.

    Errors: CheckpointError for state that cannot be saved without pickle.
    """
    model = model_state(trainer.model)
    optimizer_tensors, optimizer = _optimizer_state(trainer.optimizer, model)
    content = {
        "torch": str(torch.__version__),
        "tied": model.tied,
        "optimizer": optimizer.model_dump(),
        "validation": validation and validation._asdict(),
        "facts": dict(facts),
    }
    tensors = {MODEL_FILE: model.tensors, OPTIMIZER_FILE: optimizer_tensors, **extra}
    return Snapshot(trainer.step, tensors, content)


def model_state(model: nn.Module) -> ModelState:
    """Return the live parameters and persistent buffers under their plain names."""
    wrapped = _wrapped_names(model)
    state = ModelState({}, {})
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


def optimized_parameters(
    optimizer: torch.optim.Optimizer, model: ModelState
) -> Iterator[tuple[str | None, nn.Parameter, dict[str, Any]]]:
    """Yield each parameter's name (None: the model does not have it), itself and its group."""
    names = {id(tensor): name for name, tensor in model.tensors.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names.get(id(parameter)), parameter, group


def _optimizer_state(
    optimizer: torch.optim.Optimizer, model: ModelState
) -> tuple[dict[str, Tensor], OptimizerContent]:
    """Return the live state tensors by "<parameter>/<key>", and what the manifest says of them."""
    tensors: dict[str, Tensor] = {}
    content = OptimizerContent(kind=type(optimizer).__name__, numbers=[], on_cpu=[])
    for name, parameter, _ in optimized_parameters(optimizer, model):
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
