"""The plan of a program: what the server does, and what each element does in a round.

A plan is pure data. Its values have numbers. `Server` and `MapReduce` stages read some
values and write others, in order; an engine runs them without knowing how JAX traces.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import mapped_aval

from drjax._compat import ClosedJaxpr


class At(NamedTuple):
    """Where a placed value has its elements."""

    placement: str
    n: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Server:
    """Work of the server: `jaxpr` of the values `inputs` gives the values `outputs`."""

    jaxpr: ClosedJaxpr
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MapReduce:
    """One round over a placement.

    Each element runs `body: (index, *server inputs, *own part of the placed inputs) ->
    (*parts to reduce, *own part of the placed outputs)`, where `index` is its int32
    position. A placed value has its elements along an axis of its own, see `Plan.at`.
    """

    placement: str
    n: int
    body: ClosedJaxpr
    server_inputs: tuple[int, ...]
    placed_inputs: tuple[int, ...]
    reductions: tuple[tuple[str, int], ...]  # Operation, and the value it gives.
    placed_outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scan:
    """A loop of `length` rounds or more: `(constants, carry, x) -> (carry, y)`."""

    body: "Plan"
    length: int
    reverse: bool
    constants: tuple[int, ...]
    init: tuple[int, ...]
    xs: tuple[int, ...]
    carry: tuple[int, ...]
    ys: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class While:
    """A loop while `predicate: (constants, carry) -> [bool]` says so."""

    predicate: "Plan"
    body: "Plan"
    predicate_constants: tuple[int, ...]
    body_constants: tuple[int, ...]
    init: tuple[int, ...]
    carry: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One of several plans, the one that the server value `index` says."""

    branches: tuple["Plan", ...]
    index: int
    operands: tuple[int, ...]
    results: tuple[int, ...]


Stage = Server | MapReduce | Scan | While | Branch


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program as stages over numbered values.

    Args:
      stages: in order.
      avals: the types of all values, by number.
      at: where placed values have their elements, by number.
      scattered: which of them the server has, and hands out.
      inputs: the arguments' numbers, leaf by leaf.
      constants: values known from the start.
      outputs: the results' numbers, leaf by leaf.
    """

    stages: tuple[Stage, ...]
    avals: tuple[Any, ...]
    at: dict[int, At]
    scattered: frozenset[int]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    outputs: tuple[int, ...]
    in_tree: Any
    out_tree: Any

    @property
    def rounds(self) -> int:
        """How many rounds there are, those in loops and branches left out."""
        return sum(isinstance(stage, MapReduce) for stage in self.stages)

    def element(self, number: int) -> Any:
        """The type of a value; of a placed one, that of one element's part."""
        aval = self.avals[number]
        return (
            aval if number not in self.at else mapped_aval(*self.at[number][1:], aval)
        )

    def __str__(self) -> str:
        """The stages for a reader, with the bytes that go to an element and back."""
        return "\n".join(_describe(self))


Plan.__module__ = "drjax"


def _describe(plan: Plan) -> list[str]:
    lines = []
    for stage in plan.stages:
        match stage:
            case Server():
                lines += [
                    f"server: {_count(stage.jaxpr)}",
                    *_row(plan, "gives", stage.outputs),
                ]
            case MapReduce():
                lines += _describe_round(plan, stage)
            case Scan():
                lines += [f"scan, {stage.length} times", *_indented(stage.body)]
            case While():
                lines += ["while", *_indented(stage.predicate)]
                lines += ["do", *_indented(stage.body)]
            case Branch():
                for i, branch in enumerate(stage.branches):
                    lines += [f"branch {i}", *_indented(branch)]
    return lines or ["nothing to do"]


def _describe_round(plan: Plan, stage: MapReduce) -> list[str]:
    handed_out = [i for i in stage.placed_inputs if i in plan.scattered]
    own = [i for i in stage.placed_inputs if i not in plan.scattered]
    operations = sorted({operation for operation, _ in stage.reductions})
    return [
        f"round over {stage.placement!r}, {stage.n} elements: {_count(stage.body)}",
        *_row(plan, "down", [*stage.server_inputs, *handed_out], sized=True),
        *_row(plan, "own", own, sized=True),
        *_row(
            plan,
            f"up, {' '.join(operations)}",
            [i for _, i in stage.reductions],
            sized=True,
        ),
        *_row(plan, "kept", stage.placed_outputs, sized=True),
    ]


def _row(plan: Plan, title: str, ids: Sequence[int], sized: bool = False) -> list[str]:
    """A line on values, as each element has them."""
    if not ids:
        return []
    avals = [plan.element(i) for i in ids]
    types = [f"{aval.dtype}{list(aval.shape)}" for aval in avals]
    if len(types) > 8:
        types = [f"{len(types)} values"]
    size = sum(aval.size * aval.dtype.itemsize for aval in avals)
    return [f"  {title}: {', '.join(types)}" + f" ({size:,} B)" * sized]


def _count(jaxpr: ClosedJaxpr) -> str:
    n = len(jaxpr.jaxpr.eqns)
    return f"{n} operation{'s' * (n != 1)}"


def _indented(plan: Plan) -> list[str]:
    return ["  " + line for line in _describe(plan)]
