"""Sums over a mesh, of which what the devices send each other is encoded.

Each of the s shards of the placement's axis sums what its elements send.

As bfloat16 these sums are all-reduced, 2 bytes for each value instead of 4. A sum of
int8 is none, so it goes in two steps, as a ring's all-reduce does: every shard gets
its part of the blocks from all others (all-to-all), sums and encodes them, and gives
that to all (all-gather). Each step sends (s - 1) / s of a byte for each value, where
an all-reduce of float32 sends twice that of 4 bytes. A sum that is to be sharded over
the placement's axis needs the first step alone, as a reduce-scatter does.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drjax import _mesh
from drjax._encodings import BFloat16, Encoding, Int8, cut


class Exchange(NamedTuple):
    """How the sums are computed over a mesh.

    Args:
      encoding: of what is sent.
      placement, n, mesh: of the operator.
      specs: of each sum, how it is sharded; None if that is left to XLA.
    """

    encoding: Encoding
    placement: str
    n: int
    mesh: Any
    specs: tuple[Any, ...]


def sums(exchange: Exchange, xs: Sequence[Any], key: Any) -> list[Any]:
    """The sums of arrays `[n, ...]`, each sharded by its spec."""
    encoding, specs = exchange.encoding, exchange.specs
    if isinstance(encoding, BFloat16):
        pairs = zip(xs, specs, strict=True)
        return [_sum_bfloat16(exchange, encoding, x, spec) for x, spec in pairs]
    local = functools.partial(_sums_int8, exchange, encoding)
    return _in_shards(local, exchange, xs, specs, key)


def _in_shards(
    local: Any, exchange: Exchange, xs: Any, specs: Sequence[Any], key: Any
) -> list[Any]:
    """Calls what one shard does with its elements `[m, ...]`, and the key."""
    _, name, _, mesh, _ = exchange
    is_free = all(spec is None for spec in specs)
    axes = {name} if is_free else {*mesh.axis_names}
    others = [_without(name, spec) for spec in specs]
    ins = [P(name, *spec) for spec in others]
    if _mesh.is_explicit(mesh):
        xs = [
            jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(xs, ins, strict=True)
        ]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), *ins),
        out_specs=[
            other if _scattered(name, spec) is None else _without(None, spec)
            for other, spec in zip(others, specs, strict=True)
        ],
        axis_names=axes,
        check_vma=False,
    )(key, *xs)


def _without(name: str | None, spec: Any) -> P:
    """A spec without the placement's axis; what it leaves to XLA is whole."""
    kept = [
        tuple(axis for axis in axes if axis != name)
        for axes in _mesh.axes_of_each(spec)
    ]
    return P(*(axes or None for axes in kept))


def _scattered(name: str, spec: Any) -> int | None:
    """The axis of an array that shards have parts of.

    They have them of what other mesh axes leave there. So if the placement's axis is
    not the last of several, it is none: the sum is computed whole, and then cut.
    """
    last = [axes[-1:] for axes in _mesh.axes_of_each(spec)]
    return last.index((name,)) if (name,) in last else None


def _parts(x: Any, s: int, dim: int) -> Any:
    """The parts of an axis, along a new first one."""
    return jnp.stack(jnp.split(x, s, axis=dim))


def _sum_bfloat16(exchange: Exchange, encoding: BFloat16, x: Any, spec: Any) -> Any:
    _, name, n, mesh, _ = exchange
    (sent,) = encoding.rounded([x], None)
    if mesh.shape[name] == 1:  # Nothing is sent on.
        return jnp.sum(sent, axis=0)
    if n > mesh.shape[name]:
        parts = jnp.sum(_mesh.split(sent, name, mesh), axis=1)
        (sent,) = encoding.rounded([parts], None)
    sent = sent.astype(jnp.bfloat16)
    dim = _scattered(name, spec)
    if dim is None:  # jnp.sum would add in float32.
        total = _mesh.constrained(lax.reduce_sum(sent, (0,)), spec, mesh)
        return total.astype(x.dtype)

    def local(_, part):
        # As many bytes as a reduce-scatter, of which XLA may make an all-reduce; and
        # the sum is not rounded on the way.
        apart = _parts(part[0], mesh.shape[name], dim)
        received = lax.all_to_all(apart, name, 0, 0)
        return [jnp.sum(received.astype(x.dtype), axis=0)]

    (total,) = _in_shards(local, exchange, [sent], [spec], jnp.zeros(0))
    return total


