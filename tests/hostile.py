"""Files as an attacker writes them: config, run and prepared data, each spoilt in one way.

`CASES` maps a name to what is typed and to a function that spoils the place it is typed in, which
`make_place` has made. `attempt` types it; `wrongs_of` says what should not have happened.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sealing import reseal, sealed

from truestep.cli import main

TINY = """
[training]
num_steps = 2
[model]
context_length = 16
num_layers = 1
num_heads = 2
width = 16
[data]
source = "text.txt"
batch_size = 2
[run]
name = "run"
sample_tokens = 5
"""
CONTROLS = "\x1b[31m\x1b]0;title\x07\r\n\u202e<script>\u2028\x00\x9b"
CANARY = "canary"  # beside the place: must never come to be


REFUSED = frozenset({1, 2})


class Case(NamedTuple):
    """What is typed, how the place is spoilt, and how the command may end."""

    command: list[str]
    spoil: Callable[[Path], object]
    codes: frozenset[int] = REFUSED
    quick: bool = True  # the others are much like one that is


class Pickle:
    """An object that opens a file for writing when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def make_place(place):
    """Make a directory with a text, a config, a finished run and prepared data."""
    place.mkdir()
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (place / "tiny.toml").write_text(TINY)
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "tiny.toml"]) == 0
        assert main(["prepare", "text.txt", "--out", "prepared"]) == 0
        pairs = ["--out", "pairs", "--tokenizer", "bpe-280"]
        assert main(["prepare", "text.txt", *pairs]) == 0


def attempt(case, place):
    """Type the case's command in a place; return its exit code and what it wrote."""
    out, error = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(place),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        code = main(case.command)
    return code, out.getvalue(), error.getvalue()


def snapshot(directory):
    """What lies below a directory and is no run's own: path -> content, links not followed."""
    found = {}
    for root, names, files in os.walk(directory):
        names[:] = [n for n in names if Path(root, n) != directory / "place/runs"]
        for name in [*names, *files]:
            path = Path(root, name)
            if path.is_symlink():
                found[path] = os.readlink(path)
            elif path.is_file() and path.stat().st_size < 2**24:
                found[path] = path.read_bytes()
            elif path.is_file():
                found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
            else:
                found[path] = path.lstat().st_mode
    return found


def wrongs_of(case, place):
    """Spoil a place, type the command, and return what should not have happened."""
    case.spoil(place)
    outside = place.parent
    before = snapshot(outside)
    code, out, error = attempt(case, place)
    wrongs = []
    if code not in case.codes:
        wrongs.append(f"exit code {code}")
    if code:
        lines = error.split("\n")
        if len(lines) != 2 or lines[1] or not lines[0].startswith("error: "):
            wrongs.append(f"not one line: {error[-300:]!r}")
        elif len(lines[0]) > 1000:
            wrongs.append(f"a line of {len(lines[0])} characters")
    if not all(line.isprintable() for line in (out + error).split("\n")):
        wrongs.append(f"not printable: {out + error!r}"[:300])
    if (outside / CANARY).exists():
        wrongs.append("the canary exists")
    if changed := {str(p) for p, c in snapshot(outside).items() ^ before.items()}:
        wrongs.append(f"changed outside of the run: {sorted(changed)}")
    return wrongs


def _write(name, content):
    data = content if isinstance(content, bytes) else content.encode()

    def spoil(place):
        (place / name).unlink(missing_ok=True)
        (place / name).write_bytes(data)

    return spoil


def _json(name, values):
    return _write(name, json.dumps(values))


def _link(name, target):
    """Put a link in the place of a file or directory; `target` is relative to the place."""

    def spoil(place):
        path = place / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target if target.startswith("/") else place / target)

    return spoil


def _fifo(name):
    def spoil(place):
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return spoil


def _directory(name):
    def spoil(place):
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir()

    return spoil


def _pickle(name):
    def spoil(place):
        _write(name, pickle.dumps(Pickle(place.parent / CANARY)))(place)

    return spoil


