"""Order and mixing at 2·10¹² tokens in 100,000 shards: exact counts, and what a seek costs.

    python benchmarks/data_order.py --output result.json

The shards are real files without a byte on the disk, opened and read as any others; what stands
where is checked with tokens that are their own positions, in one text and in four that are mixed.
`--whole` goes through every window of an epoch of each, and takes minutes and a byte of memory for
each window of the largest.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import argument_parser, write

from truestep.data.loader import WindowLoader
from truestep.data.mixture import PERIOD, MixtureLoader, turns_of
from truestep.data.tokenizer import ByteTokenizer
from truestep.data.tokens import FORMAT, FORMAT_VERSION, PreparedData, TokenSplit, open_prepared
from truestep.manifest import MANIFEST, DirectoryWriter
from truestep.storage import BLOCK_BYTES, FileRecord

TOKENS, SHARDS, CONTEXT, BATCH = 2 * 10**12, 100_000, 2048, 512
SHARES = {"web": 0.62, "code": 0.25, "books": 0.1, "papers": 0.03}  # of tokens
WEIGHTS = (0.5, 0.3, 0.15, 0.05)  # of what is trained on
_SEEKS, _PREFIXES, _CHUNK = 2000, 10_000, 2**20


class Positions:
    """A text whose token at each place is the place itself."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    def read(self, start: int, stop: int) -> Any:
        return np.arange(start, stop)


def texts(num_tokens: float = TOKENS) -> dict[str, Positions]:
    """Return the four sources, of so many tokens together."""
    return {name: Positions(int(share * num_tokens)) for name, share in SHARES.items()}


