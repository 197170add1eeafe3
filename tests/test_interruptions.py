"""Signals at any moment: the run stops in order, says how to go on, and ends with the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = Path(__file__).with_name("interruptions.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("signals")), "0", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_signal_at_any_moment_is_answered_with_its_exit_code_and_without_a_traceback(found):
    interrupted = [run for run in found if run.get("sent")]
    assert len(interrupted) >= 5
    for run in interrupted:
        assert run["code"] in {128 + run["sent"], 0}, run
        assert "Traceback" not in run["text"]
        assert run["offered"] or run["code"] == 0 or "error: interrupted" in run["text"], run
    assert sum(run["code"] != 0 for run in interrupted) >= 4
    assert not [run for run in found if run["moment"] == "preparing" and run["code"] == 0]


def test_the_command_that_was_printed_goes_on_to_the_same_bits(found):
    assert sum(run.get("offered", False) for run in found) >= 3
    for run in found:
        if "resumed" in run:
            assert run["resumed"] == 0, run
            assert run["same"], run


def test_signals_while_it_evaluates_and_while_it_saves_are_answered_after_that(found):
    by_moment = {run["moment"]: run for run in found}
    for moment in ("evaluating", "saving"):
        assert by_moment[moment]["offered"], by_moment[moment]


def test_the_same_signal_twice_within_a_second_counts_as_one(found):
    """As `timeout make train` sends it: to the whole group, and make passes it on."""
    (twice,) = (run for run in found if run["moment"] == "twice within milliseconds")
    assert twice["code"] == 128 + twice["sent"]
    assert twice["offered"], twice


def test_a_second_signal_leaves_at_once(found):
    later, another = found[-2:]
    assert later["code"] == 128 + signal.SIGTERM
    assert another["code"] == 128 + signal.SIGINT
    for run in (later, another):
        assert "nothing is lost" not in run["text"]


DEAF = """
import hashlib, sys
from truestep.workflows.signals import stopped_by_signals

class Trainer:
    stop_reason = None

    def stop(self, reason):
        self.stop_reason = reason

trainer = Trainer()
with stopped_by_signals(trainer):
    print("ready", flush=True)
    # One call of some seconds, in which no handler of Python's can run.
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
print(trainer.stop_reason)
"""


def deaf(iterations):
    """Start it and send the same signal twice within milliseconds."""
    command = [sys.executable, "-c", DEAF, str(iterations)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    return process


def test_when_a_signal_came_counts_and_not_when_it_could_be_handled():
    process = deaf(8_000_000)
    assert process.communicate(timeout=60)[0] == b"SIGTERM\n"
    assert process.returncode == 0


def test_a_second_signal_leaves_at_once_also_in_the_middle_of_a_long_product():
    process = deaf(500_000_000)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()
