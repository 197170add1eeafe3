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
from sealing import sealed
from tokenizers import Tokenizer

from truestep.config import DataConfig
from truestep.data.bpe import (
    DEFINITION_LIMIT_BYTES,
    END_OF_DOCUMENT,
    BytePairs,
    BytePairTokenizer,
)
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


def test_the_definition_is_in_the_library_s_own_format():
    definition = LEARNT.definition.decode()
    assert Tokenizer.from_str(definition).to_str() == definition
    assert BytePairTokenizer("bpe-600", LEARNT.definition).encode(SOURCE).tolist() == (
        LEARNT.encode(SOURCE).tolist()
    )


def spoilt(*path, **change):
    """The definition with the value at a path changed; without `to`, it goes."""
    content = json.loads(LEARNT.definition)
    *parents, last = path
    inner = content
    for key in parents:
        inner = inner[key]
    inner.pop(last, None)
    if change:
        inner[last] = change["to"]
    return json.dumps(content).encode()


LOWERCASE = {"type": "Lowercase"}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
NAMED = {
    "id": 600,
    "content": "the",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
TRUNCATION = {
    "direction": "Right",
    "max_length": 4,
    "strategy": "LongestFirst",
    "stride": 0,
}
PADDING = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": END_OF_DOCUMENT,
}
ENDS = json.loads(LEARNT.definition)["added_tokens"]
OTHERS = {  # what the library would read, but other ids or other text come of it
    "normalizer": [LOWERCASE, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
    "added_tokens": [[*ENDS, NAMED], [], [{**ENDS[0], "lstrip": True}], [{**ENDS[0], "id": 7}]],
    "truncation": [TRUNCATION],
    "padding": [PADDING],
    "post_processor": [{**BYTE_LEVEL, "add_prefix_space": True}],
    "pre_tokenizer": [None, BYTE_LEVEL, {"type": "Whitespace"}],
    "decoder": [None, {"type": "Fuse"}],
    "model.type": ["WordLevel", "Unigram", "WordPiece"],
    "model.dropout": [0.5],
    "model.unk_token": ["!"],
    "model.continuing_subword_prefix": ["##", "é"],
    "model.end_of_word_suffix": ["</w>"],
    "model.fuse_unk": [True],
    "model.byte_fallback": [True],
    "model.ignore_merges": [True],
    "model.\x1b": [1],
    "version": ["2.0"],
    "another": [{"a": 1}],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in OTHERS.items() for value in values]
)
def test_a_definition_that_reads_text_otherwise_is_refused(field, value, capfd):
    with pytest.raises(ValueError, match="this is no tokenizer of byte-level BPE") as caught:
        BytePairTokenizer("bpe-600", spoilt(*field.split("."), to=value))
    name = field.encode("unicode_escape").decode()
    assert f"({name}=" in str(caught.value)
    assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""  # the library did not panic on it


TOKENS = json.loads(LEARNT.definition)["model"]["vocab"]
MERGES = json.loads(LEARNT.definition)["model"]["merges"]


