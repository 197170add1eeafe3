"""Train a model from settings: the data, model, trainer and companions of one run."""

import contextlib
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import truestep
from truestep import runtime
from truestep.batch import Batch
from truestep.checkpoint.commit import newest_checkpoint
from truestep.checkpoint.lock import RunLock
from truestep.checkpoint.state import load_checkpoint, save_checkpoint
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.data.loader import Prefetch, WindowLoader, evaluation_batches
from truestep.data.tokens import PreparedData
from truestep.metrics import StepMetrics
from truestep.model.gpt import GPT
from truestep.observe.display import Display, open_display
from truestep.observe.page import write_report
from truestep.observe.plots import draw_plots
from truestep.observe.sinks import JsonlSink
from truestep.settings import difference
from truestep.training.companion import every
from truestep.training.trainer import Trainer
from truestep.workflows.run import (
    CHECKPOINTS,
    METRICS,
    SAMPLES,
    RunError,
    check_new_run,
    claim_directory,
    open_data,
    read_run_config,
    read_run_facts,
    require_same_text,
    write_run_files,
    write_text,
)


@dataclass(frozen=True)
class Outcome:
    """How a training session ended; `stopped_by` names the signal, if it was one."""

    directory: Path
    step: int
    stopped_by: str | None


def train(config: RunConfig, say: Say) -> Outcome:
    """Train a new run.

    Nothing is written into its directory before data, model and first batch have proved good.
    Errors: ValueError or OSError of one line; NonFiniteError after the run was saved.
    """
    check_new_run(config.run)
    return _train(config, None, say)


def resume(
    config: RunConfig, directory: Path, say: Say, override: frozenset[str] = frozenset()
) -> Outcome:
    """Go on with a run from its newest good checkpoint, bit for bit.

    Errors: RunError for a setting that would change the trained bits and is not in `override`.
    """
    for setting, before, after in difference(read_run_config(directory), config):
        # A constant rate does not look at the end: such a run may be made longer or shorter.
        free = setting.name == "training.num_steps" and config.training.schedule == "constant"
        if setting.kept_on_resume and not free and setting.name not in override:
            raise RunError(
                f"{setting.name} was {before!r} in this run and is now {after!r}, which changes "
                f"what is trained; leave it out, or allow it by --override {setting.name}"
            )
    return _train(config, directory, say)


def _train(config: RunConfig, existing: Path | None, say: Say) -> Outcome:
    """Train in an existing run's directory, or in a new one."""
    threads = runtime.configure_process(config.run.threads)
    device = runtime.resolve_device(config.run.device)
    data = open_data(config, existing.parent if existing else Path(config.run.directory), say)
    loader = WindowLoader(
        data.train,
        context_length=config.model.context_length,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
    )
    trainer = Trainer(_build_model(config, data), config.training, device=device, sinks=())
    first = loader.batch_at(0)
    trainer.prepare(first)
    with _stopped_by_signals(trainer), contextlib.ExitStack() as stack:
        directory = existing or claim_directory(config.run, config.data.source)
        config = _resolved(config, trainer, first, {"name": directory.name, "threads": threads})
        facts = _facts(config, trainer, data)
        stack.enter_context(RunLock(directory))
        if existing is not None:
            facts["started"] = read_run_facts(directory).get("started", facts["started"])
            _go_on(trainer, directory, facts, say)
        write_run_files(directory, config, facts)
        display = _open_display(trainer, config)
        stack.callback(display.close)
        log = JsonlSink(directory / METRICS, from_step=trainer.step)
        samples = JsonlSink(directory / SAMPLES, from_step=trainer.step)
        stack.callback(log.close)
        stack.callback(samples.close)
        trainer.sinks = [log, display]

        def save() -> None:
            log.sync()  # a checkpoint never knows more than the log
            keep = config.run.keep_checkpoints
            save_checkpoint(trainer, directory / CHECKPOINTS, facts=facts, keep=keep)

        trainer.companions = [
            every(config.run.save_every, lambda *_: save()),
            every(config.run.evaluate_every, _validation(config, data, display, samples)),
        ]
        batches = stack.enter_context(Prefetch(loader, pin_memory=device.type == "cuda"))
        try:
            trainer.fit(batches)
        except Exception:
            if trainer.step and not trainer.mid_update:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    save()
            raise
        save()
    if trainer.step:
        draw_plots(directory)
        write_report(directory)
    return Outcome(directory, trainer.step, trainer.stop_reason)


