"""map_p: a per-element function applied at a placement. Its type, value and batching.

    map[body](placed and shared operands) -> placed or summed results

`body` is the function of one element, a jaxpr without constants. A placed operand is
`[n, ...]`, and element `i` gets its row `i`; a shared operand, which is what the mapped
function closed over, goes to every element whole. A placed result is `[n, ...]`; a
summed result, which derivatives have, is the sum of what the elements return.

Every rule keeps the meaning per element; the derivatives are in `_map_derivatives.py`.
How it is compiled is free: shared operands stay unmapped under vmap, and a map may
carry another form of itself, see `Bulk`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, mapped_aval, unmapped_aval
from jax.interpreters import batching, mlir

from drjax import _compat, _convolutions, _mesh
from drjax._compat import ClosedJaxpr
from drjax._jaxprs import (
    as_fun,
    dce,
    debug_info,
    drop,
    equations,
    merge,
    pick,
    trace,
    where,
)

map_p = Primitive("drjax_map")
map_p.multiple_results = True
# In JAX 0.12 an operation of the body, as a searchsorted, may be one that JAX replaces
# before it lowers. It then does so in the body that our lowering traces.
map_p.is_high = lambda *_, **__: False


@dataclasses.dataclass(frozen=True)
class Bulk:
    """Some results of a map as a jaxpr over many elements at once, see `make_bulk`.

    Only evaluation reads it; `body` alone says what the map means. The transpose of a
    map has one, since the sum of m per-element cotangents of a shared matrix is m outer
    products and a sum, where the transpose of the vmapped body contracts at once.

    Its placed values are `[m, ...]`, of the m elements in one shard (`_mesh.per_shard`;
    all n without a mesh), so that what the shards contribute to a sum is summed at each
    first, and between them once. Axis 0 is not sharded in their types.
    """

    jaxpr: ClosedJaxpr
    operands: tuple[int, ...]  # The map's operands that are the jaxpr's inputs.
    results: tuple[int, ...]  # The map's results that are the jaxpr's outputs.

    def __repr__(self) -> str:  # Keeps a printed jaxpr readable.
        return f"<{len(self.results)} results>"

    def restrict(
        self, results: Sequence[int], operands: Sequence[int]
    ) -> "Bulk | None":
        """The form for a map of which only some results and operands are left.

        None if that needs an operand which is gone, or computes nothing.
        """
        kept = [r in results for r in self.results]
        jaxpr, used = dce(self.jaxpr, kept)
        needed = pick(self.operands, used)
        if not any(kept) or not set(needed) <= set(operands):
            return None
        return Bulk(
            jaxpr,
            tuple(operands.index(i) for i in needed),
            tuple(results.index(r) for r in pick(self.results, kept)),
        )


def whole(avals: Sequence[Any], placed: Sequence[bool], m: int) -> list[Any]:
    """The types of a bulk form's values, given those of one element."""
    return [
        unmapped_aval(m, 0, aval) if p else aval
        for aval, p in zip(avals, placed, strict=True)
    ]


def make_bulk(
    jaxpr: ClosedJaxpr, consts: Sequence[Any], operands: Any, results: Any
) -> Bulk | None:
    """A bulk form, if it may be one: it closes over nothing and has no effects."""
    if consts or jaxpr.effects:
        return None
    return Bulk(jaxpr, tuple(operands), tuple(results))


def bind(
    operands: Sequence[Any],
    consts: Sequence[Any],
    *,
    in_placed: Sequence[bool],
    out_placed: Sequence[bool],
    **params: Any,
) -> list[Any]:
    """Binds `map_p`; `consts`, what tracing the body closed over, are shared."""
    return map_p.bind(
        *operands,
        *consts,
        in_placed=(*in_placed, *(False for _ in consts)),
        out_placed=tuple(out_placed),
        **params,
    )


#
# Value and type.
#
def _run(*args, body, in_placed, out_placed, placement, n, mesh, name, bulk, matmuls):
    if matmuls:  # Only here: what derives from a map has its convolutions.
        body = _convolutions.of_elements(body)
        if bulk is not None:
            m = _mesh.per_shard(placement, n, mesh)
            of_many = _convolutions.of_many(bulk.jaxpr, m)
            bulk = dataclasses.replace(bulk, jaxpr=of_many)
    with jax.named_scope(name):
        return evaluate(body, bulk, in_placed, out_placed, n, placement, mesh)(*args)


