"""MapReduce-style machine learning as differentiable JAX primitives.

A program is an ordinary JAX function written with `broadcast`, `map_fn` and the
`reduce_*` operators. They are JAX primitives: the program compiles to XLA, sharded
over a mesh, and they stay visible in its jaxpr and in that of every derivative.
"""

import os.path as _path

from jax.extend import source_info_util as _source_info_util

from drjax._encodings import BFloat16, Int8
from drjax._equations import PlanError
from drjax._make_plan import make_plan
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
from drjax._program import OperatorUndefinedError, program
from drjax._reference import run_plan
from drjax._sources import Elements
from drjax._streaming import streaming
from drjax.plan import Plan

# In messages and profiles an operator comes from the line that calls it.
_source_info_util.register_exclusion(_path.join(_path.dirname(__file__), ""))

__version__ = "0.3.0.dev0"

__all__ = [
    "BFloat16",
    "Elements",
    "Int8",
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
    "streaming",
]