_Group = tuple[Any, list[int]]  # A key, and arrays by number.


class _Unit(NamedTuple):
    """Arrays that are exchanged together.

    Those that are to be whole are in one unit, however they share the blocks that a
    device gets. One that is to stay cut is a unit by itself.
    """

    leaves: list[int]
    lengths: list[int]  # In blocks, of all devices together.
    key: Any
    sent: tuple[Any, Any]  # Int8 and scales, [s, blocks, _].


def _sums_int8(exchange: Exchange, encoding: Int8, key: Any, *xs: Any) -> list[Any]:
    """What one shard does, for all arrays at once."""
    _, name, n, mesh, specs = exchange
    s, shard = mesh.shape[name], lax.axis_index(name)
    dims = [_scattered(name, spec) for spec in specs]
    groups = _groups(exchange, key)
    few = _few(encoding, groups, dims, xs, s)
    sums = _sums_of_rounded(encoding, _few_of(groups, few, n), xs, shard)
    results = {i: _sum_floats(total, name, s, dims[i]) for i, total in sums.items()}
    if len(results) < len(xs):
        rest = [(key, [i for i in leaves if i not in few]) for key, leaves in groups]
        rest = [group for group in rest if group[1]]
        results |= _sums_of_blocks(exchange, encoding, rest, dims, xs)
    return [results[i] for i in range(len(xs))]


def _sum_floats(total: Any, name: str, s: int, dim: int | None) -> Any:
    if s == 1:  # Nothing is sent on.
        return total
    if dim is None:
        return lax.psum(total, name)
    return lax.psum_scatter(total, name, scatter_dimension=dim, tiled=True)


def _sums_of_blocks(
    exchange: Exchange,
    encoding: Int8,
    groups: Sequence[_Group],
    dims: Sequence[int | None],
    xs: Sequence[Any],
) -> dict[int, Any]:
    """Sums of the arrays in `groups`, by number, which are sent as blocks of int8."""
    _, name, n, mesh, _ = exchange
    s, shard = mesh.shape[name], lax.axis_index(name)
    units = _units(exchange, encoding, groups, dims, xs)
    received = [
        lax.all_to_all(jnp.concatenate(a, axis=1), name, 0, 0)
        for a in zip(*(unit.sent for unit in units), strict=True)
    ]
    lengths = [unit.sent[0].shape[1] for unit in units]
    summed = cut(jnp.sum(encoding.decode(*received), axis=0), lengths)
    # What is to be whole is encoded again, and given to all.
    whole = [k for k, unit in enumerate(units) if dims[unit.leaves[0]] is None]
    if whole:
        own_keys = [jax.random.fold_in(units[k].key, 2 * n) for k in whole]
        again = [
            encoding.encode(summed[k], jax.random.fold_in(own_key, shard))
            for k, own_key in zip(whole, own_keys, strict=True)
        ]
        gathered = [
            lax.all_gather(jnp.concatenate(a), name) for a in zip(*again, strict=True)
        ]
        found = cut(encoding.decode(*gathered), [lengths[k] for k in whole], axis=1)
        for k, of_all in zip(whole, found, strict=True):
            summed[k] = of_all.reshape(-1, encoding.block_size)
    results: dict[int, Any] = {}
    for unit, blocks in zip(units, summed, strict=True):
        parts = [blocks]
        if dims[unit.leaves[0]] is None:  # Without what filled it up.
            parts = cut(blocks[: sum(unit.lengths)], unit.lengths)
        for i, part in zip(unit.leaves, parts, strict=True):
            shape, dim = list(xs[i].shape[1:]), dims[i]
            if dim is not None:
                shape[dim] //= s
            values = part.reshape(-1)[: math.prod(shape)]
            results[i] = values.reshape(shape).astype(xs[i].dtype)
    return results


def _groups(exchange: Exchange, key: Any) -> list[_Group]:
    """Arrays that the same other axes shard, by number, with a key for each group.

    Devices that have unlike parts of an array round them with unlike keys, and those
    that have the same part with the same key.
    """
    by_axes: dict[tuple[str, ...], list[int]] = {}
    for i, spec in enumerate(exchange.specs):
        names = {name for axes in _mesh.axes_of_each(spec) for name in axes}
        by_axes.setdefault((*sorted(names - {exchange.placement}),), []).append(i)
    groups = []
    for number, (names, leaves) in enumerate(by_axes.items()):
        own_key = key
        if names:
            own_key = jax.random.fold_in(key, 3 * exchange.n + number)
        for name in names:
            own_key = jax.random.fold_in(own_key, lax.axis_index(name))
        groups.append((own_key, leaves))
    return groups


