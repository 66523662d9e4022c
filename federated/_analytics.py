"""Means, histograms and quantiles over the examples of all clients.

They are rounds like any other: what leaves a client is sums and counts.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import drjax
from federated._batch import Batch
from federated._local import whole


def mean(fn: Callable[[Any], Any] | None = None) -> Callable[[Batch], Any]:
    """The mean over the examples of all clients, in one round.

    Args:
      fn: `examples -> values`, both trees of arrays `[length, ...]` with one row per
        example; by default the examples themselves.

    Returns:
      `batch -> means`, a drjax program over the clients of its batch; the means are
      `[...]`, of integers as floats. Without an example they are zero.

    Raises:
      ValueError: by the program, if a value is not one row per example.

    Example:
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0, 5.0], "bob": [7.0]})
      >>> print(federated.mean()(federated.batch_of(data, [0, 1])))
      4.0
    """

    def run(batch):
        def of_client(batch):
            data = without_padding(batch)
            values = data if fn is None else fn(data)
            check_rows("federated.mean", values, batch.mask.shape, more=True)
            sums = jax.tree.map(lambda x: masked_sum(x, batch.mask), values)
            return sums, batch.count

        sums, count = drjax.reduce_sum(drjax.map_fn(of_client, (batch,)))
        return jax.tree.map(lambda x: ratio(x, count), sums)

    return over_clients(run)


def histogram(
    edges: Any, fn: Callable[[Any], Any] | None = None
) -> Callable[[Batch], jax.Array]:
    """Counts the examples of all clients by a value of each, in one round.

    Args:
      edges: `[bins + 1]` numbers that do not decrease, of any size, or infinite. As
        with `numpy.histogram`, a bin has its left edge and not its right one, but for
        the last bin, which has both. What is outside, or NaN, is not counted. Beside
        values that are floats, edges are rounded as they are.
      fn: `examples -> [length]`, one value per example; `examples` is a tree of arrays
        `[length, ...]`. By default the examples are the values.

    Returns:
      `batch -> counts`, a drjax program over the clients of its batch; the counts are
      int32 `[bins]`.

    Raises:
      ValueError: if the edges decrease or there are fewer than two; by the program, if
        there is not one value per example.

    Example:
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0, 5.0], "bob": [7.0]})
      >>> print(federated.histogram([0, 3, 5, 7])(federated.batch_of(data, [0, 1])))
      [1 1 2]
    """
    edges = np.asarray(edges)
    if edges.ndim != 1 or len(edges) < 2 or not (edges[:-1] <= edges[1:]).all():
        raise ValueError(
            "federated.histogram: the edges are two numbers or more that do not "
            f"decrease, [bins + 1], but got {edges}. Usually they are not sorted."
        )

    def run(batch):
        def of_client(batch):
            values = _value("federated.histogram", fn, batch)
            is_below = _below(values, edges) & batch.mask[:, None]
            return jnp.diff(jnp.sum(is_below, axis=0, dtype=jnp.int32))

        return drjax.reduce_sum(drjax.map_fn(of_client, (batch,)))

    return over_clients(run)


def quantiles(
    qs: Any,
    low: float,
    high: float,
    *,
    rounds: int = 20,
    fn: Callable[[Any], Any] | None = None,
) -> Callable[[Batch], jax.Array]:
    """Quantiles over the examples of all clients, by bisection in rounds of counts.

    The q-quantile is the smallest value such that a part `q` of all values, or more,
    are not above it: what `numpy.quantile` calls `inverted_cdf`. In each round clients
    count their values up to the middle of where it can be, and one half of that is
    left. So the result is within `(high - low) / 2 ** (rounds + 1)` of the quantile,
    but for the rounding of float32.

    Args:
      qs: `[...]` numbers from 0, for the smallest value, to 1, for the largest.
      low, high: what the values are between. Those outside count as the nearer of the
        two, and NaN as `high`.
      rounds: of communication, after one that counts the examples; 0 at least.
      fn: `examples -> [length]`, one value per example; `examples` is a tree of arrays
        `[length, ...]`. By default the examples are the values.

    Returns:
      `batch -> quantiles`, a drjax program over the clients of its batch; the quantiles
      are float32 `[...]`. Without an example they are next to `high`.

    Raises:
      ValueError: if a `q` is not from 0 to 1, `low` is not below `high`, one of these
        is infinite, or `rounds` is negative; by the program, if there is not one value
        per example.

    Example:
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0, 5.0], "bob": [7.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> low, high = federated.quantiles([0.5, 1.0], 0, 10)(batch)
      >>> print(f"{low:.3f} {high:.3f}")
      3.000 7.000
    """
    levels = np.asarray(qs)
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(
            f"federated.quantiles: qs are from 0 to 1, but got {qs}. Usually they are "
            "percentages: divide them by 100."
        )
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"federated.quantiles: the values are between low and high, but got low "
            f"{low} and high {high}. Usually the two are in the wrong order, or "
            "infinite, which has no middle."
        )
    if operator.index(rounds) < 0:
        raise ValueError(
            f"federated.quantiles: rounds is 0 at least, but got {rounds}."
        )

    def run(batch):
        def of_client(batch):
            return _value("federated.quantiles", fn, batch)

        values = drjax.map_fn(of_client, (batch,))
        rank = _ranks(levels.ravel(), drjax.reduce_sum(batch.count))

        def halve(bounds, _):
            low, high = bounds
            middle = (low + high) / 2

            def count(values, mask):
                is_below = mask[:, None] & (values[:, None] <= middle)
                return jnp.sum(is_below, axis=0, dtype=jnp.int32)

            counts = drjax.reduce_sum(drjax.map_fn(count, (values, batch.mask)))
            is_low = counts >= rank
            return (jnp.where(is_low, low, middle), jnp.where(is_low, middle, high)), 0

        start = jnp.full(levels.size, low, jnp.float32)
        stop = jnp.full(levels.size, high, jnp.float32)
        (start, stop), _ = lax.scan(halve, (start, stop), length=rounds)
        return ((start + stop) / 2).reshape(levels.shape)

    return over_clients(run)


def _ranks(levels: np.ndarray, total: jax.Array) -> jax.Array:
    """`max(1, ceil(level * total))`: int32 `[levels]`.

    Levels are rounded down to multiples of 2**-30, so that a tenth of 10 is 1 and not a
    little more, and products are taken in two digits of 15 bits: float32 has too few.
    """
    # What is printed: 0.1 in float32 is meant to be a tenth.
    parts = np.array([math.floor(float(str(x)) * 2**30) for x in levels], np.uint32)
    high, low = parts >> 15, parts & 0x7FFF
    total = total.astype(jnp.uint32)
    total_high, total_low = total >> 15, total & 0x7FFF
    # (high 2^15 + low) (total_high 2^15 + total_low) / 2^30, rounded up.
    last = low * total_low
    middle = high * total_low + low * total_high + (last >> 15)
    rest = (middle & 0x7FFF) | (last & 0x7FFF)
    rank = high * total_high + (middle >> 15) + (rest > 0)
    return jnp.maximum(rank, 1).astype(jnp.int32)


def _below(values: jax.Array, edges: np.ndarray) -> jax.Array:
    """Which values are below each edge, or at the last: bool `[length, bins + 1]`."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        floats = jnp.promote_types(values.dtype, jnp.float32)
        values, edges = values.astype(floats)[:, None], edges.astype(floats)
        return jnp.concatenate([values < edges[:-1], values <= edges[-1:]], axis=1)
    # JAX would cut edges to the 32 bits of the values, or round both to floats. An
    # integer is below an edge if it is not above the largest one that is.
    low, high = jnp.iinfo(values.dtype).min, jnp.iinfo(values.dtype).max
    *rest, last = (min(max(edge, low - 1), high + 1) for edge in edges.tolist())
    largest = [*(math.ceil(edge) - 1 for edge in rest), math.floor(last)]
    is_any = np.array([x >= low for x in largest])
    tops = np.array([min(max(x, low), high) for x in largest], values.dtype)
    is_below = values[:, None] <= tops
    return is_below if is_any.all() else is_below & is_any  # Usually nothing to send.


#
# Their parts.
#
def over_clients(run: Callable[..., Any]) -> Callable[..., Any]:
    """A program over the clients of a batch, which is its last argument."""

    def of_batch(*args):
        return drjax.program(clients=len(args[-1].count))(run)(*args)

    return of_batch


def without_padding(batch: Any) -> Any:
    """A client's data, with its first example in place of padding.

    There what is asked of an example, or its derivative, may not be finite, and zero
    times that would not be zero.
    """
    index = whole(batch.count, len(batch.mask)).index
    return jax.tree.map(lambda x: x[index], batch.data)


def _value(call: str, fn: Callable[[Any], Any] | None, batch: Any) -> jax.Array:
    """One value per example of a client: `[length]`."""
    value = batch.data if fn is None else fn(batch.data)
    if not jax.tree_util.all_leaves([value]):
        raise ValueError(
            f"{call}: expected one array of values, but got a tree: "
            f"{jax.tree.map(jnp.shape, value)}. Usually the examples are one: say with "
            "fn which value of an example is meant."
        )
    check_rows(call, value, batch.mask.shape)
    return value


def check_rows(
    call: str, values: Any, shape: tuple[int, ...], more: bool = False
) -> None:
    """Checks that there is one value per example, or with `more`, one row."""
    for path, x in jax.tree.leaves_with_path(values):
        got = jnp.shape(x)
        if (got[: len(shape)] if more else got) != shape:
            name = jax.tree_util.keystr(path) or "the values"
            raise ValueError(
                f"{call}: expected one value per example, {list(shape)}, but {name} "
                f"has shape {list(got)}. Usually the mean over the examples is taken "
                "already: leave that out."
            )


def masked_sum(values: Any, mask: jax.Array) -> jax.Array:
    """The sum over a client's examples, without padding: `[length, ...] -> [...]`."""
    dtype = jnp.result_type(values)
    is_inexact = jnp.issubdtype(dtype, jnp.inexact)
    least = jnp.float32 if is_inexact else jnp.result_type(float)
    dtype = jnp.promote_types(dtype, least)
    mask = mask.reshape(-1, *[1] * (jnp.ndim(values) - 1))
    return jnp.sum(jnp.where(mask, values, 0), axis=0, dtype=dtype)


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, 1)
