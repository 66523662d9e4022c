"""The metrics of a model: as clients tell them in a round, and on held-out examples."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import drjax
from federated._analytics import (
    check_rows,
    masked_sum,
    over_clients,
    ratio,
    without_padding,
)
from federated._batch import Batch


def evaluation(
    metrics_fn: Callable[[Any, Any], dict[str, Any]],
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Evaluates a model at the clients of a batch, in one round.

    Args:
      metrics_fn: `(params, examples) -> {name: [length]}`, of each metric one value per
        example; `examples` is a tree of arrays `[length, ...]`.

    Returns:
      `(params, batch) -> metrics`, a drjax program over the clients of its batch, which
      is differentiable in the parameters, if the metrics are, at clients without
      examples those of zeros. `name` is the mean over all examples, and `name over
      clients` the mean over the clients' own means; clients without examples are left
      out. Without any example both are zero.

    Raises:
      ValueError: by the program, if metrics are not a dict of one value per example.

    Example:
      >>> import federated
      >>> def metrics(params, examples):
      ...     return {"error": abs(examples - params)}
      >>> data = federated.from_mapping({"ann": [1.0, 3.0, 5.0], "bob": [7.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> for name, value in federated.evaluation(metrics)(3.0, batch).items():
      ...     print(f"{name}: {value:.2f}")
      error: 2.00
      error over clients: 2.67
    """

    def run(params, batch):
        def of_client(batch):
            metrics = metrics_fn(params, without_padding(batch))
            metrics = _metrics("federated.evaluation", metrics, len(batch.mask))
            sums = {name: masked_sum(x, batch.mask) for name, x in metrics.items()}
            means = {name: ratio(x, batch.count) for name, x in sums.items()}
            return sums, means, batch.count, batch.count > 0

        each = drjax.map_fn(of_client, (batch,))
        sums, means, examples, clients = drjax.reduce_sum(each)
        return {name: ratio(x, examples) for name, x in sums.items()} | {
            f"{name} over clients": ratio(x, clients) for name, x in means.items()
        }

    return over_clients(run)


def evaluate(
    metrics_fn: Callable[[Any, Any], dict[str, Any]],
    data: Any,
    *,
    batch_size: int = 1024,
) -> Callable[[Any], dict[str, float]]:
    """Evaluates a model on held-out examples: of clients, or a common test set.

    It is for simulations, as `evaluate` of `federated.run`; what clients would tell is
    `evaluation`. Examples go through the model in batches, whosever they are, so that
    memory and compilations do not depend on how many there are or how they are dealt.

    Args:
      metrics_fn: `(params, examples) -> {name: [length]}`, of each metric one value per
        example, which does not depend on the other examples; `examples` is a tree of
        arrays `[length, ...]`.
      data: a `ClientData`, or a tree of arrays `[examples, ...]`.
      batch_size: how many examples go through the model at once.

    Returns:
      `params -> metrics`, floats: `name` is the mean over all examples. For a
      `ClientData`, `name p10`, `name p50` and `name p90` are percentiles of the
      clients' own means; clients without examples are left out.

    Raises:
      ValueError: if there is no example, arrays differ in how many they have, or
        `batch_size` is not positive; by the function, if metrics are not a dict of one
        value per example.

    Example:
      >>> import federated
      >>> def metrics(params, examples):
      ...     return {"error": abs(examples - params)}
      >>> data = federated.from_mapping({"ann": [1.0, 3.0, 5.0], "bob": [7.0]})
      >>> evaluate = federated.evaluate(metrics, data)
      >>> for name, value in evaluate(3.0).items():
      ...     print(f"{name}: {value:.2f}")
      error: 2.00
      error p10: 1.60
      error p50: 2.67
      error p90: 3.73
    """
    if batch_size < 1:
        raise ValueError(
            "federated.evaluate: batch_size is a number of examples, one at least, but "
            f"got {batch_size}."
        )
    is_of_clients = hasattr(data, "num_examples")
    counts = np.asarray(data.num_examples) if is_of_clients else _pooled(data)
    total = int(counts.sum())
    if not total:
        raise ValueError(
            "federated.evaluate: the data has no example. Usually all of them are in "
            "the other part of a split."
        )
    read = data.__getitem__ if is_of_clients else lambda _: data
    size = min(batch_size, total)

    @jax.jit
    def values_of(params, examples):
        return _metrics("federated.evaluate", metrics_fn(params, examples), size)

    def run(params: Any) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        for examples, owners in _batches(read, counts, size):
            values = jax.device_get(values_of(params, examples))
            for name, value in values.items():
                of_clients = sums.setdefault(name, np.zeros(len(counts)))
                np.add.at(of_clients, owners, value[: len(owners)])
        metrics = {}
        for name, of_clients in sums.items():
            metrics[name] = float(of_clients.sum() / total)
            if is_of_clients:
                has = counts > 0
                means = of_clients[has] / counts[has]
                for p in (10, 50, 90):
                    metrics[f"{name} p{p}"] = float(np.percentile(means, p))
        return metrics

    return run


def _pooled(tree: Any) -> np.ndarray:
    """How many examples a tree has, as those of one client."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "federated.evaluate: the data is a ClientData, or a tree of arrays with a "
            f"row for each example, but got {jax.tree.map(np.shape, tree)}. Usually "
            "clients are in a dict: federated.from_mapping makes data of them."
        )
    return np.array(sizes.pop())


def _batches(
    read: Callable[[int], Any], counts: np.ndarray, size: int
) -> Iterator[tuple[Any, np.ndarray]]:
    """All examples in batches `[size, ...]`, and for each example its client.

    The last batch is padded. A client's examples may be in several batches.
    """
    pieces, owners, room = [], [], size
    for client in np.flatnonzero(counts):
        examples, start = read(int(client)), 0
        while start < counts[client]:
            stop = min(start + room, int(counts[client]))
            pieces.append(_rows(examples, slice(start, stop)))
            owners.append(np.full(stop - start, client))
            room -= stop - start
            start = stop
            if not room:
                yield _joined(pieces), np.concatenate(owners)
                pieces, owners, room = [], [], size
    if pieces:
        last = _rows(pieces[-1], slice(-1, None))
        yield _joined([*pieces, *[last] * room]), np.concatenate(owners)


def _rows(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda x: np.array(x[rows]), tree)  # A copy.


def _joined(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)


def _metrics(call: str, metrics: Any, length: int) -> dict[str, Any]:
    """The metrics, checked."""
    if not isinstance(metrics, dict):
        raise ValueError(
            f"{call}: expected metrics as a dict, {{name: [length]}}, but got a "
            f"{type(metrics).__name__}. Usually it is one metric: give it a name."
        )
    check_rows(call, metrics, (length,))
    for name, x in metrics.items():
        if jnp.iscomplexobj(x):
            raise ValueError(
                f"{call}: metrics are real numbers, but {name!r} is {x.dtype}."
            )
    return metrics
