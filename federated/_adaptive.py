"""Federated averaging with a server that adapts to the size of the updates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from federated._algorithm import Algorithm
from federated._averaging import averaging, training
from federated._local import Loss


def fedadam(
    loss: Loss,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    epochs: int = 1,
    batch_size: int,
    weighting: str = "examples",
) -> Algorithm:
    """Makes FedAdam: federated averaging with a server that adapts as Adam does.

    Clients do what they do in `fedavg`, and the communication and the metrics are the
    same. Bias is not corrected: instead the mean of squares starts at the square of
    `tau`.

    Args:
      loss: as for `fedavg`.
      client_optimizer: as for `fedavg`.
      server_learning_rate: a number, which may be a traced value, or a schedule of
        optax over the rounds.
      b1: how much of its mean of updates the server keeps from round to round.
      b2: the same for the mean of their squares.
      tau: added to the root of the mean of squares: the smaller, the more the server
        adapts.
      epochs: as for `fedavg`.
      batch_size: as for `fedavg`.
      weighting: as for `fedavg`.

    Returns:
      An `Algorithm`. Its state is a named tuple `(params, optimizer)`.

    Raises:
      ValueError: as `fedavg`.
      TypeError: as `fedavg`.

    Example:
      >>> import jax
      >>> import optax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x - w) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> fedadam = federated.fedadam(loss, optax.sgd(0.1), 0.1, batch_size=2)
      >>> state, run_round = fedadam.init(0.0), jax.jit(fedadam.round)
      >>> for i in range(100):
      ...     state, metrics = run_round(state, batch, jax.random.key(i))
      >>> print(f"{state.params:.1f}")
      3.0

    References:
      Reddi et al., Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2.
    """

    def squares(v, g):
        return b2 * v + (1 - b2) * g**2

    call, server = (
        "federated.fedadam",
        _adaptive(squares, server_learning_rate, b1, tau),
    )
    update = training(call, loss, client_optimizer, epochs, batch_size)
    return averaging(call, update, server, weighting)


def fedyogi(
    loss: Loss,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    epochs: int = 1,
    batch_size: int,
    weighting: str = "examples",
) -> Algorithm:
    """Makes FedYogi: federated averaging with a server that adapts as Yogi does.

    It is `fedadam` but for the mean of squares, which goes up or down by a part of the
    square of the update, and so forgets large ones more slowly.

    Args:
      loss: as for `fedavg`.
      client_optimizer: as for `fedavg`.
      server_learning_rate: as for `fedadam`.
      b1: as for `fedadam`.
      b2: the mean of squares changes by `1 - b2` of the square.
      tau: as for `fedadam`.
      epochs: as for `fedavg`.
      batch_size: as for `fedavg`.
      weighting: as for `fedavg`.

    Returns:
      An `Algorithm`. Its state is a named tuple `(params, optimizer)`.

    Raises:
      ValueError: as `fedavg`.
      TypeError: as `fedavg`.

    Example:
      >>> import jax
      >>> import optax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x - w) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> fedyogi = federated.fedyogi(loss, optax.sgd(0.1), 0.1, batch_size=2)
      >>> state, run_round = fedyogi.init(0.0), jax.jit(fedyogi.round)
      >>> for i in range(100):
      ...     state, metrics = run_round(state, batch, jax.random.key(i))
      >>> print(f"{state.params:.1f}")
      3.0

    References:
      Reddi et al., Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2.
    """

    def squares(v, g):
        return v - (1 - b2) * g**2 * jnp.sign(v - g**2)

    call, server = (
        "federated.fedyogi",
        _adaptive(squares, server_learning_rate, b1, tau),
    )
    update = training(call, loss, client_optimizer, epochs, batch_size)
    return averaging(call, update, server, weighting)


def fedadagrad(
    loss: Loss,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: Any,
    *,
    b1: float = 0.0,
    tau: float = 1e-3,
    epochs: int = 1,
    batch_size: int,
    weighting: str = "examples",
) -> Algorithm:
    """Makes FedAdagrad: federated averaging with a server that adapts as Adagrad does.

    It is `fedadam` with a sum of squares in place of their mean, and no momentum unless
    that is asked for.

    Args:
      loss: as for `fedavg`.
      client_optimizer: as for `fedavg`.
      server_learning_rate: as for `fedadam`.
      b1: as for `fedadam`.
      tau: as for `fedadam`.
      epochs: as for `fedavg`.
      batch_size: as for `fedavg`.
      weighting: as for `fedavg`.

    Returns:
      An `Algorithm`. Its state is a named tuple `(params, optimizer)`.

    Raises:
      ValueError: as `fedavg`.
      TypeError: as `fedavg`.

    Example:
      >>> import jax
      >>> import optax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x - w) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> fedadagrad = federated.fedadagrad(loss, optax.sgd(0.1), 1.0, batch_size=2)
      >>> state, run_round = fedadagrad.init(0.0), jax.jit(fedadagrad.round)
      >>> for i in range(100):
      ...     state, metrics = run_round(state, batch, jax.random.key(i))
      >>> print(f"{state.params:.1f}")
      3.0

    References:
      Reddi et al., Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2.
    """
    call = "federated.fedadagrad"
    server = _adaptive(lambda v, g: v + g**2, server_learning_rate, b1, tau)
    update = training(call, loss, client_optimizer, epochs, batch_size)
    return averaging(call, update, server, weighting)


class _Moments(NamedTuple):
    """The server's mean of updates, and what it has of their squares."""

    m: Any
    v: Any


def _adaptive(
    squares: Callable[[Any, Any], Any], learning_rate: Any, b1: Any, tau: Any
) -> optax.GradientTransformation:
    """The server's optimizer in algorithm 2 of arXiv:2003.00295.

    With the mean change of the parameters in a round, which is -g,

        m = b1 m - (1 - b1) g,   v = squares(v, g),   params += rate m / (sqrt(v) + tau)

    where v is tau^2 at first. Here m has the other sign, as optax descends. Those of
    optax are different: Adam and Yogi correct for bias and start elsewhere, Adagrad has
    no momentum and adds its constant within the root.
    """

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return _Moments(zeros, optax.tree.full_like(params, tau**2))

    def update(updates, state, params=None):
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        v = jax.tree.map(squares, state.v, updates)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v)
        return steps, optax.tree.cast_like(_Moments(m, v), state)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )
