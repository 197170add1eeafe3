"""What a run will cost: the figures against what they are made of, and the command."""

import math
import mmap
import re
import sys
import threading
import tomllib
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cli import TINY

import truestep.loss as loss_module
from truestep import GPT, GPTConfig, Trainer, TrainingConfig, compiler
from truestep.batch import Batch
from truestep.checkpoint.snapshot import Snapshot
from truestep.checkpoint.writer import CheckpointWriter
from truestep.cli import main
from truestep.config import RunConfig
from truestep.distributed.process import ALONE
from truestep.gpus import ASSUMED_UTILIZATION, GPU, find_gpu
from truestep.machine import _left_by_groups, accelerator_is_full, forget_peak, peak_bytes
from truestep.settings import validate
from truestep.training.compose import resolve_settings
from truestep.training.estimate import Estimate, _measured, computed_estimate, estimate
from truestep.training.evaluate import evaluate
from truestep.training.footprint import Footprint, _Ledger, bytes_to_come, footprint, state_bytes
from truestep.training.micro_batch import (
    largest_micro_batch,
    largest_that_fits,
    micro_batch_that_fits,
)
from truestep.training.reduction import Reduction
from truestep.workflows import plan as workflow
from truestep.workflows.evaluate import batches_to_evaluate
from truestep.workflows.memory import is_out_of_memory
from truestep.workflows.plan import Plan, filled, plan_on, plan_within
from truestep.workflows.plan_text import lines_of
from truestep.workflows.run import RunError


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "tiny.toml").write_text(TINY)


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=97, context_length=32, num_layers=2, num_heads=2, width=32))


def batch_at(_):
    return Batch.of(torch.arange(4 * 33).reshape(4, 33) % 97)


def needed_bytes(model, batch, rows, arithmetic):
    return footprint(model, batch, rows, arithmetic).needed


def size_that_fits(trainer):
    asked = trainer.config.micro_batch_size
    return micro_batch_that_fits(
        trainer.model, trainer.optimizer, batch_at(0), trainer.precision, asked
    )


def test_an_estimate_is_made_of_the_models_own_numbers(monkeypatch):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    trainer = Trainer(model(), TrainingConfig(precision="float32", compile="off"), sinks=[])
    found = estimate(trainer, batch_at)
    parameters = 2 * 97 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 88 + 2 * 32) + 32
    assert found.num_parameters == parameters
    assert found.tokens_per_step == 4 * 32
    products = 6 * (97 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 88)) + 12 * 2 * 32 * 32
    assert found.flops_per_token == pytest.approx(products)
    assert found.memory.weights == found.memory.gradients == 4 * parameters
    # Two moments of every number, and each parameter's count of steps.
    assert found.memory.moments == pytest.approx(8 * parameters, rel=0.01)
    assert found.memory.logits == 4 * 4 * 32 * 97
    assert found.memory.activations > found.memory.logits
    assert trainer.step >= 7
    assert 0 < found.step < 60
    assert found.utilization == pytest.approx(
        found.flops_per_token * 128 / found.step / found.peak_flops_per_second
    )


class ForksOnValues(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model()

    def forward(self, tokens):
        return self.model(tokens) * (2 if bool((tokens > 5).any()) else 1)


def test_an_estimate_takes_any_batch_and_logs_nothing(monkeypatch, capsys):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    windows = torch.arange(4 * 33).reshape(4, 33) % 97
    found = estimate(Trainer(model(), TrainingConfig(compile="off")), lambda _: windows)
    assert found.tokens_per_step == 4 * 32
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match=r"trainer is a GPT; give a Trainer: estimate\(Trainer"):
        estimate(model(), lambda _: windows)


def test_a_model_that_cannot_be_looked_at_is_still_timed(monkeypatch):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    found = estimate(Trainer(ForksOnValues(), TrainingConfig(), sinks=[]), batch_at)
    assert found.memory is found.largest_micro_batch is found.flops_per_token is None
    assert found.tokens_per_second > 0


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not():
    batch, shape = batch_at(0), model()
    room = needed_bytes(shape, batch, 100, "float32")
    found = largest_micro_batch(shape, batch, room, "float32")
    assert 98 <= found <= 100
    assert largest_micro_batch(shape, batch, needed_bytes(shape, batch, 1, "float32"), "float32")
    assert largest_micro_batch(shape, batch, 1000, "float32") == 0
    assert footprint(shape, batch, 8, "float32").total > footprint(shape, batch, 4, "float32").total


def planned(num_steps=1000, evaluate_every=100, **changes):
    found = Estimate(
        num_parameters=10**6,
        flops_per_token=6e6,
        tokens_per_step=1000,
        micro_batch_size=4,
        memory=None,
        largest_micro_batch=None,
        first_step=10.0,
        step=0.5,
        peak_flops_per_second=1e11,
    )
    config = RunConfig(
        training={"num_steps": num_steps},
        model={"vocab_size": 256},
        run={"evaluate_every": evaluate_every},
    )
    return replace(Plan(config, found, 3.0, 2.0, 20.0, None, "a machine", 10**6), **changes)


