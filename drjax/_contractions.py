"""Sums over the elements of per-element contractions, as contractions over them too.

The cotangent of a shared matrix is a sum over elements, r = sum_i S(a_i, b_i), where S
ends a body: matmuls or convolutions, then sums and changes of their form. As S is
linear in b, with A(w)_i = S(a_i, .)^T w,

    <w, sum_i S(a_i, b_i)> = sum_i <S(a_i, .)^T w, b_i> = <A(w), b>, so r = A^T(b).

A is a vmap with w unmapped, and its transpose by JAX contracts over i at once, where
the sum of S(a_i, b_i) would be n outer products.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Var
from jax.interpreters import ad

from drjax import _convolutions, _mesh
from drjax._compat import ClosedJaxpr
from drjax._jaxprs import as_fun, cached_by_jaxpr, debug_info, is_in, struct, trace
from drjax._map import Bulk, evaluate, make_bulk

_LINEAR = {
    lax.broadcast_in_dim_p,
    lax.convert_element_type_p,
    lax.neg_p,
    lax.reduce_sum_p,
    lax.reshape_p,
    lax.squeeze_p,
    lax.transpose_p,
}
_SUM = ad.add_jaxvals_p
_BILINEAR = {lax.conv_general_dilated_p, lax.dot_general_p}


class _Ending(NamedTuple):
    """How a body computes an output, from its last contractions on."""

    a: list[Var]
    b: list[Var]
    jaxpr: ClosedJaxpr  # S: (*a, *b) -> output


@cached_by_jaxpr
def contraction_bulk(
    body: ClosedJaxpr,
    in_placed: tuple[bool, ...],
    out_placed: tuple[bool, ...],
    placement: str,
    n: int,
    mesh: _mesh.Mesh | None,
) -> Bulk | None:
    """The bulk form of those summed results of a map that end with contractions."""
    endings = {
        i: ending
        for i, placed in enumerate(out_placed)
        if not placed and (ending := _ending(body, body.jaxpr.outvars[i]))
    }
    if not endings or body.effects or _convolutions.refused(body, mesh):
        return None
    operands = [v for ending in endings.values() for v in (*ending.a, *ending.b)]
    before = ClosedJaxpr(body.jaxpr.replace(outvars=operands), ())
    all_placed = [True] * len(operands)
    run = evaluate(before, None, in_placed, all_placed, placement, n, mesh)

    def fun(*args: Any) -> list[Any]:
        value_of = dict(zip(operands, run(*args), strict=True))
        return [
            _sum(e.jaxpr, [value_of[v] for v in e.a], [value_of[v] for v in e.b])
            for e in endings.values()
        ]

    avals = [
        _mesh.placed_aval(aval, placement, n, mesh) if placed else aval
        for aval, placed in zip(body.in_avals, in_placed, strict=True)
    ]
    return make_bulk(*trace(fun, avals, debug_info(body)), range(len(avals)), endings)


def _ending(body: ClosedJaxpr, out: Any) -> _Ending | None:
    producer = {v: eqn for eqn in body.jaxpr.eqns for v in eqn.outvars}
    needed: set[Any] = set()
    a: dict[Any, None] = {}  # Ordered sets.
    b: dict[Any, None] = {}
    todo = [out]
    while todo:
        v = todo.pop()
        if not is_in(v, producer):
            return None
        needed.add(v)
        eqn = producer[v]
        if not all(isinstance(v, Var) for v in eqn.invars):
            return None
        if eqn.primitive in _BILINEAR:
            a[eqn.invars[0]], b[eqn.invars[1]] = None, None
        elif eqn.primitive in _LINEAR:
            todo.append(eqn.invars[0])
        elif eqn.primitive is _SUM:
            todo += eqn.invars
        else:
            return None
    if {*a} & {*b} or needed & {*a, *b}:
        return None
    eqns = [eqn for eqn in body.jaxpr.eqns if needed & {*eqn.outvars}]
    jaxpr = body.jaxpr.replace(constvars=[], invars=[*a, *b], outvars=[out], eqns=eqns)
    return _Ending([*a], [*b], ClosedJaxpr(jaxpr, ()))


def _sum(s: ClosedJaxpr, a: list[Any], b: list[Any]) -> Any:
    """The sum over i of `s(*a[i], *b[i])`."""
    b_structs = [struct(aval) for aval in s.in_avals[len(a) :]]

    def adjoint(a, w):
        def of_b(*b):
            return as_fun(s)(*a, *b)[0]

        return jax.linear_transpose(of_b, *b_structs)(w)

    whole = jax.vmap(adjoint, (0, None))
    out_struct = struct(s.out_avals[0])
    return jax.linear_transpose(lambda w: whole(a, w), out_struct)(tuple(b))[0]
