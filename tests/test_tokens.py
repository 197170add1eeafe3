"""Token shards: what is written is read, and what is damaged is named."""

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sealing import sealed

from truestep.data.shards import write_split
from truestep.data.tokenizer import ByteTokenizer, find_tokenizer
from truestep.data.tokens import (
    SplitRecord,
    TokenSplit,
    dtype_of,
    open_prepared,
)
from truestep.manifest import DirectoryWriter, read_manifest
from truestep.storage import FileRecord, StorageError

END = 0


class Numbers:
    """A tokenizer of text like "5 17 3", with as many ids as a test wants."""

    name = "numbers"
    end_of_document = END

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.token_bytes = np.full(vocab_size, 3, dtype=np.int64)
        self.token_bytes[END] = 0
        self.fingerprint = f"{vocab_size:064x}"

    def encode(self, text):
        return np.array(text.split(), dtype=np.int64)

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def write(target, train, *, validation=((1, 2),), vocab_size=256, shard_tokens=5, tokenizer=None):
    """Prepare documents that are given as ids, and return the directory."""
    tokenizer = tokenizer or Numbers(vocab_size)
    with DirectoryWriter(target) as writer:
        splits = {}
        for split, documents in (("train", train), ("validation", validation)):
            named = [(f"{i}.txt", [np.array(ids, np.int64)]) for i, ids in enumerate(documents)]
            splits[split] = write_split(writer, split, named, tokenizer, shard_tokens).model_dump()
        writer.commit(
            {
                "format": "truestep tokens",
                "version": 2,
                "source": "numbers",
                "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype_of(tokenizer.vocab_size),
                "fingerprint": "0" * 64,
                **splits,
            }
        )
    return target


def expected_ids(documents):
    return [i for ids in documents if ids for i in (*ids, END)]


@pytest.fixture
def damaged(tmp_path):
    """Prepare bytes, change something of the manifest, and return the directory."""

    def build(change):
        directory = write(tmp_path / "data", [[1, 2, 3]], tokenizer=ByteTokenizer())
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(sealed(manifest))
        return directory

    return build


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")]
)
def test_shards_are_little_endian_ids_of_the_narrowest_type(tmp_path, vocab_size, dtype):
    last = vocab_size - 1  # 65536 as uint16 would wrap to 0
    directory = write(tmp_path / "data", [[1, last, 7], [], [last]], vocab_size=vocab_size)
    found = b"".join((directory / f"train-{i:05d}.bin").read_bytes() for i in range(2))
    assert np.frombuffer(found, dtype).tolist() == [1, last, 7, END, last, END]
    assert (directory / "train-00000.bin").stat().st_size == 5 * np.dtype(dtype).itemsize
    assert not (directory / "train-00002.bin").exists()
    split = open_prepared(directory, Numbers(vocab_size)).train
    assert split.read(0, 6).tolist() == [1, last, 7, END, last, END]


