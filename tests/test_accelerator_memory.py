"""An accelerator whose memory ends in the middle of a backward pass: the step is made again."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from test_cli import log_of, train, weights_of, workplace  # noqa: F401 the fixture is used
from test_fit import Records

from truestep import NonFiniteError, Trainer, TrainingConfig
from truestep.cli import main
from truestep.config import RunConfig
from truestep.setting_sources import read_settings_file
from truestep.settings import validate

STEP = 6  # whose backward pass fails


class Full(torch.autograd.Function):
    """The identity, until its gradient meets an accelerator that is full."""

    @staticmethod
    def forward(_, x):
        return x * Full.factor

    @staticmethod
    def backward(_, gradient):
        if len(gradient) > Full.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradient


class Watched(torch.nn.Module):
    """A model with averages in buffers, which fills the accelerator below its head."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.average = torch.nn.BatchNorm1d(8, affine=False)

    def forward(self, tokens):
        model = self.model
        hidden = model.hidden(model.embedding(tokens))
        self.average(hidden.flatten(0, 1).detach())
        return model.head(Full.apply(torch.tanh(hidden)))


@pytest.fixture(autouse=True)
def room():
    Full.room, Full.factor = 100, 1.0


def trainer_of(bigram, **settings):
    plain = {"precision": "float32", "compile": "off"}
    return Trainer(Watched(bigram()), TrainingConfig(**plain, **settings), sinks=[])


def state_of(trainer):
    moments = trainer.optimizer.state_dict()["state"]
    values = [v for entry in moments.values() for v in entry.values()]
    return [tensor.clone() for tensor in [*trainer.model.state_dict().values(), *values]]