def test_a_plan_says_how_often_the_text_is_read():
    (line,) = (line for line in lines_of(planned(num_steps=2500)) if line.startswith("text "))
    assert line == "text        1,000,000 tokens of auto, 256 ids; read 2.50 times"


def test_the_time_of_a_run_is_the_sum_of_its_parts():
    assert planned().seconds(1) == 3 + 10
    assert planned().seconds(100) == 3 + 10 + 99 * 0.5  # the validation at the end comes after
    assert planned().seconds(101) == 3 + 10 + 100 * 0.5 + 2
    assert planned().seconds(1000) == 3 + 10 + 999 * 0.5 + 9 * 2


@pytest.mark.parametrize("seconds", [13.0, 62.4, 62.5, 64.9, 65.0, 600.0, 86400.0])
def test_as_many_steps_as_fit_are_the_most_that_fit(seconds):
    plan = planned()
    steps = plan.steps_within(seconds)
    assert plan.seconds(steps) <= seconds < plan.seconds(steps + 1)


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("minutes", [1, 60])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_steps_that_fit_keep_the_shape_of_the_schedule(path, minutes):
    asked = validate(RunConfig, {str(path): tomllib.loads(path.read_text())})
    plain = resolve_settings(asked.training, "float32", torch.device("cpu"))
    plan = replace(planned(), config=asked.model_copy(update={"training": plain}))
    training = filled(plan, 60.0 * minutes, asked.training).config.training
    TrainingConfig.model_validate(training.model_dump())  # `train` takes it
    share = Fraction(training.num_steps, asked.training.num_steps)
    assert share != 1
    assert training.warmup_steps == math.floor(share * asked.training.warmup_steps)
    assert training.decay_steps == math.floor(share * plain.decay_steps)


def test_an_automatic_decay_is_that_of_the_new_length():
    plan = planned(num_steps=1000)
    plain = resolve_settings(plan.config.training, "float32", torch.device("cpu"))
    assert plain.decay_steps == 200
    plan = replace(plan, config=plan.config.model_copy(update={"training": plain}))
    training = filled(plan, 65.0, planned().config.training).config.training
    assert (training.num_steps, training.decay_steps) == (101, 20)


def test_no_step_fits_into_less_than_the_first_takes():
    assert planned().steps_within(12.9) == 0


def test_the_lines_say_time_speed_and_cost():
    lines = "\n".join(lines_of(planned(), price_per_hour=36.0))
    assert "8:50 for 1,000 steps" in lines  # 3 + 10 + 499.5 + 18
    assert "500 ms a step, 2,000 tokens/s, MFU 12% of 100 GFLOP/s" in lines
    assert "3.00 s to start, 10.00 s the first step, 2.00 s each of 9 validations; then" in lines
    assert "then 0:20 for a last validation over all of the text" in lines
    assert "5.50 at 36 an hour" in lines  # all of it
    unknown = replace(planned(), estimate=replace(planned().estimate, flops_per_token=None))
    assert "500 ms a step, 2,000 tokens/s\n" in "\n".join(lines_of(unknown))


def test_what_was_held_before_is_no_part_of_a_later_peak():
    cpu = torch.device("cpu")
    with mmap.mmap(-1, 2**28) as held:
        held.write(b"1" * 2**28)
        before = peak_bytes(cpu)
    forget_peak(cpu)
    assert peak_bytes(cpu) < before - 2**27 or sys.platform != "linux"


