"""A machine that has too little: disk, permission, memory. Found early, said in one line."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_cli import TINY

from truestep import GPT, GPTConfig, Trainer, TrainingConfig, compute_loss
from truestep.batch import Batch
from truestep.cli import main
from truestep.config import resolve
from truestep.runtime import computing
from truestep.training.footprint import footprint
from truestep.workflows.memory import (
    MemoryExhaustedError,
    explain_out_of_memory,
    is_out_of_memory,
    memory_explained,
)
from truestep.workflows.resources import checkpoint_bytes, count_parameters, num_checkpoints
from truestep.workflows.run import RunError, check_room


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty directory with a text and a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def train(*arguments):
    return main(["train", "tiny.toml", "--data", "text.txt", *arguments])


@pytest.fixture
def mounted(workplace):
    """Mount a file system of some bytes, or a directory read-only, and return where it lies."""
    mounts = []

    def mount(*arguments):
        place = workplace / f"mounted-{len(mounts)}"
        place.mkdir()
        command = ["mount", *arguments, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounts.append(place)
        return place

    yield mount
    for place in mounts:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def tiny(**run):
    return resolve({"run": run}, {}, Path("tiny.toml"))


def refusal(capsys):
    """The error of one line; that nothing was said before it shows that no data was read."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch("error: [^\n]*\n", captured.err)
    return captured.err


@given(
    heads=st.sampled_from([(1, "auto"), (2, 1), (4, 2), (6, 3)]),
    head_size=st.sampled_from([2, 6, 8]),
    switches=st.tuples(st.booleans(), st.booleans()),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 300), st.sampled_from(["auto", 5, 40])),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_parameters_are_counted_as_the_model_has_them(heads, head_size, switches, sizes):
    shape = GPTConfig(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        width=heads[0] * head_size,
        tie_embeddings=switches[0],
        qk_norm=switches[1],
        num_layers=sizes[0],
        vocab_size=sizes[1],
        mlp_width=sizes[2],
    )
    assert count_parameters(shape) == GPT(shape).num_parameters


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_as_large_as_it_was_said_to_be_at_least(optimizer):
    assert train("--training.optimizer", optimizer, "--training.num-steps", "2") == 0
    written = [
        sum(file.stat().st_size for file in path.iterdir())
        for path in Path("runs/text-1/checkpoints").glob("step-*")
    ]
    config = resolve({"training": {"optimizer": optimizer}}, {}, Path("tiny.toml"))
    said = checkpoint_bytes(config)
    assert all(said < size < 1.5 * said for size in written)
    if optimizer == "adamw":  # beside the tensors, only two headers and a manifest
        assert all(size - said < 12_000 for size in written)


@pytest.mark.parametrize(
    ("save_every", "keep", "best", "most"),
    # 12 steps, validated every 6: with a best one to keep, two validations save, too.
    [(12, 2, 0, 1), (5, 2, 0, 3), (1, 2, 0, 3), (1, 5, 0, 6), (12, 2, 1, 3), (1, 2, 2, 5)],
)
def test_checkpoints_beside_each_other_are_counted(save_every, keep, best, most):
    config = tiny(save_every=save_every, keep_checkpoints=keep, keep_best_checkpoints=best)
    assert num_checkpoints(config) == most


def test_a_full_disk_is_found_before_the_data_is_read(mounted, capsys):
    place = mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    (place / "filler").write_bytes(bytes(64 * 2**10))
    assert train("--run.directory", str(place)) == 2
    error = refusal(capsys)
    assert f"run.directory={place} cannot be written: No space left on device" in error
    assert "--run.directory" in error
    assert sorted(os.listdir(place)) == ["filler"]


def test_a_read_only_place_is_found_before_the_data_is_read(mounted, workplace, capsys):
    place = mounted("--bind", "-o", "ro", str(workplace))
    assert train("--run.directory", str(place / "runs")) == 2
    assert "cannot be written: Read-only file system" in refusal(capsys)


def test_a_run_that_became_read_only_or_full_is_refused_before_its_model_is_built(mounted, capsys):
    small = mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    assert train("--run.directory", str(small), "--run.name", "run") == 0
    config = resolve({}, {}, small / "run/config.toml")
    check_room(config, small / "run")
    room = shutil.disk_usage(small).free - 80 * 2**10  # enough for a few files
    (small / "filler").write_bytes(bytes(room))
    with pytest.raises(RunError, match=r"run has 0\.1 MiB free, but this run needs 0\.3 MiB more"):
        check_room(config, small / "run")
    capsys.readouterr()
    assert main(["train", "--resume", str(small / "run")]) == 2
    assert "make room" in refusal(capsys)
    read_only = mounted("--bind", "-o", "ro", str(small))
    with pytest.raises(RunError, match="run cannot be written: Read-only file system; make it"):
        check_room(config, read_only / "run")
    assert main(["train", "--resume", str(read_only / "run")]) == 2
    assert "Read-only file system" in refusal(capsys)


