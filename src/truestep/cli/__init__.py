"""The command line: one thin file a command, each imported only when it is called."""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import truestep

_COMMANDS = {
    "train": "Train a model on text, or go on with a run.",
    "prepare": "Turn text into a directory of token shards.",
    "sample": "Let a trained model write.",
    "evaluate": "Measure a trained model's loss and bits per byte.",
    "report": "Draw a run's plots and write its report page.",
}
USAGE, RUNTIME, INTERRUPTED = 2, 1, 130


def build_app() -> App:
    """Return the command line; the commands themselves are imported when called."""
    app = App(
        name="truestep",
        help="Train next-token-prediction language models, with a training step you can trust.",
        version=truestep.__version__,
        result_action="return_value",
    )
    for name, text in _COMMANDS.items():
        app.command(f"truestep.cli.{name}:{name}", name=name, help=text)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 runtime, 2 usage, 130 and 143 signals."""
    app = build_app()
    try:
        result = app(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
        )
    except CycloptsError as error:
        from truestep.cli.options import explain_usage

        return _fail(explain_usage(error), USAGE)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUNTIME
    except (ValueError, TypeError) as error:
        return _fail(str(error), USAGE)
    except (OSError, RuntimeError) as error:
        return _fail(str(error), RUNTIME)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code