def test_the_command_plans_and_leaves_nothing_but_the_prepared_text(capsys, monkeypatch):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    assert main(["plan", "tiny.toml", "--data", "text.txt", "--out", "plan.toml"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters  ", "memory  ", "speed  ", "time  ", "12 steps", "fit; each has 3"):
        assert word in out
    assert [path.name for path in Path("runs").iterdir()] == [".data"]
    settings = tomllib.loads(Path("plan.toml").read_text())
    assert settings["model"]["vocab_size"] == 256
    assert main(["train", "plan.toml"]) == 0  # the settings are whole


@pytest.mark.parametrize(("pays", "device", "peak"), [("layers", "cpu", None), ("on", "cuda", 4)])
def test_the_better_of_compiled_and_not_is_planned_where_the_time_may_earn_it_back(
    monkeypatch, pays, device, peak
):
    """A CPU's peak is then unknown where it was less: what the first plan freed is kept."""
    asked = []
    monkeypatch.setattr(workflow.runtime, "resolve_device", lambda _: torch.device(device))

    def plan_(config, *_):
        asked.append(config.training.compile)
        found = replace(planned().estimate, step=0.5 if asked[-1] == "off" else 0.4)
        found = replace(found, first_step=1.0 if asked[-1] == "off" else 40.0)
        # The second is made in a process that has imported everything: the run will not be.
        one = replace(planned(config=config, estimate=found), peak_bytes=5 - (asked[-1] == pays))
        return replace(one, start=3.0 if len(asked) == 1 else 0)

    monkeypatch.setattr(workflow, "_plan_of_prepared", plan_)
    monkeypatch.setattr(workflow, "open_data", lambda config, runs, say: say("opened"))
    monkeypatch.setattr(workflow, "time", SimpleNamespace(perf_counter=lambda: 0.0))

    def resolve(setting, device, flops, *, has_layers):
        assert has_layers
        return pays if flops >= 100 * 6e9 else "off"

    monkeypatch.setattr(compiler, "resolve_compile", resolve)
    config = planned().config
    for seconds, compile_, plans in ((20, "off", 1), (100, "off", 2), (1000, pays, 2)):
        asked.clear()
        said = []
        found = plan_within(config, seconds, said.append)
        assert said.count("opened") == 1
        assert found.config.training.compile == compile_
        assert found.start == 3.0
        assert found.peak_bytes == (peak if compile_ == pays else 5)
        assert asked == ["off", pays][:plans]
    config = RunConfig(training={"compile": "on"})
    asked.clear()
    assert plan_within(config, 100, print).config.training.num_steps == 143  # 43 s, and 142 of 0.4
    assert asked == ["on"]


def test_minutes_give_the_steps_that_fit(capsys, monkeypatch):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    command = ["plan", "tiny.toml", "--data", "text.txt", "--minutes", "5", "--out", "plan.toml"]
    assert main(command) == 0
    assert tomllib.loads(Path("plan.toml").read_text())["training"]["num_steps"] != 12
    minutes, seconds = re.search(r"time +(\d+):(\d\d) for", capsys.readouterr().out).groups()
    assert 285 <= 60 * int(minutes) + int(seconds) <= 300
    assert main([*command[:5], "1e-6"]) == 2
    assert "not one step fits into 6e-05 s" in capsys.readouterr().err
    for minutes in ("-1", "nan", "inf"):
        assert main([*command[:5], minutes]) == 2
        assert "--minutes" in capsys.readouterr().err


def test_where_settings_go_is_refused_before_anything_is_measured(capsys):
    command = ["plan", "tiny.toml", "--data", "text.txt", "--out"]
    assert main([*command, "nowhere/plan.toml"]) == 2
    assert "must be in a directory that exists" in capsys.readouterr().err
    assert main([*command, "tiny.toml"]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert Path("tiny.toml").read_text() == TINY
    assert not Path("runs").exists()


def test_a_run_that_exists_can_be_planned_again(monkeypatch, capsys):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    Path("runs/mine").mkdir(parents=True)
    assert main(["plan", "tiny.toml", "--data", "text.txt", "--run.name", "mine"]) == 0
    assert list(Path("runs/mine").iterdir()) == []


def test_a_validation_on_the_way_is_timed_however_short_the_run(monkeypatch):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    asked = []
    evaluate = workflow.Session.evaluate
    monkeypatch.setattr(
        workflow.Session,
        "evaluate",
        lambda self, windows: asked.append(windows) or evaluate(self, windows),
    )
    assert main(["plan", "tiny.toml", "-d", "text.txt", "--training.num-steps", "2"]) == 0
    assert None not in asked  # all windows


@pytest.mark.parametrize("keep_best", ["0", "2"])
def test_the_peak_of_a_plan_holds_a_step_beside_a_save(monkeypatch, keep_best):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    copies, done = [], []
    stage, step = Snapshot.staged, Trainer.training_step

    def staged(self):
        copy = stage(self)
        copies.append(weakref.ref(copy))
        return copy

    def training_step(self, batch):
        metrics = step(self, batch)
        done.append((len(batch.tokens), bool(copies) and copies[-1]() is not None))
        return metrics

    monkeypatch.setattr(Snapshot, "staged", staged)
    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(workflow, "peak_bytes", lambda _: done.append("peak"))
    few = ["--training.micro-batch-size", "1", "--run.keep-best-checkpoints", keep_best]
    assert main(["plan", "tiny.toml", "-d", "text.txt", *few]) == 0
    # Never a whole step: many micro-batches may take minutes.
    assert [rows for rows, _ in done[-5:-1]] == [2, 2, 2, 2]
    assert done[-2:] == [(2, True), "peak"]
    assert len(copies) == 1 + 3


def test_memory_that_ends_in_a_plan_makes_its_micro_batches_smaller(monkeypatch):
    """Also in its last step, when what wrote down sizes for a run is closed."""
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    step, told = Trainer._step, []
    copy = workflow._train_beside_a_copy

    def beside(training):
        told.append("last")
        copy(training)

    def fail_once(self, batch, buffers):
        if told == ["last"]:
            told.append("full")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch, buffers)

    monkeypatch.setattr(workflow, "_train_beside_a_copy", beside)
    monkeypatch.setattr(Trainer, "_step", fail_once)
    config = validate(RunConfig, {"tiny.toml": tomllib.loads(TINY)})
    data = config.data.model_copy(update={"source": "text.txt"})
    with pytest.warns(UserWarning, match="the memory of cpu ended in step"):
        workflow.plan(config.model_copy(update={"data": data}), lambda _: None)
    assert told == ["last", "full"]


def test_a_validation_does_not_wait_for_the_save_of_the_one_before(monkeypatch):
    """A run has many steps between the two."""
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    now, awaited = [0.0], threading.Event()
    commit, wait = CheckpointWriter._commit, CheckpointWriter.wait

    def slow(self, snapshot):  # it takes until somebody waits for it, and 100 s then
        assert awaited.wait(60)
        awaited.clear()
        now[0] += 100.0
        return commit(self, snapshot)

    def waits(self):
        if self._in_flight is not None:
            awaited.set()
        wait(self)

    monkeypatch.setattr(CheckpointWriter, "_commit", slow)
    monkeypatch.setattr(CheckpointWriter, "wait", waits)
    monkeypatch.setattr(workflow, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = validate(RunConfig, {"tiny.toml": tomllib.loads(TINY)})
    data = config.data.model_copy(update={"source": "text.txt"})
    found = workflow.plan(config.model_copy(update={"data": data}), lambda _: None)
    assert found.validation == 0.0
    assert now == [300.0]


@pytest.mark.parametrize(("keep_best", "again"), [(2, 2.0), (0, 0.0)])
def test_of_the_last_validation_the_text_alone_is_longer(monkeypatch, keep_best, again):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    now = [0.0]
    monkeypatch.setattr(workflow, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds):
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(workflow.Session, "evaluate", takes(2.0))
    each = iter([20.0, 9.0, 8.0])  # the median is 9: 7 of them for sample and save
    monkeypatch.setattr(workflow.Session, "validate", lambda *_: takes(next(each))())
    settings = tomllib.loads(TINY)
    settings["run"] |= {"evaluation_windows": 2, "keep_best_checkpoints": keep_best}
    settings["data"]["source"] = "text.txt"
    config = validate(RunConfig, {"tiny.toml": settings})
    found = workflow.plan(config, lambda _: None)
    windows = 880 / config.model.context_length  # a tenth of the text
    assert found.validation == 9.0
    assert found.last_validation == pytest.approx(7 + 2 * windows / 2 + again, rel=0.01)


def test_a_batch_that_does_not_fit_is_split_before_its_first_step(monkeypatch):
    config = TrainingConfig(precision="float32", compile="off")
    expected = Trainer(model(), config, sinks=[]).training_step(batch_at(0))
    trainer = Trainer(model(), config, sinks=[])
    room = bytes_to_come(trainer.model, trainer.optimizer)
    room += needed_bytes(trainer.model, batch_at(0), 2, "float32")
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: room)
    with pytest.warns(UserWarning, match=r"4 rows needs about .* split into micro-batches of 2"):
        size = size_that_fits(trainer)
    assert size == 2
    trainer.config = trainer.config.model_copy(update={"micro_batch_size": size})
    metrics = trainer.training_step(batch_at(0))
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
    assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.mark.parametrize(("free", "size"), [(0, 1), (None, 4), (2**60, 4)])
def test_what_is_free_decides_how_a_batch_is_split(monkeypatch, recwarn, free, size):
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: free)
    trainer = Trainer(model(), TrainingConfig(compile="off"), sinks=[])
    assert size_that_fits(trainer) == size
    assert len(recwarn) == (size == 1)
    trainer.training_step(batch_at(0))
    # From Python nothing that is free now decides: a state that is loaded goes on with its bits.
    assert trainer.config.micro_batch_size == "auto"


@pytest.mark.parametrize(("layers", "vocab_size"), [(8, 2**13), (1, 2**15)])
def test_of_many_chunks_of_logits_two_are_looked_at_and_none_is_missed(
    monkeypatch, layers, vocab_size
):
    """Each takes milliseconds to trace: 8,000 windows of W2 took a minute."""
    for module in ("loss", "training.footprint"):
        monkeypatch.setattr(f"truestep.{module}.LOGITS_PER_CHUNK", 2**16)
    shape = GPTConfig(
        vocab_size=vocab_size, context_length=32, num_layers=layers, num_heads=2, width=32
    )
    wide, batch = GPT(shape), Batch.of(torch.zeros(32, 33, dtype=torch.long))
    calls, chunk = [], loss_module._chunk_with_gradients
    monkeypatch.setattr(
        loss_module,
        "_chunk_with_gradients",
        lambda *tensors: calls.append(1) or chunk(*tensors),
    )
    found = footprint(wide, batch, 32, "gpu")
    assert len(calls) == 2
    monkeypatch.setattr(
        "truestep.training.footprint.linear_cross_entropy_sum",
        lambda *tensors, only_memory: loss_module.linear_cross_entropy_sum(*tensors),
    )
    assert footprint(wide, batch, 32, "gpu") == found
    assert len(calls) == 2 + 32 * 32 * vocab_size // 2**16


def test_micro_batches_that_were_asked_for_are_kept_and_said_not_to_fit(monkeypatch):
    config = TrainingConfig(precision="float32", compile="off", micro_batch_size=3)
    trainer = Trainer(model(), config, sinks=[])
    room = bytes_to_come(trainer.model, trainer.optimizer)
    free = room + needed_bytes(trainer.model, batch_at(0), 2, "float32")
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: free)
    message = (
        "training.micro_batch_size=3 needs about .*, and one row .*; .* free, .*; .*size=2 would"
    )
    with pytest.warns(UserWarning, match=message):
        assert size_that_fits(trainer) == 3
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: room)
    with pytest.warns(UserWarning, match="may not fit; use a smaller model or shorter windows"):
        assert size_that_fits(trainer) == 3
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: 2**40)
    assert size_that_fits(trainer) == 3


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_model_that_does_not_fit_even_without_a_batch_is_refused(monkeypatch, capsys, command):
    """Its weights are not drawn: that takes minutes, and then the system ends the process."""
    text = [command, "tiny.toml", "--data", "text.txt"]
    monkeypatch.setattr("truestep.workflows.build.build_trainer", lambda _: pytest.fail("drawn"))
    monkeypatch.setattr("truestep.workflows.build.free_bytes", lambda _: 2**20)
    assert main([*text, "--model.width", "256"]) == 2
    assert re.fullmatch(
        r"error: a model of [\d,]{7,} parameters does not fit: its weights, gradients and "
        r"moments, and the copy that is saved, take at least [\d.,]+ \w+, and .* are free; use a "
        r"smaller model.width or fewer model.num_layers\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("rows", "fits", "size"), [(4001, 2600, 2001), (13, 5, 5), (12, 5, 4), (7, 1, 1), (14, 6, 5)]
)
def test_a_batch_with_few_divisors_is_split_into_few_parts(rows, fits, size):
    """The largest divisor of 4,001 is 1: 4,001 parts took ten times as long as two."""
    shape = model()
    batch = Batch.of(torch.zeros(rows, 33, dtype=torch.long))
    room = needed_bytes(shape, batch, fits, "float32")
    assert largest_that_fits(shape, batch, room, "float32", limit=rows - 1) == size