DEEP = "[" * 100_000
BAD_FILES = {  # of any kind of file
    "a pickle": _pickle,
    "bytes that are no text": lambda name: _write(name, b"\xff\xfe\x00" * 100),
    "a NUL": lambda name: _write(name, "\x00"),
    "control characters": lambda name: _write(name, f"{CONTROLS}\n"),
    "a deep list": lambda name: _write(name, f"{DEEP}\n"),
    "a deep table": lambda name: _write(name, '{"a":' * 100_000 + "\n"),
    "a list": lambda name: _write(name, "[1, 2]\n"),
    "a fifo": _fifo,
    "a directory": _directory,
    "a link to /dev/zero": lambda name: _link(name, "/dev/zero"),
    "a link to itself": lambda name: _link(name, name),
}


def _config_cases():
    def toml(text):
        return Case(["train", "evil.toml"], _write("evil.toml", text))

    def setting(section, key, value):
        return Case(["train", "evil.json"], _json("evil.json", {section: {key: value}}))

    cases = {
        f"config: {name}": Case(["train", "evil.toml"], bad("evil.toml"))
        for name, bad in BAD_FILES.items()
    }
    cases |= {
        f"config in JSON: {name}": Case(["train", "evil.json"], bad("evil.json"))
        for name, bad in BAD_FILES.items()
    }
    cases |= {
        "config: two mebibytes": toml("#" * 2**21),
        "config: a deep value": toml(f"[training]\nseed = {DEEP}"),
        "config: a deep key": toml(f"[{'.'.join('a' * 10_000)}]\nb = 1"),
        "config: a dotted key into a value": toml("[training]\nseed.a = 1"),
        "config: a key with control characters": setting("training", CONTROLS, 1),
        "config: a section with control characters": setting(CONTROLS, "a", 1),
        "config: a value with control characters": setting("training", "precision", CONTROLS),
        "config: a source with control characters": setting("data", "source", CONTROLS),
        "config: a validation with control characters": setting("data", "validation", CONTROLS),
        "config: a directory with a NUL": setting("run", "directory", "runs\0"),
        "config: a directory with control characters": setting("run", "directory", CONTROLS),
        "config: a directory that is a file": setting("run", "directory", "text.txt"),
        "config: a name with control characters": setting("run", "name", CONTROLS),
        "config: a name upwards": setting("run", "name", "../canary"),
        "config: an absolute name": setting("run", "name", "/tmp/canary"),
        "config: a name of a link": Case(
            ["train", "tiny.toml", "--run.name", "linked"], _link("runs/linked", f"../{CANARY}")
        ),
        "config: a hidden name": setting("run", "name", ".data"),
        "config: a long name": setting("run", "name", "n" * 5000),
        "config: a device with control characters": setting("run", "device", CONTROLS),
        "config: a huge integer": setting("training", "num_steps", 10**4000),
        "config: a longer integer than Python reads": toml(f"[training]\nseed = {'9' * 5000}"),
        "config: a number without end": toml("[training]\nlearning_rate = inf"),
        "config: a number in JSON without end": Case(
            ["train", "evil.json"],
            _write("evil.json", '{"training": {"learning_rate": Infinity}}'),
        ),
        "config: a nested value": setting("training", "seed", {"a": {"b": 1}}),
        "config: a source that is a device": setting("data", "source", "/dev/zero"),
        "config: a source that is a fifo": Case(["train", "--data", "pipe"], _fifo("pipe")),
        "config: a table twice": toml("[training]\nseed = 1\n[training]\nseed = 2"),
    }
    for key in ("__class__", "__init__", "__dict__", "model_config", "model_fields", "model_dump"):
        cases[f"config: the key {key}"] = setting("training", key, {"x": 1})
        cases[f"config: the section {key}"] = setting(key, "x", 1)
    return cases


