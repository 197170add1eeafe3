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
    held: list[int] = []  # the token of each byte of a character that is begun
    for token, part in enumerate(parts):
        pieces.append("")
        for byte in part:
            text = decoder.decode(bytes([byte]))
            if not text:
                held.append(token)
                continue
            begun = [token] if decoder.getstate()[0] else []
            # This byte's own character comes last, unless it begins another; what comes before is
            # U+FFFD for what was begun: one, but for each byte of half a surrogate.
            broken, own = (text, "") if begun else (text[:-1], text[-1])
            _add(pieces, held, broken)
            pieces[token] += own
            held = begun
    _add(pieces, held, decoder.decode(b"", final=True))
    return pieces


def _add(pieces: list[str], tokens: list[int], characters: str) -> None:
    """Add the characters to the last of the tokens, one each."""
    for token, character in zip(tokens[len(tokens) - len(characters) :], characters, strict=True):
        pieces[token] += character
