"""Engines that run a plan: `engine(plan, *args)`. A new one is a line here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drjax
from beam_runner._arguments import values_of
from beam_runner._interpret import Session
from drjax._export import OPERATIONS
from drjax._reference import _run_server, interpret
from drjax._streaming import Engine
from federated._engine import Engine as Simulation

CHUNK = 3


def in_chunks(plan, *args):
    """Rounds as exported, three elements at a time, with NaN and zeros as padding."""
    outs = interpret(plan, jax.tree.leaves(args), _run_server, _round_in_chunks)
    return jax.tree.unflatten(plan.out_tree, outs)


def _round_in_chunks(plan, stage, env):
    run = jax.export.deserialize(stage.export(chunk=CHUNK)).call
    server = [env[i] for i in stage.server_inputs]
    partials = []
    for low in range(0, stage.n, CHUNK):
        count = min(CHUNK, stage.n - low)
        index = jnp.arange(low, low + CHUNK, dtype="int32")
        placed = [env[i] for i in stage.placed_inputs]
        axes = [plan.at[i].axis for i in stage.placed_inputs]
        placed = [
            _padded(jnp.moveaxis(x, axis, 0)[low : low + count])
            for x, axis in zip(placed, axes, strict=True)
        ]
        partials.append((count, run(jnp.int32(count), index, *server, *placed)))
    parts = len(stage.reductions)
    for k, (operation, i) in enumerate(stage.reductions):
        values = [outs[k] for _, outs in partials]
        env[i] = functools.reduce(OPERATIONS[operation].combine, values)
    for k, i in enumerate(stage.placed_outputs, parts):
        values = [outs[k][:count] for count, outs in partials]
        env[i] = jnp.moveaxis(jnp.concatenate(values), 0, plan.at[i].axis)


def _padded(x):
    missing = CHUNK - len(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return jnp.concatenate([x, *[x[-1:]] * missing])
    value = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
    pad = [(0, missing)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad, constant_values=value)


def streaming(plan, *args):
    outs = Engine(plan, chunk_size=2).run(jax.tree.leaves(args))
    return jax.tree.unflatten(plan.out_tree, outs)


def beam(plan, *args):
    session = Session(chunk_size=2, on_bad="keep")
    with session.open() as run:
        return run.results(plan.recomputed(), values_of(args).leaves)


def federated(plan, *args):
    n = dict(plan.placements).get("clients", 1)
    simulation = Simulation(lambda *_: plan)
    return simulation.run(args, np.arange(n), np.zeros(n, int)).result


ENGINES = {
    "reference": drjax.run_plan,
    "recomputed": lambda plan, *args: drjax.run_plan(plan.recomputed(), *args),
    "in chunks": in_chunks,
    "streaming": streaming,
    "beam": beam,
    "federated": federated,
}
SLOW = {
    "recomputed",
    "in chunks",
    "streaming",
    "beam",
    "federated",
}  # Most compile each round.
FEW = {"recomputed", "in chunks"}  # They run some transformations only.
ENGINE = pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, run in ENGINES.items()
    ],
)
