"""The metrics of a run as curves, against rounds and against what was communicated."""

import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from federated._metrics import PERCENTILE, Row, to_columns

TRAINING = "tab:orange"
EVALUATION = ("tab:blue", "tab:green", "tab:purple", "tab:brown")
LOST = {"dropped": "tab:orange", "late": "gold", "rejected": "tab:red"}
CLIENTS = {"reported": "#d5dbe3", **LOST}

Columns = Mapping[str, np.ndarray]


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draws metrics into a PNG, against rounds on the left and bytes on the right.

    There is a panel for each metric of evaluations, one for the loss and, if clients
    were lost, one for who reported. Percentiles over clients are bands. What was
    evaluated is in the first row, before any training.
    """
    columns = to_columns(rows)
    last = {name: value for row in rows for name, value in row.items()}
    zeros = np.zeros(len(rows))
    sent = np.nan_to_num([columns.get(x, zeros) for x in ("bytes_down", "bytes_up")])
    axis = {"round": columns["round"]}
    if sent.any():
        axis["communicated, down and up"] = sent.sum(0).cumsum()

    curves = _curves(columns, rows[0])
    clients = not curves or any(np.nansum(columns.get(x, zeros)) for x in LOST)
    heights = [1.0] * len(curves) + [0.5] * clients
    figure = Figure((4.5 * len(axis), 0.5 + 2.4 * sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(heights),
        len(axis),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=heights,
    )
    for row, metric in zip(grid, curves, strict=False):
        for axes, x in zip(row, axis.values(), strict=True):
            _draw_metric(axes, x, columns, last, metric, curves[metric])
        row[0].set_ylabel(_plain(metric))
        row[0].legend(frameon=False, fontsize="small")
    if clients:
        for axes, x in zip(grid[-1], axis.values(), strict=True):
            counts = [columns.get(name, zeros) for name in CLIENTS]
            _draw_clients(axes, x, counts)
        grid[-1, 0].set_ylabel("clients")
        grid[-1, 0].legend(loc="lower left", fontsize="x-small", ncols=len(CLIENTS))
    for axes in grid.flat:
        axes.margins(x=0.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes, label in zip(grid[-1], axis, strict=True):
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        if label != "round":
            axes.xaxis.set_major_formatter(EngFormatter("B"))
    # Matplotlib's version would be in the file.
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _curves(columns: Columns, first: Row) -> dict[str, dict[str, str]]:
    """What is drawn: by metric, the loss last, and label, the name in the columns."""
    curves: dict[str, dict[str, str]] = {}
    for column in columns:
        name = PERCENTILE.sub("", column)
        source, _, metric = name.rpartition("/")
        if column != "round" and (source or column in first or metric == "loss"):
            label = source or ("evaluation" if column in first else "training")
            curves.setdefault(metric, {})[label] = name
    return dict(sorted(curves.items(), key=lambda item: item[0] == "loss"))


def _draw_metric(
    axes: Axes,
    x: np.ndarray,
    columns: Columns,
    last: Row,
    metric: str,
    curves: Mapping[str, str],
) -> None:
    drawn = [c for c in columns if PERCENTILE.sub("", c) in curves.values()]
    is_part = "accuracy" in metric and not any((columns[c] > 1).any() for c in drawn)
    unit = ".1%" if is_part else ".3g"
    # The first ones are wider: curves that are on each other are all seen.
    widths = [1.5 * (k + 1) for k in reversed(range(len(curves)))]
    for (label, name), color, width in zip(
        curves.items(), itertools.cycle(EVALUATION), widths, strict=False
    ):
        color = TRAINING if label == "training" else color
        if name in columns:
            at, y = _points(x, columns[name])
            marker = "o" if len(at) <= 40 else None
            end = f"{_plain(label)}, {last[name]:{unit}} in the end"
            axes.plot(at, y, color=color, lw=width, marker=marker, ms=3, label=end)
        ends = [c.removeprefix(f"{name} p") for c in drawn]
        percentiles = sorted(int(p) for p in ends if p.isdecimal())
        while len(percentiles) > 1:
            low, high = percentiles.pop(0), percentiles.pop()
            pair = [columns[f"{name} p{p}"] for p in (low, high)]
            at, bottom, top = _points(x, *pair)
            band = f"{_plain(label)}, p{low} to p{high} of clients"
            if len(percentiles) == 1:
                band += f", dashed p{percentiles[0]}"
            axes.fill_between(
                at, bottom, top, color=color, alpha=0.15, lw=0, label=band
            )
        for p in percentiles:
            at, y = _points(x, columns[f"{name} p{p}"])
            axes.plot(at, y, "--", color=color, lw=1)
    if is_part:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)


def _plain(name: str) -> str:
    """A name of the user's: dollars are no mathematics."""
    return name.replace("$", r"\$")


def _draw_clients(axes: Axes, x: np.ndarray, counts: Sequence[np.ndarray]) -> None:
    """Counts stacked, each from the round before to its own."""
    at, *ys = _points(x, *counts, most=100)
    at, ys = np.r_[x[0], at], np.c_[np.zeros(len(ys)), ys]
    colors = [*CLIENTS.values()]
    axes.stackplot(at, ys, labels=[*CLIENTS], colors=colors, step="pre")
    axes.set_ylim(bottom=0)


def _points(x: np.ndarray, *ys: np.ndarray, most: int = 300) -> list[np.ndarray]:
    """Where all have a value. Of many, the means of groups: noise would be a band."""
    there = np.isfinite(ys).all(0)
    groups = min(most, there.sum())
    return [
        np.array([group.mean() for group in np.array_split(y[there], groups)])
        if groups
        else y[:0]
        for y in (x, *ys)
    ]
