"""Which values of a jaxpr are placed, over which placement, and on which axis.

Operators say what their operands and results are. From there the axis is followed
through arithmetic by the rules of `_rules.py`, forwards, and backwards to the arguments
that are placed, and through loops and branches into the jaxprs that they hold, until
nothing more is found.
"""

import collections
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jax.extend.core import Var, jaxprs_in_params

from drjax import _primitives, _rules
from drjax._equations import (
    OF_PLACEMENT,
    REDUCTIONS,
    PlanError,
    backwards,
    described,
    is_repeated,
    operands_placed,
    results_placed,
    rule_of,
)
from drjax._jaxprs import equations, is_in, is_var, names, pick
from drjax._map import map_p
from drjax._ports import PORTS
from drjax._straighten import Straight, straighten
from drjax.plan import At


class Facts(NamedTuple):
    """What was found out about the values of a jaxpr, and its equations by position."""

    straight: Straight
    at: dict[Var, At]  # Where the elements are, of what each element has a part of.
    scattered: dict[Var, At]  # The same of server values that are handed out to them.
    ends: frozenset[int]  # The outputs that are placed outside.
    rules: dict[int, Any]  # Of placed arithmetic.
    flows: dict[int, list["Facts"]]  # Of the jaxprs in scan, while and cond.
    why: dict[Var, str]  # What says that a value is placed.
    origins: Callable[..., set[Any]]

    def own_operands(self, i: int) -> list[bool]:
        """Which operands of an equation an element has a part of; of others, all."""
        eqn = self.straight.eqns[i]
        if eqn.primitive is map_p or eqn.primitive in OF_PLACEMENT:
            return list(operands_placed(eqn))
        if i in self.rules:
            return [axis is not None for axis in self.rules[i].operands]
        own = [False] * len(eqn.invars)
        for port, inner in zip(_ports(eqn), self.flows.get(i, []), strict=False):
            for v, (j, _) in zip(inner.straight.invars, port.operands, strict=True):
                own[j] |= v in inner.at
        return own


def find_placed(
    straight: Straight,
    seeds: dict[Var, At],
    ends: dict[int, At],
    told_by: tuple[str, str] = ("", ""),
    of_server: Collection[Var] = (),
    carries: dict[Var, Any] | None = None,
    outside: Callable[..., set[Any]] | None = None,
) -> Facts:
    """Finds which values are placed, and where.

    Args:
      straight: the jaxpr.
      seeds: what is known of its inputs.
      ends: what is known of its outputs, by position.
      told_by: what says the former, and what the latter, for messages.
      of_server: inputs that are known to be the server's.
      carries: of a loop's jaxpr, the inputs that are a carry, and their next value.
      outside: of a loop's or branch's, the origins of an input by its position.
    """
    finder = _Finder(straight, seeds, told_by, of_server, carries or {}, outside)
    before, now = (-1, -1), (0, 0)
    while now != before:  # Until nothing more is found.
        before = now
        finder.look()
        for k, where in ends.items():
            finder.demand(straight.outvars[k], where, told_by[1])
        now = len(finder.at), len(finder.scattered)
    return Facts(
        straight=straight,
        at=finder.at,
        scattered=finder.scattered,
        ends=frozenset(ends),
        rules=finder.rules,
        flows=finder.flows,
        why=finder.why,
        origins=finder.origins,
    )


