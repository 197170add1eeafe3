"""Data that is not what it should be: ids, shapes, dtypes, and a shard cut while a run reads it."""

import os
import re
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import TINY, weights_of
from test_tokens import Numbers, write

from truestep import Batch, Trainer
from truestep.checkpoint.commit import list_checkpoints, verify_checkpoint
from truestep.cli import main
from truestep.data.loader import WindowLoader
from truestep.data.tokens import open_prepared
from truestep.storage import StorageError

WIDTHS = {200: 1, 1000: 2, 70_000: 4}  # of an id, in bytes, by the size of the vocabulary


class Counting(torch.nn.Module):
    """A model that counts how often it was asked for something."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 2)
        self.head = torch.nn.Linear(2, vocab_size)
        self.calls = 0

    def forward(self, tokens):
        self.calls += not torch._guards.detect_fake_mode()  # shapes are learnt without values
        return self.head(self.embedding(tokens))


@given(data=st.data(), vocab_size=st.sampled_from(list(WIDTHS)), shard_tokens=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_any_id_outside_the_vocabulary_is_named_with_shard_offset_and_id_before_the_forward_pass(
    data, vocab_size, shard_tokens
):
    width = WIDTHS[vocab_size]
    position = data.draw(st.integers(0, 30), label="position")
    wrong = data.draw(st.integers(vocab_size, 2 ** (8 * width) - 1), label="wrong id")
    with TemporaryDirectory() as place:
        directory = write(
            Path(place, "data"),
            [list(range(30))],
            vocab_size=vocab_size,
            shard_tokens=shard_tokens,
        )
        shard, offset = divmod(position, shard_tokens)
        path = directory / f"train-{shard:05d}.bin"
        with path.open("r+b") as stream:
            stream.seek(offset * width)
            stream.write(wrong.to_bytes(width, "little"))
        split = open_prepared(directory, Numbers(vocab_size)).train
        message = re.escape(f"{path}: the id {wrong} at offset {offset * width} is outside the ")
        loader = WindowLoader(split, context_length=3, batch_size=1)
        trainer = Trainer(Counting(vocab_size), sinks=[])
        for step in range(10):
            read = range(
                3 * int(loader.windows_at(step)[0]), 3 * int(loader.windows_at(step)[0]) + 4
            )
            if position in read:
                before = trainer.model.calls
                with pytest.raises(StorageError, match=message):
                    trainer.training_step(loader.batch_at(step))
                assert trainer.model.calls == before
            else:
                trainer.training_step(loader.batch_at(step))
        assert trainer.step < 10


@given(
    shape=st.lists(st.integers(2, 5), min_size=2, max_size=2),
    place=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    wrong=st.one_of(st.integers(-(2**63), -1), st.integers(7, 2**63 - 1)),
    which=st.sampled_from(["tokens", "targets"]),
)
@settings(max_examples=60, deadline=None)
def test_any_id_of_a_batch_outside_the_vocabulary_is_named_before_the_forward_pass(
    shape, place, wrong, which
):
    ids = {name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "targets")}
    row, column = (int(share * size) for share, size in zip(place, shape, strict=True))
    ids[which][row, column] = wrong
    trainer = Trainer(Counting(7), sinks=[])
    if which == "targets" and wrong == -100:  # nothing to predict there
        trainer.training_step(Batch(**ids))
        return
    message = re.escape(
        f"{which}[{row}, {column}] = {wrong} is outside the model's vocabulary of 7"
    )
    with pytest.raises(ValueError, match=message):
        trainer.training_step(Batch(**ids))
    assert (trainer.model.calls, trainer.step) == (0, 0)


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
OTHERS = ["bool", "float16", "float32", "float64", "complex64"]
SHAPES = [(), (4,), (2, 5), (2, 3, 5), (0, 5), (2, 0), (0, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*INTEGERS, *OTHERS])
@pytest.mark.parametrize("library", [torch, np], ids=["torch", "numpy"])
def test_ids_of_any_dtype_and_shape_are_taken_or_refused_with_what_is_wanted(library, dtype, shape):
    ids = library.zeros(shape, dtype=getattr(library, dtype))
    for given_batch in (ids, (ids, ids), {"input_ids": ids}, {"input_ids": ids, "labels": ids}):
        if dtype in INTEGERS and shape == (2, 5):
            batch = Batch.of(given_batch)
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            Batch.of(given_batch)
        text = str(caught.value)
        assert "\n" not in text
        if dtype in INTEGERS:
            assert isinstance(caught.value, ValueError)
            assert str(list(shape)) in text
            assert re.search(r"two-dimensional|empty|\[B, T", text), text
        else:
            assert isinstance(caught.value, TypeError)
            assert dtype in text
            assert "must be integers" in text


def test_a_shard_cut_while_the_command_trains_ends_it_in_one_line_with_the_last_checkpoint_whole(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    Path("tiny.toml").write_text(TINY)
    assert main(["prepare", "text.txt", "--out", "prepared"]) == 0
    (shard,) = Path("prepared").glob("train-*.bin")
    whole = shard.read_bytes()
    constant = ["--training.schedule", "constant", "--run.evaluate-every", "4000"]
    command = ["train", "tiny.toml", "--data", "prepared", *constant, "--run.log-every", "1000"]

    def cut():
        while not list_checkpoints(Path("runs/cut/checkpoints")):
            time.sleep(0.002)
        os.truncate(shard, len(whole) // 2)

    thread = threading.Thread(target=cut)
    thread.start()
    assert main([*command, "--training.num-steps", "4000", "--run.name", "cut"]) == 1
    thread.join()
    error = capsys.readouterr().err
    assert re.fullmatch(
        f"error: {shard}: expected 17 bytes at offset \\d+, found \\d+; the file was cut short: "
        "prepare it again\n",
        error,
    ), error
    (*_, (step, newest)) = list_checkpoints(Path("runs/cut/checkpoints"))
    verify_checkpoint(newest)
    shard.write_bytes(whole)
    steps = ["--training.num-steps", str(step + 2)]
    assert main(["train", "--resume", "runs/cut", *steps]) == 0
    assert main([*command, *steps, "--run.name", "whole"]) == 0
    assert weights_of("runs/cut", step + 2) == weights_of("runs/whole", step + 2)
