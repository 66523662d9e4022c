"""The sum over elements of what each computes, with sums taken inside contractions.

What an element adds to the gradient of a matrix is a product of two of its own values,
`x_i^T g_i`, as large as the matrix. vmap makes all of these and adds them up. But

    sum_i x_i^T g_i = X^T G

where X and G hold the rows of all elements: one contraction, in which the elements are
one more contracted axis. So is a sum of convolutions of own inputs with own kernels,
with the features of all elements side by side. What comes after them is linear, mostly:
a transpose, a sum over time, a product with a constant. There `sum_i A v_i =
A sum_i v_i`, so the sum is moved up to the contractions, also into the carry of a scan
that only adds.

A sum is not moved where that would make it less accurate. In `(w - g_i) - w` nearly all
cancels for each element, and nothing would in `(n w - sum_i g_i) - n w`; so of all
additions only those of cotangents are taken apart. Sums of floats narrower than 32 bits
are float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr

from drjax._compat import ClosedJaxpr, scan_counts
from drjax._convolutions import convolution_p
from drjax._jaxprs import cached_by_jaxpr, is_in, is_var, where
from drjax._straighten import Straight, straighten

_CONVOLUTIONS = (lax.conv_general_dilated_p, convolution_p)
# Linear in the first operand, where the others are the same for all elements.
_LINEAR = {
    *("broadcast_in_dim", "copy", "copy_p", "cumsum", "div", "dynamic_slice", "imag"),
    *("neg", "real", "reduce_sum", "reshape", "rev", "slice", "squeeze", "transpose"),
}


def wide(dtype: Any) -> Any:
    """The type in which floats are summed."""
    is_narrow = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    return jnp.dtype("float32") if is_narrow else dtype


def widened(x: Any) -> Any:
    return x.astype(wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def summed_over(
    body: ClosedJaxpr, own: Sequence[bool], summed: Sequence[bool]
) -> Callable[..., list[Any]]:
    """A function `(is_valid, *inputs) -> outputs`, to vmap over elements.

    Args:
      body: what an element computes, without constants; its first input is its index.
      own: which inputs differ between elements.
      summed: which outputs are to be their sums over the elements. The others are the
        element's own.

    Returns:
      A function whose first argument says whether the element counts in the sums: a
      scalar, or None where all do.
    """
    sums = _analysed(_straight(body), own, summed)
    return lambda is_valid, *inputs: _run(sums, _Element(is_valid, inputs[0]), inputs)


class _Sums(NamedTuple):
    """A jaxpr, and what of it is computed as a sum over the elements.

    Args:
      eqns: for each None, if it is run for the element; or which operands are sums, if
        its result is; or for a scan the `_Sums` of its body.
      outputs: which are sums.
      inputs: which are read as sums only.
    """

    straight: Straight
    eqns: list[tuple[Any, Any]]
    outputs: list[bool]
    inputs: list[bool]


@cached_by_jaxpr
def _straight(jaxpr: Any) -> Straight:
    # What a checkpoint computes again is not to be merged with what was computed
    # before, and the rule of a custom_vmap is for the vmap to come.
    return straighten(jaxpr, ("checkpoint", "remat2", "custom_vmap_call"))


#
# Where sums are moved to.
#
def _analysed(straight: Straight, own: Sequence[bool], summed: Sequence[bool]) -> _Sums:
    own_vars, movable = _movable(straight, own)
    as_sum: set[Any] = set()
    plainly: set[Any] = set()  # Needed as what it is for the element.
    for v, is_sum in zip(straight.outvars, summed, strict=True):
        if is_var(v):
            (as_sum if is_sum else plainly).add(v)
    eqns: list[tuple[Any, Any]] = []
    for eqn in reversed(straight.eqns):
        is_own = [is_in(v, own_vars) for v in eqn.invars]
        moved = [v in as_sum & movable - plainly for v in eqn.outvars]
        how, operands = None, []
        if any(moved) and eqn.primitive.name == "scan":
            how, operands = _of_scan(eqn, is_own, moved)
        elif any(moved):
            how = operands = _summed_operands(eqn, is_own) or []
        elif not eqn.effects and not any(v in as_sum | plainly for v in eqn.outvars):
            continue
        for i, v in enumerate(eqn.invars):
            if is_var(v):
                (as_sum if i in operands else plainly).add(v)
        eqns.append((eqn, how))
    inputs = [v in as_sum - plainly for v in straight.invars]
    return _Sums(straight, eqns[::-1], [*summed], inputs)


def _movable(straight: Straight, own: Sequence[bool]) -> tuple[set[Any], set[Any]]:
    """What differs between elements, and what of it a contraction can sum."""
    own_vars = {v for v, is_own in zip(straight.invars, own, strict=True) if is_own}
    movable: set[Any] = set()
    for eqn in straight.eqns:
        is_own = [is_in(v, own_vars) for v in eqn.invars]
        if not any(is_own):
            continue
        own_vars.update(eqn.outvars)
        if eqn.primitive.name == "scan":
            body = _straight(eqn.params["jaxpr"])
            _, inside = _movable(body, _own_in_scan(eqn, is_own))
            results = zip(eqn.outvars, body.outvars, strict=True)
            movable.update(v for v, out in results if is_in(out, inside))
        elif (operands := _summed_operands(eqn, is_own)) is not None:
            reach = [is_in(eqn.invars[i], movable) for i in operands]
            if not operands or any(reach):
                movable.update(eqn.outvars)
    return own_vars, movable


def _summed_operands(eqn: Any, is_own: Sequence[bool]) -> list[int] | None:
    """Of which operands the sum makes the sum of the result.

    Empty for a contraction, which sums by itself. None if the sum cannot be moved.
    """
    name, params, own = eqn.primitive.name, eqn.params, where(is_own)
    if not all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
        return None
    if name == "dot_general" or eqn.primitive in _CONVOLUTIONS:
        groups = ("feature_group_count", "batch_group_count")
        is_grouped = any(params.get(key, 1) > 1 for key in groups)
        if len(own) == 2:
            return None if is_grouped or params.get("mapped") else []
        return own
    if name == "add_any":  # Of cotangents.
        return own if all(is_own) else None
    if name == "concatenate":
        return [*range(len(is_own))]
    if name == "mul":
        return own if len(own) == 1 else None
    if name == "convert_element_type":
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        is_real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (old, new))
        return [0] if is_real and wide(old).itemsize >= wide(new).itemsize else None
    if name == "pad":
        value = eqn.invars[1]
        return [0] if not is_var(value) and value.val == 0 else None
    return [0] if name in _LINEAR and own == [0] else None


def _own_in_scan(eqn: Any, is_own: Sequence[bool]) -> list[bool]:
    """Which inputs of a scan's body differ between elements; maybe not all do."""
    a, n_carry = scan_counts(eqn)
    return [*is_own[:a], *[True] * n_carry, *is_own[a + n_carry :]]


