"""What was trained at one step, by its loss: the values, their ranking, and a text for a terminal.

`inspection_page` shows the same as a page.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from truestep.observe.text import count, printable_line

COLUMNS = 100  # a line of text is no wider
_MAX_DOCUMENTS = 4  # of one window, in the text
_INDENT = 10
_END = "<end>"


@dataclass(frozen=True)
class InspectedDocument:
    """A document that a window holds a part of, up to the next one or the end of the window.

    Its part begins at token `offset` of the window, which is token `position` of the document: 0
    if the document begins there.
    """

    name: str
    offset: int
    position: int


@dataclass(frozen=True, eq=False)
class InspectedWindow:
    """One row of a step's global batch.

    `window` is its number in the split, that of `source` where there are several. `pieces` is the
    text that each of its T + 1 tokens adds; the loss at t, in nats, is that of token t + 1, if this
    is a target: padding is not. `ends` are the tokens, 0 to T, that end a document.
    """

    row: int
    window: int
    documents: tuple[InspectedDocument, ...]
    pieces: tuple[str, ...]
    losses: Float[np.ndarray, "T"]
    is_target: Bool[np.ndarray, "T"]
    ends: frozenset[int] = frozenset()
    source: str | None = None

    @property
    def mean_loss(self) -> float:
        """The mean over the targets, NaN if there are none."""
        return _mean(self.losses[self.is_target])

    @property
    def stop(self) -> int:
        """The end of the text among the tokens; what follows is padding."""
        targets = np.flatnonzero(self.is_target)
        return int(targets[-1]) + 2 if targets.size else 0

    def document_losses(self) -> list[tuple[InspectedDocument, float | None]]:
        """Return each document and the mean loss of its tokens here, None if none is a target."""
        bounds = [*(document.offset for document in self.documents), len(self.pieces)]
        means = []
        for start, stop in pairwise(bounds):
            part = slice(max(start - 1, 0), stop - 1)  # the loss of token t stands at t - 1
            losses = self.losses[part][self.is_target[part]]
            means.append(_mean(losses) if losses.size else None)
        return list(zip(self.documents, means, strict=True))

    def document_at(self, token: int) -> tuple[str, int]:
        """Return the name of the document that a token belongs to, and its position there."""
        document = [one for one in self.documents if one.offset <= token][-1]
        return document.name, document.position + token - document.offset


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a run was trained on at one step, and what the model then made of it.

    `loss` is the mean over all targets as it was recomputed; the others are those of the log, None
    where it does not say.
    """

    run: str
    step: int
    loss: float
    logged_loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    windows: tuple[InspectedWindow, ...]

    @property
    def num_targets(self) -> int:
        """How many tokens were trained on."""
        return sum(int(window.is_target.sum()) for window in self.windows)

    @property
    def num_not_finite(self) -> int:
        """How many of them have a loss that is not finite."""
        losses = (window.losses[window.is_target] for window in self.windows)
        return sum(int(np.count_nonzero(~np.isfinite(part))) for part in losses)


class WorstToken(NamedTuple):
    """A target that was hard to predict; `token` is its index in the pieces of its window."""

    window: InspectedWindow
    token: int
    loss: float


def worst_first(windows: Iterable[InspectedWindow]) -> list[InspectedWindow]:
    """Return windows by mean loss, the highest first; what is not a number is worse than any."""

    def badness(window: InspectedWindow) -> float:
        return _badness(window.mean_loss if window.is_target.any() else None)

    return sorted(windows, key=badness, reverse=True)


def worst_tokens(inspection: Inspection, count: int) -> list[WorstToken]:
    """Return the `count` targets of the highest loss, the highest first."""
    worst = []
    for window in inspection.windows:
        badness = np.where(np.isnan(window.losses), np.inf, window.losses)
        badness = np.where(window.is_target, badness, -np.inf)
        places = np.argsort(-badness, kind="stable")[:count]
        worst += [
            (badness[place], WorstToken(window, int(place) + 1, float(window.losses[place])))
            for place in places
            if window.is_target[place]
        ]
    worst.sort(key=lambda pair: -pair[0])  # stable: the first of equals stays first
    return [token for _, token in worst[:count]]


def glyph_at(window: InspectedWindow, token: int) -> tuple[int, int]:
    """Return the bounds of the tokens that show one piece of text together with `token`.

    A character of several tokens stands at its last one; an end of a document stands alone.
    """

    def is_silent(token: int) -> bool:
        return not window.pieces[token] and token not in window.ends

    start, last = token, token
    while start > 0 and is_silent(start - 1):
        start -= 1
    while last + 1 < len(window.pieces) and is_silent(last):
        last += 1
    return start, last + 1


def format_probability(loss: float) -> str:
    """Return the probability that the model gave to a token, from its loss in nats."""
    return f"{math.exp(-max(loss, 0.0)):.2g}"


def format_inspection(inspection: Inspection, *, max_windows: int = 5, max_tokens: int = 8) -> str:
    """Return the worst windows with their documents, and the worst tokens in their context.

    No line is wider than COLUMNS, and nothing in it is obeyed by a terminal.
    """
    windows = worst_first(inspection.windows)
    tokens = worst_tokens(inspection, max_tokens)
    lines = [*_header(inspection), "", _heading("windows by mean loss", max_windows, len(windows))]
    for window in windows[:max_windows]:
        lines += _window_lines(window)
    lines += ["", _heading("tokens", max_tokens, inspection.num_targets)]
    for token in tokens:
        lines += _token_lines(token)
    return "\n".join(lines)


