"""The reference engine: runs a plan one element at a time, slowly and obviously."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from drjax._export import OPERATIONS
from drjax._jaxprs import as_fun
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While


def run_plan(plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """Runs a plan one element at a time: slow, and what engines are tested against.

    Args:
      plan: what `make_plan` returned.
      *args: arguments of the types it was made for.
      **kwargs: the same, by name.

    Returns:
      What the planned function returns.

    Raises:
      TypeError: if the arguments have another structure, shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> total = drjax.program(clients=3)(drjax.reduce_sum)
      >>> print(drjax.run_plan(drjax.make_plan(total)(jnp.ones(3)), jnp.arange(3.0)))
      3.0
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    if tree != plan.in_tree:
        raise TypeError(
            f"drjax.run_plan: the plan is for arguments of structure {plan.in_tree}, "
            f"but got {tree}."
        )
    for leaf, i in zip(leaves, plan.inputs, strict=True):
        got, want = jax.typeof(leaf), plan.avals[i]
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise TypeError(
                f"drjax.run_plan: the plan is for an argument of type {want}, but got "
                f"{got}. Make a plan for these arguments."
            )
    outs = interpret(plan, [*map(_as_array, leaves)], _run_round)
    return jax.tree.unflatten(plan.out_tree, map(_as_array, outs))


def _as_array(x: Any) -> Any:
    """An argument or result as jit has it."""
    is_float0 = getattr(x, "dtype", None) == jax.dtypes.float0
    return x if is_float0 else jnp.asarray(x)


# Runs a round: reads and writes values by number.
RunRound = Callable[[Plan, MapReduce, dict[int, Any]], None]


def interpret(plan: Plan, inputs: Sequence[Any], run_round: RunRound) -> list[Any]:
    """Runs a plan's stages in order, its rounds as `run_round` does."""
    env = dict(plan.constants)
    env.update((i, jnp.int32(n)) for i, (_, n) in plan.sizes.items())
    env.update(zip(plan.inputs, inputs, strict=True))

    def read(ids):
        return [env[i] for i in ids]

    def write(ids, values):
        env.update(zip(ids, values, strict=True))

    for stage in plan.stages:
        match stage:
            case Server():
                write(stage.outputs, as_fun(stage.jaxpr)(*read(stage.inputs)))
            case MapReduce():
                run_round(plan, stage, env)
            case Scan():
                constants, carry = read(stage.constants), read(stage.init)
                ys: list[Any] = [None] * stage.length
                steps = range(stage.length)
                for t in reversed(steps) if stage.reverse else steps:
                    xs = [x[t] for x in read(stage.xs)]
                    outs = interpret(stage.body, [*constants, *carry, *xs], run_round)
                    carry, ys[t] = outs[: len(carry)], outs[len(carry) :]
                write(stage.carry, carry)
                stacked = [jnp.stack(y) for y in zip(*ys, strict=True)]
                if not stage.length:
                    avals = [plan.avals[i] for i in stage.ys]
                    stacked = [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
                write(stage.ys, stacked)
            case While():
                constants, carry = read(stage.body_constants), read(stage.init)
                given = read(stage.predicate_constants)
                while interpret(stage.predicate, [*given, *carry], run_round)[0]:
                    carry = interpret(stage.body, [*constants, *carry], run_round)
                write(stage.carry, carry)
            case Branch():
                last = len(stage.branches) - 1
                branch = stage.branches[min(max(int(env[stage.index]), 0), last)]
                operands = read(stage.operands)
                write(stage.results, interpret(branch, operands, run_round))
    return read(plan.outputs)


def _run_round(plan: Plan, stage: MapReduce, env: dict[int, Any]) -> None:
    server = [env[i] for i in stage.server_inputs]
    results = []
    for element in range(stage.n):
        own = [
            lax.index_in_dim(env[i], element, plan.at[i].axis, keepdims=False)
            for i in stage.placed_inputs
        ]
        results.append(as_fun(stage.body)(jnp.int32(element), *server, *own))
    parts, outs = len(stage.reductions), list(zip(*results, strict=True))
    for (operation, i), values in zip(stage.reductions, outs[:parts], strict=True):
        stacked = jnp.stack(values)
        env[i] = OPERATIONS[operation].reduce(stacked, axis=0).astype(stacked.dtype)
    for i, values in zip(stage.placed_outputs, outs[parts:], strict=True):
        env[i] = jnp.stack(values, plan.at[i].axis)
