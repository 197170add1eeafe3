"""A run's directory: its name, its settings, its checkpoints, and the model in it."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from truestep.checkpoint.commit import list_checkpoints
from truestep.config import RunConfig, RunSettings
from truestep.data.bpe import BytePairTokenizer
from truestep.data.tokenizer import DEFINITION, Tokenizer, load_tokenizer
from truestep.observe.text import format_bytes
from truestep.setting_sources import read_settings_file
from truestep.settings import validate
from truestep.shell import command
from truestep.storage import LOCAL, read_file, replace_file
from truestep.workflows.resources import checkpoint_bytes, num_checkpoints

CONFIG, MANIFEST, SAMPLES = "config.toml", "manifest.json", "samples.jsonl"
CHECKPOINTS, BUNDLES, INSPECTIONS = "checkpoints", "bundles", "inspections"
_NAME_LIMIT = 100
_FACTS_LIMIT_BYTES = 2**20
_PROBE_BYTES = 2**16  # settings, facts and the first lines of the logs


class RunError(ValueError):
    """A run that cannot be made, found or continued: one line with the remedy."""


def check_new_run(settings: RunSettings) -> None:
    """Refuse a name or a place that a new run cannot have, before any work is done.

    Errors: RunError for a name that leaves its folder or is taken, or a folder not writable.
    """
    root = Path(settings.directory)
    if settings.name != "auto":
        check_name(settings.name)
        if _is_taken(root / settings.name):
            raise _taken(root / settings.name)
    check_directory(root)


def check_directory(root: Path) -> None:
    """Make the directory of all runs. Errors: RunError for one that cannot be written."""
    try:
        LOCAL.make_directory(root)
        _write_and_forget(root)
    except OSError as error:
        raise RunError(
            f"run.directory={root} cannot be written: {error.strerror}; "
            "choose another with --run.directory"
        ) from None


def check_room(config: RunConfig, directory: Path) -> None:
    """Refuse a directory that cannot be written, or too full for a run's checkpoints.

    `directory` is that of all runs, or an existing run's own, whose checkpoints count as room.
    Errors: RunError with the figures and the remedy.
    """
    try:
        _write_and_forget(directory)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise RunError(
            f"{directory} cannot be written: {error.strerror}; make it writable, or go on with a "
            "copy elsewhere"
        ) from None
    each, most = checkpoint_bytes(config), num_checkpoints(config)
    needed = each * max(1, most - len(list_checkpoints(directory / CHECKPOINTS)))
    if free < needed:
        raise RunError(
            f"{directory} has {format_bytes(free)} free, but this run needs {format_bytes(needed)} "
            f"more for checkpoints ({most} of {format_bytes(each)} at one time); make room, choose "
            "another place, a smaller model or a lower run.keep_checkpoints"
        )


def _write_and_forget(directory: Path) -> None:
    """Bring real bytes to the disk in a file without a name: a full disk takes an empty one."""
    with tempfile.TemporaryFile(dir=directory) as stream:
        stream.write(bytes(_PROBE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())


def claim_directory(settings: RunSettings, sources: Sequence[str]) -> Path:
    """Make the directory of a new run and return it; two processes never get the same."""
    source = sources[0]
    root = Path(settings.directory)
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(source).stem).strip("-")
    stem += "-mix" if len(sources) > 1 else ""
    number = 1
    while True:
        named = settings.name != "auto"
        directory = root / (settings.name if named else f"{stem or 'run'}-{number}")
        try:
            directory.mkdir()
        except FileExistsError:
            if named and not _is_taken(directory):
                return directory  # if another process is in it, its lock says so
            if named:
                raise _taken(directory) from None
            number += 1
        else:
            LOCAL.sync_directory(root)  # the run's name, for what is saved below it
            return directory


def _is_taken(directory: Path) -> bool:
    """Say whether a path is more than what a run leaves that is killed as it begins."""
    if not directory.is_dir():
        return os.path.lexists(directory)
    names = {entry.name for entry in directory.iterdir()}
    return any(name not in {DEFINITION, MANIFEST} and not name.startswith(".") for name in names)


def _taken(directory: Path) -> RunError:
    return RunError(
        f"run.name={directory.name}: {directory} exists already; "
        f"go on with it by --resume {directory}, or choose another name"
    )


def check_name(name: str) -> None:
    """Refuse a name that is no plain name of a directory. Errors: RunError."""
    if len(name) > _NAME_LIMIT:
        raise RunError(f"run.name has {len(name)} characters; use at most {_NAME_LIMIT}")
    plain = name.isprintable() and Path(name).name == name and "\\" not in name
    if not plain or not name or name.startswith((".", "-")):
        raise RunError(
            f"run.name={name!r} is not a plain name; it must not begin with . or -, or have "
            "slashes or invisible characters (--run.directory says where runs lie)"
        )


def find_run(path: str, settings: RunSettings) -> Path:
    """Return the directory of an existing run; auto is the named one, or else the newest.

    Errors: RunError naming where none was found.
    """
    root = Path(settings.directory)
    if path != "auto":
        directory = Path(path)
        if not (directory / CONFIG).is_file():
            inside = directory.parent.parent  # of a checkpoint or a bundle
            known = [place for place in (inside, root / path) if (place / CONFIG).is_file()]
            remedy = known[0] if known else f"a directory below {root}/"
            raise RunError(f"{directory} is not a run: it has no {CONFIG}; give {remedy}")
        _refuse_what_leads_elsewhere(directory)
        return directory
    if settings.name != "auto":
        check_name(settings.name)
        candidates = [root / settings.name]
    else:
        candidates = [p for p in root.glob("*") if not p.name.startswith(".")]
    runs = [path for path in candidates if (path / CONFIG).is_file()]
    if not runs:
        raise RunError(f"there is no run in {root}/; make one with: {command('train')}")
    newest = max(runs, key=lambda run: (run / CONFIG).stat().st_mtime)
    _refuse_what_leads_elsewhere(newest)
    return newest


def _refuse_what_leads_elsewhere(directory: Path) -> None:
    """Refuse a run in which a link leads outside, or a pipe or a device stands for a file.

    What is written through it would land elsewhere; what is read might never end.
    """
    places = [directory, directory / CHECKPOINTS]
    for entry in [entry for place in places if place.is_dir() for entry in os.scandir(place)]:
        path = Path(entry.path)
        try:
            outside = entry.is_symlink() and not path.resolve().is_relative_to(directory.resolve())
        except (OSError, RuntimeError):  # it leads to itself
            outside = True
        if outside or not (entry.is_file() or entry.is_dir() or entry.is_symlink()):
            raise RunError(
                f"{path} is a link out of the run, a pipe or a device; put the file or directory "
                "itself there, or remove it"
            )


def write_run_files(
    directory: Path, config: RunConfig, facts: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write a run's tokenizer, facts and resolved settings, each whole or not at all."""
    if isinstance(tokenizer, BytePairTokenizer):
        replace_file(LOCAL, directory / DEFINITION, tokenizer.definition)
    manifest = json.dumps(facts, indent=1, ensure_ascii=True)
    replace_file(LOCAL, directory / MANIFEST, manifest.encode())
    settings = tomli_w.dumps(config.model_dump(mode="json"))
    replace_file(LOCAL, directory / CONFIG, settings.encode())


def read_run_facts(directory: Path) -> dict[str, Any]:
    """Return what a run's `manifest.json` says, nothing if it has none."""
    try:
        facts = json.loads(read_file(directory / MANIFEST, limit=_FACTS_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def read_run_config(directory: Path) -> RunConfig:
    """Return the resolved settings that a run was made with."""
    path = directory / CONFIG
    return validate(RunConfig, {str(path): read_settings_file(path)})


def read_tokenizer(directory: Path, config: RunConfig, facts: Mapping[str, Any]) -> Tokenizer:
    """Return a run's tokenizer; `facts` are those of a checkpoint.

    Errors: ValueError or StorageError for another than the run began with.
    """
    saved = str(facts["tokenizer_fingerprint"]) if "tokenizer_fingerprint" in facts else None
    tokenizer = load_tokenizer(config.data.tokenizer, directory, fingerprint=saved)
    if saved not in {None, tokenizer.fingerprint}:
        raise RunError(
            f"data.tokenizer={tokenizer.name} is not the tokenizer this run began with; restore "
            f"{directory / CONFIG}"
        )
    return tokenizer
