"""Byte-level BPE: a tokenizer learnt from text, in the format of the `tokenizers` library."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike

from truestep.data.pieces import checked_ids, decode_bytes, pieces_of

END_OF_DOCUMENT = "<|endoftext|>"
# A word with its space before it, digits three at a time, signs, or space up to the next word: line
# ends and indentation are one piece. Radford et al. 2019 (GPT-2), without its English contractions.
_PIECES = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_RECIPE = f"truestep byte-level BPE 1: {_PIECES}"


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
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        from truestep.runtime import tokenizers_on_one_thread  # imports torch

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        with tokenizers_on_one_thread():
            backend.train_from_iterator(texts, trainer)
        return BytePairTokenizer(self.name, backend.to_str().encode())


class BytePairTokenizer:
    """Merges the bytes of UTF-8 into the pairs it has learnt: Sennrich et al. 2016, on bytes.

    `definition` is the content of a `tokenizer.json`, with an end of document and no normalizer.
    Errors: ValueError for another definition.
    """

    def __init__(self, name: str, definition: bytes) -> None:
        from tokenizers import Tokenizer

        self.name, self.definition = name, definition
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        try:
            self._backend = Tokenizer.from_buffer(definition)
            vocabulary = self._backend.get_vocab()
            self.end_of_document = vocabulary.pop(END_OF_DOCUMENT)
            # The library writes every byte of a token as one character.
            codes = {character: byte for byte, character in _characters().items()}
            parts = {id_: bytes(codes[c] for c in token) for token, id_ in vocabulary.items()}
        except Exception as error:  # noqa: BLE001 the library raises Exception itself
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"this is no tokenizer of byte-level BPE ({reason})") from None
        self._backend.encode_special_tokens = True  # where text has their names, they are text
        parts[self.end_of_document] = b""
        self.vocab_size = len(parts)
        self._parts = [parts[number] for number in range(self.vocab_size)]
        self.token_bytes = np.array([len(part) for part in self._parts], dtype=np.int64)

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

    def _bytes(self, ids: ArrayLike) -> list[bytes]:
        return [self._parts[number] for number in checked_ids(ids, self.vocab_size)]


def _characters() -> dict[int, str]:
    """Return the character that stands for each byte: itself if it can be seen, or one from U+0100.

    Source: Radford et al. 2019 (GPT-2).
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }
