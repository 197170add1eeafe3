"""The step's laws: 4, 7, 8, 11, 12, 14 and 18, against written formulas and one big batch."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from truestep import (
    IGNORE_INDEX,
    Batch,
    NonFiniteError,
    Trainer,
    TrainingConfig,
    compute_loss,
    every,
    runtime,
)
from truestep.training.guard import UpdateGuard
from truestep.training.muon import Muon, orthogonal
from truestep.training.optim import adamw, clip_gradients, decay_groups, update

PLAIN = {"precision": "float32", "compile": "off", "max_grad_norm": "off"}


def plain_config(**changes):
    return TrainingConfig(**(PLAIN | changes))


def ragged(windows, batch_size=6, length=8):
    """A batch whose rows hold very different numbers of targets."""
    batch = windows(batch_size, length)
    targets = batch[:, 1:].clone()
    for row in range(batch_size):
        targets[row, row + 1 :] = IGNORE_INDEX
    return Batch(batch[:, :-1], targets)


def gradients_of(trainer, batch):
    """The gradients of one step, seen by an optimizer that keeps them."""
    seen = []

    def keep(optimizer, *_):
        seen.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])

    handle = trainer.optimizer.register_step_pre_hook(keep)
    metrics = trainer.training_step(batch)
    handle.remove()
    return metrics, seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_micro_batches_with_unequal_counts_add_up_to_one_big_batch(
    bigram, windows, dtype, tolerance, micro_batch_size
):
    batch = ragged(windows)
    results = []
    for size in ("auto", micro_batch_size):
        trainer = Trainer(bigram().to(dtype), plain_config(micro_batch_size=size), sinks=[])
        results.append(gradients_of(trainer, batch))
    (whole, whole_gradients), (split, split_gradients) = results
    assert split.loss == pytest.approx(whole.loss, rel=tolerance)
    for mine, theirs in zip(split_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def test_the_mean_of_micro_batch_means_is_another_number_so_the_law_can_fail(bigram, windows):
    batch, model = ragged(windows), bigram()
    trainer = Trainer(model, plain_config(micro_batch_size=2), sinks=[])
    means = []
    with torch.no_grad():
        for part in batch.split(2):
            logits = model(part.tokens)
            means.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.targets.flatten())
            )
    assert abs(trainer.training_step(batch).loss - float(sum(means) / 3)) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_shares_of_a_batch_on_several_ranks_add_up_to_the_whole_batch(bigram, windows, ranks):
    """Each rank has its rows and the count of all; losses and gradients are summed."""
    batch, model = ragged(windows), bigram().double()
    compute_loss(model(batch.tokens), batch.targets).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    expected = compute_loss(model(batch.tokens), batch.targets)
    model.zero_grad()
    num_tokens = sum(int(part.num_targets) for part in batch.split(len(batch.tokens) // ranks))
    losses = []
    for part in batch.split(len(batch.tokens) // ranks):
        loss = compute_loss(model(part.tokens), part.targets, num_tokens=num_tokens)
        loss.backward()
        losses.append(loss)
    assert abs(sum(losses) - expected) < 1e-12
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-12


def state_of(trainer):
    tensors = [p.detach().clone() for p in trainer.model.parameters()]
    for parameter in trainer.model.parameters():
        state = trainer.optimizer.state.get(parameter, {})
        tensors += [value.clone() for value in state.values()]
    return tensors


def assert_same_bits(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_batch_without_targets_costs_zero_and_changes_no_bit(bigram, windows, optimizer):
    trainer = build(bigram(), optimizer)
    trainer.training_step(windows())
    before = state_of(trainer)
    tokens = windows()[:, :-1]
    metrics = trainer.training_step((tokens, torch.full_like(tokens, IGNORE_INDEX)))
    assert (metrics.loss, metrics.grad_norm, metrics.skipped) == (0.0, 0.0, True)
    assert trainer.step == 2
    assert_same_bits(state_of(trainer), before)


def build(model, optimizer, **options):
    if optimizer == "sgd":
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return Trainer(model, plain_config(), optimizer=sgd, sinks=[], **options)
    return Trainer(model, plain_config(optimizer=optimizer), sinks=[], **options)


class Poison(torch.nn.Module):
    """A model that turns non-finite when told to, in its loss or only in one gradient."""

    def __init__(self, model, where):
        super().__init__()
        self.model, self.where, self.armed = model, where, False

    def forward(self, tokens):
        logits = self.model(tokens)
        if self.armed and self.where == "loss":
            return logits * math.nan
        if self.armed and self.where == "gradient" and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * math.inf)
        if self.armed and self.where == "overflow":
            return logits * 3e38 * 10
        return logits


@pytest.mark.parametrize("where", ["loss", "gradient", "overflow"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_non_finite_loss_or_gradient_changes_no_bit_and_fit_stops(
    bigram, windows, where, optimizer
):
    model = Poison(bigram(), where)
    trainer = build(model, optimizer, companions=[every(3, lambda t, _: arm(model))])
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer.fit([windows(seed=i) for i in range(10)], num_steps=10)
    assert trainer.step == 3
    before = state_of(trainer)
    metrics = trainer.training_step(windows())
    assert metrics.skipped
    assert_same_bits(state_of(trainer), before)


def arm(model):
    model.armed = True


@pytest.mark.parametrize("ends", ["stop", "error"])
def test_on_an_accelerator_a_non_finite_step_still_in_flight_never_counts(bigram, windows, ends):
    """The CPU plays the accelerator: the run ends while the bad step has not been read."""
    model = Poison(bigram(), "loss")
    trainer = build(model, "adamw")
    trainer.runs_ahead = True

    class Data:
        def batch_at(self, step):
            if step == 3:
                arm(model)
                if ends == "stop":
                    trainer.stop("enough")
            if step == 4:
                raise OSError("the disk is gone")
            return windows(seed=step)

    with pytest.raises(NonFiniteError if ends == "stop" else OSError):
        trainer.fit(Data(), num_steps=10)
    assert trainer.step == 3


class Averaging(torch.nn.Module):
    """A model with persistent buffers that its forward changes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.average = model, torch.nn.BatchNorm1d(11)

    def forward(self, tokens):
        return self.average(self.model(tokens).transpose(1, 2)).transpose(1, 2)


