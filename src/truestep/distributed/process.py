"""The processes that train one model together: which one this is, and what they add up."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """One process, `rank` of `size` from 0 on, and those that it trains together with."""

    rank: int = 0
    size: int = 1

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


ALONE = Processes()


def current(environ: Mapping[str, str] = os.environ) -> Processes:
    """Return this process among those that have met by `torch.distributed.init_process_group`.

    Errors: RuntimeError where torchrun started several that have not met: each would train alone.
    """
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    size = environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise RuntimeError(
            f"WORLD_SIZE={size}, but these processes have not met; call "
            "torch.distributed.init_process_group() before a Trainer is made"
        )
    return ALONE
