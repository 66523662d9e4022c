"""How many elements a chunk has: a function of shapes and of the kind of device alone.

A chunk must be large enough to be worth a call, and small enough to stay in caches, or
in memory. Where a matrix is the same for all elements, more of them make its products
faster; where each has its own, as the models that clients train, they do not, and are
best one by one on a CPU.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Var, jaxprs_in_params

from drjax import _flops
from drjax._compat import scan_counts
from drjax._convolutions import convolution_p
from drjax._export import avals_of_chunk, of_chunk
from drjax._jaxprs import is_in, is_var, struct
from drjax.plan import MapReduce

# Measured on CPUs. FLOPs that take a core some milliseconds, with own matrices and with
# shared ones; a chunk's bytes that caches, or an accelerator's memory, have room for.
_OWN_WORK, _SHARED_WORK = 2**25, 2**28
_CPU_BYTES, _ACCELERATOR_BYTES = 2**24, 2**30
_MAX_LANES = 8


class Chunks(NamedTuple):
    """The chunks of a round.

    Args:
      size: elements in a chunk, on each device.
      lanes: chunks that run at a time, each lane with a total of its own.
      why: what decided the size.
      bytes: expected at most, beside the arguments and placed results.
    """

    size: int
    lanes: int
    why: str
    bytes: int


def choose(
    stage: MapReduce, n: int, size: int | None, platform: str, cores: int
) -> Chunks:
    """The chunks of a round of n elements on a device; of `size`, if that is said."""
    body = stage.body
    why = "as was said"
    if size is None:
        size, why = _size(stage, n, platform)
    size = min(size, n)
    most = live_bytes(body if size == 1 else _chunk(stage, size))
    most += 3 * sum(map(_bytes, body.out_avals[: len(stage.reductions)]))
    lanes = 1
    if platform == "cpu" and not body.effects:
        fits = max(1, 8 * _CPU_BYTES // max(1, most))
        lanes = min(cores, _MAX_LANES, -(-n // size), fits)
    return Chunks(size, lanes, why, lanes * most)


def _chunk(stage: MapReduce, c: int) -> Any:
    """What c elements do, as a jaxpr."""
    types = map(struct, avals_of_chunk(stage, c))
    return jax.make_jaxpr(of_chunk(stage, whole=True))(*types)


def cores() -> int:
    """The processors that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _size(stage: MapReduce, n: int, platform: str) -> tuple[int, str]:
    body = stage.body
    if body.effects:
        return 1, "each element has effects, which come in order"
    if n == 1:
        return n, "all elements at once"
    few, many, more = (live_bytes(_chunk(stage, c)) for c in (2, 1000, 1001))
    shared = len(stage.server_inputs)
    own = [True, *[False] * shared, *[True] * len(stage.placed_inputs)]
    total = _flops.flops(body).total
    room = _CPU_BYTES if platform == "cpu" else _ACCELERATOR_BYTES
    why = "what memory has room for"
    size = max(1, (room - few) // max(1, more - many))
    if platform == "cpu":
        is_own = 2 * _own_flops(body.jaxpr, own) > total
        inputs = body.in_avals[1 + shared :]
        outputs = body.out_avals[len(stage.reductions) :]
        work = total + sum(map(_bytes, (*inputs, *outputs)))
        enough = -(-(_OWN_WORK if is_own else _SHARED_WORK) // max(1, work))
        if enough <= size:
            size = enough
            why = "elements with matrices of their own" if is_own else "enough work"
    if size >= n:
        return n, "all elements at once"
    size = -(-n // -(-n // size))  # Chunks that are alike in size,
    divisors = (c for c in range(size, size // 2, -1) if n % c == 0)
    return next(divisors, size), why  # and the same, if that makes not many more.


def live_bytes(jaxpr: Any) -> int:
    """The most bytes of values that are needed at a time, inputs among them.

    A compiled function needs less: it does not write all of them.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    last: dict[Var, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last.update((v, i) for v in eqn.invars if is_var(v))
    end = len(jaxpr.eqns)
    last.update((v, end) for v in jaxpr.outvars if is_var(v))
    live = {v: _bytes(v.aval) for v in jaxpr.invars if v in last}
    now = most = sum(live.values())
    for i, eqn in enumerate(jaxpr.eqns):
        inside = max(map(live_bytes, jaxprs_in_params(eqn.params)), default=0)
        outs = {v: _bytes(v.aval) for v in eqn.outvars}
        read = sum(live[v] for v in {*filter(is_var, eqn.invars)} if v in live)
        most = max(most, now + max(sum(outs.values()), inside - read))
        live.update((v, size) for v, size in outs.items() if v in last)
        for v in [v for v in live if last[v] <= i]:
            del live[v]
        now = sum(live.values())
    return most


def _bytes(aval: Any) -> int:
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", ())) * itemsize


def _own_flops(jaxpr: Any, own: Sequence[bool]) -> int:
    """Of contractions of two values that both differ between elements."""
    own_vars = {v for v, is_own in zip(jaxpr.invars, own, strict=True) if is_own}
    total = 0
    for eqn in jaxpr.eqns:
        is_own = [is_in(v, own_vars) for v in eqn.invars]
        if any(is_own):
            own_vars.update(eqn.outvars)
        times = 1
        if eqn.primitive.name == "scan":
            a, n_carry = scan_counts(eqn)
            is_own[a : a + n_carry] = [any(is_own)] * n_carry
            times = eqn.params["length"]
        elif _is_contraction(eqn):
            total += _flops.of_equation(eqn).total if all(is_own) else 0
        for inner in jaxprs_in_params(eqn.params):
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) == len(is_own):
                total += times * _own_flops(inner, is_own)
    return total


def _is_contraction(eqn: Any) -> bool:
    names = {"dot_general", "conv_general_dilated", convolution_p.name}
    return eqn.primitive.name in names
