"""Federated averaging that learns its learning rates and its momentum on the way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

import drjax
from federated._algorithm import Algorithm
from federated._averaging import averaged, gradient_of_sum, training, weights_by
from federated._local import (
    Loss,
    check_counts,
    checked,
    checked_params,
)

CLIENT, SERVER, MOMENTUM = "client_learning_rate", "server_learning_rate", "momentum"
# Without momentum of its own: rates should follow the model without delay.
ADAM = optax.adam(0.1, b1=0.0)


class State(NamedTuple):
    """What the server keeps: the model, and by name what it learns beside it.

    That are the logarithms of the rates and the logit of the momentum, in `hyper`. The
    tangents are the derivatives of the parameters by them, through the last round.
    """

    params: Any
    velocity: Any
    hyper: dict[str, Any]
    tangents: dict[str, Any]
    hyper_optimizer: Any


def self_tuning_fedavg(
    loss: Loss,
    *,
    client_learning_rate: Any = 0.5,
    server_learning_rate: Any = 1.0,
    momentum: Any = 0.9,
    learn_client_rate: bool = True,
    hyper_optimizer: optax.GradientTransformation = ADAM,
    epochs: int = 1,
    batch_size: int,
    weighting: str = "examples",
) -> Algorithm:
    """Makes federated averaging that learns its two learning rates and its momentum.

    Clients train by SGD, and the server steps along their mean change with momentum.
    The parameters after a round are a differentiable function of the two rates and the
    momentum. The clients of the next round, before they train, give the gradient of
    their loss at these parameters. With it the server has the derivative of the loss of
    a second cohort by all three, and no client more is contacted. The optimizer takes a
    step along it, on the logarithms of the rates and the logit of the momentum.

    A client is sent the parameters, the client learning rate and the round's key. It
    sends back what it changed, the derivative of that by the client learning rate, the
    gradient, and three numbers at most: three models, where `fedavg` has one. Without
    `learn_client_rate` it sends what it changed and no other model. The server takes
    that for the gradient, which is what it is to the server, and learns its own rate
    and the momentum at the cost of `fedavg`.

    A hypergradient looks one round ahead. So rates that are too large come down in a
    few rounds, and those that are too small go up slowly: start high.

    The metrics are those of `fedavg` and, as the round used them,
    `client_learning_rate`, `server_learning_rate` and `momentum`.

    Args:
      loss: as for `fedavg`.
      client_learning_rate: where that of the clients starts. All three starts may be
        traced values.
      server_learning_rate: where that of the server starts.
      momentum: where that of the server starts, between 0 and 1.
      learn_client_rate: whether that of the clients is learned too.
      hyper_optimizer: what makes steps of hypergradients, which come as a dictionary by
        these three names, or two.
      epochs: as for `fedavg`.
      batch_size: as for `fedavg`.
      weighting: as for `fedavg`, for the gradient too.

    Returns:
      An `Algorithm`. Its state is a named tuple whose first part is `params`.

    Raises:
      ValueError: as `fedavg`, and if a rate or the momentum cannot be where it starts.
      TypeError: as `fedavg`.

    Example:
      >>> import jax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x - w) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> tuning = federated.self_tuning_fedavg(
      ...     loss, client_learning_rate=0.01, batch_size=2
      ... )
      >>> state, run_round = tuning.init(0.0), jax.jit(tuning.round)
      >>> for i in range(4):
      ...     state, metrics = run_round(state, batch, jax.random.key(i))
      ...     print(f"{metrics['client_learning_rate']:.4f} {state.params:.2f}")
      0.0100 0.06
      0.0100 0.19
      0.0115 0.42
      0.0131 0.77

    References:
      Rush et al., Federated Automatic Differentiation, arXiv:2301.07806. One step
      ahead: Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent,
      arXiv:1703.04782. Why that is short-sighted: Wu et al., Understanding
      Short-Horizon Bias in Stochastic Meta-Optimization, arXiv:1803.02021.
    """
    call = "federated.self_tuning_fedavg"
    check_counts(call, epochs=epochs, batch_size=batch_size)
    weights_of, loss = weights_by(call, weighting), checked(call, loss)
    starts = {
        CLIENT: _log(call, CLIENT, client_learning_rate),
        SERVER: _log(call, SERVER, server_learning_rate),
        MOMENTUM: _logit(call, momentum),
    }
    learned = [CLIENT, SERVER, MOMENTUM] if learn_client_rate else [SERVER, MOMENTUM]

    def init(params):
        params = checked_params(call, params)
        zeros = optax.tree.zeros_like(params)
        hyper = {name: jnp.asarray(starts[name], float) for name in learned}
        tangents = dict.fromkeys(learned, zeros)
        return State(params, zeros, hyper, tangents, hyper_optimizer.init(hyper))

    def mean_update(log_rate, params, batch, key):
        """What the cohort changes at a client learning rate, and metrics."""
        sgd = optax.sgd(jnp.exp(log_rate))
        update_of = training(call, loss, sgd, epochs, batch_size)

        def client_update(own):
            return update_of(params, own, jax.random.fold_in(key, own.client))

        updates, losses = drjax.map_fn(client_update, (batch,))
        return averaged(updates, weights_of(batch.count), losses, batch.count)

    def mean_gradient(params, batch):
        """The gradient of the cohort's loss."""
        weights = weights_of(batch.count)

        grads, _ = gradient_of_sum(loss, params, batch, weights)
        weight = jnp.maximum(drjax.reduce_sum(weights), 1)
        return _times(1 / weight, grads)

    def round(state, batch, key):
        @drjax.program(clients=len(batch.count))
        def run(state, batch, key):
            def by_rate(log_rate):
                return mean_update(log_rate, state.params, batch, key)

            log_rate = state.hyper.get(CLIENT, starts[CLIENT])
            if learn_client_rate:
                update, by_log_rate, metrics = jax.jvp(
                    by_rate, (log_rate,), (jnp.ones_like(log_rate),), has_aux=True
                )
                grads = mean_gradient(state.params, batch)
            else:
                update, metrics = by_rate(log_rate)
                grads, by_log_rate = update, None

            def wide(tree):  # Halves do not hold sums over all parameters.
                return optax.tree.cast(tree, float)

            hypergradient = {
                name: optax.tree.vdot(wide(grads), wide(tangent))
                for name, tangent in state.tangents.items()
            }
            steps, hyper_state = hyper_optimizer.update(
                hypergradient, state.hyper_optimizer, state.hyper
            )
            hyper: Any = optax.apply_updates(state.hyper, steps)
            rate, momentum = jnp.exp(hyper[SERVER]), jax.nn.sigmoid(hyper[MOMENTUM])
            velocity = optax.tree.add(update, _times(momentum, state.velocity))
            params = optax.tree.add(state.params, _times(-rate, velocity))
            # By the logarithm of a rate: its own derivative times the rate. By the
            # logit: that by the momentum times momentum (1 - momentum).
            by_logit = rate * momentum * (1 - momentum)
            tangents = {
                SERVER: _times(-rate, velocity),
                MOMENTUM: _times(-by_logit, state.velocity),
            }
            if learn_client_rate:
                tangents[CLIENT] = _times(-rate, by_log_rate)
            used = {CLIENT: jnp.exp(log_rate), SERVER: rate, MOMENTUM: momentum}
            new = State(params, velocity, hyper, tangents, hyper_state)
            return new, {**metrics, **used}

        return run(state, batch, key)

    return Algorithm(init, round, lambda state: state.params)


def _times(factor: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _log(call: str, name: str, rate: Any) -> Any:
    if not isinstance(rate, Tracer) and not np.all(np.asarray(rate) > 0):
        raise ValueError(
            f"{call}: {name} is {rate!r}, but it has to be above 0: what is learned is "
            "its logarithm."
        )
    return jnp.log(rate)


def _logit(call: str, momentum: Any) -> Any:
    if not isinstance(momentum, Tracer) and not 0 < momentum < 1:
        raise ValueError(
            f"{call}: momentum is {momentum!r}, but it has to be between 0 and 1, "
            "without these: what is learned is its logit. For little, start at 0.1."
        )
    return jnp.log(momentum) - jnp.log1p(-momentum)
