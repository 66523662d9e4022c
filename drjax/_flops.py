"""The number of floating-point operations that a jaxpr does.

XLA's own count takes a loop's body once; a jaxpr knows how long its loops are. For each
entry of its result any arithmetic is one operation, be it x + y, exp(x) or max(x, y).
To move, select, compare, sort or convert is none, and integers are not counted. A
complex operation counts as four real ones: the mean of a sum's two and a product's six.

References:
  Golub and Van Loan, Matrix Computations, 4th edition, for the leading terms.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxprs_in_params, primitives


class Flops(NamedTuple):
    """A number of operations; `at_least` where there may be more than were counted."""

    total: int
    at_least: bool = False


def flops(jaxpr: Any) -> Flops:
    """Counts the floating-point operations of a jaxpr, also in loops and calls.

    Of branches it takes the one with most. A while loop counts for one trip, and what
    is not known here, a callback say, for nothing; then it is `at_least` that many.
    """
    parts = [of_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns]
    return Flops(sum(f.total for f in parts), any(f.at_least for f in parts))


def of_equation(eqn):
    name, params = eqn.primitive.name, eqn.params
    is_float = any(map(_is_float, eqn.outvars))
    is_solve = name == "custom_linear_solve"  # Its other jaxprs are for derivatives.
    jaxprs = [params["jaxprs"].solve] if is_solve else jaxprs_in_params(params)
    inner = [] if name in _COUNTS else [flops(jaxpr) for jaxpr in jaxprs]
    if not inner:
        known = name in _COUNTS or name in _JAX
        count = _COUNTS.get(name, _result)(eqn) if known and is_float else 0
        return Flops(round(count * _weight(eqn.invars)), is_float and not known)
    # A call runs its jaxpr, and a cond one of them. Trips of which each does nothing,
    # of a loop over integers say, are nothing however many they are.
    at_least, total = any(f.at_least for f in inner), max(f.total for f in inner)
    if name == "drjax_map":
        results = zip(eqn.outvars, params["out_placed"], strict=True)
        summed = [v for v, placed in results if not placed and _is_float(v)]
        sums = sum(_size(v) * _weight([v]) for v in summed)
        total = params["n"] * total + (params["n"] - 1) * sums
    elif name == "scan":
        total *= params["length"]
    elif name == "while":
        total = sum(f.total for f in inner)
        at_least |= total > 0
    elif name not in _CALLS:
        at_least |= total > 0
    return Flops(total, at_least)


_CALLS = {
    *("call", "checkpoint", "closed_call", "cond", "core_call", "custom_jvp_call"),
    *("custom_linear_solve", "custom_vjp_call", "custom_vmap_call", "eval_jaxpr"),
    *("jit", "pjit", "remat2"),
}
# Of these, what is not counted otherwise does one operation for each entry.
_JAX = {p.name for p in vars(primitives).values() if isinstance(p, Primitive)} - {
    *("geqrf", "householder_product", "random_gamma", "tridiagonal_solve"),
}


def _size(atom):
    return math.prod(atom.aval.shape)


def _is_float(atom):
    return hasattr(atom.aval, "dtype") and jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _is_complex(atom):
    return _is_float(atom) and jnp.iscomplexobj(atom.aval)


def _weight(atoms):
    """How many real operations one on these counts as."""
    return 4 if any(map(_is_complex, atoms)) else 1


#
# What an equation on real numbers does.
#
def _result(eqn):
    return _size(eqn.outvars[0])


def _reduction(eqn):
    return max(0, _size(eqn.invars[0]) - _result(eqn))


def _windows(eqn):
    return _result(eqn) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _dot_general(eqn):
    contracted = eqn.params["dimension_numbers"][0][0]
    terms = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    return 2 * _result(eqn) * terms


def _convolution(eqn):
    """As XLA counts: without the products with padding, and the zeros of dilation."""
    p, out = eqn.params, eqn.outvars[0].aval.shape
    x, kernel = (v.aval.shape for v in eqn.invars)
    of_x, of_kernel, of_out = p["dimension_numbers"]
    count = 2 * out[of_out[0]] * out[of_out[1]] * kernel[of_kernel[1]]
    for i, (low, _) in enumerate(p["padding"]):  # The pairs that meet on each axis.
        starts = p["window_strides"][i] * np.arange(out[of_out[2 + i]]) - low
        apart = p["lhs_dilation"][i]
        end = apart * x[of_x[2 + i]]
        shifts = p["rhs_dilation"][i] * np.arange(kernel[of_kernel[2 + i]])
        at = (starts + shift for shift in shifts)
        count *= sum(int(np.sum((a >= 0) & (a < end) & (a % apart == 0))) for a in at)
    return count


def _fft(eqn):
    # 5 N log2(N) for N complex numbers, half of that if they are real on a side. These
    # are real operations already.
    size = max(_size(eqn.invars[0]), _result(eqn))
    log = math.log2(max(1, math.prod(eqn.params["fft_lengths"])))
    factor = 5 if all(map(_is_complex, (*eqn.invars, *eqn.outvars))) else 2.5
    return factor * size * log / _weight(eqn.invars)


def _of_matrix(formula: Callable[[int, int], float]) -> Callable[[Any], float]:
    """The count for a batch of matrices, given that for one of sizes m >= n."""

    def count(eqn):
        *batch, m, n = eqn.invars[0].aval.shape
        return math.prod(batch) * formula(max(m, n), min(m, n))

    return count


_COUNTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "fft": _fft,
    "cholesky": _of_matrix(lambda m, n: n**3 / 3),
    "lu": _of_matrix(lambda m, n: n**2 * (m - n / 3)),
    "qr": _of_matrix(lambda m, n: 4 * n**2 * (m - n / 3)),  # Q, of n columns, and R.
    "svd": _of_matrix(lambda m, n: 14 * m * n**2 + 8 * n**3),  # U too, and V.
    "eigh": _of_matrix(lambda m, n: 9 * n**3),
    "eig": _of_matrix(lambda m, n: 25 * n**3),
    "schur": _of_matrix(lambda m, n: 25 * n**3),
    "hessenberg": _of_matrix(lambda m, n: 10 * n**3 / 3),
    "tridiagonal": _of_matrix(lambda m, n: 4 * n**3 / 3),
    "triangular_solve": lambda eqn: _result(eqn) * eqn.invars[0].aval.shape[-1],
    "select_and_scatter_add": lambda eqn: _size(eqn.invars[0]),
    "reduce": _reduction,
    "reduce_window": _windows,
}
for _name in ("sum", "max", "min", "prod"):
    _COUNTS[f"reduce_{_name}"] = _COUNTS[f"drjax_reduce_{_name}"] = _reduction
    _COUNTS[f"reduce_window_{_name}"] = _windows
for _name in ("add", "sub", "mul", "min", "max"):
    _COUNTS[f"scatter-{_name}"] = lambda eqn: _size(eqn.invars[2])
for _name in (
    *("all_gather", "all_to_all", "bitcast_convert_type", "broadcast_in_dim"),
    *("complex", "concatenate", "conj", "convert_element_type", "copy", "device_put"),
    *("drjax_broadcast", "dynamic_slice", "dynamic_update_slice", "empty", "empty2"),
    *("gather", "get", "imag", "iota", "name", "optimization_barrier", "pad"),
    *("ppermute", "real", "reduce_precision", "reshape", "rev", "rounded", "scatter"),
    *("select_and_gather_add", "select_n", "sharding_constraint", "slice", "sort"),
    *("split", "squeeze", "stack", "stop_gradient", "swap", "tile", "top_k"),
    *("transpose", "unstack"),
):
    _COUNTS[_name] = lambda eqn: 0
