"""`truestep replay`."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def replay(
    run: str = "auto",
    /,
    *,
    step: Annotated[int | None, Parameter(validator=Number(gt=0))] = None,
    to: Annotated[int | None, Parameter(validator=Number(gt=0))] = None,
) -> int:
    """Compute steps of a run once more and compare them with its log, bit for bit.

    Starts from the nearest checkpoint before and changes nothing. Exit code 1 if anything differs.

    Parameters
    ----------
    run
        A run's directory, or a bundle that a run left at a loss that was not finite; auto is the
        newest run below runs/.
    step
        The step to compute again, 1 for the first.
    to
        The last step, if there are several.

    """
    import os
    from pathlib import Path

    from truestep.checkpoint.bundle import is_bundle
    from truestep.cli.options import say
    from truestep.config import resolve
    from truestep.workflows.replay import replay as replay_run
    from truestep.workflows.replay import replay_bundle
    from truestep.workflows.run import RunError, find_run

    if is_bundle(Path(run)):
        if step is not None or to is not None:
            raise RunError(f"{run} is a bundle of one step; leave --step and --to out")
        return 1 if replay_bundle(Path(run), say) else 0
    directory = find_run(run, resolve({}, os.environ).run)
    if step is None:
        raise RunError(f"say which step of {directory} to compute again: --step N, and --to M")
    return 1 if replay_run(directory, step, step if to is None else to, say) else 0