def _together(leaves: Sequence[int], dims: Sequence[int | None]) -> list[list[int]]:
    """The arrays of a group by units."""
    whole = [i for i in leaves if dims[i] is None]
    return [whole] * bool(whole) + [[i] for i in leaves if dims[i] is not None]


def _few(
    encoding: Int8,
    groups: Sequence[_Group],
    dims: Sequence[int | None],
    xs: Sequence[Any],
    s: int,
) -> set[int]:
    """The arrays that are sent as they are: so few that blocks would be more bytes.

    For each device there is the same number of blocks, and they are full.
    """

    def blocks(i):
        size = math.prod(xs[i].shape[1:])
        parts = 1 if dims[i] is None else s
        return parts * math.ceil(size / parts / encoding.block_size)

    few: set[int] = set()
    for unit in (unit for _, leaves in groups for unit in _together(leaves, dims)):
        filled = s * math.ceil(sum(map(blocks, unit)) / s)
        plain = sum(math.prod(xs[i].shape[1:]) * xs[i].dtype.itemsize for i in unit)
        if s == 1 or plain <= filled * encoding.bytes(encoding.block_size):
            few.update(unit)
    return few


def _few_of(groups: Sequence[_Group], few: set[int], n: int) -> list[_Group]:
    """Groups of those alone; they round apart from the others of theirs."""
    found = []
    for key, leaves in groups:
        own = [i for i in leaves if i in few]
        if own:
            apart = len(own) < len(leaves)
            found.append((jax.random.fold_in(key, 2 * n + 1) if apart else key, own))
    return found


def _sums_of_rounded(
    encoding: Int8, groups: Sequence[_Group], xs: Sequence[Any], shard: Any
) -> dict[int, Any]:
    """What a shard has of all its elements `[m, ...]`, as they send it, by number."""
    m = len(xs[0])
    elements = shard * m + jnp.arange(m, dtype="int32")
    sums: dict[int, Any] = {}
    for key, leaves in groups:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, elements)
        rounded = jax.vmap(encoding.rounded)([xs[i] for i in leaves], keys)
        sums.update(zip(leaves, (jnp.sum(x, axis=0) for x in rounded), strict=True))
    return sums


def _units(
    exchange: Exchange,
    encoding: Int8,
    groups: Sequence[_Group],
    dims: Sequence[int | None],
    xs: Sequence[Any],
) -> list[_Unit]:
    """What a shard sends of arrays `[m, ...]`.

    One element is encoded just as it is without a mesh, if no array is cut. What is the
    sum of several, each of them rounded, is encoded once more.
    """
    _, name, n, mesh, _ = exchange
    m, shard, s = len(xs[0]), lax.axis_index(name), mesh.shape[name]
    totals = {i: x[0] for i, x in enumerate(xs)}
    if m > 1:
        totals = _sums_of_rounded(encoding, groups, xs, shard)

    def blocks_of(i):
        dim = dims[i]
        if dim is None:
            return encoding.blocks(totals[i].reshape(-1))
        # Part j of the axis is for shard j.
        apart = jax.vmap(encoding.blocks)(_parts(totals[i], s, dim).reshape(s, -1))
        return apart.reshape(-1, encoding.block_size)

    units = []
    for key, leaves in groups:
        together = _together(leaves, dims)
        blocks = [[blocks_of(i) for i in of_unit] for of_unit in together]
        all_blocks = jnp.concatenate([x for of_unit in blocks for x in of_unit])
        own_key = jax.random.fold_in(key, shard if m == 1 else n + shard)
        encoded = encoding.encode(all_blocks, own_key)
        lengths = [[len(x) for x in of_unit] for of_unit in blocks]
        parts = [cut(a, [*map(sum, lengths)]) for a in encoded]
        for k, of_unit in enumerate(together):
            fill = ((0, -sum(lengths[k]) % s), (0, 0))
            integers, scales = (
                jnp.pad(a[k], fill).reshape(s, -1, a[k].shape[-1]) for a in parts
            )
            units.append(_Unit(of_unit, lengths[k], key, (integers, scales)))
    return units