def _go_on(trainer: Trainer, directory: Path, facts: dict[str, Any], say: Say) -> None:
    """Load the newest good checkpoint; a run that was stopped before its first begins anew."""
    checkpoints = directory / CHECKPOINTS
    newest = newest_checkpoint(checkpoints, say)
    if newest is not None:
        saved = load_checkpoint(newest, trainer)
        require_same_text(saved, facts["data_fingerprint"], facts["data_source"])
        _say_what_changed(saved, facts, say)
        say(f"going on from {newest}")
        if trainer.step >= trainer.config.num_steps:
            say(
                f"there is nothing left to train: it is at step {trainer.step} of "
                f"{trainer.config.num_steps}; raise training.num_steps"
            )
    elif any(checkpoints.glob(".bad-*")):
        raise RunError(
            f"{directory} has no intact checkpoint left to go on from; start a new run, or "
            f"remove {checkpoints} to train this one again from its first step"
        )


def _build_model(config: RunConfig, data: PreparedData) -> GPT:
    """Return the model with initial weights that depend on the seed alone."""
    vocab_size = config.model.vocab_size
    if vocab_size == "auto":
        vocab_size = data.tokenizer.vocab_size
    if vocab_size < data.tokenizer.vocab_size:
        raise RunError(
            f"model.vocab_size={vocab_size} is smaller than the {data.tokenizer.vocab_size} ids of "
            f"tokenizer {data.tokenizer.name!r}; leave it at auto"
        )
    with runtime.seeded(torch.device("cpu"), config.training.seed, "initial weights"):
        return GPT(config.model.model_copy(update={"vocab_size": vocab_size}))


def _resolved(config: RunConfig, trainer: Trainer, batch: Batch, run: dict[str, Any]) -> RunConfig:
    """Return the settings with every auto in plain values, as they are kept with the run."""
    assert isinstance(trainer.model, GPT)
    training = {"micro_batch_size": trainer.micro_batch_size(batch)}
    return config.model_copy(
        update={
            "training": trainer.config.model_copy(update=training),
            "model": trainer.model.config,
            "data": config.data.model_copy(update=_absolute_paths(config)),
            "run": config.run.model_copy(update={**run, "device": str(trainer.device)}),
        }
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


def _say_what_changed(saved: dict[str, Any], now: dict[str, Any], say: Say) -> None:
    """Say where the same bits are not promised any more."""
    for name in ("torch", "machine"):
        if saved[name] != now[name]:
            say(f"{name} was {saved[name]} and is {now[name]}: the same bits are not promised")


def _open_display(trainer: Trainer, config: RunConfig) -> Display:
    dtype = torch.bfloat16 if trainer.precision == "bfloat16" else torch.float32
    return open_display(
        config.training.num_steps,
        every=config.run.log_every,
        flops_per_token=trainer.facts.flops_per_token if trainer.facts else None,
        peak_flops_per_second=runtime.measure_peak_flops(trainer.device, dtype),
    )


def _validation(
    config: RunConfig, data: PreparedData, display: Display, samples: JsonlSink
) -> Callable[[Trainer, StepMetrics], None]:
    """Return the companion that validates and lets the model write."""
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes)
    prompt = config.run.sample_prompt

    def validate(trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.stop_reason is not None:  # whoever stopped the run does not want to wait
            return
        last = metrics.step >= config.training.num_steps
        batches = evaluation_batches(
            data.validation,
            context_length=config.model.context_length,
            batch_size=config.data.batch_size,
            num_windows=None if last else config.run.evaluation_windows,
        )
        result = trainer.evaluate(batches, token_bytes=token_bytes)
        record = {"step": metrics.step, "validation_loss": result.loss}
        trainer.log({**record, "validation_bits_per_byte": result.bits_per_byte})
        assert isinstance(trainer.model, GPT)
        text = write_text(
            trainer.model,
            data.tokenizer,
            prompt,
            max_new_tokens=config.run.sample_tokens,
            seed=config.training.seed,
        )
        samples.write({"step": metrics.step, "prompt": prompt, "text": text})
        display.sample(metrics.step, prompt, text)

    return validate


@contextlib.contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end `fit` after its step; a second one leaves at once."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: object) -> None:
        trainer.stop(signal.Signals(number).name)
        print("\nstopping after this step; once more leaves at once", file=sys.stderr)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