def test_a_skipped_step_leaves_persistent_buffers_alone_and_another_moves_them(bigram, windows):
    model = Averaging(Poison(bigram(), "loss"))
    trainer = build(model, "adamw")
    trainer.training_step(windows())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before["average.num_batches_tracked"] == 1
    tokens = windows()[:, :-1]
    trainer.training_step((tokens, torch.full_like(tokens, IGNORE_INDEX)))
    arm(model.model)
    assert trainer.training_step(windows()).skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_of_a_step_stays_with_the_users_optimizer_or_frozen_gradients(bigram, windows):
    model = bigram()
    fused = torch.optim.AdamW(model.head.parameters(), lr=0.1, fused=True)
    trainer = Trainer(model, plain_config(), optimizer=fused, sinks=[])
    tokens = windows()[:, :-1]
    trainer.training_step((tokens, torch.full_like(tokens, IGNORE_INDEX)))
    assert all(parameter.grad is None for parameter in model.parameters())
    before = model.head.weight.detach().clone()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    fused.step()
    assert not torch.equal(model.head.weight, before)


def test_clipping_measures_narrow_gradients_in_float32():
    gradients = [torch.full((4097,), 1.0, dtype=torch.bfloat16) for _ in range(64)]
    norm = clip_gradients([g.clone() for g in gradients], None)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(math.sqrt(4097 * 64), rel=1e-6)


def test_on_an_accelerator_no_step_launched_after_a_non_finite_one_updates(bigram, windows):
    """The CPU plays the accelerator: a step is read only after the next was launched."""
    model = Poison(bigram(), "loss")
    trainer = build(model, "adamw")
    trainer._guard = UpdateGuard(0, 0, trainer.device)  # as `fit` sets it
    trainer._launch(windows())
    arm(model)
    before = state_of(trainer)
    assert trainer._launch(windows()).numbers.read()["skipped"]
    model.armed = False
    assert trainer._launch(windows()).numbers.read()["skipped"]
    assert_same_bits(state_of(trainer), before)


def test_every_parameter_is_in_exactly_one_group_and_tied_ones_once(bigram):
    model = bigram(vocab_size=8)
    model.head.weight = model.embedding.weight
    groups = Trainer(model, sinks=[]).optimizer.param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])


