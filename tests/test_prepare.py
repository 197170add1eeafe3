"""From text to token shards: the split, the fingerprint, and what happens when it fails."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from faults import FAULTS, Died, FaultyStorage
from sealing import sealed

from truestep.data import documents
from truestep.data.formats import CorpusError
from truestep.data.prepare import prepare, prepare_once
from truestep.data.tokenizer import ByteTokenizer
from truestep.data.tokens import open_prepared
from truestep.storage import LOCAL, LocalStorage, StorageError

BYTES = ByteTokenizer()


@pytest.fixture
def tree(tmp_path):
    """Write texts, given as relative name -> text, below a directory."""

    def build(texts, root="tree"):
        for name, text in texts.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        return str(tmp_path / root)

    return build


def texts_of(split, text_by_name=False):
    """Return the documents of a split, from its ids alone."""
    data = bytes(split.read(0, len(split)).tolist())
    assert data.endswith(b"\0")
    documents = [part.decode() for part in data[:-1].split(b"\0")]
    if not text_by_name:
        return documents
    names, position = [], 0
    for text in documents:
        name, start = split.document_at(position)
        assert start == position
        names.append(name)
        position += len(text.encode()) + 1
    return dict(zip(names, documents, strict=True))


def many(number, size=200):
    return {f"d{i % 7}/{i}.txt": f"text number {i}\n" * (size // 16) for i in range(number)}


def run(source, target, **options):
    said = []
    prepared = prepare(source, target, tokenizer=BYTES, say=said.append, **options)
    return prepared, "\n".join(said)


def test_every_document_is_in_one_split_whole_and_under_its_name(tree, tmp_path):
    texts = many(120)
    prepared, said = run(tree(texts), tmp_path / "out", shard_tokens=1000)
    train, validation = (
        texts_of(split, text_by_name=True) for split in (prepared.train, prepared.validation)
    )
    assert train.keys().isdisjoint(validation)
    assert train | validation == texts
    assert list(train) == sorted(train)
    assert 0.04 <= len(validation) / 120 <= 0.25
    assert f"{len(validation)} of 120 files" in said
    assert prepared.train.num_bytes == sum(len(text) for text in train.values())
    assert prepared.train.num_documents == len(train)
    assert sorted(path.name for path in prepared.directory.iterdir()) == sorted(
        [*prepared.manifest["files"], "manifest.json"]
    )


def blocks(*sizes):
    return {f"{i}.txt": f"{i} words\n" * 100 * size for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("texts", "validation", "hashes"),
    [
        (many(120), "auto", ("65dec28e8b3d3b1a", "0523cf231336ff26")),
        (many(120), "d0/0.txt", ("1b4ca0ac1db7c676", "fef458ca82a48f62")),
        (blocks(3, 5, 8, 13, 21), "auto", ("738e9d2df4df842b", "295973f65e149494")),
        (blocks(1, 1, 1, 50), "auto", ("928c7a58cd4c1e0d", "b50565375d5ea275")),
        (blocks(1, 1, 1, 50), "0.txt", ("2bfba844930664ab", "23b11b24565d4626")),
    ],
)
def test_text_keeps_its_fingerprint_and_its_split_from_release_to_release(
    tree, tmp_path, texts, validation, hashes
):
    source = tree(texts)
    validation = validation if validation == "auto" else f"{source}/{validation}"
    prepared, _ = run(source, tmp_path / "out", validation=validation)
    ids = bytes(prepared.validation.read(0, len(prepared.validation)).tolist())
    held_out = hashlib.sha256(ids).hexdigest()
    assert (prepared.fingerprint[:16], held_out[:16]) == hashes


def test_neither_name_nor_place_nor_company_moves_a_file_to_the_other_split(tree, tmp_path):
    texts = many(200)
    first, _ = run(tree(texts), tmp_path / "first")
    renamed = {f"z{i}.md": text for i, text in enumerate(reversed(texts.values()))}
    more = {f"more/{i}.txt": f"{i * i} other words\n" * 20 for i in range(50)}
    second, _ = run(tree(renamed | more, root="other"), tmp_path / "second")
    held_out = set(texts_of(first.validation))
    assert held_out == set(texts_of(second.validation)) - set(more.values())


def test_a_single_file_gives_its_last_tenth_and_says_so(tree, tmp_path):
    text = "".join(f"line {i}: naïve\n" for i in range(500))
    prepared, said = run(tree({"my.txt": text}) + "/my.txt", tmp_path / "out")
    (train,), (validation,) = texts_of(prepared.train), texts_of(prepared.validation)
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.09 < len(validation) / len(text) < 0.11
    assert "the last tenth of the file" in said


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1], [1] * 6, [1, 1, 1, 50], [3, 5, 8, 13, 21]])
def test_a_handful_of_files_gives_both_splits_a_fair_share(tree, tmp_path, sizes):
    texts = {f"{i}.txt": f"{i} words\n" * 100 * size for i, size in enumerate(sizes)}
    prepared, _ = run(tree(texts), tmp_path / "out")
    everything = texts_of(prepared.train) + texts_of(prepared.validation)
    assert sum(map(len, everything)) == sum(map(len, texts.values()))
    share = prepared.validation.num_bytes / sum(map(len, texts.values()))
    assert 0.04 <= share <= 0.25


@pytest.mark.parametrize("text", ["ab", "éa", "a\nb", "0123456789"])
def test_the_smallest_texts_still_give_both_splits_a_target(tree, tmp_path, text):
    prepared, _ = run(tree({"a.txt": text}), tmp_path / "out")
    assert texts_of(prepared.train) + texts_of(prepared.validation) != []
    assert min(len(prepared.train), len(prepared.validation)) >= 2
    assert "".join(texts_of(prepared.train) + texts_of(prepared.validation)) == text


@pytest.mark.parametrize("text", ["a", "é"])
def test_one_character_cannot_be_split(tree, tmp_path, text):
    with pytest.raises(CorpusError, match="too short to hold out a tenth"):
        run(tree({"a.txt": text}), tmp_path / "out")


def test_a_named_validation_text_is_used_and_kept_out_of_training(tree, tmp_path):
    source = tree({"a.txt": "one\n", "b.txt": "two\n", "held/c.txt": "three\n"})
    prepared, said = run(source, tmp_path / "out", validation=f"{source}/held")
    assert texts_of(prepared.train) == ["one\n", "two\n"]
    assert texts_of(prepared.validation) == ["three\n"]
    assert "left out 1 file found in" in said
    with pytest.raises(CorpusError, match=r"validation=.* has all the text of source="):
        run(source, tmp_path / "all", validation=source)
    with pytest.raises(CorpusError, match="validation: 'nowhere' is neither"):
        run(source, tmp_path / "missing", validation="nowhere")


def test_the_fingerprint_knows_texts_names_and_split_and_nothing_else(tree, tmp_path):
    texts = {"a.txt": "one\n" * 9, "b.txt": "two\n" * 9, "c.txt": "three\n" * 9}
    source = tree(texts)

    def fingerprint(source, **options):
        target = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        return run(source, target, **options)[0].fingerprint

    base = fingerprint(source)
    assert fingerprint(tree(texts, root="copy"), shard_tokens=3) == base
    edited = texts | {"b.txt": "twq\n" * 9}
    renamed = {"a.txt": texts["a.txt"], "b.txt": texts["b.txt"], "d.txt": texts["c.txt"]}
    swapped = texts | {"a.txt": texts["b.txt"], "b.txt": texts["a.txt"]}
    others = [
        fingerprint(tree(changed, root=name))
        for name, changed in [("edited", edited), ("renamed", renamed), ("swapped", swapped)]
    ]
    others.append(fingerprint(source, validation=f"{source}/a.txt"))
    others.append(fingerprint(source, validation=f"{source}/c.txt"))
    held = tree({"b.txt": texts["b.txt"], "c.txt": texts["c.txt"]}, root="held")
    others.append(fingerprint(source, validation=held))
    assert len({base, *others}) == 7


def test_preparing_once_writes_once(tree, tmp_path):
    source = tree({"my text.txt": "word\n" * 100}) + "/my text.txt"
    cache = tmp_path / "cache"
    path = prepare_once(source, cache, tokenizer=BYTES)
    assert path.name == f"my-text-{open_prepared(path).fingerprint[:12]}"
    storage = FaultyStorage()
    assert prepare_once(source, cache, tokenizer=BYTES, storage=storage) == path
    assert storage.operations == []
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    Path(source).write_text("word\n" * 101)
    assert prepare_once(source, cache, tokenizer=BYTES) != path
    assert len(list(cache.iterdir())) == 2


def test_a_prepared_directory_is_taken_as_it_is(tree, tmp_path):
    prepared, _ = run(tree(many(3)), tmp_path / "out")
    source = str(prepared.directory)
    assert prepare_once(source, tmp_path / "cache", tokenizer=BYTES) == prepared.directory
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CorpusError, match=r"validation='x' cannot be used with"):
        prepare_once(source, tmp_path / "cache", tokenizer=BYTES, validation="x")
    with pytest.raises(CorpusError, match="already prepared"):
        run(source, tmp_path / "again")
    with pytest.raises(StorageError, match="exists already"):
        run(source, prepared.directory)


def test_a_project_with_a_manifest_of_its_own_is_a_text_like_others(tree, tmp_path):
    source = tree(many(3) | {"manifest.json": "{}"})
    path = prepare_once(source, tmp_path / "cache", tokenizer=BYTES)
    assert path.parent == tmp_path / "cache"
    for odd in ("n" * 5000, "a\0b", ""):
        with pytest.raises(CorpusError, match="is neither"):
            prepare_once(odd, tmp_path / "cache", tokenizer=BYTES)


def test_a_damaged_prepared_directory_is_named_with_the_remedy(tree, tmp_path):
    source, cache = tree(many(3)), tmp_path / "cache"
    path = prepare_once(source, cache, tokenizer=BYTES)
    manifest = path / "manifest.json"
    kept = manifest.read_text()
    manifest.write_text(sealed(json.loads(kept) | {"fingerprint": "0" * 64}))
    with pytest.raises(
        StorageError, match=r"expected fingerprint .* remove it to prepare it again"
    ):
        prepare_once(source, cache, tokenizer=BYTES)
    manifest.write_text(kept)
    os.truncate(path / "train-00000.bin", 1)
    with pytest.raises(StorageError, match=r"found 1; remove .* to prepare it again"):
        prepare_once(source, cache, tokenizer=BYTES)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_operation_leaves_all_of_the_directory_or_nothing(tree, tmp_path, fault):
    source, cache = tree(many(4)), tmp_path / "cache"
    whole = FaultyStorage()
    path = prepare_once(source, cache, tokenizer=BYTES, storage=whole, shard_tokens=300)
    expected = {file.name: file.read_bytes() for file in path.iterdir()}
    assert len(whole.operations) > 20
    for fail_at in range(len(whole.operations)):
        shutil.rmtree(cache)
        storage = FaultyStorage(fail_at, fault)
        with suppress(OSError, Died):
            prepare_once(source, cache, tokenizer=BYTES, storage=storage, shard_tokens=300)
        if fault == "power loss":
            storage.lose_power()
        if fault == "disk full" and not path.exists():
            assert not cache.exists() or os.listdir(cache) == []
        if path.exists():
            assert {file.name: file.read_bytes() for file in path.iterdir()} == expected
        assert prepare_once(source, cache, tokenizer=BYTES, shard_tokens=300) == path
        assert {file.name: file.read_bytes() for file in path.iterdir()} == expected


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_read(tree, tmp_path):
    source = tree({"a.txt": "word\n" * 10})
    target = Path(source) / "a.txt" / "below" / "a file"
    for function in (prepare, prepare_once):
        said = []
        with pytest.raises(StorageError, match="cannot be written: File exists; use another"):
            function(source, target, tokenizer=BYTES, say=said.append)
        assert said == []


def test_a_killed_preparation_leaves_a_temporary_that_harms_nothing(tree, tmp_path):
    source, cache = tree(many(4)), tmp_path / "cache"
    left = cache / ".tmp-tree-0123456789ab-deadbeef"
    left.mkdir(parents=True)
    (left / "train-00000.bin").write_bytes(b"half")
    path = prepare_once(source, cache, tokenizer=BYTES)
    assert path.parent == cache
    assert sorted(os.listdir(cache)) == sorted([left.name, path.name])


def test_the_slower_of_two_preparations_takes_the_faster_ones_directory(tree, tmp_path):
    source, cache = tree(many(4)), tmp_path / "cache"
    rivals = []

    class Slow(LocalStorage):
        def rename(self, source_path, target):
            if target.parent == cache:
                rivals.append(prepare_once(source, cache, tokenizer=BYTES))
            super().rename(source_path, target)

    path = prepare_once(source, cache, tokenizer=BYTES, storage=Slow())
    assert rivals == [path]
    assert os.listdir(cache) == [path.name]
    assert texts_of(open_prepared(path).train)


def test_processes_that_prepare_one_text_at_a_time_all_end_well(tree, tmp_path):
    source, cache = tree(many(300)), tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from truestep.data.prepare import prepare_once\n"
        "from truestep.data.tokenizer import ByteTokenizer\n"
        "print(prepare_once(sys.argv[1], Path(sys.argv[2]), tokenizer=ByteTokenizer()))"
    )
    command = [sys.executable, "-c", code, source, str(cache)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=60) for process in processes]
    assert {error for _, error in results} == {""}
    assert len({path for path, _ in results}) == 1
    assert len(os.listdir(cache)) == 1


def test_a_text_that_changes_while_it_is_prepared_is_refused(tree, tmp_path):
    source = Path(tree({"a.txt": "word\n" * 100})) / "a.txt"

    def edit(line):
        if line.startswith("validation"):
            source.write_text("ward\n" * 100)

    with pytest.raises(CorpusError, match=r"a\.txt' was changed while it was being prepared"):
        prepare(str(source), tmp_path / "out", tokenizer=BYTES, say=edit)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_text_are_skipped_and_counted_unless_named(tree, tmp_path):
    source = tree(many(30))
    (Path(source) / "bad.txt").write_bytes(b"ok\xff")
    (Path(source) / "nul.c").write_bytes(b"a\0b")
    (Path(source) / "empty.txt").touch()
    (Path(source) / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    prepared, said = run(source, tmp_path / "out")
    assert len(texts_of(prepared.train) + texts_of(prepared.validation)) == 30
    assert "skipped 2 files, not UTF-8 text" in said
    assert "bad.txt': byte 2 is not UTF-8 text" in said
    (Path(source) / "nul.c").unlink()
    assert "skipped 1 file, not UTF-8 text" in run(source, tmp_path / "again")[1]
    (Path(source) / "nul.c").write_bytes(b"a\0b")
    for name, message in [
        ("bad.txt", "source: .*byte 2 is not UTF-8"),
        ("nul.c", "source: .*byte 1 is NUL"),
        ("empty.txt", "source: .* is empty"),
        ("mark.txt", "source: .* has no text"),
    ]:
        with pytest.raises(CorpusError, match=message):
            run(f"{source}/{name}", tmp_path / name)
        assert not (tmp_path / name).exists()


def test_memory_does_not_grow_with_the_text(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", 2**13)
    source = tree({"a.txt": "some words in a line\n" * 200_000}) + "/a.txt"  # 4.2 MB
    tracemalloc.start()
    try:
        prepare(source, tmp_path / "out", tokenizer=BYTES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_the_standard_library_is_prepared_whole(tmp_path):
    path = prepare_once("stdlib", tmp_path, tokenizer=BYTES, storage=LOCAL)
    prepared = open_prepared(path)
    total = prepared.train.num_bytes + prepared.validation.num_bytes
    assert 8e6 < total < 20e6
    assert 0.04 < prepared.validation.num_bytes / total < 0.25
    names = texts_of(prepared.train, text_by_name=True)
    assert len(names) > 300
