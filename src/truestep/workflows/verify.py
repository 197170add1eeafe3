"""Check every stored byte of a run, a checkpoint or prepared data; nothing is changed."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from truestep.checkpoint.bundle import read_batch
from truestep.checkpoint.commit import list_checkpoints, verify_checkpoint
from truestep.checkpoint.state import load_checkpoint, read_facts
from truestep.config import RunConfig
from truestep.data.corpus import Say
from truestep.data.tokenizer import DEFINITION
from truestep.data.tokens import FORMAT, FORMAT_VERSION, is_prepared, open_prepared
from truestep.manifest import MANIFEST, read_manifest
from truestep.observe.log import METRICS, read_metrics, read_records
from truestep.observe.text import count
from truestep.settings import shown
from truestep.storage import FileRecord, StorageError, verify_file
from truestep.workflows.build import build_trainer
from truestep.workflows.history import (
    CHANGES,
    config_at,
    saved_config,
    settings_now,
    settings_of,
    trajectory_changes,
)
from truestep.workflows.run import (
    BUNDLES,
    CHECKPOINTS,
    CONFIG,
    SAMPLES,
    RunError,
    read_run_config,
    read_run_facts,
    read_tokenizer,
)
from truestep.workflows.sources import source_fingerprints

_IDS_AT_A_TIME = 2**20

Check = tuple[str, Callable[[], str]]
"""What is checked, and a function that returns what it found or raises what is wrong."""


def verify(path: Path, say: Say) -> int:
    """Check a run, a checkpoint or a directory of prepared data; return how much is wrong.

    `say` is told of each thing that was checked, and where the first difference in it is.
    Errors: RunError for a path that is none of these.
    """
    wrong = 0
    for name, check in _checks(path):
        try:
            say(f"ok   {name}: {check()}")
        except (ValueError, OSError, RuntimeError) as error:
            wrong += 1
            say(f"BAD  {name}: {error}")
    say(f"{path}: {wrong} damaged" if wrong else f"{path}: everything is as it was written")
    return wrong


def _checks(path: Path) -> Iterator[Check]:
    if any((path / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS)):
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
    saved = [step for step, _ in list_checkpoints(run / CHECKPOINTS)]  # before the log is read
    yield CONFIG, lambda: _check_settings(run)
    yield MANIFEST, lambda: _check_facts(run)
    yield METRICS, lambda: _check_log(run, max(saved, default=0))
    if (run / DEFINITION).exists():
        yield DEFINITION, lambda: _check_tokenizer(run)
    if (run / CHANGES).exists():
        yield CHANGES, partial(_count_records, run / CHANGES, "change")
    yield SAMPLES, partial(_count_records, run / SAMPLES, "sample")
    for _, path in list_checkpoints(run / CHECKPOINTS):
        yield f"{CHECKPOINTS}/{path.name}", partial(_check_kept, path)
    for path in sorted((run / BUNDLES).glob("[!.]*")):
        yield f"{BUNDLES}/{path.name}", partial(_check_bundle, path)
    data = _data_of(run)
    for directory in data:
        for name, check in _data_checks(directory):
            yield f"{directory}: {name}", check
    if not data:
        yield "data", lambda: "not checked: what the run prepared from its text is not here"


def _check_settings(run: Path) -> str:
    config_at(run, 1)  # of now, and as they were before every change
    found = settings_now(run, lambda _: None)  # a change that a kill cut off is no damage
    for setting, saved, now in trajectory_changes(saved_config(run), found):
        raise StorageError(
            f"{run / CONFIG}: {setting.name} is {shown(now)}, but the run was last saved with "
            f"{shown(saved)}; restore it"
        )
    return "valid, and those the run was saved with"


def _check_tokenizer(run: Path) -> str:
    tokenizer = read_tokenizer(run, read_run_config(run), read_run_facts(run))
    return f"{count(tokenizer.vocab_size, 'id')}, and the one the run began with"


def _check_facts(run: Path) -> str:
    if not read_run_facts(run):
        raise StorageError(f"{run / MANIFEST}: missing, or not an object in JSON")
    return "readable"


def _check_log(run: Path, saved: int) -> str:
    """Check that the log has every step up to the last saved one, and what it has after it."""
    read_metrics(run / METRICS)
    records = (record for _, record in read_records(run / METRICS))
    steps = [record["step"] for record in records if "validation_loss" not in record]
    for before, after in pairwise([0, *steps]):
        if after != before + 1:
            raise StorageError(f"{run / METRICS}: step {after} follows step {before}")
    if (last := steps[-1] if steps else 0) < saved:
        raise StorageError(f"{run / METRICS}: ends at step {last}, but step {saved} was saved")
    return f"steps 1 to {last}, each once" if last else "no steps yet"


def _count_records(path: Path, noun: str) -> str:
    return count(sum(1 for _ in read_records(path)), noun)


def _check_kept(path: Path) -> str:
    try:
        return _check_checkpoint(path)
    except (ValueError, OSError, RuntimeError):
        if path.exists():
            raise
        return "removed meanwhile by its run, which keeps newer ones"


def _check_checkpoint(path: Path) -> str:
    """Compare every hash, then load it into the model and optimizer that its settings make."""
    verify_checkpoint(path)
    facts = read_facts(path)
    if "config" not in facts:
        return "every hash agrees (saved without settings: shapes were not compared)"
    _, trainer = build_trainer(_on_cpu(settings_of(path, facts)))
    load_checkpoint(path, trainer)
    return "every hash and shape agrees"


def _check_bundle(path: Path) -> str:
    found = _check_checkpoint(path)
    read_batch(path)
    return found


def _on_cpu(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})


def _data_checks(directory: Path) -> Iterator[Check]:
    damaged: list[str] = []
    read = partial(read_manifest, directory, (FORMAT, FORMAT_VERSION))
    yield MANIFEST, lambda: count(len(read()[1]), "file")
    try:
        _, files = read()
    except StorageError:
        return
    for name, record in files.items():
        yield name, partial(_check_file, directory / name, record, damaged)
    for name in ("train", "validation"):
        yield f"{name} tokens", partial(_check_split, directory, name, damaged)


def _check_file(path: Path, record: FileRecord, damaged: list[str]) -> str:
    try:
        verify_file(path, record)
    except (OSError, ValueError):
        damaged.append(path.name)
        raise
    return count(record.size, "byte")


def _check_split(directory: Path, name: str, damaged: list[str]) -> str:
    """Read every id, which are compared with the vocabulary on the way, and the documents."""
    if damaged:
        return f"not read, since {damaged[0]} is damaged"
    data = open_prepared(directory)
    split = {"train": data.train, "validation": data.validation}[name]
    for start in range(0, len(split), _IDS_AT_A_TIME):
        split.read(start, min(start + _IDS_AT_A_TIME, len(split)))
    if len(split):
        split.document_at(len(split) - 1)
    return f"{count(len(split), 'id')} in {count(split.num_documents, 'document')}"


def _data_of(run: Path) -> list[Path]:
    """Return where the prepared data of each of a run's sources lies, if it is still there."""
    try:
        sources = read_run_config(run).data.sources
    except (ValueError, OSError):
        return []
    fingerprints = source_fingerprints(read_run_facts(run))
    found = []
    for number, source in enumerate(sources):
        if is_prepared(source):
            found.append(Path(source))
        elif number < len(fingerprints) and fingerprints[number][:12].isalnum():
            found += sorted(run.parent.glob(f".data/*-{fingerprints[number][:12]}"))[:1]
    return found
