"""MapReduce-style machine learning as differentiable JAX primitives.

A program is an ordinary JAX function written with `broadcast`, `map_fn` and the
`reduce_*` operators. They are JAX primitives: the program compiles to XLA, sharded
over a mesh, and they stay visible in its jaxpr and in that of every derivative.
"""

from drjax._cut import make_plan
from drjax._operators import (
    broadcast,
    map_fn,
    placement_index,
    placement_size,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
    reduce_weighted_mean,
)
from drjax._placed import PlanError
from drjax._plan import Plan
from drjax._program import OperatorUndefinedError, program
from drjax._reference import run_plan

__version__ = "0.3.0.dev0"

__all__ = [
    "OperatorUndefinedError",
    "Plan",
    "PlanError",
    "broadcast",
    "make_plan",
    "map_fn",
    "placement_index",
    "placement_size",
    "program",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_sum",
    "reduce_weighted_mean",
    "run_plan",
]
