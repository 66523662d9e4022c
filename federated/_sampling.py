"""Which clients take part in a round: functions of the seed and the round alone."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# `(seed, round, data, size) -> int [size]`: the indices of distinct clients.
Sampler = Callable[[int, int, Any, int], np.ndarray]


def generator(what: str, *numbers: int) -> np.random.Generator:
    """A generator that these numbers determine; other uses draw other numbers."""
    return np.random.default_rng([*what.encode(), *numbers])


def uniform(seed: int, round: int, data: Any, size: int) -> np.ndarray:
    """Samples clients uniformly, each at most once in a round.

    Args:
      seed: of the run.
      round: number of the round.
      data: a `ClientData`.
      size: how many clients.

    Returns:
      int `[size]`, indices of clients.

    Example:
      >>> import federated
      >>> data = federated.from_mapping({name: [0.0] for name in "abcdef"})
      >>> cohort = federated.uniform(seed=0, round=1, data=data, size=3)
      >>> len(set(cohort.tolist()))
      3
    """
    return generator("uniform", seed, round).choice(len(data), size, replace=False)


def weighted(seed: int, round: int, data: Any, size: int) -> np.ndarray:
    """Samples clients one after the other, with chances as their numbers of examples.

    A client is taken at most once in a round, and never if it has no example. The ones
    with the smallest of exponential times, with these numbers as rates, come first in
    just that way.

    Args:
      seed, round, data, size: as of `uniform`.

    Returns:
      int `[size]`, indices of clients.

    Raises:
      ValueError: if fewer than `size` clients have examples.

    References:
      Efraimidis, Spirakis, Weighted random sampling with a reservoir, 2006.
    """
    counts = np.asarray(data.num_examples, np.float64)
    if (with_some := np.count_nonzero(counts)) < size:
        raise ValueError(
            f"federated.weighted: {size} clients are to be sampled, but only "
            f"{with_some} have examples."
        )
    with np.errstate(divide="ignore"):
        times = (
            generator("weighted", seed, round).exponential(size=len(counts)) / counts
        )
    first = np.argpartition(times, size - 1)[:size]
    return first[np.argsort(times[first])]


def shuffled(seed: int, round: int, data: Any, size: int) -> np.ndarray:
    """Goes through all clients in a random order, then in another one.

    So no client takes part again before the others have. If the number of clients is
    not a multiple of `size`, the last ones of an order are left out.

    Args:
      seed, round, data, size: as of `uniform`.

    Returns:
      int `[size]`, indices of clients.
    """
    pass_, k = divmod(round - 1, len(data) // size)
    return _order(seed, pass_, len(data))[k * size : (k + 1) * size]


@functools.lru_cache(maxsize=2)  # One is of use for many rounds.
def _order(seed: int, pass_: int, n: int) -> np.ndarray:
    return generator("shuffled", seed, pass_).permutation(n)
