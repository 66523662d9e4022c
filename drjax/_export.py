"""What an engine runs elsewhere: a stage's function, also of many elements at once."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax import lax
from jax.extend.core import unmapped_aval

from drjax._compat import ClosedJaxpr
from drjax._convolutions import of_elements
from drjax._jaxprs import as_fun, equations, key_types, struct
from drjax._sums import summed_over, wide, widened


class Operation(NamedTuple):
    """How the elements' parts of a value are combined."""

    combine: Callable[[Any, Any], Any]
    reduce: Callable[..., Any]
    identity: Callable[[Any], Any]


def _lowest(dtype: Any) -> Any:
    return _range(dtype)[0]


def _highest(dtype: Any) -> Any:
    return _range(dtype)[1]


def _range(dtype: Any) -> tuple[Any, Any]:
    if dtype == jnp.bool_:
        return False, True
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
    if np.isinf(np.array(np.inf, dtype)):
        return -np.inf, np.inf
    return jnp.finfo(dtype).min, jnp.finfo(dtype).max


def _all_bits(dtype: Any) -> Any:
    return True if dtype == jnp.bool_ else ~jnp.zeros((), dtype)


OPERATIONS = {
    "sum": Operation(jnp.add, jnp.sum, lambda _: 0),
    "prod": Operation(jnp.multiply, jnp.prod, lambda _: 1),
    "max": Operation(jnp.maximum, jnp.max, _lowest),
    "min": Operation(jnp.minimum, jnp.min, _highest),
    "and": Operation(jnp.bitwise_and, jnp.bitwise_and.reduce, _all_bits),
    "or": Operation(jnp.bitwise_or, jnp.bitwise_or.reduce, lambda _: 0),
}


def of_chunk(
    stage: Any, *, whole: bool = False, wide_sums: bool = False
) -> Callable[..., list[Any]]:
    """The function of c elements at once that a round computes.

    `(count, index, *server inputs, *placed inputs) -> (*reduced, *placed outputs)`. The
    elements are along axis 0 of `index: int32 [c]`, their positions, and of all placed
    values. The first `count` of them are valid, and only these are in what is reduced.
    The others run as the first one once more, whatever they hold, and what they give is
    selected away: a NaN, or a loop that would not end, does not matter.

    With `whole`, all are valid and there is no `count`. With it, or with `wide_sums`,
    a sum of floats narrower than 32 bits is float32, for what is added to it.
    """
    n_server, n_reduced = len(stage.server_inputs), len(stage.reductions)
    operations = [operation for operation, _ in stage.reductions]
    summed = [operation == "sum" for operation in operations]
    dtypes = [aval.dtype for aval in stage.body.out_avals[:n_reduced]]
    if whole or wide_sums:
        pairs = zip(summed, dtypes, strict=True)
        dtypes = [wide(dtype) if is_sum else dtype for is_sum, dtype in pairs]
    is_output = [False] * len(stage.placed_outputs)
    # JAX draws other numbers under vmap from keys of these kinds.
    one_by_one = any("rbg" in dtype for dtype in key_types(stage.body))
    own = [True] + [False] * n_server + [True] * len(stage.placed_inputs)
    body = summed_over(of_elements(stage.body), own, [*summed, *is_output])

    def run(*args):
        count, (index, *rest) = (None, args) if whole else (args[0], args[1:])
        server, placed = rest[:n_server], rest[n_server:]
        is_valid = None
        own = [index, *placed]
        if count is not None:
            is_valid = jnp.arange(index.shape[0], dtype=count.dtype) < count
            own = [_select(is_valid, x, x[:1]) for x in own]
        if one_by_one:
            outs = lax.map(
                lambda own: as_fun(stage.body)(own[0], *server, *own[1:]), own
            )
            is_summed = [False] * n_reduced
        else:
            mapped = jax.vmap(
                lambda is_valid, index, *own: body(is_valid, index, *server, *own),
                out_axes=[None if is_sum else 0 for is_sum in [*summed, *is_output]],
                axis_size=index.shape[0],
            )
            outs, is_summed = mapped(is_valid, *own), summed
        reduced = []
        for name, x, is_sum in zip(
            operations, outs[:n_reduced], is_summed, strict=True
        ):
            if not is_sum:
                operation = OPERATIONS[name]
                if is_valid is not None:
                    identity = jnp.full((), operation.identity(x.dtype), x.dtype)
                    x = _select(is_valid, x, identity)
                x = operation.reduce(widened(x) if name == "sum" else x, axis=0)
            reduced.append(x)
        reduced = [x.astype(dtype) for x, dtype in zip(reduced, dtypes, strict=True)]
        return [*reduced, *outs[n_reduced:]]

    return run


