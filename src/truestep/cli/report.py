"""`truestep report`."""


def report(run: str = "auto", /) -> None:
    """Draw a run's plots and write its report page.

    Parameters
    ----------
    run
        A run's directory; auto is the newest below runs/.

    """
    from truestep.config import RunSettings
    from truestep.observe.page import write_report
    from truestep.observe.plots import draw_plots
    from truestep.workflows.run import find_run

    directory = find_run(run, RunSettings())
    for path in [*draw_plots(directory), write_report(directory)]:
        print(path)