def test_a_disk_with_room_for_all_but_one_of_the_first_checkpoints_is_refused(mounted):
    config = tiny(save_every=1)
    each = checkpoint_bytes(config)
    for room, refused in [(4 * each + 2**14, False), (4 * each - 2**14, True)]:
        place = mounted("-t", "tmpfs", "-o", f"size={room}", "tmpfs")
        if not refused:
            check_room(config, place)
            continue
        with pytest.raises(RunError) as caught:
            check_room(config, place)
        message = str(caught.value)
        assert f"needs {4 * each / 2**20:.1f} MiB more" in message
        assert f"4 of {each / 2**20:.1f} MiB at one time" in message
        assert "make room" in message
        check_room(tiny(save_every=12), place)  # a run that saves once needs room for one


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from truestep.config import RunSettings, resolve
from truestep.workflows.run import RunError, check_new_run, check_room
if os.geteuid() == 0:
    os.setuid(65534)
checks = [(check_new_run, [RunSettings()]), (check_room, [resolve({}, {}), Path("runs")])]
for check, what in checks:
    try:
        check(*what)
    except RunError as error:
        print(error)
"""


def test_a_place_of_somebody_else_is_refused():
    Path("runs").mkdir(mode=0o555)
    command = [sys.executable, "-c", AS_ANOTHER_USER]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "run.directory=runs cannot be written: Permission denied; choose another with "
        "--run.directory",
        "runs cannot be written: Permission denied; make it writable, or go on with a copy "
        "elsewhere",
    ]


# A sum of bfloat16 into float32 makes a copy inside, which fake tensors do not: not here.
@pytest.mark.parametrize(("precision", "size"), [("float32", 6), ("bfloat16", 6), ("float32", 2)])
@pytest.mark.parametrize("shape", [{"vocab_size": 300}, {"vocab_size": 20000, "dropout": 0.1}])
def test_the_memory_of_a_step_is_what_torchs_profiler_counts(shape, precision, size):
    model = GPT(GPTConfig(context_length=24, num_layers=2, num_heads=2, width=32, **shape))
    batch = Batch.of(torch.zeros(6, 25, dtype=torch.long))

    def step():
        for parameter in model.parameters() if size < 6 else ():  # as one micro-batch left them
            parameter.grad = torch.zeros_like(parameter)
        with computing(precision, torch.device("cpu")):
            logits = model(batch.tokens[:size])
        compute_loss(logits, batch.targets[:size]).backward()
        model.zero_grad()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    peak = np.cumsum([nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])]).max()
    assert footprint(model, batch, size, precision).total == pytest.approx(peak, rel=1e-3)


def allocate(function):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (allocate(lambda: torch.empty(2**55, dtype=torch.uint8)), f"{2**35:,} MiB"),
        (allocate(lambda: np.empty(2**55, dtype=np.uint8)), "32.0 PiB"),
        (allocate(lambda: bytes(2**55)), "what is needed"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has\n…"),
            "2.50 GiB",
        ),
        (RuntimeError("std::bad_alloc"), "what is needed"),
    ],
    ids=["torch", "numpy", "python", "cuda", "c++"],
)
def test_memory_that_ran_out_is_recognised_and_said_in_one_line(error, amount):
    assert is_out_of_memory(error)
    assert explain_out_of_memory(error).startswith(f"out of memory: {amount} could not be had; use")


def test_another_error_is_none_of_memory(bigram, windows):
    trainer = Trainer(bigram(), sinks=[])
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "full")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)) as caught, memory_explained(trainer, windows(), Path("x")):
            raise error
        assert caught.value is error


class ForksOnValues(torch.nn.Module):
    """A model that cannot run on tensors without values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens) * (2 if bool((tokens > 5).any()) else 1)


