"""Prepare a corpus: split it, tokenize it and write it as a directory of token shards.

The text is read a piece at a time: once for its survey, once to learn byte pairs if any are wanted,
and once to write it.
"""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from truestep.data.bpe import BytePairs, BytePairTokenizer
from truestep.data.corpus import Say
from truestep.data.formats import CorpusError, stat_of
from truestep.data.parts import PART_BYTES, Workshop, join_parts
from truestep.data.shards import SHARD_TOKENS
from truestep.data.survey import Survey, list_files, take_survey
from truestep.data.tokenizer import DEFINITION, Tokenizer
from truestep.data.tokens import (
    FORMAT,
    FORMAT_VERSION,
    PreparedData,
    dtype_of,
    is_prepared,
    open_prepared,
)
from truestep.data.workers import count_workers
from truestep.data.workplace import OUT, fresh_place, identity, kept_place
from truestep.manifest import MANIFEST, DirectoryWriter
from truestep.observe.text import count
from truestep.storage import LOCAL, Storage, StorageError, read_file, replace_file


def prepare(
    source: str,
    target: Path,
    *,
    tokenizer: Tokenizer | BytePairs,
    validation: str = "auto",
    text_field: str = "text",
    storage: Storage = LOCAL,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | Literal["auto"] = 1,
    part_bytes: int = PART_BYTES,
    say: Say = lambda _: None,
) -> PreparedData:
    """Write the token shards of `source` to the new directory `target` and open it.

    With `validation="auto"` about a tenth is held out: whole documents, chosen by the hash of their
    content, or the last tenth of every file where no choice comes near a tenth (a single text, or
    one that outweighs the others). Otherwise `validation` names the text to validate on.
    `text_field` names the text of a line of JSON, or the column of a table.

    So many `workers` share the files; what is written is the same for any number. From `part_bytes`
    of files on, a preparation that was killed, or failed, is taken up by the same call: what was
    done of it lies beside `target`, in parts of that size or of one file.

    Errors: CorpusError for a source that does not serve, StorageError or OSError for a target that
    cannot be written.
    """
    count_workers(workers)
    if target.exists():
        raise StorageError(f"{target}: exists already; name a new directory or remove it")
    _check_writable(target, storage)
    listing = list_files(source, validation, say, text_field)
    files = [*listing.files, *(listing.held_out or [])]
    with ExitStack() as stack:
        if sum(stat_of(file.path).st_size for file in files) < part_bytes:
            place = stack.enter_context(fresh_place(target, storage))
        else:
            job = {
                "files": [identity(listing.files), identity(listing.held_out or [])],
                "source": [listing.source, listing.validation, text_field],
                "tokenizer": tokenizer.fingerprint,
                "sizes": [shard_tokens, part_bytes],
            }
            place = stack.enter_context(kept_place(target, storage, job, say))
        workshop = Workshop(place, storage, count_workers(workers), part_bytes, say)
        survey = take_survey(listing, tokenizer, say, workshop.hash_files)
        return _write(survey, target, tokenizer, workshop, shard_tokens)


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
    survey = take_survey(list_files(source, validation, say, text_field), tokenizer, say)
    target = cache / f"{stem}-{survey.fingerprint[:12]}"
    if learnt is not None and not _is_prepared_with(learnt, target):
        # Beside what is learnt from this text now, maybe by another version of the library.
        target = cache / f"{stem}-{learnt.fingerprint[:12]}-{survey.fingerprint[:12]}"
        tokenizer = learnt
    if not target.exists():
        try:
            with fresh_place(target, storage) as place:
                workshop = Workshop(place, storage, 1, PART_BYTES, say)
                _write(survey, target, tokenizer, workshop, shard_tokens)
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
    tokenizer: Tokenizer | BytePairs,
    workshop: Workshop,
    shard_tokens: int,
) -> PreparedData:
    if isinstance(tokenizer, BytePairs):
        tokenizer = _learnt(tokenizer, survey, workshop)
    parts = workshop.write_splits(survey.splits, tokenizer, shard_tokens)
    with DirectoryWriter(target, workshop.storage, begun=workshop.place / OUT) as writer:
        writer.keep_only("*.bin")  # that an earlier process moved there
        if isinstance(tokenizer, BytePairTokenizer):
            writer.write(DEFINITION, [tokenizer.definition])
        records = {split: join_parts(paths, split, writer) for split, paths in parts.items()}
        for split, record in records.items():
            if record.num_tokens == 0:
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
    workshop.say(
        f"wrote {count(records['train'].num_tokens, 'token')} to train on and "
        f"{records['validation'].num_tokens:,} to validate on to {os.fspath(target)!r}"
    )
    return open_prepared(target, tokenizer)


def _learnt(pairs: BytePairs, survey: Survey, workshop: Workshop) -> BytePairTokenizer:
    """Return the byte pairs of the text to train on, learnt unless an earlier process did so."""
    path = workshop.place / DEFINITION
    if path.is_file():
        return BytePairTokenizer(pairs.name, read_file(path))
    workshop.say(f"learning {pairs.vocab_size:,} byte pairs from the text to train on")
    documents = (document for m in survey.splits["train"] for document, _ in m.documents())
    tokenizer = pairs.learn(piece for document in documents for piece in document.pieces())
    if tokenizer.vocab_size < pairs.vocab_size:
        workshop.say(f"the text gives no more than {tokenizer.vocab_size:,} ids")
    replace_file(workshop.storage, path, tokenizer.definition)
    return tokenizer
