"""The plan of a program: what the server does, and what each element does in a round.

A plan is pure data. Its values have numbers. Stages read some values and write others,
in order; an engine runs them without knowing how JAX traces. `Server` and `MapReduce`
stages hold jaxprs; `Scan`, `While` and `Branch` hold plans, with numbers of their own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import mapped_aval

from drjax import _export
from drjax._compat import ClosedJaxpr
from drjax._jaxprs import dce_after_first, pick


class At(NamedTuple):
    """Where a value has the `n` elements of a placement: on which axis."""

    placement: str
    n: int
    axis: int


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
    """Work of the server.

    Args:
      jaxpr: without constants, of the inputs.
      inputs, outputs: numbers of values.
    """

    jaxpr: ClosedJaxpr
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def export(self, platforms: Sequence[str] | None = None) -> bytes:
        """Serialises `jaxpr` with `jax.export`, for `platforms`; by default this one.

        It runs without this library: `jax.export.deserialize(data).call(*inputs)`.

        Raises:
          NotImplementedError: if it calls Python functions of this process.
        """
        return _export.export_server(self, platforms)


@dataclasses.dataclass(frozen=True, eq=False)
class MapReduce:
    """One round over a placement.

    Each element runs `body: (index, *server inputs, *own part of the placed inputs) ->
    (*parts to reduce, *own part of the placed outputs)`, where `index` is its int32
    position. A placed value has its elements along an axis of its own, see `Plan.at`.
    A placement inside this one, as clients of pods, is inside the body.

    Args:
      placement, n: name, and number of elements.
      body: a jaxpr without constants.
      server_inputs: values that every element gets as they are.
      placed_inputs: values of which it gets, or has, its own part.
      reductions: for each the operation, 'sum', 'prod', 'max', 'min', 'and' or 'or',
        and the value that it gives.
      placed_outputs: values of which it makes its own part.
    """

    placement: str
    n: int
    body: ClosedJaxpr
    server_inputs: tuple[int, ...]
    placed_inputs: tuple[int, ...]
    reductions: tuple[tuple[str, int], ...]  # Operation, and the value it gives.
    placed_outputs: tuple[int, ...]

    def export(
        self,
        platforms: Sequence[str] | None = None,
        chunk: int | str | None = None,
    ) -> bytes:
        """Serialises what elements do with `jax.export`, to run without this library.

        `jax.export.deserialize(data).call(...)` takes the body's arguments and gives
        its results; with a `chunk`, those of c elements at once::

            (count, index, *server inputs, *placed inputs)
                -> (*reduced values, *placed outputs)

        Placed values, and `index: int32 [c]`, have their elements along axis 0. The
        first `count: int32 []` elements, one at least, are valid. What the others hold
        does not matter: they run as the first one does, and are not in what is reduced.
        Their part of the placed outputs is to be thrown away.

        Args:
          platforms: as 'cpu', 'cuda', 'rocm' and 'tpu'; by default this process's.
          chunk: c; or 'symbolic', for any number of elements; or None, for one element
            by itself, with nothing reduced.

        Raises:
          NotImplementedError: if the body calls Python functions of this process.

        Example:
          >>> import jax.numpy as jnp
          >>> from jax import export
          >>> import drjax
          >>> total = drjax.program(clients=5)(drjax.reduce_sum)
          >>> (stage,) = drjax.make_plan(total)(jnp.ones(5)).stages
          >>> run = export.deserialize(bytearray(stage.export(chunk=3))).call
          >>> of_two = jnp.array([4.0, 5.0, jnp.nan])
          >>> print(*run(jnp.int32(2), jnp.arange(3, dtype="int32"), of_two))
          9.0
        """
        return _export.export_round(self, platforms, chunk)

    def pruned(self, kept: Sequence[bool] | None = None) -> "MapReduce":
        """The round without the inputs that it does not need for what is kept.

        Args:
          kept: of the placed outputs; by default all.
        """
        kept = [True] * len(self.placed_outputs) if kept is None else list(kept)
        outputs = [*(True for _ in self.reductions), *kept]
        body, used = dce_after_first(self.body, outputs)
        n = len(self.server_inputs)
        return dataclasses.replace(
            self,
            body=body,
            server_inputs=tuple(pick(self.server_inputs, used[:n])),
            placed_inputs=tuple(pick(self.placed_inputs, used[n:])),
            placed_outputs=tuple(pick(self.placed_outputs, kept)),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A body that is run `length` times: `(*constants, *carry, *x) -> (*carry, *y)`.

    Args:
      body: its inputs and outputs are in this order.
      length: of the loop; it may be 0.
      reverse: whether it starts at the last `x`; a `y` is where its `x` is.
      constants, init, xs: values given; the slices of `xs` are along axis 0, which is
        counted in `Plan.at` of this plan, and not in that of the body.
      carry, ys: values that it gives.
    """

    body: "Plan"
    length: int
    reverse: bool
    constants: tuple[int, ...]
    init: tuple[int, ...]
    xs: tuple[int, ...]
    carry: tuple[int, ...]
    ys: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class While:
    """A loop: while `predicate(*constants, *carry)` is true, `body` gives the carry.

    Args:
      predicate: it has one output, a scalar.
      body: `(*constants, *carry) -> carry`.
      predicate_constants, body_constants, init: values given.
      carry: values that it gives.
    """

    predicate: "Plan"
    body: "Plan"
    predicate_constants: tuple[int, ...]
    body_constants: tuple[int, ...]
    init: tuple[int, ...]
    carry: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """One of several plans, the one that a value says.

    Args:
      branches: each has all operands as its inputs.
      index: a scalar of the server, held within `0` and `len(branches) - 1`.
      operands: values given.
      results: values that it gives.
    """

    branches: tuple["Plan", ...]
    index: int
    operands: tuple[int, ...]
    results: tuple[int, ...]