@given(
    documents=st.lists(st.lists(st.integers(1, 999), max_size=12), min_size=1, max_size=6),
    shard_tokens=st.integers(1, 9),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_any_slice_across_shards_reads_what_was_written(
    tmp_path_factory, documents, shard_tokens, data
):
    documents = [*documents, [1]]
    target = tmp_path_factory.mktemp("tokens") / "data"
    write(target, documents, vocab_size=1000, shard_tokens=shard_tokens)
    split = open_prepared(target, Numbers(1000)).train
    ids = expected_ids(documents)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert len(split) == len(ids)
    assert split.read(start, stop).dtype == np.int64
    assert split.read(start, stop).tolist() == ids[start:stop]
    assert split.num_documents == sum(bool(ids) for ids in documents)
    assert split.num_bytes == 3 * sum(len(ids) for ids in documents)


def test_every_position_belongs_to_the_document_it_was_written_from(tmp_path):
    documents = [[1, 2, 3], [], [4], [5, 6, 7, 8]]
    split = open_prepared(write(tmp_path / "data", documents), Numbers(256)).train
    found = [split.document_at(position) for position in range(len(split))]
    assert found == [("0.txt", 0)] * 4 + [("2.txt", 4)] * 2 + [("3.txt", 6)] * 5
    for position in (-1, len(split)):
        with pytest.raises(ValueError, match="outside"):
            split.document_at(position)


def test_many_shards_are_read_from_many_threads_with_few_descriptors(tmp_path):
    ids = np.random.default_rng(0).integers(1, 250, 3000)
    directory = write(tmp_path / "data", [ids.tolist()], shard_tokens=7)  # 429 shards
    split = open_prepared(directory, Numbers(256)).train
    starts = np.random.default_rng(1).integers(0, 2900, 400).tolist()
    gc.collect()  # what tests before this one left closes its files now, and not in between
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: split.read(start, start + 50), starts))
    for start, part in zip(starts, found, strict=True):
        assert part.tolist() == ids[start : start + 50].tolist()
    assert len(os.listdir("/proc/self/fd")) - before <= 80
    del split
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_program_that_ends_with_open_data_says_nothing(tmp_path):
    """A module held from outside Python is emptied name by name, `os` among the first."""
    directory = write(tmp_path / "tokens", [[1, 2, 3]], tokenizer=ByteTokenizer())
    program = (
        "import ctypes; from pathlib import Path; from truestep.data import tokens; "
        f"tokens.kept = tokens.open_prepared(Path({str(directory)!r})); "
        "tokens.kept.train.read(0, 2); "
        "ctypes.pythonapi.Py_IncRef(ctypes.py_object(tokens))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""


def test_positions_outside_the_split_are_refused(tmp_path):
    split = open_prepared(write(tmp_path / "data", [[1, 2]]), Numbers(256)).train
    for start, stop in [(-1, 1), (2, 1), (0, 4)]:
        with pytest.raises(ValueError, match="outside the split's 3"):
            split.read(start, stop)


def test_a_shard_cut_before_opening_is_named_with_both_sizes(tmp_path):
    directory = write(tmp_path / "data", [list(range(1, 20))])
    os.truncate(directory / "train-00001.bin", 3)
    with pytest.raises(StorageError, match=r"train-00001\.bin: expected 5 bytes, found 3"):
        open_prepared(directory, Numbers(256))
    (directory / "train-00001.bin").unlink()
    with pytest.raises(StorageError, match=r"train-00001\.bin: the file is missing"):
        open_prepared(directory, Numbers(256))


def test_a_shard_cut_while_it_is_read_is_an_error_and_the_others_still_read(tmp_path):
    directory = write(tmp_path / "data", [list(range(1, 20))], vocab_size=1000)
    split = open_prepared(directory, Numbers(1000)).train
    assert split.read(0, 20).tolist() == [*range(1, 20), END]
    os.truncate(directory / "train-00002.bin", 5)
    with pytest.raises(
        StorageError, match=r"train-00002\.bin: expected 6 bytes at offset 2, found 3"
    ):
        split.read(11, 14)
    assert split.read(0, 10).tolist() == list(range(1, 11))


def test_an_id_outside_the_vocabulary_is_named_with_shard_offset_and_id(tmp_path):
    directory = write(tmp_path / "data", [list(range(1, 20))], vocab_size=1000)
    with (directory / "train-00001.bin").open("r+b") as stream:
        stream.seek(4)
        stream.write((1000).to_bytes(2, "little"))
    split = open_prepared(directory, Numbers(1000)).train
    with pytest.raises(
        StorageError,
        match=r"train-00001\.bin: the id 1000 at offset 4 is outside the vocabulary of 1000",
    ):
        split.read(0, 20)
    assert split.read(0, 7).tolist() == list(range(1, 8))


@pytest.mark.parametrize("wrong", [-1, 256, 65536 + 5])
def test_an_id_that_a_tokenizer_should_not_give_is_never_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"'0.txt'.*gave the id {wrong}, outside"):
        write(tmp_path / "data", [[1, wrong]])
    assert os.listdir(tmp_path) == []


