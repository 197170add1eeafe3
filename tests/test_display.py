"""The live view: its numbers count training alone, and no text in it is obeyed."""

import contextlib
import io
import math
import os
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from truestep.observe.display import LiveDisplay, Pace, PlainDisplay, open_display
from truestep.observe.text import count, format_duration, printable, printable_line

HOSTILE = "\x1b[31mred\x1b[0m \x9b2J \u202eevil\u2066 \x00\x07\r [red]mark[/red] :smile: \u2028"


def training(step, seconds=0.5, tokens=1000, **changes):
    record = {
        "step": step,
        "loss": 2.5,
        "grad_norm": 0.5,
        "learning_rate": 3e-4,
        "num_tokens": tokens,
        "step_seconds": seconds,
        "skipped": False,
        "tokens_per_second": tokens / seconds,
    }
    return record | changes


VALIDATION = {"step": 4, "validation_loss": 1.25, "validation_bits_per_byte": 1.8034}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def live():
    """A live display on a pretended terminal of 80 columns, with its clock and output."""
    displays = []

    def open_live(num_steps=100, width=80, **speed):
        stream, clock = io.StringIO(), Clock()
        console = Console(file=stream, force_terminal=True, width=width, color_system=None)
        displays.append(LiveDisplay(Pace(num_steps, **speed), console, clock))
        return displays[-1], clock, stream

    yield open_live
    for display in displays:
        display.close()


