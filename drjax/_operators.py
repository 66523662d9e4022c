"""The operators: what a program is written with.

Each checks its input, so that a mistake is an error that says what to do, and binds
primitives. Called eagerly, a whole operator is one compiled call; under a trace, just
its primitives are left.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.api_util import debug_info
from jax.extend.core import mapped_aval
from jax.sharding import PartitionSpec as P

from drjax import _compat, _map, _mesh, _program
from drjax import _map_derivatives as _map_derivatives  # Registers map_p's rules.
from drjax._encoded_sum import encoded_sum
from drjax._encodings import Encoding
from drjax._jaxprs import is_eager, trace, unique
from drjax._primitives import (
    broadcast_p,
    placement_index_p,
    placement_size_p,
    reduce_max_p,
    reduce_min_p,
    reduce_sum_p,
)


class _Site(NamedTuple):
    """What every primitive of an operator is told: its parameters."""

    placement: str
    n: int
    mesh: _mesh.Mesh | None


def broadcast(
    x: Any, *, placement: str | None = None, mesh: _mesh.Mesh | None = None
) -> Any:
    """Sends a server value to every element of a placement.

    `n` is the size of the placement.

    Args:
      x: pytree of arrays, each `[...]`.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh to shard over; by default the one `jax.set_mesh`
        installed.

    Returns:
      Pytree of arrays, each `[n, ...]` with `n` equal rows, dtypes kept, sharded over
      the mesh axis called like the placement, if there is one.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if the placement is unknown or ambiguous, or does not fit the mesh.
      TypeError: if a leaf is not an array.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def to_clients(x):
      ...     return drjax.broadcast(x)
      >>> to_clients(jnp.array([1.0, 2.0])).shape
      (3, 2)

    References:
      Rush et al., DrJAX, arXiv:2403.07128.
    """
    site = _resolve("broadcast", placement, mesh)
    x = _arrays("broadcast", x, site, numeric=False)
    return _show_mesh(_bind_leaves(broadcast_p, site, x), site)


def map_fn(
    fn: Callable[..., Any],
    arg: Any,
    *,
    placement: str | None = None,
    mesh: _mesh.Mesh | None = None,
) -> Any:
    """Applies a function to every element of a placement.

    `fn` may close over server values: they reach every element whole, and `map_fn`
    differentiates with respect to them. It may run any JAX code. `n` is the size of
    the placement.

    Args:
      fn: function of one element: from pytrees of arrays `[...]` to a pytree of
        arrays `[...]`.
      arg: placed pytree, its leaves `[n, ...]`. A tuple is unpacked into the
        arguments of `fn`.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh to shard over; by default the one `jax.set_mesh`
        installed.

    Returns:
      What `fn` returns, with a leading axis `n` on every leaf, sharded over the mesh
      axis called like the placement, if there is one.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if a leaf of `arg` has no leading axis of size `n`, or the placement
        is unknown, ambiguous, or does not fit the mesh.
      TypeError: if `fn` is not callable, or a leaf of `arg` or of what `fn` returns is
        not an array.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def products(x, y):
      ...     return drjax.map_fn(lambda a, b: a * b, (x, y))
      >>> print(products(jnp.arange(3.0), jnp.arange(3.0)))
      [0. 1. 4.]

    References:
      Rush et al., DrJAX, arXiv:2403.07128.
    """
    found = _program.resolve("map_fn", placement)
    site = _site("map_fn", found, mesh)
    if not callable(fn):
        raise TypeError(
            f"drjax.map_fn over {site.placement!r}: its first argument is the "
            f"function to map, but got {fn!r}."
        )
    arg = _placed("map_fn", arg, site)
    args = arg if isinstance(arg, tuple) else (arg,)

    def checked_fn(*args: Any) -> Any:
        return _results(fn(*args), site)

    if site.mesh is None and is_eager():
        # Nobody reads a jaxpr here, so none is traced: a plain vmap does the same.
        with _program.mapped_scope(site.placement):
            return jax.vmap(checked_fn, axis_size=site.n)(*args)
    flat, in_tree = jax.tree.flatten(args)

    out_trees: list[Any] = []

    def flat_fn(*elements: Any) -> list[Any]:
        out = checked_fn(*jax.tree.unflatten(in_tree, elements))
        leaves, out_tree = jax.tree.flatten(out)
        out_trees.append(out_tree)
        return leaves

    elements = [mapped_aval(site.n, 0, jax.typeof(x)) for x in flat]
    info = debug_info("drjax.map_fn", fn, args, {})
    with _program.mapped_scope(site.placement):
        body, consts = _mesh.in_element(
            lambda: trace(flat_fn, elements, info), **site._asdict()
        )
    outs = _map.bind(
        flat,
        consts,
        body=unique(body),
        in_placed=[True] * len(flat),
        out_placed=[True] * len(body.out_avals),
        name=_name(fn),
        bulk=None,
        matmuls=found.convolutions_as_matmuls,
        **site._asdict(),
    )
    return _show_mesh(jax.tree.unflatten(out_trees[-1], outs), site)


def reduce_sum(
    x: Any,
    *,
    encoding: Encoding | None = None,
    key: Any = None,
    out_sharding: Any = None,
    placement: str | None = None,
    mesh: _mesh.Mesh | None = None,
) -> Any:
    """Sums a placed value over its placement.

    `n` is the size of the placement.

    Args:
      x: placed pytree, its leaves `[n, ...]`.
      encoding: what floats are sent as, a `BFloat16` or an `Int8`; None for as they
        are. Derivatives are those of the exact sums, and are not encoded.
      key: of what an encoding draws; it folds in the position of an element of this
        placement. A mapped function is to have a key for each element.
      out_sharding: a `jax.sharding.PartitionSpec`, or a pytree of them that is a prefix
        of `x`: how the results are sharded over a mesh. With the placement's axis in
        it they are reduced and scattered. None for what XLA takes. `Int8` has to be
        told, if the mesh has other axes.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh that `x` is sharded over; by default the one
        `jax.set_mesh` installed.

    Returns:
      Pytree of arrays, each `[...]`, dtypes as `jnp.sum` gives them.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if a leaf has no leading axis of size `n`, or the placement is
        unknown, ambiguous, or does not fit the mesh; or an encoding lacks what it
        has to be told.
      TypeError: if a leaf is not an array of numbers, or `encoding`, `key` or
        `out_sharding` is not what it is to be.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def total(x):
      ...     return drjax.reduce_sum(x)
      >>> print(total({"count": jnp.array([1, 2, 3])}))
      {'count': Array(6, dtype=int32)}

    References:
      Rush et al., DrJAX, arXiv:2403.07128.
    """
    site = _resolve("reduce_sum", placement, mesh)
    x = _placed("reduce_sum", x, site, numeric=True)
    sent, key = _sent("reduce_sum", x, None, encoding, key, out_sharding, site, mesh)
    return _reduce_sum(site, sent, x, key)


def reduce_mean(
    x: Any,
    *,
    encoding: Encoding | None = None,
    key: Any = None,
    out_sharding: Any = None,
    placement: str | None = None,
    mesh: _mesh.Mesh | None = None,
) -> Any:
    """Averages a placed value over its placement.

    It is `reduce_sum` divided by `placement_size`, so an engine in which elements
    drop out divides by the number that took part, in derivatives too. Integers and
    half-precision floats are converted before they are summed, as in `jnp.mean`.
    `n` is the size of the placement.

    Args:
      x: placed pytree, its leaves `[n, ...]`.
      encoding: what floats are sent as, a `BFloat16` or an `Int8`; None for as they
        are. Derivatives are those of the exact sums, and are not encoded.
      key: of what an encoding draws; it folds in the position of an element of this
        placement. A mapped function is to have a key for each element.
      out_sharding: a `jax.sharding.PartitionSpec`, or a pytree of them that is a prefix
        of `x`: how the results are sharded over a mesh. With the placement's axis in
        it they are reduced and scattered. None for what XLA takes. `Int8` has to be
        told, if the mesh has other axes.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh that `x` is sharded over; by default the one
        `jax.set_mesh` installed.

    Returns:
      Pytree of arrays, each `[...]`, dtypes as `jnp.mean` gives them.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if a leaf has no leading axis of size `n`, or the placement is
        unknown, ambiguous, or does not fit the mesh; or an encoding lacks what it
        has to be told.
      TypeError: if a leaf is not an array of numbers, or `encoding`, `key` or
        `out_sharding` is not what it is to be.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def average(x):
      ...     return drjax.reduce_mean(x)
      >>> print(average(jnp.array([1, 2, 6])))
      3.0

    References:
      Rush et al., DrJAX, arXiv:2403.07128.
    """
    site = _resolve("reduce_mean", placement, mesh)
    x = _placed("reduce_mean", x, site, numeric=True)
    sent, key = _sent("reduce_mean", x, None, encoding, key, out_sharding, site, mesh)
    return _reduce_mean(site, sent, x, key)


def reduce_weighted_mean(
    x: Any,
    w: Any,
    *,
    default: Any = None,
    encoding: Encoding | None = None,
    key: Any = None,
    out_sharding: Any = None,
    placement: str | None = None,
    mesh: _mesh.Mesh | None = None,
) -> Any:
    """Averages a placed value over its placement, with weights.

    It is two sums, of `w * x` and of `w`. `n` is the size of the placement.

    Args:
      x: placed pytree, its leaves `[n, ...]`.
      w: placed weights: an array `[n]` for the whole of `x`, or a pytree that is a
        prefix of `x`. An element's weight must broadcast to the shape of its value.
      default: what to return where the total weight is zero: a scalar, or a pytree
        that is a prefix of `x`. The gradient is zero there. Without it, the result is
        NaN there, as with `jnp.average`.
      encoding: what floats are sent as, a `BFloat16` or an `Int8`; None for as they
        are. Weights are sent as they are. Derivatives are those of the exact sums, and
        are not encoded.
      key: of what an encoding draws; it folds in the position of an element of this
        placement. A mapped function is to have a key for each element.
      out_sharding: a `jax.sharding.PartitionSpec`, or a pytree of them that is a prefix
        of `x`: how the results are sharded over a mesh. With the placement's axis in
        it they are reduced and scattered. None for what XLA takes. `Int8` has to be
        told, if the mesh has other axes.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh that `x` is sharded over; by default the one
        `jax.set_mesh` installed.

    Returns:
      Pytree of arrays, each `[...]`, dtypes as `jnp.average` gives them.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if a leaf has no leading axis of size `n`, `w` does not fit `x`, or
        the placement is unknown, ambiguous, or does not fit the mesh; or an
        encoding lacks what it has to be told.
      TypeError: if a leaf is not an array of numbers, or `encoding`, `key` or
        `out_sharding` is not what it is to be.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def average(x, examples):
      ...     return drjax.reduce_weighted_mean(x, examples)
      >>> print(average(jnp.array([1.0, 2.0, 5.0]), jnp.array([2, 1, 1])))
      2.25

    References:
      Rush et al., DrJAX, arXiv:2403.07128.
    """
    site = _resolve("reduce_weighted_mean", placement, mesh)
    x = _placed("reduce_weighted_mean", x, site, numeric=True)
    w = _placed("reduce_weighted_mean", w, site, numeric=True, what="`w`")
    xs, tree = jax.tree.flatten(x)
    defaults: list[Any] = [None] * len(xs)
    weight_leaves = _prefix_leaves("w", w, x, site)
    _check_weights(weight_leaves, x, site)
    weights = list({id(leaf): leaf for leaf in weight_leaves}.values())
    ids = [id(leaf) for leaf in weights]
    if default is not None:
        default = _arrays("reduce_weighted_mean", default, site, numeric=True)
        defaults = _prefix_leaves("default", default, x, site)
        _check_defaults(defaults, x, site)
    weight_of = tuple(ids.index(id(leaf)) for leaf in weight_leaves)
    pairs = zip(weight_leaves, xs, strict=True)
    dtypes = [jnp.promote_types(w.dtype, x.dtype) for w, x in pairs]
    sent, key = _sent(
        "reduce_weighted_mean", x, dtypes, encoding, key, out_sharding, site, mesh
    )
    means = _reduce_weighted_mean(site, sent, weight_of, xs, weights, defaults, key)
    return jax.tree.unflatten(tree, means)


def reduce_max(
    x: Any, *, placement: str | None = None, mesh: _mesh.Mesh | None = None
) -> Any:
    """Takes the elementwise maximum of a placed value over its placement.

    The derivative goes to the elements that attain it, in equal shares, as with
    `jnp.max`. `n` is the size of the placement.

    Args:
      x: placed pytree, its leaves `[n, ...]`.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh that `x` is sharded over; by default the one
        `jax.set_mesh` installed.

    Returns:
      Pytree of arrays, each `[...]`, dtypes kept.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if a leaf has no leading axis of size `n`, or the placement is
        unknown, ambiguous, or does not fit the mesh.
      TypeError: if a leaf is not an array of numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def largest(x):
      ...     return drjax.reduce_max(x)
      >>> print(largest(jnp.array([1, 5, 2])))
      5
    """
    site = _resolve("reduce_max", placement, mesh)
    x = _placed("reduce_max", x, site, numeric=True)
    return _bind_leaves(reduce_max_p, site, x)


def reduce_min(
    x: Any, *, placement: str | None = None, mesh: _mesh.Mesh | None = None
) -> Any:
    """Takes the elementwise minimum of a placed value over its placement.

    The derivative goes to the elements that attain it, in equal shares, as with
    `jnp.min`. `n` is the size of the placement.

    Args:
      x: placed pytree, its leaves `[n, ...]`.
      placement: which placement; only needed if the program has several.
      mesh: the device mesh that `x` is sharded over; by default the one
        `jax.set_mesh` installed.

    Returns:
      Pytree of arrays, each `[...]`, dtypes kept.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if a leaf has no leading axis of size `n`, or the placement is
        unknown, ambiguous, or does not fit the mesh.
      TypeError: if a leaf is not an array of numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def smallest(x):
      ...     return drjax.reduce_min(x)
      >>> print(smallest(jnp.array([1, 5, 2])))
      1
    """
    site = _resolve("reduce_min", placement, mesh)
    x = _placed("reduce_min", x, site, numeric=True)
    return _bind_leaves(reduce_min_p, site, x)


def placement_size(*, placement: str | None = None) -> jax.Array:
    """The number of elements `n` at a placement, as a server value.

    A traced constant: an engine in which elements drop out substitutes the number
    that took part. Where a shape needs it, use the Python number the program was
    declared with.

    Args:
      placement: which placement; only needed if the program has several.

    Returns:
      int32 array `[]`.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if the placement is unknown or ambiguous.

    Example:
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def size():
      ...     return drjax.placement_size()
      >>> print(size())
      3
    """
    site = _resolve("placement_size", placement, None)
    return _bind_constant(placement_size_p, site)


def placement_index(
    *, placement: str | None = None, mesh: _mesh.Mesh | None = None
) -> jax.Array:
    """Each element's own index at a placement, as a placed value.

    `n` is the size of the placement.

    Args:
      placement: which placement; only needed if the program has several.
      mesh: the device mesh to shard over; by default the one `jax.set_mesh`
        installed.

    Returns:
      int32 array `[n]`, element `i` holding `i`.

    Raises:
      OperatorUndefinedError: outside a program.
      ValueError: if the placement is unknown or ambiguous, or does not fit the mesh.

    Example:
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def index():
      ...     return drjax.placement_index()
      >>> print(index())
      [0 1 2]
    """
    site = _resolve("placement_index", placement, mesh)
    return _show_mesh(_bind_constant(placement_index_p, site), site)


#
# What the operators compute, on checked input.
#
@functools.partial(_compat.inlined_jit, static_argnums=(0, 1))
def _bind_leaves(primitive, site, tree):
    return jax.tree.map(lambda x: primitive.bind(x, **site._asdict()), tree)


@functools.partial(_compat.inlined_jit, static_argnums=(0, 1))
def _bind_constant(primitive, site):
    return primitive.bind(**site._asdict())


@functools.partial(_compat.inlined_jit, static_argnums=(0, 1))
def _reduce_sum(site, sent, tree, key):
    leaves, structure = jax.tree.flatten(tree)
    widened = [x.astype(_sum_dtype(x.dtype)) for x in leaves]
    return jax.tree.unflatten(structure, _sums(site, sent, widened, key))


@functools.partial(_compat.inlined_jit, static_argnums=(0, 1))
def _reduce_mean(site, sent, tree, key):
    leaves, structure = jax.tree.flatten(tree)
    dtypes = [_mean_dtypes(x.dtype) for x in leaves]
    pairs = zip(leaves, dtypes, strict=True)
    widened = [x.astype(compute) for x, (compute, _) in pairs]
    totals = _sums(site, sent, widened, key)
    means = []
    for total, (compute, result) in zip(totals, dtypes, strict=True):
        size = placement_size_p.bind(**site._asdict()).astype(compute)
        means.append((total / size).astype(result))
    return jax.tree.unflatten(structure, means)


@functools.partial(_compat.inlined_jit, static_argnums=(0, 1, 2))
def _reduce_weighted_mean(site, sent, weight_of, xs, weights, defaults, key):
    """Means of the arrays `xs`; array `i` has weights `weights[weight_of[i]]`."""

    @functools.cache  # One sum for each weight leaf.
    def total(i, dtype):
        return reduce_sum_p.bind(weights[i].astype(dtype), **site._asdict())

    def weighted(x, i):
        w = weights[i]
        compute, _ = _mean_dtypes(jnp.promote_types(w.dtype, x.dtype))
        # One element's weight broadcasts against its value, so from the right.
        w = w.reshape(w.shape[0], *[1] * (x.ndim - w.ndim), *w.shape[1:])
        return w.astype(compute) * x.astype(compute)

    def mean(x, weighted, i, default):
        compute, result = _mean_dtypes(jnp.promote_types(weights[i].dtype, x.dtype))
        sum_w = total(i, compute)
        if default is None:
            return (weighted / sum_w).astype(result)
        # Dividing by a safe number keeps 0 * nan out of the gradient as well.
        mean = weighted / jnp.where(sum_w == 0, 1, sum_w)
        return jnp.where(sum_w == 0, default, mean).astype(result)

    each = [*map(weighted, xs, weight_of)]
    return [*map(mean, xs, _sums(site, sent, each, key), weight_of, defaults)]


class _Sent(NamedTuple):
    """How the parts of sums are sent, and how the sums are sharded."""

    encoding: Encoding | None
    encoded: tuple[int, ...]  # The leaves it is for: floats.
    specs: tuple[Any, ...]  # Of each leaf; None for as XLA takes it.
    mesh: _mesh.Mesh | None  # What the specs are for, with the placement's axis or not.


def _sums(site: _Site, sent: _Sent, xs: Any, key: Any) -> list[Any]:
    encoding, ours = sent.encoding, sent.encoded
    sums: dict[int, Any] = {}
    if encoding is not None and ours:
        # Half floats have no room for the sums of what was rounded.
        wide = [xs[i].astype(_at_least_float32(xs[i].dtype)) for i in ours]
        # jit is to see the mesh: the primitive shows it when jit has chosen devices.
        wide = _show_mesh(wide, site)
        specs = tuple(sent.specs[i] for i in ours)
        if _mesh.is_explicit(site.mesh):
            own = [P(*jax.typeof(x).sharding.spec[1:]) for x in wide]
            pairs = zip(specs, own, strict=True)
            specs = tuple(b if a is None else a for a, b in pairs)
        key = key if encoding.takes_key else None
        found = encoded_sum(wide, key, encoding, specs, site._asdict())
        sums = {i: x.astype(xs[i].dtype) for i, x in zip(ours, found, strict=True)}
    for i, x in enumerate(xs):
        if i not in sums:
            sums[i] = reduce_sum_p.bind(x, **site._asdict())
    return [
        _mesh.constrained(sums[i], spec, sent.mesh) for i, spec in enumerate(sent.specs)
    ]


def _at_least_float32(dtype: Any) -> Any:
    return jnp.dtype("float32") if jnp.finfo(dtype).bits < 32 else dtype


def _sum_dtype(dtype: Any) -> Any:
    """The dtype of `jnp.sum`, which widens small integers and bool."""
    return jax.eval_shape(jnp.sum, jax.ShapeDtypeStruct((1,), dtype)).dtype


def _mean_dtypes(dtype: Any) -> tuple[Any, Any]:
    """The dtype in which to sum for a mean, and that of the mean, as in `jnp.mean`."""
    result = jax.eval_shape(jnp.mean, jax.ShapeDtypeStruct((1,), dtype)).dtype
    half = jnp.issubdtype(result, jnp.floating) and jnp.finfo(result).bits < 32
    return jnp.dtype("float32") if half else result, result


def _name(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__name__", None)
    return name if isinstance(name, str) else type(fn).__name__


def _show_mesh(placed: Any, site: _Site) -> Any:
    """Constrains a placed pytree to a concrete mesh, in sight of `jax.jit`.

    The primitives do so when they are lowered. By then jit has chosen its devices, from
    its arguments, `jax.set_mesh` and the constraints that it sees.
    """
    return _shard(placed, site) if isinstance(site.mesh, jax.sharding.Mesh) else placed


def _shard(placed: Any, site: _Site) -> Any:
    shard = functools.partial(
        _mesh.shard_placed, placement=site.placement, mesh=site.mesh
    )
    return jax.tree.map(shard, placed)


#
# Checks.
#
def _resolve(
    operator_name: str, placement: str | None, mesh: _mesh.Mesh | None
) -> _Site:
    return _site(operator_name, _program.resolve(operator_name, placement), mesh)


def _site(
    operator_name: str, found: _program.Placement, mesh: _mesh.Mesh | None
) -> _Site:
    return _Site(found.name, found.size, _mesh.resolve(operator_name, mesh, found))


def _sent(
    operator_name: str,
    x: Any,
    dtypes: Sequence[Any] | None,
    encoding: Any,
    key: Any,
    out_sharding: Any,
    site: _Site,
    mesh: _mesh.Mesh | None,
) -> tuple[_Sent, Any]:
    """Checks how values are to be sent; also returns the key, of the type for keys.

    `dtypes` are those of what is summed, if not of the leaves of `x`.
    """
    if encoding is None and key is None and out_sharding is None:
        return _Sent(None, (), (None,) * len(_leaves(x)), None), None
    over = f"drjax.{operator_name} over {site.placement!r}"
    if encoding is not None and not isinstance(encoding, Encoding):
        raise TypeError(
            f"{over}: `encoding` is to be a drjax.BFloat16 or drjax.Int8, but got "
            f"{encoding!r}."
        )
    if key is not None and not _is_key(key):
        raise TypeError(
            f"{over}: `key` is to be one key of the server, as jax.random.key makes "
            f"it, but got {key!r}."
        )
    if encoding is not None and encoding.takes_key and key is None:
        raise ValueError(
            f"{over}: {encoding} rounds at random, so it needs a key: pass `key`, a "
            "new one for each sum."
        )
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key))
    specs = _specs(over, x, out_sharding)
    dtypes = dtypes or [leaf.dtype for leaf in jax.tree.leaves(x)]
    floats = [i for i, t in enumerate(dtypes) if jnp.issubdtype(t, jnp.floating)]
    encoded = tuple(floats) if encoding is not None else ()
    mesh = site.mesh or mesh or jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _Sent(encoding, encoded, (None,) * len(specs), None), key
    for leaf, spec in zip(jax.tree.leaves(x), specs, strict=True):
        shape = leaf.shape[1:]
        if spec is not None and not _fits(spec, shape, mesh):
            raise ValueError(
                f"{over}: `out_sharding` {spec} does not fit a result of shape {shape} "
                f"on the mesh {dict(mesh.shape)}."
            )
    if encoding is not None and encoding.takes_key and _mesh.is_auto(site.mesh):
        _check_known(over, encoding, [specs[i] for i in encoded], site)
    return _Sent(encoding, encoded, specs, mesh), key


def _specs(over: str, x: Any, out_sharding: Any) -> tuple[Any, ...]:
    """For each leaf of `x` the PartitionSpec that stands for it."""
    try:
        specs = tuple(_mesh.specs_of_leaves(out_sharding, x))
    except ValueError as error:
        raise ValueError(
            f"{over}: `out_sharding` is one PartitionSpec, or a pytree of them that is "
            f"a prefix of the values, but got {out_sharding}."
        ) from error
    if not all(spec is None or isinstance(spec, P) for spec in specs):
        raise TypeError(
            f"{over}: `out_sharding` is to be a jax.sharding.PartitionSpec, or a "
            f"pytree of them, but got {out_sharding}."
        )
    return specs


def _check_known(over: str, encoding: Any, specs: list[Any], site: _Site) -> None:
    """Checks that it is known how other mesh axes shard what is cut into blocks."""
    assert site.mesh is not None
    apart = {site.placement, *_program.mapped_names()}
    others = {
        name: size
        for name, size in site.mesh.shape.items()
        if name not in apart and size > 1
    }
    known = [spec is not None and P.UNCONSTRAINED not in [*spec] for spec in specs]
    if others and not all(known):
        raise ValueError(
            f"{over}: {encoding} cuts arrays into blocks, and the mesh has other axes, "
            f"{others}, over which they may be sharded. Say how with `out_sharding`: "
            "PartitionSpec() for not at all."
        )


def _fits(spec: P, shape: tuple[int, ...], mesh: _mesh.Mesh) -> bool:
    of_each = _mesh.axes_of_each(spec)
    names = [name for axes in of_each for name in axes]
    if len(of_each) > len(shape) or len({*names} & {*mesh.shape}) < len(names):
        return False  # It has other names, or one twice.
    parts = [math.prod(mesh.shape[name] for name in axes) for axes in of_each]
    return not any(size % k for size, k in zip(shape, parts, strict=False))


def _is_key(key: Any) -> bool:
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError):
        return False
    return jnp.ndim(key) == 0 or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _leaves(tree: Any) -> list[Any]:
    return [tree] if isinstance(tree, jax.Array) else jax.tree.leaves(tree)


def _arrays(operator_name: str, tree: Any, site: _Site, *, numeric: bool) -> Any:
    """Checks that all leaves are arrays or numbers; makes JAX arrays of them."""
    over = f"drjax.{operator_name} over {site.placement!r}"
    all_jax = True
    for leaf in _leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.dtype, np.dtype):
            continue
        dtype = getattr(leaf, "dtype", None)
        if dtype == jax.dtypes.float0 and operator_name != "map_fn":
            raise TypeError(
                f"{over}: {_where(tree, leaf)} has dtype float0, the derivative of an "
                "integer, which is never more than zero. Leave it out."
            )
        if isinstance(dtype, np.dtype) and dtype.kind not in "OSUMm":
            all_jax = False
            continue
        if dtype is None and isinstance(leaf, int | float | complex):
            all_jax = False
            continue
        if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.extended):
            raise TypeError(
                f"{over}: every leaf must be an array, but {_where(tree, leaf)} is "
                f"{leaf!r} of type {type(leaf).__name__}. Leave it out, or close over "
                "it."
            )
        if numeric:
            raise TypeError(
                f"{over}: {_where(tree, leaf)} has dtype {dtype}, which cannot be "
                "reduced. Reduce the numbers that you derive from it."
            )
    return tree if all_jax else jax.tree.map(_as_jax, tree)


def _as_jax(leaf: Any) -> Any:
    is_float0 = getattr(leaf, "dtype", None) == jax.dtypes.float0
    return leaf if isinstance(leaf, jax.Array) or is_float0 else jnp.asarray(leaf)


def _placed(
    operator_name: str,
    tree: Any,
    site: _Site,
    *,
    numeric: bool = False,
    what: str = "the argument",
) -> Any:
    """Checks that all leaves are arrays with a leading axis `n`."""
    tree = _arrays(operator_name, tree, site, numeric=numeric)
    for leaf in _leaves(tree):
        shape = leaf.shape
        if not shape or shape[0] != site.n:
            raise ValueError(
                f"drjax.{operator_name} over {site.placement!r}: every leaf needs "
                f"leading axis {site.n}, but {_where(tree, leaf, what)} has shape "
                f"{shape}. If it is a server value, broadcast it first, or close over "
                "it; if it is placed, the program is declared with the wrong size "
                f"{site.n}."
            )
    if _mesh.is_explicit(site.mesh):  # There, the sharding is part of the type.
        return _shard(tree, site)
    if site.mesh is None and not jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(_mesh.without_shards, tree)
    return tree


def _results(tree: Any, site: _Site) -> Any:
    """Checks that all leaves of what a mapped function returns are arrays."""
    for leaf in _leaves(tree):
        try:
            jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"drjax.map_fn over {site.placement!r}: the mapped function must "
                f"return a pytree of arrays, but {_where(tree, leaf, 'its result')} is "
                f"{leaf!r} of type {type(leaf).__name__}."
            ) from None
    return tree


def _where(tree: Any, leaf: Any, what: str = "the argument") -> str:
    """Names a leaf by its path in the tree."""
    if leaf is tree:
        return what
    paths = jax.tree_util.tree_leaves_with_path(tree)
    path = next(path for path, other in paths if other is leaf)
    of = "" if what == "the argument" else f" of {what}"
    return f"leaf {jax.tree_util.keystr(path)}{of}"


def _prefix_leaves(name: str, prefix: Any, x: Any, site: _Site) -> list[Any]:
    """For each leaf of `x`, the leaf of `prefix` that stands for it."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(prefix, x))
    except ValueError as error:
        raise ValueError(
            f"drjax.reduce_weighted_mean over {site.placement!r}: {name!r} must be one "
            f"array, or a pytree that is a prefix of the values, but it has structure "
            f"{jax.tree.structure(prefix)} and the values {jax.tree.structure(x)}."
        ) from error


