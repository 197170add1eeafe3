"""Which attention a module of the user's gets: on a CPU in bfloat16, plain products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from truestep import Batch, Trainer, TrainingConfig
from truestep.training.footprint import footprint

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


class OneLayer(nn.Module):
    """A model that attends by torch's own function, as most do."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 11)
        self.checkpointed = checkpointed

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + y.transpose(1, 2).flatten(2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)
        return self.head(x)


def step(windows, model=None, **settings):
    trainer = Trainer(model or OneLayer(), TrainingConfig(**settings), sinks=[])
    return trainer.training_step(windows(seed=1))


def ops_of_a_step(windows, **settings):
    trainer = Trainer(OneLayer(), TrainingConfig(**settings), sinks=[])
    trainer.training_step(windows())  # the first looks at the model, and may compile
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.training_step(windows(seed=1))
    return {event.name for event in profiled.events()}


def flags():
    return (
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def test_a_bfloat16_step_on_a_cpu_attends_by_plain_products(windows):
    before = flags()
    assert FUSED not in ops_of_a_step(windows, precision="bfloat16")
    assert flags() == before
    assert FUSED in ops_of_a_step(windows, precision="float32")


def test_a_context_that_is_too_long_for_them_keeps_the_fused_kernel(windows, monkeypatch):
    monkeypatch.setattr("truestep.runtime.PLAIN_ATTENTION_KEYS", 7)
    assert FUSED in ops_of_a_step(windows, precision="bfloat16")


def gradients(windows, **how):
    """The gradients of a first step, by name, as seen before the update."""
    model = OneLayer()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = TrainingConfig(max_grad_norm="off", **how)
    Trainer(model, config, optimizer=optimizer, sinks=[]).training_step(windows(seed=1))
    return {name: start[name] - p.detach() for name, p in model.named_parameters()}


def test_the_gradients_are_those_of_the_fused_kernel_up_to_rounding(windows):
    exact = gradients(windows, precision="float32")
    plain = gradients(windows, precision="bfloat16")
    for name, gradient in exact.items():
        assert (plain[name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_kernels_that_the_caller_has_chosen_stay(windows):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert FUSED in ops_of_a_step(windows, precision="bfloat16")


def test_activations_that_are_computed_again_attend_in_the_same_way(windows):
    plain = step(windows, precision="bfloat16")
    again = step(windows, OneLayer(checkpointed=True), precision="bfloat16")
    assert (again.loss, again.grad_norm) == (plain.loss, plain.grad_norm)
    assert footprint(OneLayer(checkpointed=True), Batch.of(windows()), 4, "bfloat16").total > 0


@pytest.mark.xdist_group("compile")
def test_compiled_it_is_the_same_whatever_the_compiler_has_in_its_cache(windows, monkeypatch):
    before = flags()
    with monkeypatch.context() as patch:
        patch.setattr("truestep.runtime.PLAIN_ATTENTION_KEYS", 7)
        assert FUSED in ops_of_a_step(windows, precision="bfloat16", compile="on")
    torch.compiler.reset()  # what is left is the cache on disk
    assert FUSED not in ops_of_a_step(windows, precision="bfloat16", compile="on")
    assert flags() == before
    eager = step(windows, precision="bfloat16", compile="off")
    compiled = step(windows, precision="bfloat16", compile="on")
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-3)