def _run_cases():
    sample, evaluate = ["sample", "runs/run", "--tokens", "3"], ["evaluate", "runs/run"]
    report, resume = ["report", "runs/run"], ["train", "--resume", "runs/run"]
    cases = {}
    readers = {
        "config.toml": {"sample": sample, "evaluate": evaluate, "report": report, "resume": resume},
        "manifest.json": {"report": report, "resume": resume},
        "metrics.jsonl": {"report": report, "resume": resume},
        "samples.jsonl": {"report": report, "resume": resume},
    }
    for file, commands in readers.items():
        for number, (name, bad) in enumerate(BAD_FILES.items()):
            for turn, (verb, command) in enumerate(commands.items()):
                # A last line without its end was torn by a kill; a run goes on without its facts.
                lenient = file == "samples.jsonl" or (file, verb) == ("manifest.json", "resume")
                codes = frozenset({0, 2}) if lenient and name != "a directory" else REFUSED
                quick = number % len(commands) == turn
                case = Case(command, bad(f"runs/run/{file}"), codes, quick)
                cases[f"{verb}, {file}: {name}"] = case

    def lines(file, *records):
        text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
        return _write(f"runs/run/{file}", text)

    cases["verify, metrics.jsonl: a fifo"] = Case(
        ["verify", "runs/run"], _fifo("runs/run/metrics.jsonl")
    )
    shown = frozenset({0, 1, 2})
    step = {"step": 1, "loss": 1.0}
    odd = {
        "a step of 10^30": {"step": 10**30, "loss": 1.0},
        "a negative step": {"step": -5, "loss": 1.0},
        "a step of 10^18": {"step": 10**18, "loss": 1.0},
        "a loss of control characters": {"step": 1, "loss": CONTROLS},
        "a loss of 10^400": {"step": 1, "loss": 10**400},
        "a loss that is a list": {"step": 1, "loss": [[1]]},
        "keys of control characters": {"step": 1, "loss": 1.0, CONTROLS: CONTROLS},
        "a huge number of tokens": {"step": 1, "loss": 1.0, "num_tokens": 10**30},
        "the key __class__": {"step": 1, "loss": 1.0, "__class__": "x"},
    }
    for name, record in odd.items():
        cases[f"report, metrics.jsonl: {name}"] = Case(
            report, lines("metrics.jsonl", step, record), shown
        )
    cases["report, metrics.jsonl: a line of 20 MB"] = Case(
        report,
        lines("metrics.jsonl", step, '{"step": 2, "x": "' + "x" * 20_000_000 + '"}\n'),
        shown,
    )
    cases["report, metrics.jsonl: numbers that JSON does not have"] = Case(
        report,
        lines("metrics.jsonl", step, '{"step": 2, "loss": NaN, "grad_norm": -Infinity}\n'),
        shown,
    )
    for name, record in {
        "control characters": {"step": 1, "prompt": CONTROLS, "text": CONTROLS},
        "a script": {"step": 1, "prompt": "</pre><script>", "text": "<img onerror=x>"},
        "a text that is no text": {"step": 1, "prompt": 5, "text": {"a": 1}},
        "half of a surrogate pair": {"step": 1, "prompt": "\ud800", "text": "\udfff"},
    }.items():
        cases[f"report, samples.jsonl: {name}"] = Case(
            report, lines("samples.jsonl", record), shown
        )
    for name, facts in {
        "control characters": {CONTROLS: CONTROLS, "device": CONTROLS, "started": [CONTROLS]},
        "a huge integer": {"device": 10**4000},
        "half of a surrogate pair": {"device": "\ud800"},
        "numbers for texts": {"started": 5, "device": {"a": [1]}, "data_fingerprint": None},
    }.items():
        path = "runs/run/manifest.json"
        cases[f"report, manifest.json: {name}"] = Case(report, _json(path, facts), shown)
        case = Case(resume, _json(path, facts), shown, quick=name == "control characters")
        cases[f"resume, manifest.json: {name}"] = case
    return cases


LINKED = {
    "metrics.jsonl": f"../{CANARY}",
    "samples.jsonl": f"../{CANARY}",
    "plots": "..",
    "checkpoints": "..",
    "report.html": f"../{CANARY}",
    "config.toml": f"../{CANARY}",
    "manifest.json": f"../{CANARY}",
    ".lock": f"../{CANARY}",
    ".lock.json": f"../{CANARY}",
    "checkpoints/.lock": f"../{CANARY}",
    "checkpoints/.lock.json": f"../{CANARY}",
    "checkpoints/step-2": "..",
    "checkpoints/.tmp-x": "..",
}


