"""A progress bar for a run, with the latest of its metrics."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from federated._metrics import PERCENTILE, Row


@contextmanager
def progress_bar(
    description: str, rounds: int, enabled: bool = True
) -> Generator[Callable[[Row], None]]:
    """Yields a function that shows a row. If not on a terminal, the last is printed."""
    # The values get what is left of the line.
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[values]}", markup=False, table_column=rest),
    )
    latest: dict[str, float | int] = {}
    with Progress(
        *columns, refresh_per_second=4, expand=True, disable=not enabled
    ) as progress:
        task = progress.add_task(description, total=rounds, values="")

        def show(row: Row) -> None:
            for name, value in row.items():
                # The first row has what is evaluated.
                if name in latest or name == "loss" or "/" in name or not row["round"]:
                    latest[name] = value
            shown = [n for n in latest if n != "round" and not PERCENTILE.search(n)]
            shown.sort(key=lambda name: name != "loss")
            values = "  ".join(f"{name} {latest[name]:.4g}" for name in shown)
            progress.update(task, completed=row["round"], values=values)

        yield show