class _Finder:
    """What has been found out so far; see `Facts`."""

    def __init__(
        self,
        straight: Straight,
        seeds: dict[Var, At],
        told_by: tuple[str, str],
        of_server: Collection[Var],
        carries: dict[Var, Any],
        outside: Callable[..., set[Any]] | None,
    ):
        self.outside = outside
        self.straight, self.of_server, self.carries = straight, of_server, carries
        self.at: dict[Var, At] = dict(seeds)
        self.scattered: dict[Var, At] = {}
        self.why: dict[Any, str] = dict.fromkeys(seeds, told_by[0])
        self.whole: set[Var] = set()  # Sent to the elements as it is.
        self.rules: dict[int, Any] = {}
        self.flows: dict[int, list[Facts]] = {}
        self.inner: dict[int, list[Straight]] = {}
        self.alone: dict[int, list[Facts]] = {}  # Flows of which nothing is known.
        atoms = [v for e in straight.eqns for v in e.invars] + straight.outvars
        self.uses = collections.Counter(filter(is_var, atoms))
        self.inputs = {v: k for k, v in enumerate(straight.invars)}
        self.producer = {v: i for i, e in enumerate(straight.eqns) for v in e.outvars}

    def look(self) -> None:
        """Follows what is known through all equations, in order."""
        for i, eqn in enumerate(self.straight.eqns):
            if eqn.primitive is map_p or eqn.primitive in OF_PLACEMENT:
                self.operator(eqn)
            elif eqn.primitive.name in PORTS:
                if is_flow(eqn, self.placed):
                    self.flow(i, eqn)
            elif any(map(self.placed, eqn.invars)):
                self.arithmetic(i, eqn)
            elif any(map(_holds_operators, jaxprs_in_params(eqn.params))):
                raise PlanError(
                    f"drjax.make_plan: {described(eqn)} holds operators, and how it "
                    "runs them is not known. Call them outside of it."
                )

    def placed(self, v: Any) -> bool:
        return is_in(v, self.at)

    def settle(self, v: Any, where: At, by: str, *, scattered: bool = False) -> None:
        """Notes that a value is placed, or handed out; PlanError if elsewhere, too."""
        known = self.at.get(v) or self.scattered.get(v) or where
        if known != where:
            raise PlanError(
                f"drjax.make_plan: a value of type {v.aval} has {_elements(known)}, as "
                f"{self.why[v]} says, and {_elements(where)}, as {by} says. Change one "
                "of the two, or move the axis in between."
            )
        (self.scattered if scattered else self.at)[v] = where
        self.why.setdefault(v, by)

    def demand(self, v: Any, where: At, by: str) -> None:
        """Settles that elements have a part of a value, or are handed it.

        If it comes from an argument, or is the same for all elements, the way back is
        followed: they have it. What the server computes, it hands out.
        """
        todo: list[Any] = [(v, where, by, None)]
        while todo:
            v, where, by, origins = todo.pop()
            if is_in(v, self.at) or is_in(v, self.scattered):
                self.settle(v, where, by, scattered=v in self.scattered)
                continue
            if not _has_elements(v, where):
                raise PlanError(
                    f"drjax.make_plan: {by} needs {_elements(where)} of a value of "
                    f"type {v.aval}, which has not so many there."
                )
            origins = origins or self.origins(v, where)
            is_servers = _are_of_server(origins)
            i = self.producer.get(v, -1)
            rule = None if i < 0 else self.back(i, v, where)
            # Handed out as what it is made of, if all the server does is to repeat it.
            if is_servers and (rule is None or not self.is_moved(i, rule, v)):
                self.settle(v, where, by, scattered=True)
                continue
            self.settle(v, where, by)
            if rule is None:
                continue
            if is_servers:
                self.rules[i] = rule
            eqn = self.straight.eqns[i]
            operands = [
                (u, where._replace(axis=axis), described(eqn))
                for u, axis in zip(eqn.invars, rule.operands, strict=True)
                if axis is not None
            ]
            known = origins if len(operands) == 1 else None
            todo += [(*operand, known) for operand in operands]

    def back(self, i: int, v: Var, where: At) -> Any:
        """The rule by which an operand's elements become those of a result, if any."""
        eqn = self.straight.eqns[i]
        if eqn.primitive.name in PORTS or is_repeated(eqn, where):
            return None
        if isinstance(self.rules.get(i), _rules.Reduced):
            return None
        return backwards(eqn, v, where)

    def is_moved(self, i: int, rule: Any, v: Var) -> bool:
        """Whether an equation only repeats or moves entries, for one other equation."""
        eqn = self.straight.eqns[i]
        is_movement = eqn.primitive.name in ("broadcast_in_dim", "reshape", "squeeze")
        return is_movement and rule.operands[0] is not None and self.uses[v] == 1

    def origins(self, v: Any, where: At, seen: set[Any] | None = None) -> set[Any]:
        """What a value with these elements is made of, if it is followed back.

        Some of: values of the server; what is the same for all elements; placed values;
        and inputs of which nothing is known, by position.
        """
        seen = set() if seen is None else seen
        found: set[Any] = set()
        todo = [(v, where)]
        while todo:
            v, where = todo.pop()
            if not _has_elements(v, where) or v in self.scattered:
                found.add(_SERVER)
            elif v in self.at:
                found.add(_PLACED if self.at[v] == where else _SERVER)
            elif v in seen:
                continue
            elif v in self.inputs:
                seen.add(v)
                found |= self.origins_of_input(v, where, seen)
            elif v not in self.producer:
                found.add(_SERVER)
            else:
                seen.add(v)
                i = self.producer[v]
                eqn = self.straight.eqns[i]
                rule = self.back(i, v, where)
                if rule is not None:
                    operands = zip(eqn.invars, rule.operands, strict=True)
                    todo += [
                        (u, where._replace(axis=axis))
                        for u, axis in operands
                        if axis is not None
                    ]
                elif eqn.primitive.name in PORTS:
                    found |= self.origins_of_flow(i, eqn, v, where, seen)
                else:
                    found.add(_REPEATED if is_repeated(eqn, where) else _SERVER)
        return found

    def origins_of_input(self, v: Var, where: At, seen: set[Any]) -> set[Any]:
        if v in self.of_server:
            return {_SERVER}
        position = self.inputs[v]
        first = self.outside(position, where) if self.outside else {position}
        if not all(isinstance(origin, str) for origin in first):
            first = {position}
        if v not in self.carries:
            return {_SERVER} if _are_of_server(first) else {position}
        later = self.origins(self.carries[v], where, seen) - {position}
        # If it is so after the first time round, it is the server's.
        if v in self.whole or _are_of_server(later) or _are_of_server(later | first):
            return {_SERVER}
        return {position, *later}

    def origins_of_flow(self, i, eqn, v, where, seen) -> set[Any]:
        found: set[Any] = set()
        result = eqn.outvars.index(v)
        for port, facts in zip(_ports(eqn), self.looked_into(i, eqn), strict=True):
            for u, (j, shift) in zip(
                facts.straight.outvars, port.results, strict=False
            ):
                if j != result or where.axis < shift:
                    continue
                at_port = where._replace(axis=where.axis - shift)
                for origin in facts.origins(u, at_port):
                    if isinstance(origin, str):
                        found.add(origin)
                        continue
                    j, shift = port.operands[origin]
                    outside = where._replace(axis=at_port.axis + shift)
                    found |= self.origins(eqn.invars[j], outside, seen)
        return found or {_SERVER}

    def demand_operands(self, eqn: Any, rule: Any, where: At) -> None:
        for v, axis in zip(eqn.invars, rule.operands, strict=True):
            if axis is not None:
                self.demand(v, where._replace(axis=axis), described(eqn))

    def looked_into(self, i: int, eqn: Any) -> list[Facts]:
        """What is known of the jaxprs in a loop or branch."""
        if i not in self.flows and i not in self.alone:
            self.alone[i] = [
                find_placed(body, {}, {}, carries=_carries(port, body))
                for port, body in zip(_ports(eqn), self.bodies(i, eqn), strict=True)
            ]
        return self.flows.get(i) or self.alone[i]

    def bodies(self, i: int, eqn: Any) -> list[Straight]:
        if i not in self.inner:
            self.inner[i] = [straighten(port.jaxpr) for port in _ports(eqn)]
        return self.inner[i]

    def operator(self, eqn: Any) -> None:
        where = At(eqn.params["placement"], eqn.params["n"], 0)
        for v, is_own in zip(eqn.invars, operands_placed(eqn), strict=True):
            if is_own:
                self.demand(v, where, described(eqn))
            elif self.placed(v):
                raise PlanError(
                    f"drjax.make_plan: {described(eqn)} sends every element a value "
                    f"that is placed over {self.at[v].placement!r}, as {self.why[v]} "
                    "says, whole. Each element has its own part of it: pass it as an "
                    "argument of the mapped function, or reduce it first."
                )
            elif is_var(v):
                self.whole.add(v)
        for v in pick(eqn.outvars, results_placed(eqn)):
            self.settle(v, where, described(eqn))

    def arithmetic(self, i: int, eqn: Any) -> None:
        wheres = [self.at.get(v) if is_var(v) else None for v in eqn.invars]
        first = next(v for v in eqn.invars if self.placed(v))
        where = self.at[first]
        self.rules[i] = rule = rule_of(eqn, wheres, where, self.why[first])
        self.demand_operands(eqn, rule, where)
        if isinstance(rule, _rules.Placed):
            for v, axis in zip(eqn.outvars, rule.results, strict=True):
                self.found(v, where._replace(axis=axis), described(eqn))

    def flow(self, i: int, eqn: Any) -> None:
        """Looks into a loop or branch, and tells both sides of each port."""
        flows: list[Facts] = []
        by = described(eqn)
        for port, body in zip(_ports(eqn), self.bodies(i, eqn), strict=True):
            seeds = {
                v: _shifted(self.at[eqn.invars[j]], -shift, eqn)
                for v, (j, shift) in zip(body.invars, port.operands, strict=True)
                if self.placed(eqn.invars[j])
            }
            operands = _by_operand(port, body)
            for j, k in port.carries:
                if self.placed(eqn.outvars[k]):
                    seeds[operands[j]] = self.at[eqn.outvars[k]]
            ends = {
                k: _shifted(self.at[eqn.outvars[j]], -shift, eqn)
                for k, (j, shift) in enumerate(port.results)
                if self.placed(eqn.outvars[j])
            }

            def outside(position, where, port=port):
                j, shift = port.operands[position]
                return self.origins(
                    eqn.invars[j], where._replace(axis=where.axis + shift)
                )

            facts = find_placed(
                body, seeds, ends, (by, by), (), _carries(port, body), outside
            )
            flows.append(facts)
            for v, (j, shift) in zip(body.invars, port.operands, strict=True):
                if v in facts.at:
                    self.demand(eqn.invars[j], _shifted(facts.at[v], shift, eqn), by)
            for v, (j, shift) in zip(body.outvars, port.results, strict=False):
                if is_in(v, facts.at):
                    self.found(eqn.outvars[j], _shifted(facts.at[v], shift, eqn), by)
            for j, k in port.carries:
                if self.placed(eqn.invars[j]):
                    self.found(eqn.outvars[k], self.at[eqn.invars[j]], by)
                elif self.placed(eqn.outvars[k]):
                    self.demand(eqn.invars[j], self.at[eqn.outvars[k]], by)
        self.flows[i] = flows

    def found(self, v: Var, where: At, by: str) -> None:
        """Settles that a value is placed, which may have been taken for another."""
        self.scattered.pop(v, None)
        self.settle(v, where, by)


