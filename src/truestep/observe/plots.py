"""Draw a run's pictures as PNG files, with matplotlib's objects: nothing global is touched."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from truestep.observe.charts import Chart, Curve, make_charts, step_limits, step_ticks
from truestep.observe.log import METRICS, Metrics, read_metrics
from truestep.observe.series import smooth, ticks
from truestep.observe.text import encodable, format_tick, printable_line
from truestep.storage import LOCAL, replace_file

_INK, _FAINT_INK, _GRID = "#1b2430", "#6b7684", "#e6e9ee"
_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": "#2f6fde", "alpha": 0.25, "linewidth": 0.7, "zorder": 2},
    "main": {"color": "#2f6fde", "linewidth": 1.8, "zorder": 3, "solid_capstyle": "round"},
    "points": {"color": "#d9622b", "linewidth": 1.2, "marker": "o", "markersize": 4.5, "zorder": 4},
    "warning": {"color": "#c62f3b", "linestyle": "none", "marker": "|", "markersize": 9},
    # Marker 7 is a triangle whose tip stands on the point: on the frame's edge, it is above it.
    "spike": {"color": "#c62f3b", "linestyle": "none", "marker": 7, "clip_on": False, "zorder": 5},
}


def draw_plots(run: Path) -> list[Path]:
    """Draw a run's log into `plots/` and return the files; each appears whole or not at all.

    A log without steps gives pictures that say so.
    Errors: ValueError for a directory without a log, or a corrupt line in it.
    """
    metrics = read_run(run)
    directory = run / "plots"
    directory.mkdir(exist_ok=True)
    paths = []
    for chart in make_charts(metrics):
        path = directory / f"{chart.name}.png"
        replace_file(LOCAL, path, draw_png(chart, _headline(run, metrics)))
        paths.append(path)
    return paths


def read_run(run: Path) -> Metrics:
    """Return the metrics of a run's directory.

    Errors: ValueError for a directory without a log, or a corrupt line in it.
    """
    if not (run / METRICS).is_file():
        raise ValueError(f"{run} holds no {METRICS}; name the directory of a run")
    return read_metrics(run / METRICS)


def summarize(metrics: Metrics) -> list[tuple[str, str]]:
    """Return the final numbers of a run, each with its name; what is not known is left out."""
    training, validation = metrics
    facts = []
    if len(training["step"]):
        facts.append(("training loss", f"{smooth(training['loss'])[-1]:.4f}"))
    if len(validation["step"]):
        facts.append(("validation loss", f"{validation['validation_loss'][-1]:.4f}"))
        if np.isfinite(bits := validation["validation_bits_per_byte"][-1]):
            facts.append(("bits per byte", f"{bits:.4f}"))
    return facts


def draw_png(chart: Chart, headline: str) -> bytes:
    """Return a chart as a PNG file; `headline` stands under its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=160, facecolor="white")
    axes = figure.add_axes((0.085, 0.11, 0.835 if chart.right_unit else 0.89, 0.7))
    figure.text(0.02, 0.93, chart.title, color=_INK, fontsize=13, fontweight="bold")
    # The built-in font has no glyphs beyond Europe's: others would draw as boxes, with a warning.
    headline = encodable(headline, "latin-1")
    figure.text(0.02, 0.88, headline, color=_FAINT_INK, fontsize=8.5, parse_math=False)
    if chart.curves:
        _draw_curves(axes, chart)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, chart.note, ha="center", color=_FAINT_INK, fontsize=14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_curves(axes: Any, chart: Chart) -> None:
    for curve in chart.curves:
        _draw_curve(axes, curve)
    low, high = step_limits(chart)
    margin = 0.01 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_xticks(step_ticks(chart))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step", color=_FAINT_INK, fontsize=8.5)
    axes.set_yscale(chart.scale)
    axes.set_ylim(*chart.limits)
    _label_axis(axes, chart.unit, ticks(*chart.limits, chart.scale, num=7))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if len(chart.curves) > 1:
        axes.legend(
            frameon=False, fontsize=8.5, labelcolor=_INK, loc="lower right", ncols=5,
            bbox_to_anchor=(1, 1.155), borderaxespad=0,
        )  # fmt: skip
    if chart.right_unit:
        factor = chart.right_factor
        right = axes.secondary_yaxis(
            "right", functions=(lambda nats: nats * factor, lambda bits: bits / factor)
        )
        low, high = chart.limits
        _label_axis(right, chart.right_unit, ticks(low * factor, high * factor, num=7))


def _draw_curve(axes: Any, curve: Curve) -> None:
    style = _STYLES[curve.style]
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    if len(values) == 1 and "marker" not in style:  # a line of one point would be invisible
        style = style | {"marker": "o", "markersize": 4.5}
    axes.plot(curve.steps, values, label=curve.label, **style)


def _label_axis(axes: Any, unit: str, marks: list[float]) -> None:
    axes.set_yticks(marks, labels=[format_tick(mark) for mark in marks])
    axes.set_yticks([], minor=True)
    axes.set_ylabel(unit, color=_FAINT_INK, fontsize=8.5)
    axes.tick_params(which="both", length=0, colors=_FAINT_INK, labelsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)


def _headline(run: Path, metrics: Metrics) -> str:
    parts = [printable_line(run.resolve().name)]
    if len(steps := metrics.training["step"]):
        parts.append(f"step {steps[-1]:,}")
    return "  ·  ".join([*parts, *(f"{name} {value}" for name, value in summarize(metrics))])
