"""What will be written of a source: which documents, in which split, under which fingerprint.

All of the text is read, a piece at a time, to hash it: that decides the split and the fingerprint.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from truestep.data.bpe import BytePairs
from truestep.data.corpus import Say, find_files
from truestep.data.documents import Document, Record, TextFile
from truestep.data.formats import CorpusError
from truestep.data.hashing import Hashed, HashedFiles, hash_file, hash_files
from truestep.data.tokenizer import Tokenizer
from truestep.data.tokens import is_prepared
from truestep.observe.text import count

_SPLITS = ("train", "validation")
# A split by documents that holds out less or more than this share of the text is no good.
_LEAST_SHARE, _MOST_SHARE = 0.04, 0.25

Choice = Callable[[np.ndarray], np.ndarray]
"""Says of an array of ROW which documents are meant."""


Hashing = Callable[[str, list[TextFile]], HashedFiles]


@dataclass(frozen=True)
class Survey:
    """What is going to be written."""

    source: str
    splits: dict[str, list[Hashed]]
    fingerprint: str


@dataclass(frozen=True)
class Listing:
    """The files of a source, and of a text to validate on if one was named."""

    source: str
    validation: str
    files: list[TextFile]
    held_out: list[TextFile] | None


def list_files(source: str, validation: str, say: Say, field: str = "text") -> Listing:
    """Find the files of a source, and of `validation` unless that is auto; none is read.

    Errors: CorpusError for a source, or a validation, without files or that is prepared already.
    """
    if is_prepared(source):
        raise CorpusError(f"source={source!r} is already prepared; give the text it came from")
    with _field_named("source"):
        files = find_files(source, field, say)
    with _field_named("validation"):
        held_out = None if validation == "auto" else find_files(validation, field, say)
    return Listing(source, validation, files, held_out)


def take_survey(
    listing: Listing, tokenizer: Tokenizer | BytePairs, say: Say, hashing: Hashing | None = None
) -> Survey:
    """Read all files and decide what becomes of them; `hashing` does so in place of this process.

    Errors: CorpusError for a source, or a validation, without text.
    """
    source, validation = listing.source, listing.validation
    hashing = hashing or (lambda _, files: hash_files(files))
    members = _hash_all("source", source, listing.files, hashing, say)
    if listing.held_out is None:
        train, held_out = _split(source, members, say)
    else:
        held_out = _hash_all("validation", validation, listing.held_out, hashing, say)
        train, _ = _divide(members, _among(np.concatenate([m.rows for m in held_out])))
        if not train:
            raise CorpusError(f"validation={validation!r} has all the text of source={source!r}")
        if left_out := _num_documents(members) - _num_documents(train):
            say(f"left out {count(left_out, _noun(members))} found in {validation}, too")
    splits = dict(zip(_SPLITS, (train, held_out), strict=True))
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for split, parts in splits.items():
        for member in parts:
            entry = [split, member.file.form, member.file.name, _hash_of(member)]
            digest.update(json.dumps(entry).encode() + b"\n")
    return Survey(source, splits, digest.hexdigest())


def readable_documents(source: str, say: Say, field: str) -> Iterator[Document | Record]:
    """Yield the documents of a source that are text, and not empty; `say` is told of the others.

    Errors: CorpusError for a source without text.
    """
    listing = list_files(source, "auto", say, field)
    for member in _hash_all("source", source, listing.files, lambda _, f: hash_files(f), say):
        yield from (document for document, _ in member.documents())


def _hash_of(member: Hashed) -> str:
    """Return what the fingerprint knows a file by: its text, or numbers, sizes and hashes of it."""
    if isinstance(member.file, Document):
        return bytes(member.rows["sha256"][0]).hex()
    return hashlib.sha256(member.rows.tobytes()).hexdigest()


@contextmanager
def _field_named(field: str) -> Iterator[None]:
    try:
        yield
    except CorpusError as error:
        raise CorpusError(f"{field}: {error}") from None


def _hash_all(
    field: str, source: str, files: list[TextFile], hashing: Hashing, say: Say
) -> list[Hashed]:
    """Read all files and return the documents that are text, and not empty."""
    with _field_named(field):
        found = hashing(field, files)
        if not found.members:
            text = f"{source!r} has no text in it"
            raise CorpusError(found.problems[0] if found.problems else text)
    if problems := found.problems:
        say(f"{source}: skipped {count(len(problems), 'file')}, not UTF-8 text: {problems[0]}")
    return found.members


def _split(source: str, members: list[Hashed], say: Say) -> tuple[list[Hashed], list[Hashed]]:
    """Hold out about a tenth, of the documents if they can be divided so, else of every file."""
    total = sum(member.num_bytes for member in members)
    for chosen in _choices(members, total):
        train, held_out = _divide(members, chosen)
        share = sum(member.num_bytes for member in held_out) / total
        if _LEAST_SHARE <= share <= _MOST_SHARE:
            documents = count(_num_documents(members), _noun(members))
            say(f"validation: {_num_documents(held_out):,} of {documents}, {share:.1%} of the text")
            return train, held_out
    return _cut_tails(source, members, say)


def _choices(members: list[Hashed], total: int) -> Iterator[Choice]:
    yield _in_a_tenth
    yield _among(_a_tenth_by_size(members, total))


def _divide(members: Iterable[Hashed], chosen: Choice) -> tuple[list[Hashed], list[Hashed]]:
    """Return the documents that are not chosen, and those that are."""
    others, those = [], []
    for member in members:
        mask = chosen(member.rows)
        others += member.those(~mask)
        those += member.those(mask)
    return others, those


def _in_a_tenth(rows: np.ndarray) -> np.ndarray:
    """Choose the smallest hashes of content: no document moves because others come, go or move."""
    heads = np.ascontiguousarray(rows["sha256"][:, :4]).view(">u4").ravel()
    return np.asarray(heads < 2**32 // 10)


def _a_tenth_by_size(members: list[Hashed], total: int) -> np.ndarray:
    """Return the smallest hashes that together have a tenth of the text: for few documents."""
    rows = np.concatenate([member.rows for member in members])
    rows = rows[np.argsort(_keys(rows), kind="stable")]
    chosen, size = np.zeros(len(rows), dtype=bool), 0
    for place, num_bytes in enumerate(rows["num_bytes"].tolist()):
        if size < total / 10 and size + num_bytes <= _MOST_SHARE * total:
            chosen[place] = True
            size += num_bytes
    return rows[chosen]


def _among(rows: np.ndarray) -> Choice:
    """Choose the documents that have the content of one of these."""
    known = frozenset(_keys(rows).tolist())
    return lambda others: np.array([key in known for key in _keys(others).tolist()], dtype=bool)


def _keys(rows: np.ndarray) -> np.ndarray:
    """Return the hashes as strings of 32 bytes, which compare as the numbers do."""
    return np.array(np.ascontiguousarray(rows["sha256"]).view("S32").ravel())


def _num_documents(members: Iterable[Hashed]) -> int:
    return sum(len(member.rows) for member in members)


def _noun(members: Iterable[Hashed]) -> str:
    return "file" if all(isinstance(m.file, Document) for m in members) else "document"


def _cut_tails(source: str, members: list[Hashed], say: Say) -> tuple[list[Hashed], list[Hashed]]:
    train, held_out = [], []
    for member in members:
        parts = member.file.cut_tail() if isinstance(member.file, Document) else None
        train.append(hash_file(parts[0]) if parts else member)
        held_out += [hash_file(parts[1])] if parts else []
    if not held_out:
        raise CorpusError(
            f"source={source!r} is too short to hold out a tenth for validation; give more text, "
            "or name a validation file"
        )
    say(f"validation: the last tenth of {'the file' if len(members) == 1 else 'every file'}")
    return train, held_out