def _select(is_valid: Any, x: Any, otherwise: Any) -> Any:
    shape = [-1] + [1] * (x.ndim - 1)
    return jnp.where(is_valid.reshape(shape), x, otherwise)


def export_full_chunk(stage: Any, chunk: int) -> bytes:
    """The StableHLO of `of_chunk` where all elements are valid."""
    fn, avals = of_chunk(stage, whole=True), avals_of_chunk(stage, chunk)
    return _serialized(fn, avals, None)


def export_round(
    stage: Any,
    platforms: Sequence[str] | None,
    chunk: int | str | None,
    wide_sums: bool = False,
) -> bytes:
    """The StableHLO of `MapReduce.export`; `wide_sums` as of `of_chunk`."""
    _check_portable(stage.body)
    if chunk is None:
        return _serialized(as_fun(stage.body), stage.body.in_avals, platforms)
    if chunk == "symbolic":
        c: Any = jax_export.symbolic_shape("chunk")[0]
    else:
        c = as_size(chunk)
        if c < 1:
            raise ValueError(
                "drjax: the chunk of an export is None, a number of elements or "
                f"'symbolic', but got {chunk!r}."
            )
    avals = [stage.body.in_avals[0], *avals_of_chunk(stage, c)]  # The count is first.
    return _serialized(of_chunk(stage, wide_sums=wide_sums), avals, platforms)


def as_size(x: Any) -> int:
    """A number of elements; 0 if it is no integer, of Python or another."""
    return 0 if isinstance(x, bool | str | float) else operator.index(x)


def checked_chunk_size(call: str, size: Any) -> int | None:
    """The elements of a chunk that a user has said, or None; `call` is for messages."""
    if size is None:
        return None
    if (n := as_size(size)) < 1:
        raise ValueError(
            f"{call}: chunk_size is a number of elements, one at least, or None, but "
            f"got {size!r}."
        )
    return n


def avals_of_chunk(stage: Any, c: Any) -> list[Any]:
    """The types `(index, *server inputs, *placed inputs)` of c elements."""
    index, *avals = stage.body.in_avals
    server = avals[: len(stage.server_inputs)]
    placed = [unmapped_aval(c, 0, aval) for aval in (index, *avals[len(server) :])]
    return [placed[0], *server, *placed[1:]]


def export_server(stage: Any, platforms: Sequence[str] | None) -> bytes:
    """The StableHLO of `Server.export`."""
    _check_portable(stage.jaxpr)
    return _serialized(as_fun(stage.jaxpr), stage.jaxpr.in_avals, platforms)


def _serialized(fn: Any, avals: Sequence[Any], platforms: Any) -> bytes:
    exported = jax_export.export(jax.jit(fn), platforms=platforms)
    return bytes(exported(*map(struct, avals)).serialize())


def _check_portable(jaxpr: ClosedJaxpr) -> None:
    for name in ("pure_callback", "io_callback", "debug_callback", "debug_print"):
        for _ in equations(jaxpr, name):
            raise NotImplementedError(
                f"drjax: a stage with a {name} cannot be exported: it calls Python in "
                "this process, which other processes do not have. Leave out "
                "jax.debug.print and callbacks."
            )
