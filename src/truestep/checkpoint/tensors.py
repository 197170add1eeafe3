"""Tensors as bytes and back, in the safetensors format.

The library writes files that cannot be hashed, or made to fail, on the way; so writing is done
here, chunk by chunk. Source: https://github.com/huggingface/safetensors, section "Format".
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truestep.storage import FileRecord, StorageError, read_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def describe(tensor: Tensor) -> str:
    """Return dtype and shape for a message: `float32 [3, 4]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def unstorable(value: Any) -> str | None:
    """Return why a value cannot be stored as a tensor, or None if it can."""
    # A subclass (sharded, quantized) has more to it than the bytes it shows.
    if type(value) not in {Tensor, nn.Parameter}:
        return f"it is a {type(value).__name__}, not a plain tensor"
    if value.device.type == "meta":
        return "it is on the meta device and has no values"
    if value.layout != torch.strided:
        return f"its layout is {value.layout}"
    if value.dtype not in _DTYPES:
        return f"the safetensors format has no {value.dtype}"
    return None


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file; beside the tensors, one copy of one is in memory."""
    # Widest first, as the library does: each tensor then starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def read_safetensors(path: Path, record: FileRecord) -> dict[str, Tensor]:
    """Return the tensors of a file, on the CPU, once all of it agrees with its record.

    Errors: StorageError naming the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_file(path, record))
    except (SafetensorError, KeyError, AssertionError) as error:
        raise StorageError(f"{path}: not a safetensors file that torch can hold: {error}") from None
