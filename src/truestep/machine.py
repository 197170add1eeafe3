"""What the machine is and has: its name, its rate of arithmetic, its memory."""

import sys
import time
from pathlib import Path

import torch

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


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory the process may still take on a device; None where nobody says."""
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
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - pages * resource.getpagesize())
    return int(max(0, free - _HEAP_BYTES))


def accelerator_is_full(error: BaseException) -> bool:
    """Say whether an error is an accelerator's that has no more memory; a CPU raises others."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory this process has had on a device; None where nobody says.

    On a CPU that is resident memory, of the whole process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
