"""Convolutions whose input and kernel both differ between elements, as matmuls.

vmap makes one convolution with a group for each element of them, which is slow on CPU
and GPU. Write b for the batch, p for output positions, q for input positions, k for
the taps of the kernel, c and o for channels, and X for the input x, padded and dilated.
With stride s and kernel dilation d, in each spatial dimension,

    out[b, p, o] = sum_{k, c} X[b, p s + k d, c] w[k, c, o]

which is slices and matmuls, batched by vmap:

    by tap       sum_k (slice_k of X)[b, p, c] w[k, c, o]
    late         sum_k slice_k of X, for X what padding and dilating make of
                 y_k[b, q, o] = sum_c x[b, q, c] w[k, c, o]
    by position  for each p: sum_{k, c} (slice_p of X)[b, k, c] w[k, c, o]

where slice_k holds X at p s + k d for all p, and slice_p for all k. The taps are few in
a layer and in the gradient of its input; the positions in that of its kernel. By tap is
best where the input has fewer numbers than the result, late where it has more. A matmul
of few channels by tap, or of a small batch by position, is slow, so those of several
slices stand side by side then, axis by axis: the more familiar im2col.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, mapped_aval, unmapped_aval
from jax.interpreters import batching, mlir

from drjax._compat import ClosedJaxpr
from drjax._jaxprs import cached_by_jaxpr, in_equation, in_jaxpr

# Measured on CPU. A convolution stays one if it needs more slices than that, or if its
# taps side by side, for one element, are more numbers than that.
_MAX_SLICES = 64
_MAX_PATCHES = 2**19
_WIDE = 32  # Rows or columns that are worth a matmul of their own.


#
# convolution_p: a conv_general_dilated with its parameters, and `mapped`: the number
# of leading axes over which it is mapped, or None if only vmap will tell. With a
# number, it is lowered to matmuls.
#
convolution_p = Primitive("drjax_convolution")


def _run(lhs, rhs, *, mapped, **params):
    return _vmap(_convolution, mapped, params)(lhs, rhs)


def _run_matmuls(lhs, rhs, *, mapped, **params):
    one = _convolution if mapped is None else _matmuls
    return _vmap(one, mapped, params)(lhs, rhs)


def _vmap(fn, mapped, params):
    fn = functools.partial(fn, **params)
    for _ in range(mapped or 0):
        fn = jax.vmap(fn)
    return fn


def _convolution(lhs, rhs, **params):
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)


def _abstract_eval(lhs, rhs, *, mapped, **params):
    if not mapped:
        return lax.conv_general_dilated_p.abstract_eval(lhs, rhs, **params)[0]
    n = lhs.shape[0]
    one = mapped_aval(n, 0, lhs), mapped_aval(n, 0, rhs)
    return unmapped_aval(n, 0, _abstract_eval(*one, mapped=mapped - 1, **params))


def _batch(args, dims, *, mapped, **params):
    if None in dims or (not mapped and args[0].shape[dims[0]] == 1):
        run = functools.partial(_run, mapped=mapped, **params)
        return jax.vmap(run, dims)(*args), 0
    lhs, rhs = (jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True))
    if any(jax.typeof(lhs).sharding.spec):  # Explicit axes: JAX refuses the groups.
        return _run_matmuls(lhs, rhs, mapped=(mapped or 0) + 1, **params), 0
    return convolution_p.bind(lhs, rhs, mapped=(mapped or 0) + 1, **params), 0


_PARAMETERS = (
    *("mapped", "window_strides", "padding", "lhs_dilation", "rhs_dilation"),
    *("dimension_numbers", "feature_group_count", "batch_group_count", "precision"),
    *("preferred_element_type", "out_sharding"),
)
convolution_p.def_impl(jax.jit(convolution_p.bind, static_argnames=_PARAMETERS))
convolution_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[convolution_p] = _batch
mlir.register_lowering(convolution_p, mlir.lower_fun(_run, multiple_results=False))
for _platform in ("cpu", "cuda", "rocm"):
    mlir.register_lowering(
        convolution_p,
        mlir.lower_fun(_run_matmuls, multiple_results=False),
        platform=_platform,
    )


@cached_by_jaxpr
def of_elements(body: ClosedJaxpr) -> ClosedJaxpr:
    """A body in which vmap will tell which convolutions are mapped."""
    return _replaced(body, lambda params: dict(params, mapped=None))


@cached_by_jaxpr
def of_many(jaxpr: ClosedJaxpr, m: int) -> ClosedJaxpr:
    """A jaxpr of m elements at once in which those that vmap has grouped are found."""

    def new_params(params):
        groups = params["feature_group_count"] * params["batch_group_count"]
        return dict(params, mapped=None if m == 1 or groups % m else 0)

    return _replaced(jaxpr, new_params)


def as_matmuls(eqn: Any) -> Any:
    """An equation, and those inside it, with matmuls for convolutions."""
    replace = _replacing(lambda params: dict(params, mapped=0))
    return in_equation(replace, eqn, lax.conv_general_dilated_p.name)


def _replaced(jaxpr: Any, new_params: Any) -> Any:
    """Makes `convolution_p` of convolutions, also in the jaxprs inside."""
    return in_jaxpr(_replacing(new_params), jaxpr, lax.conv_general_dilated_p.name)


def _replacing(new_params: Any) -> Any:
    def replace(eqn):
        if eqn.primitive is not lax.conv_general_dilated_p:
            return eqn
        return eqn.replace(primitive=convolution_p, params=new_params(eqn.params))

    return replace


#
# One convolution as matmuls.
#
def _matmuls(lhs, rhs, *, feature_group_count, batch_group_count, **params):
    (x_b, x_c, *x_space), (w_o, w_c, *w_space), out_spec = params["dimension_numbers"]
    groups = dict(feature_group_count=1, batch_group_count=1)
    if (n := feature_group_count * batch_group_count) > 1:  # One of the two is 1.
        axis, out_axis = x_c if feature_group_count > 1 else x_b, out_spec[1]
        one = functools.partial(_matmuls, **groups, **params)
        out = jax.vmap(one, (axis, w_o), out_axis)(
            _split(lhs, axis, n), _split(rhs, w_o, n)
        )
        return lax.collapse(out, out_axis, out_axis + 2)

    convolution = functools.partial(_convolution, **groups, **params)
    if any(map(jax.export.is_symbolic_dim, (*lhs.shape, *rhs.shape))):
        return convolution(lhs, rhs)
    out = jax.eval_shape(convolution, lhs, rhs)
    x, w = lhs.transpose(x_b, *x_space, x_c), rhs.transpose(*w_space, w_c, w_o)
    taps = w.shape[:-2]
    positions = tuple(out.shape[axis] for axis in out_spec[2:])
    n_slices = min(math.prod(taps), math.prod(positions))
    sharding = params["out_sharding"]
    sharded = sharding is not None and any(sharding.spec)
    if sharded or not 0 < n_slices <= _MAX_SLICES:
        return convolution(lhs, rhs)

    # Sums of halves are kept in float32, as in one matmul.
    half = jnp.issubdtype(out.dtype, jnp.floating) and jnp.finfo(out.dtype).bits < 32
    dot = functools.partial(
        lax.dot_general,
        precision=params["precision"],
        preferred_element_type=jnp.float32 if half else out.dtype,
    )
    geometry = taps, positions, params["rhs_dilation"], params["window_strides"]
    pad = functools.partial(_pad, params["padding"], params["lhs_dilation"])
    if n_slices < math.prod(taps):
        form = _by_position
    elif math.prod(positions) * x.shape[-1] <= math.prod(x.shape[1:-1]) * w.shape[-1]:
        form = _by_tap
    else:
        form = _by_tap_late
    if form is _by_tap:
        n_patches = x.shape[0] * math.prod(positions) * _widened(x.shape[-1], taps)[1]
        if n_patches > _MAX_PATCHES and x.shape[-1] < _WIDE:
            return convolution(lhs, rhs)
    result = form(x, w, pad, dot, *geometry).astype(out.dtype)  # [b, *p, o]
    axes = 0, result.ndim - 1, *range(1, result.ndim - 1)
    return jnp.moveaxis(result, axes, out_spec)


def _by_position(x, w, pad, dot, taps, positions, dilation, stride):
    x, b = pad(x), x.shape[0]
    lead, _ = _widened(b, positions)
    for axis in reversed(range(lead, len(taps))):
        one = slice(axis, axis + 1)
        geometry = stride[one], taps[one], dilation[one]
        slices = [_slice(x, i, *geometry, axis + 1) for i in _indices(positions[one])]
        x = jnp.concatenate(slices)
    size = [(n - 1) * d + 1 for n, d in zip(taps[:lead], dilation, strict=False)]
    size = x.shape[0], *size, *x.shape[lead + 1 :]
    axes = tuple(range(w.ndim - 1))

    def at(start):  # In a loop, for all the windows at once are large.
        rest = [0] * (len(taps) - lead + 1)
        window = lax.dynamic_slice(x, [0, *start, *rest], size)
        geometry = dilation[:lead], taps[:lead], dilation[:lead]
        window = _slice(window, [0] * lead, *geometry)
        return dot(window, w, ((tuple(axis + 1 for axis in axes), axes), ((), ())))

    starts = [*_indices(positions[:lead])]
    outs = lax.map(at, jnp.array(starts) * jnp.array(stride[:lead]))
    outs = lax.collapse(outs, 0, 2).reshape(*positions, b, w.shape[-1])
    return jnp.moveaxis(outs, -2, 0)


def _by_tap(x, w, pad, dot, taps, positions, dilation, stride):
    x = pad(x)
    lead, _ = _widened(x.shape[-1], taps)
    for axis in reversed(range(lead, len(taps))):
        one = slice(axis, axis + 1)
        geometry = dilation[one], positions[one], stride[one]
        slices = [_slice(x, i, *geometry, axis + 1) for i in _indices(taps[one])]
        x = jnp.concatenate(slices, -1)
    w = lax.collapse(w, lead, len(taps) + 1)
    geometry = dilation[:lead], positions[:lead], stride[:lead]
    return sum(
        dot(_slice(x, i, *geometry), w[i], (((x.ndim - 1,), (0,)), ((), ())))
        for i in _indices(taps[:lead])
    )


def _by_tap_late(x, w, pad, dot, taps, positions, dilation, stride):
    w = lax.collapse(w, 0, len(taps))  # [k, c, o]
    y = dot(x, w, (((x.ndim - 1,), (1,)), ((), ())))  # [b, *q, k, o]
    return sum(
        _slice(pad(y[..., k, :]), i, dilation, positions, stride)
        for k, i in enumerate(_indices(taps))
    )


def _widened(width, counts):
    """Puts what the last axes count side by side until that is wide enough.

    Returns how many axes are left, and the width.
    """
    lead = len(counts)
    while lead and width < _WIDE:
        lead -= 1
        width *= counts[lead]
    return lead, width


def _indices(counts):
    return itertools.product(*map(range, counts))


def _pad(padding, dilation, x):
    """Pads and dilates the spatial axes, all but the first and the last."""
    space = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, dilation, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])


def _slice(x, index, step, counts, stride, axis=1):
    """On axes from `axis` on, `counts` values from `index * step`, `stride` apart."""
    for i, d, n, s in zip(index, step, counts, stride, strict=True):
        x = lax.slice_in_dim(x, i * d, i * d + (n - 1) * s + 1, s, axis)
        axis += 1
    return x


def _split(x, axis, n):
    each = x.shape[axis] // n  # Not -1, which cannot be told if there is no number.
    return x.reshape(*x.shape[:axis], n, each, *x.shape[axis + 1 :])
