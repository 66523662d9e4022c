"""DiLoCo: workers train for many steps between two communications."""

import jax
import optax

import drjax
from federated._algorithm import Algorithm
from federated._averaging import State, averaged, has_any, stepped
from federated._local import (
    Loss,
    check_counts,
    checked,
    checked_params,
    drawn,
    train,
)

_NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def diloco(
    loss: Loss,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation = _NESTEROV,
    *,
    steps: int,
    batch_size: int,
) -> Algorithm:
    """Makes DiLoCo: workers train for many steps between two communications.

    The clients are its workers, which are few and take part in every round. A worker
    starts from the parameters that it is sent, but keeps the state of its inner
    optimizer from round to round. It draws each example of its minibatches by itself,
    with replacement, so that all workers take the same number of steps, however many
    examples they have.

    A worker is sent the parameters and the round's key, and sends back what it changed,
    of the size of the parameters, and two numbers: in `steps` steps as much as data
    parallel training communicates in one. Each worker that has examples counts the
    same; the others keep what they have. The metrics are `loss`, the mean over the
    examples drawn, and `update_norm`, the norm of the mean change.

    Args:
      loss: as for `fedavg`.
      inner_optimizer: of the workers, usually AdamW.
      outer_optimizer: of the server, to which the mean change is a gradient; by default
        the paper's, SGD with a learning rate of 0.7 and Nesterov momentum of 0.9.
      steps: how many steps workers take in a round.
      batch_size: how many examples are drawn for a step.

    Returns:
      An `Algorithm` with states of clients. The server's state is a named tuple
      `(params, optimizer)`; that of a client is its inner optimizer's.

    Raises:
      ValueError: if `steps` or `batch_size` cannot be; in a round, if `loss` does not
        give one number per example.
      TypeError: if parameters or losses are not floating point.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import federated
      >>> def loss(w, x):
      ...     return (x * (w - 3)) ** 2
      >>> data = federated.from_mapping({"ann": [1.0, 2.0], "bob": [3.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> diloco = federated.diloco(loss, optax.adamw(0.02), steps=5, batch_size=2)
      >>> state, new = diloco.init(0.0), diloco.client_init(0.0)
      >>> workers = jax.tree.map(lambda x: jnp.stack([x, x]), new)
      >>> run_round = jax.jit(diloco.round)
      >>> for i in range(150):
      ...     key = jax.random.key(i)
      ...     state, workers, metrics = run_round(state, workers, batch, key)
      >>> print(f"{state.params:.0f}")
      3

    References:
      Douillard et al., DiLoCo: Distributed Low-Communication Training of Language
      Models, arXiv:2311.08105.
    """
    call = "federated.diloco"
    check_counts(call, steps=steps, batch_size=batch_size)
    loss = checked(call, loss)

    def init(params):
        params = checked_params(call, params)
        return State(params, outer_optimizer.init(params))

    def client_init(params):
        return inner_optimizer.init(checked_params(call, params))

    def round(state, workers, batch, key):
        @drjax.program(clients=len(batch.count))
        def run(state, workers, batch, key):
            def client_update(worker, own):
                own_key = jax.random.fold_in(key, own.client)
                trained, worker, mean_loss = train(
                    loss,
                    inner_optimizer,
                    state.params,
                    worker,
                    own.data,
                    drawn(own_key, own.count, steps, batch_size),
                )
                update = optax.tree.sub(state.params, trained)
                return update, worker, mean_loss

            updates, workers, losses = drjax.map_fn(client_update, (workers, batch))
            weights = has_any(batch.count)  # All of these meet as many examples.
            update, metrics = averaged(updates, weights, losses, weights)
            return stepped(outer_optimizer, state, update), workers, metrics

        return run(state, workers, batch, key)

    return Algorithm(init, round, lambda state: state.params, client_init)
