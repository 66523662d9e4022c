"""SCAFFOLD: clients correct their steps for what pulls them apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

import drjax
from federated._algorithm import Algorithm
from federated._averaging import averaged, has_any
from federated._local import (
    Loss,
    check_counts,
    checked,
    checked_params,
    shuffled,
    train,
)


class State(NamedTuple):
    """What the server keeps: the parameters, and its control variate."""

    params: Any
    control: Any


def scaffold(
    loss: Loss,
    client_learning_rate: Any,
    server_learning_rate: Any = 1.0,
    *,
    population: int,
    epochs: int = 1,
    batch_size: int,
) -> Algorithm:
    """Makes SCAFFOLD: clients correct their steps for what pulls them apart.

    A client keeps a control variate, an estimate of its gradient; the server keeps
    their mean over the whole population. Each local step of SGD is corrected by the
    difference, so that clients which see little of the data do not drift from the
    others. They go through their examples as in `fedavg`.

    A client is sent the parameters, the server's control variate and the round's key,
    and sends back the changes of the parameters and of its own control variate, and
    three numbers: twice what `fedavg` takes, both ways. Each client that has examples
    counts the same; the others keep their control variates. The metrics are those of
    `fedavg`.

    Args:
      loss: as for `fedavg`.
      client_learning_rate: of the clients' steps; it may be a traced value.
      server_learning_rate: how far the server goes along the mean change; the same.
      population: how many clients there are in all, of which each round has some: the
        `len` of the data.
      epochs: as for `fedavg`.
      batch_size: as for `fedavg`.

    Returns:
      An `Algorithm` with states of clients. The server's state is a named tuple
      `(params, control)`; that of a client is its control variate, a tree as the
      parameters.

    Raises:
      ValueError: if `population`, `epochs`, `batch_size` or a rate cannot be; in a
        round, if `loss` does not give one number per example.
      TypeError: if parameters or losses are not floating point.

    Example:
      Two clients, of which one has a steeper loss. With control variates they stop at
      the optimum of both, -1/5, and without them elsewhere.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import federated
      >>> def loss(w, x):
      ...     return (x * w - 1) ** 2
      >>> data = federated.from_mapping({"ann": [1.0], "bob": [-3.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> options = dict(population=2, epochs=5, batch_size=1)
      >>> scaffold = federated.scaffold(loss, 0.02, **options)
      >>> state = scaffold.init(0.0)
      >>> controls = jnp.stack([scaffold.client_init(0.0)] * 2)
      >>> run_round = jax.jit(scaffold.round)
      >>> for i in range(50):
      ...     key = jax.random.key(i)
      ...     state, controls, metrics = run_round(state, controls, batch, key)
      >>> print(f"{state.params:.3f}")
      -0.200

    References:
      Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated
      Learning, arXiv:1910.06378, algorithm 1 with option II.
    """
    call = "federated.scaffold"
    check_counts(call, population=population, epochs=epochs, batch_size=batch_size)
    _check_rates(call, client_learning_rate, server_learning_rate)
    loss, sgd = checked(call, loss), optax.sgd(client_learning_rate)

    def client_init(params):
        return optax.tree.zeros_like(checked_params(call, params))

    def init(params):
        return State(checked_params(call, params), client_init(params))

    def update_of(state, control, own, key):
        """What a client takes from the parameters, adds to its control; its loss."""
        batches = shuffled(key, own.count, len(own.mask), epochs, batch_size)

        def corrected(grads, params):
            return jax.tree.map(
                lambda g, c_i, c: g - c_i + c, grads, control, state.control
            )

        trained, _, mean_loss = train(
            loss,
            sgd,
            state.params,
            sgd.init(state.params),
            own.data,
            batches,
            corrected,
        )
        update = optax.tree.sub(state.params, trained)
        steps = batches.valid.any(axis=1).sum()
        # K steps y -= rate (g - c_i + c) from x to y have a mean g of
        #   (x - y) / (K rate) + c_i - c,
        # which is the new c_i of option II.
        length = jnp.maximum(steps, 1) * client_learning_rate

        def change(u, c):
            return jnp.where(steps > 0, u / length - c, 0).astype(c.dtype)

        return update, jax.tree.map(change, update, state.control), mean_loss

    def round(state, controls, batch, key):
        @drjax.program(clients=len(batch.count))
        def run(state, controls, batch, key):
            def client_update(control, own):
                own_key = jax.random.fold_in(key, own.client)
                update, change, mean_loss = update_of(state, control, own, own_key)
                new_control = optax.tree.add(control, change)
                return update, change, new_control, mean_loss

            updates, changes, controls, losses = drjax.map_fn(
                client_update, (controls, batch)
            )
            weights = has_any(batch.count)
            update, metrics = averaged(updates, weights, losses, batch.count)
            step = jax.tree.map(lambda u: -server_learning_rate * u, update)
            # Of the population has reported:
            part = drjax.placement_size().astype(float) / population
            change = jax.tree.map(
                lambda x: (part * x).astype(x.dtype), drjax.reduce_mean(changes)
            )
            new_state = State(
                optax.apply_updates(state.params, step),
                optax.tree.add(state.control, change),
            )
            return new_state, controls, metrics

        return run(state, controls, batch, key)

    return Algorithm(init, round, lambda state: state.params, client_init)


def _check_rates(call: str, rate: Any, server_rate: Any) -> None:
    """Raises an error if a client's control variate cannot be divided by its rate."""
    if callable(server_rate):
        raise ValueError(
            f"{call}: server_learning_rate is a number, but got {server_rate!r}. A "
            "schedule over rounds is not possible here."
        )
    is_traced = isinstance(rate, Tracer)
    if callable(rate) or (not is_traced and not np.all(np.asarray(rate) > 0)):
        raise ValueError(
            f"{call}: client_learning_rate is a number above 0, which the changes of "
            f"control variates are divided by, but got {rate!r}. A schedule over a "
            "client's steps is not possible here."
        )