def _check_weights(weight_leaves: list[Any], x: Any, site: _Site) -> None:
    """Checks that each element's weight broadcasts to the shape of its value."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    for weight, (path, value) in zip(weight_leaves, leaves, strict=True):
        if not _broadcasts(np.shape(weight)[1:], np.shape(value)[1:]):
            raise ValueError(
                f"drjax.reduce_weighted_mean over {site.placement!r}: the weights of "
                f"leaf {jax.tree_util.keystr(path) or 'x'} have shape "
                f"{np.shape(weight)}, which does not broadcast to its shape "
                f"{np.shape(value)} element by element. One weight per element has "
                f"shape {np.shape(value)[:1]}. Or are values and weights swapped?"
            )


def _check_defaults(defaults: list[Any], x: Any, site: _Site) -> None:
    """Checks that each default broadcasts to the shape of its mean."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    for default, (path, value) in zip(defaults, leaves, strict=True):
        if not _broadcasts(np.shape(default), np.shape(value)[1:]):
            raise ValueError(
                f"drjax.reduce_weighted_mean over {site.placement!r}: the default of "
                f"leaf {jax.tree_util.keystr(path) or 'x'} has shape "
                f"{np.shape(default)}, which does not broadcast to its mean's, "
                f"{np.shape(value)[1:]}."
            )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
