"""A number that is not finite is put somewhere, and the diagnosis must name that place."""

import gc
import json
import math
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig, compute_loss
from truestep.model.gpt import DEFERRED_VOCAB_SIZE
from truestep.runtime import computing, seeded
from truestep.training.diagnosis import Diagnosis, diagnose
from truestep.training.probe import logits_of
from truestep.training.watch import Watch

CPU = torch.device("cpu")
SHAPE = {"context_length": 8, "num_layers": 2, "num_heads": 2, "width": 8, "dropout": 0.1}


def gpt(seed=0, vocab_size=11, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT(GPTConfig(vocab_size=vocab_size, **(SHAPE | changes)))


def shares_of_loss(model, windows, *, size=2, precision="float32", loss=compute_loss):
    """The micro-batches of a step as a trainer runs them."""
    batch = Batch.of(windows)

    def share(part):
        with seeded(CPU, 0, 0, part.index):
            with computing(precision, CPU):
                logits = logits_of(model(part.tokens))
            return loss(logits, part.targets, num_tokens=batch.num_targets)

    return [(part.index, lambda part=part: share(part)) for part in batch.split(size)]


def places(model):
    """The name and class of every module that is ever called."""
    modules = model.named_modules()
    return [(name, type(m).__name__) for name, m in modules if not isinstance(m, nn.ModuleList)]


def on_call(number, change):
    """A hook that changes what it is given at one call only."""
    calls = []

    def hook(*arguments):
        calls.append(1)
        return change(arguments[-1]) if len(calls) == number else None

    return hook


def calls_of(model, place, tokens):
    """How often one forward calls a module."""
    calls = []
    handle = model.get_submodule(place).register_forward_hook(lambda *_: calls.append(1))
    model(tokens)
    handle.remove()
    return len(calls)


def spoiled(output, value=math.nan):
    """A copy of the output in which one number is `value`."""
    if isinstance(output, tuple):
        return tuple(spoiled(item, value) for item in output)
    output = output.clone()
    output.view(-1)[-1] = value
    return output


class SpoilGradient(torch.autograd.Function):
    """The identity, with a backward that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Identity(torch.autograd.Function):
    """The identity, as a node that a weak reference can follow."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def parameters_before(model, place, tokens):
    """The names of the parameters that a module's output depends on."""
    outputs = []
    handle = model.get_submodule(place).register_forward_hook(lambda *call: outputs.append(call[2]))
    model(tokens)
    handle.remove()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(outputs[0].sum(), list(named.values()), allow_unused=True)
    return tuple(name for name, g in zip(named, gradients, strict=True) if g is not None)


class Sequence(nn.Module):
    """A Bigram whose middle is given."""

    def __init__(self, *middle, vocab_size=11, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.middle = nn.Sequential(*middle)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.head(self.middle(self.embedding(tokens)))


class Do(nn.Module):
    """A module without submodules that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs, **named):
        return self.function(*inputs, **named)


# Nothing wrong.


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_size", [11, DEFERRED_VOCAB_SIZE])
def test_a_finite_step_is_not_reproduced(windows, vocab_size, precision):
    model = gpt(vocab_size=vocab_size)
    found = diagnose(model, shares_of_loss(model, windows(), precision=precision))
    assert found == Diagnosis("not reproduced", "", "", -1, ())


def test_a_step_under_diagnosis_is_the_plain_step_bit_for_bit(windows):
    model, seen = gpt(dropout=0.5), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model.register_forward_hook(lambda *call: seen.append(call[2].detach().clone()))
    # Without a seed of their own: a diagnosis that drew a number would shift every later mask.
    batch = windows(6)

    def share(row):
        return compute_loss(model(batch[row : row + 2, :-1]), batch[row : row + 2, 1:])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        for row in (0, 2, 4):
            share(row).backward()
        plain, plain_state = list(seen), torch.get_rng_state()
        seen.clear()
        torch.manual_seed(0)
        model.zero_grad()
        diagnose(model, [(row, lambda row=row: share(row)) for row in (0, 2, 4)])
        assert torch.equal(torch.get_rng_state(), plain_state)
    assert len(plain) == len(seen) == 3 * (1 + len(list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def test_a_forward_that_is_poisoned_only_once_is_not_reproduced(bigram, windows):
    model = bigram()
    model.norm.register_forward_hook(on_call(1, spoiled))
    steps = shares_of_loss(model, windows(2))
    assert diagnose(model, steps).module == "norm"
    assert diagnose(model, steps).phase == "not reproduced"


def test_a_bad_value_that_reaches_neither_loss_nor_gradient_spoils_no_step(windows):
    model = Sequence(Do(lambda x: (x, x.detach() * math.nan)), Do(lambda pair: pair[0]))
    assert diagnose(model, shares_of_loss(model, windows())).phase == "not reproduced"


def test_a_harmless_value_is_forgotten_before_the_next_micro_batch(windows):
    harmless = Do(lambda x: (x, x.detach() * 1.0))
    harmless.register_forward_hook(on_call(1, lambda pair: (pair[0], pair[1] / 0)))
    model = Sequence(harmless, Do(lambda pair: pair[0]))
    model.head.register_forward_hook(on_call(2, SpoilGradient.apply))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module, found.micro_batch) == ("backward", "head", 2)


# Parameters.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_bad_already_are_named_before_anything_runs(windows, value):
    model = gpt()
    with torch.no_grad():
        model.layers[1].mlp.up.weight[3, 2] = value
        model.norm.weight[0] = value
    named = ("layers.1.mlp.up.weight", "norm.weight")
    ran = [(0, lambda: pytest.fail("it ran"))]
    assert diagnose(model, ran) == Diagnosis("parameters", "layers.1.mlp.up", "Linear", -1, named)


def test_buffers_that_are_bad_already_are_named_unless_they_are_masks(windows):
    model = Sequence(nn.BatchNorm1d(8))
    model.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))
    assert diagnose(model, []).phase == "not reproduced"
    model.middle[0].running_var[2] = math.inf
    named = ("middle.0.running_var",)
    assert diagnose(model, []) == Diagnosis("parameters", "middle.0", "BatchNorm1d", -1, named)


def test_float8_tensors_are_looked_at_too(windows):
    model = Sequence()
    model.register_buffer("scales", torch.ones(3).to(torch.float8_e4m3fn))
    assert diagnose(model, shares_of_loss(model, windows())).phase == "not reproduced"
    model.scales = torch.full((3,), math.nan).to(torch.float8_e4m3fn)
    assert diagnose(model, []).parameters == ("scales",)


# Forward.


@pytest.mark.parametrize(("place", "kind"), places(gpt(qk_norm=True)))
def test_every_module_of_the_reference_model_is_named_when_its_output_is_bad(windows, place, kind):
    model, batch = gpt(qk_norm=True), windows(6)
    second = calls_of(model, place, batch[:, :-1]) + 1  # the first call in the second micro-batch
    model.get_submodule(place).register_forward_hook(on_call(second, spoiled))
    found = diagnose(model, shares_of_loss(model, batch))
    assert (found.phase, found.module, found.kind, found.micro_batch) == ("forward", place, kind, 2)


@pytest.mark.parametrize("place", ["layers.0.mlp.gate", "norm", ""])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_left_to_the_loss_hide_no_module(windows, place, precision):
    model = gpt(vocab_size=DEFERRED_VOCAB_SIZE)
    model.get_submodule(place).register_forward_hook(on_call(1, spoiled_first))
    found = diagnose(model, shares_of_loss(model, windows(), precision=precision))
    assert (found.phase, found.module, found.micro_batch) == ("forward", place, 0)


def spoiled_first(output):
    if isinstance(output, torch.Tensor):
        return spoiled(output)
    return output._replace(hidden=spoiled(output.hidden))


def test_a_module_that_divides_by_zero_is_named_and_not_those_after_it(windows):
    model = Sequence(nn.Linear(8, 8), Do(lambda x: x / (x - x).abs()), nn.LayerNorm(8))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module, found.kind) == ("forward", "middle.1", "Do")
    assert found.parameters == tuple(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("by_keyword", [False, True])
def test_an_operation_between_two_modules_belongs_to_the_module_around_them(windows, by_keyword):
    class Between(Sequence):
        def forward(self, tokens):
            x = self.middle(self.embedding(tokens)) * math.inf
            return self.head(input=x) if by_keyword else self.head(x)

    model = nn.Sequential(Between(nn.Linear(8, 8)))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module, found.kind) == ("forward", "0", "Between")


def test_a_module_that_spoils_its_input_in_place_is_named(windows):
    def spoil(x):
        x[..., 0] = math.inf
        return x

    model = Sequence(nn.Linear(8, 8), Do(spoil), nn.ReLU(inplace=True))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module) == ("forward", "middle.1")


class Pair(NamedTuple):
    first: torch.Tensor
    rest: dict


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x: (0, [x]), lambda y: y[1][0]),
        (lambda x: {"a": None, "b": x}, lambda y: y["b"]),
        (lambda x: Pair(x[..., :4], {"x": x[..., 4:]}), lambda y: torch.cat([y[0], y[1]["x"]], -1)),
        (WithLogits, lambda y: y.logits),
    ],
)
def test_values_are_found_in_whatever_a_module_returns_or_takes(windows, pack, unpack):
    """The bad one is made in front of, at, or behind the packing module; by name each time."""
    for spoil_at in range(3):
        steps = [nn.Linear(8, 8), Do(pack), Do(lambda y: unpack(y) * 1.0), nn.Linear(8, 8)]
        steps[spoil_at].register_forward_hook(on_call(1, lambda y: spoiled_in(y, math.inf)))
        model = Sequence(*steps)
        found = diagnose(model, shares_of_loss(model, windows()))
        assert (found.phase, found.module) == ("forward", f"middle.{spoil_at}")


def spoiled_in(output, value):
    if isinstance(output, WithLogits):
        return WithLogits(spoiled(output.logits, value))
    if isinstance(output, Pair):
        return Pair(output.first, {"x": spoiled(output.rest["x"], value)})
    if isinstance(output, dict):
        return output | {"b": spoiled(output["b"], value)}
    if isinstance(output, tuple):
        return output[0], [spoiled(output[1][0], value)]
    return spoiled(output, value)


@pytest.mark.parametrize("place", ["encoder.linear1", "encoder.norm2", "encoder"])
def test_a_mask_of_minus_infinity_is_no_bad_output_and_no_bad_input(windows, place):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.mask = Do(nn.Transformer.generate_square_subsequent_mask)

        def forward(self, tokens):
            mask = self.mask(tokens.shape[1])
            return self.head(self.encoder(self.embedding(tokens), src_mask=mask))

    model = Masked()
    assert diagnose(model, shares_of_loss(model, windows())).phase == "not reproduced"
    model.get_submodule(place).register_forward_hook(on_call(2, spoiled))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module, found.micro_batch) == ("forward", place, 2)


def test_minus_infinity_from_a_module_that_learns_is_no_mask(windows):
    model = Sequence(nn.Linear(8, 8), Do(lambda x: (x * 0.0).log()), nn.LayerNorm(8))
    assert diagnose(model, shares_of_loss(model, windows())).module == "middle.1"


@pytest.mark.parametrize("in_hook", [False, True])
def test_a_module_whose_exception_was_caught_does_not_count_as_running(windows, in_hook):
    def refuse(*_):
        raise RuntimeError("no")

    class Careful(Sequence):
        def forward(self, tokens):
            x = self.embedding(tokens)
            try:
                x = self.middle(x)
            except RuntimeError:
                x = SpoilGradient.apply(x)
            return self.head(x)

    model = Careful(Do(torch.relu if in_hook else refuse))
    if in_hook:
        model.middle[0].register_forward_pre_hook(refuse)
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module, found.kind) == ("backward", "", "Careful")


# Loss.


def test_a_loss_that_is_bad_by_itself_is_named_with_the_gradients_it_spoils(bigram, windows):
    def loss(logits, targets, num_tokens):
        return compute_loss(logits, targets, num_tokens=num_tokens) * math.nan

    model = bigram()
    found = diagnose(model, shares_of_loss(model, windows(), loss=loss))
    every_name = tuple(name for name, _ in model.named_parameters())
    assert found == Diagnosis("loss", "", "", 0, every_name)


def test_a_loss_that_is_bad_with_finite_gradients_is_bad_all_the_same(bigram, windows):
    def loss(logits, targets, num_tokens):
        return compute_loss(logits, targets, num_tokens=num_tokens) + math.inf

    found = diagnose(model := bigram(), shares_of_loss(model, windows(), loss=loss))
    assert found == Diagnosis("loss", "", "", 0, ())


def test_the_step_that_the_trainer_skipped_is_the_one_diagnosed(bigram, windows):
    model = bigram()
    with torch.no_grad():
        model.head.weight.fill_(1e38)  # eight of them times a saturated unit overflow
        model.hidden.bias.fill_(100.0)
    config = TrainingConfig(compile="off", precision="float32", micro_batch_size=2)
    assert Trainer(model, config, sinks=[]).training_step(windows()).skipped
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module, found.micro_batch) == ("forward", "head", 0)


# Backward.


@pytest.mark.parametrize(
    ("place", "kind"), [p for p in places(gpt(qk_norm=True)) if p[0] != "rotary"]
)
def test_every_module_of_the_reference_model_is_named_when_its_backward_is_bad(
    windows, place, kind
):
    model, batch = gpt(qk_norm=True), windows(6)
    spoiled_names = parameters_before(model, place, batch[:, :-1])
    second = calls_of(model, place, batch[:, :-1]) + 1
    model.get_submodule(place).register_forward_hook(on_call(second, SpoilGradient.apply))
    found = diagnose(model, shares_of_loss(model, batch))
    assert found == Diagnosis("backward", place, kind, 2, spoiled_names)


@pytest.mark.parametrize("name", [name for name, _ in gpt().named_parameters()])
def test_a_parameters_own_hook_that_spoils_its_gradient_names_its_module(windows, name):
    model = gpt()
    model.get_parameter(name).register_hook(on_call(2, lambda g: g * math.inf))
    found = diagnose(model, shares_of_loss(model, windows(6)))
    place = name.removesuffix(".weight")
    kind = type(model.get_submodule(place)).__name__
    assert found == Diagnosis("backward", place, kind, 2, (name,))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_head_multiplied_out_by_the_loss_still_owns_its_matrix(windows, precision):
    model = gpt(vocab_size=DEFERRED_VOCAB_SIZE)
    model.head.weight.register_hook(lambda g: g * math.nan)
    found = diagnose(model, shares_of_loss(model, windows(), precision=precision))
    assert found == Diagnosis("backward", "head", "Linear", 0, ("head.weight",))


def test_tied_parameters_belong_to_the_first_module_that_has_them(windows):
    model = gpt(tie_embeddings=True)
    model.head.weight.register_hook(lambda g: g * math.nan)
    found = diagnose(model, shares_of_loss(model, windows()))
    assert found == Diagnosis("backward", "embedding", "Embedding", 0, ("embedding.weight",))


def test_the_backward_of_tied_parameters_is_told_apart_by_use(windows):
    for place in ("embedding", "head"):
        model = gpt(tie_embeddings=True, dropout=0.0)
        model.get_submodule(place).register_forward_hook(on_call(1, SpoilGradient.apply))
        assert diagnose(model, shares_of_loss(model, windows())).module == place


def test_a_backward_that_is_bad_in_the_loss_is_of_no_module(bigram, windows):
    def loss(logits, targets, num_tokens):
        return compute_loss(SpoilGradient.apply(logits), targets, num_tokens=num_tokens)

    model = bigram()
    found = diagnose(model, shares_of_loss(model, windows(), loss=loss))
    every_name = tuple(name for name, _ in model.named_parameters())
    assert found == Diagnosis("backward", "", "", 0, every_name)


def test_a_backward_that_is_bad_between_modules_belongs_to_the_module_around_them(windows):
    class Between(Sequence):
        def forward(self, tokens):
            x = SpoilGradient.apply(self.embedding(tokens))
            return self.head(self.middle(x) + x)  # a residual stream

    model = Between(nn.Linear(8, 8))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert found == Diagnosis("backward", "", "Between", 0, ("embedding.weight",))


def test_in_place_operations_and_unknown_outputs_hide_no_backward(windows):
    class Opaque:
        def __init__(self, value):
            self.value = value

    def scale(x):
        x[..., 0] *= 2
        return x.add_(1)

    bad = Do(lambda box: SpoilGradient.apply(box.value).clone())
    model = Sequence(nn.Linear(8, 8), Do(scale), Do(Opaque), bad, nn.ReLU(inplace=True))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module) == ("backward", "middle.3")
    assert found.parameters == ("embedding.weight", "middle.0.weight", "middle.0.bias")


def test_a_module_hook_of_the_user_that_spoils_a_gradient_names_that_module(bigram, windows):
    model = bigram()
    model.norm.register_full_backward_hook(lambda _, inputs, __: (inputs[0] * math.nan,))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert found == Diagnosis("backward", "norm", "LayerNorm", 0, ("embedding.weight",))


def test_of_two_bad_gradients_the_first_in_time_is_named(bigram, windows):
    model = bigram()
    model.head.bias.register_hook(lambda g: g * math.nan)
    model.embedding.register_forward_hook(on_call(1, SpoilGradient.apply))
    found = diagnose(model, shares_of_loss(model, windows()))
    both = ("embedding.weight", "head.bias")
    assert found == Diagnosis("backward", "head", "Linear", 0, both)


def test_a_tensors_hook_that_spoils_its_gradient_names_the_module_that_made_it(windows):
    def hooked(x):
        (y := x * 2).register_hook(lambda g: g * math.inf)
        return y

    model = Sequence(nn.Linear(8, 8), Do(hooked), nn.LayerNorm(8))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert (found.phase, found.module) == ("backward", "middle.1")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_checkpointed_modules_are_looked_into(windows, use_reentrant, phase):
    class Checkpointed(Sequence):
        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.head(checkpoint(self.middle, x, use_reentrant=use_reentrant))

    def spoil(x):
        if bool((x > 10).any()):  # of the second micro-batch only, however often it runs
            return SpoilGradient.apply(x) if phase == "backward" else x / 0
        return x

    torch.manual_seed(0)  # one model in 256 turns the large embedding below into no number above 10
    model = Checkpointed(nn.Linear(8, 8), Do(spoil), nn.Linear(8, 8))
    batch = windows() % 10
    batch[2, 0] = 10
    with torch.no_grad():
        model.embedding.weight[10] = 1e4
    found = diagnose(model, shares_of_loss(model, batch))
    assert (found.phase, found.module, found.micro_batch) == (phase, "middle.1", 2)
    assert "middle.0.weight" in found.parameters
    assert ("head.weight" in found.parameters) is (phase == "forward")


def test_finite_shares_that_overflow_when_they_are_added_name_the_parameters_module(
    bigram, windows
):
    model = bigram()
    model.head.bias.register_hook(lambda g: torch.full_like(g, 2e38))
    found = diagnose(model, shares_of_loss(model, windows(6)))
    assert found == Diagnosis("backward", "head", "Linear", 2, ("head.bias",))


# Gradient norm.


@pytest.mark.parametrize("build", ["bigram", "gpt"])
def test_finite_gradients_whose_norm_overflows_are_told_apart(bigram, windows, build):
    model = bigram() if build == "bigram" else gpt()
    next(model.parameters()).register_hook(lambda g: torch.full_like(g, 1e30))
    found = diagnose(model, shares_of_loss(model, windows()))
    assert found == Diagnosis("gradient norm", "", "", -1, ())


def test_the_norm_is_that_of_the_whole_steps_gradient(bigram, windows):
    for rows, phase in ((2, "not reproduced"), (8, "gradient norm")):
        model = bigram()
        # Squares of 11 x 1.5e18 fit float32, which ends at 3.4e38; of four times that, they do not.
        model.head.bias.register_hook(lambda g: torch.full_like(g, 3e18))
        assert diagnose(model, shares_of_loss(model, windows(rows))).phase == phase


# What is left behind.


def state_of(model):
    return {
        name: (module.training, *map(list, (module._forward_hooks, module._forward_pre_hooks)))
        for name, module in model.named_modules()
    }


def test_no_micro_batch_runs_after_the_first_bad_one(bigram, windows):
    model = bigram()
    model.norm.register_forward_hook(on_call(2, spoiled))
    steps = shares_of_loss(model, windows(6))
    found = diagnose(model, [*steps[:2], (4, lambda: pytest.fail("it ran"))])
    assert found.micro_batch == 2


@pytest.mark.parametrize("ends", ["finite", "bad", "parameters", "error"])
def test_gradients_hooks_modes_and_buffers_are_left_as_they_should_be(windows, ends):
    model = Sequence(nn.Linear(8, 8), Do(lambda x: x.transpose(1, 2)), nn.BatchNorm1d(8))
    model.middle.append(Do(lambda x: x.transpose(1, 2)))
    model.middle[0].eval()
    batch = windows(6)
    (compute_loss(model(batch[:, :-1]), batch[:, 1:]) * math.nan).backward()  # not of this step
    steps = shares_of_loss(model, batch)
    if ends == "bad":
        model.head.register_forward_hook(on_call(2, spoiled))
    elif ends == "parameters":
        model.middle[2].running_mean.fill_(math.nan)
    elif ends == "error":
        steps[1] = (2, lambda: model(torch.tensor([[99]])))
    before, buffers = state_of(model), [b.clone() for b in model.buffers()]
    if ends == "error":
        with pytest.raises(IndexError):
            diagnose(model, steps)
    else:
        phases = {"finite": "not reproduced", "bad": "forward"}
        assert diagnose(model, steps).phase == phases.get(ends, ends)
    assert all(p.grad is None for p in model.parameters())
    assert state_of(model) == before
    for buffer, old in zip(model.buffers(), buffers, strict=True):
        torch.testing.assert_close(buffer, old, rtol=0, atol=0, equal_nan=True)


def test_no_micro_batchs_graph_outlives_it(bigram, windows):
    model, nodes = bigram(), []

    def note(_, __, output):
        gc.collect()
        assert [node() for node in nodes] == [None] * len(nodes)  # of micro-batches before
        output = SpoilGradient.apply(output) if len(nodes) == 2 else Identity.apply(output)
        nodes.append(weakref.ref(output.grad_fn))
        return output

    model.norm.register_forward_hook(note)
    assert diagnose(model, shares_of_loss(model, windows(6))).micro_batch == 4
    gc.collect()
    assert [node() for node in nodes] == [None] * 3


def test_a_graph_that_the_user_keeps_is_watched_no_more(bigram, windows):
    model, kept = bigram(), []
    model.hidden.register_forward_hook(lambda *call: kept.append(call[2]))
    diagnose(model, shares_of_loss(model, windows(6)))
    gc.collect()
    assert len(kept) == 3
    assert not [thing for thing in gc.get_objects() if type(thing) is Watch]


def test_what_the_user_compiled_is_looked_into_and_stays_compiled(bigram, windows):
    model, ran = bigram(), []

    def backend(graph, _):
        return lambda *inputs: ran.append(1) or graph(*inputs)

    model.hidden.register_forward_hook(lambda *call: call[2] / 0)
    model.compile(backend=backend, fullgraph=True)
    steps = shares_of_loss(model, windows(2))
    steps[0][1]()
    assert len(ran) == 1
    assert diagnose(model, steps).module == "hidden"
    assert len(ran) == 1
    steps[0][1]()
    assert len(ran) == 2


# What it says.

SENTENCES = {
    Diagnosis("parameters", "a.b", "Linear", -1, ("a.b.weight", "c", "d", "e", "f")): (
        "parameters: a.b (Linear) is the first to hold a value that is not finite, "
        "in a.b.weight, c, d and 2 more"
    ),
    Diagnosis("forward", "layers.2.mlp", "SwiGLU", 8, ("a",)): (
        "forward: layers.2.mlp (SwiGLU) returned the first value that is not finite, "
        "micro-batch at row 8"
    ),
    Diagnosis("forward", "", "GPT", 0): (
        "forward: the model itself (GPT) returned the first value that is not finite, "
        "micro-batch at row 0"
    ),
    Diagnosis("loss", "", "", 8, ("a",)): (
        "loss: the first value that is not finite is the loss itself, micro-batch at row 8"
    ),
    Diagnosis("backward", "head", "Linear", 8, ("a", "b", "c")): (
        "backward: head (Linear) gave the first gradient that is not finite; it spoilt a, b, c, "
        "micro-batch at row 8"
    ),
    Diagnosis("backward", "", "", 8, ("a",)): (
        "backward: the loss gave the first gradient that is not finite; it spoilt a, "
        "micro-batch at row 8"
    ),
    Diagnosis("gradient norm"): (
        "gradient norm: every gradient is finite, but their norm overflows"
    ),
    Diagnosis("not reproduced"): (
        "not reproduced: run once more, the step gave finite numbers only"
    ),
}


@pytest.mark.parametrize("diagnosis", SENTENCES)
def test_a_diagnosis_is_one_line_for_a_person_and_plain_json_for_a_program(diagnosis):
    assert str(diagnosis) == SENTENCES[diagnosis]
    record = diagnosis.as_record()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "phase": diagnosis.phase,
        "module": diagnosis.module,
        "kind": diagnosis.kind,
        "micro_batch": diagnosis.micro_batch,
        "parameters": list(diagnosis.parameters),
    }
