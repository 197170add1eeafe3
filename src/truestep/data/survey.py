"""What will be written of a source: which documents, in which split, under which fingerprint.

All of the text is read, a piece at a time, to hash it: that decides the split and the fingerprint.
"""

import hashlib
import json
from dataclasses import dataclass

from truestep.data.bpe import BytePairs
from truestep.data.corpus import CorpusError, Document, Say, find_documents
from truestep.data.tokenizer import Tokenizer
from truestep.data.tokens import is_prepared
from truestep.observe.text import count

_SPLITS = ("train", "validation")
# A split by whole files that holds out less or more than this share of the text is no good.
_LEAST_SHARE, _MOST_SHARE = 0.04, 0.25


@dataclass(frozen=True)
class Hashed:
    """A document as it was when it was first read."""

    document: Document
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Survey:
    """What is going to be written."""

    source: str
    splits: dict[str, list[Hashed]]
    fingerprint: str


def take_survey(source: str, validation: str, tokenizer: Tokenizer | BytePairs, say: Say) -> Survey:
    """Read all of a source and decide what becomes of it.

    Errors: CorpusError for a source, or a validation, without text or that is prepared already.
    """
    if is_prepared(source):
        raise CorpusError(f"source={source!r} is already prepared; give the text it came from")
    documents = _hash_all("source", source, say)
    if validation == "auto":
        train, held_out = _split(source, documents, say)
    else:
        held_out = _hash_all("validation", validation, say)
        hashes = {document.sha256 for document in held_out}
        train = [document for document in documents if document.sha256 not in hashes]
        if not train:
            raise CorpusError(f"validation={validation!r} has all the text of source={source!r}")
        if len(train) < len(documents):
            left_out = count(len(documents) - len(train), "file")
            say(f"left out {left_out} found in {validation}, too")
    splits = dict(zip(_SPLITS, (train, held_out), strict=True))
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for split, members in splits.items():
        for member in members:
            entry = [split, member.document.form, member.document.name, member.sha256]
            digest.update(json.dumps(entry).encode() + b"\n")
    return Survey(source, splits, digest.hexdigest())


def readable_documents(source: str, say: Say) -> list[Document]:
    """Return the documents of a source that are text, and not empty; `say` is told of the others.

    Errors: CorpusError for a source without text.
    """
    return [member.document for member in _hash_all("source", source, say)]


def _hash_all(field: str, source: str, say: Say) -> list[Hashed]:
    """Read all of a source and return the documents that are text, and not empty."""
    hashed, problems = [], []
    try:
        documents = find_documents(source, say)
    except CorpusError as error:
        raise CorpusError(f"{field}: {error}") from None
    for document in documents:
        try:
            member = _hash(document)
        except CorpusError as error:
            problems.append(error)
        else:
            hashed += [member] if member.num_bytes else []
    if not hashed:
        reason = problems[0] if problems else f"{source!r} has no text in it"
        raise CorpusError(f"{field}: {reason}")
    if problems:
        say(f"{source}: skipped {count(len(problems), 'file')}, not UTF-8 text: {problems[0]}")
    return hashed


def _hash(document: Document) -> Hashed:
    digest, num_bytes = hashlib.sha256(), 0
    for piece in document.source_pieces():
        data = piece.encode()
        digest.update(data)
        num_bytes += len(data)
    return Hashed(document, digest.hexdigest(), num_bytes)


def _split(source: str, documents: list[Hashed], say: Say) -> tuple[list[Hashed], list[Hashed]]:
    """Hold out about a tenth, of the files if they can be divided so, else of every file."""
    total = sum(member.num_bytes for member in documents)
    for chosen in (_hashes_of_a_tenth(documents), _hashes_of_a_tenth_by_size(documents, total)):
        held_out = [member for member in documents if member.sha256 in chosen]
        share = sum(member.num_bytes for member in held_out) / total
        if _LEAST_SHARE <= share <= _MOST_SHARE:
            files = count(len(documents), "file")
            say(f"validation: {len(held_out):,} of {files}, {share:.1%} of the text")
            return [member for member in documents if member.sha256 not in chosen], held_out
    return _cut_tails(source, documents, say)


def _hashes_of_a_tenth(documents: list[Hashed]) -> set[str]:
    """Return the smallest hashes of content: no file moves because others come, go or move."""
    return {m.sha256 for m in documents if int(m.sha256[:8], 16) < 2**32 // 10}


def _hashes_of_a_tenth_by_size(documents: list[Hashed], total: int) -> set[str]:
    """Return the smallest hashes that together have a tenth of the text: for few files."""
    chosen, size = set(), 0
    for member in sorted(documents, key=lambda member: member.sha256):
        if size < total / 10 and size + member.num_bytes <= _MOST_SHARE * total:
            chosen.add(member.sha256)
            size += member.num_bytes
    return chosen


def _cut_tails(source: str, documents: list[Hashed], say: Say) -> tuple[list[Hashed], list[Hashed]]:
    train, held_out = [], []
    for member in documents:
        parts = member.document.cut_tail()
        train.append(_hash(parts[0]) if parts else member)
        held_out += [_hash(parts[1])] if parts else []
    if not held_out:
        raise CorpusError(
            f"source={source!r} is too short to hold out a tenth for validation; give more text, "
            "or name a validation file"
        )
    say(f"validation: the last tenth of {'the file' if len(documents) == 1 else 'every file'}")
    return train, held_out
