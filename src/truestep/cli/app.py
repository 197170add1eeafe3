"""The commands, and how they end: exit codes and errors of one line."""

import os
import sys
import warnings
from collections.abc import Sequence
from contextvars import ContextVar

from cyclopts import App, CycloptsError

import truestep
from truestep.observe.text import printable_line
from truestep.settings import ConfigError

_COMMANDS = {
    "train": "Train a model on text, or go on with a run.",
    "plan": "Say what a run will cost and whether it fits.",
    "prepare": "Turn text into a directory of token shards.",
    "sample": "Let a trained model write.",
    "evaluate": "Measure a trained model's loss and bits per byte.",
    "report": "Draw a run's plots and write its report page.",
    "verify": "Check every stored byte of a run, a checkpoint or prepared data.",
    "inspect": "Show what a step was trained on, and which tokens cost most.",
    "replay": "Compute steps of a run once more and compare them bit for bit.",
}
USAGE, RUNTIME = 2, 1
ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("ARGUMENTS")
"""What this program was called with."""


def build_app() -> App:
    """Return the command line; the commands themselves are imported when called."""
    app = App(
        name="truestep",
        help="Train next-token-prediction language models, with a training step you can trust.",
        version=truestep.__version__,
        help_format="plaintext",
        result_action="return_value",
    )
    for name, text in _COMMANDS.items():
        app.command(f"truestep.cli.{name}:{name}", name=name, help=text)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    ARGUMENTS.set(tuple(arguments))
    app = build_app()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            result = app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        from truestep.cli.options import explain_usage

        return fail(explain_usage(error).splitlines(), USAGE)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUNTIME
    except ConfigError as error:
        return fail([problem.text for problem in error.problems], USAGE)
    except (ValueError, TypeError) as error:
        return fail(str(error), USAGE)
    except OSError as error:
        from truestep.storage import DISK_FULL, explain

        remedy = "; make room and try again" if error.errno in DISK_FULL else ""
        return fail(explain(error) + remedy, RUNTIME)
    except (RuntimeError, MemoryError) as error:
        from truestep.workflows.memory import explain_out_of_memory, is_out_of_memory

        text = explain_out_of_memory(error) if is_out_of_memory(error) else str(error)
        return fail(text, RUNTIME)
    return result if isinstance(result, int) else 0


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without the place in the code it comes from."""
    print(f"warning: {printable_line(str(message))}", file=sys.stderr)


def fail(message: str | list[str], code: int) -> int:
    """Print an error, or several, each as one line in which nothing is left to obey."""
    for line in [message] if isinstance(message, str) else message:
        print(f"error: {printable_line(line)}", file=sys.stderr)
    return code
