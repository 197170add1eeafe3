"""Law 19: a run resumed at any step goes on bit for bit, in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truestep import GPT, GPTConfig, JsonlSink, Trainer, TrainingConfig, every
from truestep.checkpoint.state import load_checkpoint, save_checkpoint
from truestep.data.loader import WindowLoader

STEPS = 50


class Counting:
    """Tokens that need no file."""

    def __len__(self):
        return 700

    def read(self, start, stop):
        return torch.arange(start, stop).mul(7).remainder(31).numpy()


def build(directory, optimizer, compile_="off"):
    """A trainer with dropout, accumulation with a ragged last micro-batch, and a schedule."""
    shape = GPTConfig(
        vocab_size=31, context_length=8, num_layers=1, num_heads=2, width=16, dropout=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = GPT(shape)
    config = TrainingConfig(
        optimizer=optimizer,
        compile=compile_,
        micro_batch_size=3,
        schedule="wsd",
        warmup_steps=5,
        num_steps=STEPS,
        learning_rate=1e-2,
    )
    sink = JsonlSink(directory / "metrics.jsonl")
    return Trainer(model, config, sinks=[sink])


def data(compile_="off"):
    # Of 5 windows the last micro-batch is ragged; of 6 there is one shape to compile, and not two.
    batch_size = 5 if compile_ == "off" else 6
    return WindowLoader(Counting(), context_length=8, batch_size=batch_size, seed=3)


def resume_at(steps, directory, optimizer, compile_):
    """What the fresh process does: go on from each checkpoint and compare with the whole run."""
    torch.set_num_threads(1)
    whole = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    timing = {"step_seconds", "tokens_per_second"}
    for step in steps:
        part = directory / f"from-{step}"
        part.mkdir()
        trainer = build(part, optimizer, compile_)
        load_checkpoint(directory / f"step-{step}", trainer)
        assert trainer.step == step
        trainer.fit(data(compile_))
        trainer.sinks[0].close()
        again = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
        for mine, theirs in zip(again, whole[step:], strict=True):
            assert {k: mine[k] for k in mine.keys() - timing} == {
                k: theirs[k] for k in theirs.keys() - timing
            }, f"resumed at {step}"
        save_checkpoint(trainer, part)
        for name in ("model.safetensors", "optimizer.safetensors"):
            mine, theirs = (d / f"step-{STEPS}" / name for d in (part, directory))
            assert mine.read_bytes() == theirs.read_bytes(), f"{name}, resumed at {step}"


def check_in_a_fresh_process(directory, steps, optimizer, compile_):
    trainer = build(directory, optimizer, compile_)
    trainer.companions = [every(1, lambda t, _: save_checkpoint(t, directory, keep=STEPS))]
    trainer.fit(data(compile_))
    trainer.sinks[0].close()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pathlib\n"
        f"from test_resume import resume_at\n"
        f"resume_at({steps}, pathlib.Path({str(directory)!r}), {optimizer!r}, {compile_!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_at_every_step_in_a_fresh_process_is_bit_identical(tmp_path, optimizer):
    assert len(range(0, 700, 8)) % 5 > 0  # an epoch ends within a batch
    check_in_a_fresh_process(tmp_path, list(range(1, STEPS)), optimizer, "off")


@pytest.mark.xdist_group("compile")
def test_resuming_a_compiled_run_in_a_fresh_process_is_bit_identical(tmp_path):
    check_in_a_fresh_process(tmp_path, [17], "muon", "on")  # within an epoch; AdamW is in the pair


def test_seeking_to_a_step_gives_the_batch_of_that_step():
    loader = data()
    in_order = [loader.batch_at(step).tokens for step in range(40)]
    for step in (39, 0, 17, 17, 3):
        assert torch.equal(data().batch_at(step).tokens, in_order[step])
