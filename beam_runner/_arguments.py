"""Arguments as values of a graph: arrays, and what reads those that are placed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beam_runner._graph import Placed
from beam_runner._sources import SourceReader, check_source, is_source, structs_of
from beam_runner._work import to_numpy
from drjax.plan import Plan, reads_of


class Values(NamedTuple):
    """Arguments: their types as trees, and their values leaf by leaf."""

    structs: tuple[Any, ...]
    leaves: list[Any]


def values_of(args: Sequence[Any]) -> Values:
    leaves: list[Any] = []
    structs = []
    for arg in args:
        parts, tree = jax.tree.flatten(arg, is_leaf=is_source)
        types = []
        for part in parts:
            if is_source(part):
                check_source(part)
                types.append(structs_of(part))
                reader = SourceReader(part, types[-1])
                count = len(jax.tree.leaves(types[-1]))
                leaves += [Placed(reader, k) for k in range(count)]
            else:
                types.append(struct_of(part))
                leaves.append(array_of(part))
        structs.append(jax.tree.unflatten(tree, types))
    return Values(tuple(structs), leaves)


def struct_of(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct | jax.Array):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, weak_type=getattr(x, "weak_type", False)
        )
    return jax.eval_shape(lambda x: x, x)


def array_of(x: Any) -> Any:
    """An array as it is sent, in the dtype that JAX gives it; a memmap stays one."""
    if isinstance(x, np.memmap):
        return x
    aval = jax.typeof(x)
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return to_numpy(x)
    return np.asarray(x, aval.dtype)


def read_of(plan: Plan) -> set[int]:
    """The values that a stage reads, or that are returned."""
    return {i for stage in plan.stages for i in reads_of(stage)} | {*plan.outputs}


def check_sources(plan: Plan, leaves: Sequence[Any]) -> None:
    """Raises if a source is given for what is not placed, or along another axis."""
    read = read_of(plan)
    for i, x in zip(plan.inputs, leaves, strict=True):
        at = plan.at.get(i)
        if isinstance(x, Placed) and i in read and (at is None or at.axis):
            raise TypeError(
                "beam_runner: a source is given for an argument that the program does "
                f"not use as placed along axis 0; it is {plan.avals[i]}. Sources are "
                "placed arguments, [n, ...]; give others as arrays."
            )
