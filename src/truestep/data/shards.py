"""Write token shards: the ids of documents, cut into files of one size."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import numpy as np
from jaxtyping import Int64

from truestep.data.tokenizer import Tokenizer
from truestep.data.tokens import SplitRecord, dtype_of
from truestep.manifest import DirectoryWriter

SHARD_TOKENS = 2**24  # 16 to 64 MiB, by the width of an id


def write_split(
    writer: DirectoryWriter,
    split: str,
    documents: Iterable[tuple[str, Iterable[Int64[np.ndarray, "_"]]]],
    tokenizer: Tokenizer,
    shard_tokens: int = SHARD_TOKENS,
) -> SplitRecord:
    """Write the shards and the list of documents of one split and return its record.

    A document is its name and its ids, in pieces; one without any id is left out, the others end
    with the end-of-document id. Memory holds a piece of one document and the list.

    Errors: ValueError for an id outside the tokenizer's vocabulary, naming the document.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    lines = bytearray()
    counts = {"tokens": 0, "bytes": 0, "documents": 0}

    def pieces() -> Iterator[Int64[np.ndarray, "_"]]:
        end = np.array([tokenizer.end_of_document], dtype=np.int64)
        for name, parts in documents:
            start = counts["tokens"]
            for part in parts:
                _check_ids(part, name, tokenizer)
                counts["tokens"] += part.size
                counts["bytes"] += int(tokenizer.token_bytes[part].sum())
                yield part
            if counts["tokens"] > start:
                lines.extend(json.dumps({"name": name, "start": start}).encode() + b"\n")
                counts["tokens"] += 1
                counts["documents"] += 1
                yield end

    dtype = np.dtype(dtype_of(tokenizer.vocab_size)).newbyteorder("<")
    shards = []
    for number, group in groupby(_cut(pieces(), shard_tokens), key=itemgetter(0)):
        shards.append(f"{split}-{number:05d}.bin")
        writer.write(shards[-1], (ids.astype(dtype).view(np.uint8) for _, ids in group))
    documents_file = f"{split}-documents.jsonl"
    writer.write(documents_file, [lines] if lines else [])
    return SplitRecord(
        shards=shards,
        documents=documents_file,
        num_tokens=counts["tokens"],
        num_documents=counts["documents"],
        num_bytes=counts["bytes"],
    )


def _cut(
    pieces: Iterable[Int64[np.ndarray, "_"]], shard_tokens: int
) -> Iterator[tuple[int, Int64[np.ndarray, "_"]]]:
    """Yield the pieces with the number of their shard, cut where a shard is full."""
    position = 0
    for piece in pieces:
        taken = 0
        while taken < piece.size:
            shard, filled = divmod(position, shard_tokens)
            part = piece[taken : taken + shard_tokens - filled]
            yield shard, part
            taken += part.size
            position += part.size


def _check_ids(ids: Int64[np.ndarray, "N"], name: str, tokenizer: Tokenizer) -> None:
    wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"document {name!r}: the tokenizer {tokenizer.name!r} gave the id {wrong[0]}, outside "
            f"its vocabulary of {tokenizer.vocab_size}"
        )
