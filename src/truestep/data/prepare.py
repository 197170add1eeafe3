"""Prepare a corpus: split it, tokenize it and write it as a directory of token shards.

The text is read a piece at a time: once for its survey, once to learn byte pairs if any are wanted,
and once to write it.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from truestep.data.bpe import BytePairs, BytePairTokenizer
from truestep.data.corpus import Say
from truestep.data.documents import Document, Record
from truestep.data.formats import CorpusError
from truestep.data.shards import SHARD_TOKENS, write_split
from truestep.data.survey import Survey, changed, take_survey
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


def prepare(
    source: str,
    target: Path,
    *,
    tokenizer: Tokenizer | BytePairs,
    validation: str = "auto",
    text_field: str = "text",
    storage: Storage = LOCAL,
    shard_tokens: int = SHARD_TOKENS,
    say: Say = lambda _: None,
) -> PreparedData:
    """Write the token shards of `source` to the new directory `target` and open it.

    With `validation="auto"` about a tenth is held out: whole documents, chosen by the hash of their
    content, or the last tenth of every file where no choice comes near a tenth (a single text, or
    one that outweighs the others). Otherwise `validation` names the text to validate on.
    `text_field` names the text of a line of JSON, or the column of a table.

    Errors: CorpusError for a source that does not serve, StorageError or OSError for a target that
    cannot be written.
    """
    if target.exists():
        raise StorageError(f"{target}: exists already; name a new directory or remove it")
    _check_writable(target, storage)
    survey = take_survey(source, validation, tokenizer, say, text_field)
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
    text_field: str = "text",
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
    survey = take_survey(source, validation, tokenizer, say, text_field)
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


def _write(
    survey: Survey,
    target: Path,
    *,
    tokenizer: Tokenizer | BytePairs,
    storage: Storage,
    shard_tokens: int,
    say: Say,
) -> PreparedData:
    if isinstance(tokenizer, BytePairs):
        say(f"learning {tokenizer.vocab_size:,} byte pairs from the text to train on")
        members = survey.splits["train"]
        texts = (
            p for member in members for document, _ in member.documents() for p in document.pieces()
        )
        asked, tokenizer = tokenizer.vocab_size, tokenizer.learn(texts)
        if tokenizer.vocab_size < asked:
            say(f"the text gives no more than {tokenizer.vocab_size:,} ids")
    with DirectoryWriter(target, storage) as writer:
        if isinstance(tokenizer, BytePairTokenizer):
            writer.write(DEFINITION, [tokenizer.definition])
        records: dict[str, SplitRecord] = {}
        for split, members in survey.splits.items():
            documents = (
                (document.name, _encoded(document, sha256, tokenizer))
                for member in members
                for document, sha256 in member.documents()
            )
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


def _encoded(
    document: Document | Record, sha256: bytes, tokenizer: Tokenizer
) -> Iterator[Int64[np.ndarray, "_"]]:
    """Yield the ids of a document, and make sure that it is the text that was hashed."""
    digest = hashlib.sha256()
    for piece in document.pieces(digest.update):
        yield tokenizer.encode(piece)
    if digest.digest() != sha256:
        raise changed(document)
