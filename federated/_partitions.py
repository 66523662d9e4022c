"""Partitions of examples among clients, and splits for training and evaluation."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from federated._data import (
    ClientData,
    Clients,
    column,
    dealt,
    few_enough,
    generator,
    objects,
    positive,
    sized,
)


#
# Who gets which example.
#
def iid(tree: Any, n: int, key: Any) -> ClientData:
    """Deals examples out at random, to clients of equal sizes.

    Args:
      tree: a tree of arrays `[examples, ...]`, of which nothing is read.
      n: the number of clients.
      key: of `jax.random`.

    Returns:
      `ClientData` of clients `0` to `n - 1`, whose sizes differ by one at most.

    Raises:
      ValueError: if there are more clients than examples.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> import federated
      >>> federated.iid({"x": np.zeros((100, 8))}, 30, jax.random.key(0))
      ClientData: 30 clients, 100 examples, 3 to 4 each; x: float64[8]
    """
    call = "federated.iid"
    tree, examples = sized(call, tree)
    n = few_enough(call, n, examples, "clients")
    owners = generator(call, key).permutation(examples) % n
    return dealt(tree, owners, np.arange(n))


def dirichlet(tree: Any, labels: Any, n: int, alpha: float, key: Any) -> ClientData:
    """Deals examples out to clients that each have a class mixture of their own.

    Each client draws a mixture `q ~ Dirichlet(alpha * classes * p)`, where `p` are the
    shares of the classes in the data. Then it draws its examples without replacement:
    their classes from `q`, and of a class any that is left. When a class has run out,
    `q` goes on over the others. No client is empty, for all have the same number of
    examples, or one more.

    For `alpha` to infinity this is an IID partition; for `alpha` to 0 a client has one
    class, until few are left. For classes of equal sizes it is the symmetric
    Dirichlet(alpha) that is mostly meant; if `alpha` is to be the sum of the
    concentrations, divide it by the number of classes. A different scheme under this
    name splits each class over the clients with Dirichlet shares (arXiv:1905.12022),
    which leaves clients empty when `alpha` is small.

    Args:
      tree: a tree of arrays `[examples, ...]`, of which nothing is read.
      labels: `[examples]`, the class of each example.
      n: the number of clients.
      alpha: positive, how alike the clients are.
      key: of `jax.random`.

    Returns:
      `ClientData` of clients `0` to `n - 1`, whose sizes differ by one at most.

    Raises:
      ValueError: if there are more clients than examples, or `alpha` is not positive.

    References:
      Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated
      Visual Classification, arXiv:1909.06335.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> import federated
      >>> y = np.arange(1000) % 10
      >>> data = federated.dirichlet({"y": y}, y, 20, 0.1, jax.random.key(0))
      >>> data
      ClientData: 20 clients, 1,000 examples, 50 to 50 each; y: int64[]
    """
    call = "federated.dirichlet"
    tree, examples = sized(call, tree)
    n = few_enough(call, n, examples, "clients")
    classes = _classes(call, labels, examples)
    if not 0 < alpha < np.inf:
        raise ValueError(f"{call}: alpha is {alpha}; it must be positive and finite.")
    rng = generator(call, key)
    left = np.bincount(classes)
    a = alpha * len(left) * left / examples
    # A Dirichlet variate is one of Gamma(a)s over their sum. Gamma(a) is Gamma(a + 1)
    # times U^(1/a) for uniform U; as a logarithm it does not underflow for small a.
    logits = np.log(rng.standard_gamma(a + 1, (n, len(a))))
    logits -= rng.standard_exponential((n, len(a))) / a

    counts = np.zeros((n, len(a)), np.int64)
    for i in range(n):
        missing = examples // n + (i < examples % n)
        while missing:
            q = np.where(left > 0, logits[i], -np.inf)
            q = np.exp(q - q.max())
            drawn = np.minimum(rng.multinomial(missing, q / q.sum()), left)
            counts[i] += drawn
            left -= drawn
            missing -= drawn.sum()

    shuffled = rng.permutation(examples)
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    owners = np.empty(examples, np.int64)
    owners[by_class] = np.repeat(np.tile(np.arange(n), len(a)), counts.T.ravel())
    return dealt(tree, owners, np.arange(n))


def label_shards(
    tree: Any, labels: Any, n: int, shards_per_client: int, key: Any
) -> ClientData:
    """Deals out shards of examples sorted by class: most clients have few classes.

    Args:
      tree: a tree of arrays `[examples, ...]`, of which nothing is read.
      labels: `[examples]`, the class of each example.
      n: the number of clients.
      shards_per_client: how many shards each client gets; McMahan et al. have 2. The
        sorted examples are cut into `n * shards_per_client` of them.
      key: of `jax.random`.

    Returns:
      `ClientData` of clients `0` to `n - 1`. Sizes of shards differ by one at most.

    Raises:
      ValueError: if there are more shards than examples.

    References:
      McMahan et al., Communication-Efficient Learning of Deep Networks from
      Decentralized Data, arXiv:1602.05629.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> import federated
      >>> y = np.arange(1000) % 10
      >>> data = federated.label_shards({"y": y}, y, 50, 2, jax.random.key(0))
      >>> max(len(np.unique(data[i]["y"])) for i in range(50))
      2
    """
    call = "federated.label_shards"
    tree, examples = sized(call, tree)
    n = few_enough(call, n, examples, "clients")
    shards = n * positive(call, "shards_per_client", shards_per_client)
    few_enough(call, shards, examples, "shards")
    classes = _classes(call, labels, examples)
    holders = generator(call, key).permutation(shards) // shards_per_client
    owners = np.empty(examples, np.int64)
    owners[np.argsort(classes, kind="stable")] = holders[
        np.arange(examples) * shards // examples
    ]
    return dealt(tree, owners, np.arange(n))


def _classes(call: str, labels: Any, examples: int) -> np.ndarray:
    """The class of each example, as a number from 0."""
    labels = column(call, "labels", np.asarray(labels), examples)
    return np.unique(labels, return_inverse=True)[1]


#
# Which clients, and which of their examples, are for training.
#
def split_clients(
    data: ClientData, fractions: Sequence[float], key: Any
) -> tuple[ClientData, ...]:
    """Splits clients at random, as into those for training, validation and test.

    Args:
      data: the data of all.
      fractions: positive, of sum 1: the share of the clients in each part.
      key: of `jax.random`.

    Returns:
      A tuple of `ClientData`, one for each fraction. Each client is in one of them;
      clients keep their order.

    Raises:
      ValueError: if the fractions do not add up to 1, or a part is left without client.

    Example:
      >>> import jax
      >>> import federated
      >>> data = federated.from_mapping({i: [float(i)] for i in range(50)})
      >>> parts = federated.split_clients(data, (0.8, 0.1, 0.1), jax.random.key(0))
      >>> [len(part) for part in parts]
      [40, 5, 5]
    """
    call = "federated.split_clients"
    if min(fractions, default=0) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"{call}: the fractions are {[*fractions]}; they must be positive and add "
            "up to 1."
        )
    ends = np.rint(np.cumsum(fractions) * len(data)).astype(int)
    parts = np.split(generator(call, key).permutation(len(data)), ends[:-1])
    if not all(map(len, parts)):
        raise ValueError(
            f"{call}: the fractions {[*fractions]} of {len(data)} clients are "
            f"{[*map(len, parts)]}. Each part needs a client: give more clients, or "
            "larger fractions."
        )
    return tuple(data.select(np.sort(part)) for part in parts)


def hold_out(data: ClientData, fraction: float) -> tuple[ClientData, ClientData]:
    """Holds out the last examples of every client.

    Args:
      data: the data of all.
      fraction: between 0 and 1, the share of a client's examples to hold out, rounded
        down to whole ones.

    Returns:
      The `ClientData` of the first examples, and that of the held-out ones, both of all
      clients in the same order. A client with few examples has none held out.

    Raises:
      ValueError: if the fraction is not between 0 and 1.

    Example:
      >>> import federated
      >>> data = federated.from_mapping(
      ...     {"ann": [1.0, 2.0, 3.0, 4.0, 5.0], "bob": [6.0]}
      ... )
      >>> train, held_out = federated.hold_out(data, 0.2)
      >>> train[0], held_out[0], held_out[1]
      (array([1., 2., 3., 4.]), array([5.]), array([], dtype=float64))
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"federated.hold_out: the fraction is {fraction}; it must be between 0 and "
            "1, both excluded."
        )
    counts = np.asarray(data.num_examples, np.int64)
    # The product may come out just under a whole number: 0.29 * 100 does.
    held = np.floor(fraction * counts + 1e-6).astype(np.int64)
    kept = counts - held

    def first(i: int) -> Any:
        return jax.tree.map(lambda x: x[: kept[i]], data[i])

    def last(i: int) -> Any:
        return jax.tree.map(lambda x: x[kept[i] :], data[i])

    ids = objects(data.ids) if not isinstance(data.ids, np.ndarray) else data.ids
    return Clients(ids, kept, first), Clients(ids, held, last)
