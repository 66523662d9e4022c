"""Arguments as values of a graph: arrays, and what reads those that are placed."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindows

from beam_runner._graph import Placed
from beam_runner._sources import SourceReader, check_source, is_source, structs_of
from drjax._numpy import to_numpy
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


#
# Of a transform: which of them arrive in a PCollection.
#
class Chunks(NamedTuple):
    """A placed argument that arrives as ready chunks, `(first index, arrays)`.

    Args:
      structs: the types of the placed value, a tree of `[n, ...]`.
      size: elements in a chunk; only the last one may have fewer.
    """

    structs: Any
    size: int


class Argument(NamedTuple):
    """An argument: its types, and its values leaf by leaf, unless it arrives.

    `size` is that of ready chunks.
    """

    name: str
    structs: Any
    leaves: list[Any]
    arrives: bool
    size: int | None = None


def argument_of(k: int, arg: Any) -> Argument:
    name = f"argument {k}"
    size = arg.size if isinstance(arg, Chunks) else None
    structs = arg.structs if isinstance(arg, Chunks) else arg
    leaves = jax.tree.leaves(structs)
    is_struct = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]
    if leaves and all(is_struct):
        return Argument(name, structs, leaves, True, size)
    if any(is_struct) or isinstance(arg, Chunks):
        raise TypeError(
            f"beam_runner.MapReduce: {name} is neither all values nor all "
            "jax.ShapeDtypeStruct, which stand for what arrives in a PCollection."
        )
    values = values_of([arg])
    # Copies of arrays, for it runs later.
    leaves = [np.array(x) if type(x) is np.ndarray else x for x in values.leaves]
    return Argument(name, values.structs[0], leaves, False)


def check_uses(plan: Plan, arguments: Sequence[Argument], any_number: bool) -> None:
    """Checks that arguments which arrive are placed as a whole, or not at all."""
    numbers, read = iter(plan.inputs), read_of(plan)
    arriving, known = set[tuple[str, int]](), set[tuple[str, int]]()
    for argument in arguments:
        inputs = [*itertools.islice(numbers, len(argument.leaves))]
        ats = {plan.at.get(i) for i in inputs if i in read}
        if argument.arrives and len(ats) > 1:
            raise TypeError(
                f"beam_runner.MapReduce: {argument.name} is placed in part only, or "
                "over several placements. Give its parts as arguments of their own."
            )
        if argument.size is not None and None in ats:
            raise TypeError(
                f"beam_runner.MapReduce: {argument.name} comes as beam_runner.Chunks, "
                "but the program does not use it as a placed value."
            )
        keys = {at[:2] for at in ats if at is not None}
        if argument.arrives:
            arriving |= keys
        else:
            known |= keys
    if not any_number:
        return
    for placement, n in plan.placements:
        reason = None
        if placement not in plan.size_free:
            reason = f"its plan depends on how many {placement!r} there are"
        elif (placement, n) in known or (placement, n) not in arriving:
            reason = (
                f"not all that is placed over {placement!r} arrives in PCollections"
            )
        if reason:
            raise ValueError(
                f"beam_runner.MapReduce: any_number=True is not possible, for {reason}."
            )


def collections_of(given: Any, arriving: Sequence[Argument]) -> list[Any]:
    """The PCollections of the arguments that arrive, checked."""
    match given:
        case pvalue.PCollection():
            collections = [given]
        case tuple() | list():
            collections = [*given]
        case dict():
            raise TypeError(
                "beam_runner.MapReduce: give the PCollections as a tuple, in the order "
                "of the arguments; names say nothing here."
            )
        case _:
            collections = []
    if len(collections) != len(arriving):
        names = ", ".join(x.name for x in arriving) or "none"
        raise TypeError(
            f"beam_runner.MapReduce: it is applied to {len(collections)} PCollections, "
            f"but of its arguments these arrive in one, in this order: {names}."
        )
    for x, argument in zip(collections, arriving, strict=True):
        is_global = isinstance(x.windowing.windowfn, GlobalWindows)
        if not x.is_bounded or not is_global:
            kind = "unbounded" if not x.is_bounded else "not in the global window"
            raise ValueError(
                f"beam_runner.MapReduce: the PCollection of {argument.name} is {kind}. "
                "A program reduces over all elements, so they must end: put bounded "
                "data through beam.WindowInto(GlobalWindows())."
            )
    return collections
