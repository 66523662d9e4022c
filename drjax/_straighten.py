"""A jaxpr without calls, which are looked through, and without a mesh."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax, typeof
from jax.extend import source_info_util
from jax.extend.core import Literal, Var, gensym, jaxpr_as_fun
from jax.sharding import NamedSharding

from drjax._compat import ClosedJaxpr
from drjax._jaxprs import is_var, names, trace
from drjax._mesh import context_without_mesh
from drjax._ports import operand_bounds

_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"),
    *("custom_vjp_call", "custom_lin", "remat2", "checkpoint", "eval_jaxpr"),
    *("custom_vmap_call", "drjax_encoded_sum"),
}


_CALLED = "call_jaxpr", "jaxpr", "call"


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
        if is_var(atom):
            return same.get(atom, atom)
        sharding = getattr(atom.aval, "sharding", None)
        if sharding is None or sharding.mesh.empty:
            return atom
        value = np.asarray(atom.val)  # JAX's own literal has a mesh.
        return Literal(value, typeof(value))

    def param(value):
        if isinstance(value, tuple) and any(hasattr(x, "eqns") for x in value):
            values = map(param, value)
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
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
            ctx = context_without_mesh(eqn.ctx)
            eqns.append(eqn.replace(invars=operands, params=params, ctx=ctx))
    new = inner.replace(eqns=eqns, outvars=[*map(read, inner.outvars)])
    return ClosedJaxpr(new, consts) if hasattr(jaxpr, "consts") else new


def _solving(eqn: Any, operands: list[Any]) -> tuple[Any, list[Any]]:
    """Of a linear solve, which knows how to be differentiated, what solves it."""
    a, b, c, d = eqn.params["const_lengths"]
    ours = operands[a + b : a + b + c] + operands[a + b + c + d :]
    return eqn.params["jaxprs"].solve, ours


def while_any(predicate: Any, body: Any, init: list[Any]) -> list[Any]:
    """A while loop of which the predicate may be an array, as in the vmap of one.

    It goes on while any entry holds; what belongs to the others stays as it is.
    """

    def select(goes_on, new, old):
        shape = goes_on.shape + (1,) * (new.ndim - goes_on.ndim)
        return jnp.where(goes_on.reshape(shape), new, old)

    def step(carry):
        goes_on, old = carry
        kept = [select(goes_on, *pair) for pair in zip(body(old), old, strict=True)]
        return predicate(kept), kept

    init = [*map(jnp.asarray, init)]
    return lax.while_loop(lambda c: jnp.any(c[0]), step, (predicate(init), init))[1]


def _is_batched_loop(eqn: Any) -> bool:
    """Whether this is a while loop with operators, and with several predicates."""
    if eqn.primitive.name != "while" or not eqn.params["cond_jaxpr"].out_avals[0].shape:
        return False
    inside = names(eqn.params["cond_jaxpr"]) | names(eqn.params["body_jaxpr"])
    return any(name.startswith("drjax_") for name in inside)


def _with_one_predicate(eqn: Any, info: Any) -> ClosedJaxpr:
    a, b = operand_bounds(eqn)
    predicate = jaxpr_as_fun(eqn.params["cond_jaxpr"])
    body = jaxpr_as_fun(eqn.params["body_jaxpr"])

    def run(*args):
        return while_any(
            lambda carry: predicate(*args[:a], *carry)[0],
            lambda carry: body(*args[a:b], *carry),
            [*args[b:]],
        )

    jaxpr, consts = trace(run, [v.aval for v in eqn.invars], info)
    assert not consts, consts
    return jaxpr


def straighten(jaxpr: Any, left: Collection[str] = ()) -> Straight:
    """Inlines the calls in a jaxpr, but for those `left`, and drops what is unused."""
    calls, newvar = _CALLS.difference(left), gensym()
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
            called = next((eqn.params[k] for k in _CALLED if k in eqn.params), None)
            if _is_batched_loop(eqn):
                called = _with_one_predicate(eqn, info)
                outs = inline(called, operands, own_source)
            elif eqn.primitive.name == "custom_linear_solve":
                called, operands = _solving(eqn, operands)
                outs = inline(called, operands, own_source)
            elif eqn.primitive.name in calls and called is not None:
                outs = inline(called, operands, own_source)
            else:
                outs = [newvar(v.aval) for v in eqn.outvars]
                eqns.append(
                    eqn.replace(invars=operands, outvars=outs, source_info=own_source)
                )
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in inner.outvars]

    template = getattr(jaxpr, "jaxpr", jaxpr)
    info = template.debug_info.with_unknown_names()
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
