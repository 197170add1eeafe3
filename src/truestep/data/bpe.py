"""Byte-level BPE: a tokenizer learnt from text, in the format of the `tokenizers` library."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike

from truestep.data.pieces import checked_ids, decode_bytes, pieces_of
from truestep.settings import shown

END_OF_DOCUMENT = "<|endoftext|>"
DEFINITION_LIMIT_BYTES = 2**26  # a million ids of ordinary text take less
# A word with its space before it, digits three at a time, signs, or space up to the next word: line
# ends and indentation are one piece. Radford et al. 2019 (GPT-2), without its English contractions,
# and of 256 characters at most: what is learnt from one piece takes the square of its length.
_PIECES = r" ?\p{L}{1,256}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,256}|\s{1,256}(?!\S)|\s{1,256}"
_RECIPE = f"truestep byte-level BPE 2: {_PIECES}"


@dataclass(frozen=True)
class BytePairs:
    """A tokenizer of `vocab_size` ids at most, still to be learnt from the text it is for."""

    vocab_size: int

    @property
    def name(self) -> str:
        """The name that settings and manifests know it by."""
        return f"bpe-{self.vocab_size}"

    @property
    def fingerprint(self) -> str:
        """The sha256 of everything beside the text that decides what is learnt."""
        return hashlib.sha256(f"{_RECIPE}: {self.vocab_size}".encode()).hexdigest()

    def learn(self, texts: Iterable[str]) -> "BytePairTokenizer":
        """Return the tokenizer of these texts; short ones give fewer ids than `vocab_size`."""
        from tokenizers import Tokenizer, pre_tokenizers, trainers

        from truestep.runtime import tokenizers_on_one_thread  # imports torch

        backend = Tokenizer.from_str(_as_json({END_OF_DOCUMENT: 0}, []))
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        with tokenizers_on_one_thread():
            _beside(lambda: backend.train_from_iterator(texts, trainer))
        model = json.loads(backend.to_str())["model"]
        return BytePairTokenizer(self.name, _as_json(model["vocab"], model["merges"]).encode())


def _beside(call: Callable[[], object]) -> None:
    """Call in a thread of its own, and wait: signals are heard, which the library holds back.

    Where one raises an exception here, the call goes on until it is done or the process ends.
    """
    done: Future[object] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 told to whoever waits
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    done.result()


class BytePairTokenizer:
    """Merges the bytes of UTF-8 into the pairs it has learnt: Sennrich et al. 2016, on bytes.

    `definition` is the content of a `tokenizer.json` as it is learnt here: its vocabulary and its
    merges are its own, and all else is always the same.
    Errors: ValueError for another definition, of which text would get other ids, or none.
    """

    end_of_document = 0

    def __init__(self, name: str, definition: bytes) -> None:
        from tokenizers import Tokenizer

        self.name, self.definition = name, definition
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        vocabulary, merges = _read(definition)
        self._parts = _parts_of(vocabulary)
        try:  # what the library is given has nothing else in it that was not looked at
            self._backend = Tokenizer.from_str(_as_json(vocabulary, merges))
        except Exception as error:  # noqa: BLE001 the library raises Exception itself
            raise _refusal(shown(str(error))) from None
        self._backend.encode_special_tokens = True  # where text has their names, they are text
        self.vocab_size = len(self._parts)
        self.token_bytes = np.array([len(part) for part in self._parts], dtype=np.int64)

    def __reduce__(self) -> tuple[type, tuple[str, bytes]]:
        """Go to another process as what it was made from, and be made anew there."""
        return type(self), (self.name, self.definition)

    def encode(self, text: str) -> Int64[np.ndarray, "N"]:
        """Return the ids of `text`, without an end of document."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`; the end of a document is nothing, a broken character U+FFFD.

        Errors: ValueError for an id outside the vocabulary.
        """
        return decode_bytes(self._bytes(ids))

    def pieces(self, ids: ArrayLike) -> list[str]:
        """Return the text that each of `ids` adds; a broken character stands at its last byte.

        Errors: ValueError for an id outside the vocabulary.
        """
        return pieces_of(self._bytes(ids))

    def starting_with(self, prefix: bytes) -> list[int]:
        """Return the ids whose bytes begin so."""
        return [number for number, part in enumerate(self._parts) if part.startswith(prefix)]

    def _bytes(self, ids: ArrayLike) -> list[bytes]:
        return [self._parts[number] for number in checked_ids(ids, self.vocab_size)]


def _content(vocabulary: Any, merges: Any) -> dict[str, Any]:
    """Return what a `tokenizer.json` holds, in the order in which the library writes it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": BytePairTokenizer.end_of_document,
                "content": END_OF_DOCUMENT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PIECES},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _as_json(vocabulary: Any, merges: Any) -> str:
    content = _content(vocabulary, merges)
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _read(definition: bytes) -> tuple[Any, Any]:
    """Return the vocabulary and the merges of a definition that is else as `_content` has it."""
    if len(definition) > DEFINITION_LIMIT_BYTES:
        raise ValueError(
            f"a tokenizer of {len(definition)} bytes is more than the {DEFINITION_LIMIT_BYTES} "
            "allowed here; use bpe-N with a lower N"
        )
    try:
        content = json.loads(definition.decode())
        vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refusal(shown(f"{type(error).__name__}: {error}")) from None
    found, expected = _flat(content), _flat(_content(vocabulary, merges))
    for field in expected | found:
        value, rule = found.get(field), expected.get(field)
        if value != rule:
            if field == "pre_tokenizer":
                raise _refusal(f"{field}={shown(value)} is not how this truestep cuts text")
            raise _refusal(f"{shown(field)}={shown(value)} must be {shown(rule)}")
    return vocabulary, merges


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    inner = {f"model.{field}": value for field, value in content["model"].items()}
    return {field: value for field, value in content.items() if field != "model"} | inner


def _parts_of(vocabulary: Any) -> list[bytes]:
    """Return the bytes of each id, with which every text can be written."""
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if {type(number) for number in numbers} != {int} or sorted(numbers) != [*range(len(numbers))]:
        raise _refusal("model.vocab must give each token an id, from 0 on without a gap")
    end, *tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if end != END_OF_DOCUMENT:
        raise _refusal(f"model.vocab must give id 0 to {END_OF_DOCUMENT}")
    codes = {character: byte for byte, character in _characters().items()}
    try:  # every byte of a token is written as one character
        parts = [bytes(codes[character] for character in token) for token in tokens]
    except KeyError as error:
        raise _refusal(f"model.vocab has {error.args[0]!a}, which is no byte") from None
    if b"" in parts:
        raise _refusal("model.vocab has an empty token")
    if missing := {bytes([byte]) for byte in range(256)} - set(parts):
        raise _refusal(f"model.vocab has no token of {min(missing)!r} alone")
    return [b"", *parts]


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"this is no tokenizer of byte-level BPE as it is learnt here ({reason}); restore it, or "
        "prepare the text again"
    )


def _characters() -> dict[int, str]:
    """Return the character that stands for each byte: itself if it can be seen, or one from U+0100.

    Source: Radford et al. 2019 (GPT-2).
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }
