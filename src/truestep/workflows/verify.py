"""Check every stored byte of a run, a checkpoint or prepared data; nothing is changed."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from truestep.checkpoint.bundle import read_batch
from truestep.checkpoint.commit import list_checkpoints, verify_checkpoint
from truestep.checkpoint.state import load_checkpoint, read_facts
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.data.tokens import TokenSplit, is_prepared, open_prepared
from truestep.observe.log import METRICS, read_metrics, read_records
from truestep.observe.text import count
from truestep.storage import MANIFEST, StorageError, read_manifest, verify_file
from truestep.workflows.build import build_trainer
from truestep.workflows.history import CHANGES, config_at
from truestep.workflows.run import (
    BUNDLES,
    CHECKPOINTS,
    CONFIG,
    SAMPLES,
    RunError,
    read_run_config,
    read_run_facts,
)

_IDS_AT_A_TIME = 2**20

Check = tuple[str, Callable[[], str]]
"""What is checked, and a function that returns what it found or raises what is wrong."""


class _NotReadError(Exception):
    """A check that was left out, because of damage that is counted already."""


def verify(path: Path, say: Say) -> int:
    """Check a run, a checkpoint or a directory of prepared data; return how much is wrong.

    `say` is told of each thing that was checked, and where the first difference in it is.
    Errors: RunError for a path that is none of these.
    """
    wrong = 0
    for name, check in _checks(path):
        try:
            say(f"ok   {name}: {check()}")
        except _NotReadError as reason:
            say(f"--   {name}: {reason}")
        except (ValueError, OSError, RuntimeError) as error:
            wrong += 1
            say(f"BAD  {name}: {error}")
    say(f"{path}: {wrong} damaged" if wrong else f"{path}: everything is as it was written")
    return wrong


def _checks(path: Path) -> Iterator[Check]:
    if (path / CONFIG).is_file():
        return _run_checks(path)
    if is_prepared(path):
        return _data_checks(path)
    if (path / MANIFEST).is_file():
        return iter([("checkpoint", lambda: _check_checkpoint(path))])
    raise RunError(
        f"{path} is neither a run, a checkpoint nor prepared data; give a directory such as "
        "runs/NAME, runs/NAME/checkpoints/step-N or runs/.data/NAME"
    )


def _run_checks(run: Path) -> Iterator[Check]:
    yield CONFIG, lambda: _check_settings(run)
    yield MANIFEST, lambda: _check_facts(run)
    yield METRICS, lambda: _check_log(run)
    if (run / CHANGES).exists():
        yield CHANGES, lambda: _count_records(run / CHANGES, "change")
    yield SAMPLES, lambda: _count_records(run / SAMPLES, "sample")
    for _, path in list_checkpoints(run / CHECKPOINTS):
        yield f"{CHECKPOINTS}/{path.name}", lambda path=path: _check_checkpoint(path)  # type: ignore[misc]
    for path in sorted((run / BUNDLES).glob("[!.]*")):
        yield f"{BUNDLES}/{path.name}", lambda path=path: _check_bundle(path)  # type: ignore[misc]
    if data := _data_of(run):
        for name, check in _data_checks(data):
            yield f"{data}: {name}", check


def _count_records(path: Path, noun: str) -> str:
    return count(sum(1 for _ in read_records(path)), noun)


def _check_settings(run: Path) -> str:
    config_at(run, 1)  # of now, and as they were before every change
    return "valid"


def _check_facts(run: Path) -> str:
    if not read_run_facts(run):
        raise StorageError(f"{run / MANIFEST}: missing, or not an object in JSON")
    return "readable"


def _check_log(run: Path) -> str:
    read_metrics(run / METRICS)
    records = (record for _, record in read_records(run / METRICS))
    steps = [record["step"] for record in records if "validation_loss" not in record]
    for before, after in pairwise([0, *steps]):
        if after != before + 1:
            raise StorageError(f"{run / METRICS}: step {after} follows step {before}")
    return f"steps 1 to {steps[-1]}, each once" if steps else "no steps yet"


def _check_checkpoint(path: Path) -> str:
    """Compare every hash, then load it into the model and optimizer that its settings make."""
    verify_checkpoint(path)
    facts = read_facts(path)
    if "config" not in facts:
        return "every hash agrees (saved without settings: shapes were not compared)"
    _, trainer = build_trainer(_on_cpu(RunConfig(**facts["config"])))
    load_checkpoint(path, trainer)
    return "every hash and shape agrees"


def _check_bundle(path: Path) -> str:
    found = _check_checkpoint(path)
    read_batch(path)
    return found


def _on_cpu(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})


def _data_checks(directory: Path) -> Iterator[Check]:
    yield MANIFEST, lambda: _check_manifest(directory)
    try:
        _, files = read_manifest(directory)
    except StorageError:
        return
    damaged: list[str] = []
    for name, record in files.items():
        yield name, lambda name=name, record=record: _check_file(directory / name, record, damaged)  # type: ignore[misc]
    for split in ("train", "validation"):
        yield f"{split} tokens", lambda split=split: _check_split(directory, split, damaged)  # type: ignore[misc]


def _check_manifest(directory: Path) -> str:
    try:
        return count(len(read_manifest(directory)[1]), "file")
    except StorageError as error:
        raise _without_path(error, directory / MANIFEST) from None


def _check_file(path: Path, record: Any, damaged: list[str]) -> str:
    """Compare the hashes of a file; its name is added to `damaged` if they differ."""
    try:
        verify_file(path, record)
    except (StorageError, OSError) as error:
        damaged.append(path.name)
        raise _without_path(error, path) from None
    return count(record.size, "byte")


def _without_path(error: StorageError | OSError, path: Path) -> StorageError:
    """Return an error without the path that it begins with, where the line names that already."""
    return StorageError(str(error).removeprefix(f"{path}: "))


def _check_split(directory: Path, name: str, damaged: list[str]) -> str:
    """Read every id, which are compared with the vocabulary on the way, and the documents."""
    if damaged:
        raise _NotReadError(f"not read, because {damaged[0]} is damaged")
    split: TokenSplit = getattr(open_prepared(directory), name)
    for start in range(0, len(split), _IDS_AT_A_TIME):
        split.read(start, min(start + _IDS_AT_A_TIME, len(split)))
    if len(split):
        split.document_at(len(split) - 1)
    return f"{count(len(split), 'id')} in {count(split.num_documents, 'document')}"


def _data_of(run: Path) -> Path | None:
    """Return where a run's prepared data lies, if it is still there."""
    try:
        source = Path(read_run_config(run).data.source)
    except (ValueError, OSError):
        return None
    if is_prepared(source):
        return source
    fingerprint = str(read_run_facts(run).get("data_fingerprint"))[:12]
    if not fingerprint.isalnum():
        return None
    return next(iter(sorted(run.parent.glob(f".data/*-{fingerprint}"))), None)
