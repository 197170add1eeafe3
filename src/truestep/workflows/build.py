"""From the settings of a run to what it trains with: data, batches, model, trainer."""

import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import truestep
from truestep import runtime
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.data.loader import WindowLoader
from truestep.data.prepare import prepare_once
from truestep.data.tokenizer import load_tokenizer
from truestep.data.tokens import PreparedData, open_prepared
from truestep.model.gpt import GPT
from truestep.training.trainer import Trainer
from truestep.workflows.run import RunError


@dataclass(frozen=True)
class Training:
    """Everything a run trains with; `config` has every auto in plain values."""

    config: RunConfig
    data: PreparedData
    loader: WindowLoader
    model: GPT
    trainer: Trainer
    facts: dict[str, Any]
    """What the run's `manifest.json` says."""

    def saved_facts(self) -> dict[str, Any]:
        """Return what goes into a checkpoint beside the state."""
        return {**self.facts, "config": self.config.model_dump(mode="json")}

    def named(self, name: str) -> "Training":
        """Return the same with the name of the run in its settings."""
        run = self.config.run.model_copy(update={"name": name})
        return replace(self, config=self.config.model_copy(update={"run": run}))


def build(config: RunConfig, runs: Path, say: Say) -> Training:
    """Set this process up and return what a run with these settings trains with, at step 0.

    Its data is prepared once below `runs`, the directory of all runs.
    Errors: ValueError or OSError of one line, for settings or a source that do not serve.
    """
    threads = runtime.configure_process(config.run.threads)
    data = open_data(config, runs, say)
    loader = WindowLoader(
        data.train,
        context_length=config.model.context_length,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
    )
    first = loader.batch_at(0)
    model, trainer = build_trainer(config)
    trainer.prepare(first)
    training = {"micro_batch_size": trainer.micro_batch_size(first)}
    device = str(trainer.device)
    config = config.model_copy(
        update={
            "training": trainer.config.model_copy(update=training),
            "model": model.config,
            "data": config.data.model_copy(update=_absolute_paths(config)),
            "run": config.run.model_copy(update={"device": device, "threads": threads}),
        }
    )
    return Training(config, data, loader, model, trainer, _facts(config, trainer, data))


def build_trainer(config: RunConfig) -> tuple[GPT, Trainer]:
    """Return the model, its initial weights a function of the seed alone, and its trainer.

    Errors: ValueError for settings that do not go together, or a device that is not there.
    """
    device = runtime.resolve_device(config.run.device)
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size
    if vocab_size == "auto":
        vocab_size = tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise RunError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"tokenizer {tokenizer.name!r}; leave it at auto"
        )
    with runtime.seeded(torch.device("cpu"), config.training.seed, "initial weights"):
        model = GPT(config.model.model_copy(update={"vocab_size": vocab_size}))
    return model, Trainer(model, config.training, device=device, sinks=())


def open_data(config: RunConfig, runs: Path, say: Say) -> PreparedData:
    """Return a run's data, prepared once below the directory of runs.

    Errors: CorpusError or StorageError for a source that does not serve.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    directory = prepare_once(
        config.data.source,
        runs / ".data",
        tokenizer=tokenizer,
        validation=config.data.validation,
        say=say,
    )
    return open_prepared(directory, tokenizer)


def require_same_text(saved: str, fingerprint: str, source: str) -> None:
    """Refuse other text than a run began with.

    Errors: RunError naming the source and both fingerprints.
    """
    if saved != fingerprint:
        raise RunError(
            f"data.source={source} is not the text this run began with, or a file has another name "
            f"(fingerprint {saved[:12]}, now {fingerprint[:12]}); restore it, "
            "or start a new run"
        )


def _absolute_paths(config: RunConfig) -> dict[str, str]:
    """Return the paths of the data as a resumed run finds them from any directory."""
    paths = {"source": config.data.source, "validation": config.data.validation}
    return {name: str(Path(path).resolve()) for name, path in paths.items() if Path(path).exists()}


def _facts(config: RunConfig, trainer: Trainer, data: PreparedData) -> dict[str, Any]:
    """Return what `manifest.json` and every checkpoint say beside the settings."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "truestep": truestep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {runtime.processor_name()}",
        "device": str(trainer.device),
        "precision": trainer.precision,
        "data_source": config.data.source,
        "data_fingerprint": data.fingerprint,
        "train_tokens": len(data.train),
        "validation_tokens": len(data.validation),
        "num_parameters": parameters,
        "flops_per_token": trainer.facts.flops_per_token if trainer.facts else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def say_what_changed(saved: dict[str, Any], now: dict[str, Any], say: Say) -> None:
    """Say where the same bits are not promised any more."""
    for name in ("torch", "machine"):
        if saved[name] != now[name]:
            say(f"{name} was {saved[name]} and is {now[name]}: the same bits are not promised")
