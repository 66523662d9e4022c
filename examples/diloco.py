"""Training with local steps, as programs: DiLoCo, streaming, nested, and without.

Each of them makes an `Algorithm` from a loss `(params, examples) -> mean loss` and
optimizers of optax. A round takes placed examples, `[replicas, steps, ...]`: those of
each step of each replica. What the optimizers of the replicas keep stays with them.
What moves the model is a mean over replicas, `mean(changes, key=key)`: one that sends
fewer bytes draws by the key, as `drjax.reduce_mean` does with an encoding.

References:
  Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models,
  arXiv:2311.08105.
  Douillard et al., Streaming DiLoCo with overlapping communication, arXiv:2501.18512.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import drjax


class State(NamedTuple):
    """What is kept from round to round.

    Args:
      params: the server's.
      outer: the state of the server's optimizer.
      replicas: placed, what each replica keeps.
    """

    params: Any
    outer: Any
    replicas: Any


class Algorithm(NamedTuple):
    """A way to train.

    Args:
      init: `params -> state`.
      round: `(state, examples, key) -> (state, losses)`, with the mean of the steps of
        each replica. They stay placed: to average them would delay who waits for it.
      placements: names and sizes, the leading axes of what is placed.
    """

    init: Callable[..., Any]
    round: Callable[..., Any]
    placements: dict[str, int]


Mean = Callable[..., Any]


def train(loss: Any, optimizer: Any, params: Any, kept: Any, examples: Any) -> Any:
    """Local steps, on `examples [steps, ...]`, from what the optimizer has kept."""

    def step(carry: Any, examples: Any) -> Any:
        params, kept = carry
        value, grads = jax.value_and_grad(loss)(params, examples)
        updates, kept = optimizer.update(grads, kept, params)
        return (optax.apply_updates(params, updates), kept), value

    (params, kept), losses = jax.lax.scan(step, (params, kept), examples)
    return params, kept, losses


def stepped(optimizer: Any, params: Any, kept: Any, change: Any) -> Any:
    """A server's step along a mean change, which is a gradient to its optimizer."""
    updates, kept = optimizer.update(change, kept, params)
    return optax.apply_updates(params, updates), kept


