"""A program over clients as a function that the simulation runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

import drjax
from federated._engine import PLACEMENT, Engine


def simulate(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that runs `fn` as `run` does a round: a few clients at a time.

    It is for programs of one's own, and for derivatives: transform first, simulate
    last. A client whose contribution to a reduction is not finite is left out of the
    whole call, which starts again without it, so that a value and its gradient are
    those of the same clients. `drjax.placement_size()` says how many they are. To the
    others this changes nothing: each keeps its `drjax.placement_index()`.

    Args:
      fn: a program over `clients`, a derivative of one, or what calls some.

    Returns:
      A function of the arguments of `fn`, by position; `n` is the size of the placement
      `clients`. Results are those of `jax.jit(fn)` up to rounding. Of placed results
      `[n, ...]`, the rows of clients that are left out are zero.

    Raises:
      TypeError: by the function, if it is differentiated, vmapped or jitted.
      ValueError: by the function, if there is not one number of `clients`, if none is
        left, or if one is left out of what computes with their number as a constant.
      PlanError: as `drjax.make_plan`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> import federated
      >>> @drjax.program(clients=3)
      ... def loss(model, x):
      ...     return drjax.reduce_mean(drjax.map_fn(lambda x: (x - model) ** 2, x))
      >>> x = jnp.array([1.0, jnp.nan, 3.0])
      >>> print(federated.simulate(jax.grad(loss))(0.0, x))
      -4.0
    """
    engine = Engine(drjax.make_plan(fn))
    name = getattr(fn, "__name__", "fn")

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(args)):
            raise TypeError(
                f"federated.simulate({name}) was called inside a function that JAX "
                "transforms, by jax.jit, jax.grad or another. It runs on the host, and "
                f"can only be outermost: federated.simulate(jax.grad({name})), not "
                f"jax.grad(federated.simulate({name})). It compiles by itself."
            )
        sizes = {n for place, n in engine.plan(args).placements if place == PLACEMENT}
        if len(sizes) != 1:
            raise ValueError(
                f"federated.simulate: {name} is to have one number of clients, but "
                f"has {sorted(sizes) or 'none'}. Decorate it, or what it calls, with "
                f"drjax.program({PLACEMENT}=n), the same n everywhere."
            )
        (n,) = sizes
        outcome = engine.run(args, np.arange(n), np.zeros(n, int))
        if not len(outcome.reported):
            raise ValueError(
                f"federated.simulate: no client is left in {name}: what each of the "
                f"{n} sends is not finite. Usually the model is not, or a learning "
                "rate is too large."
            )
        return outcome.result

    return run