class Keeps(torch.nn.Module):
    """Keeps a mask, a buffer and a note of each call, as models that cache do."""

    def __init__(self):
        super().__init__()
        self.model, self.calls = model(), []

    def forward(self, tokens):
        self.calls.append(tokens.shape)
        if not hasattr(self, "mask"):
            self.mask = torch.ones(tokens.shape[1], device=tokens.device)
            self.register_buffer("scale", torch.ones(()))
        return self.model(tokens) * self.mask[:, None] * self.scale


class Reads(torch.nn.Module):
    """Refuses, in words of its own, tokens that it cannot read."""

    def __init__(self):
        super().__init__()
        self.model = model()

    def forward(self, tokens):
        try:
            int(tokens.max())
        except RuntimeError:
            raise ValueError("tokens without values") from None
        return self.model(tokens)


@pytest.mark.parametrize("kind", [Keeps, Reads])
def test_what_is_learnt_without_values_leaves_nothing_in_a_model(monkeypatch, kind):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    config = TrainingConfig(precision="float32", compile="off")
    expected = Trainer(model(), config, sinks=[]).training_step(batch_at(0))
    trainer = Trainer(kind(), config, sinks=[])
    size_that_fits(trainer)
    trainer.prepare(batch_at(0))
    assert not getattr(trainer.model, "calls", [])
    assert trainer.training_step(batch_at(0)).loss == expected.loss
    assert estimate(Trainer(kind(), config, sinks=[]), batch_at).tokens_per_second > 0


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 8), ("muon", 4)])
def test_what_an_optimizer_will_hold_is_known_before_its_first_step(kind, moments):
    plain = TrainingConfig(optimizer=kind, precision="float32", compile="off")
    trainer = Trainer(model(), plain, sinks=[])
    trainer.model.embedding.weight.requires_grad_(False)  # frozen: held, and nothing else
    trainer = Trainer(trainer.model, plain, sinks=[])
    before, to_come = (f(trainer.model, trainer.optimizer) for f in (state_bytes, bytes_to_come))
    matrices = sum(p.numel() for p in trainer.model.layers.parameters() if p.dim() == 2)
    others = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) - matrices
    assert before.weights == before.gradients + 4 * trainer.model.embedding.weight.numel()
    assert before.moments == moments * matrices + 8 * others
    assert to_come == 2 * before.moments + before.weights
    trainer.training_step(batch_at(0))
    after = state_bytes(trainer.model, trainer.optimizer)
    assert after.moments == pytest.approx(before.moments, rel=0.01)  # and counts of steps


def test_gradients_of_the_micro_batches_before_are_held_too():
    shape = model()
    parameters = 4 * sum(p.numel() for p in shape.parameters())
    one_row = Batch.of(torch.zeros(1, 33, dtype=torch.long))
    alone = footprint(shape, one_row, 1, "float32").total
    among = footprint(shape, batch_at(0), 1, "float32").total
    assert alone < among <= alone + parameters


def test_a_container_s_limit_counts(tmp_path):
    """Version 2 and 1 of Linux's control groups, which /proc/meminfo knows nothing of."""

    def write(name, value):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)

    assert list(_left_by_groups(tmp_path)) == []
    write("proc/self/cgroup", "0::/outer/inner\n4:memory:/host/only\n3:cpu:/\n")
    write("sys/fs/cgroup/outer/inner/memory.max", "max\n")
    write("sys/fs/cgroup/outer/inner/memory.current", "700\n")
    write("sys/fs/cgroup/outer/memory.max", "5000\n")
    write("sys/fs/cgroup/outer/memory.current", "3000\n")
    write("sys/fs/cgroup/outer/memory.stat", "anon 1\ninactive_file 400\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "900\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "100\n")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 50\n")
    assert list(_left_by_groups(tmp_path)) == [2400, 850]
    write("sys/fs/cgroup/memory/memory.stat", "something else\nand more of it\n")
    (tmp_path / "sys/fs/cgroup/outer/memory.stat").unlink()
    assert list(_left_by_groups(tmp_path)) == [2000, 800]  # a limit stays one


