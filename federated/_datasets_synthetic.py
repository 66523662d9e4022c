"""Synthetic classification data, as published with FedProx."""

from typing import Any

import numpy as np

from federated._data import ClientData, from_function, generator, positive

_INPUTS, _OUTPUTS = 60, 10


def synthetic(alpha: float, beta: float, n: int, key: Any) -> ClientData:
    """Synthetic(alpha, beta): classification that differs from client to client.

    Client `k` draws `u ~ N(0, alpha)` and `B ~ N(0, beta)`; a model of its own, `W` and
    `b` with entries from `N(u, 1)`; and a centre `v` with entries from `N(B, 1)`. Its
    inputs are `x ~ N(v, S)`, where `S` is diagonal with `S[j, j] = j**-1.2`, and labels
    `y = argmax(W x + b)`. So `beta` says how much the inputs of clients differ; both
    are variances. `alpha` is here as published, but changes no label: `u` adds the same
    to the logits of all classes, and the models differ as much without it.

    Sizes are those of the paper's code, where a power law is spoken of: `50 + z`
    examples, where `z` is lognormal, rounded down, with the mean 4 and the deviation 2
    of its logarithm. The median client has about 100, and the largest of a thousand
    tens of thousands.

    A client's examples are drawn when it is asked for, the same ones each time, so that
    a population of any size takes no memory.

    Args:
      alpha: not negative. The paper has (0, 0), (0.5, 0.5) and (1, 1).
      beta: not negative.
      n: the number of clients; the paper has 30.
      key: of `jax.random`.

    Returns:
      `ClientData`, with examples of `x` float32 `[examples, 60]` and `y` int32
      `[examples]`, one of 10 classes.

    Raises:
      ValueError: if a variance is negative, or `n` less than 1.

    References:
      Li et al., Federated Optimization in Heterogeneous Networks, arXiv:1812.06127.

    Example:
      >>> import jax
      >>> from federated import datasets
      >>> data = datasets.synthetic(1, 1, 30, jax.random.key(0))
      >>> data[0]["x"].shape == (data.num_examples[0], 60)
      True
    """
    call = "federated.datasets.synthetic"
    if not (0 <= alpha < np.inf and 0 <= beta < np.inf):
        raise ValueError(
            f"{call}: alpha is {alpha} and beta {beta}; they are variances, from 0."
        )

    def model(rng: np.random.Generator) -> tuple[Any, Any, Any]:
        u, center = rng.normal(0, np.sqrt(alpha)), rng.normal(0, np.sqrt(beta))
        w, b = rng.normal(u, 1, (_INPUTS, _OUTPUTS)), rng.normal(u, 1, _OUTPUTS)
        return w, b, rng.normal(center, 1, _INPUTS)

    return _drawn(call, n, generator(call, key), model)


def synthetic_iid(n: int, key: Any) -> ClientData:
    """The counterpart of `synthetic` in which all clients are alike.

    All have the same model, with entries from `N(0, 1)`, and inputs around 0.

    Args:
      n: the number of clients; the paper has 30.
      key: of `jax.random`.

    Returns:
      `ClientData`, as of `synthetic`.

    Raises:
      ValueError: if `n` is less than 1.

    References:
      Li et al., Federated Optimization in Heterogeneous Networks, arXiv:1812.06127.

    Example:
      >>> import jax
      >>> from federated import datasets
      >>> len(datasets.synthetic_iid(30, jax.random.key(0)))
      30
    """
    call = "federated.datasets.synthetic_iid"
    rng = generator(call, key)
    w, b = rng.normal(size=(_INPUTS, _OUTPUTS)), rng.normal(size=_OUTPUTS)
    return _drawn(call, n, rng, lambda _: (w, b, np.zeros(_INPUTS)))


def _drawn(call: str, n: int, rng: np.random.Generator, model: Any) -> ClientData:
    """Clients whose inputs, around a centre, are labelled by a model, both drawn."""
    positive(call, "the number of clients", n)
    counts = 50 + rng.lognormal(4, 2, n).astype(np.int64)
    (seed,) = rng.integers(2**63, size=1)
    deviations = np.arange(1, _INPUTS + 1) ** -0.6

    def examples(i: int) -> Any:
        rng = np.random.default_rng([seed, i])
        w, b, center = model(rng)
        x = center + deviations * rng.standard_normal((counts[i], _INPUTS))
        labels = np.argmax(x @ w + b, axis=1)
        return {"x": x.astype(np.float32), "y": labels.astype(np.int32)}

    return from_function(n, counts, examples)
