"""Which values of a jaxpr are placed, over which placement, and on which axis.

Operators say what their operands and results are. From there the axis is followed
through arithmetic by the rules of `_rules.py`, forwards, and backwards to the arguments
that are placed, and through loops and branches into the jaxprs that they hold, until
nothing more is found.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from jax.extend import source_info_util
from jax.extend.core import Var

from drjax import _primitives, _rules
from drjax._jaxprs import equations, is_in, is_var, pick
from drjax._map import map_p
from drjax._straighten import Straight, operand_bounds, straighten
from drjax.plan import At

REDUCTIONS = {
    _primitives.reduce_sum_p: "sum",
    _primitives.reduce_max_p: "max",
    _primitives.reduce_min_p: "min",
}
_OF_SERVER_VALUES = {_primitives.broadcast_p, _primitives.placement_index_p}


class PlanError(ValueError):
    """A program that cannot be cut into rounds."""


PlanError.__module__ = "drjax"


class Facts(NamedTuple):
    """What was found out about the values of a jaxpr, and its equations by position."""

    straight: Straight
    at: dict[Var, At]  # Where the elements are, of placed and of scattered values.
    scattered: set[Var]  # Server values that are handed out to the elements.
    rules: dict[int, Any]  # Of placed arithmetic.
    flows: dict[int, list["Facts"]]  # Of the jaxprs in scan, while and cond.
    why: dict[Var, str]  # What says that a value is placed.

    def is_placed(self, v: Any) -> bool:
        """Whether each element has a part of a value, which the server has not."""
        return is_in(v, self.at) and v not in self.scattered


def find_placed(
    straight: Straight,
    seeds: dict[Var, At],
    ends: dict[int, At],
    told_by: tuple[str, str] = ("", ""),
    of_server: Collection[Var] = (),
) -> Facts:
    """Finds which values are placed, and where.

    Args:
      straight: the jaxpr.
      seeds: what is known of its inputs.
      ends: what is known of its outputs, by position.
      told_by: what says the former, and what the latter, for messages.
      of_server: inputs that are known to be the server's.
    """
    at, scattered = dict(seeds), set()
    why = dict.fromkeys(seeds, told_by[0])  # What tells that a value is placed.
    rules: dict[int, Any] = {}
    flows: dict[int, list[Facts]] = {}
    producer = {v: eqn for eqn in straight.eqns for v in eqn.outvars}
    inner: dict[int, list[Straight]] = {}

    def demand(v, where, by):
        """Settles that a value is placed, going back to where it comes from."""
        if is_in(v, at):
            return settle(v, where, by)
        if not is_var(v) or v.aval.shape[where.axis : where.axis + 1] != (where.n,):
            raise PlanError(
                f"drjax.make_plan: {by} needs {_elements(where)} of a value of type "
                f"{v.aval}, which has not so many there."
            )
        source = producer.get(v)
        if source is None:
            if v in straight.constants or v in of_server:
                scattered.add(v)
        elif source.primitive.name in PORTS:
            if not is_flow(source, placed):  # Else the next look at it goes inside.
                scattered.add(v)
        elif not is_repeated(source, where):
            back = _backwards(source, v, where)
            if back is None:
                scattered.add(v)
            else:
                at[v], why[v] = where, by
                demand_operands(source, back, where)
        at[v], why[v] = where, by

    def settle(v, where, by):
        if at.setdefault(v, where) != where:
            raise PlanError(
                f"drjax.make_plan: a value of type {v.aval} has {_elements(at[v])}, as "
                f"{why[v]} says, and {_elements(where)}, as {by} says. Change one of "
                "the two, or move the axis in between."
            )
        why.setdefault(v, by)

    def placed(v):
        return is_in(v, at) and v not in scattered

    def demand_operands(eqn, rule, where):
        for v, axis in zip(eqn.invars, rule.operands, strict=True):
            if axis is not None:
                demand(v, where._replace(axis=axis), name(eqn))

    def operator(eqn):
        where = At(eqn.params["placement"], eqn.params["n"], 0)
        for v, is_placed in zip(eqn.invars, _operands_placed(eqn), strict=True):
            if is_placed:
                demand(v, where, name(eqn))
            elif placed(v):
                raise PlanError(
                    f"drjax.make_plan: {name(eqn)} sends every element a value that is "
                    f"placed over {at[v].placement!r}, as {why[v]} says, whole. Each "
                    "element has its own part of it: pass it as an argument of the "
                    "mapped function, or reduce it first."
                )
        for v in pick(eqn.outvars, _results_placed(eqn)):
            settle(v, where, name(eqn))

    def arithmetic(i, eqn):
        wheres = [at.get(v) if is_var(v) else None for v in eqn.invars]
        first = next(v for v in eqn.invars if placed(v))
        where = at[first]
        rules[i] = rule = rule_of(eqn, wheres, where, why[first])
        demand_operands(eqn, rule, where)
        scattered.difference_update(eqn.outvars)  # It was not known to be placed.
        if isinstance(rule, _rules.Placed):
            for v, axis in zip(eqn.outvars, rule.results, strict=True):
                settle(v, where._replace(axis=axis), name(eqn))

    def flow(i, eqn):
        """Looks into a loop or branch, and tells both sides of each port."""
        ports = PORTS[eqn.primitive.name](eqn)
        if i not in inner:
            inner[i] = [straighten(port.jaxpr) for port in ports]
        flows[i] = []
        scattered.difference_update(eqn.outvars)
        for port, body in zip(ports, inner[i], strict=True):
            inputs = {
                body.invars[k]: _shifted(at[eqn.invars[j]], -shift, eqn)
                for k, (j, shift) in enumerate(port.operands)
                if is_var(eqn.invars[j]) and eqn.invars[j] in at
            }
            outputs = {
                k: _shifted(at[eqn.outvars[j]], -shift, eqn)
                for k, (j, shift) in enumerate(port.results)
                if eqn.outvars[j] in at
            }
            facts = find_placed(body, inputs, outputs, (name(eqn), name(eqn)))
            flows[i].append(facts)
            for v, (j, shift) in zip(body.invars, port.operands, strict=True):
                if v in facts.at:
                    demand(eqn.invars[j], _shifted(facts.at[v], shift, eqn), name(eqn))
            for v, (j, shift) in zip(body.outvars, port.results, strict=False):
                if is_var(v) and v in facts.at:
                    where = _shifted(facts.at[v], shift, eqn)
                    settle(eqn.outvars[j], where, name(eqn))
            for j, k in port.carries:
                if is_var(eqn.invars[j]) and eqn.invars[j] in at:
                    settle(eqn.outvars[k], at[eqn.invars[j]], name(eqn))
                elif eqn.outvars[k] in at:
                    demand(eqn.invars[j], at[eqn.outvars[k]], name(eqn))

    def forward():
        for i, eqn in enumerate(straight.eqns):
            if eqn.primitive is map_p or eqn.primitive in OF_PLACEMENT:
                operator(eqn)
            elif eqn.primitive.name in PORTS:
                if is_flow(eqn, placed):
                    flow(i, eqn)
            elif any(map(placed, eqn.invars)):
                arithmetic(i, eqn)

    before = None
    while before != (len(at), len(scattered)):  # Until nothing more is found.
        before = len(at), len(scattered)
        forward()
        for k, where in ends.items():
            demand(straight.outvars[k], where, told_by[1])
    return Facts(straight, at, scattered, rules, flows, why)


class Port(NamedTuple):
    """How a jaxpr in a loop or branch is joined to the equation's values.

    For each input of the jaxpr, and each output that is a result, the position of the
    operand or result, and by how much an axis is further back there.
    """

    jaxpr: Any
    operands: list[tuple[int, int]]
    results: list[tuple[int, int]]
    carries: list[tuple[int, int]]  # Operands and results in which a carry is.


def _ports_of_scan(eqn):
    n_consts, carried = operand_bounds(eqn)
    n_carry = carried - n_consts
    return [
        Port(
            eqn.params["jaxpr"],
            [(j, int(j >= carried)) for j in range(len(eqn.invars))],
            [(k, int(k >= n_carry)) for k in range(len(eqn.outvars))],
            [(n_consts + k, k) for k in range(n_carry)],
        )
    ]


def _ports_of_while(eqn):
    n_cond, n_consts = operand_bounds(eqn)
    init = [(j, 0) for j in range(n_consts, len(eqn.invars))]
    results = [(k, 0) for k in range(len(eqn.outvars))]
    of_cond = [(j, 0) for j in range(n_cond)]
    of_body = [(j, 0) for j in range(n_cond, n_consts)]
    carries = [(j, k) for k, (j, _) in enumerate(init)]
    return [
        Port(eqn.params["cond_jaxpr"], of_cond + init, [], carries),
        Port(eqn.params["body_jaxpr"], of_body + init, results, carries),
    ]


def _ports_of_cond(eqn):
    operands = [(j, 0) for j in range(1, len(eqn.invars))]
    results = [(k, 0) for k in range(len(eqn.outvars))]
    return [Port(jaxpr, operands, results, []) for jaxpr in eqn.params["branches"]]


PORTS = {"scan": _ports_of_scan, "while": _ports_of_while, "cond": _ports_of_cond}


def is_flow(eqn: Any, placed: Callable[[Any], bool]) -> bool:
    """Whether a loop or branch concerns the elements."""
    return any(map(placed, [*eqn.invars, *eqn.outvars])) or any(
        any(equations(port.jaxpr, primitive.name))
        for port in PORTS[eqn.primitive.name](eqn)
        for primitive in (map_p, _primitives.placement_size_p, *OF_PLACEMENT)
    )


def communicates(facts: Facts) -> bool:
    """Whether anything in it is reduced over a placement."""
    return (
        any(isinstance(rule, _rules.Reduced) for rule in facts.rules.values())
        or any(communicates(f) for inner in facts.flows.values() for f in inner)
        or any(
            eqn.primitive in REDUCTIONS or not all(eqn.params.get("out_placed", [True]))
            for eqn in facts.straight.eqns
        )
    )


def _shifted(where, by, eqn):
    if where.axis + by < 0:
        raise PlanError(
            f"drjax.make_plan: {name(eqn)} goes through the elements of "
            f"{where.placement!r} one after the other. Use drjax.map_fn for what is "
            "done to each, and drjax.reduce_* for what is combined."
        )
    return where._replace(axis=where.axis + by)


OF_PLACEMENT = {*_OF_SERVER_VALUES, *REDUCTIONS}


def _operands_placed(eqn):
    if eqn.primitive is map_p:
        return eqn.params["in_placed"]
    return [eqn.primitive in REDUCTIONS] * len(eqn.invars)


def _results_placed(eqn):
    if eqn.primitive is map_p:
        return eqn.params["out_placed"]
    return [eqn.primitive not in REDUCTIONS]


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


def rule_of(eqn: Any, wheres: Sequence[At | None], where: At, by: str) -> Any:
    """What an equation on placed values does; PlanError if it mixes elements."""
    op, over = name(eqn), repr(where.placement)
    if any(w is not None and w[:2] != where[:2] for w in wheres):
        raise PlanError(
            f"drjax.make_plan: {op} combines values of different placements. Reduce "
            "over one of them first, or do it in a function mapped over the other."
        )
    if not _rules.is_known(eqn.primitive):
        raise PlanError(
            f"drjax.make_plan: {op} on a value placed over {over}: what it does to "
            "the elements is not known. Do it in the function given to drjax.map_fn."
        )
    rule = _rules.find(eqn, [w and w.axis for w in wheres], where.n)
    if rule is None:
        raise PlanError(
            f"drjax.make_plan: {op} mixes the elements of {over}, which are on axis "
            f"{where.axis} of its operand, as {by} says. An element is alone until a "
            "reduction: use drjax.reduce_*, or do it in the function given to "
            "drjax.map_fn if it is meant for each element."
        )
    return rule


def _elements(where: At) -> str:
    return f"the {where.n} elements of {where.placement!r} on axis {where.axis}"


def name(eqn: Any) -> str:
    """An equation's primitive, and the line of code that it comes from."""
    return f"{eqn.primitive.name} ({source_info_util.summarize(eqn.source_info)})"
