"""The guard: what is not finite updates nothing, and is skipped so often and no more."""

import itertools
import json

import pytest
import torch
from test_fit import Records
from test_step import Averaging, Poison, arm, assert_same_bits, plain_config, ragged, state_of

from truestep import (
    GPT,
    IGNORE_INDEX,
    Batch,
    DeferredLogits,
    GPTConfig,
    NonFiniteError,
    Trainer,
    TrainingConfig,
    compute_loss,
    every,
)
from truestep.loss import token_losses
from truestep.training.guard import UpdateGuard
from truestep.workflows.history import count_skipped


class Data:
    """Batches at which a model is poisoned, or without a target, or good, as a word says: x o ."""

    def __init__(self, word, model, windows):
        self.word, self.model, self.windows = word, model, windows

    def batch_at(self, step):
        self.model.armed = self.word[step] == "x"
        windows = self.windows(seed=step)
        targets = windows[:, 1:]
        if self.word[step] == "o":
            targets = torch.full_like(targets, IGNORE_INDEX)
        return Batch(windows[:, :-1], targets)


def build(bigram, limit, sinks=(), **options):
    model = Poison(bigram(), "gradient")
    config = plain_config(max_skipped_steps=limit, schedule="cosine", num_steps=100)
    return Trainer(model, config, sinks=list(sinks), **options)


def expected_stop(word, limit, before=0):
    """The step at which such a run stops, by counting letters: 0 if it never does."""
    in_a_row = before
    for step, letter in enumerate(word, start=1):
        in_a_row = {"x": in_a_row + 1, ".": 0, "o": in_a_row}[letter]
        if in_a_row > limit:
            return step
    return 0


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("limit", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "word", ["...xx...", "x..x.x..", "xxx.....", "..xox...", ".xxoxx..", "...oo...", "......xx"]
)
def test_steps_in_a_row_are_skipped_up_to_the_limit_and_one_more_stops(
    bigram, windows, word, limit, runs_ahead
):
    sink = Records()
    trainer = build(bigram, limit, [sink])
    trainer.runs_ahead = runs_ahead
    data = Data(word, trainer.model, windows)
    stop = expected_stop(word, limit)
    if stop:
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit(data, num_steps=len(word))
        assert caught.value.metrics.step == stop
        assert caught.value.batch.hash() == data.batch_at(stop - 1).hash()
        assert trainer.step == stop - 1
        assert trainer.skipped_in_a_row == limit
    else:
        trainer.fit(data, num_steps=len(word))
        assert trainer.step == len(word)
    logged = [(record["step"], record["skipped"]) for record in sink.records]
    steps = range(1, (stop or len(word)) + 1)
    assert logged == [(step, word[step - 1] != ".") for step in steps]
    # The oracle: a run that was given the good batches alone, at their steps.
    plain = build(bigram, 0)
    for step in range(trainer.step):
        if word[step] == ".":
            plain.step = step
            plain.training_step(data.batch_at(step))
    found, wanted = state_of(trainer), state_of(plain)
    if "." not in word[: trainer.step]:  # the fused kernel makes its state, all zero, when skipped
        wanted += [torch.zeros_like(tensor) for tensor in found[len(wanted) :]]
    assert_same_bits(found, wanted)


def test_the_learning_rate_is_the_one_of_the_last_step_that_counted(bigram, windows):
    rates = []
    trainer = build(
        bigram,
        0,
        companions=[every(1, lambda t, m: rates.append(t.optimizer.param_groups[0]["lr"]))],
    )
    with pytest.raises(NonFiniteError):
        trainer.fit(Data("...x", trainer.model, windows), num_steps=4)
    assert len(rates) == 3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [rates[-1]] * 2
    assert len(set(rates)) == 3


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_count_goes_on_where_a_resumed_run_left_it(bigram, windows, before):
    word = "xx.xxx"
    trainer = build(bigram, 2)
    trainer.skipped_in_a_row = before
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(Data(word, trainer.model, windows), num_steps=len(word))
    assert caught.value.metrics.step == expected_stop(word, 2, before)


def test_the_count_is_derived_from_the_log(tmp_path):
    letters = ".xx.xoxx"
    lines = [{"step": 0, "validation_loss": 1.0}]
    for step, letter in enumerate(letters, start=1):
        num_tokens = 0 if letter == "o" else 5
        lines.append({"step": step, "num_tokens": num_tokens, "skipped": letter != "."})
        lines.append({"step": step, "validation_loss": 1.0})
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [count_skipped(tmp_path, step) for step in range(9)] == [0, 0, 1, 2, 0, 1, 1, 2, 3]


def test_a_single_step_is_skipped_and_never_halts(bigram, windows):
    trainer = build(bigram, 0)
    arm(trainer.model)
    assert [trainer.training_step(windows()).skipped for _ in range(3)] == [True] * 3
    trainer.model.armed = False
    assert not trainer.training_step(windows()).skipped


