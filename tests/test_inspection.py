"""An inspection: the worst comes first, the losses stand at their tokens, and nothing is obeyed."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import HOSTILE, Page, assert_inert
from rich.cells import cell_len

from truestep.data.tokenizer import ByteTokenizer
from truestep.observe.inspection import (
    InspectedDocument,
    InspectedWindow,
    Inspection,
    format_inspection,
    glyph_at,
    worst_first,
    worst_tokens,
)
from truestep.observe.inspection_page import DARK, LIGHT, MAX_TOKENS, write_inspection_page

MARKS = str.maketrans("", "", "↵→")


def make_window(pieces, losses=None, row=0, documents=None, *, padding=0, ends=()):
    """A window of the pieces, of which the last `padding` are none of the text."""
    count = len(pieces) - 1
    losses = np.full(count, 1.0) if losses is None else np.array(losses, dtype=np.float32)
    is_target = np.arange(count) < count - padding
    documents = documents or (InspectedDocument("a.py", 0, 0),)
    return InspectedWindow(
        row=row,
        window=100 + row,
        documents=tuple(documents),
        pieces=tuple(pieces),
        losses=np.where(is_target, losses, np.nan),
        is_target=is_target,
        ends=frozenset(ends),
    )


def make_inspection(*windows, **changes):
    values = {
        "run": "runs/stdlib-1",
        "step": 812,
        "loss": 5.25,
        "logged_loss": 5.125,
        "learning_rate": 3e-4,
        "grad_norm": 2.5,
    }
    return Inspection(windows=windows, **values | changes)


def random_windows(seed, rows=6):
    """Windows of several documents, some of them padded."""
    rng = np.random.default_rng(seed)
    windows = []
    for row in range(rows):
        count = int(rng.integers(2, 40))
        starts = sorted({0, *rng.integers(0, count, 3).tolist()})
        documents = [
            InspectedDocument(f"{row}-{start}.py", start, 0 if start else 7) for start in starts
        ]
        losses = rng.exponential(2, count - 1)
        padding = int(rng.integers(0, count - 1)) if row % 2 else 0
        pieces = rng.choice(list("abc \n"), count)
        windows.append(make_window(pieces, losses, row, documents, padding=padding))
    return windows


def targets_of(window):
    """Every (token, loss) that was trained on, by the definition of a window."""
    for index, piece in enumerate(window.pieces[1:]):
        assert isinstance(piece, str)
        if window.is_target[index]:
            yield index + 1, float(window.losses[index])


@given(st.integers(0, 2**32))
def test_windows_and_tokens_are_ranked_by_their_loss(seed):
    windows = random_windows(seed)
    means = {w.row: np.mean([loss for _, loss in targets_of(w)]) for w in windows}
    found = worst_first(windows)
    assert [w.row for w in found] == sorted(means, key=lambda row: -means[row])
    for window in found:
        assert window.mean_loss == pytest.approx(means[window.row], rel=1e-12)
    every = [(loss, w.row, token) for w in windows for token, loss in targets_of(w)]
    every.sort(key=lambda item: -item[0])
    for count in (1, 7, 10_000):
        worst = worst_tokens(make_inspection(*windows), count)
        assert [(t.loss, t.window.row, t.token) for t in worst] == every[:count]
    assert make_inspection(*windows).num_targets == len(every)


@given(st.integers(0, 2**32))
def test_a_token_counts_for_the_document_that_it_is_of(seed):
    for window in random_windows(seed):
        losses = {}
        for token, loss in targets_of(window):
            document = max(
                (d for d in window.documents if d.offset <= token), key=lambda d: d.offset
            )
            losses.setdefault(document.name, []).append(loss)
            position = document.position + token - document.offset
            assert window.document_at(token) == (document.name, position)
        for document, loss in window.document_losses():
            expected = losses.get(document.name)
            assert loss == (None if expected is None else pytest.approx(np.mean(expected)))


def test_a_loss_that_is_not_a_number_is_worse_than_any_and_no_target_better_than_any():
    high, low = make_window("abc", [9, 9], 0), make_window("abc", [1, 1], 1)
    broken, endless = make_window("abc", [1, math.nan], 2), make_window("abc", [math.inf, 1], 3)
    empty = make_window("abc", row=4, padding=2)
    ranked = worst_first([empty, low, high, broken])
    assert [window.row for window in ranked] == [2, 0, 1, 4]
    assert [window.row for window in worst_first([low, endless, high])] == [3, 0, 1]
    first, second, *_ = worst_tokens(make_inspection(empty, high, broken), 9)
    assert (first.window.row, first.token) == (2, 2)
    assert (second.window.row, second.loss) == (0, 9.0)


def test_a_character_of_several_tokens_is_one_glyph():
    window = make_window(["a", "", "", "€", "", "b", ""], ends=[4])
    bounds = [(0, 1), (1, 4), (1, 4), (1, 4), (4, 5), (5, 6), (6, 7)]
    assert [glyph_at(window, token) for token in range(7)] == bounds


def test_the_text_says_what_was_trained_and_where_the_worst_of_it_stands():
    documents = [InspectedDocument("json/encoder.py", 0, 1204), InspectedDocument("x.py", 6, 0)]
    pieces = [*"def \x1b", "", *"x\n(y)"]
    odd = make_window(pieces, [1, 1, 1, 9.5, 1, 5, 1, 2, 1, 1], 3, documents, ends=[5])
    text = format_inspection(make_inspection(make_window("plain"), odd), max_tokens=2)
    assert text.splitlines() == [
        "step 812 of runs/stdlib-1",
        "loss 5.2500, logged 5.1250, learning rate 3.0e-04, grad norm 2.50",
        "2 windows, 14 tokens trained on; losses are in nats per token",
        "",
        "windows by mean loss, worst first",
        "   2.350  row 3, window 103",
        "             2.700  json/encoder.py from token 1,204",
        "             2.000  x.py from its beginning",
        "   1.000  row 0, window 100",
        "             1.000  a.py from its beginning",
        "",
        "tokens, worst first (2 of 14)",
        f"   9.500  p {math.exp(-9.5):.2g}  row 3, token 4  json/encoder.py, token 1,208",
        r"          def \x1b<end>x\n(y)",
        "              ^^^^",
        "   5.000  p 0.0067   row 3, token 6  x.py, token 0",
        r"          def \x1b<end>x\n(y)",
        "                       ^",
    ]


def test_what_the_log_does_not_say_is_left_out():
    lost = {"logged_loss": None, "learning_rate": None, "grad_norm": None}
    lines = format_inspection(make_inspection(make_window("ab"), **lost)).splitlines()
    assert lines[1:3] == [
        "loss 5.2500",
        "1 window, 1 token trained on; losses are in nats per token",
    ]


def test_what_is_shown_whole_is_not_said_to_be_thinned():
    text = format_inspection(make_inspection(*(make_window("ab", row=row) for row in range(5))))
    assert " of 5)" not in text


def test_many_windows_and_documents_are_thinned_openly_and_the_worst_stay():
    documents = [InspectedDocument(f"{i}.py", i, 0) for i in range(30)]
    windows = [make_window("x" * 30, np.arange(29) + row, row, documents) for row in range(12)]
    lines = format_inspection(make_inspection(*windows)).splitlines()
    assert "windows by mean loss, worst first (5 of 12)" in lines
    assert [line.split()[2] for line in lines if ", window" in line] == [
        f"{row}," for row in (11, 10, 9, 8, 7)
    ]
    first = lines.index("  25.000  row 11, window 111")
    shown = [line.split()[1] for line in lines[first + 1 : first + 5]]
    assert shown == ["29.py", "28.py", "27.py", "26.py"]
    assert lines[first + 5].strip() == "and 26 more documents with lower losses"


any_text = (
    st.text()
    | st.just("wide " * 60)
    | st.text("ab漢字\u0301\t\n\x1b\u202e\u200b😀\u200d\ufe0f❤", max_size=200)
)


@given(
    pieces=st.lists(any_text, min_size=2, max_size=150),
    name=any_text,
    run=any_text,
    ends=st.sets(st.integers(0, 150), max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_line_is_too_wide_or_obeyed_by_a_terminal(pieces, name, run, ends, seed):
    losses = np.random.default_rng(seed).exponential(3, len(pieces) - 1)
    documents = [
        InspectedDocument(name, 0, 10**12),
        InspectedDocument(name * 9, len(pieces) - 1, 0),
    ]
    window = make_window(
        pieces, losses, 10**5, documents, ends={e for e in ends if e < len(pieces)}
    )
    for line in format_inspection(make_inspection(window, run=run * 5)).splitlines():
        assert cell_len(line) <= 100
        assert all(char.isprintable() or char in "\u00a0\u200c\u200d\u202f\u3000" for char in line)


@given(st.text("ab 漢é\t\n", min_size=2, max_size=120), st.data())
def test_the_mark_stands_below_the_token(text, data):
    token = data.draw(st.integers(1, len(text) - 1))
    losses = [9.0 if i == token else 1.0 for i in range(1, len(text))]
    lines = format_inspection(make_inspection(make_window(text, losses)), max_tokens=1).splitlines()
    line, marks = lines[-2:]
    columns = [char for char in line for _ in range(cell_len(char))]
    marked = columns[marks.index("^") : len(marks)]
    shown = {"\n": r"\n", "\t": r"\t", "漢": "漢漢"}.get(text[token], text[token])
    assert "".join(marked) == shown


@pytest.mark.parametrize(
    ("text", "token", "marks"),
    [
        ("ab👨‍👩‍👧cd", 7, "    ^"),  # three people, two joiners: one emoji of two columns
        ("ab👨‍👩‍👧cd", 4, "  ^^"),
        ("ab👨‍👩‍👧cd", 3, "  ^^"),
        ("a👍🏽b", 3, "   ^"),
        ("a👍🏽b", 2, " ^^"),
        ("a❤\ufe0fb", 3, "   ^"),
        ("ae\u0301b", 2, " ^"),
        ("ae\u0301b", 3, "  ^"),
    ],
)
def test_the_mark_counts_what_is_drawn_as_one_as_one(text, token, marks):
    losses = [9.0 if i == token else 1.0 for i in range(1, len(text))]
    lines = format_inspection(make_inspection(make_window(text, losses)), max_tokens=1).splitlines()
    assert lines[-2:] == [f"{'':10}{text}", f"{'':10}{marks}"]


@pytest.mark.parametrize("shift", range(8))
def test_no_emoji_is_cut_apart_where_the_line_is(shift):
    family = "👨‍👩‍👧"
    part = f"{family}漢漢漢" * 10
    text = f"{part}{'.' * shift}x{'.' * shift}{part}"
    losses = [9.0 if char == "x" else 1.0 for char in text[1:]]
    lines = format_inspection(make_inspection(make_window(text, losses)), max_tokens=1).splitlines()
    before, after = lines[-2][10:].split("x")
    for side in (before, after):
        assert len(side) < len(part)
        assert set(side.replace(family, "")) <= {"漢", "."}
    columns = 2 * before.count(family) + 2 * before.count("漢") + shift
    assert lines[-1] == f"{'':{10 + columns}}^"


class Spans(Page):
    """Also keeps each span in a <pre>: its attributes and its text."""

    def __init__(self, text):
        self.spans = []
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "span" and "pre" in self.open:
            self.spans.append([dict(attrs), ""])

    def handle_data(self, data):
        super().handle_data(data)
        if "pre" in self.open and "span" in self.open:
            self.spans[-1][1] += data


def page_of(path, inspection):
    assert write_inspection_page(inspection, path / "inspection.html") == path / "inspection.html"
    text = (path / "inspection.html").read_text(encoding="utf-8")
    assert_inert(text)
    return Spans(text)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_the_page_shows_every_token_with_its_loss_and_probability(tmp_path_factory, seed):
    windows = random_windows(seed)
    page = page_of(tmp_path_factory.mktemp("page"), make_inspection(*windows))
    expected, classes = [], []
    for window in worst_first(windows):
        expected.append((window.pieces[0], None))
        classes.append("context")
        for token, loss in targets_of(window):
            title = f"{loss:.2f} nats, p {math.exp(-loss):.2g}"
            expected.append((window.pieces[token], title))
            edges = [0.5, 1, 2, 3, 5, 7, 10]
            classes.append(f"c{sum(edge <= loss for edge in edges)}")
    found = [(text.translate(MARKS), attributes.get("title")) for attributes, text in page.spans]
    assert found == expected
    assert [attributes["class"] for attributes, _ in page.spans] == classes


def test_the_page_says_the_numbers_the_documents_and_what_is_worst(tmp_path):
    documents = [InspectedDocument("json/encoder.py", 0, 1204), InspectedDocument("x.py", 4, 0)]
    odd = make_window("abc\nxyz", [1, 1, 9.5, 1, 1, 1], 3, documents)
    page = page_of(tmp_path, make_inspection(make_window("plain"), odd))
    words = re.split(r"\n+", page.text)
    for name, value in {
        "loss": "5.2500",
        "logged loss": "5.1250",
        "learning rate": "3.0e-04",
        "gradient norm": "2.50",
        "windows": "2",
        "tokens trained on": "10",
    }.items():
        assert words[words.index(name) + 1] == value
    assert "from token 1,204 · 3.833 nats" in words
    assert "from its beginning · 1.000 nats" in words
    assert page.pre[0].translate(MARKS) == "abc\nx.pyxyz"  # each document's name where it begins
    first = words.index("9.500")
    assert words[first + 1 : first + 3] == ["7.5e-05", "abc"]
    assert "json/encoder.py, token 1,207" in words
    assert ("href", "#t3-3") in page.attributes
    (marked,) = [text for attributes, text in page.spans if attributes.get("id") == "t3-3"]
    assert marked == "↵\n"
    bars = [value for name, value in page.attributes if name == "style"]
    assert bars == ["height:100%", f"height:{100 / (14.5 / 6):.0f}%"]


def test_a_character_of_several_tokens_has_the_colour_of_the_worst_and_all_their_losses(tmp_path):
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("a€"), tokenizer.end_of_document, *tokenizer.encode("b"), 0xE2]
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == 7
    window = make_window(pieces, [0.25, 2.5, 0.125, 4, 0.5, 12], ends=[4])
    spans = page_of(tmp_path, make_inspection(window)).spans
    found = [(text, attributes["class"]) for attributes, text in spans]
    assert found == [
        ("a", "context"),
        ("€", "c3"),
        ("end of document\n", "c4"),
        ("b", "c1"),
        ("\ufffd", "c7"),
    ]
    assert spans[1][0]["title"] == f"0.25 + 2.50 + 0.12 nats, p {math.exp(-2.875):.2g}"


def test_text_and_names_on_the_page_are_not_obeyed(tmp_path):
    documents = [InspectedDocument(HOSTILE, 0, 0), InspectedDocument(HOSTILE, 2, 0)]
    windows = [
        make_window(list(f"{HOSTILE}\r\u200b"), documents=documents),
        make_window(["a", HOSTILE], row=1),
    ]
    page = page_of(tmp_path, make_inspection(*windows, run=HOSTILE))
    assert not {"\x1b", "\u202e", "\u200b", "\r"} & set(page.text)
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert page.pre[0] == f"{shown[:2]}{shown}{shown[2:]}\\r\\u200b"
    assert page.pre[1] == f"a{shown}"
    assert page.tags.count("pre") == 2


def test_losses_that_are_not_finite_have_a_colour_of_their_own(tmp_path):
    window = make_window("abcd", [math.nan, math.inf, 1])
    spans = page_of(tmp_path, make_inspection(window, loss=math.nan, grad_norm=math.inf)).spans
    assert [attributes["class"] for attributes, _ in spans] == ["context", "cx", "cx", "c2"]
    assert spans[1][0]["title"] == "nan nats, p nan"
    assert spans[2][0]["title"] == "inf nats, p 0"


def test_losses_that_are_not_finite_are_counted_and_have_no_bar(tmp_path):
    good, better = make_window("abcd", [3, 2, 1], 0), make_window("abcd", [1, 1, 1], 1)
    broken = make_window("abcd", [math.nan, math.inf, 1], 2)
    padded = make_window("abcd", row=3, padding=3)
    page = page_of(tmp_path, make_inspection(good, broken, better, padded))
    assert "2.000 to 1.000 nats · losses that are not finite: 2 of 9" in page.text
    bars = [value for name, value in page.attributes if name == "style"]
    assert bars == ["height:100%", "height:50%"]
    page = page_of(tmp_path, make_inspection(broken))
    assert "\nlosses that are not finite: 2 of 3\n" in page.text
    assert not [value for name, value in page.attributes if name == "style"]


def test_the_legend_has_the_colour_of_losses_that_are_not_finite_only_if_there_are_any(tmp_path):
    finite, broken = make_window("abc", [1, 2]), make_window("abc", [1, math.nan])
    assert ("class", "cx") not in page_of(tmp_path, make_inspection(finite)).attributes
    page = page_of(tmp_path, make_inspection(broken))
    assert "\nnot\nfinite\n" in page.text
    padded = make_window("abcd", row=3, padding=1)  # the loss of padding is not a number, either
    assert "finite" not in page_of(tmp_path, make_inspection(padded)).text


def test_a_character_with_a_loss_that_is_not_a_number_has_the_colour_of_that(tmp_path):
    window = make_window(["a", "", "é", "", "", "€"], [2, math.nan, 1, math.nan, 1])
    spans = page_of(tmp_path, make_inspection(window)).spans
    assert [attributes["class"] for attributes, _ in spans] == ["context", "cx", "cx"]


def test_windows_left_out_are_not_said_to_have_no_more_than_nan(tmp_path):
    windows = [make_window("x" * 20_000, np.full(19_999, math.nan), row) for row in range(3)]
    assert "; 1 of 3\n" in page_of(tmp_path, make_inspection(*windows)).text


def test_short_lines_stand_one_behind_the_other_and_others_below(tmp_path):
    short = make_window("a\nb\n\n(\n)\n", row=0)
    narrow = make_window("x = 1\n" * 9, row=1)
    code = make_window("def f(value):\n    return value + 1\n" * 9, row=2)
    one = make_window("abc", row=3)
    page = page_of(tmp_path, make_inspection(short, narrow, code, one))
    text = (tmp_path / "inspection.html").read_text(encoding="utf-8")
    assert re.findall("<pre[^>]*>", text) == ['<pre class="short">'] * 2 + ["<pre>"] * 2
    assert page.pre[0].translate(MARKS) == "a\nb\n\n(\n)\n"  # as it is copied


def test_what_the_eye_would_miss_has_a_mark(tmp_path):
    page = page_of(tmp_path, make_inspection(make_window(["a", "\n", "\t", ""])))
    assert [text for _, text in page.spans] == ["a", "↵\n", "→\t", "∅"]
    words = page.text.split("\n")
    for token, mark in enumerate("↵→∅", start=1):  # in the table, too
        assert mark in words[: words.index(f"a.py, token {token}")]


def test_padding_is_not_shown(tmp_path):
    window = make_window(["a", "b", "c", "", "", ""], padding=3, ends=[3, 4, 5])
    inspection = make_inspection(window)
    page = page_of(tmp_path, inspection)
    assert page.pre == ["abc"]
    assert "end of document" not in page.text
    assert "<end>" not in format_inspection(inspection)


def test_a_large_step_has_a_page_of_sane_size_that_says_what_it_leaves_out(tmp_path):
    losses = np.random.default_rng(0).exponential(2, (512, 1024))
    losses[77] += 5
    pieces = list("def f(x):\n\treturn x + 1  # and so on\n" * 40)[:1025]
    windows = [make_window(pieces, row_losses, row) for row, row_losses in enumerate(losses)]
    page = page_of(tmp_path, make_inspection(*windows))
    assert (tmp_path / "inspection.html").stat().st_size < 4e6
    assert page.tags.count("pre") == 32 == MAX_TOKENS // 1024
    ranked = worst_first(windows)
    assert ranked[0].row == 77
    rest = f"; 32 of 512, the others have a mean loss of {ranked[32].mean_loss:.3f} or less"
    assert rest in page.text
    shown = [value for name, value in page.attributes if name == "id" and value[0] == "w"]
    assert shown == [f"w{window.row}" for window in ranked[:32]]


def test_a_window_longer_than_a_page_is_cut_openly(tmp_path):
    losses = np.ones(40_000)
    losses[[10, 39_999]] = 20
    window = make_window("x" * 40_001, losses)
    page = page_of(tmp_path, make_inspection(window))
    assert page.pre == ["x" * (MAX_TOKENS + 1)]
    assert "the first 32,768 of its 40,000 tokens" in page.text
    assert [value for name, value in page.attributes if name == "href"][1] == "#t0-11"
    assert "a.py, token 40,000" in page.text  # named, but with nowhere to lead


def luminance(colour):
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize(("scheme", "card"), [(LIGHT, "#f6f7f9"), (DARK, "#1c222b")])
def test_every_colour_can_be_read_and_told_from_its_neighbours(scheme, card):
    backs = [luminance(card if back == "transparent" else back) for back, _ in scheme]
    for back, (_, ink) in zip(backs, scheme, strict=True):
        low, high = sorted([back, luminance(ink)])
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, criterion 1.4.3
    steps = [(b + 0.05) / (a + 0.05) for a, b in pairwise(backs)]
    assert all(step > 1.05 for step in steps) or all(step < 1 / 1.05 for step in steps)
