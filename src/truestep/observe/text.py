"""Text and numbers as a person reads them, with nothing in them that a terminal would obey."""

import math

# Spaces and joiners that str.isprintable refuses although ordinary writing needs them.
_ORDINARY = frozenset("\u00a0\u200c\u200d\u202f\u3000")
_LAYOUT = frozenset("\n\t")


def printable(text: str) -> str:
    """Return `text` with control, bidirectional and invisible characters as backslash escapes.

    Newlines and tabs stay; `printable_line` escapes them, too.
    """
    return _escape(text, _ORDINARY | _LAYOUT)


def printable_line(text: str) -> str:
    """Return `text` as one harmless line: for names, titles and table cells."""
    return _escape(text, _ORDINARY)


def encodable(text: str, encoding: str | None) -> str:
    """Return `text` with what `encoding` (None: UTF-8) cannot write as backslash escapes."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def count(number: int, noun: str) -> str:
    """Return a number of things whose plural ends in s: `1 file`, `1,234 files`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_duration(seconds: float) -> str:
    """Return seconds as `3:05`, `1:02:03` or `2d 01:02:03`; unknown or endless ones as a dash."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_bytes(num_bytes: int) -> str:
    """Return a number of bytes in mebibytes: `1,234 MiB`, `0.5 MiB`."""
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:,.1f} MiB"


def format_tick(value: float) -> str:
    """Return the number at a mark of an axis, short: 1.5, 3e-4, 120k."""
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    if 1e4 <= abs(value) < 1e9:
        return f"{value / 1000:,.6g}k"
    return f"{value:.4g}"


def _escape(text: str, kept: frozenset[str]) -> str:
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in kept
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )
