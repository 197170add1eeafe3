"""State that a whole process shares: the only file that touches it.

What a `Trainer` needs for a step is set for that step and put back after it, one step at a time in
a process; only the allocator's thresholds, which change no result, stay. `truestep train` sets the
rest for its own process.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from truestep.distributed import process

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# Held while a step or an evaluation has set what the process shares: other threads' wait.
EXCLUSIVE = threading.RLock()


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; auto is an accelerator if there is one, else the CPU.

    Of several processes on this machine each has an accelerator of its own.
    Errors: ValueError for a device that this machine or this torch does not have.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError:  # a message of thirty names
        raise ValueError(
            f"device={name} names no device; use cpu or auto, or cuda, cuda:0 or mps"
        ) from None
    place = process.current()
    if place.local_size > 1 and device.type != "cpu":
        if device.index not in {None, place.local_rank}:
            raise ValueError(
                f"device={name} cannot be shared by {place.local_size} processes; use {device.type}"
            )
        device = torch.device(device.type, place.local_rank)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used ({reason}); use cpu or auto") from None
    return device


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of returning it to the kernel.

    A step frees and takes the same large buffers each time, and the kernel would zero every page of
    them again: the W3 step of docs/performance.md took 51-68 ms without this and 46 ms with it.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to tell
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_TOP_PAD, 256 * 2**20)
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resolve_precision(
    setting: Literal["auto", "float32", "bfloat16"], model: nn.Module, device: torch.device
) -> Literal["float32", "bfloat16"]:
    """Return the arithmetic to use; auto is bfloat16 where the hardware multiplies it natively.

    A model whose parameters are not all float32 has made its own choice: auto leaves it alone.
    """
    if setting != "auto":
        return setting
    parameters = (p for p in model.parameters() if p.is_floating_point())
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return "float32"
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether the hardware of a device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def computing(
    precision: Literal["float32", "bfloat16"], device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a forward pass computes; float32 leaves every dtype as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


# On a CPU in bfloat16, up to this many keys, plain products beat torch's fused attention. A step of
# litgpt's model, compiled, with 12 x 256 tokens takes 228 ms instead of 279 with a context of 512,
# and 345 instead of 318 with 1024 (W3's layers, one Zen 4 core).
PLAIN_ATTENTION_KEYS = 512


@contextlib.contextmanager
def attention_kernels(
    precision: Literal["float32", "bfloat16"], device: torch.device, num_keys: int
) -> Iterator[None]:
    """Let torch's attention be plain bfloat16 products inside, where its fused kernel is slower.

    Around backward, too, which computes checkpointed activations again. litgpt's model, compiled,
    takes 94 ms instead of 117 for a step of W3, and 873 instead of 990 of W1 (two cores). Where the
    caller has chosen kernels by `torch.nn.attention.sdpa_kernel`, they stay.
    """
    flags: Any = torch.backends.cuda  # a CPU's, too
    pays = (precision, device.type) == ("bfloat16", "cpu") and num_keys <= PLAIN_ATTENTION_KEYS
    if pays and flags.flash_sdp_enabled() and flags.math_sdp_enabled():
        with plain_attention():
            yield
    else:
        yield


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Let torch's attention be matrix products in the dtype of its inputs, on any device."""
    flags: Any = torch.backends.cuda
    with EXCLUSIVE:  # a model is looked at outside any step, too
        before = flags.fp16_bf16_reduction_math_sdp_allowed()
        flags.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            flags.allow_fp16_bf16_reduction_math_sdp(before)


def _generators(device: torch.device) -> list[torch.Generator]:
    """Return the default generators that an operation on `device` may draw from."""
    generators = [torch.default_generator]
    if device.type in {"cuda", "xpu"}:
        module: Any = torch.get_device_module(device)
        index = module.current_device() if device.index is None else device.index
        generators.append(module.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    return generators


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the default generators, afterwards, as they were found."""
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def uninitialized() -> contextlib.AbstractContextManager[Any]:
    """While it lasts, `torch.nn.init.normal_`, and what else can be overridden, draw nothing."""
    return _Uninitialized()


class _Uninitialized(TorchFunctionMode):
    """Leaves a tensor as it comes where a function of `torch.nn.init` asks."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def seeded(device: torch.device, *key: object) -> Iterator[None]:
    """Seed the default generators from `key` alone, and put them back afterwards.

    `seeded(device, seed, step, index)` makes dropout a function of the step: nothing to save.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    with random_state_kept(device):
        for generator in _generators(device):
            generator.manual_seed(int.from_bytes(digest, "little"))
        yield


def resolve_deterministic(
    setting: Literal["auto", "on", "off"], device: torch.device
) -> Literal["on", "off"]:
    """Return whether to use deterministic algorithms; auto does on a CPU, where they are free.

    W2 and W3 of docs/performance.md ran as fast with them, as long as fresh memory is not filled.
    """
    if setting == "on" and device.type == "cuda":
        # Without it cuBLAS may choose another workspace each time, and torch refuses its products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if setting == "auto":
        return "on" if device.type == "cpu" else "off"
    return setting


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms inside, and put the process's own choice back afterwards."""
    if not wanted:
        yield
        return
    flags: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        flags.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    flags.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        flags.fill_uninitialized_memory = before[2]


@contextlib.contextmanager
def module_modes(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model into train or eval mode, and every submodule back into its own afterwards.

    Submodules that the user froze in eval mode stay so in a model that is in train mode.
    """
    if training and model.training:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def tokenizers_on_one_thread() -> Iterator[None]:
    """Keep the tokenizers library from starting threads; it reads this from the environment alone.

    Once it had some, every later fork of the process warns of them on standard error, and aborts
    where that is closed. Learning the standard library takes 2.4 s instead of 1.6.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def configure_process(threads: int | Literal["auto"]) -> int:
    """Set this process up for training, for the command alone; return its number of threads."""
    keep_freed_memory()
    wanted = process.threads_of_one() if threads == "auto" else threads
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    return wanted
