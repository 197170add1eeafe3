"""A disk that fills up while a run trains: told aloud, nothing lost, given up only in the end."""

import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import log_of, train, weights_of, workplace  # noqa: F401 used by its name

from truestep.checkpoint.commit import list_checkpoints, verify_checkpoint
from truestep.cli import main
from truestep.shell import command

pytestmark = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="the limit of another process is set by prlimit"
)
SETTINGS = ["--training.num-steps", "60", "--run.save-every", "3", "--run.evaluate-every", "20"]


def full_from(process, line):
    """No file can grow any more: what the kernel answers is EFBIG, as a full disk's ENOSPC."""
    if line.startswith("step 10 "):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def run_with(react, *arguments):
    command = [sys.executable, "-m", "truestep", "train", "tiny.toml", "--data", "text.txt"]
    lines = []
    with subprocess.Popen(
        [*command, "--run.name", "cut", *SETTINGS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            lines.append(line)
            react(process, line)
    return process.returncode, "".join(lines)


def test_training_goes_on_over_a_full_disk_and_ends_with_the_same_bits_once_there_is_room():
    assert train(*SETTINGS, "--run.name", "whole") == 0

    def react(process, line):
        full_from(process, line)
        if line.startswith("saving failed (2 of"):
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)

    code, text = run_with(react, "--run.max-failed-saves", "1000")
    assert code == 0, text
    assert "its records wait in memory" in text
    assert "saving failed (1 of 1000)" in text
    assert log_of("runs/cut") == log_of("runs/whole")
    assert weights_of("runs/cut", 60) == weights_of("runs/whole", 60)


def test_a_last_save_that_fails_is_tried_once_more_before_the_run_ends(monkeypatch, capsys):
    replace, failures = os.replace, []

    def fail_once_and_late(source, target):
        if Path(target).name == "step-12" and not failures:
            time.sleep(0.5)  # the run is at its end before it can know
            failures.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once_and_late)
    assert train("--run.save-every", "3", "--run.name", "late") == 0
    assert len(failures) == 1
    assert "saving failed (1 of 3)" in "".join(capsys.readouterr())
    assert list_checkpoints(Path("runs/late/checkpoints"))[-1][0] == 12


def test_every_record_up_to_a_checkpoint_is_on_the_disk_before_it_appears(monkeypatch):
    fsync, replace, events = os.fsync, os.replace, []

    def watched_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)
        if path.endswith("metrics.jsonl"):
            text = Path(path).read_text().splitlines()
            events.append(max(json.loads(line)["step"] for line in text))

    def watched_replace(source, target):
        replace(source, target)
        if Path(target).name.startswith("step-"):
            events.append(Path(target).name)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    assert train("--run.save-every", "3") == 0
    commits = [event for event in events if isinstance(event, str)]
    assert commits == ["step-3", "step-6", "step-9", "step-12"]
    for commit in commits:
        synced = [event for event in events[: events.index(commit)] if isinstance(event, int)]
        assert max(synced, default=0) >= int(commit.removeprefix("step-"))


def test_it_gives_up_after_so_many_failed_saves_and_the_last_checkpoint_is_untouched(capsys):
    assert train(*SETTINGS, "--run.name", "whole") == 0
    code, text = run_with(full_from)
    assert code == 1, text
    assert "saving failed (3 of 3)" in text
    assert text.splitlines()[-1].startswith("error: ")
    remedy = f"make room, then go on with: {command('train', '--resume', Path('runs/cut'))}"
    assert text.splitlines()[-1].endswith(remedy)
    assert "Traceback" not in text
    checkpoints = list_checkpoints(Path("runs/cut/checkpoints"))
    assert len(checkpoints) >= 2
    for _, path in checkpoints:
        verify_checkpoint(path)
    assert main(["train", "--resume", "runs/cut"]) == 0
    assert log_of("runs/cut") == log_of("runs/whole")
    assert weights_of("runs/cut", 60) == weights_of("runs/whole", 60)
