"""The loop: data of every kind, companions, exact ends, models that do not fit."""

import math
import time

import pytest
import torch
from torch import nn

from truestep import DeferredLogits, StepMetrics, Trainer, TrainingConfig, compute_loss, every
from truestep.training.schedule import constant, warmup_cosine, warmup_stable_decay


class Stepped:
    """Data whose position is the step."""

    def __init__(self, windows):
        self.windows, self.asked = windows, []

    def batch_at(self, step):
        self.asked.append(step)
        return self.windows(seed=step)


class Records:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(dict(record))

    def close(self):
        pass


def test_fit_goes_up_to_the_step_and_asks_for_each_batch_once(bigram, windows):
    data, sink = Stepped(windows), Records()
    trainer = Trainer(bigram(), TrainingConfig(num_steps=7), sinks=[sink])
    trainer.fit(data)
    trainer.fit(data)  # already there
    assert trainer.step == 7
    trainer.fit(data, num_steps=9)
    assert trainer.step == 9
    assert data.asked == list(range(9))
    assert [record["step"] for record in sink.records] == list(range(1, 10))


def test_on_an_accelerator_records_come_one_step_late_and_all_arrive(bigram, windows):
    """The CPU plays the accelerator."""
    sink, called = Records(), []
    trainer = Trainer(
        bigram(),
        TrainingConfig(precision="float32"),
        sinks=[sink],
        companions=[every(3, lambda t, m: called.append((t.step, m.step, len(sink.records))))],
    )
    plain = Trainer(bigram(), TrainingConfig(precision="float32"), sinks=[])
    losses = [plain.training_step(windows(seed=i)).loss for i in range(7)]
    trainer.runs_ahead = True
    trainer.fit(Stepped(windows), num_steps=7)
    assert [record["loss"] for record in sink.records] == losses
    assert called == [(3, 3, 3), (6, 6, 6), (7, 7, 7)]


def test_an_iterable_trains_and_starts_over_but_cannot_be_resumed(bigram, windows):
    trainer = Trainer(bigram(), sinks=[])
    trainer.fit([windows(seed=0), windows(seed=1)], num_steps=5)
    trainer.fit(iter([windows()] * 3), num_steps=8)
    assert trainer.step == 8
    with pytest.raises(ValueError, match="data ended before the last step"):
        trainer.fit(iter([windows()]), num_steps=12)
    resumed = Trainer(bigram(), sinks=[])
    resumed.step = 4
    with pytest.raises(ValueError, match=r"resumed at step 4.*batch_at"):
        resumed.fit([windows()], num_steps=5)
    with pytest.raises(TypeError, match="no batch_at"):
        trainer.fit(3, num_steps=100)


def test_companions_run_every_so_many_updates_and_at_the_last(bigram, windows):
    called = []
    trainer = Trainer(bigram(), sinks=[], companions=[every(4, lambda t, m: called.append(m.step))])
    trainer.fit(Stepped(windows), num_steps=10)
    assert called == [4, 8, 10]
    with pytest.raises(ValueError, match="every"):
        every(0, print)


def test_stop_ends_fit_after_the_step_and_keeps_the_reason(bigram, windows):
    trainer = Trainer(bigram(), sinks=[], companions=[every(3, lambda t, _: t.stop("good enough"))])
    trainer.fit(Stepped(windows), num_steps=10)
    assert (trainer.step, trainer.stop_reason) == (3, "good enough")
    trainer.companions = []
    trainer.fit(Stepped(windows), num_steps=10)
    assert (trainer.step, trainer.stop_reason) == (10, None)


def test_evaluating_and_sampling_randomness_at_any_interval_leave_the_training_bits(
    bigram, windows
):
    endings = []
    for interval in (None, 1, 3):
        model = bigram(dropout=0.3)
        trainer = Trainer(model, TrainingConfig(micro_batch_size=3), sinks=[])

        def disturb(trainer, _):
            before = [module.training for module in trainer.model.modules()]
            result = trainer.evaluate([windows(seed=99)], token_bytes=torch.ones(11).long())
            assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))
            assert [module.training for module in trainer.model.modules()] == before
            torch.rand(5)

        trainer.companions = [every(interval, disturb)] if interval else []
        trainer.fit(Stepped(windows), num_steps=9)
        endings.append([p.detach().clone() for p in model.parameters()])
    for other in endings[1:]:
        assert all(torch.equal(a, b) for a, b in zip(endings[0], other, strict=True))


def test_evaluation_weighs_by_tokens_not_by_batches(bigram, windows):
    model = bigram()
    small, large = windows(1, 3, seed=1), windows(7, 9, seed=2)
    result = Trainer(model, TrainingConfig(precision="float32"), sinks=[]).evaluate([small, large])
    with torch.no_grad():
        total = sum(
            float(compute_loss(model(w[:, :-1]), w[:, 1:], num_tokens=1)) for w in (small, large)
        )
    assert result.num_tokens == 3 + 63
    assert result.loss == pytest.approx(total / 66, rel=1e-6)


