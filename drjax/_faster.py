"""Bodies that compute the same, up to rounding, and that XLA runs faster on CPUs.

Measured there: a convolution in a loop takes six to nine times as long as outside of
one, so loops of convolutions are unrolled, but those that would make too many, where
they become matmuls. The gradient of a maximum over windows, XLA's `select_and_scatter`,
takes some fifteen times as long as the same by slices.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import batching, mlir

from drjax._compat import ClosedJaxpr
from drjax._convolutions import as_matmuls
from drjax._jaxprs import cached_by_jaxpr, in_jaxpr

# A convolution takes some 30 ms to compile.
_MAX_CONVOLUTIONS = 512
_CONVOLUTION = lax.conv_general_dilated_p.name
_SCATTER = "select_and_scatter_add"


@cached_by_jaxpr
def faster(body: ClosedJaxpr) -> ClosedJaxpr:
    """The body of one element, as it is fast on a CPU."""
    body = in_jaxpr(_by_slices, body, _SCATTER)
    return in_jaxpr(_without_loop, body, _CONVOLUTION)


def _without_loop(eqn: Any) -> Any:
    """A loop of convolutions, unrolled; or of matmuls."""
    name, length = eqn.primitive.name, eqn.params.get("length", 1)
    if name == "scan" and _convolutions(eqn) <= _MAX_CONVOLUTIONS:
        return eqn.replace(params=dict(eqn.params, unroll=max(length, 1)))
    return as_matmuls(eqn) if name in ("scan", "while") else eqn


def _convolutions(eqn: Any) -> int:
    """How many there are in an equation when its loops are unrolled."""
    inside = sum(
        _convolutions(e)
        for jaxpr in jaxprs_in_params(eqn.params)
        for e in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )
    length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return inside * length + (eqn.primitive.name == _CONVOLUTION)


#
# scatter_p: a select_and_scatter_add, which adds each number of the source where its
# window of the operand has its first maximum.
#
_scatter_p = Primitive("drjax_scatter_to_maxima")


def _by_slices(eqn: Any) -> Any:
    is_scatter = eqn.primitive.name == _SCATTER
    if not is_scatter or math.prod(eqn.params["window_dimensions"]) > 64:
        return eqn
    return eqn.replace(primitive=_scatter_p)


def _scatter(
    source, operand, *, select_prim, window_dimensions, window_strides, padding
):
    """As `select_and_scatter_add`, by one slice for each position in a window.

    With k the position, slice k has that number of each window. Windows begin with
    their first number that is not padding; a later one takes its place if
    `select(kept, number)` is false, as in XLA, so that NaNs do what they do there.
    """
    value = jnp.zeros((), operand.dtype)
    padded = lax.pad(operand, value, [(low, high, 0) for low, high in padding])
    is_real = np.pad(np.ones(operand.shape, bool), padding)
    offsets = [*itertools.product(*map(range, window_dimensions))]
    counts = source.shape

    def window(x, offset):
        index = tuple(
            slice(o, o + (n - 1) * s + 1, s)
            for o, n, s in zip(offset, counts, window_strides, strict=True)
        )
        return x[index]

    kept, first = window(padded, offsets[0]), jnp.zeros(counts, jnp.uint8)
    is_begun = window(is_real, offsets[0])
    for k, offset in enumerate(offsets[1:], 1):
        number, is_number = window(padded, offset), window(is_real, offset)
        takes = ~select_prim.bind(kept, number)
        if not (is_begun.all() and is_number.all()):
            takes = (takes | ~is_begun) & is_number
        kept = jnp.where(takes, number, kept)
        first = jnp.where(takes, jnp.uint8(k), first)
        is_begun = is_begun | is_number

    total, zero = 0, jnp.zeros((), source.dtype)
    for k, offset in enumerate(offsets):
        spread = [
            (o - low, size + low - o - (n - 1) * s - 1, s - 1)
            for o, (low, _), size, n, s in zip(
                offset, padding, operand.shape, counts, window_strides, strict=True
            )
        ]
        total += lax.pad(jnp.where(first == k, source, zero), zero, spread)
    return total


def _batch(args, dims, **params):
    def scatter(*args):
        return _scatter(*args, **params)

    return jax.vmap(scatter, dims)(*args), 0


_scatter_p.def_impl(_scatter)
_scatter_p.def_abstract_eval(lambda source, operand, **_: operand)
batching.primitive_batchers[_scatter_p] = _batch
mlir.register_lowering(_scatter_p, mlir.lower_fun(_scatter, multiple_results=False))
