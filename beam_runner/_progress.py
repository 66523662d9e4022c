"""Progress bars: workers leave a file for each piece of a pipeline that is done."""

import contextlib
import threading
from collections.abc import Generator
from typing import Any

from apache_beam.io.filesystems import FileSystems

from beam_runner import _files

SECONDS = 0.5  # Between two looks.


class Bars:
    """The bars of a run; none, if they are not shown."""

    def __init__(self, progress: Any = None):
        self._progress, self._rounds = progress, None

    @property
    def are_shown(self) -> bool:
        return self._progress is not None

    def start_rounds(self, total: int, done: int) -> None:
        """Shows a bar of rounds; those of their pipelines then go when these end."""
        if self.are_shown:
            self._rounds = self._progress.add_task("Rounds", total=total)
            self._progress.advance(self._rounds, done)

    def end_round(self) -> None:
        if self.are_shown:
            self._progress.advance(self._rounds)

    @contextlib.contextmanager
    def of_pipeline(self, number: int, folder: str, total: int) -> Generator[None]:
        """Shows how many of the pieces of work have a file in a folder."""
        if not self.are_shown:
            yield
            return
        progress, stopped = self._progress, threading.Event()
        task = progress.add_task(f"Pipeline {number}", total=total)

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
            if self._rounds is not None:
                progress.remove_task(task)


@contextlib.contextmanager
def bars(shown: bool) -> Generator[Bars]:
    if not shown:
        yield Bars()
        return
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError as e:
        raise ImportError(
            "beam_runner: progress=True shows the bars of the package rich: "
            "pip install rich."
        ) from e
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        yield Bars(progress)
