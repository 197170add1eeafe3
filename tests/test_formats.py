"""Files of many documents, and compressed ones: the documents that were written are those read."""

import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import BYTES, texts_of

from truestep.cli import main
from truestep.data import documents
from truestep.data.corpus import find_files
from truestep.data.documents import Document, Record, RecordFile
from truestep.data.formats import CorpusError, DamagedError
from truestep.data.prepare import prepare

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


def held_out(texts):
    """Those of which the content's hash is in the lowest tenth."""
    heads = {text: hashlib.sha256(text.encode()).digest()[:4] for text in texts}
    return {text for text, head in heads.items() if int.from_bytes(head, "big") < 2**32 // 10}


def many(number=300):
    return [f"document {i}: naïve\nand more\n" * (1 + i % 3) for i in range(number)]


def run(source, target, **options):
    said = []
    return prepare(str(source), target, tokenizer=BYTES, say=said.append, **options), said


def test_each_line_is_a_document_under_its_number_and_its_hash_decides_the_split(tmp_path):
    lines = many()
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(lines))
    prepared, said = run(path, tmp_path / "out", shard_tokens=1000)
    found = {
        split: texts_of(getattr(prepared, split), text_by_name=True)
        for split in ("train", "validation")
    }
    named = {f"a.jsonl:{i}": text for i, text in enumerate(lines, 1)}
    assert found["train"] | found["validation"] == named
    assert set(found["validation"].values()) == held_out(lines)
    numbers = [int(name.split(":")[1]) for name in found["train"]]
    assert numbers == sorted(numbers)
    assert any(f"of {len(lines)} documents" in line for line in said)


def test_a_document_stays_in_its_split_in_whatever_file_it_stands(tmp_path):
    lines = many()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a.jsonl").write_text(jsonl(lines))
    (tmp_path / "two" / "b.ndjson").write_text(jsonl(reversed(lines[:100]), field="body"))
    with gzip.open(tmp_path / "two" / "a.jsonl.gz", "wt") as stream:
        stream.write(jsonl(lines[100:], field="body"))
    first, _ = run(tmp_path / "one", tmp_path / "first")
    second, _ = run(tmp_path / "two", tmp_path / "second", text_field="body")
    assert set(texts_of(first.validation)) == set(texts_of(second.validation)) == held_out(lines)
    assert sorted(texts_of(first.train)) == sorted(texts_of(second.train))
    assert texts_of(second.train, text_by_name=True)["a.jsonl.gz:1"] == lines[100]


@given(st.lists(texts, max_size=8), st.booleans(), st.booleans())
@settings(deadline=None)
def test_lines_of_any_text_are_read_back(tmp_path_factory, lines, ascii_only, mark):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    written = [json.dumps({"text": line}, ensure_ascii=ascii_only) for line in lines]
    between = "\n \n".join(written)  # every other line is blank
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + between.encode())
    read = {r.number: r.read() for r in RecordFile("any", path, "jsonl", "text").documents()}
    assert {number: text for number, text in read.items() if text} == {
        2 * i + 1: line for i, line in enumerate(lines) if line
    }


@given(st.sets(st.integers(1, 30)))
@settings(deadline=None)
def test_only_the_numbers_that_are_asked_for_are_read(tmp_path_factory, numbers):
    path = tmp_path_factory.getbasetemp() / "some.jsonl"
    path.write_text(
        "".join(f'{{"text": "{i}"}}\n' if i in numbers else "broken\n" for i in range(1, 31))
    )
    file = RecordFile("some.jsonl", path, "jsonl", "text")
    assert [(r.number, r.text) for r in file.documents(sorted(numbers))] == [
        (i, str(i)) for i in sorted(numbers)
    ]


