"""Algorithms of clients that keep nothing: the server averages what they changed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import drjax
from federated._algorithm import Algorithm
from federated._batch import Batch
from federated._local import (
    Loss,
    check_counts,
    checked,
    checked_params,
    mean_loss,
    shuffled,
    train,
    whole,
)

# With it the new parameters are the clients' mean.
MEAN = optax.sgd(1.0)


def fedsgd(
    loss: Loss,
    server_optimizer: optax.GradientTransformation,
    *,
    weighting: str = "examples",
) -> Algorithm:
    """Makes federated SGD: each client gives the gradient of all its examples.

    A client is sent the parameters, and sends back a gradient, of their size, and three
    numbers at most; both are float32 if the parameters are halves. The metrics are
    `loss`, the mean over the examples, and `update_norm`, the norm of the mean
    gradient.

    Args:
      loss: `(params, examples) -> [batch]`, the loss of each example, where the leaves
        of `examples` are `[batch, ...]`. The batch is all that a client has. A client
        without examples is asked about zeros, where it is to have a gradient.
      server_optimizer: what the server does with the mean gradient.
      weighting: `"examples"` for a mean in which each example counts the same, or
        `"clients"` for one in which each client that has any does.

    Returns:
      An `Algorithm`. Its state is a named tuple `(params, optimizer)`.

    Raises:
      ValueError: if `weighting` is unknown; in a round, if `loss` does not give one
        number per example.
      TypeError: if parameters or losses are not floating point.

    Example:
      >>> import jax
      >>> import optax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x - w) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> fedsgd = federated.fedsgd(loss, optax.sgd(0.5))
      >>> state, metrics = fedsgd.round(fedsgd.init(0.0), batch, jax.random.key(0))
      >>> print(fedsgd.params(state), metrics["update_norm"])
      3.0 6.0

    References:
      McMahan et al., Communication-Efficient Learning of Deep Networks from
      Decentralized Data, arXiv:1602.05629.
    """
    call = "federated.fedsgd"
    weights_of = weights_by(call, weighting)
    loss = checked(call, loss)

    def round(state, batch, key):
        @drjax.program(clients=len(batch.count))
        def run(state, batch):
            weights = weights_of(batch.count)
            grads, total = gradient_of_sum(loss, state.params, batch, weights)
            weight, met = drjax.reduce_sum((weights, batch.count))
            update = jax.tree.map(
                lambda g, x: (g / jnp.maximum(weight, 1)).astype(x.dtype),
                grads,
                state.params,
            )
            metrics = metrics_of(update, total / jnp.maximum(met, 1))
            return stepped(server_optimizer, state, update), metrics

        return run(state, batch)

    return stateless(call, server_optimizer, round)


def gradient_of_sum(
    loss: Loss, params: Any, batch: Batch, weights: Any
) -> tuple[Any, Any]:
    """The gradient of the clients' weighted mean losses, summed, and all losses' sum.

    As that of a sum over clients: drjax makes it one product over the examples of many
    of them, where clients' own gradients would be many. It is float32, if parameters
    are halves, which hold no such sums.
    """

    def objective(wide: Any) -> tuple[Any, Any]:
        def client_loss(own: Any, weight: Any) -> tuple[Any, Any]:
            examples = whole(own.count, len(own.mask))
            own_params = jax.tree.map(
                lambda x, like: x.astype(like.dtype), wide, params
            )
            mean, total = mean_loss(loss, own_params, own.data, examples)
            return weight * mean, total

        weighted, totals = drjax.map_fn(client_loss, (batch, weights))
        return drjax.reduce_sum(weighted), drjax.reduce_sum(totals)

    wide = jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params
    )
    return jax.grad(objective, has_aux=True)(wide)


def fedavg(
    loss: Loss,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = MEAN,
    *,
    epochs: int = 1,
    batch_size: int,
    weighting: str = "examples",
) -> Algorithm:
    """Makes federated averaging: clients train, and the server averages the changes.

    A client is sent the parameters and the round's key. It trains on its examples, in
    each epoch in another order, and sends back what it changed, of the size of the
    parameters, and three numbers at most. To the server, the mean change is a gradient.

    The last minibatch of an epoch has what remains. A client's optimizer starts anew in
    each round. The metrics are `loss`, the mean over the examples as clients met them
    in training, and `update_norm`, the norm of the mean change.

    Args:
      loss: `(params, examples) -> [batch]`, the loss of each example, where the leaves
        of `examples` are `[batch, ...]`. It is asked about examples only, not about
        padding, except at clients that have none.
      client_optimizer: of the clients. Learning rates may be traced values, here and at
        the server.
      server_optimizer: of the server; by default the new parameters are the mean of
        the clients'.
      epochs: how many times a client goes through its examples.
      batch_size: how many examples a minibatch has.
      weighting: `"examples"` for a mean in which each example counts the same, or
        `"clients"` for one in which each client that has any does.

    Returns:
      An `Algorithm`. Its state is a named tuple `(params, optimizer)`.

    Raises:
      ValueError: if `epochs`, `batch_size` or `weighting` cannot be; in a round, if
        `loss` does not give one number per example.
      TypeError: if parameters or losses are not floating point.

    Example:
      >>> import jax
      >>> import optax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x - w) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> fedavg = federated.fedavg(loss, optax.sgd(0.1), epochs=9, batch_size=2)
      >>> state, run_round = fedavg.init(0.0), jax.jit(fedavg.round)
      >>> for i in range(3):
      ...     state, metrics = run_round(state, batch, jax.random.key(i))
      ...     print(f"{state.params:.3f}")
      2.597
      2.946
      2.993

    References:
      McMahan et al., Communication-Efficient Learning of Deep Networks from
      Decentralized Data, arXiv:1602.05629. With optimizers on both sides: Reddi et al.,
      Adaptive Federated Optimization, arXiv:2003.00295, algorithm 1.
    """
    call = "federated.fedavg"
    update = training(call, loss, client_optimizer, epochs, batch_size)
    return averaging(call, update, server_optimizer, weighting)


def fedprox(
    loss: Loss,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = MEAN,
    *,
    mu: float,
    epochs: int = 1,
    batch_size: int,
    weighting: str = "examples",
) -> Algorithm:
    """Makes FedProx: federated averaging in which clients are held near the start.

    A client minimises its loss plus `mu / 2` times the squared distance from the
    parameters that it was sent. All else is as in `fedavg`, the communication too; the
    metric `loss` is without that term.

    Args:
      loss: as for `fedavg`.
      client_optimizer: as for `fedavg`.
      server_optimizer: as for `fedavg`.
      mu: how strongly clients are held, which may be a traced value. With 0 it is
        `fedavg`.
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
      >>> for mu in (0.0, 4.0):
      ...     sgd = optax.sgd(0.1)
      ...     fedprox = federated.fedprox(loss, sgd, mu=mu, epochs=9, batch_size=2)
      ...     state, _ = fedprox.round(fedprox.init(0.0), batch, jax.random.key(0))
      ...     print(f"{state.params:.3f}")
      2.597
      1.000

    References:
      Li et al., Federated Optimization in Heterogeneous Networks, arXiv:1812.06127.
    """
    call = "federated.fedprox"
    update = training(call, loss, client_optimizer, epochs, batch_size, mu)
    return averaging(call, update, server_optimizer, weighting)


#
# What these algorithms and others are made of.
#
class State(NamedTuple):
    """What the server keeps."""

    params: Any
    optimizer: Any


def averaging(
    call: str,
    update_of: Callable[[Any, Batch, Any], tuple[Any, Any]],
    server_optimizer: optax.GradientTransformation,
    weighting: str,
) -> Algorithm:
    """An algorithm of clients that run `(params, own, key) -> (update, mean loss)`."""
    weights_of = weights_by(call, weighting)

    def round(state, batch, key):
        @drjax.program(clients=len(batch.count))
        def run(state, batch, key):
            def client_update(own):
                own_key = jax.random.fold_in(key, own.client)
                return update_of(state.params, own, own_key)

            updates, losses = drjax.map_fn(client_update, (batch,))
            weights = weights_of(batch.count)
            update, metrics = averaged(updates, weights, losses, batch.count)
            return stepped(server_optimizer, state, update), metrics

        return run(state, batch, key)

    return stateless(call, server_optimizer, round)


def stateless(
    call: str,
    server_optimizer: optax.GradientTransformation,
    round: Callable[[State, Batch, Any], tuple[State, Any]],
) -> Algorithm:
    """An algorithm of clients that keep nothing."""

    def init(params):
        params = checked_params(call, params)
        return State(params, server_optimizer.init(params))

    return Algorithm(init, round, lambda state: state.params)


def weights_by(call: str, weighting: str) -> Callable[[Any], Any]:
    """A function from the clients' numbers of examples to their weights."""
    if weighting == "examples":
        return lambda count: count
    if weighting == "clients":
        return has_any
    raise ValueError(
        f"{call}: weighting is {weighting!r}, but it has to be 'examples', for a mean "
        "in which each example counts the same, or 'clients', for one in which each "
        "client does."
    )


