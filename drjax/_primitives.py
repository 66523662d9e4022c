"""The primitives that move values between the server and a placement.

Each section is one primitive: its lowering, type, derivative and batching, then the
registration. The placement and its size `n` are parameters, so a reader of a jaxpr
asks `eqn.primitive is broadcast_p`. `map_p` has a room of its own, `_map.py`.

The two linear primitives are each other's transposes, so the derivative of a program
is made of the same primitives:

    broadcast : x -> (x, ..., x)                 broadcast^T  = reduce_sum
    reduce_sum: (x_1, ..., x_n) -> sum_i x_i     reduce_sum^T = broadcast

References:
  Rush et al., Federated Automatic Differentiation, arXiv:2301.07806.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive, mapped_aval
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drjax import _mesh

_PARAMETERS = ("placement", "n", "mesh")


def _register(primitive: Primitive, run: Any, abstract_eval: Any) -> None:
    # The eager implementation is a jit, cached by shape and parameters.
    primitive.def_impl(jax.jit(run, static_argnames=_PARAMETERS))
    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))


#
# broadcast_p: [...] -> [n, ...]. Linear; its transpose is reduce_sum_p.
#
broadcast_p = Primitive("drjax_broadcast")


def _broadcast_run(x, *, placement, n, mesh):
    shape = (n, *jnp.shape(x))
    if _mesh.is_explicit(mesh):
        spec = P(placement, *jax.typeof(x).sharding.spec)
        return jnp.broadcast_to(x, shape, out_sharding=NamedSharding(mesh, spec))
    return _mesh.shard_placed(jnp.broadcast_to(x, shape), placement, mesh)


def _broadcast_abstract_eval(x, *, placement, n, mesh):
    return _mesh.placed_aval(x, placement, n, mesh)


def _broadcast_transpose(ct, x, **params):
    return (reduce_sum_p.bind(ct, **params),)


def _broadcast_batch(args, dims, **params):
    return broadcast_p.bind(*args, **params), dims[0] + 1


_register(broadcast_p, _broadcast_run, _broadcast_abstract_eval)
ad.deflinear2(broadcast_p, _broadcast_transpose)
batching.primitive_batchers[broadcast_p] = _broadcast_batch


def _reduce_abstract_eval(x, *, placement, n, mesh):
    return mapped_aval(n, 0, x)


def _reduce_batch(primitive, args, dims, **params):
    (x,), (dim,) = args, dims
    if dim == 0:  # The placement's axis comes first.
        x, dim = jnp.moveaxis(x, 0, 1), 1
    return primitive.bind(x, **params), dim - 1


#
# reduce_sum_p: [n, ...] -> [...]. Linear; its transpose is broadcast_p. Keeps the
# dtype: the operator widens it first where jnp.sum would.
#
reduce_sum_p = Primitive("drjax_reduce_sum")


def _reduce_sum_run(x, *, placement, n, mesh):
    # Without dtype=, halves are summed in float32.
    return jnp.sum(x, axis=0).astype(x.dtype)


def _reduce_sum_transpose(ct, x, **params):
    return (broadcast_p.bind(ct, **params),)


_register(reduce_sum_p, _reduce_sum_run, _reduce_abstract_eval)
ad.deflinear2(reduce_sum_p, _reduce_sum_transpose)
batching.primitive_batchers[reduce_sum_p] = functools.partial(
    _reduce_batch, reduce_sum_p
)


#
# reduce_max_p, reduce_min_p: [n, ...] -> [...]. With m = max_j x_j, the winners
# w_i = [x_i == m] and their number c = sum_i w_i, the derivative shares ties equally,
# as jnp.max does:
#
#     dm = sum_i (w_i / c) dx_i = reduce_sum(w * dx) / reduce_sum(w)
#
reduce_max_p = Primitive("drjax_reduce_max")
reduce_min_p = Primitive("drjax_reduce_min")


def _reduce_max_run(x, *, placement, n, mesh):
    return jnp.max(x, axis=0)


def _reduce_min_run(x, *, placement, n, mesh):
    return jnp.min(x, axis=0)


def _reduce_extremum_jvp(primitive, primals, tangents, **params):
    (x,), (dx,) = primals, tangents
    m = primitive.bind(x, **params)
    w = (x == broadcast_p.bind(m, **params)).astype(dx.dtype)
    c = reduce_sum_p.bind(w, **params)
    return m, reduce_sum_p.bind(w * dx, **params) / c


for _primitive, _run in (
    (reduce_max_p, _reduce_max_run),
    (reduce_min_p, _reduce_min_run),
):
    _register(_primitive, _run, _reduce_abstract_eval)
    ad.primitive_jvps[_primitive] = functools.partial(_reduce_extremum_jvp, _primitive)
    batching.primitive_batchers[_primitive] = functools.partial(
        _reduce_batch, _primitive
    )


#
# placement_size_p: [] -> int32 []. A constant; an engine in which elements drop out
# substitutes the number that took part.
#
placement_size_p = Primitive("drjax_placement_size")


def _placement_size_run(*, placement, n, mesh):
    return jnp.int32(n)


def _placement_size_abstract_eval(*, placement, n, mesh):
    return ShapedArray((), jnp.dtype("int32"))


_register(placement_size_p, _placement_size_run, _placement_size_abstract_eval)


#
# placement_index_p: [] -> int32 [n], element i holding i. A constant; it lets each
# element know itself without a literal of size n.
#
placement_index_p = Primitive("drjax_placement_index")


def _placement_index_run(*, placement, n, mesh):
    return _mesh.shard_placed(jnp.arange(n, dtype="int32"), placement, mesh)


def _placement_index_abstract_eval(*, placement, n, mesh):
    element = ShapedArray((), jnp.dtype("int32"))
    return _mesh.placed_aval(element, placement, n, mesh)


_register(placement_index_p, _placement_index_run, _placement_index_abstract_eval)
