"""What the pictures of a run show; `plots` and `svg` draw them."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from truestep.observe.log import Column, Metrics
from truestep.observe.series import Scale, decimate, smooth, ticks
from truestep.observe.spikes import find_spikes


class Curve(NamedTuple):
    """One line, or a set of points; a value that is not finite is a gap."""

    label: str
    steps: Shaped[np.ndarray, "N"]
    values: Float[np.ndarray, "N"]
    style: Literal["raw", "main", "points", "warning", "spike"]


class Chart(NamedTuple):
    """One picture over the steps of a run; without curves it says why in `note`."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)
    scale: Scale = "linear"
    note: str = ""
    right_unit: str = ""
    right_factor: float = 1.0  # right axis = left axis × this


def make_charts(metrics: Metrics) -> list[Chart]:
    """Return the charts of a run, `loss` first; each curve is thinned to what a screen shows."""
    training = metrics.training
    rate, speed = training["learning_rate"], training["tokens_per_second"]
    norm = np.where(training["grad_norm"] > 0, training["grad_norm"], np.nan)
    steps = training["step"]
    charts = [
        _loss_chart(metrics),
        Chart("learning_rate", "Learning rate", "", _plain(steps, rate), _from_zero(rate)),
        Chart(
            "grad_norm",
            "Gradient norm",
            "before clipping",
            # The mean of logarithms: one spike does not lift a hundred steps.
            _smoothed(steps, norm, np.exp(smooth(np.log(norm)))),
            _around(norm),
            scale="log",
        ),
        Chart(
            "throughput",
            "Throughput",
            "tokens/s",
            _smoothed(steps, speed, smooth(speed)),
            _from_zero(speed),
        ),
    ]
    return [
        _noted(chart, "no finite value yet" if len(steps) else "no steps yet") for chart in charts
    ]


def step_limits(chart: Chart) -> tuple[float, float]:
    """Return the first and the last step shown: of a chart with one step, its neighbours."""
    low = min(float(curve.steps.min()) for curve in chart.curves)
    high = max(float(curve.steps.max()) for curve in chart.curves)
    return (low, high) if high > low else (low - 1, high + 1)


def step_ticks(chart: Chart, num: int = 8) -> list[float]:
    """Return about `num` whole steps to name below a chart."""
    return [mark for mark in ticks(*step_limits(chart), num=num) if mark == round(mark)]


def _loss_chart(metrics: Metrics) -> Chart:
    training, validation = metrics
    loss, skipped = training["loss"], training["step"][training["skipped"]]
    limits = _loss_limits(loss, validation["validation_loss"])
    floor = np.full(len(skipped), limits[0])
    curves = (
        *_smoothed(training["step"], loss, smooth(loss)),
        Curve("validation", *decimate(validation["step"], validation["validation_loss"]), "points"),
        Curve("skipped update", *decimate(skipped, floor), "warning"),
        _spike_marks(training["step"], loss, limits[1]),
    )
    chart = Chart("loss", "Loss", "nats per token", curves, limits)
    factor = _bits_per_byte_factor(validation)
    return chart._replace(right_unit="bits per byte", right_factor=factor) if factor else chart


def _spike_marks(steps: Column, loss: Column, top: float) -> Curve:
    """Return a mark at each spike, on the edge of the picture where the loss is beyond it."""
    spikes = find_spikes(steps, loss)
    losses = np.array([min(spike.loss, top) for spike in spikes], dtype=float)
    marks = decimate(np.array([spike.step for spike in spikes], dtype=np.int64), losses)
    return Curve("loss spike", *marks, "spike")


def _noted(chart: Chart, note: str) -> Chart:
    """Return the chart without its empty curves, or, where it has nothing to draw, its note."""
    lines = [curve for curve in chart.curves if curve.style != "warning"]
    if not any(np.isfinite(curve.values).any() for curve in lines):
        return Chart(chart.name, chart.title, chart.unit, note=note)
    return chart._replace(curves=tuple(curve for curve in chart.curves if len(curve.steps)))


def _plain(steps: Column, values: Column) -> tuple[Curve, ...]:
    return (Curve("", *decimate(steps, values, num_buckets=250), "main"),)


def _smoothed(steps: Column, values: Column, mean: Column) -> tuple[Curve, ...]:
    return (
        Curve("each step", *decimate(steps, values), "raw"),
        Curve("smoothed", *decimate(steps, mean, num_buckets=250), "main"),
    )


def _loss_limits(loss: Column, validation: Column) -> tuple[float, float]:
    """Return limits that show the beginning and the end, but not the height of rare spikes."""
    loss, validation = loss[np.isfinite(loss)], validation[np.isfinite(validation)]
    both = np.concatenate([loss, validation])
    if not len(both):
        return 0.0, 1.0
    tops = [np.quantile(values, 0.98) for values in (loss, validation) if len(values)]
    return _widened(float(both.min()), max(*tops, np.median(both[:5])))


def _from_zero(values: Column) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    top = float(values.max()) if len(values) else 0.0
    return 0.0, 1.08 * top if top > 0 else 1.0


def _around(values: Column) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    return (float(values.min()) / 1.2, float(values.max()) * 1.2) if len(values) else (0.1, 1.0)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = max(0.05 * (high - low), 0.01 * abs(high), 1e-6)
    return low - margin, high + margin


def _bits_per_byte_factor(validation: dict[str, Column]) -> float | None:
    """Return bits per byte for one nat per token, from the last validation that knows both."""
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = validation["validation_bits_per_byte"] / validation["validation_loss"]
    factors = factors[np.isfinite(factors) & (factors > 0)]
    return float(factors[-1]) if len(factors) else None
