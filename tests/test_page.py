"""The report: one file, no script, no address, and nothing from a run's files is obeyed."""

import json
import re
import resource

import pytest
from pages import HOSTILE, Page, assert_inert
from records import training

from truestep.observe.page import write_report


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "stdlib-1"
    run.mkdir()
    check = {"step": 40, "validation_loss": 1.25, "validation_bits_per_byte": 1.8034}
    write_lines(run / "metrics.jsonl", [*(training(step) for step in range(1, 41)), check])
    write_lines(
        run / "samples.jsonl",
        [{"step": step, "prompt": "def ", "text": f"f{step}():\n\tpass"} for step in (20, 40)],
    )
    (run / "config.toml").write_text('[training]\nlearning_rate = 0.0003\n[data]\nsource = "x"\n')
    (run / "manifest.json").write_text(
        json.dumps({"torch": "2.13.0", "num_parameters": 872448, "data": {"num_tokens": 12345}})
    )
    return run


def report(run):
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_says_the_numbers(run):
    page = Page(report(run))
    facts = re.split(r"\n+", page.text)
    for name, value in {
        "training loss": "2.5000",
        "validation loss": "1.2500",
        "bits per byte": "1.8034",
        "steps": "40",
        "tokens": "40,000",
        "training time": "0:10",
        "tokens per second": "4,000",
        "parameters": "872,448",
        "learning_rate": "0.0003",
        "data.num_tokens": "12,345",
    }.items():
        assert facts[facts.index(name) + 1] == value
    assert page.mark == ["def ", "def "]
    assert page.pre == ["def f40():\n\tpass", "def f20():\n\tpass"]
    assert page.tags.count("svg") == 5  # loss for wide and for narrow screens


def test_the_page_needs_nothing_else_and_runs_nothing(run):
    assert_inert(report(run))


def test_hostile_names_and_texts_do_nothing(tmp_path):
    run = tmp_path / "<b>run<b> & \x1b[31m\u202e"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [training(1)])
    write_lines(run / "samples.jsonl", [{"step": 1, "prompt": HOSTILE, "text": HOSTILE}])
    key = json.dumps(HOSTILE)
    (run / "config.toml").write_text(f"[{key}]\n{key} = {key}\n", encoding="utf-8")
    values = {HOSTILE: {HOSTILE: HOSTILE, "list": [HOSTILE, None]}, "device": HOSTILE}
    (run / "manifest.json").write_text(json.dumps(values))
    text = report(run)
    page = Page(text)
    assert not {"script", "img", "b"} & set(page.tags)
    assert not {"\x1b", "\u202e"} & set(text)
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert page.pre == [shown * 2]
    assert page.mark == [shown]
    assert page.text.count(shown) >= 8


def test_loss_spikes_are_listed_with_the_command_that_shows_their_text(run):
    losses = [2.0, 2.1] * 200
    losses[100], losses[300] = 5.25, 7.5
    write_lines(run / "metrics.jsonl", [training(i, x) for i, x in enumerate(losses, start=1)])
    page = Page(report(run))
    words = re.split(r"\n+", page.text)
    assert words[words.index("loss spikes") + 1] == "2"
    first = words.index("101")
    assert words[first : first + 3] == ["101", "5.250", "2.050"]
    command = f"truestep inspect {run} --step"
    assert [word for word in words if word.startswith("truestep inspect")] == [
        f"{command} 101",
        f"{command} 301",
    ]


def test_a_run_without_spikes_does_not_speak_of_them(run):
    assert "spike" not in Page(report(run)).text


def test_many_spikes_are_thinned_openly_and_the_highest_stay(run):
    losses = [2.0, 2.1] * 500
    places = range(100, 1000, 30)
    for height, place in enumerate(places):
        losses[place] = 10.0 + height
    write_lines(run / "metrics.jsonl", [training(i, x) for i, x in enumerate(losses, start=1)])
    text = Page(report(run)).text
    assert "the 20 highest of 30" in text
    shown = [place for place in places if f"--step {place + 1}\n" in text]
    assert shown == list(places)[10:]


@pytest.mark.parametrize("missing", ["samples.jsonl", "config.toml", "manifest.json"])
def test_a_missing_piece_is_left_out(run, missing):
    (run / missing).unlink()
    page = Page(report(run))
    heading = {
        "samples.jsonl": "Samples",
        "config.toml": "Configuration",
        "manifest.json": "Facts",
    }
    for name, title in heading.items():
        assert (title in page.text) == (name != missing)


def test_a_run_without_validation_has_no_validation_numbers(run):
    write_lines(run / "metrics.jsonl", [training(1), training(2, "nan", skipped=True)])
    text = Page(report(run)).text
    assert "validation loss" not in text
    assert "bits per byte" not in text
    assert "skipped updates" in text


def test_many_samples_are_thinned_openly_and_the_first_and_last_stay(run):
    records = [{"step": step, "prompt": "", "text": f"<{step}>"} for step in range(1, 101)]
    write_lines(run / "samples.jsonl", records)
    page = Page(report(run))
    assert len(page.pre) == 12
    assert (page.pre[0], page.pre[-1]) == ("<100>", "<1>")
    assert "12 of 100" in page.text


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_a_run_without_steps_is_refused_in_one_line(run, content):
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*holds no (steps yet|metrics\.jsonl); [^\n]+$"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_manifest_is_named_in_one_line(run, content):
    (run / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*manifest\.json is [^\n]+ remove it$"):
        write_report(run)


def test_losses_that_are_not_finite_are_said_as_they_are(run):
    check = {"step": 1, "validation_loss": "inf"}
    write_lines(run / "metrics.jsonl", [training(1, "nan"), check])
    text = Page(report(run)).text
    assert "\nnan\n" in text
    assert "\ninf\n" in text


def test_a_second_report_replaces_the_first_whole(run):
    report(run)
    write_lines(run / "metrics.jsonl", [training(step) for step in range(1, 8)])
    assert "\n7\n" in Page(report(run)).text
    assert not [path for path in run.iterdir() if path.name.startswith(".tmp-")]


def test_a_full_disk_leaves_the_old_report(run):
    old = report(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="File too large"):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (run / "report.html").read_text(encoding="utf-8") == old
