"""Running totals of what chunks reduce, which stay accurate however many there are.

A sum of floats is kept as three arrays: `part`, to which chunks are added; and a pair
`high + low` with twice the digits, to which `part` is added now and then. What that
addition rounds away is computed exactly, and goes into `low`:

    s = a + b,  t = s - a,  (a - (s - t)) + (b - t) = (a + b) - s

So the error is that of a few plain additions, for any number of chunks. A sum of floats
narrower than 32 bits is kept in float32.

References:
  Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from drjax._export import OPERATIONS
from drjax._sums import wide

# Chunks that are added to `part` before it is added to the pair. To do that for each
# takes a tenth more time, where clients train a model of two layers.
FOLD = 8


def start(operation: str, aval: Any) -> Any:
    """The total of no chunks."""
    if operation == "sum" and jnp.issubdtype(aval.dtype, jnp.inexact):
        return tuple(jnp.zeros(aval.shape, wide(aval.dtype)) for _ in range(3))
    return jnp.full(aval.shape, OPERATIONS[operation].identity(aval.dtype), aval.dtype)


def add(operation: str, total: Any, x: Any) -> Any:
    """Adds what one chunk gives."""
    if isinstance(total, tuple):
        part, high, low = total
        return part + x.astype(part.dtype), high, low
    return OPERATIONS[operation].combine(total, x).astype(x.dtype)


def fold(total: Any) -> Any:
    """Adds `part` to the pair. It is to be done after `FOLD` chunks at most."""
    if not isinstance(total, tuple):
        return total
    part, high, low = total
    return jnp.zeros_like(part), *_plus(high, low, part)


def merge(operation: str, a: Any, b: Any) -> Any:
    """The total of two totals; of sums, folded ones."""
    if isinstance(a, tuple):
        part, high, low = a
        return part, *_plus(high, low + b[2], b[1])
    return OPERATIONS[operation].combine(a, b).astype(a.dtype)


def finish(total: Any) -> Any:
    """What is reduced, of a folded total; of narrow floats as float32."""
    if not isinstance(total, tuple):
        return total
    _, high, low = total
    return _corrected(high, low)


def _plus(high: Any, low: Any, x: Any) -> tuple[Any, Any]:
    s = high + x
    t = s - high
    return s, low + ((high - (s - t)) + (x - t))


def _corrected(high: Any, low: Any) -> Any:
    """`high + low`; where the sum is infinite, `low` is no number."""
    if jnp.iscomplexobj(high):
        parts = ((high.real, low.real), (high.imag, low.imag))
        return lax.complex(*(_corrected(*pair) for pair in parts))
    return jnp.where(jnp.isfinite(high), high + low, high)
