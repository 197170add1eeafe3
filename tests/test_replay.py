"""Replaying steps of a run: the same bits again, or the first place where they differ."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import log_of, train, workplace  # noqa: F401 the fixture is used by its name

from truestep import (
    Batch,
    NonFiniteError,
    Trainer,
    TrainingConfig,
    load_bundle,
    load_checkpoint,
    save_bundle,
    save_checkpoint,
)
from truestep.checkpoint.bundle import read_batch
from truestep.checkpoint.commit import list_checkpoints, verify_checkpoint
from truestep.checkpoint.lock import CheckpointError
from truestep.cli import main
from truestep.shell import command
from truestep.workflows.build import build_trainer
from truestep.workflows.run import read_run_config

# Above what float32 holds: the second step starts from parameters that are not finite.
DIVERGING = ["--training.learning-rate", "1e30", "--training.max-grad-norm", "off"]


def tree(directory):
    """Every file below a directory with its content, the lock's file aside."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if ".lock" not in path.name}


def replayed(capsys, *arguments):
    capsys.readouterr()
    code = main(["replay", *arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_step_of_a_run_is_replayed_bit_for_bit_and_nothing_is_written(capsys, optimizer):
    assert train("--training.optimizer", optimizer, "--run.keep-best-checkpoints", "0") == 0
    assert [step for step, _ in list_checkpoints(Path("runs/text-1/checkpoints"))] == [8, 12]
    before = tree("runs")
    code, out = replayed(capsys, "runs/text-1", "--step", "1", "--to", "12")
    assert code == 0, out
    assert "starting from the initial weights" in out.out
    assert "steps 1 to 12: batch, learning rate, loss and gradient norm have the logged bits" in (
        out.out
    )
    code, out = replayed(capsys, "--step", "11")
    assert code == 0, out
    assert "starting from runs/text-1/checkpoints/step-8" in out.out
    assert "recomputing steps 9 to 11" in out.out
    assert tree("runs") == before


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("loss", lambda value: value + 1e-7),
        ("grad_norm", lambda value: value * (1 + 1e-7)),
        ("batch_hash", lambda value: value[::-1]),
        ("learning_rate", lambda value: value / 2),
        ("num_tokens", lambda value: value - 1),
        ("skipped", lambda value: True),
    ],
)
def test_the_first_difference_from_the_log_is_said_and_the_exit_code_is_1(capsys, field, change):
    assert train() == 0
    log = Path("runs/text-1/metrics.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        if record["step"] in {7, 9} and "loss" in record:
            record[field] = change(record[field])
            changed = record[field]
    log.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    code, out = replayed(capsys, "--step", "6", "--to", "10")
    assert code == 1
    assert "steps 6 to 10: 2 differ" in out.out
    assert f"step 7: {field} was " in out.out
    assert "step 9" not in out.out
    assert replayed(capsys, "--step", "10", "--to", "12")[0] == 0
    code, out = replayed(capsys, "--step", "9")
    assert f"step 9: {field} was {changed}" in out.out


def test_the_number_of_threads_is_kept_and_applied_again(capsys):
    assert train("--run.threads", "1") == 0
    for arguments in (["train", "--resume", "auto"], ["replay", "--step", "9"]):
        torch.set_num_threads(2)
        assert main(arguments) == 0
        assert torch.get_num_threads() == 1
    assert main(["train", "--resume", "auto", "--run.threads", "2"]) == 2
    assert "run.threads was 1 in this run and is now 2" in capsys.readouterr().err


def test_steps_that_cannot_be_replayed_are_refused_in_one_line(capsys):
    assert train() == 0
    for arguments, words in [
        (["--step", "13"], "step 13 is not in the log of runs/text-1: it has steps 1 to 12"),
        (["--step", "5", "--to", "4"], "--to 4 is before --step 5"),
        ([], "say which step"),
        (["--step", "0"], "0"),
        (["runs/none", "--step", "1"], "is not a run"),
    ]:
        code, out = replayed(capsys, *arguments)
        assert code == 2
        assert words in out.err
        assert out.err.count("\n") == 1
    Path("text.txt").write_text("another text altogether\n" * 300)
    code, out = replayed(capsys, "--step", "10")
    assert code == 2
    assert "is not the text this run began with" in out.err


def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(capsys):
    assert train("--run.keep-best-checkpoints", "0") == 0
    damaged = Path("runs/text-1/checkpoints/step-8/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, out = replayed(capsys, "--step", "9")
    assert code == 0
    assert "trying the checkpoint before it" in out.out
    assert "starting from the initial weights" in out.out
    assert damaged.exists()


def test_a_run_whose_settings_were_changed_on_the_way_is_replayed_with_those_of_each_step(capsys):
    keep = ["--run.keep-checkpoints", "9"]
    assert train(*keep) == 0
    longer = ["--training.num-steps", "20", "--training.seed", "3"]
    allow = ["--override", "training.num_steps", "--override", "training.seed"]
    assert main(["train", "--resume", "runs/text-1", *longer, *allow]) == 0
    for first, last in [(1, 12), (9, 12), (13, 20), (18, 18)]:
        code, out = replayed(capsys, "--step", str(first), "--to", str(last))
        assert code == 0, out
    code, out = replayed(capsys, "--step", "10", "--to", "15")
    assert code == 2
    assert "settings were changed after step 12; replay up to it with --to 12" in out.err
    lines = Path("runs/text-1/changes.jsonl").read_text().splitlines()
    changes = [json.loads(line) for line in lines]
    assert {(c["step"], c["setting"], c["before"], c["after"]) for c in changes} == {
        (12, "training.num_steps", 12, 20),
        (12, "training.seed", 0, 3),
    }
    for path in Path("runs/text-1/checkpoints").glob("step-1[26]"):
        path.rename(path.with_name(f".bad-{path.name}"))
    code, out = replayed(capsys, "--step", "14")
    assert code == 2
    assert "no checkpoint from there to step 13 is left" in out.err


def test_a_loss_that_is_not_finite_leaves_a_bundle_that_replays_in_a_fresh_process(capsys):
    assert train(*DIVERGING) == 1
    out = capsys.readouterr()
    assert "nothing was updated" in out.err
    records = [record for record in log_of("runs/text-1") if "loss" in record]
    failed = records[-1]
    assert failed["skipped"]
    step = failed["step"]
    assert step > 1
    bundle = Path(f"runs/text-1/bundles/step-{step}-before")
    assert f"  {command('replay', bundle)}\n" in out.out
    verify_checkpoint(bundle)
    # The batch is that step's, and the state is the one before it, as the checkpoint has it.
    assert read_batch(bundle).hash() == failed["batch_hash"]
    checkpoint = Path(f"runs/text-1/checkpoints/step-{step - 1}")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (bundle / name).read_bytes() == (checkpoint / name).read_bytes()
    Path("text.txt").unlink()  # the bundle is enough
    code, out = replayed(capsys, str(bundle))
    assert code == 0, out
    assert f"step {step}: loss {failed['loss']}" in out.out
    assert "the same bits as in the run" in out.out
    assert out.out.count("backward: ") == 2, out.out  # then and now


def test_going_on_after_a_loss_that_was_not_finite_meets_it_again_with_the_same_bits(capsys):
    assert train(*DIVERGING) == 1
    before, bundles = tree("runs/text-1/checkpoints"), list(Path("runs/text-1/bundles").iterdir())
    log = log_of("runs/text-1")
    assert main(["train", "--resume", "auto"]) == 1
    assert tree("runs/text-1/checkpoints") == before
    assert log_of("runs/text-1") == log
    assert list(Path("runs/text-1/bundles").iterdir()) == bundles  # the same bytes, once
    last = str(log[-1]["step"])
    assert replayed(capsys, "--step", "1", "--to", last)[0] == 0


def test_parameters_that_are_not_finite_are_not_saved_and_that_is_said(capsys):
    further = ["--training.learning-rate", "3e38", "--training.max-grad-norm", "off"]
    assert train(*further, "--run.save-every", "9") == 1
    out = capsys.readouterr().out
    assert "the parameters of step 1 are not finite and are not saved; lower training.lear" in out
    assert not list(Path("runs/text-1").glob("checkpoints/step-*"))


def test_a_bundle_that_cannot_be_written_costs_only_the_bundle(capsys, monkeypatch):
    def no_room(*_, **__):
        raise OSError(28, "No space left on device", "bundles")

    monkeypatch.setattr("truestep.workflows.train.save_bundle", no_room)
    assert train(*DIVERGING, "--run.save-every", "99") == 1
    out = capsys.readouterr()
    assert "then this failed, too: bundles: No space left on device" in out.out
    assert "nothing was updated" in out.err.splitlines()[-1]
    last = [record["step"] for record in log_of("runs/text-1") if "loss" in record][-1]
    assert Path(f"runs/text-1/checkpoints/step-{last - 1}").is_dir()


@pytest.mark.parametrize("command", ["replay", "inspect"])
def test_text_that_was_edited_is_refused_where_no_checkpoint_comes_before(capsys, command):
    assert train() == 0
    Path("text.txt").write_text(Path("text.txt").read_text().replace("e", "E", 1))
    assert main([command, "runs/text-1", "--step", "3"]) == 2
    assert "is not the text this run began with" in capsys.readouterr().err


def test_changes_are_forgotten_when_a_run_begins_anew(capsys):
    assert train("--training.num-steps", "6") == 0
    change = ["--training.learning-rate", "0.1", "--override", "training.learning_rate"]
    assert main(["train", "--resume", "runs/text-1", *change]) == 0
    shutil.rmtree("runs/text-1/checkpoints")
    assert main(["train", "--resume", "runs/text-1"]) == 0
    assert replayed(capsys, "--step", "3")[0] == 0


def test_changes_are_kept_where_every_checkpoint_is_damaged(capsys):
    assert train("--training.num-steps", "6") == 0
    change = ["--training.learning-rate", "0.1", "--override", "training.learning_rate"]
    assert main(["train", "--resume", "runs/text-1", *change]) == 0
    kept = Path("runs/text-1/changes.jsonl").read_bytes()
    for path in Path("runs/text-1/checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"damaged")
    for _ in range(2):  # the first sets them aside
        assert main(["train", "--resume", "runs/text-1"]) == 2
        assert "has no intact checkpoint left" in capsys.readouterr().err
        assert Path("runs/text-1/changes.jsonl").read_bytes() == kept
    assert kept


def test_more_steps_of_a_constant_schedule_are_no_change_to_replay(capsys):
    constant = ["--training.schedule", "constant", "--training.num-steps", "6"]
    assert train(*constant, "--run.keep-checkpoints", "9") == 0
    assert main(["train", "--resume", "runs/text-1", "--training.num-steps", "12"]) == 0
    assert replayed(capsys, "--step", "5", "--to", "9")[0] == 0
    assert main(["verify", "runs/text-1"]) == 0


def test_a_checkpoint_that_no_run_saved_is_refused_in_one_line(capsys, bigram):
    assert train() == 0
    shutil.rmtree("runs/text-1/checkpoints")
    config = read_run_config(Path("runs/text-1"))
    _, trainer = build_trainer(config)
    save_checkpoint(trainer, "runs/text-1/checkpoints")
    capsys.readouterr()
    assert main(["train", "--resume", "runs/text-1"]) == 2
    error = capsys.readouterr().err
    assert "step-0 was not saved by truestep train: its facts have no config" in error
    assert len(error.splitlines()) == 1


def test_what_is_no_run_is_told_apart(capsys):
    assert train(*DIVERGING) == 1
    (bundle,) = Path("runs/text-1/bundles").iterdir()
    code, out = replayed(capsys, str(bundle), "--step", "2")
    assert code == 2
    assert "is a bundle of one step; leave --step and --to out" in out.err
    moved = bundle.rename("elsewhere")
    assert replayed(capsys, str(moved))[0] == 0
    code, out = replayed(capsys, "runs/text-1/checkpoints/step-1", "--step", "1")
    assert code == 2
    assert "is not a run: it has no config.toml; give runs/text-1" in out.err
    code, out = replayed(capsys, "text-1", "--step", "1")
    assert code == 2
    assert "text-1 is not a run: it has no config.toml; give runs/text-1" in out.err
    assert main(["verify", "runs/text-1/checkpoints"]) == 2
    with pytest.raises(CheckpointError, match="holds checkpoints; give one of them, such as"):
        load_checkpoint(Path("runs/text-1/checkpoints"), None)


class Fragile(torch.nn.Module):
    """A model of the user's, with an input of its own, that fails on one token."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, scale):
        logits = self.inner(tokens) * scale[:, None, None]
        return logits.masked_fill((tokens == 3)[..., None], float("nan"))


def test_a_bundle_of_any_model_brings_state_and_batch_to_another_trainer(bigram, windows, tmp_path):
    config = TrainingConfig(precision="float32", compile="off")

    def batch(seed, scale):
        ids = windows(seed=seed).clamp(max=2)
        return {"input_ids": ids, "scale": torch.full((4,), scale)}

    bad = batch(2, 0.5)
    bad["input_ids"][1, 2] = 3
    trainer = Trainer(Fragile(bigram()), config, sinks=[])
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit([batch(0, 1.0), batch(1, 2.0), bad])
    assert trainer.step == 2
    path = save_bundle(trainer, caught.value.batch, tmp_path, facts={"why": "not finite"})
    assert path == tmp_path / "step-3-before"
    again = Trainer(Fragile(bigram(5)), config, sinks=[])
    loaded, facts = load_bundle(path, again)
    assert facts == {"why": "not finite"}
    assert again.step == 2
    assert loaded.hash() == Batch.of(bad).hash() == caught.value.metrics.batch_hash
    metrics = again.training_step(loaded)
    assert metrics.skipped
    assert repr(metrics.loss) == repr(caught.value.metrics.loss)
    assert repr(metrics.grad_norm) == repr(caught.value.metrics.grad_norm)
    assert save_bundle(trainer, loaded, tmp_path) == path  # the same bytes are there already
    other = Batch.of(batch(5, 0.5))
    assert save_bundle(trainer, other, tmp_path) == tmp_path / "step-3-before-2"
    assert save_bundle(trainer, other, tmp_path) == tmp_path / "step-3-before-2"


def test_a_checkpoint_is_no_bundle(bigram, windows, tmp_path):
    trainer = Trainer(bigram(), sinks=[])
    trainer.training_step(windows())
    path = save_checkpoint(trainer, tmp_path)
    with pytest.raises(CheckpointError, match="holds no batch"):
        load_bundle(path, trainer)


def test_the_hash_of_a_batch_is_of_everything_in_it(windows):
    ids, other = windows(seed=0), windows(seed=1)
    batch = Batch.of(ids)
    assert batch.hash() == Batch.of(ids.clone()).hash()
    assert len(batch.hash()) == 16
    different = [
        Batch.of(other),
        Batch(batch.tokens, Batch.of(other).targets),
        Batch(batch.tokens, batch.targets.masked_fill(batch.targets == 3, -100)),
        Batch(batch.tokens, batch.targets, {"scale": torch.ones(4)}),
        Batch(batch.tokens, batch.targets, {"scale": torch.zeros(4)}),
        Batch(batch.tokens[:2], batch.targets[:2]),
        Batch(batch.targets, batch.tokens),
    ]
    assert len({b.hash() for b in [batch, *different]}) == len(different) + 1
