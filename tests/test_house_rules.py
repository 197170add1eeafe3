"""Rules of the house that a reader of the source can check: no pickle, no stray writing, no setting
that nobody reads."""

import ast
import re
from pathlib import Path

import pytest

import truestep
from truestep import RunConfig
from truestep.settings import settings

SOURCE = Path(truestep.__file__).parent
TREES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text())
    for path in sorted(SOURCE.rglob("*.py"))
}

# Modules that run what they read, or what they are told.
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"),
    *("subprocess", "pty", "code", "codeop", "runpy"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.jit.save", "torch.package"),
    *("np.load", "np.save", "np.savez", "numpy.load", "numpy.save", "np.fromfile", "np.memmap"),
}
# Who does so nevertheless, each with its reason.
RUNNERS = {
    ("compiler.py", "subprocess"): "a program that is a constant there, in this interpreter",
}
# What opens a file for writing outside of storage.py, each with its reason.
WRITERS = {
    ("observe/sinks.py", "path.open"): "a log grows by a line; a torn last one is dropped",
    ("checkpoint/lock.py", "self._holder.open"): "says who holds a lock; nobody relies on it",
    ("workflows/run.py", "tempfile.TemporaryFile"): "tries the disk, in a file without a name",
    ("machine.py", "?.write_text"): "no file: what the kernel is told to count anew",
    ("cli/__init__.py", "open"): "the null device, where the output was closed",
    ("cli/app.py", "os.open"): "the null device, where the reader has left",
    ("observe/sinks.py", "os.open"): "the null device, where the reader has left",
}


def name_of(node):
    """The dotted name of what is called: `os.system`, `path.open`."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def forbidden(tree):
    """Yield what a module imports or calls that could run what it reads."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            if called in FORBIDDEN_CALLS:
                yield called
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in {"allow_pickle", "shell"} and value is not False:
                    yield keyword.arg
                if keyword.arg == "weights_only" and value is not True:
                    yield keyword.arg


def writers(tree):
    """Yield what a module calls that opens, makes or changes a file by other means than storage."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        words = [a.value for a in node.args if isinstance(a, ast.Constant)]
        words += [k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)]
        writes = any(re.fullmatch("[rwaxbt+]{1,3}", str(w)) and set(w) & set("wax+") for w in words)
        flags = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        if (
            re.search(r"\.write_(text|bytes)$|TemporaryFile$|mkstemp$", called)
            or (called.split(".")[-1] == "open" and called != "os.open" and writes)
            or (called == "os.open" and flags & {"O_WRONLY", "O_RDWR", "O_CREAT"})
        ):
            yield called


def read_names(tree):
    """Yield the last two names of every attribute that is read: `training.seed`, `config.seed`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield name_of(node.value).split(".")[-1].lstrip("_"), node.attr


def unread(names, trees):
    """Return the settings among `names` that no module reads from a plausible place."""
    read = {pair for tree in trees for pair in read_names(tree)}
    real = {setting.name for setting in settings(RunConfig)}
    missing = []
    for name in names:
        section, key = name.split(".")
        # A module that has one section only calls it config, shape or settings.
        owners = {other.split(".")[0] for other in real if other.split(".")[1] == key}
        holders = {section} | ({"config", "shape", "settings"} if owners <= {section} else set())
        if not any((holder, key) in read for holder in holders):
            missing.append(name)
    return missing


@pytest.mark.parametrize("path", TREES)
def test_nothing_runs_what_it_reads(path):
    allowed = {name for file, name in RUNNERS if file == path}
    assert set(forbidden(TREES[path])) == allowed


@pytest.mark.parametrize("path", [path for path in TREES if path != "storage.py"])
def test_files_are_written_by_storage_alone_with_few_exceptions(path):
    allowed = {call for file, call in WRITERS if file == path}
    assert set(writers(TREES[path])) == allowed


def test_every_setting_is_read():
    others = [tree for path, tree in TREES.items() if path not in {"config.py", "settings.py"}]
    assert unread([setting.name for setting in settings(RunConfig)], others) == []
    assert unread(["training.momentum", "run.seed"], others) == ["training.momentum", "run.seed"]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch.serialization import load; from dill import loads",
        "import numpy as np; np.load('x')",
        "reader(path, allow_pickle=True)",
        "import torch; torch.load('x', weights_only=True)",
        "torch.hub(path, weights_only=False)",
        "import os; os.system('x')",
        "exec(text)",
        "from subprocess import run",
    ],
)
def test_what_runs_what_it_reads_is_seen(text):
    assert list(forbidden(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "open('file', 'w')",
        "path.open(mode='ab')",
        "path.write_text('x')",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "tempfile.NamedTemporaryFile()",
    ],
)
def test_what_writes_a_file_is_seen(text):
    assert list(writers(ast.parse(text)))
    assert not list(writers(ast.parse("open('file'), path.open('rb'), os.open(p, os.O_RDONLY)")))
