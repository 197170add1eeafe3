"""Start several processes of this program on this machine, by torch's elastic launcher."""

import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_STOP_SECONDS = 300  # to end a step and save, before a process is killed


def launch(
    size: int, arguments: Sequence[str], logs: Path, say_error: Callable[[str], object]
) -> int:
    """Run `truestep ARGUMENTS` in `size` processes and return the exit code of them all.

    The first has the console; what the others print goes to files below `logs`, which stay where
    one has failed. A signal to this process is passed on to all.
    """
    logs.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="processes-", dir=logs))
    others = dict.fromkeys(range(1, size), Std.ALL)
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as `nohup` has it
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=directory.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(directory), redirects=others),
        signals_to_handle="SIGTERM,SIGINT" + ("" if hangup_ignored else ",SIGHUP"),
        shutdown_timeout=_STOP_SECONDS,
    )
    logging.disable(logging.CRITICAL)  # the launcher's own lines: what they say is said here
    try:
        elastic_launch(config, sys.executable)("-m", "truestep", *arguments)
    except SignalException as stopped:
        shutil.rmtree(directory, ignore_errors=True)
        return 128 + stopped.sigval.value
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _explain(rank, failure, directory, say_error)
    finally:
        logging.disable(logging.NOTSET)
    shutil.rmtree(directory, ignore_errors=True)
    return 0


def _explain(
    rank: int, failure: ProcessFailure, directory: Path, say_error: Callable[[str], object]
) -> int:
    """Say which process ended first, and how, unless it has said so itself; return the code."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        say_error(f"process {rank} was ended by {name}; what the others said: {directory}")
        return 128 - failure.exitcode
    if rank and failure.exitcode < 128:  # else a signal ended it well
        said = [
            path.read_text(errors="replace") for path in directory.glob(f"**/{rank}/stderr.log")
        ]
        lines = "".join(said).strip().splitlines() or ["it said nothing"]
        say_error(f"process {rank}: {lines[-1].removeprefix('error: ')} (all it said: {directory})")
    return failure.exitcode
