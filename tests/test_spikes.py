"""Loss spikes: what stands out is reported, once; what does not is not, and no state is hidden."""

import json
import math
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import training

from truestep.observe.spikes import (
    CALM_STEPS,
    MIN_DEVIATIONS,
    MIN_NATS,
    MIN_STEPS,
    WINDOW_STEPS,
    SpikeWatch,
    find_spikes,
)
from truestep.shell import command

VALIDATION = {"step": 7, "validation_loss": 99.0}


def find(losses):
    return find_spikes(np.arange(1, len(losses) + 1), np.array(losses, dtype=float))


def write_log(run, records):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def decaying(seed, count, noise):
    """The loss of a run that goes well: fast at first, then slowly, with the noise of its data."""
    steps = np.arange(1, count + 1)
    return 1.6 + 4 * steps**-0.35 + noise * np.random.default_rng(seed).standard_normal(count)


def ragged(seed, count):
    """Losses with spikes, rises and gaps everywhere, and many near the line."""
    rng = np.random.default_rng(seed)
    shares = [0.94, 0.02, 0.02, 0.01, 0.01]
    losses = 3 + 0.08 * rng.standard_normal(count)
    losses += rng.choice([0.0, 0.6, 0.7, 0.9, 3.0], count, p=shares)
    losses[rng.random(count) < 0.05] = rng.choice([math.nan, math.inf, -math.inf])
    losses[int(rng.integers(count)) :] += 1.5
    return losses


def spikes_by_definition(losses):
    finite = [(step, loss) for step, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    found, high = [], [False] * CALM_STEPS
    for i, (step, loss) in enumerate(finite):
        window = np.array([past for _, past in finite[max(i - WINDOW_STEPS, 0) : i]])
        high.append(False)
        if len(window) >= MIN_STEPS:
            excess = loss - np.median(window)
            deviation = 1.4826 * np.median(abs(window - np.median(window)))
            high[-1] = bool(excess > MIN_NATS and excess > MIN_DEVIATIONS * deviation)
            if high[-1] and not any(high[-1 - CALM_STEPS : -1]):
                found.append((step, loss, np.median(window), excess / deviation))
    return found


@given(st.integers(0, 2**32), st.integers(1, 400))
def test_a_spike_is_what_its_definition_says(seed, count):
    losses = ragged(seed, count)
    expected = spikes_by_definition(losses)
    found = find(losses)
    assert [spike.step for spike in found] == [step for step, *_ in expected]
    for spike, numbers in zip(found, expected, strict=True):
        assert spike == pytest.approx(numbers, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_interrupted_anywhere_reports_what_the_uninterrupted_one_does(tmp_path, seed):
    losses = ragged(seed, 330)
    records = [training(step, float(loss)) for step, loss in enumerate(losses, start=1)]
    records.insert(7, VALIDATION)
    write_log(tmp_path, [r | {"loss": str(r["loss"])} if "loss" in r else r for r in records])
    steps = [spike.step for spike in find(losses)]
    assert len(steps) >= 5
    for split in range(len(losses) + 1):
        reports = []
        watch = SpikeWatch(tmp_path, reports.append, from_step=split)
        for record in records:
            if record["step"] > split:
                watch.write(record)
        watch.close()
        found = [int(report.split()[4].rstrip(":")) for report in reports]
        assert found == [step for step in steps if step > split]


@pytest.mark.parametrize("num_gaps", [0, 150])
def test_a_resumed_run_looks_back_as_far_as_it_matters(tmp_path, num_gaps):
    # Half of what came before lies at 2.0, half at 2.1: a loss of 2.5 is not high. With one of the
    # first forgotten, most would lie at 2.1 and it would be, and would hide the spike ten steps on.
    half = WINDOW_STEPS // 2
    losses = [2.0] * half + [2.1] * half + [2.5] + [2.05] * (CALM_STEPS - 1)
    losses += [math.nan] * num_gaps + [9.0]
    assert [spike.step for spike in find(losses)] == [len(losses)]
    records = [training(step, loss) for step, loss in enumerate(losses, start=1)]
    write_log(tmp_path, [record | {"loss": str(record["loss"])} for record in records[:-1]])
    reports = []
    SpikeWatch(tmp_path, reports.append, from_step=len(losses) - 1).write(records[-1])
    assert len(reports) == 1


def test_a_run_without_a_log_has_nothing_before_it(tmp_path):
    reports = []
    watch = SpikeWatch(tmp_path, reports.append)
    for step, loss in enumerate([2.0] * MIN_STEPS + [2.0 + 1.01 * MIN_NATS], start=1):
        assert not reports
        watch.write(training(step, loss))
    assert len(reports) == 1


@given(
    st.integers(0, 2**32),
    st.sampled_from([(0.01, 0.5), (0.03, 0.5), (0.05, 0.8), (0.07, 1.0)]),
    st.integers(250, 999),
)
def test_a_spike_in_a_run_that_goes_well_is_found(seed, noise_and_height, place):
    noise, height = noise_and_height
    losses = decaying(seed, 1000, noise)
    losses[place] = losses[place - 100 : place].mean() + height
    assert [spike.step for spike in find(losses)] == [place + 1]


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2, 0.4])
def test_a_run_that_goes_well_has_no_spike(noise):
    for seed in range(10):
        assert find(decaying(seed, 5000, noise)) == []


