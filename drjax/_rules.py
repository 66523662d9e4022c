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


#
# Operations on corresponding entries; scalars, and axes of size 1, go with any.
#
@_rule(
    *("abs", "acos", "acosh", "add", "add_jaxvals", "and", "asin", "asinh", "atan"),
    *("atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz"),
    *("complex", "conj", "convert_element_type", "copy", "cos", "cosh", "digamma"),
    *("div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge"),
    *("gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "lgamma"),
    *("log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "name", "ne"),
    *("neg", "nextafter", "not", "or", "polygamma", "population_count", "pow", "real"),
    *("reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left"),
    *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt"),
    *("square", "stop_gradient", "sub", "tan", "tanh", "threefry2x32", "xor", "zeta"),
    *("random_seed", "random_fold_in", "optimization_barrier"),
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
@_rule("cumlogsumexp")
def _along_others(eqn, axes, n):
    axis, params = _only(axes), eqn.params
    along = params.get("dimensions")  # Of rev; the others have one.
    if along is None:
        along = [params[k] for k in ("dimension", "axis") if k in params]
    if axis in along or any(a not in (None, axis) for a in axes):
        return None
    operands = (axis,) * len(eqn.invars)
    return Placed(operands, (axis,) * len(eqn.outvars), _same_params(eqn))


#
# Reductions, over the placement's axis too.
#
def _reduction(operation):
    def rule(eqn, axes, n):
        if _only(axes) in eqn.params["axes"]:
            return Reduced(axes, operation)
        return _drop(eqn, axes, eqn.params["axes"])

    return rule


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
