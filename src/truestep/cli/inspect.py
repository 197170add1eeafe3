"""`truestep inspect`."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def inspect(
    run: str = "auto",
    /,
    *,
    step: Annotated[int, Parameter(validator=Number(gt=0))],
) -> None:
    """Show what a step was trained on, and which tokens cost most.

    Recomputes the run from the nearest checkpoint before, prints the documents and tokens of the
    step's batch, worst first, and writes a page with every token coloured by its loss.

    Parameters
    ----------
    run
        A run's directory; auto is the newest below runs/.
    step
        The step to look at, 1 for the first.

    """
    import os

    from truestep.cli.options import say
    from truestep.config import resolve
    from truestep.observe.inspection import format_inspection
    from truestep.observe.inspection_page import write_inspection_page
    from truestep.workflows.inspect import inspect_step
    from truestep.workflows.run import INSPECTIONS, find_run

    directory = find_run(run, resolve({}, os.environ).run)
    inspection = inspect_step(directory, step, say)
    say(format_inspection(inspection))
    page = directory / INSPECTIONS / f"step-{step}.html"
    page.parent.mkdir(exist_ok=True)
    say(f"every token, coloured by its loss: {write_inspection_page(inspection, page)}")
