"""Prepare a corpus: split it, tokenize it and write it as a directory of token shards.

The text is read twice, a piece at a time: once to hash it, which decides the split and the
fingerprint, and once to write it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from truestep.data.bpe import BytePairs, BytePairTokenizer
from truestep.data.corpus import CorpusError, Document, Say, find_documents
from truestep.data.shards import SHARD_TOKENS, write_split
from truestep.data.tokenizer import DEFINITION, Tokenizer
from truestep.data.tokens import (
    FORMAT,
    FORMAT_VERSION,
    PreparedData,
    SplitRecord,
    dtype_of,
    is_prepared,
    open_prepared,
)
from truestep.manifest import MANIFEST, DirectoryWriter
from truestep.observe.text import count
from truestep.storage import LOCAL, Storage, StorageError

_SPLITS = ("train", "validation")
# A split by whole files that holds out less or more than this share of the text is no good.
_LEAST_SHARE, _MOST_SHARE = 0.04, 0.25


@dataclass(frozen=True)
class _Hashed:
    """A document as it was when it was first read."""

    document: Document
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class _Survey:
    """What is going to be written."""

    source: str
    splits: dict[str, list[_Hashed]]
    fingerprint: str


def prepare(
    source: str,
    target: Path,
    *,
    tokenizer: Tokenizer | BytePairs,
    validation: str = "auto",
    storage: Storage = LOCAL,
    shard_tokens: int = SHARD_TOKENS,
    say: Say = lambda _: None,
) -> PreparedData:
    """Write the token shards of `source` to the new directory `target` and open it.

    With `validation="auto"` about a tenth is held out: whole files, chosen by the hash of their
    content, or the last tenth of every file where no choice of files comes near a tenth (a single
    file, or one that outweighs the others). Otherwise `validation` names the text to validate on.

    Errors: CorpusError for a source that does not serve, StorageError or OSError for a target that
    cannot be written.
    """
    if target.exists():
        raise StorageError(f"{target}: exists already; name a new directory or remove it")
    _check_writable(target, storage)
    survey = _survey(source, validation, tokenizer, say)
    return _write(
        survey,
        target,
        tokenizer=tokenizer,
        storage=storage,
        shard_tokens=shard_tokens,
        say=say,
    )


def prepare_once(
    source: str,
    cache: Path,
    *,
    tokenizer: Tokenizer | BytePairs,
    learnt: BytePairTokenizer | None = None,
    validation: str = "auto",
    storage: Storage = LOCAL,
    shard_tokens: int = SHARD_TOKENS,
    say: Say = lambda _: None,
) -> Path:
    """Return a directory of `source`'s token shards, below `cache`, written only if need be.

    Its name holds the fingerprint, so edited text is prepared anew. A source that is a prepared
    directory is returned as it is; it has its own validation. Processes that prepare the same text
    at one time all end with the same directory. Errors as for `prepare`.

    `learnt` is what an earlier learning of `tokenizer` gave, to be used instead of learning anew.
    """
    if is_prepared(source):
        if validation != "auto":
            raise CorpusError(
                f"validation={validation!r} cannot be used with {source!r}, which was prepared "
                "with its own; leave it at auto or prepare the text again"
            )
        return Path(source)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(os.path.abspath(source)).stem[:64])
    stem = stem.strip(".-") or "text"
    if not any(cache.glob(f"{stem}-*")):
        _check_writable(cache / stem, storage)
    survey = _survey(source, validation, tokenizer, say)
    target = cache / f"{stem}-{survey.fingerprint[:12]}"
    if learnt is not None and not _is_prepared_with(learnt, target):
        # Beside what is learnt from this text now, maybe by another version of the library.
        target = cache / f"{stem}-{learnt.fingerprint[:12]}-{survey.fingerprint[:12]}"
        tokenizer = learnt
    if not target.exists():
        try:
            _write(
                survey,
                target,
                tokenizer=tokenizer,
                storage=storage,
                shard_tokens=shard_tokens,
                say=say,
            )
        except OSError:
            if not (target / MANIFEST).is_file():  # else another process was faster
                raise
    known = None if isinstance(tokenizer, BytePairs) else tokenizer
    found = _open(target, known).fingerprint
    if found != survey.fingerprint:
        raise StorageError(
            f"{target}: expected fingerprint {survey.fingerprint}, found {found}; remove it to "
            "prepare it again"
        )
    return target


def _open(target: Path, tokenizer: Tokenizer | None = None) -> PreparedData:
    try:
        return open_prepared(target, tokenizer)
    except StorageError as error:
        raise StorageError(f"{error}; remove {target} to prepare it again") from None


def _is_prepared_with(learnt: Tokenizer, target: Path) -> bool:
    return target.exists() and _open(target).tokenizer.fingerprint == learnt.fingerprint


def _check_writable(target: Path, storage: Storage) -> None:
    """Write and remove a file beside `target`, before anything costly is done."""
    try:
        with DirectoryWriter(target, storage) as writer:
            writer.write("probe", [b"truestep"])
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{target}: cannot be written: {reason}; use another place") from None


def _survey(source: str, validation: str, tokenizer: Tokenizer | BytePairs, say: Say) -> _Survey:
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
    return _Survey(source, splits, digest.hexdigest())


def readable_documents(source: str, say: Say) -> list[Document]:
    """Return the documents of a source that are text, and not empty; `say` is told of the others.

    Errors: CorpusError for a source without text.
    """
    return [member.document for member in _hash_all("source", source, say)]


def _hash_all(field: str, source: str, say: Say) -> list[_Hashed]:
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


def _hash(document: Document) -> _Hashed:
    digest, num_bytes = hashlib.sha256(), 0
    for piece in document.source_pieces():
        data = piece.encode()
        digest.update(data)
        num_bytes += len(data)
    return _Hashed(document, digest.hexdigest(), num_bytes)


def _split(source: str, documents: list[_Hashed], say: Say) -> tuple[list[_Hashed], list[_Hashed]]:
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


def _hashes_of_a_tenth(documents: list[_Hashed]) -> set[str]:
    """Return the smallest hashes of content: no file moves because others come, go or move."""
    return {m.sha256 for m in documents if int(m.sha256[:8], 16) < 2**32 // 10}


def _hashes_of_a_tenth_by_size(documents: list[_Hashed], total: int) -> set[str]:
    """Return the smallest hashes that together have a tenth of the text: for few files."""
    chosen, size = set(), 0
    for member in sorted(documents, key=lambda member: member.sha256):
        if size < total / 10 and size + member.num_bytes <= _MOST_SHARE * total:
            chosen.add(member.sha256)
            size += member.num_bytes
    return chosen


def _cut_tails(
    source: str, documents: list[_Hashed], say: Say
) -> tuple[list[_Hashed], list[_Hashed]]:
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


def _write(
    survey: _Survey,
    target: Path,
    *,
    tokenizer: Tokenizer | BytePairs,
    storage: Storage,
    shard_tokens: int,
    say: Say,
) -> PreparedData:
    if isinstance(tokenizer, BytePairs):
        say(f"learning {tokenizer.vocab_size:,} byte pairs from the text to train on")
        texts = (piece for member in survey.splits["train"] for piece in member.document.pieces())
        tokenizer = tokenizer.learn(texts)
    with DirectoryWriter(target, storage) as writer:
        if isinstance(tokenizer, BytePairTokenizer):
            writer.write(DEFINITION, [tokenizer.definition])
        records: dict[str, SplitRecord] = {}
        for split, members in survey.splits.items():
            documents = ((member.document.name, _encoded(member, tokenizer)) for member in members)
            records[split] = write_split(writer, split, documents, tokenizer, shard_tokens)
            if records[split].num_tokens == 0:
                raise CorpusError(f"source={survey.source!r} gives no text for the {split} split")
        writer.commit(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "source": survey.source,
                "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype_of(tokenizer.vocab_size),
                "fingerprint": survey.fingerprint,
                **{split: record.model_dump() for split, record in records.items()},
            }
        )
    say(
        f"wrote {count(records['train'].num_tokens, 'token')} to train on and "
        f"{records['validation'].num_tokens:,} to validate on to {os.fspath(target)!r}"
    )
    return open_prepared(target, tokenizer)


def _encoded(member: _Hashed, tokenizer: Tokenizer) -> Iterator[Int64[np.ndarray, "_"]]:
    """Yield the ids of a document, and make sure that it is the text that was hashed."""
    digest = hashlib.sha256()
    for piece in member.document.pieces(digest.update):
        yield tokenizer.encode(piece)
    if digest.hexdigest() != member.sha256:
        raise CorpusError(
            f"{str(member.document.path)!r} was changed while it was being prepared; prepare again"
        )
