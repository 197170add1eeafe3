"""One layer compiled for all: it agrees with the eager step, keeps its bits, leaves no trace."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from truestep import GPT, GPTConfig, Trainer, TrainingConfig, load_checkpoint, save_checkpoint
from truestep.compiler import compile_options
from truestep.model.gpt import DEFERRED_VOCAB_SIZE

pytestmark = pytest.mark.xdist_group("compile")

VOCAB_SIZE = 11


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.dropout(torch.relu(self.linear(x)))


class Stack(nn.Module):
    """A user's model that names its parts: three alike, and one of another class."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCAB_SIZE, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.head = nn.Linear(8, VOCAB_SIZE)

    def compiled_parts(self):
        return [*self.layers, self.norm]

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = self.run(layer, x)
        return self.head(self.norm(x))

    def run(self, layer, x):
        return layer(x=x)


class Checkpointed(Stack):
    """The same, with each layer's forward made once more in backward."""

    def run(self, layer, x):
        return checkpoint(layer, x, use_reentrant=False)


class Shared(Stack):
    """The same, with one layer in all places."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 3)


def stack(kind=Stack):
    torch.manual_seed(0)
    return kind()


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            vocab_size=VOCAB_SIZE, num_layers=3, num_heads=2, width=16, context_length=8, **changes
        )
    )


def trained(model, windows, compile_, steps=4, between=lambda trainer: None):
    config = TrainingConfig(
        compile=compile_, precision="float32", micro_batch_size=2, num_steps=steps
    )
    trainer = Trainer(model, config, sinks=[])
    losses = []
    for step in range(steps):
        losses.append(trainer.training_step(windows(seed=step)).loss)
        between(trainer)
    return losses


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "qk_norm": True}], ids=str)
def test_each_class_is_compiled_once_and_the_step_agrees_with_the_eager_one(windows, changes):
    eager_model, model = gpt(**changes), gpt(**changes)
    eager = trained(eager_model, windows, "off")
    compile_options(torch.device("cpu"))  # its probe is a graph, too
    counters.clear()
    assert trained(model, windows, "layers") == pytest.approx(eager, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 3  # a layer, the norm and the loss
    for mine, theirs in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_head_left_to_the_loss_is_compiled_with_it(windows):
    def of(compile_):
        torch.manual_seed(0)
        shape = {"num_layers": 2, "num_heads": 1, "width": 8, "context_length": 8}
        model = GPT(GPTConfig(vocab_size=DEFERRED_VOCAB_SIZE, **shape))
        return trained(model, windows, compile_, steps=2)

    assert of("layers") == pytest.approx(of("off"), rel=1e-5)


def test_layers_draw_dropout_of_their_own_and_backward_uses_the_same(windows):
    """Of a layer that adds dropout(1), the bias's gradient at a place is 0 where it dropped."""
    model, outputs = stack(), []
    for layer in model.layers:
        nn.init.zeros_(layer.linear.weight)
        nn.init.ones_(layer.linear.bias)
        layer.register_forward_hook(
            lambda _, args, kwargs, out: outputs.append((out - kwargs["x"]).detach()),
            with_kwargs=True,
        )
    trainer = Trainer(model, TrainingConfig(compile="layers", precision="float32"), sinks=[])
    trainer.prepare(windows())
    outputs.clear()
    trainer.training_step(windows())
    kept = [output > 0.5 for output in outputs]
    assert len(kept) == 3
    assert all(0.5 < mask.float().mean() < 0.9 for mask in kept)
    assert not any(torch.equal(a, b) for a, b in combinations(kept, 2))


def test_a_layer_that_backward_runs_again_drops_the_same(windows):
    assert trained(stack(Checkpointed), windows, "layers") == trained(stack(), windows, "layers")


def test_a_layer_in_several_places_is_put_back(windows):
    model = stack(Shared)
    trained(model, windows, "layers", steps=1)
    assert "forward" not in vars(model.layers[0])