def assert_same_bits(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("rows_that_fit", "sizes"), [(7, [6]), (5, [6, 3]), (2, [6, 3, 1])])
def test_a_step_is_made_again_in_smaller_micro_batches(bigram, windows, rows_that_fit, sizes):
    """Law 4: what was begun leaves no trace; loss and update are those of the smaller size."""
    trainer, other = trainer_of(bigram), trainer_of(bigram)
    for each in (trainer, other):
        each.training_step(windows(12, seed=1))
    Full.room = rows_that_fit
    told = []

    def look():
        told.append(trainer.config.micro_batch_size)
        assert trainer.step == 1
        assert not trainer.mid_update
        assert all(p.grad is None for p in trainer.model.parameters())
        assert_same_bits(state_of(trainer), state_of(other))

    trainer.when_resized = look
    with pytest.warns(UserWarning, match="the memory of cpu ended in step 2") as warned:
        metrics = trainer.training_step(windows(12, seed=2))
    assert told == sizes
    assert len(warned) == len(sizes)
    other.config = other.config.model_copy(update={"micro_batch_size": told[-1]})
    assert other.training_step(windows(12, seed=2)).loss == metrics.loss
    assert_same_bits(state_of(trainer), state_of(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.training_step(windows(12, seed=3))


def test_a_batch_of_odd_size_makes_no_micro_batch_smaller_than_it_must(bigram, windows):
    """A size stays for the rest of the run: 13 rows have no divisor but 1."""
    trainer, other = (trainer_of(bigram, micro_batch_size=16) for _ in range(2))
    Full.room = 8
    with pytest.warns(UserWarning, match="micro-batches of 13 rows: from here on they have 6"):
        metrics = trainer.training_step(windows(13, seed=1))
    Full.room = 100
    assert metrics.loss == pytest.approx(other.training_step(windows(13, seed=1)).loss, rel=1e-6)


def test_one_row_that_does_not_fit_is_an_error_that_changes_nothing(bigram, windows):
    trainer, other = trainer_of(bigram, micro_batch_size=1), trainer_of(bigram)
    Full.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        trainer.training_step(windows())
    assert trainer.in_step
    assert not trainer.mid_update
    assert_same_bits(state_of(trainer), state_of(other))
    assert trainer.step == 0


def test_an_update_that_ran_out_of_memory_halfway_is_not_made_again(bigram, windows, monkeypatch):
    """Half the parameters have moved: no second step can mend that, the last checkpoint does."""
    trainer = trainer_of(bigram)

    def half_an_update():
        next(trainer.model.parameters()).data.add_(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.optimizer, "step", half_an_update)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.training_step(windows())
    assert trainer.mid_update
    assert trainer.step == 0


def test_a_forward_that_fails_leaves_a_trainer_as_it_was(bigram, windows):
    trainer, other = trainer_of(bigram), trainer_of(bigram)
    handle = trainer.model.model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.training_step(windows())
    handle.remove()
    assert_same_bits(state_of(trainer), state_of(other))
    assert trainer.training_step(windows()).loss == other.training_step(windows()).loss


@pytest.fixture
def full_in_one_step():
    """Let a trainer's backward pass of more than two rows fail in step STEP, halfway."""
    whole = Trainer._forward_backward

    def forward_backward(self, batch, num_tokens):
        if self.step == STEP - 1 and len(batch.tokens) > 2:
            whole(self, batch, num_tokens)  # gradients are there, of half a step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch, num_tokens)

    patch = pytest.MonkeyPatch()  # of its own: undone in the middle of a test
    patch.setattr(Trainer, "_forward_backward", forward_backward)
    yield patch
    patch.undo()


LIKE = ["--training.micro-batch-size", "4", "--run.keep-checkpoints", "9"]


@pytest.mark.filterwarnings("default")
def test_a_run_writes_the_smaller_size_down_and_resumes_and_replays_by_it(full_in_one_step, capsys):
    assert train(*LIKE) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert "the memory of cpu ended in step 6 with micro-batches of 4 rows: from here on" in said
    run = Path("runs/text-1")
    settings = validate(RunConfig, {"": read_settings_file(run / "config.toml")})
    assert settings.training.micro_batch_size == 2
    changes = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert changes == [{"step": 5, "setting": "training.micro_batch_size", "before": 4, "after": 2}]
    full_in_one_step.undo()  # from here on memory suffices
    log, weights = log_of(run), weights_of(run, 12)
    for first, last in ((1, 5), (6, 12)):
        assert main(["replay", str(run), "--step", str(first), "--to", str(last)]) == 0
    for step in (8, 5):  # a kill right after each checkpoint
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        assert main(["train", "--resume", str(run)]) == 0
        assert log_of(run) == log
        assert weights_of(run, 12) == weights


class Numbered:
    """Batches that fill the accelerator in one step, after one whose numbers may not be finite."""

    def __init__(self, windows, spoilt):
        self._windows, self._spoilt = windows, spoilt

    def batch_at(self, step):
        Full.room = 6 if step == STEP - 1 else 100
        Full.factor = float("nan") if step == STEP - 2 and self._spoilt else 1.0
        return self._windows(12, seed=step)


@pytest.mark.parametrize(
    ("spoilt", "allowed"), [(False, 0), (True, 1), (True, 0)], ids=["clean", "skipped", "halted"]
)
@pytest.mark.filterwarnings("ignore:the memory of cpu ended")
def test_a_step_in_flight_is_finished_before_the_next_is_made_again(
    bigram, windows, spoilt, allowed
):
    """What is saved then must not know more than the log, nor count a step that did not."""
    trainer, other = (trainer_of(bigram, max_skipped_steps=allowed) for _ in range(2))
    trainer.runs_ahead = True  # as on an accelerator
    sink, told = Records(), []
    trainer.sinks = [sink]

    def look():
        told.append((trainer.step, [record["step"] for record in sink.records]))
        assert trainer.skipped_in_a_row == spoilt

    trainer.when_resized = look
    data = Numbered(windows, spoilt)
    if spoilt and not allowed:
        with pytest.raises(NonFiniteError, match=f"step {STEP - 1}"):
            trainer.fit(data, num_steps=STEP + 2)
        assert not told
        assert trainer.step == len(sink.records) - 1 == STEP - 2
    else:
        trainer.fit(data, num_steps=STEP + 2)
        assert told == [(STEP - 1, list(range(1, STEP)))]
        assert [record["step"] for record in sink.records] == list(range(1, STEP + 3))
    for step in range(trainer.step):
        batch = data.batch_at(step)
        if step == STEP - 1:
            other.config = other.config.model_copy(update={"micro_batch_size": 6})
        other.training_step(batch)
    assert_same_bits(state_of(trainer), state_of(other))
