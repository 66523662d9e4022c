"""Cuts a jaxpr into a plan: server work, and rounds over a placement.

The jaxpr is straightened first (calls inlined). Then two questions are settled for each
of its values:

  - Is it placed, over which placement, and at which axis? Operators say so of their
    operands and results. From there it is followed through arithmetic by the rules of
    `_rules.py`, forwards, and backwards to the arguments that are placed.
  - In which round is it known? The server knows what a round reduces after it. A placed
    value belongs to the round of the latest server value that it needs.

All that the elements do in one round is one body. Stages are built from the last one
back, so that each holds what is asked of it and no more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Var, gensym, mapped_aval

from drjax import _primitives, _rules
from drjax._compat import ClosedJaxpr
from drjax._jaxprs import as_fun, dce, debug_info, is_var, pick, trace
from drjax._map import map_p
from drjax._plan import At, MapReduce, Plan, Server

_REDUCTIONS = {
    _primitives.reduce_sum_p: "sum",
    _primitives.reduce_max_p: "max",
    _primitives.reduce_min_p: "min",
}
_OF_SERVER_VALUES = {_primitives.broadcast_p, _primitives.placement_index_p}


class PlanError(ValueError):
    """A program that cannot be cut into rounds."""


PlanError.__module__ = "drjax"


def make_plan(fn: Callable[..., Any]) -> Callable[..., Plan]:
    """Makes a function of arguments, or their types, that returns the plan of `fn`."""

    def planned(*args: Any) -> Plan:
        leaves, in_tree = jax.tree.flatten(args)
        out_trees = []

        def flat(*leaves):
            outs, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(in_tree, leaves)))
            out_trees.append(out_tree)
            return outs

        closed = jax.make_jaxpr(flat)(*leaves)
        return _Cutter(closed).plan(in_tree, out_trees[-1])

    return planned


class _Cutter:
    """Builds the stages of one plan."""

    def __init__(self, closed: Any):
        self.jaxpr = closed.jaxpr
        self.invars, self.outvars, eqns, self.constants = straighten(closed)
        self.eqns = _live(eqns, self.outvars)
        self.at, self.scattered, self.rules = find_placed(self.eqns, self.constants)
        self.producer = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.stages: list[tuple[int, str | None]] = []
        for i in range(len(self.eqns)):
            self.stages.append(self._stage(i))
        self.numbers: dict[Var, int] = {}
        for v in [*self.invars, *self.constants, *self.producer]:
            self.numbers[v] = len(self.numbers)

    def plan(self, in_tree: Any, out_tree: Any) -> Plan:
        asked: dict[Any, dict[Var, None]] = {}  # By stage; ordered sets.

        def ask(variables):
            for v in variables:
                if v in self.producer:
                    asked.setdefault(self.stages[self.producer[v]], {})[v] = None

        ask(filter(is_var, self.outvars))
        stages: list[Server | MapReduce] = []
        last = max((r for r, _ in self.stages), default=0)
        placements = sorted({where.placement for where in self.at.values()})
        for r in range(last, -1, -1):
            for placement in placements:
                if wanted := asked.get((r, placement)):
                    stage, reads = self._map_reduce(r, placement, [*wanted])
                    stages.append(stage)
                    ask(reads)
            effects = any(
                eqn.effects and stage == (r, None)
                for eqn, stage in zip(self.eqns, self.stages, strict=True)
            )
            if (wanted := asked.get((r, None), {})) or effects:
                stage, reads = self._server(r, [*wanted])
                stages.append(stage)
                ask(reads)
        return Plan(
            stages=tuple(reversed(stages)),
            avals={i: v.aval for v, i in self.numbers.items()},
            at={self.numbers[v]: where for v, where in self.at.items()},
            inputs=self._ids(self.invars),
            constants={self.numbers[v]: x for v, x in self.constants.items()},
            outputs=tuple(
                self.numbers[v] if is_var(v) else v.val for v in self.outvars
            ),
            in_tree=in_tree,
            out_tree=out_tree,
        )

    def _ids(self, variables: Any) -> tuple[int, ...]:
        return tuple(self.numbers[v] for v in variables)

    def _stage(self, i: int) -> tuple[int, str | None]:
        """The round of an equation, and the placement that it is over, if any."""
        eqn = self.eqns[i]
        placement = None
        if eqn.primitive is map_p or eqn.primitive in _OF_PLACEMENT:
            placement = eqn.params["placement"]
        elif i in self.rules or self._is_repeated(i):
            variables = filter(is_var, [*eqn.outvars, *eqn.invars])
            placement = next(self.at[v] for v in variables if v in self.at).placement
        return max(map(self._ready, filter(is_var, eqn.invars)), default=0), placement

    def _ready(self, v: Var) -> int:
        """The first round that can use a value."""
        if v not in self.producer:
            return 0
        r, placement = self.stages[self.producer[v]]
        return r + (placement is not None and v not in self.at)

    def _is_repeated(self, i: int) -> bool:
        """Whether an equation makes a placed value of server values, or of none."""
        (v, *_), eqn = self.eqns[i].outvars, self.eqns[i]
        return v in self.at and v not in self.scattered and is_repeated(eqn, self.at[v])

    def _server(self, r: int, wanted: list[Var]) -> tuple[Server, list[Var]]:
        needed, reads = set(), {}
        todo = list(wanted)
        for i, eqn in enumerate(self.eqns):
            if eqn.effects and self.stages[i] == (r, None):
                needed.add(i)
                todo += filter(is_var, eqn.invars)
        while todo:
            v = todo.pop()
            i = self.producer.get(v)
            if i is None or self.stages[i] != (r, None):
                reads[v] = None
            elif i not in needed:
                needed.add(i)
                todo += filter(is_var, self.eqns[i].invars)
        eqns = [self.eqns[i] for i in sorted(needed)]
        jaxpr = self.jaxpr.replace(
            constvars=[],
            invars=[*reads],
            outvars=wanted,
            eqns=eqns,
            effects=set().union(*(eqn.effects for eqn in eqns)),
            debug_info=self.jaxpr.debug_info.with_unknown_names(),
        )
        stage = Server(ClosedJaxpr(jaxpr, ()), self._ids(reads), self._ids(wanted))
        return stage, [*reads]

    def _map_reduce(
        self, r: int, placement: str, wanted: list[Var]
    ) -> tuple[MapReduce, list[Var]]:
        needed: set[int] = set()
        server: dict[Var, None] = {}
        placed: dict[Var, None] = {}
        todo = list(wanted)
        while todo:
            v = todo.pop()
            i = self.producer.get(v)
            made = i is not None and v not in self.scattered and self.stages[i][1]
            if made and (self.stages[i] == (r, placement) or self._is_repeated(i)):
                if i not in needed:
                    needed.add(i)
                    todo += filter(is_var, self.eqns[i].invars)
            elif v in self.at:
                placed[v] = None
            else:
                server[v] = None
        outs = [v for v in wanted if v in self.at]
        sums = [v for v in wanted if v not in self.at]
        operation: dict[Var, str] = {}

        def body(index, *args):
            """What one element does; it has size 1 on the placement's axis."""
            env = dict(zip(server, args, strict=False))
            for v, x in zip(placed, args[len(server) :], strict=True):
                env[v] = jnp.expand_dims(x, self.at[v].axis)
            for i in sorted(needed):
                eqn = self.eqns[i]
                xs = [env[v] if is_var(v) else v.val for v in eqn.invars]
                results, operations = self._of_one(i, eqn, index, xs)
                env.update(zip(eqn.outvars, results, strict=True))
                operation.update(zip(eqn.outvars, operations, strict=True))
            parts = [env[v] for v in sums]
            return parts + [jnp.squeeze(env[v], self.at[v].axis) for v in outs]

        n = next(w.n for w in self.at.values() if w.placement == placement)
        avals = [
            jax.core.ShapedArray((), jnp.dtype("int32")),
            *(v.aval for v in server),
            *(mapped_aval(n, self.at[v].axis, v.aval) for v in placed),
        ]
        jaxpr, consts = trace(body, avals, debug_info(self))
        assert not consts, consts
        stage = MapReduce(
            placement=placement,
            n=n,
            body=jaxpr,
            server_inputs=self._ids(server),
            placed_inputs=self._ids(placed),
            reductions=tuple((operation[v], self.numbers[v]) for v in sums),
            placed_outputs=self._ids(outs),
        )
        return stage, [*server, *placed]

    def _of_one(self, i: int, eqn: Any, index: Any, xs: list[Any]) -> Any:
        """Results of an equation for one element, and how to reduce them, if at all."""
        params = eqn.params
        if eqn.primitive is map_p:
            xs = [
                jnp.squeeze(x, 0) if p else x
                for x, p in zip(xs, params["in_placed"], strict=True)
            ]
            outs = as_fun(params["body"])(*xs)
            placed = params["out_placed"]
            outs = [jnp.expand_dims(x, 0) if p else x for x, p in zip(outs, placed, strict=True)]
            return outs, [None if p else "sum" for p in placed]
        if eqn.primitive is _primitives.broadcast_p:
            return [jnp.expand_dims(xs[0], 0)], [None]
        if eqn.primitive is _primitives.placement_index_p:
            return [jnp.expand_dims(index, 0)], [None]
        if eqn.primitive in _REDUCTIONS:
            return [jnp.squeeze(xs[0], 0)], [_REDUCTIONS[eqn.primitive]]
        rule = self.rules.get(i)
        operation = None
        if rule is None:  # Repeated.
            axis = self.at[eqn.outvars[0]].axis
            shape = list(eqn.outvars[0].aval.shape)
            shape[axis] = 1
            if eqn.primitive.name == "iota":
                return [jnp.full(shape, index, params["dtype"])], [None]
            params = dict(params, shape=tuple(shape))
        elif isinstance(rule, _rules.Placed):
            params = rule.params(1)
        else:
            operation = rule.operation
        outs = eqn.primitive.bind(*xs, **params)
        outs = outs if eqn.primitive.multiple_results else [outs]
        return outs, [operation] * len(outs)


