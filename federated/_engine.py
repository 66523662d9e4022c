"""The simulation: a function's rounds, run over the clients that report.

Clients run in chunks, as in `drjax.streaming`, but which of them take part is said for
each call, and nothing is compiled again for their number. Those with few examples and
those with many run with batches of different lengths: the function is planned for each
length, the plans have the same stages, and all that these reduce goes into one total.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

import drjax
from drjax._arguments import streamed
from drjax._jaxprs import as_fun
from drjax._numpy import to_numpy
from drjax._reference import as_array, interpret
from drjax.plan import MapReduce, Plan, Server, plans_in, reads_of
from federated._clients import Call, Clients, ClientWork, are_finite
from federated._cohort import Row

PLACEMENT = "clients"
_log = logging.getLogger("federated")


class Outcome(NamedTuple):
    """What a call gave.

    Args:
      result: what the function returns; None if no client is left.
      rows: where placed results have the clients that reported. Others have zeros.
      reported: the positions of the clients that are in it.
      rejected: the positions of those left out, for they sent what is not finite.
      padded: how many examples their batches have room for.
    """

    result: Any
    rows: np.ndarray
    reported: np.ndarray
    rejected: np.ndarray
    padded: int


class Lost(Exception):
    """Clients whose contribution is refused: the call starts again without them."""

    def __init__(self, positions: np.ndarray):
        self.positions = positions


class Engine:
    """Runs a function of placed arguments over those clients that report.

    Args:
      make_plan: from arguments to the plan of a program over `clients`, of a derivative
        of one, or of what calls some. Arguments may be, or have as leaves, objects that
        stand for placed values, with `structs(length)` and `read(positions, length)`,
        such as a `Cohort`.
    """

    def __init__(self, make_plan: Callable[..., Plan]):
        self._make_plan = make_plan
        self._plans: dict[Any, Plan] = {}
        self._alike: dict[tuple[int, ...], bool] = {}
        self._work: dict[MapReduce, ClientWork] = {}
        self._servers: dict[Server, Any] = {}

    @property
    def compiled(self) -> int:
        """How many programs of clients have been compiled."""
        return sum(work.compiled for work in self._work.values())

    def plan(self, args: Sequence[Any], length: int = 0) -> Plan:
        """The plan for arguments, the placed ones padded to a length."""
        structs = structs_of(args, length)
        leaves, tree = jax.tree.flatten(structs)
        x64 = jax.config.read("jax_enable_x64")
        types = (dtypes.result_type(x, return_weak_type_flag=True) for x in leaves)
        key = tree, x64, *zip(map(jnp.shape, leaves), types, strict=True)
        if key not in self._plans:
            self._plans[key] = self._make_plan(*structs).recomputed()
        return self._plans[key]

    def run(
        self, args: Sequence[Any], reporting: np.ndarray, lengths_of: np.ndarray
    ) -> Outcome:
        """Calls the function with the clients at the positions `reporting` alone.

        Args:
          args: of the function.
          reporting: int `[m]`, in order; `m` is the number that means divide by.
          lengths_of: int `[n]`, the length of each client's batch.
        """
        config: Any = jax.config  # Of which type checkers know less.
        if config.jax_disable_jit:
            raise RuntimeError(
                "federated: what clients do is compiled, which jax.disable_jit "
                "forbids. To look into a round, call algorithm.round, or give "
                "federated.run the engine=lambda round: round."
            )
        rejected = np.zeros(0, reporting.dtype)
        while True:
            try:
                result, padded = self._result(args, reporting, lengths_of)
                return Outcome(result, reporting, reporting, rejected, padded)
            except Lost as lost:
                rejected = np.union1d(rejected, lost.positions)
                reporting = np.setdiff1d(reporting, lost.positions)
                if not len(reporting):
                    return Outcome(None, reporting, reporting, rejected, 0)

    def _result(
        self, args: Sequence[Any], reporting: np.ndarray, lengths_of: np.ndarray
    ) -> tuple[Any, int]:
        plan, groups = self._groups(args, reporting, lengths_of)
        if len(reporting) < len(lengths_of):
            check_losses(plan)
        inputs = []
        values = _values(args)
        needed = streamed(plan).rows
        for i, x in zip(plan.inputs, values, strict=True):
            if isinstance(x, Row) and i not in needed:
                everyone = np.arange(len(lengths_of))
                rows = jax.tree.leaves(x.source.read(everyone, groups[0].length))
                x = jnp.asarray(rows[x.leaf])
            inputs.append(x if isinstance(x, Row) else as_array(x))
        stages = {s: [s] for s in _rounds(plan)}
        for group in groups[1:]:
            for s, other in zip(_rounds(plan), _rounds(group.plan), strict=True):
                stages[s].append(other)

        def run_round(inner: Plan, stage: MapReduce, env: dict[int, Any]) -> None:
            of_stage = [
                Clients(group.positions, group.length, self._client_work(inner, s))
                for group, s in zip(groups, stages[stage], strict=True)
            ]
            if stage.placement != PLACEMENT:  # All of its elements take part.
                everyone = np.arange(stage.n, dtype=np.int32)
                of_stage = [of_stage[0]._replace(positions=everyone)]
            call = Call(of_stage, inner, stage, env)
            reduced, placed = call.run()
            operations = tuple(operation for operation, _ in stage.reductions)
            if stage.placement == PLACEMENT and not _are_finite(operations, reduced):
                bad = call.not_finite()
                if len(bad):
                    raise Lost(bad)
                _log.warning(
                    "federated: what is reduced over clients is not finite, though all "
                    "that they have sent is: it is too large for its dtype."
                )
            numbers = [*(i for _, i in stage.reductions), *stage.placed_outputs]
            env.update(zip(numbers, [*reduced, *placed], strict=True))

        sizes = {PLACEMENT: len(reporting)}
        outs = interpret(plan, inputs, self._run_server, run_round, sizes)
        padded = sum(len(group.positions) * group.length for group in groups)
        return jax.tree.unflatten(plan.out_tree, map(as_array, outs)), padded

    def _groups(
        self, args: Sequence[Any], reporting: np.ndarray, lengths_of: np.ndarray
    ) -> tuple[Plan, list["Group"]]:
        """The plan, and the clients by the lengths of their batches.

        All have the same length, if the plan depends on it in more than what a client
        has of its own.
        """
        of_reporting = lengths_of[reporting]
        lengths = [int(length) for length in np.unique(of_reporting)]
        plans = [self.plan(args, length) for length in lengths]
        values = _values(args)
        if not all(self._are_alike(plans[-1], other, values) for other in plans):
            lengths, plans = lengths[-1:], plans[-1:]
            of_reporting = np.full_like(of_reporting, lengths[0])
        return plans[0], [
            Group(reporting[of_reporting == length], length, plan)
            for length, plan in zip(lengths, plans, strict=True)
        ]

    def _are_alike(self, plan: Plan, other: Plan, values: Sequence[Any]) -> bool:
        """Whether the plans differ in what clients have of their own alone."""
        key = id(plan), id(other)  # Both are kept.
        if plan is not other and key not in self._alike:
            rows = {
                i for i, x in zip(plan.inputs, values, strict=True) if _is_row(x)
            } & streamed(plan).rows
            self._alike[key] = _same_stages(plan, other, rows)
        return plan is other or self._alike[key]

    def _client_work(self, plan: Plan, stage: MapReduce) -> ClientWork:
        if stage not in self._work:
            self._work[stage] = ClientWork(plan, stage)
        return self._work[stage]

    def _run_server(self, plan: Plan, stage: Server, env: dict[int, Any]) -> None:
        if stage not in self._servers:
            self._servers[stage] = jax.jit(as_fun(stage.jaxpr))
        outs = self._servers[stage](*(env[i] for i in stage.inputs))
        env.update(zip(stage.outputs, outs, strict=True))


class Compiled:
    """Calls a function with the whole batch of those clients that report.

    Args:
      fn: a function of such arguments as `Engine` takes.
      compile: makes it a function to call, as `jax.jit` does.
    """

    def __init__(self, fn: Callable[..., Any], compile: Callable[..., Any]):
        self._planned, self._fn = Engine(drjax.make_plan(fn)), compile(fn)
        self._numbers: set[tuple[int, int]] = set()
        self.plan = self._planned.plan

    @property
    def compiled(self) -> int:
        return len(self._numbers)

    def run(
        self, args: Sequence[Any], reporting: np.ndarray, lengths_of: np.ndarray
    ) -> Outcome:
        """As `Engine.run`, but nothing is rejected."""
        length = int(lengths_of[reporting].max())
        whole = jax.tree.map(
            lambda x: x.read(reporting, length) if _is_read(x) else x, [*args]
        )
        self._numbers.add((len(reporting), length))
        result = self._fn(*jax.tree.map(jnp.asarray, whole))
        rows, rejected = np.arange(len(reporting)), reporting[:0]
        return Outcome(result, rows, reporting, rejected, length * len(reporting))


def check_losses(plan: Plan) -> None:
    """Raises an error if clients cannot be lost without a wrong number."""
    if PLACEMENT not in plan.size_free:
        raise ValueError(
            "federated: clients are lost in a round whose program computes with their "
            "number as a constant, as len(batch.count), jnp.mean over the clients or "
            "random.split(key, n) are: it would be that of all clients. Use "
            "drjax.reduce_mean and drjax.placement_size(), which count those who "
            "report, and fold batch.client into a key. With engine=jax.jit the round "
            "is compiled again for each number."
        )


def structs_of(args: Sequence[Any], length: int) -> list[Any]:
    """Arguments with the types of what is read, padded to a length."""
    return jax.tree.map(lambda x: x.structs(length) if _is_read(x) else x, [*args])


class Group(NamedTuple):
    """Clients whose batches have one length, and the plan for that."""

    positions: np.ndarray
    length: int
    plan: Plan


def _is_read(x: Any) -> bool:
    return hasattr(x, "structs") and hasattr(x, "read")


def _is_row(x: Any) -> bool:
    return isinstance(x, Row)


def _values(args: Sequence[Any]) -> list[Any]:
    """The arguments leaf by leaf, those which are read as rows."""
    values: list[Any] = []
    for x in jax.tree.leaves([*args]):
        if _is_read(x):
            values += [Row(x, k) for k in range(len(jax.tree.leaves(x.structs(1))))]
        else:
            values.append(x)
    return values


def _rounds(plan: Plan) -> list[MapReduce]:
    """All rounds, those in loops and branches too."""
    found: list[MapReduce] = []
    for stage in plan.stages:
        if isinstance(stage, MapReduce):
            found.append(stage)
        for inner in plans_in(stage):
            found += _rounds(inner)
    return found


def _same_stages(plan: Plan, other: Plan, rows: set[int]) -> bool:
    """Whether plans have the same stages and types, but for the types of `rows`.

    Plans made of alike jaxprs number their values alike.
    """
    if len(plan.stages) != len(other.stages):
        return False
    # Of values that were kept for a later round before it was planned to recompute
    # them, the types remain.
    read = {i for stage in plan.stages for i in reads_of(stage)}
    for i in (read | {*plan.outputs}) - rows:
        a, b = plan.avals[i], other.avals[i]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
    for a, b in zip(plan.stages, other.stages, strict=True):
        if type(a) is not type(b) or reads_of(a) != reads_of(b):
            return False
        if isinstance(a, Server) and isinstance(b, Server):
            if a.outputs != b.outputs or str(a.jaxpr) != str(b.jaxpr):
                return False
        elif isinstance(a, MapReduce) and isinstance(b, MapReduce):
            if (a.reductions, a.placed_outputs) != (b.reductions, b.placed_outputs):
                return False
        else:  # A row that goes into a loop has another number there.
            if rows & {*reads_of(a)}:
                return False
            pairs = zip(plans_in(a), plans_in(b), strict=True)
            if not all(_same_stages(x, y, set()) for x, y in pairs):
                return False
    same_constants = all(
        _same(x, other.constants[i]) for i, x in plan.constants.items() if i in read
    )
    return same_constants and plan.outputs == other.outputs


def _same(a: Any, b: Any) -> bool:
    return a is b or to_numpy(a).tobytes() == to_numpy(b).tobytes()


_are_finite = jax.jit(are_finite, static_argnums=0)
