"""Rounds of local training of a transformer: DiLoCo, as a drjax program and by hand.

Replicas train by themselves for some steps, then their mean change moves the model.
Here are the programs, the types of their arguments on a mesh, and what compiles them.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import drjax
from examples import transformer


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Args:
      config: the transformer.
      steps: how many steps replicas take in a round.
      batch: how many examples a replica takes in a step.
      model: how many devices share a replica; None for what suits the devices.
    """

    config: transformer.Config
    steps: int
    batch: int
    model: int | None = None


class LearningRates(NamedTuple):
    """Learning rates, each a scalar."""

    inner: Any
    outer: Any


class State(NamedTuple):
    """What is kept from round to round."""

    params: Any
    outer: Any  # The state of the outer optimizer,
    inner: Any  # and those of the replicas, [replicas, ...].


#
# The programs, given the operators.
#
def inner_optimizer(rate: Any) -> optax.GradientTransformation:
    return optax.adamw(rate)


def outer_optimizer(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9, nesterov=True)


def run_round(
    ops: Any,
    loss: Any,
    rates: LearningRates,
    state: State,
    tokens: Any,
    sending: Callable[[], dict[str, Any]] = dict,
) -> Any:
    """The state after a round, and its mean loss; `sending` says how they are sent."""

    def train(params: Any, rate: Any, optimizer_state: Any, tokens: Any) -> Any:
        optimizer = inner_optimizer(rate)

        # The gradient of a round keeps what a step starts with, and takes it again.
        @jax.checkpoint
        def step(carry: Any, tokens: Any) -> Any:
            new, optimizer_state = carry
            value, grads = jax.value_and_grad(loss)(new, tokens)
            change, optimizer_state = optimizer.update(grads, optimizer_state, new)
            return (optax.apply_updates(new, change), optimizer_state), value

        carry = params, optimizer_state
        (new, optimizer_state), values = jax.lax.scan(step, carry, tokens)
        return optax.tree.sub(params, new), optimizer_state, jnp.mean(values)

    params, rate = ops.broadcast((state.params, rates.inner))
    change, inner, value = ops.map_fn(train, (params, rate, state.inner, tokens))
    change, value = ops.reduce_mean((change, value), **sending())
    outer = outer_optimizer(rates.outer)
    change, outer_state = outer.update(change, state.outer, state.params)
    params = optax.apply_updates(state.params, change)
    return State(params, outer_state, inner), value


def loss_after_round(
    ops: Any, loss: Any, rates: LearningRates, state: State, tokens: Any, held_out: Any
) -> jax.Array:
    """The mean loss of examples that each replica holds out."""
    new, _ = run_round(ops, loss, rates, state, tokens)
    return ops.reduce_mean(ops.map_fn(loss, (ops.broadcast(new.params), held_out)))


def gradient(ops: Any, loss: Any, *args: Any) -> Any:
    """Of the loss after a round, by the learning rates and the parameters."""

    def after(rates: Any, params: Any, state: State, *data: Any) -> jax.Array:
        state = state._replace(params=params)
        return loss_after_round(ops, loss, rates, state, *data)

    rates, state, *data = args
    return jax.grad(after, (0, 1))(rates, state.params, state, *data)


PROGRAMS = {"round": run_round, "gradient": gradient}
# A round whose mean is encoded; by hand, it is not.
ENCODED = {"bfloat16 round": drjax.BFloat16(), "int8 round": drjax.Int8()}


def by_hand(n: int, mesh: Mesh) -> Any:
    """The operators in plain JAX, for meshes."""

    def broadcast(x: Any) -> Any:
        placed = P("replicas", *[P.UNCONSTRAINED] * x.ndim)
        x = jnp.broadcast_to(x, (n, *x.shape))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, placed))

    return types.SimpleNamespace(
        broadcast=lambda tree: jax.tree.map(broadcast, tree),
        map_fn=lambda fn, args: jax.vmap(fn, spmd_axis_name="replicas")(*args),
        reduce_mean=lambda tree, **_: jax.tree.map(lambda x: x.mean(axis=0), tree),
    )


#
# Compiling them.
#
def make_mesh(devices: Sequence[Any], model: int) -> Mesh:
    """Neighbours share a replica."""
    grid = np.array(devices).reshape(-1, model)
    return Mesh(grid, ("replicas", "model"), axis_types=(AxisType.Auto,) * 2)


def arguments(setting: Setting, mesh: Mesh) -> tuple[Any, ...]:
    """The types of a program's arguments, with how they lie on a mesh."""
    config, n = setting.config, mesh.shape["replicas"]

    def typed(tree: Any, *axes: str) -> Any:
        def leaf(path: Any, x: Any) -> Any:
            spec = P(*axes, *transformer.spec_of(path))
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(
                (*[n] * len(axes), *x.shape), x.dtype, sharding=sharding
            )

        return jax.tree_util.tree_map_with_path(leaf, tree)

    init = functools.partial(transformer.init, config)
    params = jax.eval_shape(init, jax.random.key(0))
    state = State(
        typed(params),
        typed(jax.eval_shape(outer_optimizer(0.7).init, params)),
        typed(jax.eval_shape(inner_optimizer(1e-3).init, params), "replicas"),
    )
    rate = jax.ShapeDtypeStruct((), "float32")
    held_out = jax.ShapeDtypeStruct((setting.batch, config.length + 1), "int32")
    tokens = jax.ShapeDtypeStruct((setting.steps, *held_out.shape), "int32")
    return (
        typed(LearningRates(rate, rate)),
        state,
        typed(tokens, "replicas"),
        typed(held_out, "replicas"),
    )


def compiled(
    program: str, setting: Setting, mesh: Mesh, *, hand: bool, options: Any = None
) -> Any:
    """A program by its name on a mesh, by drjax's operators or written by hand.

    `options` are those of XLA.
    """

    def sending() -> dict[str, Any]:
        how = transformer.specs(setting.config), P()
        encoding, key = ENCODED[program], jax.random.key(0)
        return dict(encoding=encoding, key=key, out_sharding=how)

    n, args = mesh.shape["replicas"], arguments(setting, mesh)
    loss = functools.partial(transformer.loss, setting.config)
    ops = by_hand(n, mesh) if hand else drjax
    fn = functools.partial(PROGRAMS.get(program, run_round), ops, loss)
    if program in ENCODED and not hand:
        fn = functools.partial(fn, sending=sending)
    fn = fn if hand else drjax.program(replicas=n)(fn)
    with jax.set_mesh(mesh):
        lowered = jax.jit(fn).lower(*args[: 4 if program == "gradient" else 3])
    return lowered.compile(compiler_options=options)
