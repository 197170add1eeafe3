"""The page of an inspection: the windows of a step, each token coloured by its loss."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from truestep.observe.inspection import (
    InspectedWindow,
    Inspection,
    WorstToken,
    format_probability,
    glyph_at,
    worst_first,
    worst_tokens,
)
from truestep.observe.markup import block, facts_list, line, write_page

MAX_TOKENS = 32_768  # about 3 MB of page
_MAX_BARS = 512
_MAX_WORST = 12
_CONTEXT = 40  # tokens on either side of a worst one
_SHORT_LINE = 12  # characters; where lines are shorter, they stand one behind the other
_NOTHING = "<i>∅</i>"

# Nats at which the next colour begins: about even steps for the eye, from "expected" (p > 0.6) to
# "never seen" (p < 1 in 20,000).
_EDGES = (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)
# From the paper's colour to the strongest; each with the colour of the text on it.
LIGHT = (
    ("transparent", "#1b2430"), ("#ffecb8", "#1b2430"), ("#ffd98c", "#1b2430"),
    ("#ffbf5e", "#1b2430"), ("#fb9b45", "#1b2430"), ("#ee7040", "#1b2430"),
    ("#c9302c", "#ffffff"), ("#7d0f35", "#ffffff"),
)  # fmt: skip
DARK = (
    ("transparent", "#e4e8ee"), ("#38301f", "#e4e8ee"), ("#54411c", "#e4e8ee"),
    ("#765014", "#ffffff"), ("#9c5a0c", "#ffffff"), ("#dd7c22", "#14181e"),
    ("#ffb04f", "#14181e"), ("#fff0b0", "#14181e"),
)  # fmt: skip


def _colours(scheme: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(
        f".c{index} {{ background: {back}; color: {ink}; }}"
        for index, (back, ink) in enumerate(scheme)
    )


_STYLE = f"""
{_colours(LIGHT)}
@media (prefers-color-scheme: dark) {{
{_colours(DARK)}
}}
.cx {{ background: #7a1fa2; color: #ffffff; }}
a {{ color: var(--blue); }}
code {{ font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
.bars {{ display: flex; align-items: flex-end; gap: 2px; height: 90px; margin-bottom: 6px; }}
.bars > * {{ flex: 1 1 0; min-width: 1px; max-width: 28px; min-height: 2px; }}
.bars a {{ background: var(--blue); }}
.bars a:hover {{ background: var(--orange); }}
.bars span {{ background: var(--faint); opacity: 0.45; }}
.scroll {{ overflow-x: auto; }}
.scroll th, .scroll td {{ white-space: nowrap; }}
.scroll .text {{ white-space: normal; min-width: 220px; }}
.scroll code {{ display: block; min-width: 240px; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.legend {{
  position: sticky; top: 0; z-index: 1; display: flex; gap: 12px; padding: 10px 0;
  background: var(--paper); font-size: 12px; color: var(--faint);
}}
.legend > :last-child {{ display: flex; flex: 1; min-width: 0; }}
.legend span {{ flex: 1 1 0; padding: 0 4px; overflow: hidden; white-space: nowrap; }}
.legend .c0 {{ background: var(--card); }}
section {{ margin-top: 28px; scroll-margin-top: 64px; }}
section h3 {{ font-size: 16px; margin: 0; }}
section pre {{ max-height: none; }}
.short i {{ white-space: normal; }}
section ul {{ list-style: none; margin: 0 0 8px; padding: 0; overflow-wrap: anywhere; }}
small {{ color: var(--faint); font-size: 13px; font-variant-numeric: tabular-nums; }}
section pre, .scroll code {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
pre span {{ border-radius: 2px; scroll-margin-top: 120px; }}
pre span:target {{ outline: 2px solid var(--blue); outline-offset: 2px; }}
pre b {{ display: block; margin-top: 6px; color: var(--faint); }}
i {{ font-style: normal; opacity: 0.5; }}
.context {{ color: var(--faint); }}
@media (max-width: 640px) {{
  .scroll table, .scroll tbody {{ display: block; }}
  .scroll tr {{
    display: grid; grid-template-columns: 5em 1fr; padding: 6px 0;
    border-top: 1px solid var(--line);
  }}
  .scroll th, .scroll td {{ padding: 0 12px 0 0; border: 0; min-width: 0; text-align: left; }}
  .scroll td:nth-child(n + 3) {{ grid-column: 1 / -1; padding-right: 0; }}
  .scroll th:nth-child(n + 3) {{ display: none; }}
  .legend > :last-child {{ flex-wrap: wrap; }}
  .legend span {{ flex-basis: 20%; }}
  section {{ scroll-margin-top: 104px; }}
}}
@media print {{ * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}
"""


def write_inspection_page(inspection: Inspection, path: Path) -> Path:
    """Write an inspection as one page that needs nothing else; it appears whole or not at all.

    The windows stand worst first, up to MAX_TOKENS tokens in all; it says what is left out.
    """
    windows = worst_first(inspection.windows)
    shown = windows[: _how_many_fit(windows)]
    worst = worst_tokens(inspection, _MAX_WORST)
    marked = {_anchor(token) for token in worst}
    sections = [
        _head(inspection),
        _bars(windows, len(shown), inspection),
        _worst_table(worst, shown),
        f'<h2>Windows <span class="note">worst first{_left_out(windows, len(shown))}</span></h2>',
        _legend(inspection.num_not_finite),
        *(_window(window, marked) for window in shown),
    ]
    title = f"step {inspection.step} · {line(inspection.run)}"
    return write_page(path, title, _STYLE, sections)


def _how_many_fit(windows: list[InspectedWindow]) -> int:
    """Return how many of the windows have room on a page; the first one always has."""
    ends = list(accumulate(len(window.losses) for window in windows))
    return max(bisect_right(ends, MAX_TOKENS), 1)


def _head(inspection: Inspection) -> str:
    facts = [("loss", f"{inspection.loss:.4f}")]
    if inspection.logged_loss is not None:
        facts.append(("logged loss", f"{inspection.logged_loss:.4f}"))
    if inspection.learning_rate is not None:
        facts.append(("learning rate", f"{inspection.learning_rate:.1e}"))
    if inspection.grad_norm is not None:
        facts.append(("gradient norm", f"{inspection.grad_norm:.2f}"))
    facts += [
        ("windows", f"{len(inspection.windows):,}"),
        ("tokens trained on", f"{inspection.num_targets:,}"),
    ]
    return (
        f"<h1>Step {inspection.step:,} of {line(inspection.run)}</h1>"
        '<p class="subtitle">the text it was trained on and the loss of every token, in nats · '
        f"an inspection by truestep</p>{facts_list(facts)}"
    )


def _bars(windows: list[InspectedWindow], num_shown: int, inspection: Inspection) -> str:
    """Return the mean loss of each window as a bar that leads to it: whether one stands out.

    A mean that is not finite has none.
    """
    finite = [(i, w) for i, w in enumerate(windows) if math.isfinite(w.mean_loss)]
    bars, notes = [], []
    top = finite[0][1].mean_loss if finite else 0.0
    for index, window in finite[:_MAX_BARS]:
        height = 100 * window.mean_loss / top if top else 100
        label = (
            f'style="height:{height:.0f}%" title="row {window.row}: {window.mean_loss:.3f} nats"'
        )
        is_shown = index < num_shown
        bars.append(
            f'<a href="#w{window.row}" {label}></a>' if is_shown else f"<span {label}></span>"
        )
    if finite:
        notes.append(f"{top:.3f} to {finite[-1][1].mean_loss:.3f} nats")
    if broken := inspection.num_not_finite:
        notes.append(f"losses that are not finite: {broken:,} of {inspection.num_targets:,}")
    more = f", the worst {_MAX_BARS:,} of {len(finite):,}" if len(finite) > _MAX_BARS else ""
    return (
        f'<h2>Mean loss of each window <span class="note">worst first{more}</span></h2>'
        + (f'<div class="bars">{"".join(bars)}</div>' if bars else "")
        + f'<div class="note">{" · ".join(notes)}</div>'
    )


def _worst_table(worst: list[WorstToken], shown: list[InspectedWindow]) -> str:
    rows = "".join(_worst_row(token, token.window in shown) for token in worst)
    return (
        '<h2>Worst tokens</h2><div class="scroll"><table><tr><th class="number">loss</th>'
        '<th class="number">probability</th><th>token</th><th>document</th></tr>'
        f"{rows}</table></div>"
    )


def _worst_row(worst: WorstToken, is_shown: bool) -> str:
    window, token, loss = worst
    start, stop = glyph_at(window, token)
    before = _flat(_text(window, max(start - _CONTEXT, 0), start))
    after = _flat(_text(window, stop, min(stop + _CONTEXT, window.stop)))
    mark = f'<span class="{_colour(loss)}">{_flat(_text(window, start, stop)) or _NOTHING}</span>'
    name, position = window.document_at(token)
    place = f"{line(name)}, token {position:,}"
    if is_shown and token <= MAX_TOKENS:
        place = f'<a href="#{_anchor(worst)}">{place}</a>'
    return (
        f'<tr><td class="number">{loss:.3f}</td>'
        f'<td class="number">{format_probability(loss)}</td>'
        f"<td><code>{before}{mark}{after}</code></td>"
        f'<td class="text">{place}</td></tr>'
    )


def _left_out(windows: list[InspectedWindow], num_shown: int) -> str:
    if num_shown == len(windows):
        return ""
    most = windows[num_shown].mean_loss
    rest = f", the others have a mean loss of {most:.3f} or less" if math.isfinite(most) else ""
    return f"; {num_shown:,} of {len(windows):,}{rest}"


def _legend(num_not_finite: int) -> str:
    """Return the colours, each with the loss and the probability at which it begins."""
    colours = "".join(
        f'<span class="c{index}">{edge:g}<br>{format_probability(edge)}</span>'
        for index, edge in enumerate((0.0, *_EDGES))
    )
    if num_not_finite:
        colours += '<span class="cx">not<br>finite</span>'
    return f'<div class="legend"><div>nats from<br>probability</div><div>{colours}</div></div>'


def _window(window: InspectedWindow, marked: set[str]) -> str:
    documents = "".join(
        f"<li>{line(document.name)} <small>"
        + (f"from token {document.position:,}" if document.position else "from its beginning")
        + ("" if loss is None else f" · {loss:.3f} nats")
        + "</small></li>"
        for document, loss in window.document_losses()
    )
    total = len(window.losses)
    shown = "".join(window.pieces[: window.stop])
    kind = ' class="short"' if len(shown) < _SHORT_LINE * shown.count("\n") else ""
    source = "the text" if window.source is None else line(window.source)
    cut = f", the first {MAX_TOKENS:,} of its {total:,} tokens" if total > MAX_TOKENS else ""
    return (
        f'<section id="w{window.row}"><h3>{window.mean_loss:.3f} nats <span class="note">row '
        f"{window.row}, window {window.window:,} of {source}{cut}</span></h3>"
        f"<ul>{documents}</ul>"
        f"<pre{kind}>{''.join(_tokens(window, marked))}</pre></section>"
    )


def _tokens(window: InspectedWindow, marked: set[str]) -> Iterator[str]:
    """Yield the tokens up to the last target, with the names of the documents that begin."""
    begins = {document.offset: document.name for document in window.documents if document.offset}
    token, end = 0, min(window.stop, MAX_TOKENS + 1)
    while token < end:
        if token in begins:
            yield f"<b>{line(begins[token])}</b>"
        stop = glyph_at(window, token)[1]
        yield _span(window, token, stop, marked)
        token = stop


def _span(window: InspectedWindow, start: int, stop: int, marked: set[str]) -> str:
    """Return what some tokens show, in the colour of the worst of them."""
    part = slice(max(start - 1, 0), stop - 1)  # the loss of token t stands at t - 1
    losses = window.losses[part][window.is_target[part]].tolist()
    text = _text(window, start, stop) or _NOTHING
    if not losses:
        return f'<span class="context">{text}</span>'
    anchor = f"t{window.row}-{start}"
    name = f' id="{anchor}"' if anchor in marked else ""
    terms = " + ".join(f"{loss:.2f}" for loss in losses)
    title = f"{terms} nats, p {format_probability(sum(losses))}"
    worst = next((loss for loss in losses if math.isnan(loss)), max(losses))
    return f'<span{name} class="{_colour(worst)}" title="{title}">{text}</span>'


def _anchor(worst: WorstToken) -> str:
    return f"t{worst.window.row}-{glyph_at(worst.window, worst.token)[0]}"


def _colour(loss: float) -> str:
    return f"c{bisect_right(_EDGES, loss)}" if math.isfinite(loss) else "cx"


def _text(window: InspectedWindow, start: int, stop: int) -> str:
    """Return as HTML what some tokens show, with a mark at each newline and tab."""
    return "".join(
        "<i>end of document\n</i>"
        if token in window.ends
        else block(window.pieces[token]).replace("\n", "<i>↵\n</i>").replace("\t", "<i>→</i>\t")
        for token in range(start, stop)
    )


def _flat(html: str) -> str:
    return html.replace("\n", "").replace("\t", "")
