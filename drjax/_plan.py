"""The plan of a program: what the server does, and what each element does in a round.

A plan is pure data. Its values have numbers. `Server` and `MapReduce` stages read some
values and write others, in order; an engine runs them without knowing how JAX traces.
"""

import dataclasses
from typing import Any, NamedTuple

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
      inputs: the arguments' numbers, leaf by leaf.
      constants: values known from the start.
      outputs: the results' numbers, leaf by leaf.
    """

    stages: tuple[Stage, ...]
    avals: tuple[Any, ...]
    at: dict[int, At]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    outputs: tuple[int, ...]
    in_tree: Any
    out_tree: Any

    @property
    def rounds(self) -> int:
        """How often values go to the elements and back."""
        return sum(isinstance(stage, MapReduce) for stage in self.stages)
