"""`truestep train` in several processes: killed, stopped, started again, alone or not."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from truestep.checkpoint.commit import list_checkpoints
from truestep.cli import main
from truestep.distributed import process, pulse
from truestep.distributed.process import Processes, threads_of_one
from truestep.runtime import resolve_device
from truestep.storage import TEMPORARY_PREFIX

STEPS = 70
SETTINGS = [
    *("--data.source", "text.txt", "--data.batch-size", "16", "--model.width", "64"),
    *("--model.num-layers", "2", "--model.dropout", "0.1", "--model.context-length", "128"),
    *("--training.num-steps", str(STEPS), "--training.reduction", "exact"),
    *("--training.compile", "off", "--training.warmup-steps", "5", "--run.threads", "1"),
    *("--run.evaluate-every", "30", "--run.evaluation-windows", "20", "--run.save-every", "5"),
    *("--run.process-timeout-seconds", "3", "--run.log-every", "1"),
]
TRUESTEP = [sys.executable, "-m", "truestep"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Started:
    """A command that is running, and what it says."""

    def __init__(self, directory, *command):
        self.directory = directory
        self.said = open(directory / "said", "w+")  # noqa: SIM115 closed with the process
        self.process = subprocess.Popen(
            command, cwd=directory, stdout=self.said, stderr=self.said, start_new_session=True
        )

    def ranks(self):
        """Return the processes that train, by rank."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (place / "environ").read_bytes().split(b"\0")
                here = Path(os.readlink(place / "cwd")) == self.directory
                rank = [v for v in environ if v.startswith(b"RANK=")]
                if here and rank and b"truestep" in (place / "cmdline").read_bytes():
                    found[int(rank[0][5:])] = int(place.name)
        return found

    def wait_for(self, steps):
        """Wait until so many steps are done."""
        until = time.monotonic() + 120
        while self.text().count("  grad norm ") < steps:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.02)

    def text(self):
        return (self.directory / "said").read_text()

    def end(self):
        """Return the exit code and what was said."""
        code = self.process.wait(timeout=120)
        self.said.close()
        return code, self.text()


@pytest.fixture
def start(tmp_path):
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(200_000))
    (tmp_path / "text.txt").write_text(text)
    started = []

    def start(*command):
        started.append(Started(tmp_path, *command))
        return started[-1]

    yield start
    for running in started:
        with contextlib.suppress(ProcessLookupError):
            for pid in running.ranks().values():
                os.kill(pid, signal.SIGKILL)
            os.killpg(running.process.pid, signal.SIGKILL)


def result(directory):
    """Return hashes of the last checkpoint, and the log without clocks."""
    last = directory / "checkpoints" / f"step-{STEPS}"
    hashes = [
        hashlib.sha256((last / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in ("model", "optimizer")
    ]
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clocks = ("step_seconds", "tokens_per_second")
    return hashes, [{k: v for k, v in record.items() if k not in clocks} for record in log]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.timeout(400)
def test_a_walk_over_one_two_and_four_processes_with_kills_ends_with_the_bits_of_one(
    start, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SETTINGS, "--run.name", "alone"]) == 0
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    resume = ["train", "--resume", "runs/run", *SETTINGS]

    def saved():
        return max(step for step, _ in list_checkpoints(checkpoints))

    # One process, killed: what was committed stays.
    alone = start(*TRUESTEP, "train", *SETTINGS, "--run.name", "run")
    alone.wait_for(8)
    alone.process.kill()
    assert alone.end()[0] == -signal.SIGKILL

    # Two, of which the launcher is asked to stop: all end after the same step, and save it.
    two = start(*TRUESTEP, *resume, "--processes", "2")
    two.wait_for(6)
    two.process.terminate()
    code, said = two.end()
    assert code == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM at step {saved()}; nothing is lost" in said
    assert "error" not in said

    # Four under torchrun, the first of which is killed: it starts them again. Then one is told to
    # stop: all of them do.
    four = start(
        *(*TORCHRUN, "--nproc-per-node", "4", "--max-restarts", "1", "-m", "truestep", *resume)
    )
    four.wait_for(6)
    os.kill(four.ranks()[0], signal.SIGKILL)
    while four.text().count("going on from") < 2:
        assert four.process.poll() is None, four.text()
        time.sleep(0.1)
    four.wait_for(12)
    os.kill(four.ranks()[3], signal.SIGTERM)
    code, said = four.end()
    assert "stopped by another process at step" in said, said

    # Two, one of which is killed: the other names it, and saves the step before.
    two = start(*TRUESTEP, *resume, "--processes", "2")
    two.wait_for(6)
    os.kill(two.ranks()[1], signal.SIGKILL)
    code, said = two.end()
    assert code == 128 + signal.SIGKILL
    # gloo may miss the end of a connection that nobody waits for: then it is the pulse that tells.
    gone = "error: process 1 is gone: killed, or no longer to be reached; training ended at step "
    assert f"{gone}{saved()}: go on with" in said or "error: process 1 is silent for 3 s" in said
    assert "error: process 1 was ended by SIGKILL" in said

    # Two, one of which hangs: the other does not wait for it forever.
    two = start(*TRUESTEP, *resume, "--processes", "2")
    two.wait_for(6)
    ranks = two.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    while "silent" not in two.text():
        assert two.process.poll() is None, two.text()
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGKILL)
    code, said = two.end()
    assert code == 1
    assert "error: process 1 is silent for 3 s; training ended at step" in said

    assert main(resume) == 0
    assert result(tmp_path / "runs" / "run") == result(tmp_path / "runs" / "alone")
    assert list(checkpoints.glob(f"{TEMPORARY_PREFIX}*")) == []


