"""A machine that has too little: disk, permission, memory. Found early, said in one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_cli import TINY

from truestep import GPT, GPTConfig
from truestep.cli import main
from truestep.config import resolve
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
    ("save_every", "keep", "most"), [(12, 2, 1), (5, 2, 3), (1, 2, 3), (1, 5, 6)]
)
def test_checkpoints_beside_each_other_are_counted(save_every, keep, most):
    config = tiny(save_every=save_every, keep_checkpoints=keep)
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
    with pytest.raises(RunError, match=r"run has 0\.1 MiB free, but this run needs 0\.1 MiB more"):
        check_room(config, small / "run")
    read_only = mounted("--bind", "-o", "ro", str(small))
    with pytest.raises(RunError, match="run cannot be written: Read-only file system; make it"):
        check_room(config, read_only / "run")


def test_a_disk_with_room_for_all_but_one_of_the_first_checkpoints_is_refused(mounted):
    config = tiny(save_every=1)
    each = checkpoint_bytes(config)
    for room, refused in [(3 * each + 2**14, False), (3 * each - 2**14, True)]:
        place = mounted("-t", "tmpfs", "-o", f"size={room}", "tmpfs")
        if not refused:
            check_room(config, place)
            continue
        with pytest.raises(RunError) as caught:
            check_room(config, place)
        message = str(caught.value)
        assert f"needs {3 * each / 2**20:.1f} MiB more" in message
        assert f"3 of {each / 2**20:.1f} MiB at one time" in message
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
