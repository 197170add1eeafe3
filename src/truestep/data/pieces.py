"""From the bytes that tokens stand for back to text."""

import codecs
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


def checked_ids(ids: ArrayLike, vocab_size: int) -> list[int]:
    """Return the ids as integers. Errors: ValueError for one outside the vocabulary."""
    values = np.asarray(ids).reshape(-1)
    if values.size and not 0 <= values.min() <= values.max() < vocab_size:
        wrong = values[(values < 0) | (values >= vocab_size)][0]
        raise ValueError(f"token id {wrong} has no text; ids must be 0 to {vocab_size - 1}")
    numbers: list[int] = values.astype(np.int64).tolist()
    return numbers


def decode_bytes(parts: Iterable[bytes]) -> str:
    """Return the text of the bytes that each token stands for."""
    return b"".join(parts).decode(errors="replace")


def pieces_of(parts: Iterable[bytes]) -> list[str]:
    """Return the text that each token adds, of the bytes it stands for."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces: list[str] = []
    last = 0  # the token of the last byte: what it began may turn out to be broken
    for token, part in enumerate(parts):
        pieces.append("")
        for byte in part:
            text = decoder.decode(bytes([byte]))
            if text and (len(text) > 1 or decoder.getstate()[0]):
                pieces[last] += text[0]  # what was begun is broken: U+FFFD
                text = text[1:]
            last = token
            pieces[last] += text
    if rest := decoder.decode(b"", final=True):
        pieces[last] += rest
    return pieces
