"""From the settings of a run to what it trains with: data, batches, model, trainer."""

import contextlib
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import truestep
from truestep import compiler, runtime
from truestep.batch import Batch
from truestep.config import GPTConfig, RunConfig
from truestep.data.corpus import Say
from truestep.data.mixture import MixtureLoader
from truestep.data.tokenizer import Tokenizer
from truestep.distributed import process
from truestep.gpus import GPU
from truestep.machine import free_bytes, processor_name
from truestep.model.gpt import GPT
from truestep.observe.text import format_bytes
from truestep.storage import explain
from truestep.training.footprint import StateBytes, copy_bytes
from truestep.training.micro_batch import micro_batch_that_fits
from truestep.training.trainer import Trainer
from truestep.workflows.resources import run_flops
from truestep.workflows.run import RunError, read_run_config, read_run_facts, read_tokenizer
from truestep.workflows.sources import (
    Sources,
    absolute_paths,
    data_facts,
    document_end,
    open_data,
)


@dataclass(frozen=True)
class Training:
    """Everything a run trains with; `config` has every auto in plain values."""

    config: RunConfig
    data: Sources
    loader: MixtureLoader
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


def build(
    config: RunConfig,
    runs: Path,
    say: Say,
    existing: Path | None = None,
    *,
    trains: bool = True,
    gpu: GPU | None = None,
) -> Training:
    """Set this process up and return what a run with these settings trains with, at step 0.

    Its data is prepared once below `runs`, the directory of all runs; with the tokenizer of the
    `existing` run, if it goes on. Only what `trains` further is looked at for memory; of a `gpu`
    that is not here, whether the model alone fits. Of several processes the first one does what
    the others then find done.
    Errors: ValueError or OSError of one line, for settings or a source that do not serve.
    """
    place = process.current()
    _require_room_for_a_batch(config)
    threads = runtime.configure_process(config.run.threads)
    device = runtime.resolve_device(config.run.device)
    compilation = compiler.worth_compiling(
        config.training.compile, device, run_flops(config), has_layers=True
    )
    will_compile = device.type == "cpu" and compilation != "off"
    with compiler.headers_ahead() if will_compile else contextlib.nullcontext():
        own = _own_tokenizer(existing, say) if existing else None
        data = place.first_of_all("data", lambda: open_data(config, runs, say, own))
    config = config.model_copy(
        update={
            "model": _with_vocabulary(config.model, data.tokenizer),
            "data": config.data.model_copy(
                update={"tokenizer": data.tokenizer.name, "weights": data.weights}
            ),
        }
    )
    if trains and place.rank == 0:
        _require_room_for_the_model(config, device, free_bytes(device))
    elif gpu is not None:
        _require_room_for_the_model(config, torch.device("cuda"), gpu.memory_bytes)
    loader = MixtureLoader(
        data.train,
        data.weights,
        context_length=config.model.context_length,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
        document_end=document_end(config, data.tokenizer),
    )
    first = loader.batch_at(0, part=place.rank, parts=place.size)
    model, trainer = build_trainer(config)
    trainer.prepare(first)
    if trains:
        size = int(place.from_first("micro-batch", lambda: str(_rows_that_fit(trainer, first))))
        trainer.config = trainer.config.model_copy(update={"micro_batch_size": size})
    config = _resolved(config, trainer, model, threads)
    return Training(config, data, loader, model, trainer, _facts(config, trainer, data))


def _resolved(config: RunConfig, trainer: Trainer, model: GPT, threads: int) -> RunConfig:
    """Return the settings with what they came to: every auto in plain values, paths absolute."""
    device = trainer.device
    name = str(device) if trainer.processes.local_size == 1 else device.type  # each has its own
    return config.model_copy(
        update={
            "training": trainer.config,
            "model": model.config,
            "data": config.data.model_copy(update=absolute_paths(config)),
            "run": config.run.model_copy(update={"device": name, "threads": threads}),
        }
    )