def test_what_is_wrong_is_said_once_and_before_anything_starts(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--processes", "0"]) == 2
    assert capfd.readouterr().err == "error: --processes=0 must be at least 1\n"
    assert main(["train", "--processes", "2", "--training.learning-rate", "-1"]) == 2
    assert capfd.readouterr().err.count("learning_rate") == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["train", "--processes", "2", "--data", "nowhere"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: source: 'nowhere' is neither a file")
    assert said.err.count("\n") == 1


def in_threads(size, function):
    """Return what a function of a rank returns in threads that share a store."""
    results = {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: function(rank)}))
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[rank] for rank in range(size)]


def test_processes_that_start_again_do_not_hear_those_before():
    """Their store is the same: torchrun keeps it, and what was told in it."""
    store = dist.HashStore()
    names = [
        in_threads(3, lambda rank: process._meeting_name(store, rank, 3)),
        in_threads(3, lambda rank: process._meeting_name(store, rank, 3)),
    ]
    assert [len(set(each)) for each in names] == [1, 1]
    assert names[0] != names[1]


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(process, "_MEETING_TIMEOUT", process.timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"processes \[1\] of 2 have not come within"):
        process._meeting_name(dist.HashStore(), 0, 2)


def test_the_first_process_makes_what_all_are_told():
    store = dist.HashStore()
    made = []

    def tell(rank):
        place = Processes(rank, 3, store=store)
        told = place.from_first("what", lambda: made.append(rank) or str(rank + 7))
        return told, place.first_of_all("all", lambda: made.append(rank) or rank)

    assert in_threads(3, tell) == [("7", 0), ("7", 1), ("7", 2)]
    assert made[:2] == [0, 0]
    assert sorted(made) == [0, 0, 1, 2]


def test_an_end_is_explained_by_the_process_that_ended(monkeypatch):
    monkeypatch.setattr(pulse, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(pulse, "_SURE_SECONDS", 0.2)

    def explained(end):
        store = dist.HashStore()
        with (
            pulse.Pulse(Processes(0, 2, store=store), 60, print) as first,
            end(Processes(1, 2, store=store)),
        ):
            return first.explain()

    @contextlib.contextmanager
    def failing(place):
        with contextlib.suppress(ValueError), pulse.Pulse(place, 60, print):
            raise ValueError("a shard is damaged")
        yield

    def living(place):
        return pulse.Pulse(place, 60, print)

    @contextlib.contextmanager
    def finished(place):
        with pulse.Pulse(place, 60, print):
            pass
        yield

    @contextlib.contextmanager
    def killed(_):
        yield

    assert explained(failing) == "process 1: a shard is damaged"
    assert explained(living) is explained(finished) is None
    assert explained(killed) == "process 1 is gone: killed, or no longer to be reached"


def test_one_that_has_done_its_part_is_not_missed(monkeypatch):
    monkeypatch.setattr(pulse, "_BEAT_SECONDS", 0.02)
    store, lost = dist.HashStore(), []
    with pulse.Pulse(Processes(0, 2, store=store), 0.2, lost.append):
        with pulse.Pulse(Processes(1, 2, store=store), 60, print):
            time.sleep(0.1)
        time.sleep(0.5)
        assert lost == []
    with pulse.Pulse(Processes(0, 3, store=dist.HashStore()), 0.2, lost.append):
        time.sleep(0.5)
    assert lost == ["processes 1 and 2 are silent for 0.2 s"]


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(process, "_met", [Processes(0, 4, 0, 4)])
    monkeypatch.setattr(process.torch, "get_num_threads", lambda: 16)
    assert threads_of_one({}) == 4
    assert threads_of_one({"OMP_NUM_THREADS": "16"}) == 16
    monkeypatch.setattr(process.torch, "get_num_threads", lambda: 2)
    assert threads_of_one({}) == 1


def test_each_process_of_a_machine_has_an_accelerator_of_its_own(monkeypatch):
    monkeypatch.setattr(process, "_met", [Processes(3, 4, 1, 2)])
    own = resolve_device("meta")  # stands in for cuda
    assert (own.type, own.index) == ("meta", 1)
    assert resolve_device(str(own)) == own  # a trainer is given what was resolved
    with pytest.raises(
        ValueError, match=r"device=meta:0 cannot be shared by 2 processes; use meta"
    ):
        resolve_device("meta:0")