def training(
    call: str,
    loss: Loss,
    client_optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    mu: Any = None,
) -> Callable[[Any, Batch, Any], tuple[Any, Any]]:
    """What a client does in federated averaging."""
    check_counts(call, epochs=epochs, batch_size=batch_size)
    loss = checked(call, loss)

    def update_of(params, own, key):
        def held(grads, trained):
            if mu is None:
                return grads
            # The gradient of mu / 2 |trained - params|^2.
            return jax.tree.map(
                lambda g, x, start: (g + mu * (x - start)).astype(g.dtype),
                grads,
                trained,
                params,
            )

        batches = shuffled(key, own.count, len(own.mask), epochs, batch_size)
        start = params, client_optimizer.init(params)
        trained, _, mean = train(
            loss, client_optimizer, *start, own.data, batches, held
        )
        return optax.tree.sub(params, trained), mean

    return update_of


def has_any(count: Any) -> Any:
    """The weights of clients that count the same, if they have examples."""
    return jnp.minimum(count, 1)


def averaged(updates: Any, weights: Any, losses: Any, met: Any) -> tuple[Any, Any]:
    """The clients' mean update, and metrics: their losses are means of so many met."""
    update, loss = drjax.reduce_weighted_mean(
        (updates, losses), (weights, met), default=0
    )
    return update, metrics_of(update, loss)


def metrics_of(update: Any, loss: Any) -> dict[str, Any]:
    """What a round tells of itself."""
    square = optax.tree.norm(optax.tree.cast(update, float), squared=True)
    # The derivative of the root is 0 at 0 here: it meets others in loops of rounds.
    is_zero = square == 0
    norm = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    return {"loss": loss, "update_norm": norm}


def stepped(
    optimizer: optax.GradientTransformation, state: State, update: Any
) -> State:
    """The state after a step of the server's optimizer, of which it is the gradient."""
    updates, optimizer_state = optimizer.update(update, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), optimizer_state)
