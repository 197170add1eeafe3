"""Pictures: nothing that matters is thinned away, and every log can be drawn."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import training

from truestep.observe.charts import make_charts
from truestep.observe.log import Metrics, read_metrics
from truestep.observe.plots import draw_plots
from truestep.observe.series import decimate, smooth, ticks
from truestep.observe.svg import draw_svg

NAMES = ["loss", "learning_rate", "grad_norm", "throughput"]


def make_run(run, records):
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def columns(losses):
    count = len(losses)
    rest = ("grad_norm", "learning_rate", "step_seconds", "tokens_per_second")
    empty = np.array([], dtype=float)
    return Metrics(
        {
            "step": np.arange(1, count + 1),
            "loss": losses,
            "num_tokens": np.full(count, 1000),
            "skipped": np.zeros(count, dtype=bool),
            **{name: np.ones(count) for name in rest},
        },
        {"step": empty, "validation_loss": empty, "validation_bits_per_byte": empty},
    )


@pytest.mark.parametrize("count", [2001, 9999, 123_457, 1_000_000])
def test_thinning_keeps_the_extremes_the_ends_and_the_gaps(count):
    values = np.random.default_rng(count).standard_normal(count)
    values[count // 3], values[count // 2], values[count // 4] = 1e6, -1e6, np.nan
    steps, thin = decimate(np.arange(count), values)
    assert len(thin) <= 2000
    assert np.all(np.diff(steps) > 0)
    assert np.array_equal(thin, values[steps], equal_nan=True)
    assert {0, count // 4, count // 3, count // 2, count - 1} <= set(steps.tolist())


def test_a_log_that_fits_is_not_thinned():
    steps, values = np.arange(2000), np.random.default_rng(0).standard_normal(2000)
    assert np.array_equal(decimate(steps, values)[1], values)


@given(st.lists(st.floats(-1e30, 1e30) | st.just(math.nan) | st.just(math.inf), max_size=300))
def test_smoothing_is_the_mean_of_the_last_tenth_of_what_is_finite(values):
    smoothed = smooth(np.array(values, dtype=float), window=15)
    assert len(smoothed) == len(values)
    for i, found in enumerate(smoothed, start=1):
        length = min(max(i // 10, 1), 15)
        last = [value for value in values[i - length : i] if math.isfinite(value)]
        expected = math.fsum(last) / len(last) if last else math.nan
        # At most 15 additions, each within 2^-53 of the largest partial sum.
        slack = 1e-14 * max(map(abs, last), default=0.0)
        assert found == pytest.approx(expected, rel=1e-15, abs=slack, nan_ok=True)


@given(st.floats(1e-6, 1e6), st.floats(1e-4, 1e6), st.sampled_from(["linear", "log"]))
def test_marks_lie_on_the_axis_and_are_few(low, span, scale):
    high = low + span if scale == "linear" else low * (1.01 + span)
    marks = ticks(low, high, scale)
    assert 1 <= len(marks) <= 11
    assert marks == sorted(set(marks))
    slack = 1e-6 * (high - low)
    assert all(low - slack <= mark <= high + slack for mark in marks)


LOGS = {
    "empty": [],
    "one": [training(1)],
    "two": [training(1), training(2)],
    "all_nan": [training(step, "nan", grad_norm="inf", skipped=True) for step in range(1, 5)],
    "spike": [training(step, 9.0 if step == 50 else 2.0) for step in range(1, 60)],
    "gaps": [training(step, "nan" if step % 3 else 2.0) for step in range(1, 30)],
    "zeros": [training(step, 0.0, grad_norm=0.0, learning_rate=0.0) for step in range(1, 5)],
    "huge": [training(step, 3e38 if step == 3 else 2.0, grad_norm=3e38) for step in range(1, 9)],
    "validation_only": [{"step": 0, "validation_loss": 2.0, "validation_bits_per_byte": 2.9}],
    "nan_validation": [training(1), {"step": 1, "validation_loss": "nan"}],
}


@pytest.mark.parametrize("name", LOGS)
def test_every_log_can_be_drawn(tmp_path, name):
    run = make_run(tmp_path / name, LOGS[name])
    paths = draw_plots(run)
    assert paths == [run / "plots" / f"{chart}.png" for chart in NAMES]
    loss = matplotlib.image.imread(paths[0])
    assert loss.shape[:2] == (720, 1280)
    assert loss[..., :3].min() < 0.5  # something is written on the paper
    assert sorted(path.name for path in (run / "plots").iterdir()) == sorted(p.name for p in paths)
    for chart in make_charts(read_metrics(run / "metrics.jsonl")):
        drawn = draw_svg(chart, 330, 210)
        assert "nan" not in drawn
        assert "inf" not in drawn


def test_a_hostile_or_foreign_run_name_is_only_a_title(tmp_path):
    draw_plots(make_run(tmp_path / "$\\frac{1$ 漢字 \x1b[31m\u202e", [training(1)]))


def test_rare_spikes_do_not_flatten_the_curve():
    losses = 4.0 * np.arange(1, 5001) ** -0.2
    losses[[1000, 3000]] = 1e9
    chart = make_charts(columns(losses))[0]
    low, high = chart.limits
    assert low < losses.min()
    assert losses[0] * 0.8 < high < 2 * losses[0]
    assert chart.curves[1].values[-1] == pytest.approx(losses[-100:].mean())


def test_every_loss_spike_is_marked_where_the_eye_finds_it(tmp_path):
    losses = 2 + 0.01 * np.random.default_rng(0).random(3000)
    losses[1000], losses[2000] = 1e9, 2.5
    losses[2100:2400] += 0.5  # a rise is marked where it begins
    chart = make_charts(columns(losses))[0]
    (marks,) = [curve for curve in chart.curves if curve.style == "spike"]
    assert marks.label == "loss spike"
    assert marks.steps.tolist() == [1001, 2001, 2101]
    assert marks.values.tolist() == [chart.limits[1], 2.5, losses[2100]]
    path = draw_svg(chart, 1000, 370).split('class="spike" d="')[1].split('"')[0]
    assert path.count("z") == 3
    assert path.count(" 10.0l") == 1  # on the upper edge
    without = make_charts(columns(np.full(3000, 2.0)))[0]
    assert not [curve for curve in without.curves if curve.style == "spike"]


def test_the_right_axis_converts_nats_a_token_to_bits_a_byte(tmp_path):
    bits = 1.5 / math.log(2) / 3.7  # three point seven bytes a token
    check = {"step": 1, "validation_loss": 1.5, "validation_bits_per_byte": bits}
    run = make_run(tmp_path / "run", [training(1), check])
    chart = make_charts(read_metrics(run / "metrics.jsonl"))[0]
    assert chart.right_factor == pytest.approx(1 / math.log(2) / 3.7)


def test_a_directory_without_a_log_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl; [^\n]+$"):
        draw_plots(tmp_path)


def test_drawing_a_million_steps_stays_light():
    losses = 1 + np.random.default_rng(0).random(1_000_000)
    for chart in make_charts(columns(losses)):
        assert sum(len(curve.values) for curve in chart.curves) <= 2000 + 1250
        assert len(draw_svg(chart, 1000, 370)) < 100_000
