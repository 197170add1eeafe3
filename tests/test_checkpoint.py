import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from faults import FaultyStorage
from sealing import record_of, reseal
from test_storage import fail_everywhere
from torch import nn

from truestep.checkpoint.commit import (
    DamagedCheckpointError,
    list_checkpoints,
    newest_checkpoint,
    verify_checkpoint,
)
from truestep.checkpoint.lock import CheckpointError, RunLock
from truestep.checkpoint.state import load_checkpoint, load_model, save_checkpoint
from truestep.checkpoint.tensors import read_safetensors, safetensors_chunks
from truestep.manifest import MANIFEST
from truestep.storage import LocalStorage
from truestep.training.muon import Muon, MuonAdamW

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]


class Model(nn.Module):
    """Tied weights, buffers of both kinds, a transposed parameter, one never used, one frozen."""

    def __init__(self, dtype=torch.float32, width=4):
        super().__init__()
        self.embedding = nn.Embedding(5, width, dtype=dtype)
        self.head = nn.Linear(width, 5, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(width, 3, dtype=dtype).t())
        self.scale = nn.Parameter(torch.randn((), dtype=dtype))
        self.unused = nn.Parameter(torch.randn(2, 2, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(2, dtype=dtype), requires_grad=False)
        self.register_buffer("mean", torch.randn(width, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        with torch.no_grad():
            self.mean.lerp_(hidden.double().mean(0), 0.1)
        return self.head(hidden + (hidden @ self.transposed.t() @ self.transposed) * self.scale)


class ModelWithExtraState(Model):
    def get_extra_state(self):
        return {"any": "object"}


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0


def fused(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def plain(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True, foreach=False)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def muon(model):
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1)


def muon_adamw(model):
    matrices = [model.transposed]
    rest = [p for p in model.parameters() if p is not model.transposed]
    return MuonAdamW(
        torch.optim.AdamW(rest, lr=0.1, fused=True),
        Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32),
    )


def new_run(seed=0, optimizer=fused, **shape):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(**shape)
    return Run(model, optimizer(model))


def train(run, num_steps):
    for _ in range(num_steps):
        generator = torch.Generator().manual_seed(run.step)
        tokens = torch.randint(5, (6,), generator=generator)
        run.model(tokens).float().square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
    return run


def raw(value):
    """Return dtype, shape and bytes, so that NaN equals itself and 1 differs from 1.0."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    flat = value.detach().clone(memory_format=torch.contiguous_format).flatten()
    return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()


def bits(run):
    """Return the bits of a run's whole state, as torch's own state dicts have it."""
    state = run.optimizer.state_dict()["state"]
    return {
        "step": run.step,
        "model": {name: raw(tensor) for name, tensor in run.model.state_dict().items()},
        "optimizer": {
            (index, key): raw(value)
            for index, entries in state.items()
            for key, value in entries.items()
        },
    }


def refuse_to_speak(message):
    raise AssertionError(message)


def newest_bits(directory, **options):
    path = newest_checkpoint(directory, refuse_to_speak)
    run = new_run(seed=9, **options)
    load_checkpoint(path, run)
    return bits(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [fused, plain, momentum, muon, muon_adamw])
def test_a_loaded_run_has_the_same_bits_and_goes_on_the_same(tmp_path, optimizer, dtype):
    run = train(new_run(0, optimizer, dtype=dtype), 3)
    path = save_checkpoint(run, tmp_path / "run" / "checkpoints", facts={"data": ["a", 1, None]})
    other = new_run(1, optimizer, dtype=dtype)
    if dtype == torch.float64:
        train(other, 1)  # existing state is replaced, not only absent state created
    parameters, state = list(other.model.parameters()), other.optimizer.state
    assert bits(other) != bits(run)

    assert load_checkpoint(path, other) == {"data": ["a", 1, None]}
    assert bits(other) == bits(run)
    assert other.optimizer.state is state
    assert all(p is q for p, q in zip(parameters, other.model.parameters(), strict=True))
    assert bits(train(other, 3)) == bits(train(run, 3))


def test_every_bit_pattern_comes_back(tmp_path):
    run = new_run()
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    run.model.bf16 = nn.Parameter(patterns.view(torch.bfloat16))
    run.model.register_buffer("f32", (patterns.int() << 16 | 1).view(torch.float32))
    before = bits(run)
    path = save_checkpoint(run, tmp_path)
    with torch.no_grad():
        run.model.bf16.zero_()
        run.model.f32.zero_()
    load_checkpoint(path, run)
    assert bits(run) == before


def test_a_model_alone_is_filled_or_left_as_it_was(tmp_path):
    run = train(new_run(), 2)
    path = save_checkpoint(run, tmp_path, facts={"data": 1})
    other, wider = new_run(1), new_run(1, width=5)
    assert load_model(path, other.model) == {"data": 1}
    assert bits(other)["model"] == bits(run)["model"]
    before = bits(wider)
    with pytest.raises(CheckpointError, match=r"'transposed': expected float32 \[3, 5\]"):
        load_model(path, wider.model)
    assert bits(wider) == before


def test_state_that_never_was_is_not_invented(tmp_path):
    run = train(new_run(optimizer=momentum), 2)
    path = save_checkpoint(run, tmp_path)
    other = new_run(1, momentum)
    other.optimizer.state[other.model.unused]["momentum_buffer"] = torch.ones(2, 2)
    other.optimizer.state[other.model.scale]["stale"] = 1
    load_checkpoint(path, other)
    assert other.optimizer.state[other.model.scale].keys() == {"momentum_buffer"}
    assert other.model.unused not in other.optimizer.state
    assert other.model.frozen not in other.optimizer.state


def test_hyperparameters_come_from_the_config_and_not_from_the_checkpoint(tmp_path):
    path = save_checkpoint(train(new_run(), 2), tmp_path)
    other = new_run()
    other.optimizer.param_groups[0]["lr"] = 0.25
    load_checkpoint(path, other)
    assert other.optimizer.param_groups[0]["lr"] == 0.25


def test_state_is_laid_out_in_memory_as_its_parameter_is(tmp_path):
    path = save_checkpoint(train(new_run(), 2), tmp_path)
    other = new_run(1)
    load_checkpoint(path, other)
    transposed = other.model.transposed
    assert not transposed.is_contiguous()
    for key in ["exp_avg", "exp_avg_sq"]:
        assert other.optimizer.state[transposed][key].stride() == transposed.stride()


def test_numbers_in_the_state_stay_numbers(tmp_path):
    run = new_run(optimizer=momentum)
    numbers = {"count": 2**53 + 1, "flag": True, "nan": float("nan"), "tiny": 5e-324}
    run.optimizer.state[run.model.scale].update(numbers)
    path = save_checkpoint(run, tmp_path)
    other = new_run(1, momentum)
    load_checkpoint(path, other)
    assert repr(dict(sorted(other.optimizer.state[other.model.scale].items()))) == repr(numbers)


def test_the_moments_keep_the_dtype_they_were_saved_in(tmp_path):
    run = train(new_run(optimizer=momentum), 1)
    state = run.optimizer.state[run.model.scale]
    state["momentum_buffer"] = state["momentum_buffer"].double()
    other = new_run(1, momentum)
    load_checkpoint(save_checkpoint(run, tmp_path), other)
    assert other.optimizer.state[other.model.scale]["momentum_buffer"].dtype == torch.float64


def test_the_files_are_named_as_the_model_names_its_tensors(tmp_path):
    path = save_checkpoint(train(new_run(), 1), tmp_path)
    assert sorted(os.listdir(path)) == [MANIFEST, "model.safetensors", "optimizer.safetensors"]
    model = safetensors.torch.load_file(path / "model.safetensors")
    names = {"embedding.weight", "transposed", "scale", "unused", "frozen", "mean", "empty"}
    assert model.keys() == names
    state = safetensors.torch.load_file(path / "optimizer.safetensors")
    used = ["embedding.weight", "transposed", "scale"]
    keys = ["exp_avg", "exp_avg_sq", "step"]
    assert state.keys() == {f"{name}/{key}" for name in used for key in keys}
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["tied"] == {"head.weight": "embedding.weight"}
    assert (manifest["step"], manifest["torch"]) == (1, torch.__version__)


def test_wrappers_leave_no_mark_in_the_names(tmp_path):
    run = train(new_run(), 1)
    wrapped = new_run(0)
    wrapped.model.module = nn.Linear(1, 1)  # a name that is the model's own stays
    run.model.module = nn.Linear(1, 1)
    compiled = torch.compile(nn.DataParallel(torch.compile(wrapped.model)))
    assert any("_orig_mod.module._orig_mod." in key for key in compiled.state_dict())
    wrapped.model = compiled
    load_checkpoint(save_checkpoint(run, tmp_path / "plain"), wrapped)
    path = save_checkpoint(wrapped, tmp_path / "compiled")
    for name in ["model.safetensors", "optimizer.safetensors"]:
        written = (path / name).read_bytes()
        assert written == (tmp_path / "plain" / "step-1" / name).read_bytes()
    assert b'"module.weight"' in (path / "model.safetensors").read_bytes()


def every_kind_of_tensor():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        bytes_ = torch.randint(0, 256, (6 * dtype.itemsize,), generator=generator)
        if dtype == torch.bool:
            bytes_ %= 2
        tensors[name] = bytes_.to(torch.uint8).view(dtype).view(2, 3)
        tensors[f"{name}.strided"] = tensors[name].t()
        tensors[f"{name}.skipping"] = tensors[name].flatten()[::2]
        tensors[f"{name}.scalar"] = tensors[name][0, 0]
        tensors[f"{name}.empty"] = torch.empty(0, 2, dtype=dtype)
    tensors['quote " slash \\ é 中'] = torch.ones(1)
    return tensors


def test_what_is_written_reads_the_same_with_the_safetensors_library():
    tensors = every_kind_of_tensor()
    data = b"".join(bytes(chunk) for chunk in safetensors_chunks(tensors))
    read = safetensors.torch.load(data)
    assert {name: raw(t) for name, t in read.items()} == {n: raw(t) for n, t in tensors.items()}
    assert safetensors.torch.load(b"".join(map(bytes, safetensors_chunks({})))) == {}


def test_what_the_safetensors_library_writes_reads_the_same_here(tmp_path):
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in every_kind_of_tensor().items()
    }
    data = safetensors.torch.save(tensors)
    (tmp_path / "file").write_bytes(data)
    record = record_of(data)
    read = read_safetensors(tmp_path / "file", record)
    assert {name: raw(t) for name, t in read.items()} == {n: raw(t) for n, t in tensors.items()}


def test_every_tensor_starts_at_a_multiple_of_its_item_size():
    tensors = every_kind_of_tensor()
    size, header, *_ = safetensors_chunks(tensors)
    assert int.from_bytes(size, "little") == len(header)
    assert len(header) % 8 == 0
    for name, entry in json.loads(header).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_a_file_of_one_dtype_is_byte_for_byte_the_library_s(tmp_path):
    tensors = {f"layer.{i}": torch.full((i, 3), float(i)) for i in range(1, 5)}
    data = b"".join(map(bytes, safetensors_chunks(tensors)))
    assert data == safetensors.torch.save(tensors)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: run.model.register_buffer("x", torch.eye(2).to_sparse()), "layout"),
        (lambda run: run.model.register_buffer("x", torch.empty(2, device="meta")), "meta"),
        (lambda run: run.model.register_buffer("x", torch.ones(1).to(torch.complex128)), "128"),
        (lambda run: setattr(run.model, "__class__", ModelWithExtraState), "extra state"),
        (lambda run: run.optimizer.state[run.model.scale].update(history=[1]), "scale/history"),
        (lambda run: run.optimizer.state[run.model.scale].update({"a/b": torch.ones(1)}), "key"),
        (lambda run: run.model.__delattr__("scale"), "does not have"),
    ],
)
def test_state_that_only_pickle_could_hold_is_refused_by_name(tmp_path, spoil, message):
    run = train(new_run(), 1)
    spoil(run)
    with pytest.raises(CheckpointError, match=message) as caught:
        save_checkpoint(run, tmp_path)
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path) == []


def untie(run):
    run.model.head.weight = nn.Parameter(run.model.head.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run: setattr(run.model, "scale", nn.Parameter(torch.ones(2))),
            r"tensor 'scale': expected float32 \[2\], found float32 \[\]; build",
        ),
        (
            lambda run: run.model.register_buffer("mean", torch.zeros(4)),
            r"tensor 'mean': expected float32 \[4\], found float64 \[4\]; build",
        ),
        (
            lambda run: run.model.register_buffer("more", torch.zeros(1)),
            r"tensor 'more': expected float32 \[1\], found none",
        ),
        (
            lambda run: run.model.__delattr__("frozen"),
            r"tensor 'frozen': expected none, found float32 \[2\]",
        ),
        (untie, r"tensor 'head.weight': expected float32 \[5, 4\], found tied to 'embedding"),
        (
            lambda run: setattr(run, "optimizer", momentum(run.model)),
            r"optimizer: expected SGD, found 'AdamW'",
        ),
        (
            lambda run: setattr(run, "optimizer", torch.optim.AdamW([run.model.scale])),
            r"state 'embedding.weight/exp_avg': expected none, found float32 \[5, 4\]",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_half_loaded(
    tmp_path, change, message
):
    path = save_checkpoint(train(new_run(), 2), tmp_path)
    other = train(new_run(1), 1)
    change(other)
    before = bits(other)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, other)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bits(other) == before


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Two checkpoints, a run one step further, and the bits of all three."""
    directory = tmp_path_factory.mktemp("history")
    run = train(new_run(optimizer=momentum), 1)
    save_checkpoint(run, directory)
    old = bits(train(run, 1))
    save_checkpoint(run, directory, facts={"name": "value"})
    new = bits(train(run, 1))
    return SimpleNamespace(directory=directory, run=run, old=old, new=new)


def test_whatever_fails_in_a_save_the_newest_is_the_old_or_the_new(tmp_path, history):
    places = iter(range(10**6))

    def make_place():
        return shutil.copytree(history.directory, tmp_path / str(next(places)))

    def save(storage, place):
        save_checkpoint(history.run, place, storage=storage)

    seen = []
    for place, returned in fail_everywhere(save, make_place):
        for _, path in list_checkpoints(place):
            verify_checkpoint(path)
        found = newest_bits(place, optimizer=momentum)
        assert found in (history.old, history.new)
        assert found == history.new or not returned
        seen.append(found == history.new)
        save_checkpoint(
            history.run, place, storage=FaultyStorage()
        )  # and the next attempt succeeds
        assert newest_bits(place, optimizer=momentum) == history.new
        assert [step for step, _ in list_checkpoints(place)] == [2, 3]
        assert not list(place.glob(".tmp-*"))
    assert len(seen) > 60
    assert set(seen) == {True, False}


def test_a_save_that_returned_survives_a_power_loss(tmp_path, history):
    place = shutil.copytree(history.directory, tmp_path / "run")
    storage = FaultyStorage(largest_write=11)
    save_checkpoint(history.run, place, storage=storage)
    storage.lose_power()
    assert newest_bits(place, optimizer=momentum) == history.new


def test_saving_a_step_again_keeps_the_committed_bytes(tmp_path):
    run = train(new_run(), 1)
    path = save_checkpoint(run, tmp_path, facts={"try": 1})
    before = {entry.name: (entry.inode(), entry.stat().st_mtime_ns) for entry in os.scandir(path)}
    assert save_checkpoint(run, tmp_path, facts={"try": 2}) == path
    after = {entry.name: (entry.inode(), entry.stat().st_mtime_ns) for entry in os.scandir(path)}
    assert before == after
    assert load_checkpoint(path, run) == {"try": 1}


def test_saving_over_a_damaged_checkpoint_is_refused(tmp_path):
    run = train(new_run(), 1)
    path = save_checkpoint(run, tmp_path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"model.safetensors: expected \d+ bytes"):
        save_checkpoint(run, tmp_path)


def test_pruning_keeps_the_newest_and_never_a_later_step(tmp_path):
    run = new_run()
    for step, kept in [(8, [8]), (9, [8, 9]), (10, [9, 10]), (3, [3, 9, 10]), (11, [10, 11])]:
        run.step = step
        save_checkpoint(run, tmp_path)
        assert [step for step, _ in list_checkpoints(tmp_path)] == kept
    run.step = 12
    save_checkpoint(run, tmp_path, keep=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 11, 12]
    with pytest.raises(ValueError, match="keep=1 must be at least 2"):
        save_checkpoint(run, tmp_path, keep=1)


def test_only_committed_checkpoints_are_listed(tmp_path):
    assert list_checkpoints(tmp_path / "absent") == []
    assert newest_checkpoint(tmp_path / "absent", refuse_to_speak) is None
    for name in [".tmp-step-3-abc", ".bad-step-2-abc", "step-", "step-01", "step-1x", "step-٣"]:
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    assert newest_checkpoint(tmp_path, refuse_to_speak) is None


def test_a_damaged_newest_is_set_aside_aloud_and_the_one_before_used(tmp_path, history):
    place = shutil.copytree(history.directory, tmp_path / "run")
    with (place / "step-2" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    said = []
    assert newest_checkpoint(place, said.append) == place / "step-1"
    assert "step-2/model.safetensors: bytes 0 to" in said[0]
    assert "set aside as .bad-step-2-" in said[0]
    assert said[1:] == [f"using {place / 'step-1'}, the newest intact checkpoint"]
    assert newest_checkpoint(place, refuse_to_speak) == place / "step-1"
    assert len(list(place.glob(".bad-step-2-*"))) == 1

    (place / "step-1" / MANIFEST).unlink()
    assert newest_checkpoint(place, said.append) is None
    assert said[-1].endswith("no intact checkpoint is left")


def load_outcome(path, history, run):
    """Return the run to go on with: the same after a refusal, a new one after a right load."""
    before = run.step
    try:
        facts = load_checkpoint(path, run)
    except CheckpointError:
        return run, "refused" if run.step == before else "half-loaded"
    assert bits(run) == history.old
    assert facts == {"name": "value"}
    return new_run(9, momentum), "loaded"


def test_no_flipped_bit_or_cut_in_a_manifest_is_ever_loaded(tmp_path, history):
    path = shutil.copytree(history.directory / "step-2", tmp_path / "step-2")
    good = (path / MANIFEST).read_bytes()
    run, outcomes = new_run(9, momentum), []
    untouched = bits(run)
    for index in range(len(good)):
        for damaged in (good[:index], flip(good, 8 * index + index % 8)):
            overwrite(path / MANIFEST, damaged)
            run, outcome = load_outcome(path, history, run)
            outcomes.append(outcome)
    assert bits(run) == untouched
    assert set(outcomes) <= {"refused", "loaded"}
    assert outcomes.count("refused") > 0.95 * len(outcomes)


def test_no_flipped_bit_or_cut_in_a_payload_is_ever_loaded(tmp_path, history):
    path = shutil.copytree(history.directory / "step-2", tmp_path / "step-2")
    chosen = random.Random(0)
    run = new_run(9, momentum)
    for name in ["model.safetensors", "optimizer.safetensors"]:
        good = (path / name).read_bytes()
        damaged = [flip(good, chosen.randrange(8 * len(good))) for _ in range(200)]
        damaged += [good[:length] for length in range(0, len(good), 7)]
        for content in [*damaged, good + b"\0"]:
            overwrite(path / name, content)
            run, outcome = load_outcome(path, history, run)
            assert outcome == "refused"
        overwrite(path / name, good)
    assert load_outcome(path, history, run)[1] == "loaded"


def overwrite(path, data):
    path.unlink()  # truncating it instead makes some file systems wait for the disk
    path.write_bytes(data)


def flip(data, bit):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hostile_cases(canary):
    huge = b"".join(map(bytes, safetensors_chunks({"a": torch.ones(1)})))

    def payload(data):
        def spoil(path):
            (path / "model.safetensors").write_bytes(data)
            reseal(path)

        return spoil

    def rename_file(name):
        def spoil(path):
            manifest = (path / MANIFEST).read_text()
            (path / MANIFEST).write_text(manifest.replace('"model.safetensors"', json.dumps(name)))

        return spoil

    def link_file(path):
        (path / "model.safetensors").rename(path.parent / "moved")
        (path / "model.safetensors").symlink_to(path.parent / "moved")

    def link_directory(path):
        path.rename(path.parent / "moved")
        path.symlink_to(path.parent / "moved")

    def fifo(path):
        (path / "model.safetensors").unlink()
        os.mkfifo(path / "model.safetensors")

    def of_another_structure(path):
        (path / "model.safetensors").unlink()
        (path / "model").mkdir()
        (path / MANIFEST).write_text('{"version": 3, "format": "truestep checkpoint"}')

    def without_seals(path):
        manifest = json.loads((path / MANIFEST).read_text())
        del manifest["content_sha256"]
        for record in manifest["files"].values():
            del record["blocks"]
        (path / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))

    def another_digit(path):
        text = (path / MANIFEST).read_text()
        assert text.count('"version": 2') == 1
        (path / MANIFEST).write_text(text.replace('"version": 2', '"version": 6'))

    return {
        "a pickle beside": lambda path: (path / "x.pkl").write_bytes(pickle.dumps(Canary(canary))),
        "a pickle inside": payload(pickle.dumps(Canary(canary))),
        "a directory inside": lambda path: (path / "inner").mkdir(),
        "a link to a file": link_file,
        "a link to a directory": link_directory,
        "a fifo": fifo,
        "a file for a directory": lambda path: (shutil.rmtree(path), path.write_text("x")),
        "a header without end": payload(struct.pack("<Q", 2**63) + huge[8:]),
        "a header of 4 GiB": payload(struct.pack("<Q", 2**32) + huge[8:]),
        "a deep header": payload(struct.pack("<Q", 10**6) + b"[" * 10**6),
        "a tensor outside": payload(huge.replace(b"[0,4]", b"[0,9]")),
        "a shape of 10^18": payload(huge.replace(b"[1]", b"[999999999999999999]")),
        "an empty file": payload(b""),
        "a path upwards": rename_file("../moved"),
        "an absolute path": rename_file("/etc/passwd"),
        "a missing file": lambda path: (path / "optimizer.safetensors").unlink(),
        "a deep manifest": lambda path: (path / MANIFEST).write_text("[" * 10**6),
        "a renamed checkpoint": lambda path: reseal(path, step=7),
        "a step that is no count": lambda path: reseal(path, step=True),
        "ties to nowhere": lambda path: reseal(path, tied={"head.weight": "nowhere"}),
        "ties of another kind": lambda path: reseal(path, tied=[1]),
        "facts of another kind": lambda path: reseal(path, facts=None),
        "another format": lambda path: reseal(path, format="truestep tokens"),
        "a later version": lambda path: reseal(path, version=3),
        "a later version of another structure": of_another_structure,
        "the first version, without seals": without_seals,
        "another digit for the version": another_digit,
        "a number that is none": lambda path: reseal(
            path,
            optimizer={"kind": "SGD", "numbers": ["scale/momentum_buffer"], "on_cpu": []},
        ),
    }


OF_ANOTHER_TRUESTEP = {
    "another format",
    "a later version",
    "a later version of another structure",
    "the first version, without seals",
    "another digit for the version",
}


@pytest.mark.parametrize("case", hostile_cases(None))
def test_a_hostile_directory_runs_nothing_and_is_refused(tmp_path, history, case):
    place = shutil.copytree(history.directory, tmp_path / "run")
    canary = tmp_path / "canary"
    hostile_cases(canary)[case](place / "step-2")
    run = new_run(9, momentum)
    before = bits(run)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(place / "step-2", run)
    assert str(caught.value).isprintable()
    assert "step-2" in str(caught.value)
    assert bits(run) == before
    if case in OF_ANOTHER_TRUESTEP:  # it may be intact, so it is not set aside
        with pytest.raises(CheckpointError, match="read it with the truestep that wrote it") as e:
            newest_checkpoint(place, refuse_to_speak)
        assert not isinstance(e.value, DamagedCheckpointError)
        assert (place / "step-2").exists()
    else:
        path = newest_checkpoint(place, lambda message: None)
        assert path in {place / "step-1", place / "step-2"}
    assert not canary.exists()


def test_what_a_dead_writer_left_is_removed_at_the_next_save(tmp_path):
    (tmp_path / ".tmp-step-1-abc").mkdir()
    (tmp_path / ".tmp-step-1-abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-file").write_bytes(b"half")
    save_checkpoint(train(new_run(), 1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-1"]


class Recorder(LocalStorage):
    def __init__(self):
        self.operations = []

    def sync_directory(self, path):
        super().sync_directory(path)
        self.operations.append(("synced", path))

    def remove(self, path):
        super().remove(path)
        self.operations.append(("removed", path))


def test_a_leftover_is_removed_only_once_its_name_is_durable(tmp_path):
    run = train(new_run(), 1)
    leftover = save_checkpoint(run, tmp_path).rename(tmp_path / ".tmp-step-1-abc")
    storage = Recorder()
    save_checkpoint(train(run, 1), tmp_path, storage=storage)
    operations = storage.operations
    assert ("synced", tmp_path) in operations[: operations.index(("removed", leftover))]


HOLD = """
import sys
from pathlib import Path
from truestep.checkpoint.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_kept_out_at_once_until_the_first_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"inside\n"
        message = f"is in use by process {holder.pid} on .* since 20.*; wait for it, stop it"
        with pytest.raises(CheckpointError, match=message), RunLock(tmp_path):
            pass
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(new_run(), tmp_path)
        (tmp_path / ".lock.json").write_text('{"pid": "\\u001b[31m", "host": 1, "started": 2}')
        with pytest.raises(CheckpointError, match="in use by another process"), RunLock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with RunLock(tmp_path):
        save_checkpoint(new_run(), tmp_path)  # the same process may enter again
        holder = json.loads((tmp_path / ".lock.json").read_text())
        assert holder["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir() if path.name != "step-0"] == [".lock"]


def test_the_holder_s_name_is_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock.json").symlink_to(tmp_path / "outside")
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock.json").read_text())["pid"] == os.getpid()
    assert (tmp_path / "outside").read_text() == "mine"


READ_ONLY = """
import os
from pathlib import Path
from truestep.checkpoint.lock import CheckpointError, RunLock
if os.geteuid() == 0:
    os.setuid(65534)
try:
    RunLock(Path(".")).__enter__()
except CheckpointError as error:
    print(error)
"""


def test_a_directory_that_cannot_be_written_is_said_in_one_line(tmp_path):
    tmp_path.chmod(0o555)
    command = [sys.executable, "-c", READ_ONLY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    message = "cannot be written: Permission denied; choose a directory you may write to"
    assert result.stdout == f". {message}\n"
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file cannot be written: File exists"):
        save_checkpoint(new_run(), tmp_path / "file")


def test_the_state_of_another_training_is_never_taken_for_this_one(tmp_path):
    def trained(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        holder = SimpleNamespace(model=model, step=1)
        holder.optimizer = torch.optim.AdamW(model.parameters())
        return holder

    first, second = trained(1), trained(2)
    path = save_checkpoint(first, tmp_path)
    assert save_checkpoint(first, tmp_path) == path
    with pytest.raises(CheckpointError, match="holds another state of this step"):
        save_checkpoint(second, tmp_path)
    load_checkpoint(path, second)
    assert torch.equal(second.model.weight, first.model.weight)
