"""The reference engine: runs a plan one element at a time, slowly and obviously."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from drjax._export import OPERATIONS
from drjax._jaxprs import as_fun
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While, reads_of


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
    outs = interpret(plan, [*map(as_array, leaves)], _run_server, _run_round)
    return jax.tree.unflatten(plan.out_tree, map(as_array, outs))


def as_array(x: Any) -> Any:
    """An argument or result as jit has it."""
    is_float0 = getattr(x, "dtype", None) == jax.dtypes.float0
    return x if is_float0 else jnp.asarray(x)


# Runs a server's stage, or a round: reads and writes values by number.
Run = Callable[[Plan, Any, dict[int, Any]], None]


def interpret(
    plan: Plan,
    inputs: Sequence[Any],
    run_server: Run,
    run_round: Run,
    sizes: Mapping[str, int] | None = None,
) -> list[Any]:
    """Runs a plan's stages in order; returns its results leaf by leaf.

    A value is let go when no later stage reads it. `sizes` are the numbers of elements
    that take part, of placements where these are not all.
    """
    sizes = sizes or {}
    env = dict(plan.constants)
    for i, (placement, n) in plan.sizes.items():
        env[i] = jax.device_put(np.int32(sizes.get(placement, n)))
    env.update(zip(plan.inputs, inputs, strict=True))
    last = {i: k for k, stage in enumerate(plan.stages) for i in reads_of(stage)}

    def read(numbers):
        return [env[i] for i in numbers]

    def write(numbers, values):
        env.update(zip(numbers, values, strict=True))

    def run(inner, inputs):
        return interpret(inner, inputs, run_server, run_round, sizes)

    for k, stage in enumerate(plan.stages):
        match stage:
            case Server():
                run_server(plan, stage, env)
            case MapReduce():
                run_round(plan, stage, env)
            case Scan():
                constants, carry = read(stage.constants), read(stage.init)
                ys: list[Any] = [None] * stage.length
                steps = range(stage.length)
                for t in reversed(steps) if stage.reverse else steps:
                    xs = [x[t] for x in read(stage.xs)]
                    outs = run(stage.body, [*constants, *carry, *xs])
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
                while run(stage.predicate, [*given, *carry])[0]:
                    carry = run(stage.body, [*constants, *carry])
                write(stage.carry, carry)
            case Branch():
                last_branch = len(stage.branches) - 1
                branch = stage.branches[min(max(int(env[stage.index]), 0), last_branch)]
                write(stage.results, run(branch, read(stage.operands)))
        for i in reads_of(stage):
            if last[i] == k and i not in plan.outputs:
                env.pop(i, None)
    return read(plan.outputs)


def _run_server(plan: Plan, stage: Server, env: dict[int, Any]) -> None:
    outs = as_fun(stage.jaxpr)(*(env[i] for i in stage.inputs))
    env.update(zip(stage.outputs, outs, strict=True))


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
