"""Compiles rounds of local training for TPUs of 4 to 8192 devices, on any machine.

Replicas of a transformer train by themselves for some steps, then their mean moves the
model: DiLoCo, as a drjax program and written by hand. The number of replicas grows with
the devices. Nothing is run: what each device computes, keeps and communicates is read
from what XLA has compiled, for the round and for the gradient of the loss after it.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import topologies
from jax.sharding import Mesh
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import hlo
from benchmarks.local_rounds import ENCODED, PROGRAMS, Setting, compiled, make_mesh
from examples import transformer

TOPOLOGIES = (
    *("v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:16x16x24"),
    *("v4:8x8x8", "v4:16x16x16"),
)
# Of each kind, how many devices share a replica. Four chips of a v5e are to be two; on
# 8192 of a v4, XLA divides by zero if only two share one (libtpu 0.0.52).
MODEL = {"v5e": 2, "v5p": 4, "v4": 4}
MARKERS = {"v5e": "o", "v5p": "s", "v4": "^"}
SETTINGS = {
    "small": Setting(transformer.Config(2048, 4, 256, 4, 256), steps=4, batch=4),
    "1b": Setting(transformer.CONFIGS["1b"], steps=4, batch=8),
    "8b": Setting(transformer.CONFIGS["8b"], steps=4, batch=8, model=8),
}


# XLA merges all-reduces of less than a few MB on its own.
MERGE = {"xla_jf_crs_combiner_threshold_in_bytes": str(2**40)}


# What is sent over the replicas, as a part of what is sent by hand, in float32; and by
# what kinds of collectives, though XLA may all-reduce scales that are gathered.
SENT = {
    "bfloat16 round": (0.5, {"all-reduce"}),
    "int8 round": (0.27, {"all-to-all", "all-gather"}),
}


class Rates(NamedTuple):
    """What a chip is published to do in a second."""

    flops: float  # In bfloat16.
    links: float  # Bytes that it sends to other chips of a slice, by all its links,
    link: float  # and by one, as in a ring one way.
    slices: float  # Bytes that it sends to other slices.


# https://docs.cloud.google.com/tpu/docs/v5p: 1200 GB/s both ways over six links, and
# 50 Gbit/s of data centre network.
PUBLISHED = {"v5p": Rates(459e12, 600e9, 100e9, 50e9 / 8)}


#
# Compiling.
#
def topology(name: str) -> Sequence[Any]:
    """The devices of a TPU, which need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            "XLA's compiler for TPUs is in the package libtpu, which is not installed. "
            "Install it, on Linux on x86: pip install 'drjax[topologies]'. It needs no "
            "TPU."
        )
    # It asks no metadata server what it runs on, and may be in several processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


class Cost(NamedTuple):
    """What each device does in a program."""

    flops: float  # XLA's count, which takes the body of a loop once.
    temporaries: int
    # Over the replicas, and within one: how often each kind runs, on how many bytes.
    over_replicas: dict[str, tuple[int, int]]
    within: dict[str, tuple[int, int]]
    sent: float  # Bytes over the replicas that a device sends.

    def totals(self) -> dict[str, float]:
        return {
            "FLOPs": self.flops,
            "temporaries": self.temporaries,
            "bytes over replicas": sum(size for _, size in self.over_replicas.values()),
            "bytes within": sum(size for _, size in self.within.values()),
        }


def cost(program: Any, mesh: Mesh) -> Cost:
    """Reads what a compiled program costs each device."""
    over: dict[str, tuple[int, int]] = {}
    within: dict[str, tuple[int, int]] = {}
    sent = 0.0
    for found in hlo.collectives(program.as_text()):
        replicas = "replicas" in found.axes(mesh.shape)
        sums = over if replicas else within
        times, size = sums.get(found.kind, (0, 0))
        sums[found.kind] = times + found.times, size + found.times * found.bytes
        sent += found.times * found.sent * replicas
    flops = program.cost_analysis()["flops"]
    return Cost(flops, program.memory_analysis().temp_size_in_bytes, over, within, sent)