def _header(inspection: Inspection) -> Iterator[str]:
    numbers = [f"loss {inspection.loss:.4f}"]
    if inspection.logged_loss is not None:
        numbers.append(f"logged {inspection.logged_loss:.4f}")
    if inspection.learning_rate is not None:
        numbers.append(f"learning rate {inspection.learning_rate:.1e}")
    if inspection.grad_norm is not None:
        numbers.append(f"grad norm {inspection.grad_norm:.2f}")
    text = f"step {inspection.step} of "
    yield text + _fit_end(printable_line(inspection.run), COLUMNS - len(text))
    yield ", ".join(numbers)
    windows = count(len(inspection.windows), "window")
    tokens = count(inspection.num_targets, "token")
    yield f"{windows}, {tokens} trained on; losses are in nats per token"


def _heading(what: str, shown: int, total: int) -> str:
    return f"{what}, worst first" + (f" ({shown:,} of {total:,})" if shown < total else "")


def _window_lines(window: InspectedWindow) -> Iterator[str]:
    source = "" if window.source is None else f" of {printable_line(window.source)}"
    text = f"{window.mean_loss:8.3f}  row {window.row}, window {window.window:,}{source}"
    yield _fit_start(text, COLUMNS)
    documents = window.document_losses()
    if (more := len(documents) - _MAX_DOCUMENTS) > 0:
        documents.sort(key=lambda pair: _badness(pair[1]), reverse=True)
    for document, loss in documents[:_MAX_DOCUMENTS]:
        number = "" if loss is None else f"{loss:.3f}"
        place = f" from token {document.position:,}" if document.position else " from its beginning"
        name = _fit_end(printable_line(document.name), COLUMNS - 2 * _INDENT - len(place))
        yield f"{'':{_INDENT}}{number:>8}  {name}{place}"
    if more > 0:
        yield f"{'':{2 * _INDENT}}and {count(more, 'more document')} with lower losses"


def _token_lines(worst: WorstToken) -> Iterator[str]:
    """Yield what is known of a token, and the line around it with the token underlined."""
    window, token, loss = worst
    name, position = window.document_at(token)
    left = f"{loss:8.3f}  p {format_probability(loss):7}  row {window.row}, token {token:,}  "
    right = f", token {position:,}"
    name = _fit_end(printable_line(name), COLUMNS - len(left) - len(right))
    yield f"{left}{name}{right}"
    start, stop = glyph_at(window, token)
    before, middle, after = _whole_graphemes(
        _shown(window, max(start - COLUMNS, 0), start).lstrip("\u200d"),  # joins nothing
        _shown(window, start, stop),
        _shown(window, stop, stop + COLUMNS),
    )
    middle = _fit_start(middle, 30)
    room = (COLUMNS - _INDENT - _columns(middle)) // 2
    before, after = _fit_end(before, room, ""), _fit_start(after, room, "")
    yield f"{'':{_INDENT}}{before}{middle}{after}"
    yield f"{'':{_INDENT}}{'':{_columns(before)}}{'^' * max(_columns(middle), 1)}"


def _shown(window: InspectedWindow, start: int, stop: int) -> str:
    """Return the text of some tokens as one harmless line."""
    return "".join(
        _END if token in window.ends else printable_line(window.pieces[token])
        for token in range(start, min(stop, window.stop))
    )


def _whole_graphemes(before: str, middle: str, after: str) -> tuple[str, str, str]:
    """Move the bounds of `middle` outward, so that joined emoji and accents are not divided."""
    text, start, stop = before + middle + after, len(before), len(before) + len(middle)
    for first, end, _ in _graphemes(text):
        if first < start < end:
            start = first
        if first < stop < end:
            stop = end
    return text[:start], text[start:stop], text[stop:]


def _mean(losses: Float[np.ndarray, "N"]) -> float:
    return float(losses.mean(dtype=np.float64)) if losses.size else math.nan


def _badness(loss: float | None) -> float:
    """Return the rank of a loss: not a number is worse than any, none is better than any."""
    if loss is None:
        return -math.inf
    return math.inf if math.isnan(loss) else loss


def _fit_end(text: str, columns: int, mark: str = "...") -> str:
    """Return a text that has room in some columns, without its beginning if need be."""
    if _columns(text) <= columns:
        return text
    room, cut = columns - _columns(mark), len(text)
    for start, _, width in reversed(_graphemes(text)):
        room -= width
        if room < 0:
            break
        cut = start
    return mark + text[cut:]


def _fit_start(text: str, columns: int, mark: str = "...") -> str:
    """Return a text that has room in some columns, without its end if need be."""
    if _columns(text) <= columns:
        return text
    room, cut = columns - _columns(mark), 0
    for _, stop, width in _graphemes(text):
        room -= width
        if room < 0:
            break
        cut = stop
    return text[:cut] + mark


def _graphemes(text: str) -> list[tuple[int, int, int]]:
    """Return the bounds and the columns of all that is drawn as one: a letter, joined emoji."""
    from rich.cells import split_graphemes

    return split_graphemes(text)[0]


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for a wide character."""
    from rich.cells import cell_len

    return cell_len(text)
