"""The compiled step: it agrees with the eager one, keeps its bits, and falls back by itself."""

import threading
import tomllib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from truestep import (
    GPT,
    IGNORE_INDEX,
    Batch,
    Trainer,
    TrainingConfig,
    compiler,
    every,
    load_checkpoint,
    save_checkpoint,
)
from truestep.config import RunConfig
from truestep.settings import validate
from truestep.training.probe import probe
from truestep.workflows.build import _run_flops


def train(model, windows, compile_, evaluate_every=None):
    config = TrainingConfig(compile=compile_, precision="float32", micro_batch_size=2)

    def disturb(trainer, _):
        trainer.evaluate([windows(7, 5, seed=50)])  # another shape than training's
        torch.rand(3)

    companions = [every(evaluate_every, disturb)] if evaluate_every else []
    trainer = Trainer(model, config, sinks=[], companions=companions)
    losses = []
    trainer.companions.append(every(1, lambda _, metrics: losses.append(metrics.loss)))
    trainer.fit([windows(seed=i) for i in range(6)], num_steps=6)
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.xdist_group("compile")
def test_the_compiled_step_agrees_with_the_eager_one_and_evaluation_leaves_its_bits(
    bigram, windows
):
    eager, _ = train(bigram(), windows, "off")
    compiled, parameters = train(bigram(dropout=0.3), windows, "on")
    again, same = train(bigram(dropout=0.3), windows, "on", evaluate_every=2)
    assert again == compiled
    assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))
    plain, _ = train(bigram(), windows, "on")
    assert plain == pytest.approx(eager, rel=1e-5)


@pytest.mark.xdist_group("compile")
def test_a_compiled_run_resumes_bit_for_bit(bigram, windows, tmp_path):
    config = TrainingConfig(compile="on", micro_batch_size=3)
    whole = Trainer(bigram(dropout=0.3), config, sinks=[])
    for step in range(6):
        if step == 3:
            save_checkpoint(whole, tmp_path)
        whole.training_step(windows(seed=step))
    torch.compiler.reset()
    again = Trainer(bigram(dropout=0.3), config, sinks=[])
    load_checkpoint(tmp_path / "step-3", again)
    for step in range(3, 6):
        again.training_step(windows(seed=step))
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.xdist_group("compile")
def test_it_is_compiled_once_whatever_varies_from_step_to_step(bigram, windows, recwarn):
    config = TrainingConfig(compile="on", micro_batch_size=2, schedule="cosine", warmup_steps=2)
    trainer = Trainer(bigram(dropout=0.3), config, sinks=[])
    trainer.training_step(windows())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 4):
            tokens = windows(seed=step)
            targets = tokens[:, 1:].clone()
            targets[:step, :step] = IGNORE_INDEX
            trainer.training_step((tokens[:, :-1], targets))
            trainer.evaluate([windows(7, 5)])
    assert not [warning for warning in recwarn if "runs uncompiled" in str(warning.message)]


@pytest.mark.xdist_group("compile")
def test_too_many_shapes_run_uncompiled_from_there_on_and_say_so_once(bigram, windows):
    model = bigram()
    trainer = Trainer(model, TrainingConfig(compile="on"), sinks=[])
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (3, 4):
            trainer.training_step(windows(length=length))
        with pytest.warns(UserWarning, match="more than 2 shapes") as caught:
            trainer.fit([windows(length=length) for length in (5, 6, 3)], num_steps=5)
    assert len(caught) == 1


@pytest.mark.xdist_group("compile")
def test_other_trainers_of_the_process_do_not_count(bigram, windows, recwarn):
    with torch._dynamo.config.patch(recompile_limit=2):
        for vocab_size in (11, 12, 13):
            trainer = Trainer(bigram(vocab_size=vocab_size), TrainingConfig(compile="on"), sinks=[])
            trainer.training_step(windows())
    assert not [warning for warning in recwarn if "uncompiled" in str(warning.message)]


class Untraceable(torch.nn.Module):
    """A model whose forward looks at values, which no single graph can hold."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        logits = self.model(tokens)
        return logits * 2 if float(logits.detach().mean()) > 100 else logits


def test_a_model_that_cannot_be_compiled_whole_runs_eager_and_says_so_once(bigram, windows):
    expected, _ = train(bigram(), windows, "off")
    with pytest.warns(UserWarning, match="runs uncompiled") as caught:
        losses, _ = train(Untraceable(bigram()), windows, "on")
    assert losses == expected
    assert sum("runs uncompiled" in str(warning.message) for warning in caught) == 1


def test_a_compiler_that_does_not_know_the_vectors_is_asked_without_them(monkeypatch):
    asked = []

    def compile_(function, options):
        asked.append(options)
        if options:
            raise RuntimeError("unrecognized command-line option")
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    compile_options = compiler.compile_options.__wrapped__  # not its cache
    assert compile_options(torch.device("cpu")) == {}
    assert asked == [{"cpp.vec_isa_ok": True}, {}]
    monkeypatch.setattr(torch, "compile", lambda _, options: compile_(None, {"never": options}))
    assert compile_options(torch.device("cpu")) is None


def test_the_compiler_is_tried_beside_the_text_and_waited_for(monkeypatch):
    began, release, ended = threading.Event(), threading.Event(), threading.Event()

    def asked(_):
        began.set()
        release.wait(60)
        ended.set()
        raise RuntimeError("said where the result is asked for")

    monkeypatch.setattr(compiler, "compile_options", asked)
    with compiler.compiling_ahead(True, torch.device("cpu")):
        assert began.wait(60)
        assert not ended.is_set()
        release.set()
    assert ended.is_set()


def test_what_fails_beside_the_compiler_does_not_wait_for_it(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(compiler, "compile_options", lambda _: release.wait(60))
    with pytest.raises(KeyError), compiler.compiling_ahead(True, torch.device("cpu")):
        raise KeyError
    assert not release.is_set()
    release.set()
    with compiler.compiling_ahead(False, torch.device("cpu")):
        assert threading.active_count() >= 1  # nobody was asked: nothing to wait for


def test_the_guess_that_a_run_will_be_compiled_is_that_of_its_model():
    path = Path(__file__).parent.parent / "configs" / "quickstart.toml"
    config = validate(RunConfig, {str(path): tomllib.loads(path.read_text())})
    cpu = torch.device("cpu")
    with FakeTensorMode():
        shape = config.model.model_copy(update={"vocab_size": 4096})
        tokens = torch.zeros(1, shape.context_length, dtype=torch.long)
        facts = probe(GPT(shape), Batch(tokens, tokens))
    run_tokens = config.training.num_steps * config.data.batch_size * shape.context_length
    exact = facts.flops_per_token * run_tokens
    assert _run_flops(config) == pytest.approx(exact, rel=0.05)
    assert compiler.worth_compiling("auto", cpu, exact)
    short = RunConfig(training={"num_steps": 10})
    assert not compiler.worth_compiling("auto", cpu, _run_flops(short))
    assert not compiler.worth_compiling("off", cpu, exact)
    assert compiler.worth_compiling("on", cpu, 0.0)


def test_auto_compiles_long_runs_only(bigram, windows):
    short = Trainer(bigram(), TrainingConfig(num_steps=10), sinks=[])
    short.prepare(windows())
    assert short.config.compile == "off"
    assert {short.config.precision, short.config.deterministic} <= {"bfloat16", "float32", "on"}