def _rows_that_fit(trainer: Trainer, batch: Batch) -> int:
    """Return the micro-batch of a trainer's settings, as long as it fits into memory."""
    asked, lane = trainer.config.micro_batch_size, trainer.reduction.lane(batch)
    size = micro_batch_that_fits(trainer.model, trainer.optimizer, lane, trainer.precision, asked)
    return trainer.reduction.at_most(size, len(lane.tokens)) if asked == "auto" else size


def _require_room_for_a_batch(config: RunConfig) -> None:
    """Refuse a batch whose numbers alone are more than what is free. Errors: RunError."""
    rows, free = config.data.batch_size, free_bytes(torch.device("cpu"))
    each = 2 * 8 * config.model.context_length  # tokens and targets
    if free is not None and rows * each > free:
        raise RunError(
            f"data.batch_size={rows}: tokens and targets of such a batch take "
            f"{format_bytes(rows * each)}, and {format_bytes(free)} are free; use at most "
            f"{free // each}"
        )


def _require_room_for_the_model(config: RunConfig, device: torch.device, free: int | None) -> None:
    """Refuse a model whose training does not fit even without a batch. Errors: RunError."""
    if free is None:
        return
    with torch.device("meta"):
        model = GPT(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    moments = 1 if config.training.optimizer == "muon" else 2  # at least: Muon's of matrices
    state = StateBytes(4 * parameters, 4 * parameters, 4 * moments * parameters)
    copy = copy_bytes(state, device)
    needed = sum(state) + copy
    if needed > free:
        saved = ", and the copy that is saved," if copy else ""
        raise RunError(
            f"a model of {parameters:,} parameters does not fit: its weights, gradients "
            f"and moments{saved} take at least {format_bytes(needed)}, and {format_bytes(free)} "
            "are free; use a smaller model.width or fewer model.num_layers"
        )


def build_trainer(config: RunConfig) -> tuple[GPT, Trainer]:
    """Return the model, its initial weights a function of the seed alone, and its trainer.

    Errors: ValueError for settings that do not go together, or a device that is not there.
    """
    device = runtime.resolve_device(config.run.device)
    with runtime.seeded(torch.device("cpu"), config.training.seed, "initial weights"):
        model = GPT(config.model)
    return model, Trainer(model, config.training, device=device, sinks=())


def _with_vocabulary(shape: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """Return the shape with room for every id. Errors: RunError if it was told to have less."""
    if shape.vocab_size == "auto":
        return shape.model_copy(update={"vocab_size": tokenizer.vocab_size})
    if shape.vocab_size < tokenizer.vocab_size:
        raise RunError(
            f"model.vocab_size={shape.vocab_size} is smaller than the {tokenizer.vocab_size} ids "
            f"of tokenizer {tokenizer.name!r}; leave it at auto"
        )
    return shape


def _own_tokenizer(existing: Path, say: Say) -> Tokenizer | None:
    """Return a run's own tokenizer; none where it is missing or damaged, which is said."""
    try:
        return read_tokenizer(existing, read_run_config(existing), read_run_facts(existing))
    except (ValueError, OSError) as error:
        say(f"going on without the run's own tokenizer: {explain(error)}")
        return None


def _facts(config: RunConfig, trainer: Trainer, data: Sources) -> dict[str, Any]:
    """Return what `manifest.json` and every checkpoint say beside the settings."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "truestep": truestep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {processor_name()}",
        "device": config.run.device,
        "processes": trainer.processes.size,
        "precision": trainer.precision,
        **data_facts(config, data),
        "train_tokens": data.train_tokens,
        "validation_tokens": data.validation_tokens,
        "num_parameters": parameters,
        "flops_per_token": trainer.facts.flops_per_token if trainer.facts else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def say_what_changed(saved: dict[str, Any], now: dict[str, Any], say: Say) -> None:
    """Say where the same bits are not promised any more."""
    for name in ("truestep", "torch", "machine"):
        if saved[name] != now[name]:
            say(f"{name} was {saved[name]} and is {now[name]}: the same bits are not promised")