_SERVER, _REPEATED, _PLACED = "server", "repeated", "placed"


def _are_of_server(origins: set[Any]) -> bool:
    return _SERVER in origins and origins <= {_SERVER, _REPEATED}


def _by_operand(port: Any, body: Straight) -> dict[int, Var]:
    pairs = zip(port.operands, body.invars, strict=True)
    return {j: v for (j, _), v in pairs}


def _carries(port: Any, body: Straight) -> dict[Var, Any]:
    """The inputs of a loop's jaxpr that are a carry, and their next value."""
    operands = _by_operand(port, body)
    return {operands[j]: body.outvars[k] for j, k in port.carries if port.results}


def _holds_operators(jaxpr: Any) -> bool:
    return any(primitive.startswith("drjax_") for primitive in names(jaxpr))


def _has_elements(v: Any, where: At) -> bool:
    return is_var(v) and v.aval.shape[where.axis : where.axis + 1] == (where.n,)


def _ports(eqn: Any) -> list[Any]:
    return PORTS[eqn.primitive.name](eqn) if eqn.primitive.name in PORTS else []


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


def _elements(where: At) -> str:
    return f"the {where.n} elements of {where.placement!r} on axis {where.axis}"


def _shifted(where, by, eqn):
    if where.axis + by < 0:
        raise PlanError(
            f"drjax.make_plan: {described(eqn)} goes through the elements of "
            f"{where.placement!r} one after the other. Use drjax.map_fn for what is "
            "done to each, and drjax.reduce_* for what is combined."
        )
    return where._replace(axis=where.axis + by)
