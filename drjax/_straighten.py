"""A jaxpr without calls, which are looked through, and without a mesh."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import source_info_util
from jax.extend.core import Var, gensym
from jax.sharding import NamedSharding

from drjax._compat import ClosedJaxpr
from drjax._jaxprs import is_var

_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"),
    *("custom_vjp_call", "custom_lin", "remat2", "checkpoint"),
}


class Straight(NamedTuple):
    """A jaxpr without calls; its variables are new."""

    invars: list[Var]
    outvars: list[Any]
    eqns: list[Any]
    constants: dict[Var, Any]
    template: Any  # The jaxpr it was.


_SHARDINGS = {"device_put", "mesh_cast", "reshard", "sharding_constraint"}


def without_shardings(jaxpr: Any) -> Any:
    """Drops, at every depth, what only says on which devices values are."""
    inner, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    same: dict[Var, Any] = {}

    def read(atom):
        return same.get(atom, atom) if is_var(atom) else atom

    def param(value):
        if isinstance(value, tuple) and any(hasattr(x, "eqns") for x in value):
            return tuple(map(param, value))
        if isinstance(value, NamedSharding):
            return None
        return without_shardings(value) if hasattr(value, "eqns") else value

    eqns = []
    for eqn in inner.eqns:
        operands = [*map(read, eqn.invars)]
        if eqn.primitive.name in _SHARDINGS:
            same.update(zip(eqn.outvars, operands, strict=True))
        else:
            params = {key: param(value) for key, value in eqn.params.items()}
            eqns.append(eqn.replace(invars=operands, params=params))
    new = inner.replace(eqns=eqns, outvars=[*map(read, inner.outvars)])
    return ClosedJaxpr(new, consts) if hasattr(jaxpr, "consts") else new


def straighten(jaxpr: Any) -> Straight:
    """Inlines the calls in a jaxpr, and drops what no result needs."""
    newvar = gensym()
    eqns: list[Any] = []
    constants: dict[Var, Any] = {}

    def inline(closed, args, source):
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
            # What JAX's functions do inside is told by the line that calls them.
            known = source is None or source_info_util.summarize(eqn.source_info)
            own_source = eqn.source_info if known else source
            called = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
            if eqn.primitive.name in _CALLS and called is not None:
                outs = inline(called, operands, own_source)
            else:
                outs = [newvar(v.aval) for v in eqn.outvars]
                eqns.append(
                    eqn.replace(invars=operands, outvars=outs, source_info=own_source)
                )
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in inner.outvars]

    template = getattr(jaxpr, "jaxpr", jaxpr)
    invars = [newvar(v.aval) for v in template.invars]
    outvars = inline(jaxpr, invars, None)
    return Straight(invars, outvars, _live(eqns, outvars), constants, template)


def _live(eqns: Sequence[Any], outvars: Sequence[Any]) -> list[Any]:
    """The equations that have effects or that a result needs."""
    needed = set(filter(is_var, outvars))
    live = []
    for eqn in reversed(eqns):
        if eqn.effects or needed & {*eqn.outvars}:
            needed.update(filter(is_var, eqn.invars))
            live.append(eqn)
    return live[::-1]
