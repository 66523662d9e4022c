"""What one client does: steps on minibatches of its examples."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

Loss = Callable[[Any, Any], Any]


class Batches(NamedTuple):
    """Minibatches of a client: which examples are in them.

    Args:
      index: int32 `[steps, batch]`. Where there is no example it is that of another, so
        that padding never meets the loss, which may be infinite there.
      valid: bool `[steps, batch]`, whether there is an example.
    """

    index: Any
    valid: Any


def shuffled(key: Any, count: Any, length: int, epochs: int, size: int) -> Batches:
    """Epochs of minibatches, each in an order of its own; the last one is smaller.

    An example draws its place with a key of its own, so that the order of the examples
    does not depend on how much padding there is.
    """
    size = min(size, length)
    slots = jnp.arange(-(-length // size) * size).reshape(-1, size)
    is_example = jnp.arange(length) < count

    def of_epoch(epoch):
        epoch_key = jax.random.fold_in(key, epoch)

        def draw(j):
            return jax.random.uniform(jax.random.fold_in(epoch_key, j))

        u = jax.vmap(draw)(jnp.arange(length))
        order = jnp.argsort(jnp.where(is_example, u, jnp.inf))
        return order[jnp.where(slots < count, slots, 0)]

    index = jax.vmap(of_epoch)(jnp.arange(epochs))
    valid = jnp.broadcast_to(slots < count, index.shape)
    return Batches(index.reshape(-1, size), valid.reshape(-1, size))


def drawn(key: Any, count: Any, steps: int, size: int) -> Batches:
    """Minibatches of examples that are drawn one by one, with replacement."""
    index = jax.random.randint(key, (steps, size), 0, jnp.maximum(count, 1))
    return Batches(index, jnp.broadcast_to(count > 0, index.shape))


def whole(count: Any, length: int) -> Batches:
    """One minibatch of all examples."""
    slots = jnp.arange(length)
    return Batches(jnp.where(slots < count, slots, 0), slots < count)


def mean_loss(loss: Loss, params: Any, data: Any, batch: Batches) -> tuple[Any, Any]:
    """The mean of the losses of one minibatch, and their sum."""
    examples = jax.tree.map(lambda x: x[batch.index], data)
    losses = jnp.where(batch.valid, loss(params, examples), 0)
    total = jnp.sum(losses, dtype=float)
    return total / jnp.maximum(batch.valid.sum(), 1), total


def train(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Any,
    optimizer_state: Any,
    data: Any,
    batches: Batches,
    adjusted: Callable[[Any, Any], Any] = lambda grads, params: grads,
) -> tuple[Any, Any, Any]:
    """Takes a step on each minibatch that has an example.

    Args:
      loss: as `checked` gives it.
      optimizer: of the client.
      params, optimizer_state: where it starts.
      data: of the client, leaves `[length, ...]`.
      batches: what the steps are on.
      adjusted: `(grads, params) -> grads`, what the optimizer is given.

    Returns:
      The parameters, the optimizer's state, and the mean loss of the examples met.
    """

    def step(carry, batch):
        def objective(params):
            return mean_loss(loss, params, data, batch)

        params, optimizer_state = carry
        grads, total = jax.grad(objective, has_aux=True)(params)
        # A client without examples asks about padding, where there may be no gradient.
        is_step = batch.valid.any()
        grads = jax.tree.map(lambda g: jnp.where(is_step, g, 0), grads)
        updates, optimizer_state = optimizer.update(
            adjusted(grads, params), optimizer_state, params
        )
        return (optax.apply_updates(params, updates), optimizer_state), total

    # A branch would leave out steps on padding, but where clients are mapped both sides
    # of it run, and XLA on CPUs has slow convolutions in a branch, as in a loop.
    def step_or_stay(carry, batch):
        is_step = batch.valid.any()

        def chosen(new, old):
            return jax.tree.map(lambda a, b: jnp.where(is_step, a, b), new, old)

        # An optimizer may have infinite derivatives where gradients are zero, as the
        # root in Adam. They must not reach what a step that is not taken starts from.
        new, total = step(chosen(carry, lax.stop_gradient(carry)), batch)
        return chosen(new, carry), total

    carry, totals = lax.scan(step_or_stay, (params, optimizer_state), batches)
    return *carry, totals.sum() / jnp.maximum(batches.valid.sum(), 1)


#
# Checks, before work starts.
#
def checked(call: str, loss: Loss) -> Loss:
    """The loss, which raises an error if it does not give one number per example."""

    def checked_loss(params, examples):
        losses = loss(params, examples)
        n = len(jax.tree.leaves(examples)[0])
        if isinstance(losses, list | tuple | dict) or not hasattr(losses, "dtype"):
            raise TypeError(
                f"{call}: loss returned {type(losses).__name__!r}, but it has to "
                f"return an array with the loss of each of the {n} examples, and "
                "nothing beside it."
            )
        if losses.shape != (n,):
            what = f"an array of shape {losses.shape}" if losses.ndim else "a scalar"
            raise ValueError(
                f"{call}: loss returned {what} for {n} examples, but it has to return "
                f"one number per example, an array of shape ({n},). The mean over the "
                "examples is taken here, for some of them are padding: loss must not "
                "take it, but it does take that over other axes, as over the tokens of "
                "a sentence."
            )
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TypeError(
                f"{call}: loss returned numbers of type {losses.dtype}, which have no "
                "gradient. It has to return floating point numbers; a metric, as the "
                "accuracy, is not a loss."
            )
        return losses

    return checked_loss


def check_counts(call: str, **values: Any) -> None:
    """Raises an error if a value is not an integer of at least one."""
    for name, value in values.items():
        try:
            is_count = operator.index(value) >= 1
        except TypeError:
            is_count = False
        if not is_count:
            raise ValueError(
                f"{call}: {name} is {value!r}, but it has to be an integer of at "
                "least 1, known when the algorithm is made."
            )


def checked_params(call: str, params: Any) -> Any:
    """The parameters as arrays of JAX; an error if they are not floating point."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            name = jax.tree_util.keystr(path) or "the only leaf"
            raise TypeError(
                f"{call}: {name} of params has dtype {jnp.result_type(x)}, but "
                "parameters are trained and averaged, so they have to be floating "
                "point. Keep other values, as counters and keys, out of params, and "
                "let loss close over them."
            )
    # With a dtype of their own: one that Python's numbers have would change later.
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
