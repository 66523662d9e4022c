"""encoded_sum_p: sums over a placement, of which what is sent is encoded.

    encoded_sum[encoding](x_1, ..., x_k, key) -> (sum_i rounded(x_1i), ...)

It is a call: `jaxpr` says what it computes, one rounding for each element and a
`reduce_sum`. A plan looks through it. Compiled over a mesh, the devices exchange
encoded values, which is the reason for a primitive of its own.

Its derivative is that of the exact sum, for roundings count as the identity.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.api_util import debug_info
from jax.core import ShapedArray
from jax.extend.core import Primitive, mapped_aval
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding

from drjax import _exchange, _map, _mesh
from drjax._encodings import Encoding, rounded_p
from drjax._jaxprs import as_fun, trace
from drjax._primitives import placement_index_p, reduce_sum_p

encoded_sum_p = Primitive("drjax_encoded_sum")
encoded_sum_p.multiple_results = True


def encoded_sum(
    xs: list[Any], key: Any, encoding: Encoding, specs: tuple[Any, ...], site: Any
) -> list[Any]:
    """The sums of arrays `[n, ...]`.

    Args:
      xs: the arrays.
      key: None for an encoding that takes none.
      encoding: of what is sent.
      specs: of each sum, how it is sharded; None if that is left to XLA.
      site: the operator's placement, n and mesh, by name.
    """
    args = [*xs] if key is None else [*xs, key]
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        # Inside a shard_map, whose types it takes as they are, XLA sends what it will.
        return _as_meant(encoding, *site.values(), *args)
    with _mesh.without_mesh():  # What it means is the same on every mesh.
        avals = tuple(ShapedArray(x.shape, x.dtype) for x in map(jax.typeof, args))
        jaxpr = _meaning(avals, encoding, site["placement"], site["n"])
    return encoded_sum_p.bind(
        *args, jaxpr=jaxpr, encoding=encoding, specs=specs, **site
    )


@functools.lru_cache(maxsize=256)
def _meaning(avals: tuple[Any, ...], encoding: Encoding, placement: str, n: int) -> Any:
    fn = functools.partial(_as_meant, encoding, placement, n, None)
    jaxpr, consts = trace(fn, avals, debug_info("drjax.reduce_sum", fn, avals, {}))
    assert not consts, consts
    return jaxpr


def _as_meant(
    encoding: Encoding, placement: str, n: int, mesh: Any, *args: Any
) -> list[Any]:
    """One rounding for each element, and sums."""
    site: Any = dict(placement=placement, n=n, mesh=mesh)
    k = len(args) - encoding.takes_key

    def element(index, *args):
        keys = [jax.random.fold_in(key, index) for key in args[k:]]
        return rounded_p.bind(*args[:k], *keys, encoding=encoding, batch=())

    index = ShapedArray((), jnp.dtype("int32"))
    elements = [mapped_aval(n, 0, jax.typeof(x)) for x in args[:k]]
    avals = [index, *elements, *map(jax.typeof, args[k:])]
    info = debug_info("drjax.reduce_sum", element, (index, *args), {})
    body, consts = _mesh.in_element(lambda: trace(element, avals, info), **site)
    rounded = _map.bind(
        [placement_index_p.bind(**site), *args],
        consts,
        body=body,
        in_placed=[True] * (1 + k) + [False] * (len(args) - k),
        out_placed=[True] * k,
        name="encode",
        bulk=None,
        matmuls=False,
        **site,
    )
    return [reduce_sum_p.bind(x, **site) for x in rounded]


def _abstract_eval(*avals: Any, jaxpr, encoding, specs, placement, n, mesh):
    results = []
    for aval, spec in zip(avals, specs, strict=False):  # There may be a key.
        summed = mapped_aval(n, 0, aval)
        if _mesh.is_explicit(mesh) and spec is not None:
            sharding: Any = NamedSharding(aval.sharding.mesh, spec)
            summed = summed.update(sharding=sharding)
        results.append(summed.update(weak_type=False))
    return results


def _run(*args, jaxpr, encoding, specs, placement, n, mesh):
    if mesh is None:
        return as_fun(jaxpr)(*args)
    key = args[-1] if encoding.takes_key else jnp.zeros(0)
    exchange = _exchange.Exchange(encoding, placement, n, mesh, specs)
    sums = _exchange.sums(exchange, args[: len(specs)], key)
    return [
        _mesh.constrained(x, spec, mesh) for x, spec in zip(sums, specs, strict=True)
    ]


def _jvp(primals, tangents, *, specs, placement, n, mesh, **params):
    site: Any = dict(placement=placement, n=n, mesh=mesh)
    sums = encoded_sum_p.bind(*primals, specs=specs, **site, **params)
    out_tangents = []
    for total, dx, spec in zip(sums, tangents, specs, strict=False):
        if isinstance(dx, ad.Zero):
            dy: Any = ad.Zero(jax.typeof(total).to_tangent_aval())
        else:
            dy = _mesh.constrained(reduce_sum_p.bind(dx, **site), spec, mesh)
        out_tangents.append(dy)
    return sums, out_tangents


def _batch(axis_data, args, dims, *, jaxpr, encoding, specs, placement, n, mesh):
    """The vmap of what it means: over a mesh, XLA then sends what it will."""
    if all(dim is None for dim in dims):
        site: Any = dict(placement=placement, n=n, mesh=mesh)
        params: Any = dict(jaxpr=jaxpr, encoding=encoding, specs=specs, **site)
        return encoded_sum_p.bind(*args, **params), [None] * len(specs)
    fn = functools.partial(_as_meant, encoding, placement, n, mesh)
    outs = jax.vmap(fn, tuple(dims), axis_size=axis_data.size)(*args)
    return outs, [0] * len(specs)


_PARAMS = "jaxpr", "encoding", "specs", "placement", "n", "mesh"
encoded_sum_p.def_impl(jax.jit(_run, static_argnames=_PARAMS))
encoded_sum_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(encoded_sum_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[encoded_sum_p] = _jvp
batching.fancy_primitive_batchers[encoded_sum_p] = _batch
