"""What text there is, and what is said where there is none."""

import inspect
import json
import os
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from truestep.data import documents as document_module
from truestep.data.corpus import BUILT_IN, find_files
from truestep.data.documents import Document
from truestep.data.formats import CorpusError

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "text.txt"


@pytest.fixture
def tree(tmp_path):
    """Write files, given as relative name -> bytes, below a directory."""

    def build(files):
        for name, data in files.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(tmp_path / "tree")

    return build


def test_a_directory_gives_its_prose_and_code_by_name(tree):
    shown = ["b.txt", "a/z.py", "a.md", "README", "A.TXT", "naïve.rst"]
    hidden = ["a/.hidden.py", ".git/config.py", "p.png", "manifest.json", "metrics.jsonl"]
    source = tree(dict.fromkeys(shown + hidden, b"x"))
    os.symlink("..", f"{source}/a/loop")
    os.symlink("nowhere", f"{source}/broken.txt")
    said = []
    names = [document.name for document in find_files(source, say=said.append)]
    assert names == ["A.TXT", "README", "a.md", "a/z.py", "b.txt", "naïve.rst"]
    assert len(said) == 1
    assert "6 files" in said[0]
    assert "skipped 5 of other kinds" in said[0]
    assert "'.png'" in said[0]


def test_line_ends_stay_and_a_byte_order_mark_goes(tree):
    source = tree({"a.txt": b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf"})
    (document,) = find_files(source)
    assert document.read() == "one\r\ntwo\rthree\n\ufeff"
    (document,) = find_files(f"{source}/a.txt")
    assert document.name == "a.txt"
    assert document.read().startswith("one")


@given(texts, st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_pieces_join_to_the_text_whatever_their_size(scratch, text, size, mark):
    scratch.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    watched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_module, "_PIECE_BYTES", size)
        pieces = list(Document("text.txt", scratch).pieces(watched.append))
    assert "".join(pieces) == text
    assert b"".join(watched) == text.encode()
    assert all(pieces)


@given(texts, st.binary(min_size=1, max_size=4), texts, st.integers(1, 9))
@example("ab", b"\xe2\x82", "", 9)  # the file ends within a character
@settings(deadline=None)
def test_the_first_byte_that_is_not_text_is_named(scratch, text, noise, after, size):
    data = text.encode() + noise + after.encode()
    scratch.write_bytes(data)
    try:
        wrong = data.decode().find("\0")
        expected = f"byte {len(data.decode()[:wrong].encode())} is NUL" if wrong >= 0 else None
    except UnicodeDecodeError as error:
        nul = data[: error.start].find(0)  # which of two is named depends on the pieces
        expected = f"byte ({nul} is NUL|{error.start} is not UTF-8 text)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_module, "_PIECE_BYTES", size)
        if expected is None:
            assert Document("text.txt", scratch).read() == data.decode().removeprefix("\ufeff")
        else:
            with pytest.raises(CorpusError, match=expected):
                Document("text.txt", scratch).read()


@given(st.one_of(texts, st.lists(texts).map("\n".join)), st.integers(1, 60))
@settings(deadline=None)
def test_a_tail_is_cut_without_losing_or_breaking_a_character(scratch, text, repeat):
    data = (text * repeat).encode()
    scratch.write_bytes(data)
    parts = Document("text.txt", scratch).cut_tail()
    if parts is None:
        assert len(data.decode()) <= 1
        return
    head, tail = (part.read() for part in parts)
    assert head + tail == data.decode()
    assert head
    assert tail
    share = len(tail.encode()) / len(data)
    if len(data) >= 60:  # 4 bytes of a character and rounding count for little
        assert 0.02 <= share <= 0.16


def test_a_tail_starts_with_a_line_where_lines_are_short(tree):
    lines = [f"line {i}\n" for i in range(1000)]
    source = tree({"a.txt": "".join(lines).encode()})
    head, tail = (part.read() for part in find_files(source)[0].cut_tail())
    assert head.endswith("\n")
    assert abs(tail.count("\n") - 100) < 5


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nowhere.txt", "is neither a file, a directory nor one of stdlib, torch-src"),
        ({}, "stdlb", "did you mean 'stdlib'"),
        ({"input.txt": b"x"}, "inptu.txt", r"did you mean '.*input\.txt'"),
        ({"a.txt": b""}, "a.txt", "is empty"),
        ({"b/p.png": b"x", "b/.c": b"x"}, "b", r"no text files in .*skipped 2 .*'\.png'"),
        ({}, "\x1b[31m\n", r"'.*\\x1b\[31m\\n' is neither"),
        ({}, "n" * 5000, "is neither"),
    ],
)
def test_a_source_without_text_is_refused_in_one_line(tree, files, name, message):
    source = tree({"other": b"", **files})
    with pytest.raises(CorpusError, match=message) as caught:
        find_files(f"{source}/{name}" if name != "stdlb" else name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.symlink_to(path),
            "is a link that leads to itself; give the file itself",
        ),
        (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere; give the file"),
        (os.mkfifo, "is a pipe or a device, not a file; write its text to a file"),
        (lambda path: path.symlink_to(os.devnull), "is a pipe or a device, not a file"),
    ],
)
def test_a_source_that_is_no_file_is_called_what_it_is(tmp_path, make, message):
    make(tmp_path / "text.txt")
    with pytest.raises(CorpusError, match=message) as caught:
        find_files(str(tmp_path / "text.txt"))
    assert str(caught.value).isprintable()
    assert "did you mean" not in str(caught.value)


