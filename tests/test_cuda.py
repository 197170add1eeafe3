"""What only a CUDA device can show; without one, each test says so."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig
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
