"""Several processes train as one: law 5, and law 4 over processes."""

import functools
import hashlib

import pytest
import torch
from conftest import Bigram
from ranks import together

from truestep import Batch, Trainer, TrainingConfig, every
from truestep.distributed.process import ALONE, Processes, current
from truestep.loss import IGNORE_INDEX
from truestep.training.reduction import ExactReduction

PLAIN = {"precision": "float32", "compile": "off", "max_grad_norm": "off"}


def ragged(step, rows=8):
    """Return a global batch whose rows have very unequal numbers of targets, one of them none."""
    generator = torch.Generator().manual_seed(step)
    windows = torch.randint(0, 11, (rows, 8), generator=generator)
    targets = windows[:, 1:].clone()
    for row in range(rows):
        targets[row, row % 7 :] = IGNORE_INDEX
    return Batch(windows[:, :-1], targets)


class Ragged:
    def batch_at(self, step, *, part=0, parts=1):
        whole = ragged(step)
        rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
        return Batch(whole.tokens[rows], whole.targets[rows], index=part * 8 // parts)


def trained(dtype, steps, micro_batch_size, **settings):
    """Train in each of the processes and return losses, gradient norms and parameters."""
    torch.manual_seed(0)
    model = Bigram(dropout=0.2).to(dtype)
    config = TrainingConfig(micro_batch_size=micro_batch_size, num_steps=steps, **PLAIN | settings)
    trainer = Trainer(model, config, device="cpu", sinks=())
    data, told = Ragged(), []
    for step in range(steps):
        place = trainer.processes
        metrics = trainer.training_step(data.batch_at(step, part=place.rank, parts=place.size))
        told.append((metrics.loss, metrics.grad_norm, metrics.num_tokens, metrics.batch_hash))
    return told, [parameter.detach() for parameter in model.parameters()]


def test_two_and_four_processes_train_as_one():
    alone, weights = trained(torch.float64, 5, 2)
    for size in (2, 4):
        for told, theirs in together(size, trained, torch.float64, 5, 2):
            assert [t[2:] for t in told] == [t[2:] for t in alone]  # targets, hash of the batch
            losses, norms = ([t[i] for t in told] for i in (0, 1))
            assert losses == pytest.approx([t[0] for t in alone], rel=1e-12)
            assert norms == pytest.approx([t[1] for t in alone], rel=1e-12)
            torch.testing.assert_close(theirs, weights, rtol=1e-10, atol=1e-12)


def hashed(compile_, steps=4):
    """Train exactly and return what was logged and one hash of the weights."""
    exact = {"reduction": "exact", "lanes": 4, "compile": compile_, "max_grad_norm": 0.1}
    told, weights = trained(torch.float32, steps, 1, **exact)
    return told, hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_exact_sums_are_the_same_bits_on_one_two_and_four_processes(compile_):
    alone = hashed(compile_)
    for size in (2, 4):
        assert together(size, hashed, compile_) == [alone] * size


def test_fast_sums_are_not_the_same_bits():
    fast = {"reduction": "fast", "max_grad_norm": 0.1}
    _, alone = trained(torch.float32, 4, 1, **fast)
    (_, theirs), _ = together(2, functools.partial(trained, **fast), torch.float32, 4, 1)
    assert not all(torch.equal(a, b) for a, b in zip(alone, theirs, strict=True))


def test_exact_micro_batches_divide_the_rows_of_a_lane():
    model = Bigram()
    exact = TrainingConfig(reduction="exact", lanes=4, micro_batch_size=2, **PLAIN)
    with pytest.raises(
        ValueError, match=r"micro_batch_size=2 does not divide the 3 rows of a lane"
    ):
        Trainer(model, exact, device="cpu", sinks=()).training_step(ragged(0, rows=12))
    trainer = Trainer(model, exact, device="cpu", sinks=())
    with pytest.raises(ValueError, match="10 rows cannot be cut into 4 lanes; use a batch size"):
        trainer.training_step(ragged(0, rows=10))
    reduction = ExactReduction(model, ALONE, lanes=2)
    assert [reduction.at_most(size, 12) for size in (20, 12, 11, 5, 1, 0)] == [12, 12, 6, 4, 1, 0]


@pytest.mark.parametrize(("rows", "lanes"), [(16, 8), (12, 4), (7, 1), (64, 8)])
def test_lanes_are_as_many_as_divide_the_batch(rows, lanes):
    trainer = Trainer(Bigram(), TrainingConfig(reduction="exact", **PLAIN), device="cpu", sinks=())
    trainer.training_step(ragged(0, rows=rows))
    assert trainer.config.lanes == lanes


def fitted(data, settings):
    torch.manual_seed(0)
    model = Bigram(dropout=0.2)
    trainer = Trainer(model, TrainingConfig(**PLAIN | settings), device="cpu", sinks=())
    trainer.fit(data, num_steps=3)
    return [parameter.detach() for parameter in model.parameters()]


class Whole:
    """Data that knows nothing of parts."""

    def batch_at(self, step):
        return ragged(step)


@pytest.mark.parametrize("data", [Whole(), Ragged(), [ragged(0), ragged(1), ragged(2)]])
def test_fit_gives_each_process_rows_of_its_own(data):
    exact = {"reduction": "exact", "micro_batch_size": 1}
    alone = fitted(data, exact)
    for theirs in together(2, fitted, data, exact):
        assert all(torch.equal(a, b) for a, b in zip(alone, theirs, strict=True))


def broken_on_one(bad):
    """Train three steps, the second with a loss that is not finite on one process alone."""
    torch.manual_seed(0)
    model = Bigram()
    trainer = Trainer(model, TrainingConfig(**PLAIN), device="cpu", sinks=())
    place, states = trainer.processes, []
    for step in range(3):
        if (step, place.rank) == (1, bad):
            hook = model.register_forward_hook(lambda *arguments: arguments[-1] * float("nan"))
        share = Ragged().batch_at(step, part=place.rank, parts=place.size)
        skipped = trainer.training_step(share).skipped
        if (step, place.rank) == (1, bad):
            hook.remove()
        states.append((skipped, [parameter.detach().clone() for parameter in model.parameters()]))
    return states


def test_a_loss_that_is_not_finite_on_one_process_updates_none():
    for states in together(2, broken_on_one, 1):
        assert [skipped for skipped, _ in states] == [False, True, False]
        (_, first), (_, second), (_, third) = states
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


class Stopping:
    """Data in whose reading one process is told to stop."""

    def __init__(self, rank):
        self.rank, self.trainer = rank, None

    def batch_at(self, step, *, part=0, parts=1):
        if (step, part) == (2, self.rank):
            self.trainer.stop("SIGTERM")
        return Ragged().batch_at(step, part=part, parts=parts)


def stopped(data, asks=None, inside=None):
    """Fit until one process asks to stop, in between, in a companion or inside a step."""
    torch.manual_seed(0)

    def ask(trainer, metrics):
        if (metrics.step, trainer.processes.rank) == (2, asks):
            trainer.stop("enough")

    trainer = Trainer(
        Bigram(),
        TrainingConfig(**PLAIN),
        companions=[every(1 if asks is not None else 100, ask)],
        device="cpu",
        sinks=(),
    )
    data.trainer = trainer

    def ask_inside(*_):
        if (trainer.step, trainer.processes.rank) == (2, inside):
            trainer.stop("SIGTERM")

    trainer.model.register_forward_hook(ask_inside)
    trainer.fit(data, num_steps=10)
    first = trainer.step, trainer.stop_reason
    trainer.fit(Ragged(), num_steps=10)
    return first, (trainer.step, trainer.stop_reason)


def test_one_process_that_is_told_to_stop_stops_all_at_one_step():
    for size, rank in ((1, 0), (2, 1), (4, 2)):
        asked = together(size, stopped, Stopping(rank)) if size > 1 else [stopped(Stopping(rank))]
        reasons = ["SIGTERM" if place == rank else "another process" for place in range(size)]
        assert asked == [((3, reason), (10, None)) for reason in reasons]


def test_a_wish_that_comes_too_late_for_a_step_stops_all_after_the_next():
    for theirs in together(2, stopped, Stopping(None), None, 1):
        assert theirs[0][0] == 4
    assert stopped(Stopping(None), None, 0)[0] == (3, "SIGTERM")


def test_a_companion_of_one_process_stops_all_after_its_step():
    for size, rank in ((1, 0), (2, 1)):
        data = Stopping(None)
        asked = together(size, stopped, data, rank) if size > 1 else [stopped(data, rank)]
        reasons = ["enough" if place == rank else "another process" for place in range(size)]
        assert asked == [((2, reason), (10, None)) for reason in reasons]


def evaluated():
    torch.manual_seed(0)
    trainer = Trainer(Bigram(), TrainingConfig(**PLAIN), device="cpu", sinks=())
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.prepare(ragged(0))
    calls.clear()
    lengths = torch.arange(1, 12)
    result = trainer.evaluate((ragged(step) for step in range(7)), token_bytes=lengths)
    return result, len(calls)


def test_processes_share_an_evaluation_and_come_to_the_same_bits():
    alone, calls = evaluated()
    assert calls == 7
    for size in (2, 4):
        theirs = together(size, evaluated)
        assert [result for result, _ in theirs] == [alone] * size
        assert [calls for _, calls in theirs] == [len(range(r, 7, size)) for r in range(size)]


def test_processes_that_have_not_met_are_refused():
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE=2, but these processes have not met; call"):
        current({"WORLD_SIZE": "2"})


def test_three_processes_cannot_share_four_lanes():
    with pytest.raises(ValueError, match="lanes=4 cannot be shared by 3 processes; use a number"):
        ExactReduction(Bigram(), Processes(0, 3), lanes=4)
