"""`truestep evaluate`."""


def evaluate(
    run: str = "auto",
    /,
    *,
    data: str | None = None,
    checkpoint: str = "newest",
    device: str = "auto",
) -> None:
    """Measure a trained model's loss and bits per byte.

    Parameters
    ----------
    run
        A run's directory; auto is the newest below runs/.
    data
        Text to measure on: a file, a directory or a built-in corpus, all of it. Without it, the
        run's own validation text.
    checkpoint
        newest, best (by validation loss) or a step.
    device
        cpu, cuda, cuda:N or mps; auto is an accelerator if there is one.

    """
    import os

    from truestep.cli.options import say
    from truestep.config import resolve
    from truestep.workflows.evaluate import evaluate_run
    from truestep.workflows.run import find_run

    evaluate_run(find_run(run, resolve({}, os.environ).run), data, device, checkpoint, say)
