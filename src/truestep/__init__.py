"""Train next-token-prediction language models, with a training step you can trust."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from truestep.batch import Batch
    from truestep.checkpoint.bundle import load_bundle, save_bundle
    from truestep.checkpoint.lock import CheckpointError
    from truestep.checkpoint.state import load_checkpoint, save_checkpoint
    from truestep.checkpoint.writer import CheckpointWriter
    from truestep.config import GPTConfig, RunConfig, TrainingConfig
    from truestep.loss import IGNORE_INDEX, DeferredLogits, compute_loss
    from truestep.metrics import StepMetrics
    from truestep.model.generate import generate
    from truestep.model.gpt import GPT
    from truestep.observe.sinks import ConsoleSink, JsonlSink, Sink
    from truestep.settings import ConfigError
    from truestep.training.companion import every
    from truestep.training.diagnosis import NonFiniteError
    from truestep.training.estimate import Estimate, estimate
    from truestep.training.evaluate import Evaluation, evaluate
    from truestep.training.schedule import constant, warmup_cosine, warmup_stable_decay
    from truestep.training.trainer import Trainer

__all__ = [
    "GPT",
    "IGNORE_INDEX",
    "Batch",
    "CheckpointError",
    "CheckpointWriter",
    "ConfigError",
    "ConsoleSink",
    "DeferredLogits",
    "Estimate",
    "Evaluation",
    "GPTConfig",
    "JsonlSink",
    "NonFiniteError",
    "RunConfig",
    "Sink",
    "StepMetrics",
    "Trainer",
    "TrainingConfig",
    "compute_loss",
    "constant",
    "estimate",
    "evaluate",
    "every",
    "generate",
    "load_bundle",
    "load_checkpoint",
    "save_bundle",
    "save_checkpoint",
    "warmup_cosine",
    "warmup_stable_decay",
]

_MODULES = {
    "IGNORE_INDEX": "loss",
    "Batch": "batch",
    "CheckpointError": "checkpoint.lock",
    "CheckpointWriter": "checkpoint.writer",
    "ConfigError": "settings",
    "ConsoleSink": "observe.sinks",
    "DeferredLogits": "loss",
    "Estimate": "training.estimate",
    "Evaluation": "training.evaluate",
    "GPT": "model.gpt",
    "GPTConfig": "config",
    "JsonlSink": "observe.sinks",
    "NonFiniteError": "training.diagnosis",
    "RunConfig": "config",
    "Sink": "observe.sinks",
    "StepMetrics": "metrics",
    "Trainer": "training.trainer",
    "TrainingConfig": "config",
    "compute_loss": "loss",
    "constant": "training.schedule",
    "estimate": "training.estimate",
    "evaluate": "training.evaluate",
    "every": "training.companion",
    "generate": "model.generate",
    "load_bundle": "checkpoint.bundle",
    "load_checkpoint": "checkpoint.state",
    "save_bundle": "checkpoint.bundle",
    "save_checkpoint": "checkpoint.state",
    "warmup_cosine": "training.schedule",
    "warmup_stable_decay": "training.schedule",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562), so that `--help` never imports torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'truestep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"truestep.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
