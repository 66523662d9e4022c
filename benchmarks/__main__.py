"""Prints what drjax costs beside plain JAX. Writes no file; fails for no figure."""

import argparse
import json
import subprocess
import sys
import time

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import core, federated, streaming

try:
    from benchmarks import beam
except ModuleNotFoundError:  # Without the extra: no figures of Beam.
    beam = None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each ratio")
    beam_figures = beam.FIGURES if beam else {}
    with_peers = {**streaming.FIGURES, **federated.FIGURES}
    figures = {**core.FIGURES, **with_peers, **beam_figures}
    parser.add_argument("--only", nargs="+", choices=figures, default=list(figures))
    parser.add_argument(
        "--incumbent",
        metavar="PYTHON",
        help="the Python of an environment with drjax 0.2.1: shows its ratios too",
    )
    parser.add_argument(
        "--peers",
        metavar="PYTHON",
        help="the Python of an environment with pfl[pytorch]: compares with these too",
    )
    options = parser.parse_args()

    start = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table("figure", title=f"drjax beside plain JAX {jax.__version__}")
    for title in ("ours", "compared with", "ratio", r"\[min, max]", "bar"):
        table.add_column(title, justify="right", no_wrap=True)
    if options.incumbent:
        table.add_column("drjax 0.2.1: ratio", justify="right", no_wrap=True)
    for figure in options.only:
        with console.status(figure):
            more = [options.peers] * (figure in with_peers)
            rows = list(figures[figure](options.repeats, *more))
            theirs = {}
            if options.incumbent and figure in core.SHARED:
                theirs = _incumbent_rows(options.incumbent, figure, options.repeats)
        for row in rows:
            values = [_show(row.ours, row.unit), _show(row.plain, row.unit)]
            values += [f"{row.ratio:.2f}", _range(row), f"{row.bar:g}"]
            if row.name in theirs:
                values.append(
                    f"{theirs[row.name].ratio:.2f} {_range(theirs[row.name])}"
                )
            table.add_row(row.name, *values, style="red" * (row.ratio > row.bar))
        table.add_section()
    console.print(table)
    console.print(
        f"A ratio is the median of {options.repeats} repeats; red: over the bar. Took "
        f"{time.perf_counter() - start:.0f} s."
    )


def _incumbent_rows(python: str, figure: str, repeats: int) -> dict[str, core.Row]:
    # -I: the drjax of that environment, not the one in this folder.
    command = [python, "-I", core.__file__, figure, str(repeats)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = [core.Row(**row) for row in json.loads(result.stdout)]
    return {row.name: row for row in rows}


def _show(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    return f"{value / 1e6:.3g} MB" if unit == "B" else f"{value:g}"


def _range(row: core.Row) -> str:
    several = len(row.ratios) > 1
    return rf"\[{min(row.ratios):.2f}, {max(row.ratios):.2f}]" if several else ""


if __name__ == "__main__":
    main()