def test_another_tokenizer_vocabulary_or_dtype_is_refused(tmp_path, damaged):
    directory = write(tmp_path / "numbers", [[1]], vocab_size=300)
    with pytest.raises(StorageError, match="tokenizer=numbers must be bytes or bpe-N"):
        open_prepared(directory)
    for other in (ByteTokenizer(), Numbers(301)):
        with pytest.raises(StorageError, match=r"manifest\.json: tokenizer: expected"):
            open_prepared(directory, other)
    directory = damaged(lambda manifest: manifest.update(vocab_size=255))
    with pytest.raises(StorageError, match=r"vocab_size: expected 256 .* found 255"):
        open_prepared(directory)


def test_a_changed_list_of_documents_is_refused(tmp_path):
    directory = write(tmp_path / "data", [[1, 2], [3]])
    split = open_prepared(directory, Numbers(256)).train
    path = directory / "train-documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"3", b"2"))
    with pytest.raises(StorageError, match=r"train-documents\.jsonl: bytes 0 to 59 are not"):
        split.document_at(0)


def _first_shard(name):
    def change(manifest):
        manifest["files"][name] = manifest["files"]["train-00000.bin"]
        manifest["train"]["shards"] = [name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_first_shard("/etc/passwd"), "not a plain file name"),
        (_first_shard("../data/train-00000.bin"), "not a plain file name"),
        (_first_shard("train-0000\0.bin"), r"0000\\x00\.bin' is not a plain file name"),
        (lambda m: m["train"].update(shards=["/etc/passwd"]), r"train\.shards\.0"),
        (lambda m: m["train"].update(shards=["train-00007.bin"]), "no record of train-00007.bin"),
        (lambda m: m["train"].update(documents="../x-documents.jsonl"), r"train\.documents"),
        (lambda m: m["train"].update(num_tokens=10**400), r"train\.num_tokens"),
        (lambda m: m["train"].update(num_tokens=5), "expected shards of 5 tokens, found 4"),
        (lambda m: m["train"].update(num_tokens="4"), r"train\.num_tokens"),
        (lambda m: m["train"].update(num_tokens=True), r"train\.num_tokens"),
        (lambda m: m.update(train=None), "train: input should be"),
        (lambda m: m.update(dtype="O"), "dtype: input should be"),
        (lambda m: m.update(dtype="uint16"), "uint16"),
        (lambda m: m.update(version=3), "version 2, found version 3; prepare the text again"),
        (lambda m: m.update(version=None), "version: input should be 2"),
        (lambda m: m.update(format="a checkpoint"), "format: input should be"),
        (lambda m: m.pop("fingerprint"), "fingerprint: field required"),
        (
            lambda m: m["files"].update(
                {"train-00000.bin": {"size": -1, "sha256": "", "blocks": []}}
            ),
            "size",
        ),
        (lambda m: m["tokenizer"].update(name="\x1b[31m"), r"tokenizer=\\x1b\[31m must be bytes"),
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(damaged, change, message):
    directory = damaged(change)
    with pytest.raises(StorageError, match=message) as caught:
        open_prepared(directory)
    assert str(caught.value).isprintable()


