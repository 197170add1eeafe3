"""`truestep verify`."""

from pathlib import Path


def verify(path: str = "auto", /) -> int:
    """Check every stored byte of a run, a checkpoint or prepared data.

    Compares every hash, loads every checkpoint, reads every token; changes nothing. Exit code 1 if
    anything is not as it was written.

    Parameters
    ----------
    path
        A run's directory, a checkpoint or prepared data; auto is the newest run below runs/.

    """
    import os

    from truestep.cli.options import say
    from truestep.config import resolve
    from truestep.workflows.run import CONFIG, find_run
    from truestep.workflows.verify import verify as verify_path

    is_run = path == "auto" or (Path(path) / CONFIG).is_file()
    found = find_run(path, resolve({}, os.environ).run) if is_run else Path(path)
    return 1 if verify_path(found, say) else 0
