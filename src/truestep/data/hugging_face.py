"""Datasets of the library `datasets`: by name, or a directory that `save_to_disk` wrote.

Either way they are Arrow files on this disk, which are read like other files of documents.
"""

import json
import os
from pathlib import Path
from typing import Any

from truestep.data.documents import RecordFile
from truestep.data.formats import CorpusError, missing

PREFIX = "hf:"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_LIMIT_BYTES = 2**24


def is_saved(source: str) -> bool:
    """Return whether a directory is one that `save_to_disk` wrote."""
    return any(os.path.isfile(os.path.join(source, name)) for name in (_STATE, _SPLITS))


def saved_files(source: str, field: str) -> list[RecordFile]:
    """Return the files of a dataset that `save_to_disk` wrote, in its order.

    Errors: CorpusError for several splits, of which one must be named, and for a damaged state.
    """
    try:
        if os.path.isfile(path := os.path.join(source, _SPLITS)):
            splits = [str(name) for name in _read(path)["splits"]]
            raise CorpusError(
                f"{source!r} has the splits {', '.join(map(repr, splits))}; give one of them, as "
                f"{os.path.join(source, splits[0])!r}"
            )
        entries = _read(os.path.join(source, _STATE))["_data_files"]
        names = [str(entry["filename"]) for entry in entries]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{source!r}: its state is damaged; save the dataset again") from None
    if any(Path(name).name != name for name in names):
        raise CorpusError(f"{source!r}: its state names files elsewhere; save the dataset again")
    return [RecordFile(name, Path(source, name), "arrow", field) for name in names]


def named_files(source: str, field: str) -> list[RecordFile]:
    """Return the files of `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, fetched if need be.

    The split is train if none is named. Errors: CorpusError for a dataset that cannot be had.
    """
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or "" in rest:
        raise CorpusError(f"{source!r} must be hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError:
        raise missing(repr(source), "datasets") from None
    config, split = (None, *rest)[-2:] if rest else (None, "train")
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 what it raises is that of many libraries
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"{source!r} cannot be had ({type(error).__name__}: {reason}); is the name right, and "
            "is there a network?"
        ) from None
    paths = [Path(entry["filename"]) for entry in dataset.cache_files]
    return [RecordFile(path.name, path, "arrow", field) for path in paths]


def _read(path: str) -> Any:
    with open(path, "rb") as stream:
        return json.loads(stream.read(_LIMIT_BYTES))
