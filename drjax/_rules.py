"""What a primitive does to the axis of a placement: a rule for each.

A rule looks at an equation, at the position of the placement's axis in each operand
(None where an operand has none, being the same for all elements), and at its size n. It
returns

  - `Placed(operands, results, params)`: where operands and results have the axis, and
    the equation's parameters for c elements instead of n; an operand that had none, but
    has one here, is to be handed out to the elements;
  - `Reduced(operands, operation)`: the operation combines the elements. Of some of
    them it gives a part of the result, and `operation` combines the parts; or
  - None: it mixes the elements otherwise.

The axis is only resized, never dropped, so that every other one keeps its position.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import primitives

Axes = tuple[int | None, ...]


class Placed(NamedTuple):
    operands: Axes
    results: tuple[int, ...]
    params: Callable[[int], dict[str, Any]]


class Reduced(NamedTuple):
    operands: Axes
    operation: str


def find(eqn: Any, axes: Sequence[int | None], n: int) -> Placed | Reduced | None:
    """What an equation does to the axis; KeyError for an unknown primitive."""
    rule = _RULES[eqn.primitive.name](eqn, tuple(axes), n)
    if isinstance(rule, Placed):
        results = zip(eqn.outvars, rule.results, strict=True)
        if any(_shape(v)[axis : axis + 1] != (n,) for v, axis in results):
            return None  # The axis is no more, or that of a single one is repeated.
    return rule


def is_known(primitive: Any) -> bool:
    return primitive.name in _RULES


_RULES: dict[str, Callable[[Any, Axes, int], Placed | Reduced | None]] = {}


def _rule(*names: str) -> Callable[..., Any]:
    """Registers a rule for the primitives of these names which this JAX has."""

    def register(rule: Any) -> Any:
        for name in names:
            primitive = getattr(primitives, f"{name}_p", None)
            _RULES[name if primitive is None else primitive.name] = rule
        return rule

    return register


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _only(axes: Axes) -> int:
    """The axis of the first operand that has one."""
    return next(axis for axis in axes if axis is not None)


def _same_params(eqn: Any) -> Callable[[int], dict[str, Any]]:
    return lambda c: eqn.params


def _with_size(eqn: Any, name: str, axis: int) -> Callable[[int], dict[str, Any]]:
    """The parameters with the size at `axis` of the shape called `name` replaced."""

    def params(c):
        sizes = list(eqn.params[name])
        sizes[axis] = c
        return dict(eqn.params, **{name: tuple(sizes)})

    return params


def _aligned(eqn: Any, axes: Axes, n: int, shift: int = 0) -> Placed | None:
    """All arrays have the axis, at one position; scalars are the same for all."""
    axis = _only(axes)
    sizes = {_shape(v)[axis : axis + 1] for v in eqn.invars if _shape(v)}
    if {*axes} - {None, axis} or sizes != {(n,)}:
        return None
    operands = tuple(axis if _shape(v) else None for v in eqn.invars)
    return Placed(operands, (axis + shift,) * len(eqn.outvars), _same_params(eqn))


#
# Operations on corresponding entries; scalars, and axes of size 1, go with any.
#
@_rule(
    *("abs", "acos", "acosh", "add", "add_jaxvals", "and", "asin", "asinh", "atan"),
    *("atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz"),
    *("complex", "conj", "convert_element_type", "copy", "cos", "cosh", "digamma"),
    *("div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor"),
    *("ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow"),
    *("is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt"),
    *("lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter", "not"),
    *("one_minus_square", "or", "polygamma", "polynomial", "population_count", "pow"),
    *("real", "reduce_precision", "regularized_incomplete_beta", "rem", "round"),
    *("rsqrt", "select_n", "shift_left", "shift_right_arithmetic"),
    *("shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient"),
    *("sub", "tan", "tanh", "threefry2x32", "xor", "zeta"),
    *("random_seed", "random_fold_in", "random_clone"),
)
def _elementwise(eqn, axes, n):
    axis = _only(axes)
    if any(a not in (None, axis) for a in axes):
        return None
    operands = tuple(
        a if a is not None or n == 1 or _shape(v)[axis : axis + 1] != (n,) else axis
        for v, a in zip(eqn.invars, axes, strict=True)
    )
    return Placed(operands, (axis,) * len(eqn.outvars), _same_params(eqn))


# Keys are the leading axes, and what is drawn from each comes behind.
@_rule("random_bits", "random_split", "random_wrap", "random_unwrap")
def _behind(eqn, axes, n):
    return Placed(axes, (_only(axes),), _same_params(eqn))


@_rule("random_gamma")
def _random_gamma(eqn, axes, n):
    if _only(axes) >= len(_shape(eqn.invars[0])):
        return None  # What is drawn from a key depends on the position behind it.
    return _aligned(eqn, axes, n)


# A trailing axis for the parts of each entry comes or goes.
@_rule("bitcast_convert_type")
def _bitcast(eqn, axes, n):
    return Placed(axes, axes, _same_params(eqn))


# Each operand is a result. If one is placed, the plan has all of them placed.
@_rule("optimization_barrier")
def _each_by_itself(eqn, axes, n):
    new = tuple(_only(axes) if a is None else a for a in axes)
    sizes = [_shape(v)[a : a + 1] for v, a in zip(eqn.invars, new, strict=True)]
    return Placed(new, new, _same_params(eqn)) if {*sizes} == {(n,)} else None


#
# Changes of shape.
#
@_rule("broadcast_in_dim")
def _broadcast_in_dim(eqn, axes, n):
    axis = eqn.params["broadcast_dimensions"][_only(axes)]
    return Placed(axes, (axis,), _with_size(eqn, "shape", axis))


@_rule("reshape")
def _reshape(eqn, axes, n):
    old, new = _shape(eqn.invars[0]), eqn.params["new_sizes"]
    order = eqn.params["dimensions"] or range(len(old))  # It may transpose, too.
    before = [old[d] for d in order[: tuple(order).index(_only(axes))]]
    places = [
        i
        for i, size in enumerate(new)
        if size == n and math.prod(new[:i]) == math.prod(before)
    ]
    if not places:
        return None  # It merges or splits the axis.
    # For a single element, another axis of size 1 would do, too.
    axis = max(places, key=lambda i: list(new[:i]) == before)
    return Placed(axes, (axis,), _with_size(eqn, "new_sizes", axis))


@_rule("squeeze")
def _squeeze(eqn, axes, n):
    return _drop(eqn, axes, eqn.params["dimensions"])


@_rule("argmax", "argmin", "reduce_xor")
def _reduce_others(eqn, axes, n):
    return _drop(eqn, axes, eqn.params["axes"])


def _drop(eqn, axes, dropped):
    axis = _only(axes)
    if axis in dropped:
        return None
    results = (axis - sum(d < axis for d in dropped),)
    return Placed(axes, results * len(eqn.outvars), _same_params(eqn))


@_rule("transpose")
def _transpose(eqn, axes, n):
    axis = tuple(eqn.params["permutation"]).index(_only(axes))
    return Placed(axes, (axis,), _same_params(eqn))


@_rule("slice")
def _slice(eqn, axes, n):
    axis, strides = _only(axes), eqn.params["strides"]
    if _shape(eqn.outvars[0])[axis] != n or (strides and strides[axis] != 1):
        return None
    return Placed(axes, (axis,), _with_size(eqn, "limit_indices", axis))


@_rule("pad")
def _pad(eqn, axes, n):
    axis = axes[0]
    if axis is None or any(eqn.params["padding_config"][axis]):
        return None
    return Placed((axis, None), (axis,), _same_params(eqn))


@_rule("concatenate", "rev", "sort", "cumsum", "cumprod", "cummax", "cummin", "split")
@_rule("cumlogsumexp", "top_k", "approx_top_k")
def _along_others(eqn, axes, n):
    along = eqn.params.get("dimensions")  # Of rev; the others have one.
    if along is None:
        names = ("dimension", "axis", "reduction_dimension")
        along = [eqn.params[k] for k in names if k in eqn.params]
    ndim = len(_shape(eqn.invars[0]))
    return None if _only(axes) in {d % ndim for d in along} else _aligned(eqn, axes, n)


@_rule("tile")
def _tile(eqn, axes, n):
    return Placed(axes, axes, _same_params(eqn))  # A repeated axis has another size.


@_rule("stack")
def _stack(eqn, axes, n):
    return _aligned(eqn, axes, n, shift=int(eqn.params["axis"] <= _only(axes)))


@_rule("unstack")
def _unstack(eqn, axes, n):
    return _drop(eqn, axes, [eqn.params["axis"]])


#
# Windows, of a single entry along the axis.
#
@_rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
@_rule("select_and_scatter", "select_and_scatter_add", "select_and_gather_add")
def _windows(eqn, axes, n):
    axis, params = _only(axes), eqn.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    if any(params[k][axis] != 1 for k in names if k in params):
        return None
    return None if any(params["padding"][axis]) else _aligned(eqn, axes, n)


#
# Linear algebra and Fourier transforms, of the trailing axes.
#
def _trailing(count):
    def rule(eqn, axes, n):
        leading = len(_shape(eqn.invars[0])) - count(eqn)
        return _aligned(eqn, axes, n) if _only(axes) < leading else None

    return rule


_rule("fft")(_trailing(lambda eqn: len(eqn.params["fft_lengths"])))
_rule("lu_pivots_to_permutation", "tridiagonal_solve")(_trailing(lambda eqn: 1))
_rule(
    *("cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product"),
    *("lu", "ormqr", "qr", "schur", "svd", "symmetric_product", "triangular_solve"),
    "tridiagonal",
)(_trailing(lambda eqn: 2))


#
# Indexing. The axis is whole in every slice, or a batch axis. A start along a whole
# axis is in bounds if it is 0, for one element as for all of them.
#
@_rule("dynamic_slice")
def _dynamic_slice(eqn, axes, n):
    return Placed(axes, axes[:1], _with_size(eqn, "slice_sizes", _only(axes)))


@_rule("dynamic_update_slice")
def _dynamic_update_slice(eqn, axes, n):
    return _aligned(eqn, axes, n)


def _fits(axes: Axes, places: Axes) -> bool:
    """Whether the axes are in these places, as far as they are known."""
    return all(a in (None, place) for a, place in zip(axes, places, strict=True))


def _others(ndim: int, *dims: Sequence[int]) -> list[int]:
    """The axes that are in none of these."""
    taken = {d for some in dims for d in some}
    return [d for d in range(ndim) if d not in taken]


@_rule("gather")
def _gather(eqn, axes, n):
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    paired = numbers.operand_batching_dims
    partners = numbers.start_indices_batching_dims
    # Where the indices' axes are in the result, less the last, of an index's parts.
    batch = _others(len(_shape(eqn.outvars[0])), numbers.offset_dims)
    places = [*zip(paired, partners, strict=True)]
    places += [(None, i) for i in _others(len(batch), partners)]
    for place in places:
        if _fits(axes, place):
            return Placed(place, (batch[place[1]],), _same_params(eqn))
    window = _others(len(sizes), numbers.collapsed_slice_dims, paired)
    for d, result in zip(window, numbers.offset_dims, strict=True):
        if _fits(axes, (d, None)) and sizes[d] == n:
            return Placed(axes, (int(result),), _with_size(eqn, "slice_sizes", d))
    return None


@_rule("scatter", "scatter_add", "scatter-sub", "scatter_mul")
@_rule("scatter_min", "scatter_max")
def _scatter(eqn, axes, n):
    operand, _, updates = map(_shape, eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    paired = numbers.operand_batching_dims
    partners = numbers.scatter_indices_batching_dims
    batch = _others(len(updates), numbers.update_window_dims)
    window = _others(len(operand), numbers.inserted_window_dims, paired)
    places = [(d, i, batch[i]) for d, i in zip(paired, partners, strict=True)]
    places += [
        (d, None, int(u))
        for d, u in zip(window, numbers.update_window_dims, strict=True)
        if operand[d] == updates[u]
    ]
    for place in places:
        if _fits(axes, place):
            return Placed(place, place[:1], _same_params(eqn))
    return None


#
# Reductions, over the placement's axis too.
#
def _reduction(operation):
    def rule(eqn, axes, n):
        if _only(axes) in eqn.params["axes"]:
            return Reduced(axes, operation)
        return _drop(eqn, axes, eqn.params["axes"])

    return rule


@_rule("reduce")
def _reduce(eqn, axes, n):
    axis, dims = _only(axes), eqn.params["dimensions"]
    before = sum(d < axis for d in dims)
    return None if axis in dims else _aligned(eqn, axes, n, shift=-before)


for _operation in ("sum", "max", "min", "prod", "and", "or"):
    _rule(f"reduce_{_operation}")(_reduction(_operation))


@_rule("dot_general")
def _dot_general(eqn, axes, n):
    (contracted, batch) = eqn.params["dimension_numbers"]
    side = 0 if axes[0] is not None else 1
    axis, other = axes[side], axes[1 - side]
    for kind in (contracted, batch):
        if axis in kind[side]:
            position = tuple(kind[side]).index(axis)
            partner = kind[1 - side][position]
            if other not in (None, partner):
                return None
            operands = (axis, partner) if side == 0 else (partner, axis)
            if kind is contracted:
                return Reduced(operands, "sum")
            return Placed(operands, (position,), _same_params(eqn))
    if other is not None:
        return None  # A product of every element with every other one.
    taken = {*contracted[side], *batch[side]}
    before = sum(d not in taken for d in range(axis))
    if side == 1:
        before += len(_shape(eqn.invars[0])) - len(contracted[0]) - len(batch[0])
    return Placed(axes, (len(batch[0]) + before,), _same_params(eqn))


@_rule("conv_general_dilated")
def _convolution(eqn, axes, n):
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    image, feature = numbers.lhs_spec[:2]
    kernel, contracted = numbers.rhs_spec[:2]
    if params["feature_group_count"] == 1 and _fits(axes, (feature, contracted)):
        return Reduced((feature, contracted), "sum")  # As for the kernel's gradient.
    if params["batch_group_count"] > 1:
        return None
    if _fits(axes, (image, None)):
        return Placed(axes, numbers.out_spec[:1], _same_params(eqn))
    if params["feature_group_count"] == 1 and _fits(axes, (None, kernel)):
        return Placed(axes, numbers.out_spec[1:2], _same_params(eqn))
    return None