def _live(eqns: Sequence[Any], outvars: Sequence[Any]) -> list[Any]:
    """The equations that have effects or that a result needs."""
    needed = set(filter(is_var, outvars))
    live = []
    for eqn in reversed(eqns):
        if eqn.effects or needed & {*eqn.outvars}:
            needed.update(filter(is_var, eqn.invars))
            live.append(eqn)
    return live[::-1]


#
# Straightening.
#
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"),
    *("custom_vjp_call", "custom_lin", "remat2", "checkpoint"),
}


def straighten(jaxpr: Any) -> tuple[list[Var], list[Any], list[Any], dict[Var, Any]]:
    """Inlines calls; returns inputs, outputs, equations, and constants by variable."""
    newvar = gensym()
    eqns: list[Any] = []
    constants: dict[Var, Any] = {}

    def inline(closed, args):
        env: dict[Var, Any] = {}

        def read(atom):
            return env[atom] if is_var(atom) else atom

        inner = getattr(closed, "jaxpr", closed)
        consts = getattr(closed, "consts", ())
        for var, value in zip(inner.constvars, consts, strict=True):
            env[var] = newvar(var.aval)
            constants[env[var]] = value
        env.update(zip(inner.invars, args, strict=True))
        for eqn in inner.eqns:
            operands = [read(v) for v in eqn.invars]
            called = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
            if eqn.primitive.name in _CALLS and called is not None:
                outs = inline(called, operands)
            else:
                outs = [newvar(v.aval) for v in eqn.outvars]
                eqns.append(eqn.replace(invars=operands, outvars=outs))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in inner.outvars]

    invars = [newvar(v.aval) for v in getattr(jaxpr, "jaxpr", jaxpr).invars]
    return invars, inline(jaxpr, invars), eqns, constants