def test_evaluation_takes_what_training_takes(bigram, windows):
    trainer = Trainer(bigram(), sinks=[])
    tokens = windows()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens).numpy()}
    trainer.training_step(batch)
    assert trainer.evaluate([batch]).num_tokens == 32
    tokens[0, 0] = 99
    with pytest.raises(ValueError, match=r"tokens\[0, 0\] = 99"):
        trainer.evaluate([tokens])


def test_evaluation_is_without_dropout_and_draws_no_random_number(bigram, windows):
    model, batch = bigram(dropout=0.5), windows()
    trainer = Trainer(model, TrainingConfig(precision="float32"), sinks=[])
    before = torch.get_rng_state()
    model.training = False  # but the dropout inside is still in train mode
    drawn = []  # a model that draws all the same
    model.head.register_forward_hook(lambda *_: drawn.append(torch.rand(1)))
    result = trainer.evaluate([batch])
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    with torch.no_grad():
        expected = compute_loss(model(batch[:, :-1]), batch[:, 1:])
    assert result.loss == pytest.approx(float(expected), rel=1e-6)


def test_the_learning_rate_is_a_pure_function_of_the_step_with_exact_ends():
    cosine = warmup_cosine(warmup_steps=4, num_steps=20, final_factor=0.1)
    assert [cosine(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine(19) == 0.1
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 16)) / 2
    assert cosine(11) == pytest.approx(middle, rel=1e-12)
    wsd = warmup_stable_decay(warmup_steps=4, num_steps=20, decay_steps=5, final_factor=0.0)
    assert [wsd(s) for s in (0, 3, 10, 14, 19)] == [0.25, 1.0, 1.0, 1.0, 0.0]
    assert wsd(16) == pytest.approx(1 - 2 / 5)
    assert [constant()(s) for s in (0, 10**9)] == [1.0, 1.0]
    assert constant(warmup_steps=2)(0) == 0.5
    for schedule in (cosine, wsd, constant(warmup_steps=3)):
        assert all(0.0 <= schedule(step) <= 1.0 for step in range(30))
        assert schedule(0) > 0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_shortest_runs_have_a_schedule_too(num_steps, warmup_steps):
    for build in (warmup_cosine, warmup_stable_decay):
        schedule = build(warmup_steps=warmup_steps, num_steps=num_steps)
        assert all(0 < schedule(step) <= 1 for step in range(num_steps))


@pytest.mark.parametrize("warmup_steps", [0, 4, 5, 6])
def test_the_plain_settings_of_a_run_that_may_begin_may_go_on(bigram, warmup_steps):
    """A run writes them down without auto, and reads them when it is resumed."""
    asked = {"schedule": "wsd", "warmup_steps": warmup_steps, "num_steps": 6}
    if warmup_steps == 6:
        with pytest.raises(
            ValueError, match="decay_steps=1 and warmup_steps=6 together are longer"
        ):
            TrainingConfig(**asked)
        return
    plain = Trainer(bigram(), TrainingConfig(**asked), sinks=[]).config
    assert TrainingConfig(**plain.model_dump()) == plain


def test_the_first_update_has_the_first_rate_and_the_last_the_last(bigram, windows):
    config = TrainingConfig(schedule="wsd", warmup_steps=4, num_steps=10, decay_steps=3)
    trainer = Trainer(bigram(), config, sinks=[])
    rates = [trainer.training_step(windows()).learning_rate for _ in range(10)]
    assert rates[:4] == [3e-4 * factor for factor in (0.25, 0.5, 0.75, 1.0)]
    assert rates[-1] == 3e-4 * 0.1


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_resuming_at_any_step_continues_the_same_learning_rates(bigram, windows, schedule):
    config = TrainingConfig(schedule=schedule, warmup_steps=3, num_steps=12)
    whole = Trainer(bigram(), config, sinks=[])
    rates = [whole.training_step(windows()).learning_rate for _ in range(12)]
    for start in range(12):
        trainer = Trainer(bigram(), config, sinks=[])
        trainer.step = start
        assert trainer.training_step(windows()).learning_rate == rates[start]


def test_metrics_speak_of_the_step_alone(bigram, windows):
    trainer = Trainer(bigram(), sinks=[])
    metrics = trainer.training_step(windows())
    assert isinstance(metrics, StepMetrics)
    assert metrics.num_tokens == 32
    assert metrics.tokens_per_second == 32 / metrics.step_seconds


def test_no_step_takes_the_time_that_companions_took(bigram, windows, monkeypatch):
    real, skipped = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + skipped[0])

    def evaluate_for_an_hour(trainer, _):
        skipped[0] += 3600.0

    sink = Records()
    companions = [every(2, evaluate_for_an_hour)]
    trainer = Trainer(bigram(), sinks=[sink], companions=companions)
    trainer.fit([windows()], num_steps=5)
    assert len(sink.records) == 5
    assert all(record["step_seconds"] < 1800 for record in sink.records)


