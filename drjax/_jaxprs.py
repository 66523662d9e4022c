"""Small tools for jaxprs and for lists picked by flags."""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Var, jaxprs_in_params
from jax.interpreters import partial_eval as pe

from drjax import _compat
from drjax._compat import ClosedJaxpr


def trace(
    fn: Callable[..., Any], avals: Sequence[Any]
) -> tuple[ClosedJaxpr, list[Any]]:
    """Traces to a jaxpr without constants, and what it closed over.

    The latter, arrays or outer tracers, become its trailing inputs.
    """
    return _compat.open_consts(jax.make_jaxpr(fn)(*map(struct, avals)))


def struct(aval: Any) -> jax.ShapeDtypeStruct:
    """What `jax.make_jaxpr` takes in place of a value of this type."""
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=None if aval.sharding.mesh.empty else aval.sharding,
        manual_axis_type=aval.manual_axis_type,  # What varies within a shard_map.
    )


def dce(
    jaxpr: ClosedJaxpr, used: Iterable[bool], *, keep_inputs: bool = False
) -> tuple[ClosedJaxpr, list[bool]]:
    """Drops outputs, and inputs that nothing uses then; says which inputs are used."""
    opened, used_inputs = pe.dce_jaxpr(jaxpr.jaxpr, list(used), keep_inputs)[:2]
    return ClosedJaxpr(opened, ()), used_inputs


def without_effects(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Drops the equations that have effects; their outputs must not be used."""
    eqns = [eqn for eqn in jaxpr.jaxpr.eqns if not eqn.effects]
    return ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns, effects=set()), ())


def without_replayed_effects(jaxpr: Any, unknown: Sequence[bool]) -> Any:
    """Drops effects that do not depend on the flagged inputs, also in a checkpoint.

    The known part of a partial evaluation had them; a checkpoint in the unknown part
    would have them again. Only equations without results are dropped.
    """
    variables = set(pick(jaxpr.jaxpr.invars, unknown))
    eqns: list[Any] = []
    for eqn in jaxpr.jaxpr.eqns:
        depends = [is_in(v, variables) for v in eqn.invars]
        if any(depends):
            variables.update(eqn.outvars)
        elif eqn.effects and not eqn.outvars:
            continue
        if eqn.effects and "prevent_cse" in eqn.params:  # A jax.checkpoint.
            inner = ClosedJaxpr(eqn.params["jaxpr"], ())
            inner = without_replayed_effects(inner, depends).jaxpr
            params = dict(eqn.params, jaxpr=inner)
            eqn = eqn.replace(params=params, effects=inner.effects)
        eqns.append(eqn)
    effects = set().union(*(eqn.effects for eqn in eqns))
    return ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns, effects=effects), ())


def reached(jaxpr: ClosedJaxpr, inputs: Sequence[bool]) -> set[Var]:
    """The variables that depend on the flagged inputs or on an effect."""
    variables = set(pick(jaxpr.jaxpr.invars, inputs))
    for eqn in jaxpr.jaxpr.eqns:
        if eqn.effects or any(is_in(v, variables) for v in eqn.invars):
            variables.update(eqn.outvars)
    return variables


def outputs_reached(jaxpr: ClosedJaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs depend on the flagged inputs or on an effect."""
    variables = reached(jaxpr, inputs)
    return [is_in(v, variables) for v in jaxpr.jaxpr.outvars]


def is_var(atom: Any) -> bool:
    """Whether an operand or output of an equation is a variable, not a literal."""
    return isinstance(atom, Var)


def is_in(atom: Any, variables: Any) -> bool:
    """Membership that a literal, which has no hash, may be asked for."""
    return is_var(atom) and atom in variables


def holds(jaxpr: Any, primitive_name: str) -> bool:
    """Whether a jaxpr or one inside it has an equation of that name."""
    return any(
        eqn.primitive.name == primitive_name
        or any(holds(inner, primitive_name) for inner in jaxprs_in_params(eqn.params))
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


def cached_by_jaxpr(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Caches `fn(jaxpr, *hashable)` for as long as the jaxpr lives, and no longer."""
    cache: weakref.WeakKeyDictionary[ClosedJaxpr, dict[Any, Any]]
    cache = weakref.WeakKeyDictionary()

    @functools.wraps(fn)
    def cached(jaxpr: ClosedJaxpr, *key: Any) -> Any:
        of_jaxpr = cache.setdefault(jaxpr, {})
        if key not in of_jaxpr:
            of_jaxpr[key] = fn(jaxpr, *key)
        return of_jaxpr[key]

    return cached


def pick(values: Iterable[Any], flags: Iterable[bool]) -> list[Any]:
    """The values whose flag is set."""
    return [v for v, flag in zip(values, flags, strict=True) if flag]


def drop(values: Iterable[Any], flags: Iterable[bool]) -> list[Any]:
    """The values whose flag is not set."""
    return [v for v, flag in zip(values, flags, strict=True) if not flag]


def merge(
    flags: Iterable[bool], if_true: Iterable[Any], if_false: Iterable[Any]
) -> list[Any]:
    """The inverse of `pick` and `drop`: takes the next value of one or the other."""
    true, false = iter(if_true), iter(if_false)
    return [next(true) if flag else next(false) for flag in flags]


def where(flags: Iterable[bool]) -> list[int]:
    """The positions of the flags that are set."""
    return [i for i, flag in enumerate(flags) if flag]
