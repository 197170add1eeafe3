"""GPUs that are not here: products in bfloat16 by their data sheets, and the memory they have."""

import difflib
from typing import NamedTuple

# Of large models that train well: 33-39% (torchtitan, Llama 3 8B), 40-46% (nanochat), both on an
# H100, and about 60% (llm.c, GPT-2 124M, A100).
ASSUMED_UTILIZATION = 0.4


class GPU(NamedTuple):
    """A GPU: dense bfloat16 products added up in float32, and about the bytes that are offered.

    Those are less than the data sheet's; only the H200's were compared with a GPU.
    """

    title: str
    flops_per_second: float
    memory_bytes: int


def _gpu(title: str, tera: float, gibibytes: float) -> GPU:
    return GPU(title, tera * 1e12, int(gibibytes * 2**30))


GPUS = {
    "a100-40gb": _gpu("NVIDIA A100 40GB", 312, 39.4),
    "a100-80gb": _gpu("NVIDIA A100 80GB", 312, 79.1),
    "b200": _gpu("NVIDIA B200", 2250, 178),
    "h100": _gpu("NVIDIA H100 SXM", 989, 79.1),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 756, 79.1),
    "h200": _gpu("NVIDIA H200", 989, 139.8),
    "l4": _gpu("NVIDIA L4", 121, 22),
    "l40s": _gpu("NVIDIA L40S", 362, 44.4),
    "mi300x": _gpu("AMD MI300X", 1307, 191),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 71, 23.6),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165, 23.6),
}


def find_gpu(name: str) -> GPU:
    """Return the GPU of that name. Errors: ValueError with those there are."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; use one of {', '.join(GPUS)}"
    raise ValueError(f"gpu={name!r} has no data sheet here{hint}")
