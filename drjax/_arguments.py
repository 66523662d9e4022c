"""The arguments of a streaming function: which are read, when, and how often."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from drjax._jaxprs import is_eager
from drjax._make_plan import without_sharding
from drjax._reference import as_array
from drjax._rounds import Fed, Round
from drjax._sources import Elements, is_host_array
from drjax.plan import (
    Branch,
    MapReduce,
    Plan,
    Scan,
    Server,
    While,
    plans_in,
    reads_of,
)


class Row:
    """One leaf of `Elements`: placed, with its elements along axis 0."""

    def __init__(self, source: Elements, leaf: int):
        self.source, self.leaf = source, leaf


def values_of(fn: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments leaf by leaf: arrays of JAX, those of the host to read, rows."""
    _check_outermost(fn, (args, kwargs))
    values: list[Any] = []
    for leaf in jax.tree.leaves((args, kwargs)):
        if isinstance(leaf, Elements):
            count = len(jax.tree.leaves(leaf.element))
            values += [Row(leaf, k) for k in range(count)]
        else:
            values.append(leaf if _is_read(leaf) else as_array(leaf))
    return values


# An array of the host with more bytes than that is read piece by piece.
_SMALL = 2**24


def _is_read(x: Any) -> bool:
    if not is_host_array(x):
        return False
    in_memory = type(x).__module__ == "numpy" and not isinstance(x, np.memmap)
    return not in_memory or x.nbytes > _SMALL


def struct_of(leaf: Any) -> Any:
    """What stands for an argument when the function is traced."""
    if isinstance(leaf, Elements):
        return leaf.structs()
    if is_host_array(leaf):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return without_sharding(leaf)


def _check_outermost(fn: Any, args: Any) -> None:
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
    if is_traced or not is_eager():
        name = getattr(fn, "__name__", "fn")
        raise TypeError(
            f"drjax.streaming({name}) was called inside a function that JAX "
            "transforms, by jax.jit, jax.grad or another. It runs on the host, chunk "
            "by chunk, and can only be outermost. Transform first: "
            f"drjax.streaming(jax.grad({name})), not jax.grad(drjax.streaming({name}))."
            " It compiles by itself."
        )


class Streamed(NamedTuple):
    """The inputs of a plan that only rounds read, piece by piece.

    Args:
      rows: those which may be `Elements`.
      arrays: those which may be arrays of the host.
    """

    rows: set[int]
    arrays: set[int]


def streamed(plan: Plan) -> Streamed:
    return Streamed(_streamed(plan, as_rows=True), _streamed(plan, as_rows=False))


def with_wholes(plan: Plan, streamed: Streamed, values: Sequence[Any]) -> list[Any]:
    """The arguments, of which some are read now: what is needed as a whole."""
    read: dict[int, list[Any]] = {}  # Once for all leaves.
    given = []
    for i, x in zip(plan.inputs, values, strict=True):
        if isinstance(x, Row) and i not in streamed.rows:
            if id(x.source) not in read:
                read[id(x.source)] = x.source.reader()(0, x.source.n)
            x = jnp.asarray(read[id(x.source)][x.leaf])
        elif is_host_array(x) and i not in streamed.arrays:
            x = jnp.asarray(x)
        given.append(x)
    return given


def platform_of(mesh: Mesh | None, values: Sequence[Any]) -> str:
    """Of the devices that it runs on."""
    if mesh is not None:
        return mesh.devices.flat[0].platform
    arrays = (x for x in values if isinstance(x, jax.Array) and x.committed)
    devices = (device for x in arrays for device in x.devices())
    return next((d.platform for d in devices), jax.default_backend())


def fed_rows(group: list[tuple[int, Row]]) -> Fed:
    """What a source gives of the leaves that a round reads."""
    read = group[0][1].source.reader()
    leaves = [row.leaf for _, row in group]

    def read_leaves(low: int, high: int) -> list[Any]:
        rows = read(low, high)
        return [rows[leaf] for leaf in leaves]

    return Fed(read_leaves, tuple(k for k, _ in group))


def _streamed(plan: Plan, as_rows: bool) -> set[int]:
    """The inputs that only rounds read, and placed: not needed as a whole.

    Those with elements along axis 0, if they are read `as_rows`.
    """
    inputs = {i for i in plan.inputs if i not in plan.outputs}
    for stage in plan.stages:
        match stage:
            case Server():
                inputs -= {*stage.inputs}
            case MapReduce():
                inputs -= {*stage.server_inputs}
                if as_rows:
                    inputs -= {i for i in stage.placed_inputs if plan.at[i].axis}
            case Scan():
                inner = _streamed(stage.body, as_rows)
                given = stage.constants + stage.init + stage.xs
                inputs -= _others(stage.body, inner, given)
                inputs -= {*stage.init, *(stage.xs if as_rows else ())}
            case While():
                inputs -= {*stage.init}
                for inner, given in (
                    (stage.predicate, stage.predicate_constants),
                    (stage.body, stage.body_constants),
                ):
                    inputs -= _others(inner, _streamed(inner, as_rows), given)
            case Branch():
                inputs -= {stage.index}
                for inner in stage.branches:
                    inputs -= _others(inner, _streamed(inner, as_rows), stage.operands)
    return inputs


def _others(inner: Plan, streamed: set[int], given: Sequence[int]) -> set[int]:
    """Of the values given to an inner plan's first inputs, those not `streamed`."""
    pairs = zip(inner.inputs, given, strict=False)
    return {i for number, i in pairs if number not in streamed}


def check_readable(plan: Plan, streamed: Streamed, values: Sequence[Any]) -> None:
    """Refuses to read an iterator twice, before anything is read."""
    rows = {
        i: x
        for i, x in zip(plan.inputs, values, strict=True)
        if isinstance(x, Row) and x.source.is_one_shot
    }
    times: collections.Counter[int] = collections.Counter()
    for stage in plan.stages:
        read = {*reads_of(stage)} & rows.keys() & streamed.rows
        sources = {id(rows[i].source) for i in read}
        times.update(dict.fromkeys(sources, 2 if plans_in(stage) else 1))
    wholes = (row for i, row in rows.items() if i not in streamed.rows)
    times.update({id(row.source) for row in wholes})
    if any(count > 1 for count in times.values()):
        raise ValueError(
            "drjax.streaming: an iterator was given as Elements, but the plan reads "
            "the elements more than once, or needs all at once, as that of a gradient "
            "or of a loop may. Give a sequence, or an iterable that starts again with "
            "iter()."
        )


def check_order(round_: Round, rows: dict[int, list[tuple[int, Row]]]) -> None:
    sources = [group[0][1].source for group in rows.values()]
    if round_.devices > 1 and not all(source.is_indexable for source in sources):
        raise ValueError(
            "drjax.streaming: on a mesh each device reads elements of its own, but an "
            "iterable gives them in order only. Give a sequence."
        )
