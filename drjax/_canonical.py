"""A plan as plain nested tuples: equal for equal plans, in any process.

Variables are numbered in the order in which they appear, calls are looked through, and
arrays are told by type and contents. No name, source line, tree or address is in it.
"""

import dataclasses
import enum
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drjax import _compat
from drjax._jaxprs import is_var
from drjax._straighten import straighten
from drjax.plan import At, MapReduce, Plan


def digest(plan: Plan) -> str:
    """The SHA-256 of a plan, in hexadecimal."""
    return hashlib.sha256(repr(canonical(plan)).encode()).hexdigest()


def canonical(plan: Plan, free: tuple[str, int] | None = None) -> Any:
    """A plan as nested tuples; with placement `free`, name and size, of any size."""

    def place(where: At) -> Any:
        return where._replace(n=0) if where[:2] == free else where

    def aval(i: int) -> Any:
        is_free = i in plan.at and plan.at[i][:2] == free
        return _type(plan.element(i) if is_free else plan.avals[i])

    def stage(s: Any) -> Any:
        if isinstance(s, MapReduce) and (s.placement, s.n) == free:
            s = dataclasses.replace(s, n=0)
        values = [getattr(s, field.name) for field in dataclasses.fields(s)]
        return type(s).__name__, *map(value, values)

    def value(x: Any) -> Any:
        if isinstance(x, Plan):
            return canonical(x, free)
        if isinstance(x, tuple):
            return (*map(value, x),)
        return _value(x)

    return (
        *map(stage, plan.stages),
        *map(aval, range(len(plan.avals))),
        *((i, *place(where)) for i, where in sorted(plan.at.items())),
        *sorted(plan.scattered),
        plan.inputs,
        *((i, _value(x)) for i, x in sorted(plan.constants.items())),
        *((i, *place(At(*of, 0))) for i, of in sorted(plan.sizes.items())),
        plan.outputs,
    )


def _type(aval: Any) -> Any:
    return str(aval.dtype), tuple(aval.shape)


def _jaxpr(jaxpr: Any) -> Any:
    straight = straighten(jaxpr)
    numbers: dict[Any, int] = {}

    def atom(a: Any) -> Any:
        if is_var(a):
            return numbers.setdefault(a, len(numbers)), *_type(a.aval)
        return *_type(a.aval), _value(a.val)

    def equation(eqn: Any) -> Any:
        return (
            eqn.primitive.name,
            *map(atom, eqn.invars),
            *map(atom, eqn.outvars),
            *((key, _value(x)) for key, x in _meaning(eqn)),
        )

    return (
        *map(atom, straight.invars),
        *((atom(v), _value(x)) for v, x in straight.constants.items()),
        *map(equation, straight.eqns),
        *map(atom, straight.outvars),
    )


# Of our own equations: how they are compiled, and a name for profiles.
_NO_MEANING = {"mesh", "name", "bulk", "matmuls"}


def _meaning(eqn: Any) -> Any:
    """The parameters that say what an equation computes, sorted."""
    params = dict(eqn.params)
    if eqn.primitive.name.startswith("drjax_"):
        params = {k: x for k, x in params.items() if k not in _NO_MEANING}
    elif eqn.primitive.name == "scan":
        params = {k: params[k] for k in ("jaxpr", "length", "reverse")}
        params["counts"] = _compat.scan_counts(eqn)
    return sorted(params.items())


def _value(x: Any) -> Any:
    """A parameter or a constant."""
    if x is None or isinstance(x, bool | int | str | bytes):
        return x
    if isinstance(x, float | complex):
        return repr(x)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), _value(jax.random.key_data(x))
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        contents = np.asarray(x)
        return _type(contents), hashlib.sha256(contents.tobytes()).hexdigest()
    if hasattr(x, "eqns"):
        return _jaxpr(x)
    if isinstance(x, tuple | list):
        return type(x).__name__, *map(_value, x)
    if isinstance(x, dict):
        return (*((key, _value(x[key])) for key in sorted(x)),)
    if isinstance(x, set | frozenset):
        return (*sorted(map(repr, map(_value, x))),)
    if isinstance(x, enum.Enum):
        return type(x).__name__, x.name
    if isinstance(x, functools.partial):
        return "partial", _value(x.func), _value(x.args), _value(x.keywords)
    if callable(x) and hasattr(x, "__qualname__"):  # A callback, or a type.
        return _function(x), *map(_function, _closed_over(x))
    text = repr(x)
    if " at 0x" in text:  # An object of Python: by what it holds.
        names = (*getattr(type(x), "__slots__", ()), *getattr(x, "__dict__", ()))
        held = {k: getattr(x, k) for k in names if not k.startswith("__")}
        return type(x).__name__, _value(held)
    return type(x).__name__, text


def _function(x: Any) -> Any:
    code = getattr(x, "__code__", None)
    return x.__module__, x.__qualname__, code and code.co_firstlineno


def _closed_over(x: Any) -> list[Any]:
    """The functions that a function closes over: JAX wraps a callback in its own."""
    cells = [cell.cell_contents for cell in getattr(x, "__closure__", None) or ()]
    return [held for held in cells if hasattr(held, "__code__")]
