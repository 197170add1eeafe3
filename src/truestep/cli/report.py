"""`truestep report`."""


def report(run: str = "auto", /) -> None:
    """Draw a run's plots and write its report page.

    Parameters
    ----------
    run
        A run's directory; auto is the newest below runs/.

    """
    import os

    from truestep.cli.options import say
    from truestep.config import resolve
    from truestep.observe.page import write_report
    from truestep.observe.plots import draw_plots
    from truestep.workflows.run import find_run

    directory = find_run(run, resolve({}, os.environ).run)
    for path in [*draw_plots(directory), write_report(directory)]:
        say(str(path))