def test_zero_gradient_decays_matrices_by_the_formula_and_nothing_else(bigram):
    model = bigram()
    optimizer = adamw(
        list(model.parameters()), learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, before[name])
        else:
            expected = before[name].double() * (1 - 0.01 * 0.1) ** 5
            torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_written_formula_over_100_steps(dtype, tolerance, fused):
    generator = torch.Generator().manual_seed(0)
    # As large as trained weights are; at 1.0 a hundred float32 roundings alone exceed 1e-6.
    start = torch.randn(5, 3, generator=generator, dtype=dtype) * 0.1
    parameter = torch.nn.Parameter(start.clone())
    lr, decay, (beta1, beta2), eps = 3e-4, 0.1, (0.9, 0.95), 1e-8
    optimizer = adamw([parameter], learning_rate=lr, weight_decay=decay, betas=(beta1, beta2))
    optimizer.param_groups[0]["fused"] = fused
    theta, first, second = start.double(), torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    for t in range(1, 101):
        gradient = torch.randn(5, 3, generator=generator, dtype=dtype)
        parameter.grad = gradient.clone()
        optimizer.step()
        # Loshchilov & Hutter 2019, algorithm 2, lines 6 to 12, in float64.
        g = gradient.double()
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g * g
        step = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + eps)
        theta = theta - lr * decay * theta - lr * step
    torch.testing.assert_close(parameter.detach().double(), theta, rtol=0, atol=tolerance)


def test_clipping_at_or_below_the_limit_changes_no_bit():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(7, 5, generator=generator), torch.randn(9, generator=generator)]
        before = [g.clone() for g in gradients]
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        limit = float(clip_gradients([g.clone() for g in gradients], None))
        assert limit == pytest.approx(norm, rel=1e-6)
        clip_gradients(gradients, limit)
        assert_same_bits(gradients, before)


def test_clipping_above_the_limit_brings_the_norm_to_it():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(40, 30, generator=generator) * 10**seed for _ in range(1)]
        direction = gradients[0].double().clone()
        clip_gradients(gradients, 0.5)
        norm = float(gradients[0].double().norm())
        assert 0.5 * (1 - 1e-5) <= norm <= 0.5 * (1 + 1e-6)
        cosine = float((gradients[0].double() * direction).sum() / norm / direction.norm())
        assert cosine == pytest.approx(1.0, abs=1e-6)
        if seed > 15:
            break


def test_the_norm_is_measured_even_when_clipping_is_off(bigram, windows):
    metrics, gradients = gradients_of(Trainer(bigram(), plain_config(), sinks=[]), windows())
    exact = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    assert metrics.grad_norm == pytest.approx(exact, rel=1e-6)


def test_gradients_left_by_the_user_are_not_used_and_none_are_left_behind(bigram, windows):
    results = []
    for stray in (False, True):
        model = bigram()
        if stray:
            model(windows()[:, :-1]).sum().backward()
        Trainer(model, plain_config(), sinks=[]).training_step(windows())
        assert all(p.grad is None for p in model.parameters())
        results.append([p.detach().clone() for p in model.parameters()])
    assert_same_bits(*results)


def test_a_step_trains_in_train_mode_and_restores_every_mode(bigram, windows):
    model = bigram(dropout=0.5)
    model.dropout.eval()  # the user's own choice, inside a model in train mode
    Trainer(model, plain_config(), sinks=[]).training_step(windows())
    assert model.training
    assert not model.dropout.training
    model.eval()
    seen = []
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    Trainer(model, plain_config(), sinks=[]).training_step(windows())
    assert seen[-1]  # before it, the look at the model without training
    assert not model.training


def test_dropout_is_a_function_of_seed_and_step_and_leaves_the_users_generator_alone(
    bigram, windows
):
    losses = []
    for noise in (0, 7):
        torch.manual_seed(noise)
        trainer = Trainer(bigram(dropout=0.5), plain_config(micro_batch_size=2), sinks=[])
        before = torch.get_rng_state()
        losses.append([trainer.training_step(windows()).loss for _ in range(5)])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(noise + 1)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5
    other = Trainer(bigram(dropout=0.5), plain_config(micro_batch_size=2, seed=1), sinks=[])
    assert other.training_step(windows()).loss != losses[0][0]


def test_every_step_and_micro_batch_draws_a_dropout_of_its_own(bigram, windows):
    model = bigram(dropout=0.5)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, plain_config(micro_batch_size=2), optimizer=still, sinks=[])
    same_rows = windows(2).repeat(2, 1)
    assert len({trainer.training_step(same_rows).loss for _ in range(5)}) == 5
    masks = []
    model.dropout.register_forward_hook(lambda *call: masks.append(call[2] == 0))
    trainer.training_step(same_rows)
    assert not torch.equal(*masks)