def test_one_row_that_may_not_fit_is_called_so(monkeypatch):
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: 0)
    trainer = Trainer(model(), TrainingConfig(compile="off"), sinks=[])
    with pytest.warns(UserWarning, match=r"even one row needs about .* and may not fit; use a sma"):
        size_that_fits(trainer)


def test_a_library_without_room_for_its_workspace_is_an_accelerator_that_is_full():
    text = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert accelerator_is_full(RuntimeError(text))
    assert is_out_of_memory(RuntimeError(text))
    assert not accelerator_is_full(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_batch_that_fits_as_a_whole_and_not_in_parts_is_taken_whole():
    """A part finds the gradients of those before: where weights are most of it, it takes more."""
    shape = {"num_layers": 4, "num_heads": 4, "width": 128, "context_length": 8, "vocab_size": 32}
    heavy, batch = GPT(GPTConfig(**shape)), Batch.of(torch.zeros(8, 9, dtype=torch.long))
    room = needed_bytes(heavy, batch, 8, "gpu")
    assert room < needed_bytes(heavy, batch, 1, "gpu")
    assert largest_that_fits(heavy, batch, room, "gpu", limit=8) == 8
    assert largest_that_fits(heavy, batch, room, "gpu", limit=7) == 0
    assert largest_micro_batch(heavy, batch, room, "gpu") == 8
    trainer = Trainer(heavy, TrainingConfig(precision="float32", compile="off"), sinks=[])
    state = state_bytes(heavy, trainer.optimizer)
    gpu = GPU("tight one", 1e12, 2**30 + state.weights + state.moments + room)
    assert computed_estimate(trainer, batch, gpu).micro_batch_size == 8


def test_a_plan_for_a_gpu_keeps_what_was_said():
    asked = {"compile": "off", "micro_batch_size": 2, "num_steps": 10, "schedule": "wsd"}
    config = RunConfig(training=asked, data={"source": "text.txt", "batch_size": 4})
    training = plan_on(config, find_gpu("h100"), print).config.training
    assert (training.compile, training.micro_batch_size, training.precision) == (
        ("off", 2, "bfloat16")
    )
    assert (training.decay_steps, training.deterministic) == (2, "auto")
    config = RunConfig(training={"precision": "float32"}, data={"source": "text.txt"})
    with pytest.raises(RunError, match="precision=float32, but a data sheet is computed in bfl"):
        plan_on(config, find_gpu("h100"), print)
    config = RunConfig(run={"device": "cpu"}, data={"source": "text.txt"})
    with pytest.raises(RunError, match="device=cpu, but the plan is for a GPU; give --run"):
        plan_on(config, find_gpu("h100"), print)


def test_a_gpu_s_loss_of_many_ids_is_that_of_bfloat16():
    """Float16 stands in for it on the way, and has a loss of twice the width."""
    batch = Batch.of(torch.zeros(1, 65, dtype=torch.long))
    wide = GPT(GPTConfig(context_length=64, vocab_size=9000, num_layers=1, num_heads=1, width=64))
    there, here = (footprint(wide, batch, 8, kind).total for kind in ("gpu", "bfloat16"))
    assert there == pytest.approx(here, rel=0.02)


@pytest.mark.filterwarnings("default")
def test_the_command_says_aloud_that_it_splits_and_writes_it_down(monkeypatch, capsys):
    monkeypatch.setattr("truestep.training.footprint.free_bytes", lambda _: 0)
    Path("tiny.toml").write_text(TINY.replace("micro_batch_size = 3\n", ""))
    assert main(["train", "tiny.toml", "--data", "text.txt"]) == 0
    err = capsys.readouterr().err
    assert re.fullmatch(r"warning: a step of 4 rows needs [^\n]* may not fit; [^\n]*\n", err)
    settings = tomllib.loads(Path("runs/text-1/config.toml").read_text())
    assert settings["training"]["micro_batch_size"] == 1


def test_a_gpu_that_is_not_here_is_computed_from_its_data_sheet():
    trainer = Trainer(model(), TrainingConfig(precision="float32", compile="off"), sinks=[])
    gpu = find_gpu("H100")
    found = computed_estimate(trainer, batch_at(0), gpu)
    assert trainer.step == 0
    assert found.step == pytest.approx(found.flops_per_token * 128 / (0.4 * 989e12))
    assert found.utilization == pytest.approx(ASSUMED_UTILIZATION)
    assert found.memory.moments == 2 * found.memory.weights == 8 * found.num_parameters
    assert found.largest_micro_batch > 1000
    assert found.micro_batch_size == 4


def test_what_does_not_fit_on_a_gpu_is_split_or_refused():
    trainer = Trainer(model(), TrainingConfig(precision="float32", compile="off"), sinks=[])
    beside = 2**30 + 12 * sum(p.numel() for p in trainer.model.parameters())
    room = needed_bytes(trainer.model, batch_at(0), 3, "gpu")
    small = GPU("small one", 1e12, beside + room)
    found = computed_estimate(trainer, batch_at(0), small)
    assert found.largest_micro_batch == 3
    assert found.micro_batch_size == 2  # divides the batch
    assert computed_estimate(trainer, batch_at(0), small, 1).micro_batch_size == 1
    with pytest.raises(ValueError, match=r"size=4 needs .* beside .* small one are left; use 2$"):
        computed_estimate(trainer, batch_at(0), small, 4)
    with pytest.raises(
        ValueError, match=r"one window needs .* of the tiny one are left; use a smaller"
    ):
        computed_estimate(trainer, batch_at(0), GPU("tiny one", 1e12, beside))
    trainer = Trainer(ForksOnValues(), TrainingConfig(), sinks=[])
    with pytest.raises(ValueError, match="ForksOnValues does not run on tensors without values"):
        computed_estimate(trainer, batch_at(0), gpu=find_gpu("l4"))


def test_attention_on_a_gpu_holds_no_square_of_the_context():
    def bytes_of(length, arithmetic):
        shape = GPTConfig(context_length=length, vocab_size=64, num_layers=1, num_heads=8, width=64)
        batch = Batch.of(torch.zeros(1, length + 1, dtype=torch.long))
        return footprint(GPT(shape), batch, 1, arithmetic).total

    assert bytes_of(1024, "gpu") < 2.1 * bytes_of(512, "gpu")
    assert bytes_of(1024, "bfloat16") > 3 * bytes_of(512, "bfloat16")  # a CPU holds the scores


def test_a_model_for_a_gpu_need_not_fit_here(monkeypatch):
    monkeypatch.setattr("truestep.workflows.build.free_bytes", lambda _: 10**5)
    assert main(["plan", "tiny.toml", "--data", "text.txt", "--gpu", "h100"]) == 0
    assert main(["plan", "tiny.toml", "--data", "text.txt"]) == 2


def test_a_model_that_no_gpu_holds_is_refused_before_it_is_built(monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("it is built")

    monkeypatch.setattr("truestep.workflows.build.build_trainer", refuse)
    large = ["--model.num-layers", "32", "--model.width", "4096", "--model.num-heads", "32"]
    assert main(["plan", "tiny.toml", "--data", "text.txt", "--gpu", "rtx4090", *large]) == 2
    err = capsys.readouterr().err
    assert "does not fit: its weights, gradients and moments take at least" in err
    assert "24,166 MiB are free" in err


def test_the_command_plans_for_a_gpu_and_marks_it_as_computed(capsys):
    command = ["plan", "tiny.toml", "--data", "text.txt", "--gpu"]
    assert main([*command, "a100-40gb", "--minutes", "1", "--out", "plan.toml"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA A100 40GB, by its data sheet, bfloat16" in out
    assert "computed at an assumed MFU of 40%, not measured" in out
    assert "a lower bound: a GPU waits for the host in so short a step" in out
    assert "1:00 for" in out
    settings = tomllib.loads(Path("plan.toml").read_text())
    assert settings["run"]["device"] == "auto"
    assert settings["training"]["num_steps"] > 10_000
    assert main([*command, "h10"]) == 2
    assert "gpu='h10' has no data sheet here; did you mean h100?" in capsys.readouterr().err
    assert main([*command, "x"]) == 2
    assert "use one of a100-40gb, a100-80gb, b200" in capsys.readouterr().err


class Clocked:
    """Steps that take so long a row, a tenth of a second beside, and 40 s for a new shape."""

    def __init__(self, size, seconds):
        self.size, self.seconds, self.step, self.rows, self.now = size, seconds, 0, [], 0.0
        self.compiled, self.reduction = set(), Reduction(model(), ALONE)

    def micro_batch_size(self, _):
        return self.size

    def training_step(self, batch):
        rows = len(batch.tokens)
        self.rows.append(rows)
        shapes = {len(part.tokens) for part in batch.split(self.size)}
        self.now += rows * self.seconds + 0.1 + 40 * len(shapes - self.compiled)
        self.compiled |= shapes
        self.step += 1


@pytest.mark.parametrize(
    ("size", "seconds", "rows"),
    [
        (1, 1, [1, 1] + [12] * 5),  # all twelve take less than 20 s
        (1, 4, [1, 1] + [1, 4] * 3),  # two rounds are less than a minute
        (1, 30, [1, 1, 1, 2]),
        (12, 2, [12] * 5),
        (12, 30, [12] * 3),
        (8, 1, [12] * 7),  # eight and four: two shapes to compile
    ],
)
def test_a_long_step_is_put_together_from_its_micro_batches(monkeypatch, size, seconds, rows):
    trainer = Clocked(size, seconds)
    monkeypatch.setattr(
        "truestep.training.estimate.time", SimpleNamespace(perf_counter=lambda: trainer.now)
    )
    batch = Batch.of(torch.zeros(12, 9, dtype=torch.long))
    first, step = _measured(trainer, batch, lambda _: batch)
    assert trainer.rows == rows
    assert step == pytest.approx(12 * seconds + 0.1)
    assert first == pytest.approx(step + 40 * len(trainer.compiled))


def test_few_rows_that_take_nothing_beside_the_gradients_mislead_nobody(monkeypatch):
    """Up to a hundred rows a step takes the same: the line through the first two leads nowhere."""
    asked = []

    def taken(model, batch, rows, arithmetic):
        asked.append(rows)
        return Footprint(0, 0, max(10**9, 10**7 * rows) + rows)

    monkeypatch.setattr("truestep.training.micro_batch.footprint", taken)
    assert 4850 <= largest_micro_batch(model(), batch_at(0), 5 * 10**10, "gpu") <= 5000
    assert max(asked) <= 1.03 * 5000
    assert len(asked) <= 10


def test_a_plan_of_a_run_that_diverges_says_so(monkeypatch, capsys):
    monkeypatch.setattr("truestep.training.estimate._LEAST_SECONDS", 0.0)
    command = ["plan", "tiny.toml", "--data", "text.txt", "--training.learning-rate", "1e20"]
    assert main(command) != 0
    assert re.search(
        r"learning_rate=1e\+20: .* not finite in step \d+ of the measurement, .*; lower it",
        capsys.readouterr().err,
    )


def test_settings_are_written_as_toml_only(capsys):
    assert main(["plan", "tiny.toml", "--data", "text.txt", "--out", "plan.json"]) != 0
    assert "must end in .toml" in capsys.readouterr().err
    assert not Path("plan.json").exists()


def test_a_plan_refuses_a_name_that_no_run_may_have(capsys):
    assert main(["plan", "tiny.toml", "--data", "text.txt", "--run.name", "../x"]) != 0
    assert "run.name='../x' is not a plain name" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--minutes", "--price-per-hour"])
def test_a_plan_refuses_a_number_beyond_all_sense(option, capsys):
    assert main(["plan", "tiny.toml", "--data", "text.txt", option, "1e300"]) != 0
    assert option in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_a_batch_larger_than_all_memory_is_refused_before_it_is_made(monkeypatch, capsys):
    monkeypatch.setattr("truestep.workflows.build.free_bytes", lambda _: 2**20)
    arguments = ["tiny.toml", "--data", "text.txt", "--data.batch-size", "100000"]
    for name in ("plan", "train"):
        assert main([name, *arguments]) != 0
        assert "data.batch_size=100000: tokens and targets of" in capsys.readouterr().err


def test_a_plan_for_a_gpu_draws_no_weights(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "normal_", refuse)
    config = RunConfig(data={"source": "text.txt", "batch_size": 4})
    assert plan_on(config, find_gpu("h100"), print).estimate.num_parameters > 1000


class Zeros:
    """A text of one token."""

    def __len__(self):
        return 3000

    def read(self, start, stop):
        return np.zeros(stop - start, np.int64)


@pytest.mark.parametrize("vocab_size", [256, 8192, 16384, 50257])
def test_an_evaluation_takes_no_more_memory_than_a_step(vocab_size):
    """Of many ids a step never holds all logits at once; evaluation does, those of its rows."""
    shape = GPTConfig(vocab_size=vocab_size, num_layers=1, num_heads=2, width=64)
    config = RunConfig(
        training={"micro_batch_size": 8}, model=shape.model_dump(), data={"batch_size": 8}
    )
    narrow, batches = GPT(shape), list(batches_to_evaluate(config, Zeros()))
    with _Ledger([*narrow.parameters(), *narrow.buffers()]) as ledger:
        evaluate(narrow, batches[:1], precision="bfloat16")
    step = footprint(narrow, Batch.of(torch.zeros(8, 257, dtype=torch.long)), 8, "bfloat16")
    assert ledger.peak <= step.total


def test_an_evaluation_takes_as_many_rows_as_a_micro_batch_and_at_least_one():
    for micro_batch_size, vocab_size, rows in ((64, 256, 8), (4, 256, 4), (8, 2**20, 1)):
        config = RunConfig(
            training={"micro_batch_size": micro_batch_size},
            model={"vocab_size": vocab_size},
            data={"batch_size": 8},
        )
        assert {len(batch.tokens) for batch in batches_to_evaluate(config, Zeros())} == {rows}
