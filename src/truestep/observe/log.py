"""Read a run's logs back: JSON lines, of which the last may be torn by a kill."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

METRICS = "metrics.jsonl"  # in the directory of a run
SOURCE_LOSS = "validation_loss/"  # and the name of one of several sources

Column = Shaped[np.ndarray, "N"]

# Column -> array type code and the value of a record that lacks it.
_STEP = {"step": ("q", -1)}
_TRAINING: dict[str, tuple[str, float]] = _STEP | {
    "loss": ("d", np.nan),
    "grad_norm": ("d", np.nan),
    "learning_rate": ("d", np.nan),
    "num_tokens": ("q", 0),
    "step_seconds": ("d", np.nan),
    "skipped": ("b", 0),
    "tokens_per_second": ("d", np.nan),
}
_VALIDATION: dict[str, tuple[str, float]] = _STEP | {
    "validation_loss": ("d", np.nan),
    "validation_bits_per_byte": ("d", np.nan),
}


class Metrics(NamedTuple):
    """The columns of a run's log, each an array with one value a record, in the log's order."""

    training: dict[str, Column]
    validation: dict[str, Column]


def read_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield every line (with its newline) and its record; a last line without newline is dropped.

    A missing file has no lines.
    Errors: ValueError with the file and the line number for a line that is no record.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):  # killed while writing: the step was never committed
                return
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise _corrupt(path, number, "not a JSON object with an integer step")
            yield line, record


def read_metrics(path: Path) -> Metrics:
    """Return the training and validation columns of a `metrics.jsonl`.

    A missing or empty file gives empty columns. `skipped` is boolean, `step` and `num_tokens` are
    int64, all others float64, NaN where a record lacks the value.
    Errors: ValueError with the file and the line number for a line that cannot be read.
    """
    training: dict[str, Any] = {name: array(code) for name, (code, _) in _TRAINING.items()}
    validation: dict[str, Any] = {name: array(code) for name, (code, _) in _VALIDATION.items()}
    for number, (_, record) in enumerate(read_records(path), start=1):
        is_validation = "validation_loss" in record
        columns, kinds = (validation, _VALIDATION) if is_validation else (training, _TRAINING)
        try:
            for name, (code, default) in kinds.items():
                value = record.get(name, default)
                columns[name].append(float(value) if code == "d" else value)
        except (TypeError, ValueError, OverflowError):
            raise _corrupt(path, number, f"{name} is not a number") from None
    return Metrics(_as_numpy(training), _as_numpy(validation))


def _as_numpy(columns: dict[str, Any]) -> dict[str, Column]:
    arrays = {name: np.array(column) for name, column in columns.items()}
    if "skipped" in arrays:
        arrays["skipped"] = arrays["skipped"].astype(bool)
    return arrays


def _corrupt(path: Path, number: int, reason: str) -> ValueError:
    return ValueError(f"{path}: line {number}: {reason}; repair or remove that line")
