"""A progress bar of a pipeline: workers leave a file for each piece that is done."""

import contextlib
import threading
from collections.abc import Generator

from apache_beam.io.filesystems import FileSystems

from beam_runner import _files

SECONDS = 0.5  # Between two looks.


@contextlib.contextmanager
def bar(title: str, folder: str, total: int) -> Generator[None]:
    """Shows how many of the pieces of work have a file in a folder."""
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError as e:
        raise ImportError(
            "beam_runner: progress=True shows the bars of the package rich: "
            "pip install rich."
        ) from e
    stopped = threading.Event()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task(title, total=total)

        def look() -> None:
            (found,) = FileSystems.match([_files.join(folder, "*")])
            names = (m.path for m in found.metadata_list)
            done = sum(not name.endswith(".tmp") for name in names)
            progress.update(task, completed=min(done, total))

        def watch() -> None:
            while not stopped.wait(SECONDS):
                look()

        thread = threading.Thread(target=watch, name="drjax-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            look()
