"""What only a CUDA device can show; without one, each test says so."""

import pytest
import torch

from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def trainer():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, num_layers=2, num_heads=2, width=64, context_length=32))
    return Trainer(model, TrainingConfig(micro_batch_size=4), device="cuda", sinks=[])


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(65, (8, 33), generator=generator)
    return Batch.of(ids)


def test_a_step_never_waits_for_the_device(trainer):
    for seed in range(2):
        trainer.training_step(batch(seed))
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [trainer._step(batch(seed)) for seed in range(2, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < step.numbers.read()["loss"] < 10 for step in launched)


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
