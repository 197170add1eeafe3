"""What only a CUDA device can show; without one, each test says so."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig
from truestep.cli import main
from truestep.model.gpt import DEFERRED_VOCAB_SIZE
from truestep.training.optim import skips_on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=[65, DEFERRED_VOCAB_SIZE])
def trainer(request):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=request.param, num_layers=2, num_heads=2, width=64, context_length=32
    )
    model = GPT(config)
    return Trainer(model, TrainingConfig(micro_batch_size=4), device="cuda", sinks=[])


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(65, (8, 33), generator=generator)
    return Batch.of(ids)


class Pinned:
    """Batches in memory that is copied from asynchronously, as a prefetching run has them."""

    def batch_at(self, step):
        given = batch(step)
        return Batch(given.tokens.pin_memory(), given.targets.pin_memory())


def test_a_step_never_waits_for_the_device(trainer):
    for seed in range(2):
        trainer.training_step(batch(seed))
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [trainer._launch(batch(seed)) for seed in range(2, 5)]
        trainer.fit(Pinned(), num_steps=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < step.numbers.read()["loss"] < 10 for step in launched)


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_the_step_agrees_with_that_of_a_cpu(trainer, compile_):
    start = {name: tensor.cpu().clone() for name, tensor in trainer.model.state_dict().items()}
    config = trainer.config.model_copy(update={"precision": "float32", "compile": compile_})
    found = Trainer(trainer.model, config, device="cuda", sinks=[]).training_step(batch(0))
    model = GPT(trainer.model.config)
    model.load_state_dict(start)
    expected = Trainer(model, config, device="cpu", sinks=[]).training_step(batch(0))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


def test_fit_ahead_of_the_device_gives_the_numbers_of_single_steps(trainer):
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    single = [trainer.training_step(batch(seed)) for seed in range(6)]

    class Keep:
        def __init__(self):
            self.losses = []

        def write(self, record):
            self.losses.append(record["loss"])

        def close(self):
            pass

    trainer.model.load_state_dict(start)
    keep = Keep()
    again = Trainer(trainer.model, trainer.config, device="cuda", sinks=[keep])
    again.fit([batch(seed) for seed in range(6)], num_steps=6)
    assert keep.losses == pytest.approx([metrics.loss for metrics in single], rel=1e-5)


def test_attention_is_fused_and_so_is_the_optimizer(trainer):
    assert trainer.precision == "bfloat16"
    assert skips_on_device(trainer.optimizer)
    trainer.training_step(batch(0))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.training_step(batch(1))
    names = {event.name for event in profiled.events()}
    assert names & {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }


def test_a_compiled_step_is_one_graph_and_compiled_once(trainer, recwarn):
    config = trainer.config.model_copy(update={"compile": "on"})
    compiled = Trainer(trainer.model, config, device="cuda", sinks=[])
    compiled.training_step(batch(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            compiled.training_step(batch(seed))
            compiled.evaluate([batch(seed)])
    assert not [warning for warning in recwarn if "runs uncompiled" in str(warning.message)]


@pytest.fixture
def little_memory():
    """A process that may take a hundredth of the device: more ends in a real error."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_memory_that_truly_ends_splits_the_step_and_leaves_no_trace(little_memory):
    config = GPTConfig(vocab_size=512, num_layers=4, num_heads=4, width=256, context_length=256)
    settings = TrainingConfig(deterministic="on", micro_batch_size=1024)
    generator = torch.Generator().manual_seed(0)
    large = Batch.of(torch.randint(512, (1024, 257), generator=generator))
    torch.manual_seed(0)
    trainer = Trainer(GPT(config), settings, device="cuda", sinks=[])
    with pytest.warns(UserWarning, match="the memory of cuda ended in step 1 with"):
        metrics = trainer.training_step(large)
    size = trainer.config.micro_batch_size
    assert size < 1024
    torch.manual_seed(0)
    smaller = settings.model_copy(update={"micro_batch_size": size})
    other = Trainer(GPT(config), smaller, device="cuda", sinks=[])
    assert other.training_step(large).loss == metrics.loss
    pairs = zip(trainer.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


TINY = """
[training]
num_steps = 8
micro_batch_size = 3
deterministic = "on"
[model]
context_length = 32
num_layers = 2
num_heads = 2
width = 64
dropout = 0.1
[data]
batch_size = 4
[run]
device = "cuda"
evaluate_every = 4
save_every = 4
log_every = 1
sample_tokens = 4
"""


@pytest.mark.parametrize("compile_", ["off", "on"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-512"])
def test_a_run_resumes_and_replays_with_the_same_bits(tmp_path, monkeypatch, compile_, tokenizer):
    """Law 19, on one GPU with deterministic algorithms."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{n} sheep, {n * n} goats\n" for n in range(4000)))
    Path("tiny.toml").write_text(TINY)
    settings = ["--training.compile", compile_, "--data.tokenizer", tokenizer]
    for name in ("one", "two"):
        assert (
            main(["train", "tiny.toml", "--data", "text.txt", "--run.name", name, *settings]) == 0
        )
    one, two = Path("runs/one"), Path("runs/two")
    assert main(["replay", str(one), "--step", "1", "--to", "8"]) == 0
    shutil.rmtree(two / "checkpoints/step-8")
    assert main(["train", "--resume", str(two)]) == 0
    for checkpoint in ("step-4", "step-8"):
        weights = [run / "checkpoints" / checkpoint / "model.safetensors" for run in (one, two)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_plan_measures_the_device_and_says_which_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a b c d e f g h i j\n" * 2000)
    Path("tiny.toml").write_text(TINY)
    assert main(["plan", "tiny.toml", "--data", "text.txt"]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