#
# Which values are placed, and where.
#
def find_placed(
    eqns: Sequence[Any], constants: Any
) -> tuple[dict[Var, At], set[Var], dict[int, Any]]:
    """Where placed values have their elements, and which the server hands out.

    Also the rules that the equations of placed arithmetic follow, by position.
    """
    at: dict[Var, At] = {}
    scattered: set[Var] = set()
    rules: dict[int, Any] = {}
    producer = {v: eqn for eqn in eqns for v in eqn.outvars}

    def demand(v, where, eqn):
        """Settles that a value is placed, going back to where it comes from."""
        if is_var(v) and v in at:
            if at[v] != where:
                raise PlanError(
                    f"drjax.make_plan: {_name(eqn)} needs a value with the elements of "
                    f"{where.placement!r} on axis {where.axis}, but they are those of "
                    f"{at[v].placement!r} on axis {at[v].axis}, as the operations "
                    "before say."
                )
            return
        if not is_var(v) or v.aval.shape[where.axis : where.axis + 1] != (where.n,):
            raise PlanError(
                f"drjax.make_plan: {_name(eqn)} needs the {where.n} elements of "
                f"{where.placement!r} on axis {where.axis} of a value of type {v.aval}."
            )
        at[v] = where
        source = producer.get(v)
        if source is None:
            if v in constants:
                scattered.add(v)
        elif not is_repeated(source, where):
            back = _backwards(source, v, where)
            if back is None:
                scattered.add(v)
            else:
                _demand_operands(source, back, where)

    def _demand_operands(eqn, rule, where):
        for v, axis in zip(eqn.invars, rule.operands, strict=True):
            if axis is not None:
                demand(v, where._replace(axis=axis), eqn)

    def forward():
        for i, eqn in enumerate(eqns):
            params = eqn.params
            if eqn.primitive is map_p or eqn.primitive in _OF_PLACEMENT:
                where = At(params["placement"], params["n"], 0)
                for v, placed in zip(eqn.invars, _operands_placed(eqn), strict=True):
                    if placed:
                        demand(v, where, eqn)
                for v in pick(eqn.outvars, _results_placed(eqn)):
                    at[v] = where
                continue
            wheres = [at.get(v) if is_var(v) else None for v in eqn.invars]
            if not any(wheres):
                continue
            where = next(filter(None, wheres))
            rules[i] = rule = rule_of(eqn, wheres, where)
            _demand_operands(eqn, rule, where)
            if isinstance(rule, _rules.Placed):
                for v, axis in zip(eqn.outvars, rule.results, strict=True):
                    at[v] = where._replace(axis=axis)

    before = None
    while before != len(at):
        before = len(at)
        forward()
    return at, scattered, rules


