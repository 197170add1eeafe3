"""Formats of the extra `data`: Parquet, Arrow and zstd. Skipped where it is not installed."""

import json

import pytest
from test_formats import held_out, jsonl, many, run
from test_prepare import texts_of

from truestep.data.corpus import find_files
from truestep.data.formats import CorpusError

NEEDED = 'the extra is not installed: pip install "truestep[data]"'
zstandard = pytest.importorskip("zstandard", reason=NEEDED)
pyarrow = pytest.importorskip("pyarrow", reason=NEEDED)
parquet = pytest.importorskip("pyarrow.parquet", reason=NEEDED)


def compress(text):
    return zstandard.ZstdCompressor().compress(text.encode())


def test_rows_of_parquet_are_documents_like_lines(tmp_path):
    lines = many()
    table = pyarrow.table({"id": range(len(lines)), "body": lines})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    prepared, _ = run(tmp_path / "a.parquet", tmp_path / "out", text_field="body")
    found = texts_of(prepared.train, text_by_name=True)
    assert set(texts_of(prepared.validation)) == held_out(lines)
    named = {f"a.parquet:{i}": text for i, text in enumerate(lines, 1)}
    assert found == {name: text for name, text in named.items() if text not in held_out(lines)}


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_null_and_empty_rows_are_no_documents_but_count(tmp_path, kind):
    column = pyarrow.array(["a", None, "", "b"], type=getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (file,) = find_files(str(tmp_path / "a.parquet"))
    assert [(r.number, r.text) for r in file.documents() if r.text] == [(1, "a"), (4, "b")]
    assert [r.text for r in file.documents([4])] == ["b"]


def test_frames_of_zstd_are_read_one_after_another(tmp_path):
    lines = many()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(jsonl(lines[:100])) + compress("") + compress(jsonl(lines[100:])))
    (file,) = find_files(str(path))
    assert [record.text for record in file.documents()] == lines
    prepared, _ = run(path, tmp_path / "out")
    assert set(texts_of(prepared.validation)) == held_out(lines)


def test_compressed_text_gives_its_last_tenth(tmp_path):
    text = "".join(f"line {i}: naïve\n" for i in range(50_000))
    (tmp_path / "a.txt.zst").write_bytes(compress(text))
    (tmp_path / "a.txt").write_text(text)
    packed, plain = (
        run(tmp_path / name, tmp_path / f"{name}-out")[0] for name in ("a.txt.zst", "a.txt")
    )
    for split in ("train", "validation"):
        assert texts_of(getattr(packed, split)) == texts_of(getattr(plain, split))


def test_zstd_cut_anywhere_is_named(tmp_path):
    whole = compress("".join(json.dumps({"text": f"{i * i} words"}) + "\n" for i in range(200)))
    path = tmp_path / "a.jsonl.zst"
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorpusError, match=r"cut short, damaged or no \.zst"):
            list(find_files(str(path))[0].documents())
    path.write_bytes(b"plain text, not compressed")
    with pytest.raises(CorpusError, match=r"cut short, damaged or no \.zst"):
        list(find_files(str(path))[0].documents())


def test_a_table_that_is_none_or_has_no_such_column_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "words": [["a"]]}), path)
    for field, message in [
        ("text", "text_field='text' is not there; found 'id', 'words': give another"),
        ("id", "text_field='id' is a column of int64, not of text"),
        ("words", r"text_field='words' is a column of list"),
    ]:
        with pytest.raises(CorpusError, match=message):
            run(path, tmp_path / "out", text_field=field)
    parquet.write_table(pyarrow.table({"text": many()}), path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"no table", whole[:4] + bytes(200) + whole[204:]):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"a\.parquet' is cut short, damaged or no \.parquet"):
            run(path, tmp_path / "out")


def test_rows_are_checked_like_lines(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", "b\0c"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet', row 2: NUL"):
        run(tmp_path / "a.parquet", tmp_path / "out")
