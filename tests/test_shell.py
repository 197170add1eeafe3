"""Commands that can be typed again: the very words, whatever is in them."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from truestep import shell
from truestep.shell import command


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(shell.shutil, "which", lambda name: f"/bin/{name}")


@pytest.mark.parametrize(
    "name", ["runs/a", "two words", "it's $HOME; rm -rf *", "-a 'b\" <x>", "é"]
)
def test_a_path_comes_back_as_one_word_that_is_no_option(name):
    words = shlex.split(command("sample", Path(name), "--tokens", "5"))
    assert words[0] == "truestep"
    assert Path(words[2]) == Path(name)
    assert not words[2].startswith("-")
    assert words[3:] == ["--tokens", "5"]


@pytest.mark.parametrize(
    ("called", "ends"),
    [
        ("venv/bin/truestep", "venv/bin/truestep"),
        ("/somewhere/truestep/__main__.py", " -m truestep"),
        ("/home/me/my_script.py", " -m truestep"),
    ],
)
def test_without_truestep_on_the_path_it_is_what_was_called(called, ends, monkeypatch):
    monkeypatch.setattr(shell.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [called])
    assert command("report").removesuffix(" report").endswith(ends)


LEAVE = """
import signal
from truestep import cli
from truestep.cli import app, main
def wait(arguments):
    cli.say_when_interrupted("go on with: truestep train --resume 'runs/\u00e9'")
    signal.raise_signal(signal.SIGTERM)
app.run = wait
main([])
"""


def test_a_signal_between_steps_says_how_to_go_on():
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 143
    assert done.stderr == "error: interrupted; go on with: truestep train --resume 'runs/\\xe9'\n"


LEARN = """
import os, random, signal, threading, time
from pathlib import Path
from truestep.cli import app, main
from truestep.data.bpe import BytePairs
from truestep.manifest import DirectoryWriter
def end():
    print(time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
def texts():
    draw = random.Random(0)
    for _ in range(300):
        yield " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(999))
    threading.Timer(0.5, end).start()  # by then the library merges, and calls nothing in Python
def learn(arguments):
    with DirectoryWriter(Path("prepared")):
        assert list(Path().iterdir())
        BytePairs(60_000).learn(texts())
app.run = learn
main([])
"""


def test_a_signal_ends_the_learning_of_byte_pairs_and_leaves_nothing_unfinished(tmp_path):
    """The library held signals back for the 11 s that 17 MB of text take it."""
    done = subprocess.run(
        [sys.executable, "-c", LEARN], cwd=tmp_path, capture_output=True, check=False, timeout=100
    )
    assert time.time() - float(done.stdout) < 2
    assert done.returncode == 143
    assert done.stderr == b"error: interrupted\n"
    assert not list(tmp_path.iterdir())