def test_data_of_the_first_version_is_not_called_damaged(damaged):
    directory = damaged(lambda manifest: None)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["content_sha256"]
    path.write_text(json.dumps({**manifest, "version": 1}))
    with pytest.raises(StorageError, match="version 2, found version 1; prepare the text again"):
        open_prepared(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"x"', "\xff"])
def test_a_manifest_that_is_no_manifest_is_refused(damaged, text):
    directory = damaged(lambda manifest: None)
    (directory / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StorageError, match=r"manifest\.json"):
        open_prepared(directory)


def test_a_huge_manifest_is_refused_before_it_is_read(damaged):
    directory = damaged(lambda manifest: None)
    os.truncate(directory / "manifest.json", 2**40)
    with pytest.raises(StorageError, match="more than"):
        open_prepared(directory)


def test_a_shard_that_is_no_file_is_refused_without_waiting_for_it(damaged):
    directory = damaged(
        lambda manifest: manifest["files"]["train-00000.bin"].update(size=0, blocks=[])
    )
    (directory / "train-00000.bin").unlink()
    os.mkfifo(directory / "train-00000.bin")
    with pytest.raises(StorageError, match="expected a file, found something else"):
        open_prepared(directory)


def test_an_odd_number_of_bytes_is_no_shard_of_two_byte_ids(tmp_path):
    directory = write(tmp_path / "data", [[1, 2]], vocab_size=300)
    with (directory / "train-00000.bin").open("ab") as stream:
        stream.write(b"x")
    record = SplitRecord(
        shards=["train-00000.bin"],
        documents="train-documents.jsonl",
        num_tokens=3,
        num_documents=1,
        num_bytes=6,
    )
    _, files = read_manifest(directory)
    files["train-00000.bin"] = FileRecord(7, "0" * 64, (0,))
    with pytest.raises(StorageError, match="7 bytes are not a whole number of uint16"):
        TokenSplit(directory, record, files, dtype="uint16", vocab_size=300)


@given(st.text().filter(lambda text: "\0" not in text))
@settings(deadline=None)
def test_bytes_decode_to_the_text_they_encode(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids.tolist()) == text.encode()
    assert tokenizer.decode(ids) == text
    document = [*ids, tokenizer.end_of_document]
    assert tokenizer.decode(document) == text
    assert tokenizer.token_bytes[document].sum() == len(text.encode())


@given(st.text().filter(lambda text: "\0" not in text), st.data())
def test_a_character_stands_at_the_byte_that_completes_it(text, data):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text).tolist()
    expected = [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]
    assert tokenizer.pieces(ids) == expected
    end = data.draw(st.integers(0, len(ids)))
    with_an_end = [*ids[:end], tokenizer.end_of_document, *ids[end:]]
    assert tokenizer.pieces(with_an_end) == [*expected[:end], "", *expected[end:]]


@given(st.lists(st.integers(0, 255) | st.sampled_from([*"é€😀\ufffd".encode(), 0, 97])))
@example([0xE2, 0x82, ord("(")])
@example([0xE2, 0xE2, 0x82, 0xAC])
@example([0xF0, 0x80, 0xFF, 0, 0xF0, 0x9F])
@example([*"\ufffd".encode(), 0xE2, 0, 0x82])
@example([0xED, 0xA0])  # half a surrogate: U+FFFD for each byte
@example([0xED, 0xA0, ord("A")])
@example([0xED, 0xA0, 0x80, 0xED, 0xA0, 0xE2])
def test_pieces_of_any_bytes_are_the_decoded_text(ids):
    tokenizer = ByteTokenizer()
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    for byte, piece in zip(ids, pieces, strict=True):
        if byte < 128:  # whatever was broken before it, this byte is itself
            assert piece == ("" if byte == tokenizer.end_of_document else chr(byte))
        assert len(piece) <= 1


def test_the_byte_tokenizer_refuses_what_it_cannot_stand_for():
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="NUL at character 2"):
        tokenizer.encode("ab\0c")
    with pytest.raises(ValueError, match="token id 256 has no text; ids must be 0 to 255"):
        tokenizer.decode([1, 256])
    with pytest.raises(ValueError, match="token id -1 has no text"):
        tokenizer.decode(np.array([-1]))
    with pytest.raises(ValueError, match="token id 256 has no text; ids must be 0 to 255"):
        tokenizer.pieces([1, 256])
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="tokenizer=bpe must be bytes or bpe-N"):
        find_tokenizer("bpe")
    golden = "5cd8188f92cf1e75242450d2880a9eb9c5e4936bd04eae7e7360c382be803089"
    assert find_tokenizer("bytes").fingerprint == golden


def test_pieces_of_a_document_are_joined_without_a_seam(tmp_path):
    tokenizer = Numbers(256)
    pieces = [np.array(ids, np.int64) for ids in ([1], [], [2, 3], [4])]
    with DirectoryWriter(tmp_path / "data") as writer:
        record = write_split(writer, "train", [("a", pieces)], tokenizer, 3)
        shards = [(writer.temporary / name).read_bytes() for name in record.shards]
    assert shards == [bytes([1, 2, 3]), bytes([4, END])]
