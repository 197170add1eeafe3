"""Text to token ids and back."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike

from truestep.config import byte_pairs
from truestep.data.bpe import DEFINITION_LIMIT_BYTES, BytePairs, BytePairTokenizer
from truestep.data.pieces import checked_ids, decode_bytes, pieces_of
from truestep.storage import FileRecord, StorageError, read_file

DEFINITION = "tokenizer.json"


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
        return decode_bytes(self._bytes(ids))

    def pieces(self, ids: ArrayLike) -> list[str]:
        """Return the text that each of `ids` adds; a broken character stands at its last byte.

        Errors: ValueError for an id that is not a byte.
        """
        return pieces_of(self._bytes(ids))

    def _bytes(self, ids: ArrayLike) -> list[bytes]:
        values = checked_ids(ids, self.vocab_size)
        return [bytes([byte]) if byte != self.end_of_document else b"" for byte in values]


def find_tokenizer(name: str) -> Tokenizer | BytePairs:
    """Return the tokenizer of that name, or what it is to be learnt by.

    Errors: ValueError for a name that is unknown.
    """
    size = byte_pairs(name)
    return ByteTokenizer() if size is None else BytePairs(size)


def load_tokenizer(
    name: str, directory: Path, record: FileRecord | None = None, fingerprint: str | None = None
) -> Tokenizer:
    """Return the tokenizer of that name; one that was learnt lies in `directory`, by DEFINITION.

    That file is not parsed before it was compared with its record and fingerprint, if given.
    Errors: ValueError for a name that is unknown or another fingerprint; StorageError for a file
    that does not serve.
    """
    tokenizer = find_tokenizer(name)
    if not isinstance(tokenizer, BytePairs):
        return tokenizer
    path = directory / DEFINITION
    definition = read_file(path, record, limit=DEFINITION_LIMIT_BYTES)
    found = hashlib.sha256(definition).hexdigest()
    if fingerprint not in {None, found}:
        raise ValueError(
            f"{path} is not the tokenizer that was recorded with it (fingerprint "
            f"{fingerprint[:12]}, now {found[:12]}); restore it"
        )
    try:
        return BytePairTokenizer(name, definition)
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from None
