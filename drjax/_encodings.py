"""How values are written in fewer bytes, to be sent where they are summed.

An encoding rounds: `decode(encode(x))` is near `x`. What an element sends is rounded by
`rounded_p`, which stays in the body of a plan's round, so that a reader of the plan
knows what is sent.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True)
class BFloat16:
    """Values rounded to bfloat16 where they are sent: 2 bytes each.

    It has the exponents of float32 and 8 binary digits, so what is sent is off by
    1 part in 256 at most. Partial sums that devices send are rounded too.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=2)
      ... def total(x):
      ...     return drjax.reduce_sum(x, encoding=drjax.BFloat16())
      >>> print(total(jnp.array([1.0, 1.001])))
      2.0
    """

    takes_key = False

    def rounded(self, xs: Sequence[Any], key: Any) -> list[Any]:
        # XLA may leave out a conversion there and back, and this it may not.
        return [lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in xs]

    def bytes(self, size: int) -> int:
        """Of so many values."""
        return 2 * size


@dataclasses.dataclass(frozen=True)
class Int8:
    """Values as int8 multiples of a scale, where they are sent: a little over a byte.

    Each `block_size` values, in the order of `x.ravel()`, have a float32 scale, a 127th
    of their largest magnitude. Rounding is stochastic and unbiased: a value between two
    multiples becomes one of them at random, and the mean over keys is the value itself.
    It is off by less than one scale. All that is computed in float32. A block with a
    value that is not finite becomes NaN. Over a mesh whole blocks are sent; arrays that
    are so small that float32 is fewer bytes are rounded the same way, and sent as
    float32.

    Args:
      block_size: how many values have one scale. Fewer are more accurate; a scale adds
        `4 / block_size` bytes to each.

    Raises:
      ValueError: if it is below 1.
      TypeError: if it is no integer.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=2)
      ... def total(x, key):
      ...     return drjax.reduce_sum(x, encoding=drjax.Int8(), key=key)
      >>> x = jnp.array([[12.7, 0.2], [0.0, -254.0]])
      >>> print(jnp.abs(total(x, jax.random.key(0)) - x.sum(0)) < 0.1)
      [ True  True]

    References:
      Alistarh et al., QSGD, arXiv:1610.02132. Block by block: Dettmers et al., 8-bit
      Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """

    block_size: int = 128

    takes_key = True

    def __post_init__(self):
        size = operator.index(self.block_size)
        if size < 1:
            raise ValueError(f"drjax.Int8: block_size is 1 at least, but got {size}.")
        object.__setattr__(self, "block_size", size)

    def rounded(self, xs: Sequence[Any], key: Any) -> list[Any]:
        of_each = [self.blocks(x.reshape(-1)) for x in xs]
        # One draw for all arrays: XLA takes long to compile one.
        decoded = self.decode(*self.encode(jnp.concatenate(of_each), key))
        found = cut(decoded, [len(blocks) for blocks in of_each])
        return [
            blocks.reshape(-1)[: x.size].reshape(x.shape).astype(x.dtype)
            for x, blocks in zip(xs, found, strict=True)
        ]

    def bytes(self, size: int) -> int:
        return size + 4 * math.ceil(size / self.block_size)

    def blocks(self, x: Any) -> Any:
        """`[size]` to float32 `[blocks, block_size]`; the last is filled with zeros."""
        missing = -x.size % self.block_size
        filled = jnp.pad(x.astype(jnp.float32), (0, missing))
        return filled.reshape(-1, self.block_size)

    def encode(self, blocks: Any, key: Any) -> tuple[Any, Any]:
        """Int8 `[..., blocks, block_size]`, and float32 scales `[..., blocks, 1]`."""
        largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        scales = largest / 127
        y = blocks / jnp.where(scales > 0, scales, 1)
        low = jnp.floor(y)
        # The integer above with the probability y - low: in the mean that is y. And
        # floor(y + u) would round y + u.
        up = jax.random.uniform(key, blocks.shape, jnp.float32) < y - low
        # What is not finite is in the scale: nan or inf times zero is nan.
        scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
        return jnp.clip(low + up.astype(low.dtype), -127, 127).astype(jnp.int8), scales

    def decode(self, integers: Any, scales: Any) -> Any:
        return integers.astype(jnp.float32) * scales


BFloat16.__module__ = Int8.__module__ = "drjax"
Encoding = BFloat16 | Int8


def cut(x: Any, lengths: Sequence[int], axis: int = 0) -> list[Any]:
    """An array in parts of these lengths."""
    return jnp.split(x, [*itertools.accumulate(lengths)][:-1], axis=axis)


#
# rounded_p: arrays [...], key -> arrays [...]. What is left of values that are encoded
# and decoded. `batch` is for each vmap whether it is of keys too, the first one first;
# the last one's axis comes first. The derivative is taken to be one
# ("straight-through"): that of the mean over keys is.
#
rounded_p = Primitive("rounded")
rounded_p.multiple_results = True


def _run(*args, encoding, batch):
    def run(*args):
        *xs, key = args if encoding.takes_key else (*args, None)
        return encoding.rounded(xs, key)

    k = len(args) - encoding.takes_key
    for of_keys in batch:
        key_axis = [0 if of_keys else None] * encoding.takes_key
        run = jax.vmap(run, (*[0] * k, *key_axis))
    # Lowered in a shard_map, arrays are of its mesh, and nothing else says so.
    with jax.sharding.use_abstract_mesh(jax.typeof(args[0]).sharding.mesh):
        return run(*args)


def _abstract_eval(*avals, encoding, batch):
    arrays = avals[:-1] if encoding.takes_key else avals
    return [aval.update(weak_type=False) for aval in arrays]


def _jvp(primals, tangents, **params):
    outs = rounded_p.bind(*primals, **params)
    return outs, tangents[: len(outs)]


def _batch(axis_data, args, dims, *, encoding, batch):
    k = len(args) - encoding.takes_key
    args = [
        jnp.broadcast_to(x, (axis_data.size, *x.shape))
        if dim is None and i < k
        else x
        if dim is None
        else jnp.moveaxis(x, dim, 0)
        for i, (x, dim) in enumerate(zip(args, dims, strict=True))
    ]
    batch = (*batch, dims[-1] is not None)
    outs = rounded_p.bind(*args, encoding=encoding, batch=batch)
    return outs, [0] * len(outs)


rounded_p.def_impl(jax.jit(_run, static_argnames=("encoding", "batch")))
rounded_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(rounded_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[rounded_p] = _jvp
batching.fancy_primitive_batchers[rounded_p] = _batch


class Sent(NamedTuple):
    """What a value is sent as, and in how many bytes."""

    name: str
    bytes: int


def sent_as(jaxpr: Any, k: int) -> Sent | None:
    """How a body's output is sent, if it is encoded."""
    v = jaxpr.jaxpr.outvars[k]
    for eqn in jaxpr.jaxpr.eqns:
        if eqn.primitive is rounded_p and v in eqn.outvars:
            encoding, batch = eqn.params["encoding"], len(eqn.params["batch"])
            apart, size = (
                math.prod(x) for x in (v.aval.shape[:batch], v.aval.shape[batch:])
            )
            return Sent(type(encoding).__name__.lower(), apart * encoding.bytes(size))
    return None
