"""`truestep plan`."""

import math
import os
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from truestep.cli.options import RunOptions, given, say
from truestep.config import resolve
from truestep.gpus import find_gpu
from truestep.shell import command

_NO_OPTIONS = RunOptions()
_MINUTES, _PRICE = Number(lte=5_256_000), Number(lte=1e9)  # ten years; any currency


def _finite(_: object, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise ValueError("must be a finite number")


def _new_file(_: object, path: Path | None) -> None:
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ValueError("must be in a directory that exists; make it first")
    if path.suffix != ".toml":
        raise ValueError("must end in .toml: the settings are written as TOML")
    if path.exists():
        raise ValueError("must not exist yet; choose another name, or remove it")


def plan(
    config: Path | None = None,
    /,
    *,
    data: Annotated[
        tuple[str, ...], Parameter(alias="-d", negative_iterable=(), show_default=False)
    ] = (),
    minutes: Annotated[float | None, Parameter(validator=(Number(gt=0), _finite, _MINUTES))] = None,
    gpu: str | None = None,
    out: Annotated[Path | None, Parameter(alias="-o", validator=_new_file)] = None,
    price_per_hour: Annotated[
        float | None, Parameter(validator=(Number(gte=0), _finite, _PRICE))
    ] = None,
    options: Annotated[RunOptions, Parameter(name="*", negative_iterable=())] = _NO_OPTIONS,
) -> None:
    """Say what a run will cost and whether it fits, from a few steps of it.

    Parameters
    ----------
    config
        A TOML or JSON file of settings.
    data
        What to train on: a text file, a directory, or a built-in corpus. Short for --data.source;
        several, each with a --data of its own, are mixed by --data.weights.
    minutes
        Choose num_steps so that the run takes this long, from the command to its last update.
    gpu
        Compute it for a GPU that is not here, from its data sheet: h100, a100-80gb, rtx4090, ...
    out
        Where to write the settings, with what was found in place of auto, as a TOML file for
        `truestep train`.
    price_per_hour
        What an hour of this machine costs.
    options
        The settings, as of `truestep train`.

    """
    began = time.perf_counter()
    chosen = resolve(given(options, data), os.environ, config)

    from truestep.workflows.plan import filled, plan_on, plan_within, write_config
    from truestep.workflows.plan import plan as plan_run
    from truestep.workflows.plan_text import lines_of
    from truestep.workflows.run import check_directory, check_name

    check_name(chosen.run.name)
    check_directory(Path(chosen.run.directory))
    loaded_in = time.perf_counter() - began
    if gpu is not None:
        result = plan_on(chosen, find_gpu(gpu), say)
        result = result if minutes is None else filled(result, 60 * minutes, chosen.training)
    elif minutes is not None:
        result = plan_within(chosen, 60 * minutes, say, loaded_in)
    else:
        result = plan_run(chosen, say, loaded_in)
    for line in lines_of(result, price_per_hour):
        say(line)
    if out is not None:
        write_config(out, result.config)
        say(f"settings written to {out}; train with: {command('train', str(out))}")
