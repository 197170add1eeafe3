"""Peak memory and time of head and loss: all logits at once, and deferred logits by chunks.

    python benchmarks/memory.py --vocab 50257 131072 --rows 2048 8192 --output result.json

Each case runs in a process of its own, forward and backward, compiled, on the CPU. The peak is what
the kernel says the process held beyond its inputs.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import argument_parser, positive, write

from truestep import DeferredLogits, compute_loss
from truestep import loss as loss_module
from truestep.runtime import keep_freed_memory

WIDTH = 256
_REPEATS = 7


def measure(form: str, rows: int, vocab: int, logits_per_chunk: int) -> dict[str, Any]:
    """Return the peak in bytes and the median seconds of one case, in this process."""
    keep_freed_memory()  # as every Trainer does
    loss_module.LOGITS_PER_CHUNK = logits_per_chunk
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, rows, WIDTH, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, WIDTH, generator=generator) / 16).requires_grad_()
    targets = torch.randint(vocab, (1, rows), generator=generator)

    def step() -> torch.Tensor:
        if form == "deferred":
            return compute_loss(DeferredLogits(hidden, weight), targets)
        return compute_loss(hidden @ weight.to(hidden.dtype).T, targets)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def run() -> None:
        hidden.grad = weight.grad = None
        compiled().backward()  # type: ignore[no-untyped-call]

    run()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    hidden.grad = weight.grad = None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    held = _status("VmRSS")
    run()
    return {"peak_bytes": _status("VmHWM") - held, "seconds": statistics.median(seconds)}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--vocab", type=positive, nargs="+", default=[50257, 131072])
    parser.add_argument("--rows", type=positive, nargs="+", default=[2048, 8192])
    parser.add_argument("--logits-per-chunk", type=positive, nargs="+", default=[2**25])
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        form, *numbers = options.case
        print(json.dumps(measure(form, *map(int, numbers))))
        return
    cases = [
        (form, rows, vocab, chunk)
        for vocab in options.vocab
        for rows in options.rows
        for form, chunks in (("plain", [2**25]), ("deferred", options.logits_per_chunk))
        for chunk in chunks
    ]
    results = []
    for case in cases:
        command = [sys.executable, "-W", "ignore", __file__, "--case", *map(str, case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = dict(zip(("form", "rows", "vocab", "logits_per_chunk"), case, strict=True))
        found |= json.loads(done.stdout)
        results.append(found)
        print(
            f"{case[0]:9}{case[1]:6} rows x {case[2]:6}  chunk 2^{case[3].bit_length() - 1}  "
            f"{found['peak_bytes'] / 2**20:7,.0f} MiB  {found['seconds'] * 1e3:7,.0f} ms",
            flush=True,
        )
    write(options.output, {"cases": results})


if __name__ == "__main__":
    main()
