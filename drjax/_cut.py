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

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Var, mapped_aval

from drjax import _compat, _primitives, _rules
from drjax._compat import ClosedJaxpr
from drjax._jaxprs import as_fun, debug_info, is_var, trace
from drjax._map import map_p
from drjax._placed import (
    OF_PLACEMENT,
    PORTS,
    REDUCTIONS,
    Facts,
    communicates,
    find_placed,
    is_repeated,
    straighten,
)
from drjax._plan import Branch, MapReduce, Plan, Scan, Server, While


def make_plan(fn: Callable[..., Any]) -> Callable[..., Plan]:
    """Makes a function of arguments, or their types, that returns the plan of `fn`."""

    def planned(*args: Any) -> Plan:
        leaves, in_tree = jax.tree.flatten(args)
        out_trees = []

        def flat(*leaves):
            outs, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(in_tree, leaves)))
            out_trees.append(out_tree)
            return outs

        straight = straighten(jax.make_jaxpr(flat)(*leaves))
        facts = find_placed(straight, {}, {})
        return _Cutter(facts).plan(in_tree, out_trees[-1])

    return planned


class _Cutter:
    """Builds the stages of one plan."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.invars, self.outvars, self.eqns, self.constants, _ = facts.straight
        self.at, self.scattered = facts.at, facts.scattered
        self.producer = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        # Of each equation the round, and what it is part of there: the work over a
        # placement (a name), a loop or branch by itself (its position), or the server's.
        self.stages: list[tuple[int, Any]] = []
        for i, eqn in enumerate(self.eqns):
            ready = map(self._ready, filter(is_var, eqn.invars))
            self.stages.append((max(ready, default=0), self._part(i, eqn)))
        # Of variables, and of literals where a stage needs one.
        self.numbers: dict[Any, int] = {}
        self.avals: list[Any] = []
        self.values: dict[int, Any] = {}
        self._ids([*self.invars, *self.constants, *self.producer])
        for v, value in self.constants.items():
            self.values[self.numbers[v]] = value

    def _part(self, i: int, eqn: Any) -> Any:
        if eqn.primitive is map_p or eqn.primitive in OF_PLACEMENT:
            return eqn.params["placement"]
        if inner := self.facts.flows.get(i):
            placed = all(v in self.at for v in eqn.outvars)
            if not placed or any(map(communicates, inner)):
                return i
        elif i not in self.facts.rules and not self._is_repeated(i):
            return None
        variables = filter(is_var, [*eqn.outvars, *eqn.invars])
        return next(self.at[v] for v in variables if v in self.at).placement

    def _ready(self, v: Var) -> int:
        """The first round that can use a value."""
        if v not in self.producer:
            return 0
        r, part = self.stages[self.producer[v]]
        is_reduced = isinstance(part, str) and v not in self.at
        return r + (is_reduced or isinstance(part, int))

    def _is_repeated(self, i: int) -> bool:
        """Whether an equation makes a placed value of server values, or of none."""
        (v, *_), eqn = self.eqns[i].outvars, self.eqns[i]
        return v in self.at and v not in self.scattered and is_repeated(eqn, self.at[v])

    def plan(self, in_tree: Any = None, out_tree: Any = None) -> Plan:
        asked: dict[Any, dict[Var, None]] = {}  # By stage; ordered sets.

        def ask(variables):
            for v in variables:
                if v in self.producer:
                    asked.setdefault(self.stages[self.producer[v]], {})[v] = None

        ask(filter(is_var, self.outvars))
        effects = {s for e, s in zip(self.eqns, self.stages, strict=True) if e.effects}
        last = max((r for r, _ in self.stages), default=0)
        flows = [part for _, part in self.stages if isinstance(part, int)]
        placements = sorted({where.placement for where in self.at.values()})
        stages: list[Any] = []
        for r in range(last, -1, -1):
            for part in [*reversed(flows), *placements, None]:
                if (r, part) not in asked and (r, part) not in effects:
                    continue
                wanted = [*asked.get((r, part), ())]
                if part is None:
                    stage, reads = self._server(r, wanted)
                elif isinstance(part, int):
                    stage, reads = self._flow(part)
                else:
                    stage, reads = self._map_reduce(r, part, wanted)
                stages.append(stage)
                ask(reads)
        outputs = self._ids(self.outvars)
        return Plan(
            stages=tuple(reversed(stages)),
            avals=tuple(self.avals),
            at={self.numbers[v]: where for v, where in self.at.items()},
            inputs=self._ids(self.invars),
            constants=self.values,
            outputs=outputs,
            in_tree=in_tree,
            out_tree=out_tree,
        )

    def _ids(self, atoms: Any) -> tuple[int, ...]:
        return tuple(map(self._id, atoms))

    def _id(self, atom: Any) -> int:
        key = atom if is_var(atom) else id(atom)
        if key not in self.numbers:
            self.numbers[key] = len(self.avals)
            self.avals.append(atom.aval)
            if not is_var(atom):
                self.values[self.numbers[key]] = atom.val
        return self.numbers[key]

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
        template = self.facts.straight.template
        jaxpr = template.replace(
            constvars=[],
            invars=[*reads],
            outvars=wanted,
            eqns=eqns,
            effects=set().union(*(eqn.effects for eqn in eqns)),
            debug_info=template.debug_info.with_unknown_names(),
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
                results, operations = _of_one(self.facts, i, index, xs)
                env.update(zip(eqn.outvars, results, strict=True))
                operation.update(zip(eqn.outvars, operations, strict=True))
            parts = [env[v] for v in sums]
            return parts + [jnp.squeeze(env[v], self.at[v].axis) for v in outs]

        info = self.facts.straight.template.debug_info.with_unknown_names()
        n = next(w.n for w in self.at.values() if w.placement == placement)
        avals = [
            ShapedArray((), jnp.dtype("int32")),
            *(v.aval for v in server),
            *(mapped_aval(n, self.at[v].axis, v.aval) for v in placed),
        ]
        jaxpr, consts = trace(body, avals, info)
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

    def _flow(self, i: int) -> tuple[Any, list[Var]]:
        """A loop or branch that communicates; its jaxprs are plans of their own."""
        eqn = self.eqns[i]
        plans = [_Cutter(facts).plan() for facts in self.facts.flows[i]]
        ids, results = self._ids(eqn.invars), self._ids(eqn.outvars)
        params = eqn.params
        if eqn.primitive.name == "scan":
            a, b = itertools.accumulate(_compat.scan_counts(eqn))
            stage = Scan(
                *(plans[0], params["length"], params["reverse"]),
                *(ids[:a], ids[a:b], ids[b:]),
                *(results[: b - a], results[b - a :]),
            )
        elif eqn.primitive.name == "while":
            a = params["cond_nconsts"]
            b = a + params["body_nconsts"]
            stage = While(*plans, ids[:a], ids[a:b], ids[b:], results)
        else:
            stage = Branch(tuple(plans), ids[0], ids[1:], results)
        return stage, list(filter(is_var, eqn.invars))


#
# What one element does. Its values have size 1 on the placement's axis.
#
def _of_element(facts: Facts, index: Any, args: Any) -> list[Any]:
    env: dict[Any, Any] = dict(facts.straight.constants)
    env.update(zip(facts.straight.invars, args, strict=True))
    for i, eqn in enumerate(facts.straight.eqns):
        xs = [env[v] if is_var(v) else v.val for v in eqn.invars]
        results, _ = _of_one(facts, i, index, xs)
        env.update(zip(eqn.outvars, results, strict=True))
    return [env[v] if is_var(v) else v.val for v in facts.straight.outvars]


def _of_one(facts: Facts, i: int, index: Any, xs: list[Any]) -> Any:
    """Results of an equation for one element, and how to reduce them, if at all."""
    eqn = facts.straight.eqns[i]
    params = eqn.params
    if eqn.primitive is map_p:
        return _map_of_one(eqn, xs)
    if eqn.primitive is _primitives.broadcast_p:
        return [jnp.expand_dims(xs[0], 0)], [None]
    if eqn.primitive is _primitives.placement_index_p:
        return [jnp.expand_dims(index, 0)], [None]
    if eqn.primitive in REDUCTIONS:
        return [jnp.squeeze(xs[0], 0)], [REDUCTIONS[eqn.primitive]]
    if i in facts.flows:
        outs = _flow_of_one(facts, i, index, xs)
        return outs, [None] * len(outs)
    operation, rule, where = None, facts.rules.get(i), facts.at.get(eqn.outvars[0])
    if isinstance(rule, _rules.Placed):
        params = rule.params(1)
    elif rule is not None:
        operation = rule.operation
    elif where is not None and is_repeated(eqn, where):
        shape = list(eqn.outvars[0].aval.shape)
        shape[where.axis] = 1
        if eqn.primitive.name == "iota":
            return [jnp.full(shape, index, params["dtype"])], [None]
        params = dict(params, shape=tuple(shape))
    outs = eqn.primitive.bind(*xs, **params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    return outs, [operation] * len(outs)


def _map_of_one(eqn, xs):
    placed, out_placed = eqn.params["in_placed"], eqn.params["out_placed"]
    xs = [jnp.squeeze(x, 0) if p else x for x, p in zip(xs, placed, strict=True)]
    outs = as_fun(eqn.params["body"])(*xs)
    outs = [
        jnp.expand_dims(x, 0) if p else x for x, p in zip(outs, out_placed, strict=True)
    ]
    return outs, [None if p else "sum" for p in out_placed]


def _flow_of_one(facts, i, index, xs):
    eqn, inner = facts.straight.eqns[i], facts.flows[i]
    params = eqn.params
    if eqn.primitive.name == "cond":
        branches = [
            lambda *ops, f=f: _of_element(f, index, ops) for f in inner
        ]
        return lax.switch(jnp.int32(xs[0]), branches, *xs[1:])
    if eqn.primitive.name == "while":
        a = params["cond_nconsts"]
        b = a + params["body_nconsts"]
        return lax.while_loop(
            lambda carry: _of_element(inner[0], index, [*xs[:a], *carry])[0],
            lambda carry: _of_element(inner[1], index, [*xs[a:b], *carry]),
            xs[b:],
        )
    a, b = itertools.accumulate(_compat.scan_counts(eqn))

    def step(carry, x):
        outs = _of_element(inner[0], index, [*xs[:a], *carry, *x])
        return outs[: b - a], outs[b - a :]

    how = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, xs[a:b], xs[b:], **how)
    return [*carry, *ys]
