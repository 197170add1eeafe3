"""Compiling: whether it pays, by which options, and what happens where it does not work."""

import contextlib
import functools
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from truestep.compile_cache import discard_cut_libraries

Compilation = Literal["on", "layers", "off"]
# Arithmetic of a run that earns back a cold compile. The whole takes 37 to 50 s on two CPU cores:
# 1000 steps of W3 are 2e13 (with 4096 ids, 530 are 1.5e13), 250 of W1 and 290 of W2 6e13 to 7e13.
_WORTH_FLOPS: dict[str, dict[Compilation, float]] = {"cpu": {"on": 2.5e13}, "cuda": {"on": 1e16}}
# One layer for all takes 16 to 24 s where the whole takes 46 to 70, which 400 steps of W3 with 4096
# ids earn back. Its steps are 2 to 7% longer: after 5600 of them the whole is as far.
_WORTH_FLOPS_WITH_LAYERS: dict[str, dict[Compilation, float]] = {
    "cpu": {"layers": 1.5e13, "on": 1.5e14}
}
_END_WITH_PARENT = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of Linux
"""
_PROBE = """
import torch
from truestep.compiler import compile_options
compile_options(torch.device("cpu"))
"""
# Their arguments say all that they do, but torch keeps no graph with them. With it kept, and with
# functions that bring their own backward, a first step of W3 that finds it takes 5.7 s, not 12.5.
_AUTOCAST = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")
_LONGEST_SECONDS = 120.0  # that the text has been ready for, and the headers have not


def worth_compiling(
    setting: Literal["auto"] | Compilation,
    device: torch.device,
    run_flops: float,
    *,
    has_layers: bool,
) -> Compilation:
    """Return what to try: for auto, what the run is long enough for."""
    if setting != "auto":
        return setting
    floors = _WORTH_FLOPS_WITH_LAYERS.get(device.type) if has_layers else None
    floors = floors or _WORTH_FLOPS.get(device.type, {})
    paying: list[Compilation] = [kind for kind, floor in floors.items() if run_flops >= floor]
    return max(paying, key=floors.__getitem__, default="off")


def resolve_compile(
    setting: Literal["auto"] | Compilation,
    device: torch.device,
    run_flops: float,
    *,
    has_layers: bool,
) -> Compilation:
    """Return what to compile: for auto, what is worth it, where a one-line probe compiles."""
    worth_it = worth_compiling(setting, device, run_flops, has_layers=has_layers)
    if setting == "auto" and worth_it != "off" and compile_options(device) is None:
        return "off"
    return worth_it


@contextlib.contextmanager
def headers_ahead() -> Iterator[None]:
    """Compile torch's headers in a process beside what the caller does; wait for it at the end.

    Once on a machine they take 8 s of one core, of which preparing text leaves one free.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if sys.platform != "linux" or Path(default_cache_dir(), "precompiled_headers").is_dir():
        yield
        return
    # -P: what lies in the working directory is no module.
    command = [sys.executable, "-P", "-W", "ignore", "-c", _END_WITH_PARENT + _PROBE]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere) as process:
        try:
            yield
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LONGEST_SECONDS)
        finally:
            process.terminate()  # the compiler it has started ends its file by itself


@functools.cache
def compile_options(device: torch.device) -> dict[str, Any] | None:
    """Return the options by which one line compiles for the device; None where none do.

    A missing compiler or Python.h is common.
    """
    # The compiler is trusted to know the processor's vectors: six programs to find that out take 7
    # of the 43 s of a first step of W3, and where it does not, the line fails as well.
    exact = _exact_options(device)
    # One that refuses those against g++'s faults is no g++.
    attempts: list[dict[str, Any]] = [exact | {"cpp.vec_isa_ok": True}, exact, {}]
    for options in attempts:
        try:
            torch.compile(lambda x: x + 1, options=options)(torch.zeros(1, device=device))
        except (RuntimeError, OSError):
            continue
        return options
    return None