def visible(stream):
    """Return what a terminal shows, without its cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def panel(stream):
    """Return the numbers of the last drawn panel by name."""
    names, values = [line for line in visible(stream).splitlines() if line.strip()][-2:]
    return dict(
        zip(re.split(r" {3,}", names.strip()), re.split(r" {2,}", values.strip()), strict=True)
    )


def test_speed_and_time_left_count_neither_evaluation_nor_compiling_nor_an_earlier_session(live):
    display, clock, stream = live(num_steps=100)
    display.write(training(41, seconds=60.0))  # resumed at 40; the first step compiles
    for step in range(42, 51):
        clock.now += 0.5
        display.write(training(step, seconds=0.5, tokens=1000))
        clock.now += 300.0  # an evaluation
        display.write(VALIDATION | {"step": step})
    display.close()
    shown = panel(stream)
    assert shown["tokens/s"] == "2,000"
    assert shown["left"] == "0:25"  # 50 steps of half a second
    assert shown["elapsed"] == "45:04"  # the clock on the wall


def test_time_left_follows_a_change_of_speed():
    pace = Pace(1000)
    for step in range(1, 101):
        pace.add(training(step, seconds=1.0))
    for step in range(101, 201):
        pace.add(training(step, seconds=3.0))
    assert pace.seconds_left == pytest.approx(800 * 3.0)


def test_utilization_is_the_arithmetic_done_over_the_arithmetic_possible(live):
    display, _, stream = live(flops_per_token=3e6, peak_flops_per_second=1e10)
    for step in range(1, 4):
        display.write(training(step, seconds=0.5, tokens=1000))
    display.close()
    assert panel(stream)["MFU"] == "60%"  # 2000 tokens/s × 3e6 / 1e10


@pytest.mark.parametrize("known", [{"flops_per_token": 1e6}, {"peak_flops_per_second": 1e9}, {}])
def test_utilization_is_left_out_where_it_is_not_known(live, known):
    display, _, stream = live(**known)
    display.write(training(1))
    display.write(training(2))
    display.close()
    assert "MFU" not in visible(stream)


def test_the_panel_shows_the_mean_of_the_last_losses_and_the_last_validation(live):
    display, _, stream = live()
    for step in range(1, 31):
        display.write(training(step, loss=float(step)))
    display.write(VALIDATION)
    display.close()
    shown = panel(stream)
    assert shown["loss (20 steps)"] == "20.5000"  # 11 … 30
    assert (shown["validation"], shown["bits/byte"]) == ("1.2500", "1.8034")


def test_validations_and_skipped_updates_leave_a_line(live):
    display, _, stream = live()
    display.write(training(3, loss=math.nan, skipped=True))
    display.write(VALIDATION)
    assert "step 3  loss nan" in visible(stream)
    assert "step 4  validation loss 1.2500" in visible(stream)


def test_redraws_follow_the_clock_and_not_the_steps(live):
    display, clock, stream = live(num_steps=10_000)
    before = len(stream.getvalue())
    for step in range(1, 1001):
        display.write(training(step))
    assert len(stream.getvalue()) == before
    clock.now += 1.0
    display.write(training(1001))
    assert "step 1,001 of 10,000" in visible(stream)


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_no_line_is_wider_than_the_terminal(live, width):
    display, _, stream = live(width=width, flops_per_token=3e6, peak_flops_per_second=1e10)
    display.sample(1, "def ", "word " * 50 + "x" * 300)
    for step in range(1, 4):
        display.write(training(step))
    display.close()
    assert max(map(len, visible(stream).splitlines())) <= width
    assert "60%" in visible(stream)


def test_closing_twice_is_harmless_and_shows_the_cursor_again(live):
    display, _, stream = live()
    display.close()
    end = stream.getvalue()
    display.close()
    assert stream.getvalue() == end
    assert end.rindex("\x1b[?25h") > end.rindex("\x1b[?25l")


def test_samples_and_messages_are_shown_and_never_obeyed(live):
    display, _, stream = live(width=200)
    display.sample(5, "\x1b]0;title\x07", HOSTILE)
    display.say(HOSTILE)
    display.close()
    output = stream.getvalue()
    assert output.count("[red]mark[/red] :smile:") == 2
    assert output.count(r"\x1b[31mred\x1b[0m \x9b2J \u202eevil\u2066 \x00\x07\r ") == 2
    assert r"\x1b]0;title\x07" in output
    assert not {"\x07", "\x00", "\x9b", "\u202e", "\u2066", "\u2028"} & set(output)
    assert "\x1b[31m" not in output


def test_a_pipe_gets_plain_lines_without_control_characters(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many build services do
    stream = io.StringIO()
    display = open_display(30, every=10, stream=stream)
    assert isinstance(display, PlainDisplay)
    for step in range(1, 31):
        display.write(training(step))
    display.write(VALIDATION)
    display.sample(30, HOSTILE, HOSTILE)
    display.say(HOSTILE)
    display.close()
    lines = stream.getvalue().split("\n")
    assert not [c for c in "".join(lines) if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}]
    assert [line.split()[1] for line in lines[:5]] == ["1", "10", "20", "30", "4"]
    assert lines[1].startswith("step 10  loss 2.5000  grad norm 0.50  lr 3.0e-04  2,000 tokens/s")
    assert lines[1].endswith("33%  0:10 left")
    assert lines[3].endswith("100%")


def test_plain_lines_can_be_written_in_any_encoding():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    open_display(10, stream=stream).sample(1, "é", "漢 \ud800")
    assert rb"\xe9\u6f22 \ud800" in raw.getvalue()


def all_sent_to(controller: int) -> str:
    """What a closed terminal was sent: the device hands it over in as many pieces as it likes."""
    pieces = []
    with contextlib.suppress(OSError):  # how Linux says that there is no more
        while piece := os.read(controller, 65_536):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_terminal_gets_the_live_view_and_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    outputs = []
    for color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", color)
        controller, terminal = os.openpty()
        with open(terminal, "w") as stream:
            display = open_display(10, stream=stream)
            assert isinstance(display, LiveDisplay)
            display.write(training(1))
            display.close()
        outputs.append(all_sent_to(controller))
        os.close(controller)
    colors = [set(re.findall(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;[\d;]+)m", o)) for o in outputs]
    assert colors[0]
    assert not colors[1]


@given(st.text(st.characters(codec=None, categories=None)))
def test_printable_text_holds_nothing_a_terminal_obeys(text):
    shown = printable(text)
    kept = {"\u200c", "\u200d", "\n", "\t"}
    assert not [
        c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        and c not in kept
    ]  # fmt: skip
    assert len(printable_line(text).splitlines()) <= 1
    if text.isascii() and text.isprintable():
        assert shown == text


def test_one_of_a_thing_has_no_plural():
    counts = [count(number, "file") for number in (0, 1, 2, 1234)]
    assert counts == ["0 files", "1 file", "2 files", "1,234 files"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (3725, "1:02:05"),
        (93784, "1d 02:03:04"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text
