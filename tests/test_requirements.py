"""The eleven requirements of the first users, each with a test named after it, by public names."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import truestep
from truestep import IGNORE_INDEX, JsonlSink, RunConfig, Trainer, TrainingConfig, compute_loss
from truestep.cli import main

EXACT = {"precision": "float32", "compile": "off"}


def seeded_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_1_compute_loss_is_next_token_cross_entropy_over_all_positions_and_a_scalar_for_backward():
    vocab_size = 33
    logits = seeded_logits(3, 256, vocab_size).requires_grad_()
    targets = torch.randint(vocab_size, (3, 256), generator=torch.Generator().manual_seed(1))
    loss = compute_loss(logits, targets)
    rows = logits.detach().double()
    every_position = [
        math.log(sum(math.exp(x) for x in rows[b, t].tolist())) - float(rows[b, t, targets[b, t]])
        for b in range(3)
        for t in range(256)
    ]
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(every_position) / len(every_position), rel=2e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_2_compute_loss_matches_known_values_and_is_differentiable():
    uniform = torch.zeros(2, 256, 50)
    targets = torch.zeros(2, 256, dtype=torch.long)
    assert float(compute_loss(uniform, targets)) == pytest.approx(math.log(50), rel=1e-6)
    margin = uniform.clone()
    margin[..., 0] = 2.0
    expected = math.log(1 + 49 * math.exp(-2.0))
    assert float(compute_loss(margin, targets)) == pytest.approx(expected, rel=1e-6)
    small = seeded_logits(2, 3, 5).double().requires_grad_()
    labels = torch.tensor([[0, 4, IGNORE_INDEX], [2, 2, 1]])
    assert torch.autograd.gradcheck(lambda x: compute_loss(x, labels), (small,))


def test_3_training_step_does_forward_loss_backward_and_update_without_errors(bigram, windows):
    model = bigram()
    before = [p.detach().clone() for p in model.parameters()]
    metrics = Trainer(model).training_step(windows())
    assert math.isfinite(metrics.loss)
    assert metrics.grad_norm > 0
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_4_the_step_counter_increments_by_one_per_call_over_many_steps(bigram, windows):
    trainer = Trainer(bigram(), sinks=[])
    assert trainer.step == 0
    for expected in range(1, 101):
        metrics = trainer.training_step(windows(seed=expected))
        assert trainer.step == expected
        assert metrics.step == expected


def test_5_a_completed_step_logs_its_loss_on_the_console_and_in_the_log_file(
    bigram, windows, tmp_path, capsys
):
    model, batch = bigram(), windows()
    with torch.no_grad():
        expected = float(compute_loss(model(batch[:, :-1]), batch[:, 1:]))
    path = tmp_path / "metrics.jsonl"
    config = TrainingConfig(**EXACT)
    file = JsonlSink(path)
    trainer = Trainer(model, config)
    trainer.sinks.append(file)
    metrics = trainer.training_step(batch)
    file.close()
    line = capsys.readouterr().out
    assert metrics.loss == pytest.approx(expected, rel=1e-6)
    assert float(re.search(r"loss +(\S+)", line)[1]) == pytest.approx(metrics.loss, abs=5e-4)
    record = json.loads(path.read_text())
    assert record["step"] == 1
    assert record["loss"] == metrics.loss


def test_6_a_trainer_has_adamw_with_the_stated_hyperparameters_and_tracks_its_state(
    bigram, windows
):
    trainer = Trainer(bigram(), sinks=[])
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    for values in (trainer.optimizer.defaults, trainer.optimizer.param_groups[0]):
        assert values["lr"] == 3e-4
        assert values["weight_decay"] == 0.1
        assert tuple(values["betas"]) == (0.9, 0.95)
    trainer.training_step(windows())
    state = trainer.optimizer.state
    assert set(state) == set(trainer.model.parameters())
    assert all({"step", "exp_avg", "exp_avg_sq"} <= set(entry) for entry in state.values())


def test_7_parameters_move_according_to_the_gradients_and_the_optimizer_state_is_kept(
    bigram, windows
):
    ours, plain = bigram(), bigram()
    trainer = Trainer(ours, TrainingConfig(**EXACT, max_grad_norm="off"), sinks=[])
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(10):
        batch = windows(seed=step)
        trainer.training_step(batch)
        reference.zero_grad()
        logits = plain(batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        reference.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        moment = trainer.optimizer.state[mine]["exp_avg"]
        torch.testing.assert_close(moment, reference.state[theirs]["exp_avg"], rtol=0, atol=1e-6)
        assert trainer.optimizer.state[mine]["step"] == 10


def test_8_hyperparameters_load_from_a_file_or_are_passed_as_parameters(bigram, tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(
        "[training]\nlearning_rate = 1e-3\nweight_decay = 0.02\nbetas = [0.8, 0.9]\n"
        'num_steps = 77\nmax_grad_norm = "off"\n'
    )
    flat = tmp_path / "flat.json"
    flat.write_text('{"learning_rate": 1e-3, "weight_decay": 0.02, "betas": [0.8, 0.9]}')
    passed = TrainingConfig(learning_rate=1e-3, weight_decay=0.02, betas=(0.8, 0.9))
    loaded = TrainingConfig.load(path)
    assert (loaded.num_steps, loaded.max_grad_norm) == (77, "off")
    assert TrainingConfig.load(flat) == passed
    for config in (loaded, passed):
        group = Trainer(bigram(), config, sinks=[]).optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (1e-3, 0.02)
        assert tuple(group["betas"]) == (0.8, 0.9)


def test_9_every_parameter_is_documented_with_its_default_in_help_docstring_and_reference(
    capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")
    main(["train", "--help"])
    help_text = capsys.readouterr().out
    reference = (Path(__file__).parent.parent / "docs" / "reference.md").read_text()
    listed = 0
    for section, field in RunConfig.model_fields.items():
        page = reference.split(f"## [{section}]")[1].split("\n## ")[0]
        for name, setting in field.annotation.model_fields.items():
            meaning = " ".join(setting.description.split())
            default = json.dumps(setting.default)
            docstring = field.annotation.__doc__.split(f"    {name}: ")[1]
            assert docstring.splitlines()[0].endswith(f" = {default}")
            assert docstring.splitlines()[1].strip() == meaning
            row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
            assert f"| `{default}` |" in row
            assert meaning in row
            option = f"--{section}.{name.replace('_', '-')} "
            shown = next(line for line in help_text.splitlines() if option in line)
            assert meaning in shown
            assert (
                f"[default: {setting.default if setting.default != '' else chr(34) * 2}]" in shown
            )
            listed += 1
    assert listed > 40
    for name in ("learning_rate", "weight_decay", "betas"):
        assert name in TrainingConfig.model_fields


def test_10_a_trainer_trains_a_few_steps_on_a_tiny_dataset(bigram, windows, capsys):
    model = bigram()
    seen = []
    data = [windows(seed=0), windows(seed=1)]
    trainer = Trainer(model, companions=[truestep.every(1, lambda _, m: seen.append(m))])
    before = [p.detach().clone() for p in model.parameters()]
    trainer.fit(data, num_steps=5)
    assert [metrics.step for metrics in seen] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(metrics.loss) for metrics in seen)
    assert len(re.findall(r"^step +\d+ +loss +\d", capsys.readouterr().out, re.MULTILINE)) == 5
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_11_on_simple_synthetic_data_the_loss_goes_down(bigram):
    start = torch.arange(16) % 11
    counting = (start[:, None] + torch.arange(9)) % 11  # each token is the one before plus one
    trainer = Trainer(bigram(), TrainingConfig(learning_rate=1e-2), sinks=[])
    losses = [trainer.training_step(counting).loss for _ in range(100)]
    assert losses[0] == pytest.approx(math.log(11), abs=0.4)
    assert all(
        later < earlier for earlier, later in zip(losses[::20], losses[20::20], strict=False)
    )
    assert losses[-1] < 0.2
