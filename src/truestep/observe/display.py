"""The live view of a run: a calm panel on a terminal, plain lines everywhere else."""

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from truestep.metrics import model_flops_utilization
from truestep.observe.sinks import format_record, is_notable, print_line
from truestep.observe.text import encodable, format_duration, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

REDRAW_SECONDS = 0.25
_LOSS_STEPS = 20  # the loss on the panel is the mean of these
_PACE_STEPS = 50  # tokens per second and time left look back this far
_GAP = 3  # columns between the numbers of the panel


class Display(Protocol):
    """A sink that a person watches; it also shows what the model writes."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Show one record: of an update, or of a validation."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show what the model wrote after `prompt`; both may hold any characters."""

    def say(self, text: str) -> None:
        """Show a message."""

    def close(self) -> None:
        """Show the last state and give the terminal back. A second call does nothing."""


class Pace:
    """How fast training goes now; NaN until the second update.

    Evaluation and earlier sessions do not count, nor does the first update, which compiles.

    `flops_per_token` counts forward and backward; without it, or the machine's
    `peak_flops_per_second`, the utilization (MFU) is not known.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        flops_per_token: float | None = None,
        peak_flops_per_second: float | None = None,
    ) -> None:
        self.num_steps = num_steps
        self.step = 0
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second
        self._recent: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS)
        self._warm = False

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one update."""
        self.step = record["step"]
        if self._warm:
            self._recent.append((record["num_tokens"], record["step_seconds"]))
        self._warm = True  # the first step compiles: a poor guide to the others

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the recent updates over the time of these updates alone, or NaN."""
        tokens = sum(tokens for tokens, _ in self._recent)
        seconds = sum(seconds for _, seconds in self._recent)
        return tokens / seconds if seconds > 0 else math.nan

    @property
    def seconds_left(self) -> float:
        """Training time that the steps to go will take, or NaN."""
        if not self._recent:
            return math.nan
        seconds = sum(seconds for _, seconds in self._recent) / len(self._recent)
        return seconds * max(self.num_steps - self.step, 0)

    @property
    def utilization(self) -> float | None:
        """MFU in [0, 1], or None if not known."""
        if not self._flops_per_token or not self._peak:
            return None
        return model_flops_utilization(self.tokens_per_second, self._flops_per_token, self._peak)


def open_display(
    num_steps: int,
    *,
    every: int = 10,
    flops_per_token: float | None = None,
    peak_flops_per_second: float | None = None,
    stream: TextIO | None = None,
) -> Display:
    """Return a live display where `stream` (default: standard output) is a terminal, else lines.

    `every` is the number of steps between plain lines; `num_steps` is the last step of the run.
    """
    stream = sys.stdout if stream is None else stream
    pace = Pace(
        num_steps, flops_per_token=flops_per_token, peak_flops_per_second=peak_flops_per_second
    )
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveDisplay(pace, console)
    return PlainDisplay(pace, every, stream)


class PlainDisplay:
    """Lines without a control character, for files, pipes and plain terminals."""

    def __init__(self, pace: Pace, every: int, stream: TextIO) -> None:
        self._pace = pace
        self._every = every
        self._stream = stream
        self._begun = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Print the records that `ConsoleSink` prints, with progress and time left."""
        if "validation_loss" in record:
            self.say(format_record(record))
            return
        self._pace.add(record)
        step, num_steps = self._pace.step, self._pace.num_steps
        is_due = step % self._every == 0 or step == num_steps or not self._begun
        self._begun = True
        if is_due or is_notable(record):
            self.say(f"{format_record(record)}  {self._progress()}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print the sample, its lines marked."""
        lines = printable(prompt + text).split("\n")
        self.say("\n".join([f"sample at step {step}:", *(f"  | {line}" for line in lines)]))

    def say(self, text: str) -> None:
        """Print a message."""
        print_line(self._stream, printable(text))

    def close(self) -> None:
        """Do nothing: every line is out already, and the stream belongs to the caller."""

    def _progress(self) -> str:
        pace = self._pace
        parts = [f"{pace.step / pace.num_steps:.0%}"]
        if math.isfinite(pace.tokens_per_second):
            if (utilization := pace.utilization) is not None:
                parts.insert(0, f"MFU {utilization:.0%}")
            if pace.step < pace.num_steps:
                parts.append(f"{format_duration(pace.seconds_left)} left")
        return "  ".join(parts)


class LiveDisplay:
    """A panel that stays at the bottom of the terminal, while lines and samples pass above it.

    A run outlives its terminal: what can no longer be shown is dropped.
    """

    def __init__(
        self, pace: Pace, console: "Console", clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.live import Live

        self._pace = pace
        self._console = console
        self._clock = clock
        self._losses: deque[float] = deque(maxlen=_LOSS_STEPS)
        self._validation: Mapping[str, Any] = {}
        self._begun = self._drawn = clock()
        # Drawn by hand, at most every REDRAW_SECONDS: no thread competes with the step.
        self._live = Live(get_renderable=self._panel, console=console, auto_refresh=False)
        self._live.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record into the panel; validations and skipped updates also leave a line."""
        if "validation_loss" in record:
            self._validation = dict(record)
            self._note(("  ✓ ", "green"), record)
            return
        self._pace.add(record)
        self._losses.append(record["loss"])
        if record.get("skipped"):
            self._note(("  ! ", "bold yellow"), record)
        now = self._clock()
        if now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            with contextlib.suppress(OSError):
                self._live.refresh()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print the sample above the panel, its prompt in bold."""
        self._print(self._text((f"\n  sample at step {step}", "dim")))
        body = self._text((printable(prompt), "bold"), (printable(text), ""))
        for line in body.wrap(self._console, max(self._console.width - 6, 1)):
            self._print(self._text(("  │ ", "dim")).append_text(line))
        self._print(self._text())

    def say(self, text: str) -> None:
        """Print a message above the panel."""
        self._print(self._text((f"  {printable(text)}", "")))

    def close(self) -> None:
        """Draw the last state, leave it on the terminal and show the cursor again."""
        if self._live.is_started:
            with contextlib.suppress(OSError):
                self._live.refresh()
            with contextlib.suppress(OSError):
                self._live.stop()

    def _note(self, mark: tuple[str, str], record: Mapping[str, Any]) -> None:
        self._print(self._text(mark, (format_record(record), "")))

    def _print(self, text: "Text") -> None:
        with contextlib.suppress(OSError):
            self._console.print(text, soft_wrap=True)

    def _text(self, *parts: tuple[str, str]) -> "Text":
        """Join pieces, each with its style; no bracket in them is markup."""
        from rich.text import Text

        encoding = self._console.encoding
        return Text.assemble(*((encodable(text, encoding), style) for text, style in parts))

    def _panel(self) -> "RenderableType":
        from rich.console import Group
        from rich.padding import Padding

        return Padding(Group(self._bar(), self._numbers()), (1, 2, 0, 2))

    def _bar(self) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        step, num_steps = self._pace.step, self._pace.num_steps
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_row(
            f"step {step:,} of {num_steps:,}",
            ProgressBar(num_steps, step, complete_style="blue", finished_style="green"),
            f"{step / num_steps:.0%}",
        )
        return row

    def _numbers(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table

        tables = []
        for row in _flow(self._facts(), self._console.width - 4):
            table = Table.grid(*("" for _ in row), padding=(0, _GAP, 0, 0))
            table.add_row(
                *(self._text((f"{name}\n", "dim"), (value, "bold")) for name, value in row)
            )
            tables.append(table)
        return Group(*tables)

    def _facts(self) -> list[tuple[str, str]]:
        """Return each number of the panel under its name."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        loss = sum(finite) / len(finite) if finite else math.nan
        facts = [(f"loss ({_LOSS_STEPS} steps)", _number(loss, ".4f"))]
        if self._validation:
            facts.append(("validation", _number(self._validation["validation_loss"], ".4f")))
            if (bits := self._validation.get("validation_bits_per_byte")) is not None:
                facts.append(("bits/byte", _number(bits, ".4f")))
        facts.append(("tokens/s", _number(self._pace.tokens_per_second, ",.0f")))
        if (utilization := self._pace.utilization) is not None:
            facts.append(("MFU", _number(utilization, ".0%")))
        facts.append(("elapsed", format_duration(self._clock() - self._begun)))
        facts.append(("left", format_duration(self._pace.seconds_left)))
        return facts


def _flow(facts: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Return the facts in rows that fit the width."""
    rows: list[list[tuple[str, str]]] = []
    room = 0
    for fact in facts:
        needed = max(map(len, fact)) + _GAP
        if needed > room or not rows:
            rows.append([])
            room = width + _GAP  # the last gap may hang over
        room -= needed
        rows[-1].append(fact)
    return rows


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