def _exact_options(device: torch.device) -> dict[str, Any]:
    """Return the options without which g++ 12 compiles wrong numbers.

    Its pass over dead stores (-fdse) drops what a tile of a transposed bfloat16 matrix was written
    with, where AVX-512 is tuned for as a generic processor or a Sapphire Rapids: two such matrices
    in one kernel, as the keys of attention over 384 tokens, are whatever lay in that memory.
    A step of W3 takes 1.01 times as long without it. torch has no option but what -march= ends in.
    """
    if (device.type, sys.platform, platform.machine()) != ("cpu", "linux", "x86_64"):
        return {}
    from torch._inductor import config

    march = config.cpp.march  # the environment's
    if march is None:
        march = "native"
    return {"cpp.march": f"{march or 'x86-64'} -fno-dse"}  # "": what a compiler takes by itself


def compiled(
    function: Callable[..., Any], device: torch.device, name: str = "the model"
) -> Callable[..., Any]:
    """Compile a function into one graph for each shape; what cannot be traced runs as it is.

    So does everything from the ninth shape on, since each takes seconds to minutes to compile. That
    is said once, by a warning that has the function's `name`.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    discard_cut_libraries(Path(cache_dir()))
    # Counted for this function alone: not with those of other trainers of the process.
    compile_: Any = torch.compile  # whose overloads lack the last argument
    options = compile_options(device)
    fast = compile_(
        function, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True
    )
    works = True

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal works
        if works:
            try:
                with _whole_graphs_kept():
                    return fast(*arguments, **named)
            except FailOnRecompileLimitHit:
                works = False
                limit = torch._dynamo.config.recompile_limit
                warnings.warn(
                    f"more than {limit} shapes of batches, or kinds of layers, were compiled: "
                    f"{name} runs uncompiled from here on; pad batches to a few lengths, or set "
                    "compile=off",
                    stacklevel=2,
                )
            except TorchDynamoException as error:
                works = False
                reason = " ".join(str(error).split("\n", 2)[:2])  # who raised it, and what
                warnings.warn(
                    f"{name} cannot be compiled whole and runs uncompiled: {reason}",
                    stacklevel=2,
                )
        return function(*arguments, **named)

    return call


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Return the parts that a model's class names by a method `compiled_parts()`; else none."""
    named: Any = getattr(type(model), "compiled_parts", None)
    return list(dict.fromkeys(named(model))) if callable(named) else []


class CompiledParts:
    """Parts of a model compiled by themselves, one for all of its class, and only where asked.

    Errors: ValueError for a model that names none.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        if not parts_of(model):
            raise ValueError(
                f"compile=layers, but {type(model).__name__} has no method compiled_parts() that "
                "names its layers; use compile=on, which compiles any model as a whole"
            )
        self._model, self._device = model, device
        self._forwards: dict[type, Callable[..., Any]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the parts run compiled, except one that has been given a forward of its own."""
        replaced: list[nn.Module] = []
        try:
            for part in parts_of(self._model):
                if "forward" not in vars(part):
                    part.forward = MethodType(self._forward_of(type(part)), part)
                    replaced.append(part)
            yield
        finally:
            for part in replaced:
                del part.forward

    def _forward_of(self, kind: Any) -> Callable[..., Any]:
        if kind not in self._forwards:
            self._forwards[kind] = compiled(kind.forward, self._device, kind.__name__)
        return self._forwards[kind]


@contextlib.contextmanager
def _whole_graphs_kept() -> Iterator[None]:
    """Let torch's cache keep graphs with autocast and with backward functions of their own.

    What is said of autocast is in the key, and with it the choice of attention's kernels, which
    torch leaves out: with another choice it is another graph.
    """
    import torch._functorch.config as graph_config
    import torch._inductor.config as kernel_config

    flags: Any = torch.backends.cuda  # a CPU's, too
    chosen = (
        torch.__version__,
        flags.flash_sdp_enabled(),
        flags.mem_efficient_sdp_enabled(),
        flags.math_sdp_enabled(),
        flags.cudnn_sdp_enabled(),
        flags.fp16_bf16_reduction_math_sdp_allowed(),
    )
    marked = dict.fromkeys(_AUTOCAST, str(chosen))
    with (
        torch._dynamo.config.patch(optimize_ddp=False),  # as one process compiles it
        graph_config.patch(autograd_cache_allow_custom_autograd_functions=True),
        kernel_config.patch(unsafe_marked_cacheable_functions=marked),
    ):
        yield


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return the context in which what was compiled runs as it is written, and calls its hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes 1.6 s
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