def test_the_process_keeps_its_own_determinism_settings(bigram, windows):
    assert not torch.are_deterministic_algorithms_enabled()
    inside = []
    model = bigram()
    model.register_forward_hook(
        lambda *_: inside.append(torch.are_deterministic_algorithms_enabled())
    )
    Trainer(model, plain_config(), sinks=[]).training_step(windows())
    assert inside[-1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_decay_groups_hold_matrices_and_vectors_apart(bigram):
    matrices, vectors = decay_groups(bigram().parameters(), 0.3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_may_have_a_learning_rate_of_their_own(bigram, windows, optimizer):
    """The first AdamW update of a weight is its rate, whatever the gradient."""
    config = plain_config(
        optimizer=optimizer,
        learning_rate=1e-3,
        embedding_learning_rate_factor=500,
        weight_decay=0.0,
    )
    model = bigram()
    trainer = Trainer(model, config, sinks=[])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = trainer.optimizer.param_groups
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = trainer.training_step(windows())
    assert metrics.learning_rate == 1e-3
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters()}
    assert moved["embedding.weight"] == pytest.approx(0.5, rel=1e-3)
    assert moved["head.weight"] == pytest.approx(1e-3, rel=1e-3)


def test_an_embedding_that_is_the_head_too_has_no_rate_of_its_own(bigram, windows):
    model = bigram()
    model.head.weight = model.embedding.weight
    config = plain_config(embedding_learning_rate_factor=10)
    with pytest.raises(ValueError, match="Bigram has no embedding apart from its head; leave it"):
        Trainer(model, config, sinks=[])
    model.positions = torch.nn.Embedding(8, 8)
    trainer = Trainer(model, config, sinks=[])
    assert [id(p) for p in trainer.optimizer.param_groups[-1]["params"]] == [
        id(model.positions.weight)
    ]


def test_muon_takes_hidden_matrices_and_adamw_the_rest_as_one_optimizer(bigram, windows):
    model = bigram()
    trainer = Trainer(model, plain_config(optimizer="muon"), sinks=[])
    hidden = trainer.optimizer.param_groups[-1]["params"]
    assert [id(p) for p in hidden] == [id(model.hidden.weight)]
    assert trainer.optimizer.defaults["lr"] == 3e-4
    before = [p.detach().clone() for p in model.parameters()]
    trainer.training_step(windows())
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert len(trainer.optimizer.state) == len(before)
    assert "momentum_buffer" in trainer.optimizer.state[model.hidden.weight]


def pair(shape, dtype, make):
    """A matrix and its optimizer, from the same numbers whichever optimizer it is."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    return matrix, make([matrix])


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.03)]
)
def test_muon_is_the_written_formula_in_every_dtype(shape, dtype, tolerance):
    """Law 12 for Muon: momentum, five polynomials of the singular values, scale and decay."""

    def make(matrices):
        return Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.2, dtype=dtype)

    matrix, optimizer = pair(shape, torch.float64, make)
    wanted, average = matrix.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        matrix.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        average = 0.9 * average + 0.1 * matrix.grad
        update = 0.9 * average + 0.1 * matrix.grad
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        s = s / update.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rate = 0.1 * max(1.0, shape[0] / shape[1]) ** 0.5
        wanted = wanted * (1 - 0.1 * 0.2) - rate * u @ torch.diag(s) @ v
        optimizer.step()
    torch.testing.assert_close(matrix.detach(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (2**22, [[1, 2, 3], [1, 2, 2]]),
        (119, [[1, 1, 1, 3], [1, 1, 1, 2]]),  # one of 60 numbers, three of 36
        (1, [[1] * 6, [1] * 5]),
    ],
)
def test_muon_updates_matrices_of_one_shape_together_and_each_as_if_alone(
    monkeypatch, at_once, expected
):
    monkeypatch.setattr("truestep.training.muon._NUMBERS_AT_ONCE", at_once)
    calls = []

    def count(matrices):
        calls.append(len(matrices))
        return orthogonal(matrices)

    monkeypatch.setattr("truestep.training.muon.orthogonal", count)
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (12, 5), (6, 6), (5, 12), (12, 5), (6, 6)]
    matrices = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]
    alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    together = Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.2, dtype=torch.float64)
    each = [Muon([m], lr=0.1, momentum=0.9, weight_decay=0.2, dtype=torch.float64) for m in alone]
    for step in range(2):
        for index, (matrix, single) in enumerate(zip(matrices, alone, strict=True)):
            if (step, index) != (1, 2):  # a matrix that the second step leaves out
                matrix.grad = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
                single.grad = matrix.grad.clone()
            else:
                matrix.grad = single.grad = None
        calls.clear()
        together.step()
        assert sorted(calls) == expected[step]
        for optimizer in each:
            optimizer.step()
    for matrix, single in zip(matrices, alone, strict=True):
        torch.testing.assert_close(matrix, single, rtol=0, atol=1e-12)


def test_muon_in_bfloat16_is_torchs():
    results = []
    for make in (
        lambda m: torch.optim.Muon(m, lr=0.1, momentum=0.9, weight_decay=0.2),
        lambda m: Muon(m, lr=0.1, momentum=0.9, weight_decay=0.2, dtype=torch.bfloat16),
    ):
        matrix, optimizer = pair((24, 16), torch.float32, make)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            optimizer.step()
        results.append((matrix.detach(), optimizer.state[matrix]["momentum_buffer"]))
    for torchs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.float64, torch.float64),
    ],
)
def test_muon_iterates_in_the_arithmetic_of_the_run(bigram, windows, monkeypatch, dtypes):
    precision, parameters, expected = dtypes
    seen = set()

    def look(matrix):
        seen.add(matrix.dtype)
        return matrix

    monkeypatch.setattr("truestep.training.muon.orthogonal", look)
    config = plain_config(optimizer="muon", precision=precision)
    Trainer(bigram().to(parameters), config, sinks=[]).training_step(windows())
    assert seen == {expected}


class Functional(torch.nn.Module):
    """A model whose output matrix belongs to no module."""

    def __init__(self, model):
        super().__init__()
        self.hidden, self.matrix = model.hidden, torch.nn.Parameter(torch.ones(8, 11))
        self.embedding, self.table = model.embedding, torch.ones(8)  # a tensor, no buffer

    def forward(self, tokens):
        return self.hidden(self.embedding(tokens) * self.table) @ self.matrix


def test_muon_refuses_a_model_whose_head_it_cannot_find_and_adamw_trains_it(bigram, windows):
    with pytest.raises(ValueError, match="optimizer=muon finds no module"):
        Trainer(Functional(bigram()), plain_config(optimizer="muon"))
    assert Trainer(Functional(bigram()), plain_config(), sinks=[]).training_step(windows()).loss > 0


def test_a_muon_pair_survives_copying(bigram, windows):
    trainer = Trainer(bigram(), plain_config(optimizer="muon"), sinks=[])
    trainer.training_step(windows())
    model, optimizer = copy.deepcopy((trainer.model, trainer.optimizer))
    twin = Trainer(model, plain_config(), optimizer=optimizer, sinks=[])
    twin.step = 1
    twin.training_step(windows(seed=2))
    trainer.training_step(windows(seed=2))
    assert_same_bits(state_of(trainer), state_of(twin))


def test_a_muon_pair_goes_on_from_its_state_dict_bit_for_bit(bigram, windows):
    first = Trainer(bigram(), plain_config(optimizer="muon"), sinks=[])
    first.training_step(windows(seed=1))
    second = Trainer(bigram(), plain_config(optimizer="muon"), sinks=[])
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.step = 1
    assert first.training_step(windows(seed=2)).loss == second.training_step(windows(seed=2)).loss
    assert_same_bits(state_of(first), state_of(second))


def test_an_update_that_fails_leaves_no_flag_on_the_optimizer():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = adamw([parameter], learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.99))
    assert optimizer.param_groups[0]["fused"]

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        update(optimizer, torch.tensor(True))
    handle.remove()
    optimizer.step()  # by somebody else, who skips nothing
    assert (parameter < 1).all()


def test_trainers_in_two_threads_train_as_alone_and_leave_the_process_as_it_was(bigram, windows):
    def train(_=None):
        config = TrainingConfig(precision="bfloat16", compile="off", deterministic="on")
        with runtime.EXCLUSIVE:  # its initial weights come from the generator that steps seed
            trainer = Trainer(bigram(dropout=0.5), config, sinks=[])
        return [trainer.training_step(windows(seed=step)).loss for step in range(60)]

    alone, state = train(), torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(train, range(2))) == [alone, alone]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