def test_a_layer_that_comes_later_is_compiled_too(windows):
    class Later(Layer):
        def forward(self, x):
            assert torch.compiler.is_compiling()
            return super().forward(x)

    model = stack()
    trainer = Trainer(model, TrainingConfig(compile="layers"), sinks=[])
    trainer.prepare(windows())
    model.layers[1].__class__ = Later
    trainer.training_step(windows())


def test_evaluation_runs_uncompiled_and_leaves_the_bits_of_training(windows):
    def disturb(trainer):
        with torch._dynamo.config.patch(error_on_recompile=True):
            trainer.evaluate([windows(7, 5, seed=50)])  # another shape than training's
        assert not any("forward" in vars(module) for module in trainer.model.modules())
        torch.rand(3)

    assert trained(stack(), windows, "layers") == trained(
        stack(), windows, "layers", between=disturb
    )


def test_a_run_resumes_bit_for_bit(windows, tmp_path):
    config = TrainingConfig(compile="layers", micro_batch_size=3)
    whole = Trainer(stack(), config, sinks=[])
    for step in range(4):
        if step == 2:
            save_checkpoint(whole, tmp_path)
        whole.training_step(windows(seed=step))
    torch.compiler.reset()
    again = Trainer(stack(), config, sinks=[])
    load_checkpoint(tmp_path / "step-2", again)
    for step in (2, 3):
        again.training_step(windows(seed=step))
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_hooks_on_a_layer_run_and_a_forward_of_its_own_is_kept(windows):
    model, seen = stack(), []
    model.layers[0].register_forward_hook(lambda *_: seen.append("hook"))
    own = model.layers[1].forward = lambda x: seen.append("own") or x
    trainer = Trainer(model, TrainingConfig(compile="layers"), sinks=[])
    trainer.training_step(windows())
    assert seen[-2:] == ["hook", "own"]
    assert vars(model.layers[1])["forward"] is own


def test_a_step_that_fails_leaves_the_layers_as_they_were(windows, monkeypatch):
    model = stack()
    trainer = Trainer(model, TrainingConfig(compile="layers"), sinks=[])
    trainer.prepare(windows())

    def fail(*_):
        raise RuntimeError("no head")

    monkeypatch.setattr(model.head, "forward", fail)
    with pytest.raises(RuntimeError, match="no head"):
        trainer.training_step(windows())
    assert not any("forward" in vars(module) for module in (*model.layers, model.norm))


class Empty(Stack):
    def compiled_parts(self):
        return []


def test_a_model_that_names_no_layers_is_told_what_serves(bigram, windows):
    # What is compiled already has the names of what it wraps, and no layers to compile.
    for model in (bigram(), stack(Empty), torch.compile(stack())):
        trainer = Trainer(model, TrainingConfig(compile="layers"), sinks=[])
        with pytest.raises(ValueError, match=r"compile=layers, but \w+ has .* use compile=on"):
            trainer.training_step(windows())


def test_layers_that_differ_run_uncompiled_from_the_ninth_on_and_say_whose(windows):
    model = stack()
    for index, layer in enumerate(model.layers):
        layer.dropout.p = index / 10
    trainer = Trainer(model, TrainingConfig(compile="layers"), sinks=[])
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match="kinds of layers, were compiled: Layer runs uncompiled"),
    ):
        trainer.training_step(windows())


def test_auto_compiles_the_layers_of_a_run_of_minutes(windows):
    model = gpt()
    trainer = Trainer(model, TrainingConfig(num_steps=10**8), sinks=[])
    trainer.prepare(windows())
    flops = trainer.facts.flops_per_token * windows()[:, 1:].numel()
    for wanted, arithmetic in (("off", 1e13), ("layers", 2e13), ("on", 2e14)):
        config = TrainingConfig(num_steps=int(arithmetic / flops))
        trainer = Trainer(model, config, sinks=[])
        trainer.prepare(windows())
        assert trainer.config.compile == wanted
