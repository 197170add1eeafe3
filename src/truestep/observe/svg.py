"""Draw a chart as an inline SVG whose colours follow the page: light, dark or printed."""

from html import escape

import numpy as np

from truestep.observe.charts import Chart, Curve, step_limits, step_ticks
from truestep.observe.series import ticks
from truestep.observe.text import format_tick

# The page's style sheet includes this; --ink, --faint, --line, --blue, --orange, --red are its own.
STYLE = """
svg.chart { display: block; width: 100%; height: auto; }
svg.chart text { fill: var(--faint); font-size: 12px; font-variant-numeric: tabular-nums; }
svg.chart .grid { stroke: var(--line); fill: none; }
svg.chart path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .raw { stroke: var(--blue); stroke-width: 0.7; opacity: 0.35; }
svg.chart .main { stroke: var(--blue); stroke-width: 1.8; }
svg.chart .points { stroke: var(--orange); stroke-width: 1.2; }
svg.chart .warning { stroke: var(--red); stroke-width: 2; }
svg.chart .spike { fill: var(--red); }
svg.chart .main.dot, svg.chart .raw.dot { fill: var(--blue); }
svg.chart .points.dot { fill: var(--orange); }
.key { color: var(--faint); font-size: 13px; margin-right: 14px; white-space: nowrap; }
.key i {
  display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--blue);
}
.key i.raw { opacity: 0.35; }
.key i.points { background: var(--orange); }
.key i.warning { background: var(--red); }
.key i.spike {
  width: 0; height: 0; border: solid transparent; border-width: 8px 5px 0; border-radius: 0;
  border-top-color: var(--red); background: none;
}
"""

_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 24, 10, 28


def draw_svg(chart: Chart, width: int, height: int) -> str:
    """Return a chart as `<svg>` of the given size in CSS pixels; it scales with its container."""
    if not chart.curves:
        body = f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">{chart.note}</text>'
    else:
        frame = _Frame(chart, width, height)
        curves = "".join(_curve(frame, curve) for curve in chart.curves)
        body = f"{_axes(frame, chart)}{curves}"
    label = escape(f"{chart.title} over the steps of the run")
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"{body}</svg>"
    )


def draw_key(chart: Chart) -> str:
    """Return the units of a chart and which line is which, as HTML that wraps like text."""
    units = chart.unit + (f", right: {chart.right_unit}" if chart.right_unit else "")
    keys = (
        f'<span class="key"><i class="{curve.style}"></i>{escape(curve.label)}</span>'
        for curve in chart.curves
        if curve.label
    )
    return f'<span class="key">{escape(units)}</span>{"".join(keys)}'


class _Frame:
    """Where numbers stand on the paper."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.steps = step_limits(chart)
        self.limits = chart.limits
        self.is_log = chart.scale == "log"
        self.left, self.right = _LEFT, width - (_LEFT if chart.right_unit else _RIGHT)
        self.top, self.bottom = _TOP, height - _BOTTOM

    def x(self, steps: np.ndarray) -> np.ndarray:
        low, high = self.steps
        return self.left + (steps - low) / (high - low) * (self.right - self.left)

    def y(self, values: np.ndarray) -> np.ndarray:
        """Return heights, cut at the frame so that a spike ends there; a gap is NaN."""
        low, high = self.limits
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (
                np.log(values / low) / np.log(high / low)
                if self.is_log
                else (values - low) / (high - low)
            )
        share = np.where(np.isfinite(values), share, np.nan)
        return self.bottom - np.clip(share, 0, 1) * (self.bottom - self.top)


def _axes(frame: _Frame, chart: Chart) -> str:
    parts = []
    num = round(frame.bottom / 45)
    for mark in ticks(*chart.limits, chart.scale, num):
        y = float(frame.y(np.array(mark)))
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(_text(frame.left - 8, y + 4, "end", format_tick(mark)))
    if chart.right_unit:
        low, high = (limit * chart.right_factor for limit in chart.limits)
        for mark in ticks(low, high, num=num):
            y = float(frame.y(np.array(mark / chart.right_factor)))
            parts.append(_text(frame.right + 8, y + 4, "start", format_tick(mark)))
    for mark in step_ticks(chart, num=round(frame.right / 65)):
        x = float(frame.x(np.array(mark)))
        parts.append(_text(x, frame.bottom + 18, "middle", f"{mark:,.0f}"))
    return "".join(parts)


def _curve(frame: _Frame, curve: Curve) -> str:
    x, y = frame.x(curve.steps), frame.y(curve.values)
    points = [
        (f"{left:.1f}", f"{top:.1f}") if np.isfinite(top) else None
        for left, top in zip(x.tolist(), y.tolist(), strict=True)
    ]
    if curve.style == "warning":
        return f'<path class="warning" d="{"".join(f"M{p[0]} {p[1]}v-7" for p in points if p)}"/>'
    if curve.style == "spike":
        marks = "".join(f"M{p[0]} {p[1]}l-4.5 -8h9z" for p in points if p)
        return f'<path class="spike" d="{marks}"/>'
    path, is_gap = [], True
    for point in points:
        if point:
            # h0 with a round cap: a point between two gaps is a dot.
            path.append(f"M{point[0]} {point[1]}h0" if is_gap else f"L{point[0]} {point[1]}")
        is_gap = point is None
    drawn = f'<path class="{curve.style}" d="{"".join(path)}"/>'
    if curve.style == "points" or len(points) == 1:
        drawn += "".join(
            f'<circle class="{curve.style} dot" cx="{point[0]}" cy="{point[1]}" r="2.6"/>'
            for point in points
            if point
        )
    return drawn


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
