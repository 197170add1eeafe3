"""The processes that train one model together: which one this is, and what they tell each other."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

_ENVIRON: Mapping[str, str] = os.environ
_MEETING_TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Processes:
    """One process, `rank` of `size` from 0 on, and those that it trains together with.

    `local_size` of them are on this machine, of which it is number `local_rank`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default=None, compare=False, repr=False)
    lasting: Any = field(default=None, compare=False, repr=False)
    """A store that outlives this process, where torchrun may start it again."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, the same bits in each.

        Every one of them has to ask, in the same order.
        """
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def sums(self, first: Tensor, *others: int) -> tuple[Tensor, ...]:
        """Return the sums of whole numbers over all processes, modulo 2**64, in one exchange.

        Each is a 0-d tensor, on the device of `first`.
        """
        numbers = [(other + 2**63) % 2**64 - 2**63 for other in others]  # as int64 has them
        return self.sum(
            torch.stack([first, *(torch.full_like(first, n) for n in numbers)])
        ).unbind()

    def sum_in_pairs(self, value: Tensor) -> None:
        """Add up a tensor over all processes in place, along one tree for any number of them.

        That number is a power of two. Pairs add up first, then pairs of pairs: a + b and b + a are
        the same bits, so each process may add what it receives to its own.
        """
        distance = 1
        while distance < self.size:
            peer, theirs = self.rank ^ distance, torch.empty_like(value)
            exchange = [dist.P2POp(dist.isend, value, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            value += theirs
            distance *= 2

    def from_first(self, what: str, make: Callable[[], str]) -> str:
        """Return what `make` returns in the first process, which alone calls it; the others wait.

        However long: it may prepare a corpus. `what` names it, once in the life of a process.
        """
        if self.size == 1:
            return make()
        if self.rank == 0:
            made = make()
            self.store.set(what, made)
            return made
        while not self.store.check([what]):
            time.sleep(_POLL_SECONDS)  # unlike a wait in the store, signals end it
        told: str = self.store.get(what).decode()
        return told

    def first_of_all(self, what: str, make: Callable[[], T]) -> T:
        """Return what `make` returns here; the first process has made it before another begins."""
        made: list[T] = []

        def make_and_tell() -> str:
            made.append(make())
            return "made"

        self.from_first(what, make_and_tell)
        return made[0] if made else make()

    def remember(self, what: str, value: str) -> None:
        """Keep a value over a restart of all processes by torchrun."""
        if self.lasting is not None:
            self.lasting.set(what, value)

    def recall(self, what: str) -> str | None:
        """Return what was remembered before a restart, if there was one."""
        if self.lasting is None or not self.lasting.check([what]):
            return None
        value: str = self.lasting.get(what).decode()
        return value


ALONE = Processes()
_met: list[Processes] = []  # what the meeting that is on gave, if it is this file's


def current(environ: Mapping[str, str] = _ENVIRON) -> Processes:
    """Return this process among those that have met: here, or by `init_process_group`.

    Errors: RuntimeError where torchrun started several that have not met: each would train alone.
    """
    if _met:
        return _met[0]
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    size = environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise RuntimeError(
            f"WORLD_SIZE={size}, but these processes have not met; call "
            "torch.distributed.init_process_group() before a Trainer is made"
        )
    return ALONE


def is_started_by_torchrun(environ: Mapping[str, str] = _ENVIRON) -> bool:
    """Say whether torchrun, or what works like it, has started this process."""
    return environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def threads_of_one(environ: Mapping[str, str] = _ENVIRON) -> int:
    """Return the threads this process may have: those told by OMP_NUM_THREADS, or its share."""
    threads = torch.get_num_threads()
    told = environ.get("OMP_NUM_THREADS")
    return threads if told else max(1, threads // current(environ).local_size)


@contextlib.contextmanager
def meeting(environ: Mapping[str, str] = _ENVIRON) -> Iterator[Processes]:
    """Bring the processes that torchrun started together, while the block lasts.

    One that it did not start, or that meets others already, goes on as it is.
    """
    if not is_started_by_torchrun(environ) or dist.is_initialized():
        yield current(environ)
        return
    store, rank, size = next(rendezvous("env://", timeout=_MEETING_TIMEOUT))
    # torchrun's store outlives the processes: what those before a restart left is not for these.
    attempt = PrefixStore(f"truestep/{_meeting_name(store, rank, size)}", store)
    dist.init_process_group(store=PrefixStore("torch", attempt), rank=rank, world_size=size)
    place = Processes(
        rank,
        size,
        int(environ.get("LOCAL_RANK", "0")),
        int(environ.get("LOCAL_WORLD_SIZE", "1")),
        attempt,
        PrefixStore("truestep/lasting", store),
    )
    _met.append(place)
    try:
        yield place
    finally:
        _met.clear()
    dist.destroy_process_group()  # not after an error: others may never come


def _meeting_name(store: Any, rank: int, size: int) -> str:
    """Return a name that the first process gives to all that are alive now, however often asked.

    Each says hello by a number of its own, to which the first one answers, until all have heard.
    Errors: RuntimeError for a process that has not come in time.
    """
    own = uuid.uuid4().hex
    until = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
    store.set(f"truestep/hello/{rank}", own)
    missing = set(range(1, size)) if rank == 0 else {0}
    while missing and time.monotonic() < until:
        if rank:
            if store.check([f"truestep/welcome/{own}"]):
                name: str = store.get(f"truestep/welcome/{own}").decode()
                store.set(f"truestep/heard/{name}/{rank}", "")
                return name
        else:
            for other in sorted(missing):
                if store.check([f"truestep/hello/{other}"]):
                    theirs = store.get(f"truestep/hello/{other}").decode()
                    store.set(f"truestep/welcome/{theirs}", own)
            missing = {r for r in missing if not store.check([f"truestep/heard/{own}/{r}"])}
        time.sleep(_POLL_SECONDS / 10)
    if missing:
        raise RuntimeError(
            f"processes {sorted(missing)} of {size} have not come within {_MEETING_TIMEOUT}; "
            "start all of them"
        )
    return own
