"""What one element does: the equations of a round, for a single element.

The placement's axis has size 1 in arithmetic, so that each operation is the one of the
program, with the parameters that its rule gives for one element.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from drjax import _primitives, _rules
from drjax._equations import REDUCTIONS, is_repeated
from drjax._jaxprs import as_fun, is_in, is_var
from drjax._map import map_p
from drjax._placed import Facts
from drjax._ports import operand_bounds
from drjax._straighten import while_any


class Element:
    """The values of one element, and the equations run on them.

    Arithmetic is run on placed values that keep the placement's axis, of size 1;
    operators on an element's own part, without it.
    """

    def __init__(self, facts: Facts, index: Any):
        self.facts, self.index = facts, index
        self.kept: dict[Any, Any] = {}
        self.own: dict[Any, Any] = {}
        self.whole: dict[Any, Any] = {}  # Scattered values, of all elements.
        for v, x in facts.straight.constants.items():
            self.write(v, x)

    def where(self, v: Any) -> Any:
        return self.facts.at.get(v) or self.facts.scattered[v]

    def write(self, v: Any, x: Any) -> None:
        (self.whole if v in self.facts.scattered else self.kept)[v] = x

    def write_own(self, v: Any, x: Any) -> None:
        self.own[v] = x

    def read(self, v: Any) -> Any:
        if not is_var(v):
            return v.val
        if v not in self.kept:
            self.kept[v] = jnp.expand_dims(self.read_own(v), self.where(v).axis)
        return self.kept[v]

    def read_own(self, v: Any) -> Any:
        if v not in self.own:
            axis = self.where(v).axis
            self.own[v] = (
                lax.dynamic_index_in_dim(self.whole[v], self.index, axis, False)
                if v in self.whole
                else jnp.squeeze(self.kept[v], axis)
            )
        return self.own[v]

    def read_whole(self, v: Any) -> Any:
        """A value of the server, for which a scattered one is a whole."""
        return self.whole[v] if is_in(v, self.whole) else self.read(v)

    def run(self, i: int) -> list[str | None]:
        """Runs an equation; returns how to reduce each result, if at all."""
        eqn = self.facts.straight.eqns[i]
        params, outvars = eqn.params, eqn.outvars
        if eqn.primitive is map_p:
            placed = zip(eqn.invars, params["in_placed"], strict=True)
            xs = [self.read_own(v) if p else self.read_whole(v) for v, p in placed]
            outs = as_fun(params["body"])(*xs)
            for v, x, p in zip(outvars, outs, params["out_placed"], strict=True):
                self.write_own(v, x) if p else self.write(v, x)
            return [None if p else "sum" for p in params["out_placed"]]
        if eqn.primitive in REDUCTIONS:
            self.write(outvars[0], self.read_own(eqn.invars[0]))
            return [REDUCTIONS[eqn.primitive]]
        if eqn.primitive is _primitives.broadcast_p:
            self.write_own(outvars[0], self.read_whole(eqn.invars[0]))
            return [None]
        if eqn.primitive is _primitives.placement_index_p:
            self.write_own(outvars[0], self.index)
            return [None]
        operation = None
        if i in self.facts.flows:
            xs = self._operands(i, eqn)
            outs = _flow_of_one(self.facts, i, self.index, xs)
        else:
            outs, operation = self._arithmetic(i, eqn)
        for v, x in zip(outvars, outs, strict=True):
            self.write(v, x)
        return [operation] * len(outvars)

    def _operands(self, i: int, eqn: Any) -> list[Any]:
        own = zip(eqn.invars, self.facts.own_operands(i), strict=True)
        return [self.read(v) if is_own else self.read_whole(v) for v, is_own in own]

    def _arithmetic(self, i: int, eqn: Any) -> tuple[Any, str | None]:
        params, rule = eqn.params, self.facts.rules.get(i)
        where = self.facts.at.get(eqn.outvars[0])
        operation = None
        if isinstance(rule, _rules.Placed):
            params = rule.params(1)
        elif rule is not None:
            operation = rule.operation
        elif where is not None and is_repeated(eqn, where):
            shape = list(eqn.outvars[0].aval.shape)
            shape[where.axis] = 1
            if eqn.primitive.name == "iota":
                return [jnp.full(shape, self.index, params["dtype"])], None
            params = dict(params, shape=tuple(shape))
        outs = eqn.primitive.bind(*self._operands(i, eqn), **params)
        return (outs if eqn.primitive.multiple_results else [outs]), operation


def _of_element(facts: Facts, index: Any, args: Any) -> list[Any]:
    """All of a jaxpr, for one element; placed values keep the placement's axis."""
    env = Element(facts, index)
    for v, x in zip(facts.straight.invars, args, strict=True):
        env.write(v, x)
    for i in range(len(facts.straight.eqns)):
        env.run(i)
    return [
        env.read(v) if k in facts.ends or is_in(v, facts.at) else env.read_whole(v)
        for k, v in enumerate(facts.straight.outvars)
    ]


def _flow_of_one(facts, i, index, xs):
    eqn, inner = facts.straight.eqns[i], facts.flows[i]
    if eqn.primitive.name == "cond":
        branches = [lambda *ops, f=f: _of_element(f, index, ops) for f in inner]
        return lax.switch(jnp.int32(xs[0]), branches, *xs[1:])
    a, b = operand_bounds(eqn)
    if eqn.primitive.name == "while":

        def predicate(carry):
            return _of_element(inner[0], index, [*xs[:a], *carry])[0]

        def body(carry):
            return _of_element(inner[1], index, [*xs[a:b], *carry])

        if eqn.params["cond_jaxpr"].out_avals[0].shape:
            return while_any(predicate, body, xs[b:])
        return lax.while_loop(predicate, body, xs[b:])

    def step(carry, x):
        outs = _of_element(inner[0], index, [*xs[:a], *carry, *x])
        return outs[: b - a], outs[b - a :]

    how = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, xs[a:b], xs[b:], **how)
    return [*carry, *ys]
