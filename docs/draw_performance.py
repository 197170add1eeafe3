"""Draw the pictures of docs/performance.md from the figures in docs/figures: `make docs`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

FIGURES = Path(__file__).parent / "figures"
_INK, _FAINT, _GRID = "#1b2430", "#6b7684", "#e6e9ee"
_BLUE, _ORANGE = "#2f6fde", "#d9622b"
_LABELS = {
    "batch_size": "rows of 256 tokens",
    "context_length": "context, 4096 tokens a batch",
    "width": "width",
    "vocab_size": "vocabulary",
    "micro_batches": "micro-batches, 16 rows in all",
    "corpus_tokens": "tokens in the corpus",
}
Line = tuple[str, Sequence[float], Sequence[float], str]  # its name, x, y, colour


def load(name: str) -> Any:
    """Return the figures of one benchmark."""
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def growth() -> Figure:
    """Draw the time of a step against each size."""
    points = load("growth")["points"]
    sweeps = list(dict.fromkeys(point["sweep"] for point in points))
    figure = Figure(figsize=(10, 6), dpi=130, facecolor="white", layout="constrained")
    for axes, sweep in zip(figure.subplots(2, 3).flat, sweeps, strict=True):
        values = [point["value"] for point in points if point["sweep"] == sweep]
        times = [point["seconds"] * 1e3 for point in points if point["sweep"] == sweep]
        unit = "ms to read a batch" if sweep == "corpus_tokens" else "ms a step"
        _draw(axes, unit, _LABELS[sweep], [("", values, times, _BLUE)])
        axes.set_ylim(min(times) / 2, max(times) * 2)
    return figure


def memory() -> Figure:
    """Draw peak and time of head and loss, against the vocabulary and against the chunk."""
    cases = load("memory-vocabulary")["cases"]
    chunks = load("memory-chunk")["cases"]
    figure = Figure(figsize=(10, 6), dpi=130, facecolor="white", layout="constrained")
    grid = figure.subplots(2, 2)
    rows = max(case["rows"] for case in cases)
    names = {"plain": ("all logits at once", _ORANGE), "deferred": ("deferred", _BLUE)}
    for row, (field, unit, scale) in enumerate(
        (("peak_bytes", "MiB at the peak", 2**-20), ("seconds", "ms, forward and backward", 1e3))
    ):
        by_vocab: list[Line] = []
        by_chunk: list[Line] = []
        for form, (name, colour) in names.items():
            found = [case for case in cases if case["form"] == form and case["rows"] == rows]
            vocab = [case["vocab"] for case in found]
            by_vocab.append((name, vocab, [case[field] * scale for case in found], colour))
            found = [case for case in chunks if case["form"] == form]
            sizes = [case["logits_per_chunk"] for case in found]
            values = [case[field] * scale for case in found]
            if form == "plain":  # it knows no chunks: a level line
                sizes = sorted({case["logits_per_chunk"] for case in chunks})
                values = values[:1] * len(sizes)
            by_chunk.append((name, sizes, values, colour))
        _draw(grid[row, 0], unit, f"vocabulary ({rows:,} rows)", by_vocab)
        _draw(
            grid[row, 1], unit, f"logits in a chunk (vocabulary {chunks[0]['vocab']:,})", by_chunk
        )
    return figure


def curves() -> Figure:
    """Draw the loss in float32 and by default, and their difference."""
    figure = Figure(figsize=(10, 3.4), dpi=130, facecolor="white", layout="constrained")
    for axes, workload in zip(figure.subplots(1, 2), ("W1", "W3"), strict=True):
        record = load(f"curves-{workload}")
        steps = range(1, record["steps"] + 1)
        axes.plot(steps, record["float32"], color=_ORANGE, linewidth=3, label="float32, uncompiled")
        axes.plot(steps, record["default"], color=_BLUE, linewidth=1, label="by default")
        _label(axes, "loss", f"{workload}: step")
    return figure


def _draw(axes: Any, unit: str, label: str, lines: list[Line]) -> None:
    for name, x, y, colour in lines:
        axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.6, label=name or None)
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = lines[0][1]
    if values[-1] <= 10**6:  # longer numbers read better as powers
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(_thousands)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(_thousands)
    axes.yaxis.set_minor_locator(NullLocator())
    _label(axes, unit, label)


def _thousands(value: float, _: int) -> str:
    """Return a mark of an axis: 0.2, 500, 2,000, 66k."""
    return f"{value / 1000:.0f}k" if value >= 4000 else f"{value:,.6g}"


def _label(axes: Any, unit: str, label: str) -> None:
    axes.set_title(unit, color=_INK, fontsize=9, loc="left")
    axes.set_xlabel(label, color=_FAINT, fontsize=9)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=_FAINT, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)


if __name__ == "__main__":
    for draw, name in ((growth, "growth"), (memory, "memory-chunk"), (curves, "curves-W1")):
        if (FIGURES / f"{name}.json").exists():
            draw().savefig(FIGURES / f"{draw.__name__}.png")