@pytest.mark.parametrize(
    ("wrap", "micro_batch_size", "words"),
    [
        (
            torch.nn.Sequential,
            2,
            "it needs about 0.0 MiB, and .* MiB were free; 1 needs 0.0 MiB: go",
        ),
        (torch.nn.Sequential, 1, "one window needs about 0.0 MiB, and .* were free; use a smaller"),
        (ForksOnValues, 2, "use a smaller training.micro_batch_size or a smaller model"),
    ],
)
def test_what_is_not_known_about_memory_is_left_out(bigram, windows, wrap, micro_batch_size, words):
    config = TrainingConfig(micro_batch_size=micro_batch_size, precision="float32")
    trainer = Trainer(wrap(bigram()), config, sinks=[])
    batch = Batch.of(windows())
    trainer.training_step(batch)
    message = f"out of memory after step 1 with micro_batch_size={micro_batch_size}: {words}"
    with (
        pytest.raises(MemoryExhaustedError, match=message),
        memory_explained(trainer, batch, Path("runs/x")),
    ):
        raise MemoryError


LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
from truestep import GPT, GPTConfig, Trainer, TrainingConfig
from truestep.data.loader import WindowLoader
from truestep.training.micro_batch import micro_batch_that_fits
from truestep.workflows.memory import MemoryExhaustedError, memory_explained

class Counting:
    def __len__(self):
        return 40_000
    def read(self, start, stop):
        return torch.arange(start, stop).remainder(256).numpy()

def attempt(micro_batch_size):
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=256, context_length=32, num_layers=8, num_heads=2, width=32)
    settings = TrainingConfig(num_steps=1, micro_batch_size=micro_batch_size, precision="float32")
    trainer = Trainer(GPT(shape), settings, sinks=[])
    loader = WindowLoader(Counting(), context_length=32, batch_size=1024)
    batch = loader.batch_at(0)
    trainer.prepare(batch)
    if micro_batch_size == "auto":  # as a run does
        arguments = trainer.model, trainer.optimizer, batch, trainer.precision, "auto"
        micro_batch_size = micro_batch_that_fits(*arguments)
        trainer.config = trainer.config.model_copy(update={"micro_batch_size": micro_batch_size})
    with memory_explained(trainer, batch, Path("runs/my run")):
        trainer.fit(loader)

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 650 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
size = "auto" if sys.argv[1:] else 1024
while True:
    try:
        attempt(size)
        break
    except MemoryExhaustedError as error:
        print(error)
        size = int(re.search("--training.micro-batch-size ([0-9]+)", str(error))[1])
print("trained with", size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not limit addresses")
def test_the_size_that_is_said_to_fit_does_fit_under_the_same_limit():
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, trained = done.stdout.splitlines()
    assert re.fullmatch(
        r"out of memory in step 1 with micro_batch_size=1024: it needs about [\d,]+ MiB, and "
        r"[\d,]+ MiB were free; (\d+) needs [\d,]+ MiB: go on with [^\n]*truestep train --resume "
        r"'runs/my run' --training.micro-batch-size \1 --override training.micro_batch_size",
        said,
    )
    size = int(trained.removeprefix("trained with "))
    assert 1024 % size == 0
    assert size >= 32  # not merely a safe guess


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not limit addresses")
def test_a_batch_is_split_so_that_it_fits_under_the_same_limit():
    command = [sys.executable, "-c", LIMITED, "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "trained with auto\n"), done.stderr
    words = (
        r"a step of 1,024 rows needs about [\d,]+ MiB, and [\d,]+ MiB are free: it is split into "
    )
    assert re.search(
        words + r"micro-batches of (32|64|128|256|512), which changes neither", done.stderr
    )


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
import truestep.workflows.train
from truestep.cli import main
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 750 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not limit addresses")
def test_a_command_that_runs_out_of_memory_ends_in_one_line_with_a_command_that_fits():
    limited = [sys.executable, "-c", UNDER_A_LIMIT]
    command = ["train", "tiny.toml", "--data", "text.txt", "--training.num-steps", "1"]
    command += ["--data.batch-size", "512", "--training.micro-batch-size", "512"]
    command += ["--model.context-length", "64", "--model.num-layers", "8", "--model.width", "32"]
    done = subprocess.run([*limited, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told, error = done.stderr.splitlines()
    asked, would = (rf"training\.micro_batch_size={size}" for size in ("512", r"\d+"))
    assert re.fullmatch(f"warning: {asked} needs about .*; {would} would", told)
    assert error.startswith("error: out of memory in step 1 with ")
    run = Path("runs/text-1")
    assert not list(run.glob("checkpoints/step-*"))
    assert (run / "metrics.jsonl").read_bytes() == b""
    typed = shlex.split(done.stderr.partition("truestep train ")[2])
    assert typed[:2] == ["--resume", str(run)]
    assert 1 < int(typed[3]) < 512
    done = subprocess.run([*limited, "train", *typed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoints/step-1").is_dir()