def evaluate(body, bulk, in_placed, out_placed, n, placement: Any = None, mesh=None):
    """The function of whole arrays that a map computes.

    The body under vmap and a sum for each summed result, or its bulk form. Placed
    arguments and results are sharded over the placement.
    """

    def shard(xs, placed):
        return [
            _mesh.shard_placed(x, placement, mesh) if p else x
            for x, p in zip(xs, placed, strict=True)
        ]

    in_bulk = [bulk is not None and i in bulk.results for i in range(len(out_placed))]
    rest = body
    if bulk is not None:
        rest, _ = dce(body, [not b for b in in_bulk], keep_inputs=True)
    rest_placed = drop(out_placed, in_bulk)

    def run(*args):
        args = shard(args, in_placed)
        from_bulk, outs = [], []
        if bulk is not None:
            computed = _run_bulk(bulk, args, in_placed, out_placed, placement, mesh)
            results = sorted(zip(bulk.results, computed, strict=True))
            from_bulk = [out for _, out in results]
        if not all(in_bulk) or rest.effects:
            mapped = _vmap(rest, in_placed, n, placement, mesh)
            outs = _sum_unplaced(mapped(*args), rest_placed)
        return shard(merge(in_bulk, from_bulk, outs), out_placed)

    return run


def _run_bulk(bulk, args, in_placed, out_placed, placement, mesh):
    args = [args[i] for i in bulk.operands]
    shards = _mesh.shards(placement, mesh)
    if shards == 1 and not _mesh.is_explicit(mesh):
        return as_fun(bulk.jaxpr)(*args)
    in_placed = [in_placed[i] for i in bulk.operands]
    out_placed = [out_placed[i] for i in bulk.results]
    args = [
        _mesh.split(x, placement, mesh) if p else x
        for x, p in zip(args, in_placed, strict=True)
    ]
    outs = _vmap(bulk.jaxpr, in_placed, shards, placement, mesh)(*args)
    return [
        _mesh.join(x, placement, mesh) if p else x
        for x, p in zip(_sum_unplaced(outs, out_placed), out_placed, strict=True)
    ]


def _sum_unplaced(outs, placed):
    return [
        out if p else jnp.sum(out, axis=0).astype(out.dtype)
        for out, p in zip(outs, placed, strict=True)
    ]


def _vmap(jaxpr, in_placed, n, placement, mesh):
    in_axes = tuple(0 if placed else None for placed in in_placed)
    spmd = _mesh.is_auto(mesh) and not _has_partial_shard_map(jaxpr, placement)
    axis_name = placement if spmd else None
    return jax.vmap(as_fun(jaxpr), in_axes, axis_size=n, spmd_axis_name=axis_name)


def _has_partial_shard_map(body, placement):
    """Whether a shard_map in the body leaves the placement's axis alone.

    vmap refuses the name of that axis then, and without it keeps the axis sharded; at
    one over all axes it would gather without the name.
    """
    return any(
        placement not in eqn.params["newly_manual_axes"]
        for eqn in equations(body, "shard_map")
    )


def abstract_eval(*_, body, out_placed, placement, n, mesh, **__):
    """Types of the results, and effects."""
    avals = [
        _mesh.placed_aval(aval, placement, n, mesh) if placed else aval
        for aval, placed in zip(body.out_avals, out_placed, strict=True)
    ]
    return avals, body.effects


# Eagerly, in jax.grad without jax.jit say, the body's operations run one by one, as
# under a plain vmap. A jit of the whole would compile anew at each call, since each
# call traces a new body.
map_p.def_impl(_run)
map_p.def_effectful_abstract_eval(abstract_eval)
mlir.register_lowering(map_p, mlir.lower_fun(_run, multiple_results=True))


