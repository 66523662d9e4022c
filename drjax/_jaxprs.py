"""Small tools for jaxprs and for lists picked by flags."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_context, eval_jaxpr
from jax.extend import linear_util as lu
from jax.extend.core import Var, get_opaque_trace_state, jaxprs_in_params
from jax.interpreters import partial_eval as pe
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from drjax import _compat
from drjax._compat import ClosedJaxpr


def is_eager() -> bool:
    """Whether operations run at once, under no transformation at all."""
    return get_opaque_trace_state() == _EAGER


with eval_context():
    _EAGER = get_opaque_trace_state()


def trace(
    fn: Callable[..., Any], avals: Sequence[Any], debug_info: Any
) -> tuple[ClosedJaxpr, list[Any]]:
    """Traces a function that returns a list; also returns what it closed over.

    The latter, arrays or outer tracers, become the jaxpr's trailing inputs, so that it
    has no constants. `debug_info` says for JAX's error messages which function this is.
    """
    # A third of the cost of jax.make_jaxpr, which goes through a new jit.
    fun = lu.wrap_init(fn, debug_info=debug_info)
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(fun, list(avals))
    return _compat.open_consts(jaxpr, len(consts)), list(consts)


def debug_info(jaxpr: Any) -> Any:
    """The debug information for a function that is derived from a jaxpr."""
    return jaxpr.jaxpr.debug_info.with_unknown_names()


def as_fun(jaxpr: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The function `*inputs -> outputs` that a jaxpr without constants computes."""

    def fun(*args: Any) -> list[Any]:
        return eval_jaxpr(jaxpr.jaxpr, (), *args)

    fun.__signature__ = _SIGNATURE
    return fun


# To find a signature costs JAX more than to vmap a small jaxpr.
_SIGNATURE = inspect.signature(lambda *args: args)


def struct(aval: Any) -> jax.ShapeDtypeStruct:
    """What JAX's transformations take in place of a value of this type."""
    sharding = aval.sharding
    if sharding.mesh.empty:
        # On an explicit mesh, a scalar without one gets it when it meets others.
        mesh = jax.sharding.get_abstract_mesh()
        explicit = AxisType.Explicit in mesh.axis_types
        sharding = NamedSharding(mesh, PartitionSpec()) if explicit else None
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=sharding,
        manual_axis_type=aval.manual_axis_type,  # What varies within a shard_map.
    )


def dce(
    jaxpr: ClosedJaxpr, used: Iterable[bool], *, keep_inputs: bool = False
) -> tuple[ClosedJaxpr, list[bool]]:
    """Drops outputs, and inputs that nothing uses then; says which inputs are used."""
    pruned, used_inputs = _dce(jaxpr, tuple(used), keep_inputs)
    return pruned, list(used_inputs)


def dce_after_first(
    jaxpr: ClosedJaxpr, used: Sequence[bool]
) -> tuple[ClosedJaxpr, list[bool]]:
    """As `dce`, but the first input stays; says which of the others are used."""
    _, used_inputs = dce(jaxpr, used)
    kept, _ = dce(jaxpr, used, keep_inputs=True)
    invars = pick(kept.jaxpr.invars, [True, *used_inputs[1:]])
    opened = kept.jaxpr.replace(invars=invars, debug_info=debug_info(kept))
    return ClosedJaxpr(opened, ()), used_inputs[1:]


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


def equations(jaxpr: Any, primitive_name: str) -> Iterator[Any]:
    """The equations of that name in a jaxpr and those inside it."""
    return (eqn for eqn in _all(jaxpr) if eqn.primitive.name == primitive_name)


def in_jaxpr(fn: Callable[[Any], Any], jaxpr: Any, name: str) -> Any:
    """Applies `fn` to the equations of a jaxpr that are, or hold, some of that name."""
    if hasattr(jaxpr, "jaxpr") and jaxpr.jaxpr is not jaxpr:
        inner = in_jaxpr(fn, jaxpr.jaxpr, name)
        return jaxpr if inner is jaxpr.jaxpr else ClosedJaxpr(inner, jaxpr.consts)
    if not any(equations(jaxpr, name)):
        return jaxpr
    return jaxpr.replace(eqns=[in_equation(fn, eqn, name) for eqn in jaxpr.eqns])