def test_what_is_new_but_small_is_no_spike():
    rng = np.random.default_rng(0)
    losses = 3 + 0.001 * rng.standard_normal(200)
    losses[150] += MIN_NATS - 0.01  # a hundred deviations and more
    assert find(losses) == []
    losses[170] += MIN_NATS + 0.01
    assert [spike.step for spike in find(losses)] == [171]


def test_a_rise_that_stays_is_reported_once_and_so_is_the_next():
    rng = np.random.default_rng(0)
    losses = 3 + 0.05 * rng.standard_normal(600)
    losses[200:] += 1.5
    losses[400:] += 1.5
    assert [spike.step for spike in find(losses)] == [201, 401]


def test_a_rise_ends_when_enough_losses_are_back():
    losses = 3 + 0.05 * np.random.default_rng(0).standard_normal(300)
    losses[[150, 150 + CALM_STEPS, 151 + 2 * CALM_STEPS]] = 5
    assert [spike.step for spike in find(losses)] == [151, 152 + 2 * CALM_STEPS]


@given(st.integers(0, 2**32), st.lists(st.sampled_from(["nan", "inf", "-inf"]), max_size=40))
def test_losses_that_are_not_finite_are_as_if_they_were_not_there(seed, gaps):
    rng = np.random.default_rng(seed)
    losses = ragged(seed, 250)
    losses = losses[np.isfinite(losses)]
    places = rng.integers(0, len(losses) + 1, len(gaps))
    steps = np.insert(np.arange(len(losses)), places, -1)
    with_gaps = np.insert(losses, places, [float(gap) for gap in gaps])
    assert find_spikes(steps, with_gaps) == find_spikes(np.arange(len(losses)), losses)


def test_equal_losses_have_no_deviation_to_count_in(tmp_path):
    reports = []
    write_log(tmp_path, [training(step, 2.0) for step in range(1, 51)])
    SpikeWatch(tmp_path, reports.append, from_step=50).write(training(51, 2.5))
    assert "2.500, inf deviations above the median 2.000" in reports[0]


@pytest.mark.parametrize("name", ["stdlib-1", "two words", "it's $HOME; rm -rf *"])
def test_a_report_ends_with_the_command_that_shows_the_step(tmp_path, name):
    run, reports = tmp_path / name, []
    losses = [2.0, 2.1] * 60
    write_log(run, [training(step, loss) for step, loss in enumerate(losses, start=1)])
    SpikeWatch(run, reports.append, from_step=120).write(training(121, 5.25))
    (report,) = reports
    text, typed = report.split("; see what was in it: ")
    # The median is halfway, and every loss lies 0.05 from it.
    assert text == (
        f"loss spike at step 121: 5.250, {3.2 / 1.4826 / 0.05:.1f} deviations above the median "
        "2.050 of the steps before it"
    )
    assert typed == command("inspect", run, "--step", "121")
    assert shlex.split(typed)[-4:] == ["inspect", str(run), "--step", "121"]


def test_a_report_is_one_harmless_line_whatever_the_run_is_called(tmp_path):
    run, reports = tmp_path / "a\nb\x1b[31m\u202e", []
    write_log(run, [training(step, 2.0) for step in range(1, 51)])
    SpikeWatch(run, reports.append, from_step=50).write(training(51, 9.0))
    assert reports[0].isprintable()