_OF_PLACEMENT = {*_OF_SERVER_VALUES, *_REDUCTIONS}


def _operands_placed(eqn):
    if eqn.primitive is map_p:
        return eqn.params["in_placed"]
    return [eqn.primitive in _REDUCTIONS] * len(eqn.invars)


def _results_placed(eqn):
    if eqn.primitive is map_p:
        return eqn.params["out_placed"]
    return [eqn.primitive not in _REDUCTIONS]


def is_repeated(eqn: Any, where: At) -> bool:
    """Whether an equation makes a placed value of server values, or of none."""
    if eqn.primitive in _OF_SERVER_VALUES:
        return True
    if eqn.primitive.name == "iota":
        return eqn.params["dimension"] == where.axis
    is_broadcast = eqn.primitive.name == "broadcast_in_dim"
    return is_broadcast and where.axis not in eqn.params["broadcast_dimensions"]


def _backwards(eqn, result, where):
    """The rule by which an operand's axis becomes that of a result, if there is one."""
    if not _rules.is_known(eqn.primitive):
        return None
    k = eqn.outvars.index(result)
    for i, v in enumerate(eqn.invars):
        for axis, size in enumerate(getattr(v.aval, "shape", ())):
            axes = [axis if j == i else None for j in range(len(eqn.invars))]
            if size == where.n:
                rule = _rules.find(eqn, axes, where.n)
                if isinstance(rule, _rules.Placed) and rule.results[k] == where.axis:
                    return rule
    return None


def rule_of(eqn: Any, wheres: Sequence[At | None], where: At) -> Any:
    """What an equation on placed values does; PlanError if it mixes elements."""
    name, over = _name(eqn), repr(where.placement)
    if any(w is not None and w[:2] != where[:2] for w in wheres):
        raise PlanError(
            f"drjax.make_plan: {name} combines values of different placements. Reduce "
            "over one of them first, or nest the placements: do it in a mapped function."
        )
    if not _rules.is_known(eqn.primitive):
        raise PlanError(
            f"drjax.make_plan: {name} on a value placed over {over}: what it does to "
            "the elements is not known. Do it in the function given to drjax.map_fn."
        )
    rule = _rules.find(eqn, [w and w.axis for w in wheres], where.n)
    if rule is None:
        raise PlanError(
            f"drjax.make_plan: {name} mixes the elements of {over}, which are on axis "
            f"{where.axis} of its operand. An element is alone until a reduction: use "
            "drjax.reduce_*, or do it in the function given to drjax.map_fn if it is "
            "meant for each element."
        )
    return rule


def _name(eqn):
    return f"{eqn.primitive.name} ({source_info_util.summarize(eqn.source_info)})"