class Row(NamedTuple):
    """A program on a TPU."""

    topology: str
    devices: int
    replicas: int
    program: str
    ours: Cost
    hand: Cost

    @property
    def kind(self) -> str:
        return self.topology.split(":")[0]


def rows(
    names: Sequence[str], programs: Sequence[str], setting: Setting, options: Any = None
) -> Iterator[Row | None]:
    """Compiles programs for TPUs; yields a row for each, and None after each step."""
    for name in names:
        mesh = make_mesh(topology(name), setting.model or MODEL[name.split(":")[0]])
        for program in programs:
            costs = []
            for hand in (False, True):
                run = compiled(program, setting, mesh, hand=hand, options=options)
                costs.append(cost(run, mesh))
                yield None
            yield Row(name, mesh.size, mesh.shape["replicas"], program, *costs)


def faults(found: Sequence[Row]) -> Iterator[str]:
    """Which bars are not reached."""
    for row in found:
        title, ours, hand = f"{row.topology}, {row.program}", row.ours, row.hand
        over = {kind: times for kind, (times, _) in ours.over_replicas.items()}
        if row.program in ENCODED:
            most, kinds = SENT[row.program]
            if ours.sent > most * hand.sent:
                part = ours.sent / hand.sent
                yield f"{title}: sends {part:.5f} of float32, and not {most} at most"
            if not kinds <= {*over}:
                yield f"{title}: over the replicas not {kinds}, but {over}"
            continue
        if row.program == "round" and over != {"all-reduce": 1}:
            yield f"{title}: not one all-reduce over the replicas, but {over}"
        for kind, times in over.items():
            if times > (fewer := hand.over_replicas.get(kind, (0, 0))[0]):
                yield f"{title}: {times} {kind} over the replicas, by hand {fewer}"
        for what, value in ours.totals().items():
            if value > (less := hand.totals()[what]):
                yield f"{title}: {what} are {value / less:.5f} of those by hand"
    for kind, program in dict.fromkeys((row.kind, row.program) for row in found):
        same = [
            r.ours.totals() for r in found if (r.kind, r.program) == (kind, program)
        ]
        for what in same[0]:
            low, *_, high = sorted([totals[what] for totals in same] * 2)
            if high > 1.01 * low:
                yield f"{kind}, {program}: {what} are between {low:g} and {high:g}"


#
# Showing.
#
def show(found: Sequence[Row], setting: Setting, console: Console) -> None:
    table = Table(title=f"What each device does; libtpu {version('libtpu')}")
    for title in (
        *("TPU", "devices", "replicas", "program", "GFLOPs", "temporaries"),
        *("over the replicas", "within a replica", "ours / by hand"),
    ):
        table.add_column(title, justify="right", overflow="fold")
    for row in found:
        ours, hand = row.ours.totals(), row.hand.totals()
        ratios = [a / hand[what] for what, a in ours.items()]
        ratios.append(row.ours.sent / row.hand.sent)
        table.add_row(
            *(row.topology, str(row.devices), str(row.replicas), row.program),
            f"{row.ours.flops / 1e9:.4g}",
            _bytes(row.ours.temporaries),
            _collectives(row.ours.over_replicas),
            _collectives(row.ours.within),
            " ".join(f"{ratio:.3f}" for ratio in ratios),
        )
    console.print(table)
    console.print(
        "GFLOPs: as XLA counts them, the body of a loop once. Collectives: how often "
        "they run in a program, loops included, and on how many bytes in all. Ratios: "
        "of FLOPs, temporaries, bytes over the replicas, bytes within, and of what is "
        "sent over the replicas, by a ring."
    )
    for fault in [*faults(found)] or ["All bars are reached."]:
        console.print(fault, style="red" * (fault != "All bars are reached."))
    if known := [row for row in found if row.kind in PUBLISHED]:
        console.print(_seconds(known, setting))


