"""The reference engine: runs a plan one element at a time, slowly and obviously."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from drjax._jaxprs import as_fun
from drjax._plan import MapReduce, Plan

_OPERATIONS = {
    "sum": jnp.add,
    "prod": jnp.multiply,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
}


def run_plan(plan: Plan, *args: Any) -> Any:
    """Runs a plan on arguments like those it was made for."""
    leaves, tree = jax.tree.flatten(args)
    if tree != plan.in_tree:
        raise TypeError(
            f"drjax.run_plan: the plan is for arguments of structure {plan.in_tree}, "
            f"but got {tree}."
        )
    env = dict(plan.constants)
    env.update(zip(plan.inputs, leaves, strict=True))
    for stage in plan.stages:
        if isinstance(stage, MapReduce):
            _run_round(plan, stage, env)
        else:
            outs = as_fun(stage.jaxpr)(*(env[i] for i in stage.inputs))
            env.update(zip(stage.outputs, outs, strict=True))
    outs = [env[v] if isinstance(v, int) else v for v in plan.outputs]
    return jax.tree.unflatten(plan.out_tree, outs)


def _run_round(plan: Plan, stage: MapReduce, env: dict[int, Any]) -> None:
    server = [env[i] for i in stage.server_inputs]
    results = []
    for element in range(stage.n):
        own = [
            jax.lax.index_in_dim(env[i], element, plan.at[i].axis, keepdims=False)
            for i in stage.placed_inputs
        ]
        results.append(as_fun(stage.body)(jnp.int32(element), *server, *own))
    parts, outs = len(stage.reductions), list(zip(*results, strict=True))
    for (operation, i), values in zip(stage.reductions, outs[:parts], strict=True):
        env[i] = functools.reduce(_OPERATIONS[operation], values)
    for i, values in zip(stage.placed_outputs, outs[parts:], strict=True):
        env[i] = jnp.stack(values, plan.at[i].axis)
