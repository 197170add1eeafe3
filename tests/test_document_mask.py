"""Documents that do not see each other: the oracle runs each of them by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import log_of, weights_of, workplace  # noqa: F401 a fixture, used by its name

from truestep import GPT, Batch, GPTConfig, Trainer, TrainingConfig, evaluate
from truestep.cli import main
from truestep.data.document_mask import with_positions
from truestep.data.loader import evaluation_batches
from truestep.loss import compute_loss, token_losses
from truestep.model.attention import attend
from truestep.workflows.evaluate import evaluate_run
from truestep.workflows.sources import open_data
from truestep.workflows.trained import load_trained

END = 0  # as of bytes
SHAPES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": True},
    "deferred": {"vocab_size": 4096},
}


def model_of(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    values = {"vocab_size": 11, "context_length": 24, "num_layers": 2, "num_heads": 4, "width": 16}
    return GPT(GPTConfig(**values | changes)).to(dtype)


def packed(lengths, seed=0):
    """Documents, each of an end and then text, one after the other; the first lacks its end."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(1, 11, (length,), generator=generator) for length in lengths]
    for document in documents[1:]:
        document[0] = END
    text = torch.cat([*documents, torch.tensor([END])])
    return documents, with_positions(Batch.of(text[None]), END)


def test_positions_count_from_each_end_of_a_document():
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 1, 1, 1, 1, 0]])
    batch = with_positions(Batch(tokens, tokens, index=3), END)
    assert batch.inputs["positions"].tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]
    assert batch.index == 3
    assert torch.equal(batch.targets, tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[24], [9, 15], [1, 1, 5, 1, 16], [3, 20, 1]])
def test_loss_and_gradient_of_each_document_are_those_it_has_alone(shape, lengths):
    documents, batch = packed(lengths)
    model = model_of(**SHAPES[shape]).train()
    losses = token_losses(model(batch.tokens, **batch.inputs), batch.targets)[0]
    total = compute_loss(model(batch.tokens, **batch.inputs), batch.targets, num_tokens=1)
    total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    start = 0
    for number, document in enumerate(documents):
        following = documents[number + 1][0] if number + 1 < len(documents) else END
        targets = torch.cat([document[1:], torch.tensor([following])])[None]
        logits = model(document[None])
        alone = token_losses(logits, targets)[0]
        assert torch.allclose(losses[start : start + len(document)], alone, rtol=1e-12, atol=1e-12)
        compute_loss(model(document[None]), targets, num_tokens=1).backward()
        start += len(document)
    for packed_gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(packed_gradient, parameter.grad, rtol=1e-11, atol=1e-11)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 4), st.integers(0))
@settings(deadline=None, max_examples=40)
def test_every_kernel_sees_the_document_and_nothing_else(lengths, groups, seed):
    """Plain softmax over just the keys of the document, in float64; bfloat16 to its rounding."""
    size = sum(lengths)
    starts = torch.tensor(np.repeat(np.cumsum([0, *lengths[:-1]]), lengths))[None]
    generator = torch.Generator().manual_seed(seed % 2**63)

    def draw(heads):
        return torch.randn(1, heads, size, 8, generator=generator, dtype=torch.float64)

    queries, keys, values = draw(groups), draw(1), draw(1)
    expected = torch.zeros_like(queries)
    for head in range(groups):
        for query in range(size):
            seen = slice(int(starts[0, query]), query + 1)
            shares = (keys[0, 0, seen] @ queries[0, head, query] / 8**0.5).softmax(0)
            expected[0, head, query] = shares @ values[0, 0, seen]
    assert torch.allclose(attend(queries, keys, values, starts), expected, atol=1e-12)
    rounded = attend(*(part.bfloat16() for part in (queries, keys, values)), starts)
    assert torch.allclose(rounded.double(), expected, atol=0.05)


def test_a_document_changes_no_bit_of_the_next_one():
    _, batch = packed([9, 15])
    model = model_of(torch.float32).eval()
    with torch.no_grad():
        before = model(batch.tokens, **batch.inputs)
        changed = batch.tokens.clone()
        changed[0, :9] = 3
        after = model(changed, **batch.inputs)
    assert torch.equal(before[0, 9:], after[0, 9:])
    assert not torch.equal(before[0, :9], after[0, :9])


def test_a_document_is_turned_by_the_angles_it_has_alone():
    """Attention sees differences of positions, so that no loss could show it."""
    documents, batch = packed([5, 8, 11])
    model, seen = model_of(), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(batch.tokens, **batch.inputs)
    start = 0
    for document in documents:
        model(document[None])
        for packed_table, table in zip(seen[0], seen[-1], strict=True):
            assert torch.equal(packed_table[0, start : start + len(document)], table)
        start += len(document)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_step_is_the_uncompiled_one(precision):
    results = {}
    for setting in ("off", "layers"):
        config = TrainingConfig(compile=setting, precision=precision, micro_batch_size=1, seed=4)
        trainer = Trainer(model_of(torch.float32), config, device="cpu", sinks=())
        rows = [packed(lengths, seed)[1] for seed, lengths in enumerate([[9, 15], [3, 20, 1]])]
        batch = with_positions(
            Batch(*(torch.cat([getattr(r, n) for r in rows]) for n in ("tokens", "targets"))), END
        )
        results[setting] = [trainer.training_step(batch).loss for _ in range(3)]
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert results["layers"] == pytest.approx(results["off"], rel=tolerance)


def test_a_run_masks_documents_in_training_and_validation_and_resumes_bit_for_bit(workplace):  # noqa: F811
    (workplace / "many").mkdir()
    for number in range(60):
        (workplace / f"many/{number}.txt").write_text(f"{number} is a short text\n" * 2)
    same = ["--data", "many", "--training.schedule", "constant", "--training.precision", "float32"]
    mask = [*same, "--data.document-mask"]
    assert main(["train", "tiny.toml", *mask, "--run.name", "masked"]) == 0
    assert main(["train", "tiny.toml", *same, "--run.name", "plain"]) == 0
    masked, other = log_of("runs/masked"), log_of("runs/plain")
    assert all(a["loss"] != b["loss"] for a, b in zip(masked, other, strict=True) if "loss" in a)
    trained = load_trained(Path("runs/masked"), print, "cpu")
    split = open_data(trained.config, Path("runs"), print).validation["many"]
    batches = list(evaluation_batches(split, context_length=16, batch_size=4))
    without = evaluate(trained.model, batches).loss
    loss = evaluate(trained.model, (with_positions(batch, END) for batch in batches)).loss
    assert masked[-1]["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert abs(without - loss) > 1e-4
    assert evaluate_run(Path("runs/masked"), None, "cpu", "newest", print).loss == loss
    short = ["--run.name", "half", "--training.num-steps", "5"]
    assert main(["train", "tiny.toml", *mask, *short]) == 0
    assert main(["train", "--resume", "runs/half", "--training.num-steps", "12"]) == 0
    assert weights_of("runs/half", 12) == weights_of("runs/masked", 12)
    assert main(["replay", "runs/masked", "--step", "3", "--to", "12"]) == 0
    assert main(["inspect", "runs/masked", "--step", "4"]) == 0
    assert main(["evaluate", "runs/masked"]) == 0
    assert main(["train", "--resume", "runs/masked", "--data.no-document-mask"]) == 2