Stage = Server | MapReduce | Scan | While | Branch
__all__ = ["At", "Branch", "MapReduce", "Plan", "Scan", "Server", "Stage", "While"]


def plans_in(stage: Stage) -> tuple["Plan", ...]:
    """The plans in a loop or branch."""
    match stage:
        case Scan():
            return (stage.body,)
        case While():
            return (stage.predicate, stage.body)
        case Branch():
            return stage.branches
        case _:
            return ()


def reads_of(stage: Stage) -> tuple[int, ...]:
    """The values that a stage reads."""
    match stage:
        case Server():
            return stage.inputs
        case MapReduce():
            return stage.server_inputs + stage.placed_inputs
        case Scan():
            return stage.constants + stage.init + stage.xs
        case While():
            return stage.predicate_constants + stage.body_constants + stage.init
        case Branch():
            return (stage.index, *stage.operands)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A program as stages over numbered values.

    Args:
      stages: in order.
      avals: the types of all values, by number.
      at: where the elements are of placed values, and of those handed out, by number.
      scattered: which of them the server has, and hands out.
      inputs: the arguments' numbers, leaf by leaf.
      constants: values known from the start.
      sizes: values that are a placement's number of elements, its name and `n` here.
        An engine that loses elements gives the number of those that took part, in
        the plans of loops and branches too, which have their own.
      outputs: the results' numbers, leaf by leaf.
      in_tree, out_tree: the trees of arguments and results.
      size_free: placements whose number of elements the stages do not depend on.
    """

    stages: tuple[Stage, ...]
    avals: tuple[Any, ...]
    at: dict[int, At]
    scattered: frozenset[int]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    sizes: dict[int, tuple[str, int]]
    outputs: tuple[int, ...]
    in_tree: Any = None
    out_tree: Any = None
    size_free: frozenset[str] = frozenset()

    @property
    def placements(self) -> list[tuple[str, int]]:
        """The name of each placement and its number of elements."""
        found = {*self.sizes.values(), *(where[:2] for where in self.at.values())}
        for inner in self.inner:
            found.update(inner.placements)
        return sorted(found)

    @property
    def inner(self) -> list["Plan"]:
        """The plans in loops and branches."""
        return [plan for stage in self.stages for plan in plans_in(stage)]

    @functools.cached_property
    def hash(self) -> str:
        """A SHA-256 of what the plan computes, the same in every process of one JAX.

        Arguments and results count leaf by leaf; how they are nested does not. A Python
        function that is called back counts by its name and line.
        """
        from drjax._canonical import digest  # These modules import this one.

        return digest(self)

    @property
    def rounds(self) -> int:
        """How many rounds there are, those in loops and branches left out."""
        return sum(isinstance(stage, MapReduce) for stage in self.stages)

    def residuals(self, stage: MapReduce) -> tuple[int, ...]:
        """The placed outputs of a round that are kept for later stages only."""
        return tuple(i for i in stage.placed_outputs if i not in self.outputs)

    def recomputed(self) -> "Plan":
        """The plan in which rounds make residuals again, rather than keep them.

        A round then reads nothing that an earlier one has kept for it, and does the
        work of those once more. An engine that cannot hold `n` times the residuals runs
        this one. What goes into a loop or branch, or comes from it, is still kept: the
        gradient of a loop of rounds keeps the residuals of all of them. So is what a
        round with effects, as a `jax.debug.print`, has made.
        """
        from drjax._recompute import recomputed

        return recomputed(self)

    def element(self, number: int) -> Any:
        """The type of a value; of a placed one, that of one element's part."""
        aval = self.avals[number]
        return (
            aval if number not in self.at else mapped_aval(*self.at[number][1:], aval)
        )

    def communication(self, placement: str) -> tuple[int | float, int | float]:
        """Bytes that one element of a placement gets, and that it sends, in all rounds.

        Of branches, those of the one with the most. NaN for a while loop that
        communicates, for it may run any number of times.

        Raises:
          ValueError: if there is no placement by that name.

        Example:
          >>> import jax
          >>> import jax.numpy as jnp
          >>> import drjax
          >>> @drjax.program(clients=3)
          ... def loss(w, x):
          ...     return drjax.reduce_mean(drjax.map_fn(lambda x: (x - w) ** 2, x))
          >>> plan = drjax.make_plan(jax.grad(loss))(2.0, jnp.arange(3.0))
          >>> plan.communication("clients")
          (8, 4)
        """
        from drjax._communication import communication

        return communication(self, placement)

    def __str__(self) -> str:
        """The stages for a reader, with what goes to the elements and back."""
        from drjax._describe import text

        return "\n".join(text(self))

    __repr__ = __str__

    def to_html(self) -> str:
        """A page with a picture of the plan, which needs no other file."""
        from drjax._html import page

        return page(self)

    def _repr_html_(self) -> str:
        from drjax._html import figure

        return figure(self)


Plan.__module__ = "drjax"
