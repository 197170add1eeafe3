"""Damage of every kind, done to a checkpoint and to prepared data, and what loading makes of it.

Whatever is loaded must be what was saved, bit for bit, or nothing at all.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from crashes import memory_directory
from power_loss import advance, new_run

from truestep import CheckpointError, load_checkpoint, save_checkpoint
from truestep.checkpoint.commit import verify_checkpoint
from truestep.data.prepare import prepare
from truestep.data.tokenizer import ByteTokenizer
from truestep.data.tokens import open_prepared
from truestep.manifest import MANIFEST, read_manifest
from truestep.storage import StorageError, verify_file

Files = dict[str, bytes]
Damaged = dict[str, bytes | None]  # None: the file is gone
Progress = Callable[[dict[str, Any]], object]


def _flip_bits(data: bytes, chooser: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chooser.choice([1, 1, 1, 2, 3, 8])):
        position = chooser.randrange(len(data))
        damaged[position] ^= 1 << chooser.randrange(8)
    return bytes(damaged)


def _overwrite(data: bytes, chooser: random.Random) -> bytes:
    start, end = _span(data, chooser)
    filling = chooser.choice([chooser.randbytes(end - start), b"\xff" * (end - start)])
    return data[:start] + filling + data[end:]


def _zero(data: bytes, chooser: random.Random) -> bytes:
    start, end = _span(data, chooser)
    return data[:start] + bytes(end - start) + data[end:]


def _cut(data: bytes, chooser: random.Random) -> bytes:
    return data[: chooser.randrange(len(data))]


def _cut_out(data: bytes, chooser: random.Random) -> bytes:
    start, end = _span(data, chooser)
    return data[:start] + data[end:]


def _extend(data: bytes, chooser: random.Random) -> bytes:
    length = chooser.randrange(1, 64)
    return data + chooser.choice(
        [bytes(length), b" " * length, b"\n", data[:length], chooser.randbytes(length)]
    )


def _swap_blocks(data: bytes, chooser: random.Random) -> bytes:
    size = chooser.choice([1, 4, 8, 16, 64])
    first, second = sorted(chooser.randrange(max(1, len(data) - size)) for _ in range(2))
    second = max(second, first + size)
    moved = data[second : second + size] + data[first + size : second] + data[first : first + size]
    return data[:first] + moved + data[second + size :]


def _double_a_block(data: bytes, chooser: random.Random) -> bytes:
    start, end = _span(data, chooser)
    return data[:end] + data[start:end] + data[end:]


def _span(data: bytes, chooser: random.Random) -> tuple[int, int]:
    start = chooser.randrange(len(data))
    return start, min(len(data), start + chooser.choice([1, 2, 4, 16, 64, 512]))


OF_ONE_FILE = {
    "flipped bits": _flip_bits,
    "overwritten bytes": _overwrite,
    "zeroed bytes": _zero,
    "cut short": _cut,
    "bytes cut out": _cut_out,
    "extended": _extend,
    "swapped blocks": _swap_blocks,
    "a block twice": _double_a_block,
}


def damages(
    good: Files, older: Files, count: int, chooser: random.Random
) -> Iterator[tuple[str, Damaged]]:
    """Yield `count` kinds of damage with the files as they are then; each differs from `good`.

    The first flip a bit of every byte of the manifest. `older` is another directory of the kind,
    whose files may come in place of these.
    """
    manifest = good[MANIFEST]
    for position in range(min(len(manifest), count)):
        damaged = bytearray(manifest)
        damaged[position] ^= 1 << chooser.randrange(8)
        yield "flipped bits", {MANIFEST: bytes(damaged)}
    names, done = sorted(good), len(manifest)
    while done < count:
        kind = chooser.choice([*OF_ONE_FILE, *OF_ONE_FILE, *_OF_SEVERAL])
        if kind in OF_ONE_FILE:
            name = chooser.choice(names)
            change: Damaged = {name: OF_ONE_FILE[kind](good[name], chooser)}
        else:
            change = _of_several(kind, good, older, chooser)
        if any(good.get(name) != data for name, data in change.items()):
            done += 1
            yield kind, change


_OF_SEVERAL = ["swapped files", "files of another time", "a missing file", "a file too many"]


def _of_several(kind: str, good: Files, older: Files, chooser: random.Random) -> Damaged:
    names = sorted(good)
    if kind == "swapped files":
        first, second = chooser.sample(names, 2)
        return {first: good[second], second: good[first]}
    if kind == "files of another time":
        common = sorted(good.keys() & older.keys())
        chosen = chooser.sample(common, chooser.randint(1, len(common)))
        return {name: older[name] for name in chosen}
    if kind == "a missing file":
        return {chooser.choice(names): None}
    return {f"{chooser.choice(names)}.{chooser.choice(['bak', 'tmp', '1'])}": b"anything"}


def read_files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _replace(directory: Path, files: Damaged) -> None:
    for name, data in files.items():
        (directory / name).unlink(missing_ok=True)  # truncating waits for some disks
        if data is not None:
            (directory / name).write_bytes(data)


def _attack(
    directory: Path,
    older: Files,
    count: int,
    *,
    seed: int,
    load: Callable[[Path], str],
    progress: Progress,
) -> dict[str, Any]:
    """Damage `directory` in `count` ways, load it each time, and count what came of it."""
    started = told = time.monotonic()
    good, outcomes, kinds, failures = read_files(directory), Counter(), Counter(), []
    assert load(directory) == "identical"
    for kind, change in damages(good, older, count, random.Random(seed)):
        _replace(directory, change)
        try:
            outcome = load(directory)
        except Exception as error:  # noqa: BLE001 - what is no refusal is a failure, whatever it is
            outcome = "no refusal, but another error"
            failures.append(f"{kind} of {sorted(change)}: {type(error).__name__}: {error}")
        if outcome not in {"refused", "identical"}:
            failures.append(f"{kind} of {sorted(change)}: {outcome}")
        outcomes[outcome] += 1
        kinds[kind] += 1
        _replace(directory, {name: good.get(name) for name in change})
        if time.monotonic() - told > 2:
            told = time.monotonic()
            progress({"attempts": sum(outcomes.values())})
    wrong = sum(outcomes.values()) - outcomes["refused"] - outcomes["identical"]
    return {
        "attempts": sum(outcomes.values()),
        "refused": outcomes["refused"],
        "loaded_and_identical": outcomes["identical"],
        "by_kind": dict(kinds),
        "laws": {"wrong_loads": wrong},
        "failures": failures[:5],
        "seconds": round(time.monotonic() - started, 1),
    }


# A checkpoint.


def state_of(run: Any) -> list[bytes]:
    """The bits of all that a checkpoint brings back."""
    tensors = [*run.model.parameters()]
    for state in run.optimizer.state.values():
        tensors += [state[key] for key in sorted(state)]
    return [tensor.detach().numpy().tobytes() for tensor in tensors] + [bytes([run.step])]


def corrupt_checkpoint(
    count: int, *, seed: int = 0, progress: Progress = lambda figures: None
) -> dict[str, Any]:
    """Load a damaged checkpoint `count` times: identical, or refused and the run is untouched."""
    with memory_directory() as memory:
        run, place = new_run(), Path(memory)
        advance(run)
        older = read_files(save_checkpoint(run, place, facts={"text": "a"}))
        advance(run)
        facts = {"text": "b", "rate": 1e-3, "count": [1, 2]}
        path = save_checkpoint(run, place, facts=facts)
        saved = state_of(run)

        def other_run() -> Any:
            other = new_run()
            with torch.no_grad():
                other.model.weight.zero_()
            return other

        victim = other_run()
        untouched = state_of(victim)

        def load(path: Path) -> str:
            nonlocal victim
            try:
                verify_checkpoint(path)
                verified = True
            except CheckpointError:
                verified = False
            try:
                found = load_checkpoint(path, victim)
            except CheckpointError:
                if state_of(victim) != untouched:
                    return "half loaded"
                return "verified, but not loaded" if verified else "refused"
            loaded, victim = state_of(victim), other_run()
            if loaded != saved or found != facts:
                return "wrong"
            return "identical" if verified else "loaded, but not verified"

        return _attack(path, older, count, seed=seed, load=load, progress=progress)


# Prepared data.


def corrupt_data(
    count: int, *, seed: int = 0, progress: Progress = lambda figures: None
) -> dict[str, Any]:
    """Verify and open damaged token shards `count` times: every token as it was, or refused.

    `unseen_at_open` counts the damage that opening without verifying, which looks at the manifest
    and at the files' sizes, lets pass, and reading does not notice.
    """
    tokenizer, unseen = ByteTokenizer(), 0

    def read_all(path: Path) -> list[Any]:
        data = open_prepared(path, tokenizer)
        splits = (data.train, data.validation)
        documents = [split.document_at(len(split) - 1) for split in splits]
        tokens = [split.read(0, len(split)).tolist() for split in splits]
        return [tokens, documents, data.manifest]

    with memory_directory() as memory:
        for name in ("older", "newer"):
            source = Path(memory) / f"text of {name}"
            source.mkdir()
            for number in range(8):
                (source / f"{number}.txt").write_text(f"{name} text {number}\n" * 3)
            target = Path(memory) / name
            prepare(str(source), target, tokenizer=tokenizer, shard_tokens=150)
        expected = read_all(target)

        def load(path: Path) -> str:
            nonlocal unseen
            try:
                _, files = read_manifest(path)
                for name, record in files.items():
                    verify_file(path / name, record)
                verified = True
            except StorageError:
                verified = False
            try:
                found = read_all(path)
            except StorageError:
                return "verified, but not readable" if verified else "refused"
            if found[2]["fingerprint"] != expected[2]["fingerprint"]:
                return "refused"  # by the run, which knows what text it began with
            if verified:
                return "identical" if found == expected else "wrong"
            unseen += found != expected
            return "refused"

        older = read_files(Path(memory) / "older")
        figures = _attack(target, older, count, seed=seed, load=load, progress=progress)
    return {**figures, "unseen_at_open": unseen}
