"""What data sheets say of GPUs that are not here: products in bfloat16, and memory."""

import difflib
from typing import NamedTuple

# Of large models that train well: 33-39% (torchtitan, Llama 3 8B), 40-46% (nanochat), both on an
# H100, and about 60% (llm.c, GPT-2 124M, A100).
ASSUMED_UTILIZATION = 0.4


class GPU(NamedTuple):
    """A GPU by its data sheet: dense bfloat16 products added up in float32, and its memory."""

    title: str
    flops_per_second: float
    memory_bytes: int


def _gpu(title: str, tera: float, gibibytes: int) -> GPU:
    return GPU(title, tera * 1e12, gibibytes * 2**30)


GPUS = {
    "a100-40gb": _gpu("NVIDIA A100 40GB", 312, 40),
    "a100-80gb": _gpu("NVIDIA A100 80GB", 312, 80),
    "b200": _gpu("NVIDIA B200", 2250, 180),
    "h100": _gpu("NVIDIA H100 SXM", 989, 80),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 756, 80),
    "h200": _gpu("NVIDIA H200", 989, 141),
    "l4": _gpu("NVIDIA L4", 121, 24),
    "l40s": _gpu("NVIDIA L40S", 362, 48),
    "mi300x": _gpu("AMD MI300X", 1307, 192),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 71, 24),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165, 24),
}


def find_gpu(name: str) -> GPU:
    """Return the GPU of that name. Errors: ValueError with those there are."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; use one of {', '.join(GPUS)}"
    raise ValueError(f"gpu={name!r} has no data sheet here{hint}")