class Output(nn.Module):
    """A model that returns what a function makes of its logits."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, tokens):
        return self.function(self.model(tokens))


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


def test_plain_logits_objects_with_logits_and_deferred_logits_train_alike(bigram, windows):
    losses = []
    for function in (
        lambda x: x,
        WithLogits,
        lambda x: DeferredLogits(x, torch.eye(11)),
    ):
        model, config = Output(bigram(), function), TrainingConfig(precision="float32")
        losses.append(Trainer(model, config, sinks=[]).training_step(windows()).loss)
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: (x, None), TypeError, r"returned tuple.*\[B, T, V\]"),
        (lambda x: x[:, -1], ValueError, r"\[4, 11\].*\[B, T, V\]"),
        (lambda x: x[:, :-1], ValueError, r"targets must be \[B, T\] = \[4, 7\]"),
    ],
)
def test_a_model_of_another_output_is_refused_in_one_line(
    bigram, windows, function, error, message
):
    trainer = Trainer(Output(bigram(), function), sinks=[])
    with pytest.raises(error, match=message) as caught:
        trainer.training_step(windows())
    assert "\n" not in str(caught.value)
    assert trainer.step == 0


def test_an_id_outside_the_vocabulary_is_refused_before_the_forward_pass(bigram, windows):
    trainer = Trainer(bigram(), sinks=[])
    batch = windows()
    batch[2, 5] = 11
    with pytest.raises(ValueError, match=r"tokens\[2, 5\] = 11 is outside.*vocabulary of 11"):
        trainer.training_step(batch)


def test_a_model_without_trainable_parameters_is_refused(bigram):
    model = bigram().requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        Trainer(model)
    model.head.weight.requires_grad_(True)
    assert len(Trainer(model, sinks=[]).optimizer.param_groups[0]["params"]) == 1


def test_wrong_arguments_are_refused_by_name(bigram, windows):
    model = bigram()
    for arguments, error, words in [
        ((lambda x: x,), TypeError, "torch.nn.Module"),
        ((model, {"learning_rate": 1}), TypeError, "TrainingConfig"),
    ]:
        with pytest.raises(error, match=words):
            Trainer(*arguments)
    for keywords, error, words in [
        ({"optimizer": "adamw"}, TypeError, "torch.optim.Optimizer"),
        ({"optimizer": torch.optim.SGD(bigram().parameters())}, ValueError, "none of the model"),
        ({"optimizer": torch.optim.LBFGS(model.parameters())}, TypeError, "closure"),
        ({"companions": [print]}, TypeError, r"every\(100, function\)"),
    ]:
        with pytest.raises(error, match=words):
            Trainer(model, **keywords)
    trainer = Trainer(model, sinks=[])
    for num_steps in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
            trainer.fit([windows()], num_steps=num_steps)


def count_call(module, _):
    module.calls.add_(1)


@pytest.mark.parametrize("factor", [math.nan, 2.0, -0.1, None])
def test_a_schedule_outside_its_range_changes_nothing(bigram, windows, factor):
    model = bigram()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(count_call)
    trainer = Trainer(model, schedule=lambda _: factor, sinks=[])
    trainer.prepare(windows())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"schedule\(0\) returned"):
        trainer.training_step(windows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not trainer.mid_update


def test_only_whole_updates_look_whole(bigram, windows):
    trainer = Trainer(bigram(), TrainingConfig(optimizer="muon"), sinks=[])
    trainer.training_step(windows())
    assert not trainer.mid_update

    def fail(*_):
        raise MemoryError("half an update was made")

    trainer.optimizer._muon.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        trainer.training_step(windows())
    assert trainer.mid_update


def test_a_missing_device_is_refused_with_the_remedy(bigram):
    with pytest.raises(ValueError, match=r"device=cuud.*use cpu or auto"):
        Trainer(bigram(), device="cuud")


class Masked(nn.Module):
    """A model that takes one keyword."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, tokens, position_ids=None):
        self.seen.append(position_ids)
        return self.model(tokens)


def test_other_keys_are_forwarded_by_keyword_or_refused_by_name(bigram, windows):
    tokens = windows()
    model = Masked(bigram())
    trainer = Trainer(model, sinks=[])
    trainer.training_step({"input_ids": tokens, "position_ids": tokens})
    assert torch.equal(model.seen[-1], tokens)
    with pytest.raises(TypeError, match="'token_type_ids'"):
        trainer.training_step({"input_ids": tokens, "token_type_ids": tokens})
    right = torch.ones_like(tokens)
    right[1, 5:] = 0
    assert trainer.training_step({"input_ids": tokens, "attention_mask": right}).num_tokens == 28
    with pytest.raises(ValueError, match="pads on the left"):
        trainer.training_step({"input_ids": tokens, "attention_mask": right.flip(1)})
