"""What the machine is and has: its name, its rate of arithmetic, its memory."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from truestep.distributed import process

_HEAP_BYTES = 256 * 2**20  # glibc's heap grows by so much at a time: runtime.keep_freed_memory


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate, in FLOP/s, of a few square matrix products on random data."""
    size = 2048 if device.type == "cpu" else 8192
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator).to(device, dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = matrix @ matrix
        _ = product[0, 0].item()  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def processor_name() -> str:
    """Return what the processor is called, and how many cores torch sees."""
    capabilities = torch.cpu.get_capabilities()
    name, cores = capabilities.get("cpu_name", "CPU"), capabilities.get("num_physical_cores", "?")
    return f"{name}, {cores} cores"


def device_name(device: torch.device) -> str:
    """Return what a device is called by its maker, where torch knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else str(device)


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory the process may still take on a device; None where nobody says.

    Of several processes on this machine each has a share of what is free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    try:
        import resource

        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):  # not Linux
        return None
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    free //= process.current().local_size
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - pages * resource.getpagesize())
    return int(max(0, min(free, *_left_by_groups(Path("/"))) - _HEAP_BYTES))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each limit of a container leaves: control groups of Linux, version 2 or 1."""
    groups = root / "proc/self/cgroup"
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if not controllers:
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif controllers == "memory":
            top = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / name.lstrip("/")
        for place in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            with contextlib.suppress(OSError, ValueError):  # not seen from inside, or no limit: max
                left = int((place / limit).read_text()) - int((place / usage).read_text())
                yield left + _cached_bytes(place / "memory.stat")


def _cached_bytes(statistics: Path) -> int:
    """Return what a control group has of files in the cache: they count as used, and can go."""
    with contextlib.suppress(OSError, ValueError):
        rows = statistics.read_text(encoding="utf-8").splitlines()
        stat = dict(row.split() for row in rows)
        return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
    return 0


def accelerator_is_full(error: BaseException) -> bool:
    """Say whether an error is an accelerator's that has no more memory; a CPU raises others."""
    signs = ("MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew, from what is held now; on a CPU Linux alone can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the high water mark, VmHWM


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory this process has had on a device; None where nobody says.

    On a CPU that is resident memory, of the whole process, since `forget_peak`.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss begins with that of the process it was started from
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