def _seconds(found: Sequence[Row], setting: Setting) -> Table:
    """How long communication over the replicas takes at the published rates."""
    table = Table(title="Over the replicas, at the published rates")
    init = functools.partial(transformer.init, setting.config)
    params = optax.tree.size(jax.eval_shape(init, jax.random.key(0)))
    for title in ("TPU", "program", "all-reduced", "sent"):
        table.add_column(title, justify="right")
    for title in ("all links", "one link", "between slices", "one local step"):
        table.add_column(f"{title}, ms", justify="right")
    for row in found:
        rates, sent = PUBLISHED[row.kind], row.ours.sent
        tokens = setting.batch * setting.config.length
        flops = 6 * params * tokens * row.replicas / row.devices  # Of a local step.
        table.add_row(
            *(row.topology, row.program),
            _bytes(row.ours.totals()["bytes over replicas"]),
            _bytes(sent),
            *(f"{1e3 * sent / r:.3g}" for r in (rates.links, rates.link, rates.slices)),
            f"{1e3 * flops / rates.flops:.3g}",
        )
    return table


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:g} B"


def _collectives(sums: dict[str, tuple[int, int]]) -> str:
    return "; ".join(
        f"{times} {kind}, {_bytes(size)}" for kind, (times, size) in sums.items()
    )


def plot(found: Sequence[Row]) -> Figure:
    """What a device does against the number of devices."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = (
        "GFLOPs",
        "temporaries, MB",
        "MB over the replicas",
        "MB within a replica",
    )
    panels = figure.subplots(1, 4)
    for axes, title, what in zip(panels, titles, found[0].ours.totals(), strict=True):
        scale = 1e9 if what == "FLOPs" else 1e6
        for kind, program in itertools.product(MODEL, PROGRAMS):
            same = [r for r in found if (r.kind, r.program) == (kind, program)]
            devices = [r.devices for r in same]
            by_hand = [r.hand.totals()[what] / scale for r in same]
            last = (kind, program) == ([*MODEL][-1], [*PROGRAMS][-1])
            axes.plot(
                devices,
                [r.ours.totals()[what] / scale for r in same],
                MARKERS[kind] + ("-" if program == "round" else "--"),
                color=f"C{[*MODEL].index(kind)}",
                fillstyle="full" if program == "round" else "none",
                label=f"{kind}, {program}",
            )
            label = "each by hand" if last else None
            axes.plot(devices, by_hand, "k+", ms=12, mew=0.8, zorder=0, label=label)
        axes.set(title=title, xlabel="devices", xscale="log", yscale="log")
        low, high = axes.get_ylim()
        axes.set_yticks([1, 3, 10, 30, 100, 300])
        axes.set_ylim(low / 1.5, 1.5 * high)
        axes.set_xticks([4, 16, 64, 256, 1024, 8192], [4, 16, 64, 256, "1k", "8k"])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle("What each device does")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weak_scaling", description=__doc__
    )
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, metavar="NAME")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    names = [*PROGRAMS, *ENCODED]
    parser.add_argument("--programs", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, help="local steps of a round")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="have XLA merge all-reduces of any size, not only small ones",
    )
    parser.add_argument("--plot", metavar="FILE", help="draws the table there")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    setting = SETTINGS[options.setting]
    if options.steps:
        setting = dataclasses.replace(setting, steps=options.steps)
    console = Console(width=None if sys.stdout.isatty() else 200)
    found: list[Row] = []
    topology(options.topologies[0])  # If it cannot be had, nothing starts.
    with Progress(console=console) as progress:
        total = 2 * len(options.topologies) * len(options.programs)
        task = progress.add_task("Compiling", total=total)
        for row in rows(
            options.topologies,
            options.programs,
            setting,
            MERGE if options.merge else None,
        ):
            if row is None:
                progress.advance(task)
            else:
                found.append(row)
    show(found, setting, console)
    if options.plot:
        plot(found).savefig(options.plot, dpi=130)


if __name__ == "__main__":
    main()
