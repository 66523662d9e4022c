"""What one equation does to the elements of a placement, and how it is told of."""

from collections.abc import Sequence
from typing import Any

from jax.extend import source_info_util

from drjax import _primitives, _rules
from drjax._map import map_p
from drjax.plan import At

REDUCTIONS = {
    _primitives.reduce_sum_p: "sum",
    _primitives.reduce_max_p: "max",
    _primitives.reduce_min_p: "min",
}
_OF_SERVER_VALUES = {_primitives.broadcast_p, _primitives.placement_index_p}
OF_PLACEMENT = {*_OF_SERVER_VALUES, *REDUCTIONS}


class PlanError(ValueError):
    """A program that cannot be cut into rounds."""


PlanError.__module__ = "drjax"


def operands_placed(eqn):
    if eqn.primitive is map_p:
        return eqn.params["in_placed"]
    return [eqn.primitive in REDUCTIONS] * len(eqn.invars)


def results_placed(eqn):
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


def backwards(eqn, result, where):
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
    op, over = described(eqn), repr(where.placement)
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


def described(eqn: Any) -> str:
    """An equation's primitive, and the line of code that it comes from."""
    return f"{eqn.primitive.name} ({source_info_util.summarize(eqn.source_info)})"
