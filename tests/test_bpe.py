"""Byte pairs: text and back, the merges by a slow oracle, and the way from text to a sample."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.config import DataConfig
from truestep.data.bpe import END_OF_DOCUMENT, BytePairs, BytePairTokenizer
from truestep.data.prepare import prepare, prepare_once
from truestep.data.tokenizer import find_tokenizer, load_tokenizer
from truestep.data.tokens import open_prepared
from truestep.settings import ConfigError
from truestep.storage import StorageError

SOURCE = Path(os.__file__).read_text(encoding="utf-8")
LEARNT = BytePairs(600).learn([SOURCE])


def merged(word, ranks):
    """Merge the best pair again and again, as the definition of BPE has it; `word` is bytes."""
    parts = [bytes([byte]) for byte in word]
    while True:
        found = [(ranks[pair], pair) for pair in pairwise(parts) if pair in ranks]
        if not found:
            return parts
        _, best = min(found)
        joined, position = [], 0
        while position < len(parts):
            if tuple(parts[position : position + 2]) == best:
                joined.append(best[0] + best[1])
                position += 2
            else:
                joined.append(parts[position])
                position += 1
        parts = joined


def bytes_of(token):
    """The bytes of a token as the file writes it; by the alphabet GPT-2's encoder made public."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    code, extra = {}, 0
    for byte in range(256):
        if byte in seen:
            code[chr(byte)] = byte
        else:
            code[chr(256 + extra)] = byte
            extra += 1
    return bytes(code[character] for character in token)


def oracle(text):
    model = json.loads(LEARNT.definition)["model"]
    ranks = {
        tuple(bytes_of(part) for part in pair): rank for rank, pair in enumerate(model["merges"])
    }
    ids = {bytes_of(t): i for t, i in model["vocab"].items() if t != END_OF_DOCUMENT}
    # ASCII alone: re knows no \p{L}.
    words = re.findall(r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text)
    return [ids[part] for word in words for part in merged(word.encode(), ranks)]


def test_ids_are_those_of_the_merges():
    text = SOURCE[:4000] + "\n\n\t  x=12345 [[~~]]   \n"
    assert text.isascii()
    assert LEARNT.encode(text).tolist() == oracle(text)


def test_source_takes_fewer_tokens_than_bytes():
    assert len(LEARNT.encode(SOURCE)) < len(SOURCE) / 2
    assert LEARNT.vocab_size == 600


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(text):
    ids = LEARNT.encode(text)
    assert LEARNT.decode(ids) == text
    assert LEARNT.token_bytes[ids].sum() == len(text.encode())
    assert "".join(LEARNT.pieces(ids)) == text
    assert LEARNT.end_of_document not in ids


@given(st.lists(st.integers(0, LEARNT.vocab_size - 1)))
def test_pieces_of_any_ids_are_their_text(ids):
    assert "".join(LEARNT.pieces(ids)) == LEARNT.decode(ids)


def test_the_name_of_the_end_is_text_like_any_other():
    ids = LEARNT.encode(f"a{END_OF_DOCUMENT}b")
    assert LEARNT.end_of_document not in ids
    assert LEARNT.decode(ids) == f"a{END_OF_DOCUMENT}b"
    assert LEARNT.decode([LEARNT.end_of_document]) == ""


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="token id 600 has no text; ids must be 0 to 599"):
        LEARNT.decode([5, 600])


def test_the_same_text_gives_the_same_tokenizer_in_any_process():
    code = (
        "import os; from pathlib import Path; from truestep.data.bpe import BytePairs\n"
        "learnt = BytePairs(600).learn([Path(os.__file__).read_text('utf-8')])\n"
        "print(learnt.fingerprint, flush=True)\n"
        "if not (child := os.fork()):\n    os._exit(0)\nprint(os.waitpid(child, 0)[1])\n"
        "print(os.environ.get('TOKENIZERS_PARALLELISM'))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.stdout.split() == [LEARNT.fingerprint, "0", "None"]
        assert run.stderr == ""  # no word of threads at the fork


def test_a_short_text_gives_fewer_ids():
    tokenizer = BytePairs(5000).learn(["abab abab"])
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.name == "bpe-5000"


@pytest.mark.parametrize(
    "definition", [b"", b"{", b"{}", b"[]", b"\xff", json.dumps({"model": {}}).encode()]
)
def test_what_is_no_tokenizer_is_refused(definition):
    with pytest.raises(ValueError, match="this is no tokenizer of byte-level BPE"):
        BytePairTokenizer("bpe-300", definition)


@pytest.mark.parametrize("name", ["bpe", "bpe-", "bpe-256", "bpe-9999999", "bpe-4e3", "word", ""])
def test_names_that_are_no_tokenizer_are_refused(name):
    with pytest.raises(ConfigError, match=r"tokenizer=.* must be auto, bytes or bpe-N"):
        DataConfig(tokenizer=name)


@pytest.fixture
def texts(tmp_path):
    directory = tmp_path / "texts"
    directory.mkdir()
    for number in range(40):
        (directory / f"{number}.txt").write_text(SOURCE[number * 700 : number * 700 + 900])
    return directory


def test_prepared_data_holds_its_tokenizer(texts, tmp_path):
    data = prepare(str(texts), tmp_path / "data", tokenizer=BytePairs(400))
    assert data.tokenizer.name == "bpe-400"
    again = open_prepared(data.directory)
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    assert again.manifest["vocab_size"] == 400
    ids = again.train.read(0, len(again.train))
    text = again.tokenizer.decode(ids)
    assert again.train.num_bytes == len(text.encode())
    ends = np.flatnonzero(ids == again.tokenizer.end_of_document)
    assert len(ends) == again.train.num_documents


def test_only_what_is_trained_on_is_learnt_from(tmp_path):
    (tmp_path / "train.txt").write_text("aaaa bbbb " * 500)
    (tmp_path / "held-out.txt").write_text("zqzq " * 500)
    data = prepare(
        str(tmp_path / "train.txt"),
        tmp_path / "data",
        tokenizer=BytePairs(300),
        validation=str(tmp_path / "held-out.txt"),
    )
    assert len(data.tokenizer.encode("zqzqzq")) == 6
    assert len(data.tokenizer.encode("aaaa")) < 4


def test_a_prepared_text_is_found_again_and_learnt_from_once(texts, tmp_path):
    said = []
    find = find_tokenizer("bpe-400")
    first = prepare_once(str(texts), tmp_path / "cache", tokenizer=find, say=said.append)
    assert sum("learning" in line for line in said) == 1
    assert prepare_once(str(texts), tmp_path / "cache", tokenizer=find, say=said.append) == first
    assert sum("learning" in line for line in said) == 1
    other = prepare_once(str(texts), tmp_path / "cache", tokenizer=BytePairs(401))
    assert other != first


def test_a_damaged_tokenizer_is_named(texts, tmp_path):
    data = prepare(str(texts), tmp_path / "data", tokenizer=BytePairs(400))
    path = data.directory / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Split", b"Splat"))
    with pytest.raises(StorageError, match=r"tokenizer\.json"):
        open_prepared(data.directory)
    path.unlink()
    with pytest.raises(StorageError, match=r"tokenizer\.json"):
        open_prepared(data.directory)


def test_a_tokenizer_that_does_not_serve_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StorageError, match=r"tokenizer\.json: this is no tokenizer"):
        load_tokenizer("bpe-400", tmp_path)
    with pytest.raises(ValueError, match="is not known; use bytes, or bpe-N"):
        find_tokenizer("words")