def in_equation(fn: Callable[[Any], Any], eqn: Any, name: str) -> Any:
    """Applies `fn` to an equation, after those of that name that are inside."""

    def param(value):
        if isinstance(value, tuple) and any(hasattr(x, "eqns") for x in value):
            values = map(param, value)
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
        return in_jaxpr(fn, value, name) if hasattr(value, "eqns") else value

    return fn(eqn.replace(params={k: param(v) for k, v in eqn.params.items()}))


def names(jaxpr: Any) -> set[str]:
    """The names of the primitives in a jaxpr and in those inside it."""
    return {eqn.primitive.name for eqn in _all(jaxpr)}


def key_types(jaxpr: Any) -> set[str]:
    """The dtypes of the PRNG keys in a jaxpr and in those inside it."""
    avals: Any = (v.aval for eqn in _all(jaxpr) for v in (*eqn.invars, *eqn.outvars))
    dtypes = {aval.dtype for aval in avals if hasattr(aval, "dtype")}
    return {str(d) for d in dtypes if jnp.issubdtype(d, jax.dtypes.prng_key)}


def _all(jaxpr: Any) -> Iterator[Any]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _all(inner)


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


@cached_by_jaxpr
def _dce(jaxpr: ClosedJaxpr, used: tuple[bool, ...], keep_inputs: bool) -> Any:
    opened, used_inputs = pe.dce_jaxpr(jaxpr.jaxpr, list(used), keep_inputs)[:2]
    return ClosedJaxpr(opened, ()), used_inputs


def unique(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """A recent jaxpr that nobody can tell from this one; this one if there is none.

    A function that is mapped in a loop, or differentiated again, is traced again. What
    derives from a jaxpr is cached by it, so all of that need not be done again.
    """
    try:
        same = _same(_key(jaxpr))
    except TypeError:  # No key, or a parameter without a hash.
        return jaxpr
    return same[0] if same else same.append(jaxpr) or jaxpr


@functools.lru_cache(maxsize=128)
def _same(key: Any) -> list[ClosedJaxpr]:
    return []


def _key(jaxpr: Any) -> Any:
    """A jaxpr as a value: its equations, and where in the source they come from.

    Raises TypeError if that would keep alive more than equations (a constant, or the
    rule of a custom_jvp with what it closes over) or very many of those. An effect
    may hold anything.
    """
    jaxpr, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    if jaxpr.constvars or consts or jaxpr.effects or len(jaxpr.eqns) > 1000:
        raise TypeError
    numbers: dict[Any, int] = {}

    def atom(a: Any) -> Any:
        if is_var(a):
            return numbers.setdefault(a, len(numbers)), a.aval
        return a.aval, type(a.val), np.asarray(a.val).tobytes()  # Tells 0.0 from -0.0.

    def param(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value), *map(param, value)
        if hasattr(value, "eqns"):
            return _key(value)
        is_data = not callable(value) or isinstance(value, type | jax.sharding.Mesh)
        if not is_data or isinstance(value, lu.WrappedFun):
            raise TypeError
        return type(value), value

    def equation(eqn: Any) -> Any:
        return (
            eqn.primitive,
            *map(atom, eqn.invars),
            *map(atom, eqn.outvars),
            *((name, param(value)) for name, value in eqn.params.items()),
            (eqn.ctx, eqn.source_info.traceback, eqn.source_info.name_stack),
        )

    return (
        *map(atom, jaxpr.invars),
        *map(equation, jaxpr.eqns),
        *map(atom, jaxpr.outvars),
        (jaxpr.debug_info.func_src_info, jaxpr.debug_info.arg_names),
    )


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