def test_the_device_and_the_host_count_alike():
    generator = torch.Generator().manual_seed(0)
    for limit, start in itertools.product(range(4), range(5)):
        guard, in_a_row, halted = UpdateGuard(limit, start, torch.device("cpu")), start, False
        for _ in range(60):
            finite, tokens = (int(x) for x in torch.randint(2, (2,), generator=generator))
            skipped, halts = guard.judge(torch.tensor(bool(finite)), torch.tensor(tokens))
            in_a_row = (0 if finite else in_a_row + 1) if tokens else in_a_row
            halted = halted or bool(tokens and not finite and in_a_row > limit)
            assert bool(halts) == halted
            assert bool(skipped) == (halted or not finite or not tokens)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_diagnosis_that_fails_hides_nothing(bigram, windows, monkeypatch, runs_ahead):
    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr("truestep.training.step.diagnose", out_of_memory)
    trainer = Trainer(bigram(), plain_config(), sinks=[])
    trainer.runs_ahead = runs_ahead
    state = torch.get_rng_state()
    bad = windows()
    with torch.no_grad():
        next(trainer.model.parameters())[int(bad[0, 0])] = float("nan")
    with pytest.raises(NonFiniteError, match="not diagnosed: running the step once more failed"):
        trainer.fit([bad, windows(), windows()])
    assert trainer.step == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_a_rehearsal_leaves_the_random_state_at_once(bigram, windows):
    trainer = Trainer(bigram(dropout=0.4), plain_config(), sinks=[])
    trainer.training_step(windows())
    state = torch.get_rng_state()

    def fail(*_):
        raise RuntimeError("a hook of the user's")

    trainer.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook") as caught:
        trainer.token_losses(windows())
    assert torch.equal(torch.get_rng_state(), state)  # while the traceback lives
    torch.rand(1)
    drawn = torch.get_rng_state()
    del caught
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("micro_batch_size", ["auto", 4])
def test_the_losses_of_tokens_add_up_to_the_loss_of_the_step(bigram, windows, micro_batch_size):
    config = plain_config(micro_batch_size=micro_batch_size)
    trainer = Trainer(bigram(dropout=0.4), config, sinks=[])
    batch = ragged(windows)
    for _ in range(2):
        losses = trainer.token_losses(batch)
        assert losses.shape == batch.targets.shape
        assert (losses[batch.targets == IGNORE_INDEX] == 0).all()
        metrics = trainer.training_step(batch)  # with the same dropout
        assert float(losses.sum() / batch.num_targets) == pytest.approx(metrics.loss, rel=1e-6)


def test_the_losses_of_tokens_are_log_sum_exp_whether_logits_are_deferred_or_not():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 700, 8, generator=generator)  # more rows than one chunk holds
    weight = torch.randn(13, 8, generator=generator)
    targets = torch.randint(13, (3, 700), generator=generator)
    targets[1, 5:] = IGNORE_INDEX
    logits = hidden @ weight.T
    exact = logits.double().logsumexp(-1) - logits.double().gather(
        -1, targets.clamp(min=0)[..., None]
    ).squeeze(-1)
    exact[targets == IGNORE_INDEX] = 0
    for form in (logits, DeferredLogits(hidden, weight)):
        losses = token_losses(form, targets)
        assert losses.dtype == torch.float32
        assert (losses - exact).abs().max() < 2e-6
        mean = losses.sum() / (targets != IGNORE_INDEX).sum()
        assert float(mean) == pytest.approx(float(compute_loss(form, targets)), rel=1e-6)


def test_looking_at_a_step_leaves_no_trace(bigram, windows):
    def trained(looks):
        model = Averaging(bigram(dropout=0.3))
        trainer = Trainer(model, plain_config(micro_batch_size=2), sinks=[])
        random_state = torch.get_rng_state()
        for step in range(4):
            batch = windows(seed=step)
            if looks:
                model.eval()
                trainer.token_losses(batch)
                trainer.diagnose(batch)
                assert not model.training
                model.train()
            assert all(parameter.grad is None for parameter in model.parameters())
            trainer.training_step(batch)
        assert torch.equal(torch.get_rng_state(), random_state)
        return [*state_of(trainer), *model.buffers()]

    assert_same_bits(trained(looks=True), trained(looks=False))


def test_the_error_names_where_it_came_from(windows):
    model = GPT(GPTConfig(vocab_size=11, context_length=8, num_layers=2, num_heads=2, width=8))

    def spoil(module, _, output):
        return output * float("nan")

    model.layers[1].mlp.register_forward_hook(spoil)
    config = TrainingConfig(precision="float32", compile="off")
    trainer = Trainer(model, config, sinks=[])
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan.*layers\.1\.mlp"):
        trainer.fit([windows()], num_steps=2)