def median_and_most(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_us": round(1e6 * statistics.median(ordered), 1),
        "p99_us": round(1e6 * ordered[len(ordered) * 99 // 100], 1),
    }


def timed(call: Callable[[int], object], places: list[int]) -> dict[str, float]:
    seconds = []
    for place in places:
        start = time.perf_counter()
        call(place)
        seconds.append(time.perf_counter() - start)
    return median_and_most(seconds)


def seeks(split: PreparedData) -> list[dict[str, Any]]:
    """Return what it costs to go to a step nobody asked for before, in all of the run's steps."""
    mixed = MixtureLoader(texts(), WEIGHTS, context_length=CONTEXT, batch_size=1, seed=1)
    alone = WindowLoader(split.train, context_length=CONTEXT, batch_size=1, seed=1)
    steps = np.random.default_rng(0).integers(5 * TOKENS // CONTEXT, size=_SEEKS).tolist()
    whose = "which source and window a row reads, of four sources"
    read = "a row of 2,048 tokens, read from the shards' files"
    return [
        {"seek": whose, **timed(mixed.rows_at, steps)},
        {"seek": read, **timed(alone.batch_at, steps)},
    ]


def check_prefixes() -> dict[str, Any]:
    """Compare the counts before random positions with exact shares, in whole numbers."""
    loader = MixtureLoader(texts(), WEIGHTS, context_length=CONTEXT, batch_size=1, seed=1)
    turns = turns_of(WEIGHTS)
    worst = 0
    for position in np.random.default_rng(1).integers(10**12, size=_PREFIXES).tolist():
        counts = list(loader.turns_before(position).values())
        assert sum(counts) == position
        errors = [abs(c * PERIOD - position * t) for c, t in zip(counts, turns, strict=True)]
        worst = max(worst, *errors)
    assert worst < PERIOD
    return {"prefixes": _PREFIXES, "largest_error_in_windows": round(worst / PERIOD, 3)}


def check_boundaries(split: TokenSplit) -> dict[str, int]:
    """Read windows across the ends of shards, of which each token is its own position."""

    def ids(shard: int, offset: int, count: int) -> Any:
        return shard * (TOKENS // SHARDS) + offset + np.arange(count)

    split._read_shard = ids  # type: ignore[method-assign]
    checked = 0
    for end in range(TOKENS // SHARDS, TOKENS, 7 * TOKENS // SHARDS):
        start = (end - 1) // CONTEXT * CONTEXT
        stop = min(start + CONTEXT + 1, TOKENS)
        assert np.array_equal(split.read(start, stop), np.arange(start, stop))
        checked += 1
    return {"windows_across_shards": checked}


def check_epochs(num_tokens: float) -> dict[str, int]:
    """Go through an epoch of each source: every window once, none twice, none left out."""
    seen_in_all = 0
    for number, split in enumerate(texts(num_tokens).values()):
        loader = WindowLoader(split, context_length=CONTEXT, batch_size=1, source=f"train {number}")
        seen = np.zeros(loader.num_windows, dtype=np.uint8)
        for start in range(0, loader.num_windows, _CHUNK):
            stop = min(start + _CHUNK, loader.num_windows)
            windows = loader.windows_between(start, stop)
            before = seen[windows]
            assert not before.any()
            seen[windows] = 1
        assert np.count_nonzero(seen) == seen.size == -(-(len(split) - 1) // CONTEXT)
        seen_in_all += seen.size
    return {"windows_in_whole_epochs": seen_in_all}


def check_mixture(num_steps: int) -> dict[str, int]:
    """Train through many epochs of small sources and compare with their own orders."""
    small = texts(4e6)
    loader = MixtureLoader(small, WEIGHTS, context_length=64, batch_size=BATCH, seed=3)
    seen: dict[str, list[int]] = {name: [] for name in small}
    for step in range(num_steps):
        for row in loader.rows_at(step):
            seen[row.source].append(row.window)
    epochs = 0
    for name, windows in seen.items():
        size = loader.num_windows(name)
        for start in range(0, len(windows) - size + 1, size):
            assert len(set(windows[start : start + size])) == size
            epochs += 1
    assert {name: len(windows) for name, windows in seen.items()} == loader.turns_before(num_steps)
    return {"mixed_windows": num_steps * BATCH, "whole_epochs_in_them": epochs}


def make_shards(target: Path) -> None:
    """Make a prepared directory of 100,000 shards of uint8: holes, which read as zeros."""
    tokenizer, each = ByteTokenizer(), TOKENS // SHARDS
    record = FileRecord(each, "0" * 64, (0,) * -(-each // BLOCK_BYTES))
    with DirectoryWriter(target) as writer:
        shards = [f"train-{number:05d}.bin" for number in range(SHARDS)]
        for name in shards:
            descriptor = os.open(writer.temporary / name, os.O_CREAT | os.O_WRONLY)
            os.ftruncate(descriptor, each)
            os.close(descriptor)
            writer.files[name] = record
        for split in ("train", "validation"):
            writer.write(f"{split}-documents.jsonl", [b'{"name": "a", "start": 0}\n'])
        writer.write("validation-00000.bin", [bytes(100)])
        sizes = {"train": (shards, TOKENS), "validation": (["validation-00000.bin"], 100)}
        writer.commit(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "source": "holes",
                "tokenizer": {"name": "bytes", "fingerprint": tokenizer.fingerprint},
                "vocab_size": tokenizer.vocab_size,
                "dtype": "uint8",
                "fingerprint": "0" * 64,
                **{
                    split: {
                        "shards": names,
                        "documents": f"{split}-documents.jsonl",
                        "num_tokens": num_tokens,
                        "num_documents": 1,
                        "num_bytes": num_tokens,
                    }
                    for split, (names, num_tokens) in sizes.items()
                },
            }
        )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--whole", action="store_true", help="every window of whole epochs")
    options = parser.parse_args()
    record: dict[str, Any] = {"tokens": TOKENS, "shards": SHARDS, "context_length": CONTEXT}
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, "shards")
        make_shards(made)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            split = open_prepared(made)
            seconds.append(time.perf_counter() - start)
        size = (made / MANIFEST).stat().st_size
        record["opening"] = {
            "seconds": round(statistics.median(seconds), 2),
            "manifest_bytes": size,
        }
        print(record["opening"], flush=True)
        record["seeks"] = seeks(split)
    for seek in record["seeks"]:
        print(seek, flush=True)
    record |= check_prefixes() | check_boundaries(split.train) | check_mixture(2000)
    record |= check_epochs(TOKENS if options.whole else 1e-3 * TOKENS)
    print({name: value for name, value in record.items() if isinstance(value, (int, float))})
    write(options.output, record)


if __name__ == "__main__":
    main()
