"""A plan in words: stages in order, what goes to the elements and back, and work."""

import collections
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from drjax._encodings import Sent, sent_as
from drjax._flops import Flops, flops
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, Stage, While


class Values(NamedTuple):
    """Values that an element has, gets or gives: their types, and bytes of them all."""

    title: str
    types: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        counts = collections.Counter(self.types)
        if len(counts) > 8:
            return f"{len(self.types)} values"
        return ", ".join(
            f"{count} x {kind}" if count > 1 else kind for kind, count in counts.items()
        )


class Round(NamedTuple):
    """What one element of a round gets, has and gives, and its operations."""

    down: Values  # The same for all elements,
    scattered: Values  # and handed out to them by the server, to each its part.
    own: Values
    kept_before: Values  # By an earlier round, for this one.
    up: Values
    kept: Values  # For later stages,
    results: Values  # and for good.
    flops: Flops


def of_round(plan: Plan, stage: MapReduce) -> Round:
    handed_out = [i for i in stage.placed_inputs if i in plan.scattered]
    rounds = [s for s in plan.stages if isinstance(s, MapReduce)]
    made = {i for s in rounds for i in s.placed_outputs}
    own = [i for i in stage.placed_inputs if i not in plan.scattered | made]
    again = [i for i in stage.placed_inputs if i in made]
    kept = plan.residuals(stage)
    results = [i for i in stage.placed_outputs if i not in kept]
    operations = " ".join(sorted({operation for operation, _ in stage.reductions}))

    def values(
        title: str, avals: Sequence[Any], sent: Sequence[Sent | None] = ()
    ) -> Values:
        types, size = [], 0
        for aval, encoded in itertools.zip_longest(avals, sent):
            kind = f"{aval.dtype}{list(aval.shape)}"
            types.append(f"{kind} as {encoded.name}" if encoded else kind)
            size += encoded.bytes if encoded else aval.size * aval.dtype.itemsize
        return Values(title, tuple(types), size)

    return Round(
        values("down", [plan.avals[i] for i in stage.server_inputs]),
        values("scattered", [plan.element(i) for i in handed_out]),
        values("own", [plan.element(i) for i in own]),
        values("kept before", [plan.element(i) for i in again]),
        values(
            f"up, {operations}",
            [plan.avals[i] for _, i in stage.reductions],
            [sent_as(stage.body, k) for k in range(len(stage.reductions))],
        ),
        values("kept", [plan.element(i) for i in kept]),
        values("results", [plan.element(i) for i in results]),
        flops(stage.body),
    )


def amount(number: int, unit: str) -> str:
    """A number to three digits, with the prefix of a power of 1000."""
    if number < 1000:
        return f"{number} {unit}"
    scaled, prefixes = float(number), iter("kMGTPE")
    prefix = ""
    while scaled >= 999.5:
        scaled, prefix = scaled / 1000, next(prefixes)
    return f"{scaled:.3g} {prefix}{unit}"


def work(jaxpr: Any, count: Flops) -> str:
    """How much a jaxpr does."""
    n = len(jaxpr.jaxpr.eqns)
    parts = [f"{n} operation{'s' * (n != 1)}"]
    if count.total or count.at_least:
        at_least = "at least " * count.at_least
        unit = "FLOP" if count.total == 1 else "FLOPs"
        parts.append(at_least + amount(count.total, unit))
    return ", ".join(parts)


def title(stage: Stage) -> str:
    match stage:
        case Server():
            return "server"
        case MapReduce():
            elements = "element" if stage.n == 1 else "elements"
            return f"round over {stage.placement!r}, {stage.n} {elements}"
        case Scan():
            backwards = ", from the last to the first" * stage.reverse
            return f"scan, {stage.length} times{backwards}"
        case While():
            return "while"
        case Branch():
            return f"one of {len(stage.branches)} branches"


def text(plan: Plan) -> list[str]:
    """The lines of `str(plan)`."""
    lines: list[str] = []
    for stage in plan.stages:
        head = title(stage)
        match stage:
            case Server():
                lines.append(f"{head}: {work(stage.jaxpr, flops(stage.jaxpr))}")
            case MapReduce():
                r = of_round(plan, stage)
                lines.append(f"{head}: each {work(stage.body, r.flops)}")
                lines += _rows(stage, r)
            case Scan():
                lines += [head, *_indented(stage.body)]
            case While():
                lines += [head, *_indented(stage.predicate)]
                lines += ["do", *_indented(stage.body)]
            case Branch():
                for i, branch in enumerate(stage.branches):
                    lines += [f"branch {i}", *_indented(branch)]
    return lines or ["nothing to do"]


def _rows(stage: MapReduce, r: Round) -> list[str]:
    lines = []
    for values in r[:-1]:
        if values.types:
            in_all = amount(stage.n * values.bytes, "B")
            size = f"{amount(values.bytes, 'B')} each, {in_all} in all"
            lines.append(f"  {values.title}: {values} ({size})")
    return lines


def _indented(plan: Plan) -> list[str]:
    return ["  " + line for line in text(plan)]