@pytest.mark.parametrize(
    ("vocabulary", "reason"),
    [
        ({**TOKENS, "the": 601}, "from 0 on without a gap"),
        ({t: i for t, i in TOKENS.items() if i != 300}, "from 0 on without a gap"),
        ({**TOKENS, "zq": 599}, "from 0 on without a gap"),
        ({**TOKENS, "zq": -1}, "from 0 on without a gap"),
        ({**TOKENS, "zq": "600"}, ""),
        ({**TOKENS, "zq": None}, ""),
        ({**TOKENS, "zq": 600.0}, ""),
        ({**TOKENS, "\u00e9 ": 600}, ""),  # a space stands for no byte
        ({**TOKENS, "\ud800": 600}, ""),
        ({**TOKENS, "": 600}, "an empty token"),
        ({("zqzq" if t == "!" else t): i for t, i in TOKENS.items()}, "no token of b'!' alone"),
        ({("zq" if i == 0 else t): i for t, i in TOKENS.items()}, "must give id 0 to"),
        ({t: (1 - i if i < 2 else i) for t, i in TOKENS.items()}, "must give id 0 to"),
        ({}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_a_vocabulary_that_does_not_serve_every_text_is_refused(vocabulary, reason):
    with pytest.raises(ValueError, match="this is no tokenizer of byte-level BPE") as caught:
        BytePairTokenizer("bpe-600", spoilt("model", "vocab", to=vocabulary))
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "merges",
    [
        [*MERGES, ["zq", "zq"]],
        [*MERGES, ["!", "zq"]],
        [*MERGES, ["!"]],
        [*MERGES, ["!", "!", "!"]],
        [*MERGES, [1, 2]],
        [*MERGES, None],
        [*MERGES, "! zq"],
        [*MERGES, "!"],
        [*MERGES, ["\ud800", "!"]],
        {"!": "!"},
        7,
        None,
    ],
)
def test_merges_that_make_no_token_are_refused(merges, capfd):
    with pytest.raises(ValueError, match="this is no tokenizer of byte-level BPE") as caught:
        BytePairTokenizer("bpe-600", spoilt("model", "merges", to=merges))
    assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


@given(st.sampled_from(["vocab", "merges"]), st.recursive(st.none() | st.integers(), st.lists))
def test_whatever_stands_for_vocabulary_or_merges_is_refused_as_one_error(field, value):
    with pytest.raises(ValueError, match="this is no tokenizer of byte-level BPE"):
        BytePairTokenizer("bpe-600", spoilt("model", field, to=value or None))


def test_a_definition_without_a_field_is_refused():
    for path in (("pre_tokenizer",), ("added_tokens",), ("model",), ("model", "vocab")):
        with pytest.raises(ValueError, match="this is no tokenizer of byte-level BPE"):
            BytePairTokenizer("bpe-600", spoilt(*path))


def test_a_definition_is_read_up_to_a_limit(tmp_path):
    with pytest.raises(ValueError, match=f"more than the {DEFINITION_LIMIT_BYTES} "):
        BytePairTokenizer("bpe-600", bytes(DEFINITION_LIMIT_BYTES + 1))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(LEARNT.definition)
    os.truncate(path, 2**40)  # takes no room on the disk
    with pytest.raises(StorageError, match=f"more than the {DEFINITION_LIMIT_BYTES} "):
        load_tokenizer("bpe-600", tmp_path)


def test_the_hash_is_compared_before_a_definition_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(LEARNT.definition)
    found = load_tokenizer("bpe-600", tmp_path, fingerprint=LEARNT.fingerprint)
    assert found.fingerprint == LEARNT.fingerprint
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer") as caught:
        load_tokenizer("bpe-600", tmp_path, fingerprint=LEARNT.fingerprint)
    assert LEARNT.fingerprint[:12] in str(caught.value)
    assert "this is no tokenizer" not in str(caught.value)


BAD_NAMES = [
    *["bpe", "bpe-", "bpe-5", "bpe-256", "bpe-1048577", "bpe-9999999", f"bpe-{'9' * 5000}"],
    *[
        "bpe-04096",
        "bpe-4e3",
        "bpe-+300",
        "bpe--300",
        "bpe-300 ",
        "bpe-300\n",
        "bpe-\u0664\u0660\u0660",
    ],
    *["BPE-300", "word", "", "Auto", "\x1b[31m"],
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_tokenizer_are_refused_by_one_rule(name):
    with pytest.raises(ValueError, match=r"tokenizer=") as caught:
        find_tokenizer(name)
    rule = "must be bytes or bpe-N, where N is 257 to 1048576 without leading zeros; try bpe-4096"
    assert str(caught.value).endswith(rule)
    assert str(caught.value).isprintable()
    with pytest.raises(ConfigError) as refused:
        DataConfig(tokenizer=name)
    said = str(caught.value).replace("must be bytes", "must be auto, bytes")
    assert [p.text for p in refused.value.problems] == [said]


@pytest.mark.parametrize("size", [257, 300, 4096, 2**20])
def test_names_of_byte_pairs_are_taken_by_one_rule(size):
    assert DataConfig(tokenizer=f"bpe-{size}").tokenizer == f"bpe-{size}"
    assert find_tokenizer(f"bpe-{size}") == BytePairs(size)
    assert find_tokenizer(f"bpe-{size}").name == f"bpe-{size}"


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


def test_prepared_data_names_a_tokenizer_that_is_not_the_recorded_one(texts, tmp_path):
    data = prepare(str(texts), tmp_path / "data", tokenizer=BytePairs(400))
    path = data.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["tokenizer.json"]  # with no hash of the file, the fingerprint is left
    path.write_text(sealed(manifest))
    (data.directory / "tokenizer.json").write_bytes(b"{")
    with pytest.raises(StorageError, match=r"tokenizer\.json is not the tokenizer"):
        open_prepared(data.directory)


def test_a_text_is_prepared_with_a_tokenizer_that_was_learnt_before(texts, tmp_path):
    known = BytePairTokenizer("bpe-400", BytePairs(400).learn([SOURCE[::-1]]).definition)
    options = {"cache": tmp_path / "cache", "tokenizer": BytePairs(400)}
    said = []
    first = prepare_once(str(texts), **options, learnt=known, say=said.append)
    assert not any("learning" in line for line in said)
    with_known = open_prepared(first)
    assert with_known.tokenizer.fingerprint == known.fingerprint
    # What is learnt from the text lies beside it and is no other text.
    second = open_prepared(prepare_once(str(texts), **options))
    assert second.tokenizer.fingerprint != known.fingerprint
    assert second.fingerprint == with_known.fingerprint
    assert prepare_once(str(texts), **options, learnt=known) == first
    assert prepare_once(str(texts), **options, learnt=second.tokenizer) == second.directory


def test_a_piece_has_an_end():
    """What is learnt from one takes the square of its length, in a library that hears no signal."""
    long = "x" * 3000 + "-" * 3000 + " " * 3000 + "中" * 3000
    learnt = BytePairs(600).learn([long])
    assert learnt.decode(learnt.encode(long)) == long
    assert (
        max(len(piece) for piece in learnt.pieces(range(learnt.vocab_size))) == 257
    )  # with the space before it
