"""Every accepted form of a batch, and what is said of the others."""

import numpy as np
import pytest
import torch

from truestep import IGNORE_INDEX, Batch
from truestep.batch import check_token_ids

WINDOWS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize(
    "given",
    [
        WINDOWS,
        WINDOWS.numpy(),
        WINDOWS.to(torch.uint8),
        WINDOWS.numpy().astype(np.uint16),
        (WINDOWS[:, :-1], WINDOWS[:, 1:]),
        [WINDOWS[:, :-1], WINDOWS[:, 1:]],
        [WINDOWS],
        Batch(WINDOWS[:, :-1], WINDOWS[:, 1:]),
    ],
)
def test_all_forms_of_a_batch_mean_the_same(given):
    batch = Batch.of(given)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_a_mapping_follows_hugging_face_whose_labels_are_unshifted():
    labels = WINDOWS.clone()
    labels[0, 1] = IGNORE_INDEX
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    batch = Batch.of({"input_ids": WINDOWS, "labels": labels, "attention_mask": mask})
    assert torch.equal(batch.tokens, WINDOWS)
    assert batch.targets.tolist() == [[-100, 2, 3, -100, -100], [6, 7, 8, 9, -100]]
    assert set(batch.inputs) == {"attention_mask"}
    assert int(batch.num_targets) == 6
    assert Batch.of({"input_ids": WINDOWS}).targets[0].tolist() == [1, 2, 3, 4, -100]


def test_splitting_loses_nothing_and_remembers_each_position():
    inputs = {"position_ids": WINDOWS}
    batch = Batch(WINDOWS, WINDOWS, inputs, index=8)
    whole = torch.arange(35).reshape(7, 5)
    parts = list(Batch(whole, whole, {"more": whole}, index=8).split(3))
    assert [part.index for part in parts] == [8, 11, 14]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole)
    assert torch.equal(torch.cat([part.inputs["more"] for part in parts]), whole)
    assert next(batch.split(5)).inputs["position_ids"] is not None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.arange(5), ValueError, "two-dimensional"),
        (torch.zeros(2, 5), TypeError, "float32"),
        (np.zeros((2, 5)), TypeError, "float64"),
        (torch.zeros(2, 5, dtype=torch.bool), TypeError, "bool"),
        (torch.zeros(0, 5, dtype=torch.long), ValueError, "empty"),
        (torch.zeros(2, 1, dtype=torch.long), ValueError, r"\[B, T\+1\]"),
        ((WINDOWS, WINDOWS[:, 1:]), ValueError, r"\[2, 4\].*\[2, 5\]"),
        ({"tokens": WINDOWS}, ValueError, "lacks input_ids"),
        ({"input_ids": WINDOWS, "labels": WINDOWS[:, 1:]}, ValueError, "unshifted"),
        ({"input_ids": WINDOWS, "attention_mask": WINDOWS[:1]}, ValueError, "attention_mask"),
        ({"input_ids": WINDOWS, "attention_mask": [[1]]}, ValueError, "attention_mask is list"),
        ({"input_ids": WINDOWS, "lengths": torch.arange(3)}, ValueError, "lengths"),
        ({"input_ids": WINDOWS, "text": ["a", "b"]}, ValueError, "text"),
        ("a string", TypeError, "str"),
        ([[1, 2], [3, 4]], TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
)
def test_anything_else_is_refused_by_name_in_one_line(given, error, message):
    with pytest.raises(error, match=message) as caught:
        Batch.of(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "column", "wrong"), [(0, 0, -1), (1, 2, 11), (1, 3, 70000)])
def test_an_id_outside_the_vocabulary_is_found_with_its_position(row, column, wrong):
    tokens = torch.zeros(2, 4, dtype=torch.long)
    targets = tokens.clone()
    targets[0, 1] = IGNORE_INDEX
    check_token_ids(Batch(tokens, targets), 11)
    bad = tokens.clone()
    bad[row, column] = wrong
    with pytest.raises(ValueError, match=rf"tokens\[{row}, {column}\] = {wrong}.*0 to 10"):
        check_token_ids(Batch(bad, targets), 11)
    with pytest.raises(ValueError, match=rf"targets\[{row}, {column}\] = {wrong}"):
        check_token_ids(Batch(tokens, bad), 11)


@pytest.mark.parametrize(
    "form", [lambda w: w, lambda w: (w[:, :-1], w[:, 1:]), lambda w: w.numpy()]
)
def test_tokens_and_targets_are_contiguous_in_every_form(windows, form):
    batch = Batch.of(form(windows()))
    assert batch.tokens.is_contiguous()
    assert batch.targets.is_contiguous()
