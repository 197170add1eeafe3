"""The compiled step: it agrees with the eager one, keeps its bits, and falls back by itself."""

import platform
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from truestep import (
    GPT,
    IGNORE_INDEX,
    Batch,
    GPTConfig,
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
from truestep.workflows.resources import run_flops


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


class Doubling(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Quadrupling(Doubling):
    @staticmethod
    def backward(ctx, grad):
        return grad * 4


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_was_compiled_is_found_again_and_a_changed_backward_is_not_taken_for_it(
    precision, bigram, windows
):
    class Model(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.inner, self.function = bigram(), function

        def forward(self, tokens):
            return self.function.apply(self.inner(tokens))

    def gradient_norm(function):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        config = TrainingConfig(compile="on", precision=precision)
        norm = Trainer(Model(function), config, sinks=[]).training_step(windows()).grad_norm
        return norm, torch._dynamo.utils.counters["aot_autograd"]

    first, _ = gradient_norm(Doubling)
    again, counts = gradient_norm(Doubling)
    assert again == first
    assert counts["autograd_cache_bypass"] == 0
    assert counts["autograd_cache_hit"] > 0
    changed, _ = gradient_norm(Quadrupling)
    assert changed == pytest.approx(2 * first)


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


def test_transposed_matrices_in_one_kernel_are_those_of_torch():
    # g++ 12 with AVX-512 made of two of them whatever lay in memory.
    x = torch.randn(2, 512, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()

    def transposed(x):
        return [x[:, :end].permute(0, 2, 3, 1).contiguous() for end in (128, 256, 384)]

    found = compiler.compiled(transposed, torch.device("cpu"))(x)
    for one, other in zip(found, transposed(x), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_step_over_long_windows_in_bfloat16_is_the_eager_one():
    shape = GPTConfig(vocab_size=64, context_length=512, num_layers=1, num_heads=2, width=64)
    tokens = torch.randint(64, (2, 513), generator=torch.Generator().manual_seed(0))
    steps = []
    for setting in ("on", "off"):
        torch.manual_seed(0)
        config = TrainingConfig(compile=setting, precision="bfloat16")
        steps.append(Trainer(GPT(shape), config, sinks=[]).training_step(Batch.of(tokens)))
    one, other = steps
    assert one.loss == pytest.approx(other.loss, abs=1e-4)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "march"), [(None, "native"), ("", "x86-64"), ("haswell", "haswell")]
)
def test_what_the_environment_says_of_the_processor_is_kept(monkeypatch, asked, march):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with torch._inductor.config.patch({"cpp.march": asked}):
        assert compiler._exact_options(cpu) == {"cpp.march": f"{march} -fno-dse"}
        assert compiler._exact_options(cuda) == {}
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        assert compiler._exact_options(cpu) == {}


def test_a_compiler_that_does_not_know_the_vectors_is_asked_without_them(monkeypatch):
    asked = []

    def compile_(function, options):
        asked.append(options)
        if "cpp.vec_isa_ok" in options:
            raise RuntimeError("unrecognized command-line option")
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    compile_options = compiler.compile_options.__wrapped__  # not its cache
    exact = compiler._exact_options(torch.device("cpu"))
    assert compile_options(torch.device("cpu")) == exact
    assert asked == [exact | {"cpp.vec_isa_ok": True}, exact]

    def refuse(function, options):
        if options:
            raise RuntimeError("unknown argument: '-fno-dse'")

    monkeypatch.setattr(torch, "compile", lambda f, options: refuse(f, options) or f)
    assert compile_options(torch.device("cpu")) == {}
    monkeypatch.setattr(torch, "compile", lambda _, options: compile_(None, {"cpp.vec_isa_ok": 1}))
    assert compile_options(torch.device("cpu")) is None


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """Let a process of its own write a file where torch keeps its headers, once it is told to."""
    monkeypatch.setattr(
        "torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: tmp_path
    )
    probe = f"""
import pathlib, time
place = pathlib.Path({str(tmp_path)!r})
(place / "began").touch()
for _ in range(2000):
    if (place / "go").exists():
        break
    time.sleep(0.01)
(place / "precompiled_headers").mkdir()
"""
    monkeypatch.setattr(compiler, "_PROBE", probe)
    return tmp_path


def appears(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


linux = pytest.mark.skipif(sys.platform != "linux", reason="headers are compiled ahead on Linux")


@linux
def test_headers_are_compiled_beside_the_text_and_waited_for_once(headers):
    with compiler.headers_ahead():
        assert appears(headers / "began")
        assert not (headers / "precompiled_headers").exists()
        (headers / "go").touch()
    assert (headers / "precompiled_headers").exists()
    (headers / "began").unlink()
    with compiler.headers_ahead():
        pass
    assert not (headers / "began").exists()


@linux
def test_what_fails_beside_the_headers_ends_their_process(headers):
    def fails_beside():
        with compiler.headers_ahead():
            assert appears(headers / "began")
            raise KeyError

    with pytest.raises(KeyError):
        fails_beside()
    (headers / "go").touch()
    time.sleep(0.1)
    assert not (headers / "precompiled_headers").exists()


@linux
def test_headers_that_take_too_long_are_not_waited_for(headers, monkeypatch):
    monkeypatch.setattr(compiler, "_LONGEST_SECONDS", 0.1)
    with compiler.headers_ahead():
        assert appears(headers / "began")
    (headers / "go").touch()
    time.sleep(0.1)
    assert not (headers / "precompiled_headers").exists()


@linux
def test_no_file_of_the_users_is_run_beside_the_text(headers, monkeypatch):
    (headers / "here").mkdir()
    (headers / "here" / "signal.py").write_text("raise SystemExit")
    monkeypatch.chdir(headers / "here")
    (headers / "go").touch()
    with compiler.headers_ahead():
        pass
    assert (headers / "precompiled_headers").exists()


@linux
def test_the_headers_process_ends_with_one_that_is_killed(tmp_path):
    script = f"""
import pathlib, time
from truestep import compiler
import torch._inductor.runtime.cache_dir_utils as directories
directories.default_cache_dir = lambda: {str(tmp_path)!r}
compiler._PROBE = '''
import os, pathlib, time
pathlib.Path({str(tmp_path / "new")!r}).write_text(str(os.getpid()))
pathlib.Path({str(tmp_path / "new")!r}).rename({str(tmp_path / "began")!r})
time.sleep(100)
'''
with compiler.headers_ahead():
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        assert appears(tmp_path / "began")
        parent.kill()
    status = Path("/proc", (tmp_path / "began").read_text(), "status")
    deadline = time.monotonic() + 30
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


SHAPES = [
    {},
    {"vocab_size": 50304},
    {"mlp_width": 1024},
    {"num_kv_heads": 1},
    {"tie_embeddings": False, "width": 64},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_arithmetic_of_a_run_is_known_before_its_model(changes):
    path = Path(__file__).parent.parent / "configs" / "quickstart.toml"
    config = validate(RunConfig, {str(path): tomllib.loads(path.read_text())})
    config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    shape = config.model.model_copy(update={"vocab_size": changes.get("vocab_size", 4096)})
    with FakeTensorMode():
        tokens = torch.zeros(1, shape.context_length, dtype=torch.long)
        facts = probe(GPT(shape), Batch(tokens, tokens))
    run_tokens = config.training.num_steps * config.data.batch_size * shape.context_length
    assert run_flops(config) == pytest.approx(facts.flops_per_token * run_tokens, rel=0.01)


@pytest.mark.parametrize(
    ("setting", "device", "has_layers", "expected"),
    [
        ("auto", "cpu", False, ["off", "off", "on", "on"]),
        ("auto", "cpu", True, ["off", "layers", "layers", "on"]),
        ("auto", "cuda", True, ["off", "off", "off", "off"]),  # from 1e16 on
        ("auto", "mps", True, ["off"] * 4),
        ("on", "cpu", True, ["on"] * 4),
        ("layers", "cpu", True, ["layers"] * 4),
        ("off", "cpu", True, ["off"] * 4),
    ],
)
def test_what_is_worth_compiling(setting, device, has_layers, expected):
    found = [
        compiler.worth_compiling(setting, torch.device(device), flops, has_layers=has_layers)
        for flops in (1e13, 2e13, 3e13, 2e14)
    ]
    assert found == expected


def test_auto_compiles_long_runs_only(bigram, windows):
    short = Trainer(bigram(), TrainingConfig(num_steps=10), sinks=[])
    short.prepare(windows())
    assert short.config.compile == "off"
    assert {short.config.precision, short.config.deterministic} <= {"bfloat16", "float32", "on"}