#
# Batching: vmap adds an axis to the elements, which stands behind the placement's.
#
def _batch(axis_data, args, dims, *, body, in_placed, out_placed, bulk, **params):
    params |= dict(in_placed=in_placed, out_placed=out_placed)
    batched = [dim is not None for dim in dims]
    if not any(batched) and not _has_name(axis_data):
        outs = map_p.bind(*args, body=body, bulk=bulk, **params)
        return outs, [None] * len(outs)

    in_axes = [1 if placed else 0 for placed in in_placed]
    out_axes = [1 if placed else 0 for placed in out_placed]
    args = [
        x if dim is None or dim == axis else jnp.moveaxis(x, dim, axis)
        for x, dim, axis in zip(args, dims, in_axes, strict=True)
    ]
    avals = [jax.typeof(x) for x in args]
    element_avals = [
        mapped_aval(aval.shape[0], 0, aval) if placed else aval
        for aval, placed in zip(avals, in_placed, strict=True)
    ]
    new_body, out_batched, consts = _batch_jaxpr(
        body, axis_data, batched, element_avals, [0] * len(args), [0] * len(out_axes)
    )
    new_bulk = None
    if bulk is not None:
        m = _mesh.per_shard(*(params[key] for key in ("placement", "n", "mesh")))
        jaxpr, bulk_out_batched, bulk_consts = _batch_jaxpr(
            bulk.jaxpr,
            axis_data,
            [batched[i] for i in bulk.operands],
            [whole(element_avals, in_placed, m)[i] for i in bulk.operands],
            [in_axes[i] for i in bulk.operands],
            [out_axes[i] for i in bulk.results],
        )
        if bulk_out_batched == [out_batched[i] for i in bulk.results]:
            new_bulk = make_bulk(jaxpr, bulk_consts, bulk.operands, bulk.results)
    outs = bind(args, consts, body=new_body, bulk=new_bulk, **params)
    return outs, [
        axis if b else None for axis, b in zip(out_axes, out_batched, strict=True)
    ]


def _has_name(axis_data) -> bool:
    """Whether a body may use the axis, in a psum say, though no operand has it."""
    return isinstance(axis_data.name, str)


def _batch_jaxpr(jaxpr, axis_data, batched, avals, in_axes, out_axes):
    """The vmap of a jaxpr, which of its outputs are batched, and its consts.

    An output that does not depend on a batched input stays as it is, for jacfwd and
    hessian rely on it. A first trace, which is dropped, finds those.
    """
    axes = zip(in_axes, batched, strict=True)
    in_axes = tuple(axis if b else None for axis, b in axes)
    out_batched: list[bool] = [False] * len(out_axes)
    if not any(batched) and not _has_name(axis_data):
        return jaxpr, out_batched, []
    vmap = functools.partial(
        jax.vmap,
        axis_size=axis_data.size,
        axis_name=axis_data.name,
        spmd_axis_name=axis_data.spmd_name,
    )

    def probe(*args):
        outs = as_fun(jaxpr)(*args)
        # Under vmap, an output that no batched input reaches is no tracer of that vmap,
        # or one without a batch axis.
        out_batched[:] = [getattr(out, "batch_dim", None) is not None for out in outs]
        return []

    info = debug_info(jaxpr)
    trace(vmap(probe, in_axes), avals, info)
    axes = zip(out_axes, out_batched, strict=True)
    new_out_axes = [axis if b else None for axis, b in axes]
    new_fun = vmap(as_fun(jaxpr), in_axes, new_out_axes)
    new_jaxpr, consts = trace(new_fun, avals, info)
    return new_jaxpr, out_batched, consts


batching.fancy_primitive_batchers[map_p] = _batch


#
# Dead code: unused results, and operands that only they needed.
#
def _dce_eqn(used_results, eqn):
    if not any(used_results) and not eqn.effects:
        return [False] * len(eqn.invars), None
    params = eqn.params
    body, used_operands = dce(params["body"], used_results)
    bulk = params["bulk"]
    new_params = dict(
        params,
        body=body,
        in_placed=tuple(pick(params["in_placed"], used_operands)),
        out_placed=tuple(pick(params["out_placed"], used_results)),
        bulk=bulk and bulk.restrict(where(used_results), where(used_operands)),
    )
    new_eqn = eqn.replace(
        invars=pick(eqn.invars, used_operands),
        outvars=pick(eqn.outvars, used_results),
        params=new_params,
        effects=body.effects,
    )
    return list(used_operands), new_eqn


_compat.register_dce_rule(map_p, _dce_eqn)