def stacked(tree: Any, *sizes: int) -> Any:
    """The same for each element of placements of these sizes."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*sizes, *x.shape)), tree)


#
# DiLoCo.
#
def diloco(
    loss: Any, inner: Any, outer: Any, *, replicas: int, mean: Mean = drjax.reduce_mean
) -> Algorithm:
    """Replicas take the steps of a round by themselves; the server averages."""

    def init(params: Any) -> State:
        return State(params, outer.init(params), stacked(inner.init(params), replicas))

    @drjax.program(replicas=replicas)
    def run(state: State, examples: Any, key: Any) -> Any:
        def local_steps(params: Any, kept: Any, examples: Any) -> Any:
            trained, kept, losses = train(loss, inner, params, kept, examples)
            return optax.tree.sub(params, trained), kept, losses.mean()

        sent = drjax.broadcast(state.params)
        changes, kept, losses = drjax.map_fn(
            local_steps, (sent, state.replicas, examples)
        )
        change = mean(changes, key=key)
        params, kept_outer = stepped(outer, state.params, state.outer, change)
        return State(params, kept_outer, kept), losses

    return Algorithm(init, run, {"replicas": replicas})


#
# Streaming DiLoCo: a part of the layers at a time, while the replicas go on.
#
class Replica(NamedTuple):
    """What a replica keeps in streaming DiLoCo.

    Args:
      params: its own.
      sent: the server's, as it got them last.
      inner: the state of its optimizer.
    """

    params: Any
    sent: Any
    inner: Any


def fragment(params: Any, i: int, count: int) -> Any:
    """Every `count`-th of the stacked blocks from the i-th; the first has the rest."""
    rest = {k: x for k, x in params.items() if k != "blocks"} if i == 0 else {}
    return rest | {"blocks": jax.tree.map(lambda x: x[i::count], params["blocks"])}


def with_fragment(params: Any, i: int, count: int, part: Any) -> Any:
    """The parameters with another fragment in its place."""

    def put(x: Any, y: Any) -> Any:
        return x.at[i::count].set(y)

    return (
        params | part | {"blocks": jax.tree.map(put, params["blocks"], part["blocks"])}
    )


def streaming(
    loss: Any,
    inner: Any,
    outer: Any,
    *,
    replicas: int,
    fragments: int,
    delay: int,
    mixing: float,
    mean: Mean = drjax.reduce_mean,
) -> Algorithm:
    """DiLoCo by fragments, each of whose means arrives some steps after it was taken.

    In a round each fragment has its turn once, at equal distances. Replicas send what
    they changed of it, take `delay` more steps, and only then get the server's new
    values, of which they keep the part `mixing` of their own: nobody waits for the
    reduction.
    """

    def init(params: Any) -> State:
        parts = [fragment(params, i, fragments) for i in range(fragments)]
        replica = Replica(params, params, inner.init(params))
        return State(params, [outer.init(x) for x in parts], stacked(replica, replicas))

    def local_steps(replica: Replica, examples: Any) -> Any:
        params, kept, losses = train(
            loss, inner, replica.params, replica.inner, examples
        )
        return replica._replace(params=params, inner=kept), losses.sum()

    def change_of(i: int, replica: Replica) -> Any:
        of = functools.partial(fragment, i=i, count=fragments)
        return optax.tree.sub(of(replica.sent), of(replica.params))

    def mixed(i: int, new: Any, replica: Replica) -> Replica:
        put = functools.partial(with_fragment, i=i, count=fragments)
        own = fragment(replica.params, i, fragments)
        part = jax.tree.map(lambda a, b: mixing * a + (1 - mixing) * b, own, new)
        return replica._replace(
            params=put(replica.params, part=part), sent=put(replica.sent, part=new)
        )

    @drjax.program(replicas=replicas)
    def run(state: State, examples: Any, key: Any) -> Any:
        params, kept, replica = state
        kept, losses = [*kept], jnp.zeros(replicas)
        steps = jax.tree.leaves(examples)[0].shape[1]
        each = steps // fragments
        if steps % fragments or delay > each:
            raise ValueError(
                f"streaming: {steps} steps, {fragments} fragments and a delay of "
                f"{delay}. The fragments must divide the steps, and the delay be at "
                "most what one gets of them."
            )

        for i in range(fragments):
            own = jax.tree.map(lambda x, i=i: x[:, i * each : (i + 1) * each], examples)
            before = jax.tree.map(lambda x: x[:, : each - delay], own)
            after = jax.tree.map(lambda x: x[:, each - delay :], own)
            replica, more = drjax.map_fn(local_steps, (replica, before))
            losses += more
            changes = drjax.map_fn(functools.partial(change_of, i), (replica,))
            # Nothing needs it before the last two lines.
            change = mean(changes, key=jax.random.fold_in(key, i))
            if delay:
                replica, more = drjax.map_fn(local_steps, (replica, after))
                losses += more
            part = fragment(params, i, fragments)
            part, kept[i] = stepped(outer, part, kept[i], change)
            params = with_fragment(params, i, fragments, part)
            sent = drjax.broadcast(part)
            replica = drjax.map_fn(functools.partial(mixed, i), (sent, replica))
        return State(params, kept, replica), losses / steps

    return Algorithm(init, run, {"replicas": replicas})


#
# Pods of replicas.
#
def nested(
    loss: Any,
    inner: Any,
    outer: Any,
    *,
    pods: int,
    replicas: int,
    pod_steps: int,
    mean: Mean = drjax.reduce_mean,
) -> Algorithm:
    """DiLoCo between pods, whose replicas average theirs after every few steps.

    Examples are `[pods, replicas, steps, ...]`, `replicas` those of one pod. Within a
    pod, means are exact; `mean` is that of pods.
    """

    def init(params: Any) -> State:
        kept = stacked(inner.init(params), pods, replicas)
        return State(params, outer.init(params), kept)

    @drjax.program(replicas=replicas)
    def within_pod(carry: Any, examples: Any) -> Any:
        def local_steps(*args: Any) -> Any:
            trained, kept, losses = train(loss, inner, *args)
            return trained, kept, losses.mean()

        params, kept = carry
        args = drjax.broadcast(params), kept, examples
        trained, kept, losses = drjax.map_fn(local_steps, args)
        return (drjax.reduce_mean(trained), kept), losses

    @drjax.program(pods=pods)
    def run(state: State, examples: Any, key: Any) -> Any:
        def pod(params: Any, kept: Any, examples: Any) -> Any:
            def in_turn(x: Any) -> Any:
                x = x.reshape(x.shape[0], -1, pod_steps, *x.shape[2:])
                return jnp.moveaxis(x, 1, 0)

            turns = jax.tree.map(in_turn, examples)
            (trained, kept), losses = jax.lax.scan(within_pod, (params, kept), turns)
            return optax.tree.sub(params, trained), kept, losses.mean(0)

        sent = drjax.broadcast(state.params)
        changes, kept, losses = drjax.map_fn(pod, (sent, state.replicas, examples))
        change = mean(changes, key=key)
        params, kept_outer = stepped(outer, state.params, state.outer, change)
        return State(params, kept_outer, kept), losses

    return Algorithm(init, run, {"pods": pods, "replicas": replicas})


#
# What they are compared with.
#
def data_parallel(
    loss: Any, inner: Any, *, replicas: int, mean: Mean = drjax.reduce_mean
) -> Algorithm:
    """Synchronous training: each step averages the gradients of all replicas."""

    def init(params: Any) -> State:
        return State(params, inner.init(params), ())

    @drjax.program(replicas=replicas)
    def run(state: State, examples: Any, key: Any) -> Any:
        def step(state: State, at: Any) -> Any:
            examples, key = at
            sent = drjax.broadcast(state.params)
            values, grads = drjax.map_fn(jax.value_and_grad(loss), (sent, examples))
            grad = mean(grads, key=key)
            params, kept = stepped(inner, state.params, state.outer, grad)
            return State(params, kept, ()), values

        in_turn = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), examples)
        keys = jax.random.split(key, jax.tree.leaves(in_turn)[0].shape[0])
        state, losses = jax.lax.scan(step, state, (in_turn, keys))
        return state, losses.mean(0)

    return Algorithm(init, run, {"replicas": replicas})