def _link_cases():
    """A run whose own files are links that lead outside."""
    cases = {}
    any_end = frozenset({0, 1, 2})
    more = ["--training.num-steps", "3"]
    for name, target in LINKED.items():
        for verb, command in {
            "resume": ["train", "--resume", "runs/run", *more],
            "report": ["report", "runs/run"],
        }.items():
            cases[f"{verb}, {name}: a link outside"] = Case(
                command, _link(f"runs/run/{name}", target), any_end
            )
    return cases


def _prepared_cases():
    train = ["train", "tiny.toml", "--data", "prepared", "--run.name", "evil"]
    evaluate = ["evaluate", "runs/run", "--data", "prepared"]
    manifest, shard, listed = (
        f"prepared/{name}"
        for name in ("manifest.json", "validation-00000.bin", "validation-documents.jsonl")
    )

    def change(function):
        def spoil(place):
            path = place / manifest
            content = json.loads(path.read_text())
            function(content)
            path.unlink()
            path.write_text(sealed(content))

        return spoil

    def shards(*names):
        def function(content):
            content["validation"]["shards"] = list(names)
            for name in names:
                content["files"][name] = content["files"]["validation-00000.bin"]

        return change(function)

    def of_shard(**changes):
        return change(lambda content: content["files"]["validation-00000.bin"].update(changes))

    def huge_hole(place):
        size = 2**40  # takes no room on the disk
        os.truncate(place / "prepared/train-00000.bin", size)
        record = {"size": size, "blocks": [0] * 2**20}

        def function(content):
            content["files"]["train-00000.bin"].update(record)
            content["train"].update(num_tokens=size)

        change(function)(place)

    def ids_beyond(place):
        data = np.full(len((place / shard).read_bytes()) // 2, 999, dtype="<u2").tobytes()
        (place / shard).write_bytes(data)
        reseal(place / "prepared", dtype="uint16", vocab_size=257)

    def spoil_both(*functions):
        return lambda place: [function(place) for function in functions]

    spoils = {f"manifest: {name}": bad(manifest) for name, bad in BAD_FILES.items()}
    spoils |= {f"shard: {name}": bad(shard) for name, bad in BAD_FILES.items()}
    harmless = {  # the tokenizer is known by its fingerprint; a shard is never read whole
        "shard: a terabyte of nothing": huge_hole,
        "manifest: a tokenizer of control characters": change(
            lambda content: content["tokenizer"].update(name=CONTROLS)
        ),
    }
    spoils |= {
        "manifest: edited without its seal": _write(manifest, "{}"),
        "manifest: a shard upwards": shards("../validation-00000.bin"),
        "manifest: an absolute shard": shards("/etc/passwd"),
        "manifest: a shard with a NUL": shards("validation-00000.bin\0"),
        "manifest: a shard of control characters": shards(CONTROLS),
        "manifest: no shard": shards(),
        "manifest: a shard that is not there": shards("validation-00001.bin"),
        "manifest: a shard a million times": shards(*["validation-00000.bin"] * 10**6),
        "manifest: a list of documents upwards": change(
            lambda content: content["validation"].update(documents="../documents.jsonl")
        ),
        "manifest: a file upwards": change(
            lambda content: content["files"].update(
                {"../canary": content["files"]["validation-00000.bin"]}
            )
        ),
        "manifest: a negative size": of_shard(size=-1),
        "manifest: a huge size": of_shard(size=2**63),
        "manifest: a size that is true": of_shard(size=True),
        "manifest: a hash of control characters": of_shard(sha256=CONTROLS),
        "manifest: blocks that are no numbers": of_shard(blocks=["x"]),
        "manifest: a huge count": change(lambda c: c["validation"].update(num_tokens=2**60)),
        "manifest: a negative count": change(lambda c: c["validation"].update(num_tokens=-1)),
        "manifest: another dtype": change(lambda c: c.update(dtype="float64")),
        "manifest: a dtype that runs": change(lambda c: c.update(dtype="O")),
        "manifest: another vocabulary": change(lambda c: c.update(vocab_size=2**31)),
        "manifest: a source of control characters": change(lambda c: c.update(format=CONTROLS)),
        "manifest: a fingerprint of control characters": change(
            lambda c: c.update(fingerprint=CONTROLS)
        ),
        "manifest: the key __class__": change(lambda c: c.pop("train") and c.update(__class__={})),
        "shard: a link to another file": _link(shard, "/etc/passwd"),
        "shard: missing": lambda place: (place / shard).unlink(),
        "shard: cut": lambda place: os.truncate(place / shard, 3),
        "shard: empty": lambda place: os.truncate(place / shard, 0),
        "shard: ids beyond the vocabulary": ids_beyond,
        "documents: missing": lambda place: (place / listed).unlink(),
        "documents: cut": lambda place: os.truncate(place / listed, 3),
        "documents: a fifo": _fifo(listed),
        "documents: a link to /dev/zero": _link(listed, "/dev/zero"),
        "manifest and shard: pickles": spoil_both(_pickle(manifest), _pickle(shard)),
    }
    cases = {f"train, {name}": Case(train, spoil) for name, spoil in spoils.items()}
    for name in list(spoils)[::5]:
        cases[f"evaluate, {name}"] = Case(evaluate, spoils[name])
    for name, spoil in harmless.items():
        cases[f"train, {name}"] = Case(train, spoil, frozenset({0, 1, 2}))
    return cases


def _tokenizer_cases():
    """A tokenizer that was learnt: damaged, or vouched for by a manifest with a right seal."""
    train = ["train", "tiny.toml", "--data", "pairs", "--run.name", "evil"]
    path = "pairs/tokenizer.json"

    def vouched(content):
        def spoil(place):
            _write(path, content)(place)
            fingerprint = hashlib.sha256((place / path).read_bytes()).hexdigest()
            tokenizer = {"name": "bpe-280", "fingerprint": fingerprint}
            reseal(place / "pairs", tokenizer=tokenizer)

        return spoil

    def changed(function):
        def spoil(place):
            content = json.loads((place / path).read_text())
            function(content)
            vouched(json.dumps(content))(place)

        return spoil

    def gap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6

    spoils = {f"tokenizer: {name}": bad(path) for name, bad in BAD_FILES.items()}
    spoils |= {
        f"vouched tokenizer: {name}": vouched(content)
        for name, content in {
            "a pickle": pickle.dumps(Pickle(CANARY)),
            "bytes that are no text": b"\xff\xfe\x00" * 100,
            "control characters": CONTROLS,
            "a deep list": DEEP,
            "a deep table": '{"a":' * 100_000,
            "a list": "[1, 2]",
            "a huge integer": '{"model": ' + "9" * 5000 + "}",
            "no model": "{}",
        }.items()
    }
    spoils |= {
        f"vouched tokenizer: {name}": changed(function)
        for name, function in {
            "ids with a gap": gap,
            "a normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
            "a normalizer of control characters": lambda c: c.update(normalizer=CONTROLS),
            "a field of control characters": lambda c: c.update({CONTROLS: 1}),
            "a prefix that makes the library panic": lambda c: c["model"].update(
                continuing_subword_prefix="\u00e9"
            ),
            "a token of control characters": lambda c: c["model"]["vocab"].update({CONTROLS: 280}),
            "half of a surrogate pair": lambda c: c["model"]["merges"].append(["\ud800", "a"]),
            "a merge of control characters": lambda c: c["model"]["merges"].append([CONTROLS, "a"]),
        }.items()
    }
    spoils["tokenizer: missing"] = lambda place: (place / path).unlink()
    spoils["tokenizer: a terabyte of nothing"] = lambda place: os.truncate(place / path, 2**40)
    return {f"train, {name}": Case(train, spoil) for name, spoil in spoils.items()}


def judge_all(made, scratch):
    """Run every case in a copy of what `make_place` made; return name -> what went wrong."""
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        place = shutil.copytree(made, scratch / str(number) / "place")
        config = place / "runs/run/config.toml"
        config.write_text(config.read_text().replace(str(made), str(place)))
        found[name] = wrongs_of(case, place)
        shutil.rmtree(place.parent)
    return found


CASES = _config_cases() | _run_cases() | _link_cases() | _prepared_cases() | _tokenizer_cases()
