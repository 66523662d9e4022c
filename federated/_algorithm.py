"""What an algorithm is: pure functions, of which one is a round over a cohort."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Algorithm(NamedTuple):
    """A federated algorithm as pure functions.

    A round is a drjax program over the placement `clients`, whose size is that of the
    batch. It is an ordinary JAX function: `jax.jit(algorithm.round)` runs it, and it
    has a gradient.

    Args:
      init: `params -> state`, what the server keeps from round to round.
      round: `(state, batch, key) -> (state, metrics)`, for a `Batch` of one cohort;
        metrics are a mapping from names to scalars. With `client_init` it is
        `(state, client_states, batch, key) -> (state, client_states, metrics)`, where
        the clients' states are placed: their leaves are `[n, ...]`.
      params: `state -> params`, the model that the state holds.
      client_init: `params -> client_state`, the state of one client that takes part for
        the first time; None if clients keep nothing.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import drjax, federated
      >>> def round(model, batch, key):
      ...     @drjax.program(clients=len(batch.count))
      ...     def run(model, batch):
      ...         def of_client(model, batch):
      ...             return jnp.sum(batch.data * batch.mask) / batch.count - model
      ...
      ...         updates = drjax.map_fn(of_client, (drjax.broadcast(model), batch))
      ...         return model + 0.5 * drjax.reduce_mean(updates), {}
      ...
      ...     return run(model, batch)
      >>> halfway = federated.Algorithm(lambda p: p, round, lambda s: s)
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [4.0]})
      >>> batch = federated.batch_of(data, [0, 1])
      >>> state, _ = halfway.round(jnp.float32(0), batch, jax.random.key(0))
      >>> print(state)
      1.5
    """

    init: Callable[[Any], Any]
    round: Callable[..., Any]
    params: Callable[[Any], Any]
    client_init: Callable[[Any], Any] | None = None
