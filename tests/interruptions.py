"""Real signals, sent to the command at any moment; then what it printed is typed.

This process imports everything and computes nothing, so that forked children may compute. It is a
process of its own: `python tests/interruptions.py DIRECTORY SEED NUMBER` prints a JSON list.
"""

import json
import os
import random
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 - imported once, for all children
import torch._dynamo

import truestep.workflows.train  # noqa: F401
from truestep.cli import main

SETTINGS = """
[training]
num_steps = 16
micro_batch_size = 3
schedule = "cosine"
[model]
context_length = 16
num_layers = 1
num_heads = 2
width = 16
dropout = 0.1
[data]
source = "text.txt"
batch_size = 4
[run]
evaluate_every = 6
evaluation_windows = 50
save_every = 4
log_every = 1
sample_tokens = 10
"""
SLOW = [
    "--data.batch-size",
    "4000",
    "--training.micro-batch-size",
    "1",
]  # a step takes many seconds
TWICE = "twice within milliseconds"
HEARD = "leaves at once"


def start(place, arguments, output):
    """Fork a child that types a command in a directory; return its process id."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.chdir(place)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def end_of(child):
    """Return a child's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(child, output, condition):
    """Return once a condition on the output so far holds; False if the child ended before."""
    while not condition(output.read_text() if output.exists() else ""):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.001)
    return True


def moments(place, seed, number, seconds):
    """Yield name and condition of each moment to interrupt at, a fraction of a run or a phase."""
    chosen = random.Random(seed)
    for _ in range(number - 6):
        delay = seconds * chosen.random()
        yield f"after {delay:.2f} s", lambda _, delay=delay: time.monotonic() - STARTED[0] >= delay
    yield "preparing", lambda text: "validation:" in text
    yield "before evaluating", lambda text: re.search("^step 5 ", text, re.MULTILINE)
    yield TWICE, lambda text: re.search("^step 5 ", text, re.MULTILINE)
    yield "evaluating", lambda text: re.search("^step 6 ", text, re.MULTILINE)
    yield "saving", lambda _: any(place().glob("runs/run/checkpoints/.tmp-step-*"))
    yield "evaluating at the end", lambda text: re.search("^step 16 ", text, re.MULTILINE)


STARTED = [0.0]


def interrupt(base, seed, number):
    """Interrupt runs at chosen moments and go on with each; return what was found."""
    make(base / "whole")
    command = ["train", "tiny.toml", "--run.name", "run"]
    began = time.monotonic()
    assert end_of(start(base / "whole", command, base / "whole.txt")) == 0
    seconds, current, found = time.monotonic() - began, [base], []
    for count, (name, condition) in enumerate(moments(lambda: current[0], seed, number, seconds)):
        place, output = base / str(count), base / f"{count}.txt"
        current[0] = make(place)
        signal_sent = (signal.SIGINT, signal.SIGTERM)[count % 2]
        STARTED[0] = time.monotonic()
        child = start(place, command, output)
        sent = wait_for(child, output, condition)
        if sent:
            os.kill(child, signal_sent)
        if sent and name == TWICE and wait_for(child, output, lambda text: HEARD in text):
            os.kill(child, signal_sent)
        code, text = end_of(child), output.read_text()
        typed = re.search(r"^  .*\btrain (--resume .*)$", text, re.MULTILINE)
        # Before the first step there is nothing to go on with but the command itself.
        again = ["train", *shlex.split(typed[1])] if typed else [*command, "--resume", "auto"]
        resumed = end_of(start(place, again, base / f"{count}-again.txt"))
        found.append(
            {
                "moment": name,
                "sent": sent and signal_sent,
                "code": code,
                "offered": bool(typed),
                "text": text[-2000:],
                "resumed": resumed,
                "same": resumed == 0 and end_state(place) == end_state(base / "whole"),
            }
        )
    for name, second, pause in (
        ("a second later", signal.SIGTERM, 1.2),
        ("another signal", signal.SIGINT, 0.0),
    ):
        place = make(base / name)
        code, text = leave_at_once(place, [*command, *SLOW], second, pause)
        found.append({"moment": name, "code": code, "text": text})
    return found


def leave_at_once(place, command, second, pause):
    """Send a second signal while the step that the first one waits for is computed."""
    output = place.with_suffix(".txt")
    child = start(place, command, output)
    wait_for(child, output, lambda _: (place / "runs/run/samples.jsonl").exists())
    time.sleep(0.5)  # the display is set up in this time, and the first step begun
    os.kill(child, signal.SIGTERM)
    wait_for(child, output, lambda text: HEARD in text)
    time.sleep(pause)
    os.kill(child, second)
    return end_of(child), output.read_text()


def make(place):
    place.mkdir()
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 150)
    (place / "tiny.toml").write_text(SETTINGS)
    return place


def end_state(place):
    """The bytes of the last checkpoint, and the log without what depends on the clock."""
    run = place / "runs/run"
    tensors = [path.read_bytes() for path in sorted(run.glob("checkpoints/step-16/*.safetensors"))]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("_seconds", "_per_second")
    log = [{k: v for k, v in record.items() if not k.endswith(clock)} for record in records]
    return len(tensors), tensors, log


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interrupt(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
