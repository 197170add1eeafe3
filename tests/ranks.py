"""Functions run by several processes that have met, which stay for the tests after the first."""

import atexit
import functools
import multiprocessing
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def _work(rank, size, meeting, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{meeting}")
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((function(*arguments), None))
        except Exception:  # noqa: BLE001 told to the test
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


@functools.cache
def _pool(size):
    meeting = Path(tempfile.mkdtemp(), "meeting")
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(size):
        here, there = context.Pipe()
        context.Process(target=_work, args=(rank, size, meeting, there), daemon=True).start()
        pipes.append(here)
    atexit.register(lambda: [pipe.send(None) for pipe in pipes])
    return pipes


def together(size, function, *arguments):
    """Return what a function of a module returns in each of `size` processes, by rank."""
    pipes = _pool(size)
    for pipe in pipes:
        pipe.send((function, arguments))
    results = [pipe.recv() for pipe in pipes]
    for rank, (_, error) in enumerate(results):
        assert error is None, f"rank {rank}: {error}"
    return [result for result, _ in results]
