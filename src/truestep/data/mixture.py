"""Several sources in exact proportions: whose turn a position is, and what it reads.

A mixture is a period of PERIOD turns, arranged once and repeated: at every position each source
has had its share, to within one turn. The arrangement is part of every run's trajectory: it is
pinned by a test and never changes with a release.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from truestep.batch import Batch
from truestep.data.document_mask import with_positions
from truestep.data.loader import Tokens, WindowLoader, read_rows, rows_of_part

PERIOD = 2**16


def turns_of(weights: Sequence[float]) -> list[int]:
    """Return how many of the PERIOD turns each source has, in proportion to positive weights.

    By largest remainders (Hamilton's method); a source whose share is less than one turn has one,
    and the others share the rest.
    Errors: ValueError for a weight that is not a positive number, or more sources than turns.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights={weight} must be a positive number; leave the source out")
    if not 1 <= len(weights) <= PERIOD:
        raise ValueError(f"{len(weights)} sources to mix; give 1 to {PERIOD}")
    exact = [Fraction(weight) for weight in weights]
    sharing, turns = set(range(len(exact))), [1] * len(exact)
    while True:
        room = PERIOD - (len(exact) - len(sharing))
        total = sum(exact[source] for source in sharing)
        shares = {source: room * exact[source] / total for source in sharing}
        few = {source for source, share in shares.items() if share < 1}
        if not few:
            break
        sharing -= few
    for source, share in shares.items():
        turns[source] = math.floor(share)
    by_remainder = sorted(shares, key=lambda source: (turns[source] - shares[source], source))
    for source in by_remainder[: PERIOD - sum(turns)]:
        turns[source] += 1
    return turns


class Mixture:
    """Whose turn each position is; `turns` is how many of a period each source has.

    Errors: as for `turns_of`.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.turns = turns_of(weights)
        self._order = _arrange(self.turns)
        places = np.empty(PERIOD, dtype=np.int64)  # among the turns of its source
        places[np.argsort(self._order, kind="stable")] = np.concatenate(
            [np.arange(turns) for turns in self.turns]
        )
        self._places = places

    def sources_between(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """Return the source of each position, start to stop - 1."""
        return self._order[(start % PERIOD + np.arange(stop - start)) % PERIOD]

    def place_of(self, position: int) -> int:
        """Return how many earlier positions belong to the source that this one belongs to."""
        period, turn = divmod(position, PERIOD)
        source = int(self._order[turn])
        return period * self.turns[source] + int(self._places[turn])

    def counts_before(self, position: int) -> list[int]:
        """Return how many positions before this one belong to each source."""
        period, turn = divmod(position, PERIOD)
        begun = np.bincount(self._order[:turn], minlength=len(self.turns)).tolist()
        return [period * turns + more for turns, more in zip(self.turns, begun, strict=True)]


def _arrange(turns: list[int]) -> Int64[np.ndarray, "P"]:
    """Return whose turn each of a period is, no source ever a whole turn ahead or behind.

    Of n sources, turn k of one may be taken while its count stays within 1 - 1/(2n - 2) of its
    share: from a first to a last place. Whoever's last place comes first is next: Tijdeman 1980,
    "The chairman assignment problem", theorem 1.
    """
    order = np.zeros(PERIOD, dtype=np.int64)
    if len(turns) == 1:
        return order
    bound = 2 * len(turns) - 2
    waiting: list[tuple[int, int, int]] = []  # first place, last place, source
    for source, number in enumerate(turns):
        reached = bound * np.arange(number) * PERIOD
        first = -(-(reached + PERIOD) // (bound * number)) - 1
        last = (reached + (bound - 1) * PERIOD) // (bound * number)
        waiting += zip(first.tolist(), last.tolist(), [source] * number, strict=True)
    waiting.sort(reverse=True)
    ready: list[tuple[int, int]] = []  # last place, source
    for place in range(PERIOD):
        while waiting and waiting[-1][0] <= place:
            _, last_place, source = waiting.pop()
            heapq.heappush(ready, (last_place, source))
        last_place, order[place] = heapq.heappop(ready)
        assert place <= last_place
    return order


class Row(NamedTuple):
    """What a row of a batch reads: a window of a source."""

    source: str
    window: int


class MixtureLoader:
    """The windows of several splits in exact proportions, each in an order of its own every epoch.

    `splits` maps the name of each source to its tokens. Position p = step * batch_size + row is
    the turn of a source; the source's n-th turn reads what row n of it alone would: every source
    goes through its own epochs, and one source by itself gives the batches of `WindowLoader`. With
    `document_end`, the id that ends a document, batches have `with_positions`.

    Errors: ValueError for a split shorter than one window, and as for `turns_of`.
    """

    def __init__(
        self,
        splits: Mapping[str, Tokens],
        weights: Sequence[float],
        *,
        context_length: int,
        batch_size: int,
        seed: int = 0,
        document_end: int | None = None,
    ) -> None:
        self._document_end = document_end
        self.context_length = context_length
        self.batch_size = batch_size
        self.splits = dict(splits)
        self._names = list(splits)
        self._mixture = Mixture(weights)
        self._loaders = []
        for number, (name, split) in enumerate(splits.items()):
            try:
                loader = WindowLoader(
                    split,
                    context_length=context_length,
                    batch_size=batch_size,
                    seed=seed,
                    source=f"train {number}" if number else "train",
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if len(splits) > 1 else str(error)) from None
            self._loaders.append(loader)

    def batch_at(self, step: int, *, part: int = 0, parts: int = 1) -> Batch:
        """Return rows [part * B // parts, (part + 1) * B // parts) of a step's global batch."""
        first, end = rows_of_part(self.batch_size, part, parts)
        start = step * self.batch_size
        rows = self._rows_between(start + first, start + end)
        splits = [(self.splits[row.source], row.window) for row in rows]
        batch = read_rows(splits, self.context_length, first)
        return batch if self._document_end is None else with_positions(batch, self._document_end)

    def rows_at(self, step: int) -> list[Row]:
        """Return what each row of a step's global batch reads."""
        return self._rows_between(step * self.batch_size, (step + 1) * self.batch_size)

    def turns_before(self, step: int) -> dict[str, int]:
        """Return how many windows of each source all steps before this one have read."""
        counts = self._mixture.counts_before(step * self.batch_size)
        return dict(zip(self._names, counts, strict=True))

    def num_windows(self, source: str) -> int:
        """Return how many windows an epoch of a source has."""
        return self._loaders[self._names.index(source)].num_windows

    def _rows_between(self, start: int, stop: int) -> list[Row]:
        """Return what positions start to stop - 1 read: the turns of a source follow each other."""
        if start < 0:
            raise ValueError(f"step={start // self.batch_size} must be at least 0")
        sources = self._mixture.sources_between(start, stop)
        windows = np.empty(stop - start, dtype=np.int64)
        for source in np.unique(sources).tolist():
            turns = np.flatnonzero(sources == source)
            place = self._mixture.place_of(start + int(turns[0]))
            loader = self._loaders[source]
            windows[turns] = loader.windows_between(place, place + turns.size)
        return [
            Row(self._names[source], window)
            for source, window in zip(sources.tolist(), windows.tolist(), strict=True)
        ]