def test_one_file_is_counted_as_one(tree):
    said = []
    find_files(tree({"a.txt": b"x"}), say=said.append)
    assert ": 1 file in " in said[0]


def test_a_file_that_vanishes_is_named(tree):
    source = tree({"a.txt": b"x"})
    (document,) = find_files(source)
    document.path.unlink()
    with pytest.raises(CorpusError, match=r"a\.txt' cannot be read: No such file"):
        document.read()


def test_a_path_wins_over_a_built_in_name_only_if_it_exists(tree, monkeypatch):
    monkeypatch.chdir(tree({"stdlib": b"mine"}))
    assert [document.read() for document in find_files("stdlib")] == ["mine"]
    assert len(find_files("torch-src")) > 1000


def test_the_standard_library_is_read_without_its_tests():
    documents = {document.name: document for document in find_files("stdlib")}
    assert documents["json/decoder.py"].read() == inspect.getsource(json.decoder)
    assert not any(
        part in {"test", "tests", "idle_test", "site-packages", "__pycache__"}
        for name in documents
        for part in name.split("/")
    )
    assert not any("_sysconfigdata" in name for name in documents)
    assert 8e6 < sum(document.path.stat().st_size for document in documents.values()) < 20e6


def test_docstrings_are_the_text_that_help_shows(tree):
    documents = {document.name: document for document in find_files("docstrings")}
    text = documents["stdlib/json/__init__.py"].read()
    assert text.startswith(inspect.getdoc(json))
    for function in (json.dumps, json.load):
        assert inspect.getdoc(function) in text
    assert any(name.startswith("torch/nn/") for name in documents)


def test_python_that_does_not_parse_or_says_nothing_has_no_docstrings(tree):
    code = {
        "broken.py": b"'''doc'''\ndef f(:\n",
        "silent.py": b"x = 1\n",
        "odd.py": b"def f():\n    'a\\0b\\ud800c \\\\d'\n",
        "escape.py": b"def f():\n    'a \\d'\n",
    }
    source = tree(code)
    found = {d.name: Document(d.name, d.path, form="docstrings").read() for d in find_files(source)}
    assert found == {
        "broken.py": "",
        "silent.py": "",
        "odd.py": "abc \\d\n",
        "escape.py": "a \\d\n",
    }


def test_nothing_here_imports_torch():
    code = (
        "import sys; from truestep.data import prepare, corpus\n"
        f"for name in {BUILT_IN!r}: corpus.find_files(name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
