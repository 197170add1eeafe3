"""Text to token ids and back."""

import codecs
import hashlib
from typing import Protocol

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike


class Tokenizer(Protocol):
    """What is needed of a tokenizer; its ids are 0 to vocab_size - 1."""

    @property
    def name(self) -> str:
        """The name that `load_tokenizer` and manifests know it by."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    @property
    def end_of_document(self) -> int:
        """The id that ends every document; no text encodes to it."""

    @property
    def token_bytes(self) -> Int64[np.ndarray, "V"]:
        """The UTF-8 bytes each id stands for; 0 for the end of a document."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides which ids a text gets."""

    def encode(self, text: str) -> Int64[np.ndarray, "N"]:
        """Return the ids of `text`, without an end of document.

        Errors: ValueError for text that has no ids.
        """

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`; what is not a character becomes U+FFFD."""

    def pieces(self, ids: ArrayLike) -> list[str]:
        """Return the text that each of `ids` adds; joined, they are `decode(ids)`.

        A character of several ids stands at the one that completes it; the others, and the end of
        a document, add nothing.
        """


class ByteTokenizer:
    """One id a byte of UTF-8; NUL, which text does not contain, ends a document."""

    name = "bytes"
    vocab_size = 256
    end_of_document = 0

    def __init__(self) -> None:
        self.token_bytes = np.ones(self.vocab_size, dtype=np.int64)
        self.token_bytes[self.end_of_document] = 0
        definition = b"truestep tokenizer 1: ids are UTF-8 bytes, 0 ends a document"
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    def encode(self, text: str) -> Int64[np.ndarray, "N"]:
        """Return the UTF-8 bytes of `text`.

        Errors: ValueError for a NUL, which would end the document, with its position.
        """
        if (position := text.find("\0")) >= 0:
            raise ValueError(
                f"the text has a NUL at character {position}, which marks the end of a document; "
                "remove it"
            )
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`; the end of a document is nothing, a broken character U+FFFD.

        Errors: ValueError for an id that is not a byte.
        """
        return self._bytes(ids).replace(b"\0", b"").decode(errors="replace")

    def pieces(self, ids: ArrayLike) -> list[str]:
        """Return the text that each of `ids` adds; a broken character stands at its last byte.

        Errors: ValueError for an id that is not a byte.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces: list[str] = []
        last = 0  # the last byte of text: what it began may turn out to be broken
        for byte in self._bytes(ids):
            pieces.append("")
            if byte == self.end_of_document:
                continue
            text = decoder.decode(bytes([byte]))
            if text and (len(text) > 1 or decoder.getstate()[0]):
                pieces[last], text = text[0], text[1:]  # what was begun is broken: U+FFFD
            last = len(pieces) - 1
            pieces[last] = text
        if rest := decoder.decode(b"", final=True):
            pieces[last] = rest
        return pieces

    def _bytes(self, ids: ArrayLike) -> bytes:
        values = np.asarray(ids).reshape(-1)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            wrong = values[(values < 0) | (values >= self.vocab_size)][0]
            raise ValueError(f"token id {wrong} is not a byte; ids must be 0 to 255")
        return values.astype(np.uint8).tobytes()


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name.

    Errors: ValueError for a name that is unknown.
    """
    if name != ByteTokenizer.name:
        raise ValueError(f"tokenizer={name!r} is not known; use {ByteTokenizer.name!r}")
    return ByteTokenizer()