def _of_scan(
    eqn: Any, is_own: Sequence[bool], moved: Sequence[bool]
) -> tuple[_Sums | None, list[int]]:
    """Sums in a scan's body. A carry can be one if the body only adds to it."""
    a, n_carry = scan_counts(eqn)
    body, own = _straight(eqn.params["jaxpr"]), _own_in_scan(eqn, is_own)
    moved = [*moved]
    while any(moved):
        sums = _analysed(body, own, moved)
        fits = [not m or sums.inputs[a + k] for k, m in enumerate(moved[:n_carry])]
        if all(fits):
            return sums, [a + k for k in where(moved[:n_carry])]
        moved[:n_carry] = [m and f for m, f in zip(moved, fits, strict=False)]
    return None, []


#
# Running that for one element, under vmap. `jax.custom_batching.custom_vmap` tells what
# vmap does with a function: here it sums, and gives what is the same for all elements.
#
class _Element(NamedTuple):
    """The element: whether it counts, or None; and its index, which vmap maps."""

    is_valid: Any
    index: Any

    def masked(self, x: Any) -> Any:
        zero = jnp.zeros((), x.dtype)
        return x if self.is_valid is None else jnp.where(self.is_valid, x, zero)

    def total(self, x: Any) -> Any:
        return _total(self.masked(widened(x)), self.index)

    def contracted(self, eqn: Any, *operands: Any) -> Any:
        """A contraction, which is summed over the elements."""
        dtype = wide(eqn.outvars[0].aval.dtype)
        params = dict(eqn.params)
        if dtype != eqn.outvars[0].aval.dtype:
            params["preferred_element_type"] = dtype

        @jax.custom_batching.custom_vmap
        def contract(index, *operands):
            return eqn.primitive.bind(*operands, **params)

        @contract.def_vmap
        def _(axis_size, in_batched, index, *operands):
            operands = (
                x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                for x, is_batched in zip(operands, in_batched[1:], strict=True)
            )
            return _contracted_elements(eqn.primitive, params, *operands), False

        return contract(self.index, *map(self.masked, operands))


@jax.custom_batching.custom_vmap
def _total(x, index):
    return x


@_total.def_vmap
def _(axis_size, in_batched, x, index):
    total = jnp.sum(x, axis=0) if in_batched[0] else x * jnp.asarray(axis_size, x.dtype)
    return total.astype(x.dtype), False


def _contracted_elements(primitive: Any, params: Any, lhs: Any, rhs: Any) -> Any:
    """A contraction of all elements' operands, `[n, ...]` each, summed over them."""
    params = dict(params)
    numbers = params["dimension_numbers"]
    if primitive.name == "dot_general":
        contracted, batch = (
            [tuple(axis + 1 for axis in axes) for axes in pair] for pair in numbers
        )
        contracted = tuple((0, *axes) for axes in contracted)
        params["dimension_numbers"] = contracted, tuple(batch)
        return lax.dot_general_p.bind(lhs, rhs, **params)
    params.pop("mapped", None)
    (_, lhs_feature, *_), (_, rhs_feature, *_), _ = numbers
    lhs, rhs = (
        lax.collapse(jnp.moveaxis(x, 0, axis), axis, axis + 2)
        for x, axis in ((lhs, lhs_feature), (rhs, rhs_feature))
    )
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)


def _run(
    sums: _Sums, element: _Element, inputs: Sequence[Any], as_sums: Sequence[int] = ()
) -> list[Any]:
    """Runs a jaxpr; the inputs at `as_sums` are given as sums."""
    values: dict[Any, Any] = {**sums.straight.constants}
    totals: dict[Any, Any] = {}

    def read(atom):
        return values[atom] if is_var(atom) else atom.val

    def total(atom):
        if is_in(atom, totals):
            return totals[atom]
        x = element.total(jnp.asarray(read(atom), atom.aval.dtype))
        return totals.setdefault(atom, x) if is_var(atom) else x

    for i, (v, x) in enumerate(zip(sums.straight.invars, inputs, strict=True)):
        (totals if i in as_sums else values)[v] = x
    for eqn, how in sums.eqns:
        if how is None:
            one = sums.straight.template.replace(
                constvars=[],
                invars=(invars := [*dict.fromkeys(filter(is_var, eqn.invars))]),
                outvars=eqn.outvars,
                eqns=[eqn],
                effects=eqn.effects,
                debug_info=sums.straight.template.debug_info.with_unknown_names(),
            )
            outs = eval_jaxpr(one, (), *map(read, invars))
            values.update(zip(eqn.outvars, outs, strict=True))
        elif isinstance(how, _Sums):
            outs = _run_scan(eqn, how, element, read, total)
            for v, x, is_sum in zip(eqn.outvars, outs, how.outputs, strict=True):
                (totals if is_sum else values)[v] = x
        elif how:
            totals[eqn.outvars[0]] = _moved(eqn, how, read, total)
        else:
            xs = map(read, eqn.invars)
            totals[eqn.outvars[0]] = element.contracted(eqn, *xs)
    outs = zip(sums.straight.outvars, sums.outputs, strict=True)
    return [total(v) if is_sum else read(v) for v, is_sum in outs]


def _moved(eqn: Any, operands: Sequence[int], read: Any, total: Any) -> Any:
    """The sum of an equation's results: the equation on the sums of its operands."""
    dtype = wide(eqn.outvars[0].aval.dtype)
    if eqn.primitive.name == "convert_element_type":
        return total(eqn.invars[0]).astype(dtype)
    xs = [
        total(v) if i in operands else widened(jnp.asarray(read(v)))
        for i, v in enumerate(eqn.invars)
    ]
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = dtype
    return eqn.primitive.bind(*xs, **params)


def _run_scan(
    eqn: Any, sums: _Sums, element: _Element, read: Any, total: Any
) -> list[Any]:
    a, n_carry = scan_counts(eqn)
    as_sums = [a + k for k in where(sums.outputs[:n_carry])]
    xs = [total(v) if i in as_sums else read(v) for i, v in enumerate(eqn.invars)]

    def step(carry, x):
        outs = _run(sums, element, [*xs[:a], *carry, *x], as_sums)
        return outs[:n_carry], outs[n_carry:]

    how = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, xs[a : a + n_carry], xs[a + n_carry :], **how)
    return [*carry, *ys]