@given(texts, st.integers(1, 9))
@settings(deadline=None)
def test_pieces_of_a_record_join_to_its_text_and_are_no_longer_than_allowed(text, size):
    record = Record("a:1", Path("a"), 1, text)
    watched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_PIECE_BYTES", size)
        pieces = list(record.pieces(watched.append))
    assert "".join(pieces) == text
    assert b"".join(watched) == text.encode()
    assert all(0 < len(piece) <= size for piece in pieces)
    assert all(
        piece.endswith("\n") or "\n" not in piece for piece in pieces[:-1]
    )  # cut after a line where there is one


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', '{"text": '], r"a\.jsonl', line 2: not JSON \(.*\); correct the line"),
        (["[1]"], r"line 1: expected an object with the text under 'text', found list"),
        (['{"body": "a", "id": 1}'], r"line 1: text_field='text' is not there; found 'body', 'id'"),
        (["{}"], r"text_field='text' is not there; found nothing: give another text_field"),
        (['{"text": 7}'], r"line 1: expected text under 'text', found int"),
        (['{"text": "a\\u0000b"}'], r"line 1: NUL, which text does not contain"),
        (['{"text": "\\ud800"}'], r"line 1: half of a surrogate pair"),
        (["[" * 100_000], r"line 1: not JSON"),
        (['{"text": ' + "9" * 5000 + "}"], r"line 1: not JSON"),
        (["\udcff"], r"line 1: not JSON \('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n')
    for source in (path, tmp_path, tmp_path / "*.jsonl"):  # nowhere is it left out
        files = find_files(str(source))
        with pytest.raises(DamagedError, match=message) as caught:
            list(files[0].documents())
        with pytest.raises(CorpusError, match=r"source: .*line [12]"):
            run(source, tmp_path / "out")
        assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_compressed_text_is_the_text_and_gives_its_last_tenth(tmp_path):
    text = "".join(f"line {i}: naïve\n" for i in range(500))
    (tmp_path / "my.txt").write_text(text)
    with gzip.open(tmp_path / "my.txt.gz", "wt") as stream:
        stream.write(text)
    plain, _ = run(tmp_path / "my.txt", tmp_path / "plain")
    packed, said = run(tmp_path / "my.txt.gz", tmp_path / "packed")
    for split in ("train", "validation"):
        assert texts_of(getattr(packed, split)) == texts_of(getattr(plain, split))
    assert any("the last tenth of the file" in line for line in said)


@pytest.mark.parametrize("cut", [1, 10, 100, -9, -1])
def test_a_compressed_file_that_was_cut_short_is_named_wherever_it_stands(tmp_path, cut):
    whole = gzip.compress("".join(f"line {i}\n" for i in range(1000)).encode())
    (tmp_path / "bad.txt.gz").write_bytes(whole[:cut])
    (tmp_path / "good.txt.gz").write_bytes(whole)
    for source in (tmp_path / "bad.txt.gz", tmp_path):
        with pytest.raises(CorpusError, match=r"bad\.txt\.gz' is cut short, damaged or no \.gz"):
            run(source, tmp_path / "out")
    (tmp_path / "bad.txt.gz").write_bytes(b"plain text\n")
    with pytest.raises(CorpusError, match=r"no \.gz \(Not a gzipped file .*fetch it again"):
        run(tmp_path, tmp_path / "out")


def test_a_directory_of_text_leaves_files_of_documents_out_and_says_how_to_read_them(tmp_path):
    tree = tmp_path / "tree"
    (tree / "data").mkdir(parents=True)
    (tree / "README.md").write_text("read me")
    (tree / "data" / "a.jsonl").write_text(jsonl(many(20)))
    said = []
    assert [file.name for file in find_files(str(tree), say=said.append)] == ["README.md"]
    pattern = re.search(r"; '(.*)' would take those of one kind alone", said[0])[1]
    assert [file.name for file in find_files(pattern)] == ["data/a.jsonl"]
    (tree / "README.md").unlink()
    assert [file.name for file in find_files(str(tree))] == ["data/a.jsonl"]


def test_a_pattern_takes_what_it_matches_below_its_fixed_part(tmp_path):
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/.hidden/c.jsonl", "x/y/d.log"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "t"}\n')

    def names(pattern):
        return [file.name for file in find_files(str(tmp_path / pattern))]

    assert names("x/**/*.jsonl") == ["a.jsonl", "y/b.jsonl"]
    assert names("x/*.jsonl") == ["a.jsonl"]
    assert names("*/y/?.log") == ["x/y/d.log"]
    assert isinstance(find_files(str(tmp_path / "*/y/?.log"))[0], Document)
    (tmp_path / "a*").write_text("a name of its own")
    assert names("a*") == ["a*"]
    with pytest.raises(CorpusError, match=r"matches no file with text"):
        names("x/*.parquet")


def test_memory_does_not_grow_with_the_number_or_the_packing_of_documents(tmp_path):
    """3 MB of compressed lines, 48 bytes a document beside one line at a time."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as stream:
        for i in range(6000):
            stream.write(json.dumps({"text": f"some words and a number {i}\n" * 20}) + "\n")
    (file,) = find_files(str(path))
    tracemalloc.start()
    try:
        for _ in itertools.islice(file.documents(), 6000):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**18


def test_the_commands_take_a_text_field_and_refuse_a_wrong_one_in_one_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(jsonl(many(100), field="body"))
    assert main(["prepare", "a.jsonl", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "line 1: text_field='text' is not there; found 'id', 'body'" in error
    assert main(["prepare", "a.jsonl", "--out", "out", "--text-field", "body"]) == 0


def test_an_empty_stream_of_gz_is_no_text(tmp_path):
    buffer = io.BytesIO()
    gzip.GzipFile(fileobj=buffer, mode="wb").close()
    (tmp_path / "a.jsonl.gz").write_bytes(buffer.getvalue())
    with pytest.raises(CorpusError, match="has no text in it"):
        run(tmp_path / "a.jsonl.gz", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_a_package_that_is_not_installed_is_named_with_the_remedy(
    tmp_path, monkeypatch, name, package
):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"bytes")
    message = rf'{name}\' needs {package}, .*; pip install "truestep\[data\]"$'
    with pytest.raises(CorpusError, match=message):
        run(tmp_path / name, tmp_path / "out")
