"""What each primitive does to a placement's axis: the plan computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax

import drjax
from drjax.plan import MapReduce, Server


def identity(x):
    """Says that x is placed."""
    return drjax.map_fn(lambda v: v, x)


def said_placed(x, axis):
    return jnp.moveaxis(identity(jnp.moveaxis(x, axis, 0)), 0, axis)


def assert_planned(fn, n, args, want, primitive):
    """The plan gives what is wanted, and it is the elements who do the operation."""
    plan = drjax.make_plan(drjax.program(clients=n)(fn))(*args)
    (body,) = (stage.body for stage in plan.stages if isinstance(stage, MapReduce))
    server = [stage.jaxpr for stage in plan.stages if isinstance(stage, Server)]
    of_server, of_elements = (
        {eqn.primitive.name for jaxpr in jaxprs for eqn in jaxpr.jaxpr.eqns}
        for jaxprs in (server, [body])
    )
    assert primitive in of_elements - of_server
    got = drjax.run_plan(plan, *args)
    dtypes = [[out.dtype for out in jax.tree.leaves(outs)] for outs in (got, want)]
    assert dtypes[0] == dtypes[1]
    assert_close(got, want)
    return plan


def named(table):
    """Keys are primitives, and more if there are several entries for one."""
    return [pytest.param(key.split(":")[0], table[key], id=key) for key in table]


#
# Of one element: x of shape (4, 4) and indices i of shape (3, 4), some of them out of
# bounds; w and j are alike and the same for all.
#
def spd(x):
    return x @ x.T + 9 * jnp.eye(4)


def pooled(x, reducer=lax.max, init: object = -np.inf):
    return lax.reduce_window(x, init, reducer, (2, 3), (1, 2), "SAME")


def both(a, b):
    return a[0] + b[0], jnp.maximum(a[1], b[1])


def key_of(i):
    return jax.random.fold_in(jax.random.key(0), i[0, 0])


ONE = {
    "select_n": lambda x, i, w, j: (
        *(jnp.where(x[0, 0] > 0, x, w), jnp.where(w > 0, x, 1.0)),
        jnp.where(x[:, :1] > x[:1], w[:1], x[:, :1]),
    ),
    "clamp": lambda x, i, w, j: (lax.clamp(x - 1, w, x + 1), lax.clamp(-0.5, x, 0.5)),
    "regularized_incomplete_beta": lambda x, i, w, j: lax.betainc(x**2, w**2, 0.5),
    "random_clone": lambda x, i, w, j: jax.random.bits(jax.random.clone(key_of(i))),
    "random_gamma": lambda x, i, w, j: jax.random.gamma(key_of(i), x[0, 0] ** 2),
    "bitcast_convert_type": lambda x, i, w, j: [
        lax.bitcast_convert_type(x, t) for t in ("int32", "uint8")
    ],
    "optimization_barrier": lambda x, i, w, j: lax.optimization_barrier((x, x * 2)),
    "reshape": lambda x, i, w, j: (x.reshape(2, 1, 8), x.reshape(8, 2, order="F")),
    "concatenate": lambda x, i, w, j: jnp.concatenate([x, w, x], axis=1),
    "stack": lambda x, i, w, j: (jnp.stack([x, w, x]), jnp.stack([x, x], axis=2)),
    "unstack": lambda x, i, w, j: jnp.unstack(x, axis=1),
    "tile": lambda x, i, w, j: jnp.tile(x, (2, 3)),
    "sort": lambda x, i, w, j: lax.sort((x, w, x * w), dimension=0, num_keys=2),
    "top_k": lambda x, i, w, j: (lax.top_k(x, 2), lax.top_k(x > 0, 1)),
    "approx_top_k": lambda x, i, w, j: lax.approx_max_k(x, 2, reduction_dimension=0),
    "cumlogsumexp": lambda x, i, w, j: lax.cumlogsumexp(x, axis=1, reverse=True),
    "argmin": lambda x, i, w, j: lax.argmin(x, 0, "int8"),
    "reduce_xor": lambda x, i, w, j: lax.reduce_xor(i, axes=(1,)),
    "reduce_and": lambda x, i, w, j: jnp.all(x > -1, axis=0),
    "reduce_or": lambda x, i, w, j: lax.reduce_or(i, axes=(0,)),
    "reduce": lambda x, i, w, j: [
        lax.reduce((x, w), (0.0, -np.inf), both, axes) for axes in ((1,), (0, 1))
    ],
    "fft": lambda x, i, w, j: (jnp.fft.rfft2(x), jnp.fft.ifft(x + 1j * w)),
    "reduce_window_sum": lambda x, i, w, j: pooled(x, lax.add, 0.0),
    "reduce_window_max": lambda x, i, w, j: pooled(x),
    "reduce_window": lambda x, i, w, j: pooled((x, w), both, (0.0, -np.inf)),
    "select_and_scatter_add": jax.grad(lambda x, i, w, j: jnp.sum(pooled(x) ** 2)),
    "select_and_gather_add": lambda x, i, w, j: jax.jvp(pooled, (x,), (w,)),
    "cholesky": lambda x, i, w, j: lax.linalg.cholesky(spd(x)),
    "lu": lambda x, i, w, j: (lax.linalg.lu(x), jnp.linalg.det(x)),
    "lu_pivots_to_permutation": lambda x, i, w, j: lax.linalg.lu_pivots_to_permutation(
        lax.abs(i) % 2, 5
    ),
    "qr": lambda x, i, w, j: jnp.linalg.qr(x[:, :3]),
    "householder_product": lambda x, i, w, j: lax.linalg.householder_product(x, w[0]),
    "eigh": lambda x, i, w, j: jnp.linalg.eigvalsh(spd(x)),
    "eig": lambda x, i, w, j: jnp.abs(jnp.linalg.eigvals(x)).sum(),
    "svd": lambda x, i, w, j: jnp.linalg.svd(x[:, :3], compute_uv=False),
    "schur": lambda x, i, w, j: lax.linalg.schur(spd(x)),
    "hessenberg": lambda x, i, w, j: lax.linalg.hessenberg(x),
    "tridiagonal": lambda x, i, w, j: lax.linalg.tridiagonal(spd(x)),
    "tridiagonal_solve": lambda x, i, w, j: lax.linalg.tridiagonal_solve(
        *(x[0], 9 + w[1], x[2], w)
    ),
    "triangular_solve": lambda x, i, w, j: lax.linalg.triangular_solve(spd(x), w),
    "gather: of x": lambda x, i, w, j: (
        *(x[j], x[:, j], x[j[0], j[1]]),
        *(x.at[:, j].get(mode=mode, fill_value=7) for mode in ("fill", "clip")),
    ),
    "gather: by i": lambda x, i, w, j: (
        *(w[i], w[j, i], lax.dynamic_slice(w, (i[0, 0], i[1, 1]), (2, 1))),
        *(w.at[:, i].get(mode=mode, fill_value=7) for mode in ("fill", "clip")),
    ),
    "gather: of x by i": lambda x, i, w, j: (
        *(x[i], jnp.take_along_axis(x, i % 4, axis=0)),
        *(x.at[i, j].get(mode="fill", fill_value=-1), x.at[i].get(mode="clip")),
        lax.dynamic_slice(x, (i[0, 0], 1), (2, 3)),
    ),
    "scatter: in x": lambda x, i, w, j: (x.at[j[0]].set(w), x.at[:, j[0]].set(x)),
    "scatter: in x by i": lambda x, i, w, j: (
        *(x.at[i[0, 0]].set(1), x.at[i[0, 1], i[1, 1]].set(w[0, 0], mode="clip")),
        lax.dynamic_update_slice(x, w[:2], (i[0, 0], 0)),
    ),
    "scatter-add: in x": lambda x, i, w, j: x.at[:, j[0]].add(w),
    "scatter-add: in x by i": lambda x, i, w, j: (x.at[i].add(2), x.at[i, j].add(x[0])),
    "scatter-add: by i": lambda x, i, w, j: (w.at[i].add(2), w.at[j, i].add(w[0])),
    "scatter-add: gradient": jax.grad(
        lambda x, i, w, j: jnp.sum(x[i] ** 2) + jnp.sum(x[j, 1] ** 2)
    ),
    "scatter-sub": lambda x, i, w, j: x.at[i].subtract(x[1]),
    "scatter-max": lambda x, i, w, j: i.at[j % 2].max(0),
}

# Where the axis is, how many elements there are (unlike or like other sizes, or 1), and
# of which values an operator says that they are placed. Rules find the others.
SETTINGS = [
    *[(0, 2, "x and i"), (1, 2, "x or i"), (2, 2, "result")],
    *[(0, 4, "result"), (1, 4, "x and i"), (2, 4, "x or i")],
    *[(0, 1, "x and i"), (1, 1, "x and i"), (2, 1, "x or i")],
]


def arguments(n, axis):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(k, 4, 4)).astype("float32") for k in (n, 1))
    i, j = (rng.integers(-5, 6, size=(k, 3, 4)).astype("int32") for k in (n, 1))
    return np.moveaxis(x, 0, axis), np.moveaxis(i, 0, axis), w[0], j[0]


@functools.cache
def of_each(one, n):
    outs = jax.jit(jax.vmap(one, (0, 0, None, None)))(*arguments(n, 0))
    return jax.tree.leaves(outs)


@pytest.mark.parametrize("axis, n, said", SETTINGS)
@pytest.mark.parametrize("primitive, one", named(ONE))
def test_a_rule_is_the_vmap_of_the_function_of_one(primitive, one, axis, n, said):
    args = arguments(n, axis)
    used = jax.make_jaxpr(one)(*(a.take(0, axis) for a in args[:2]), *args[2:]).jaxpr
    uses_x = any(used.invars[0] in eqn.invars for eqn in used.eqns)

    def fn(x, i, w, j):
        if said == "x and i" or (said == "x or i" and uses_x):
            x = said_placed(x, axis)
        if said == "x and i" or (said == "x or i" and not uses_x):
            i = said_placed(i, axis)
        outs = jax.tree.leaves(jax.vmap(one, (axis, axis, None, None))(x, i, w, j))
        return identity(outs) if said == "result" else outs

    plan = assert_planned(fn, n, args, of_each(one, n), primitive)
    assert all(plan.at[out].axis == 0 for out in plan.outputs)
    assert not {*plan.inputs[2:]} & plan.at.keys()


#
# What vmap does not make: of a whole x with the placement on some axis, of which the
# other two have size 4, and of a w of shape (4, 4, 4) that is the same for all.
#
def shape(x, axis, size):
    """A shape that is whole along the axis, and of this size along the others."""
    return tuple(s if d == axis else size for d, s in enumerate(x.shape))


def corner(x, axis):
    return lax.slice(x, (0, 0, 0), shape(x, axis, 2))


def starts(axis, start):
    return [start if d == axis else d for d in range(3)]


INDEX = {a: jnp.array([starts(a, k) for k in (0, 1, -1)]) for a in range(3)}


def gathered(x, axis, mode):
    """Slices that are whole along the axis, from starts that are not all 0."""
    numbers = lax.GatherDimensionNumbers((1, 2, 3), (), (0, 1, 2))
    how = INDEX[axis], numbers, shape(x, axis, 2)
    return lax.gather(x, *how, mode=mode, fill_value=7)


def scattered(x, axis, mode):
    numbers = lax.ScatterDimensionNumbers((1, 2, 3), (), (0, 1, 2))
    updates = jnp.stack([corner(x, axis)] * 3)
    return lax.scatter_add(x, INDEX[axis], updates, numbers, mode=mode)


def conv(x, w, lhs=(0, 1, 2), rhs=(0, 1, 2), out=(0, 1, 2), images=1, features=1):
    numbers = lax.ConvDimensionNumbers(lhs, rhs, out)
    how = (2,), [(1, 2)], (1,), (2,), numbers, features, images
    return lax.conv_general_dilated(x, w, *how)


def of_images(x, w, axis, groups=1):
    spec, kernel = (axis, (axis + 1) % 3, (axis + 2) % 3), w[: 4 // groups, :3]
    return conv(x, kernel, spec, (2, 0, 1), spec, features=groups)


def of_kernels(x, w, axis):
    return conv(w, x, rhs=(axis, (axis + 1) % 3, (axis + 2) % 3), out=(2, 1, 0))


def gradients(fn, **how):
    return lambda x, w, axis: jax.grad(
        lambda x, w: jnp.sum(fn(x, w, axis, **how) ** 2), (0, 1)
    )(x, w)


WHOLE = {
    "bitcast_convert_type": lambda x, w, axis: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.uint8), jnp.int32
    ),
    "dynamic_slice": lambda x, w, axis: lax.dynamic_slice(
        x, starts(axis, 9), shape(x, axis, 2)
    ),
    "dynamic_update_slice": lambda x, w, axis: [
        lax.dynamic_update_slice(operand, update, starts(axis, 9))
        for operand, update in (
            *((x, corner(x, axis)), (x, jnp.sin(corner(jnp.ones_like(x), axis)))),
            (jnp.arange(1.0 * x.size).reshape(x.shape), corner(x, axis)),
        )
    ],
    "gather": lambda x, w, axis: (gathered(x, axis, "fill"), gathered(x, axis, "clip")),
    "scatter-add": lambda x, w, axis: (
        *(scattered(x, axis, "drop"), scattered(x, axis, "clip")),
        jax.grad(lambda x: jnp.sum(gathered(x, axis, "fill") ** 2))(x),
    ),
    "reshape": lambda x, w, axis: lax.reshape(
        x, (2, 1, 2, x.shape[axis], 4), ((axis + 1) % 3, axis, (axis + 2) % 3)
    ),
    "conv_general_dilated: images": of_images,
    "conv_general_dilated: gradients": gradients(of_images),
    "conv_general_dilated: groups": functools.partial(of_images, groups=2),
    "conv_general_dilated: gradients in groups": gradients(of_images, groups=2),
    "conv_general_dilated: kernels": of_kernels,
    "conv_general_dilated: their gradients": gradients(of_kernels),
    "reduce_max": lambda x, w, axis: (jnp.max(x > 0.9, axis), jnp.max(x + 1j * x**2)),
    "reduce_or": lambda x, w, axis: lax.reduce_or(jnp.int8(9 * x), (axis,)),
    "dot_general": lambda x, w, axis: (
        (
            *(jnp.tensordot(x, w, (axis - 1, 1)), jnp.tensordot(w, x, (1, axis - 1))),
            lax.dot_general(x, x, (((axis - 1,), (axis - 1,)), ((axis,), (axis,)))),
            lax.dot_general(x, x, (((axis,), (axis,)), ((), ()))),
        )
        if axis
        else jnp.tensordot(x, w, (1, 1))
    ),
}


@pytest.mark.parametrize("n", [3, 4, 1])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("primitive, whole", named(WHOLE))
def test_a_rule_keeps_to_the_axis(primitive, whole, axis, n):
    x, *_ = arguments(n, axis)
    w = np.random.default_rng(1).normal(size=(4, 4, 4)).astype("float32")
    want = jax.jit(whole, static_argnums=2)(x, w, axis)

    def fn(x, w):
        return whole(said_placed(x, axis), w, axis)

    plan = assert_planned(fn, n, (x, w), want, primitive)
    assert plan.at[plan.inputs[0]].axis == axis
    assert plan.inputs[1] not in plan.at


#
# What mixes elements, which are on the first axis of an x of shape (4, 4, 4); i has one
# index of each, and w is the same for all.
#
def window(x, size, stride, padding=(0, 0)):
    how = (size, 2, 2), (stride, 1, 1), (padding, (0, 0), (0, 0))
    return lax.reduce_window(x, 0.0, lax.add, *how)


def sliced(x, index, sizes):
    """Slices of these sizes, at an index; axes of which one is taken are dropped."""
    collapsed = tuple(range(x.ndim)) if max(sizes) == 1 else ()
    window = () if collapsed else tuple(range(x.ndim))
    into = tuple(range(index.size))
    return lax.gather(
        x, index, lax.GatherDimensionNumbers(window, collapsed, into), sizes
    )


def put(x, part):
    return lax.dynamic_update_slice(x, part, (1, 0, 0))


MIXING = {
    "gather: picks elements": lambda x, i, w: x[jnp.array([1, 0])],
    "gather: their order": lambda x, i, w: x[jnp.arange(4), i],
    "gather: each by each": lambda x, i, w: x[:, i],
    "gather: some": lambda x, i, w: sliced(x, jnp.array([0]), (2, 4, 4)),
    "gather: one index": lambda x, i, w: sliced(w.reshape(2, 2, 4, 4), i, (1,) * 4),
    "scatter: picks elements": lambda x, i, w: x.at[jnp.array([1, 2])].set(0),
    "scatter: each in all": lambda x, i, w: w.at[i].set(x),
    "scatter-add: each in all": lambda x, i, w: w.at[i].add(x),
    "scatter-add: each in each": lambda x, i, w: x.at[:, i].add(1),
    "scatter-add: gradient": lambda x, i, w: jax.grad(lambda w: jnp.sum(w[i] * x))(w),
    "scatter-max": lambda x, i, w: x.at[i].max(0),
    "dynamic_slice": lambda x, i, w: lax.dynamic_slice_in_dim(x, 1, 2, 0),
    "dynamic_update_slice: some": lambda x, i, w: put(x, w[:2]),
    "dynamic_update_slice: in more": lambda x, i, w: put(jnp.tile(w, (2, 1, 1)), x),
    "reduce_window_sum: wide": lambda x, i, w: window(x, 2, 1),
    "reduce_window_sum: stride": lambda x, i, w: window(x, 1, 2),
    "reduce_window_sum: padding": lambda x, i, w: window(x, 1, 1, (1, -1)),
    "conv_general_dilated: in space": lambda x, i, w: conv(x, w, lhs=(2, 1, 0)),
    "conv_general_dilated: each by each": lambda x, i, w: conv(x, x),
    "conv_general_dilated: kernel": lambda x, i, w: conv(w, x, rhs=(1, 2, 0)),
    "conv_general_dilated: groups of x": lambda x, i, w: conv(x, w, images=2),
    "conv_general_dilated: groups of w": lambda x, i, w: conv(w, x[:, :2], features=2),
    "conv_general_dilated: groups": lambda x, i, w: conv(
        *(x, w[:, :2], (1, 0, 2)), features=2
    ),
    "fft": lambda x, i, w: jnp.fft.fftn(x),
    "cholesky": lambda x, i, w: lax.linalg.cholesky(x.mT.T, symmetrize_input=False),
    "tridiagonal_solve": lambda x, i, w: lax.linalg.tridiagonal_solve(
        *(i * 1.0, i * 1.0, i * 1.0, w[0])
    ),
    "top_k": lambda x, i, w: lax.top_k(x, 2, axis=0),
    "approx_top_k": lambda x, i, w: lax.approx_max_k(x.T, 2),
    "stack": lambda x, i, w: jnp.stack([x, x.mT.T]),
    "unstack": lambda x, i, w: jnp.unstack(x),
    "split": lambda x, i, w: jnp.split(x, 2),
    "tile": lambda x, i, w: jnp.tile(x, (2, 1, 1)),
    "reduce": lambda x, i, w: lax.reduce(x, 1.0, lambda a, b: a + b + a * b, (0, 1)),
    "reduce_xor": lambda x, i, w: lax.reduce_xor(i, (0,)),
    "argmax": lambda x, i, w: jnp.argmax(x, 0),
    "reshape": lambda x, i, w: lax.reshape(x, (4, 16), (1, 0, 2)),
    "concatenate": lambda x, i, w: jnp.concatenate([x, x.T], 1),
    "pad": lambda x, i, w: lax.pad(x, 0.0, [(1, -1, 0), (0, 0, 0), (0, 0, 0)]),
    "clamp": lambda x, i, w: lax.clamp(x, x.T, x),
    "dot_general": lambda x, i, w: jnp.tensordot(x, x, (1, 1)),
    "random_gamma": lambda x, i, w: jax.random.gamma(jax.random.key(0), x**2),
    "random_wrap": lambda x, i, w: jax.random.wrap_key_data(jnp.uint32(i), impl="rbg"),
    "bitcast_convert_type": lambda x, i, w: jnp.uint8(x.T).view("uint32"),
    "optimization_barrier: scalar": lambda x, i, w: lax.optimization_barrier((x, 1.0)),
    "optimization_barrier": lambda x, i, w: lax.optimization_barrier((x, w[:2])),
}
OF_ONE = {
    "squeeze": lambda x: x.squeeze(0),
    "mul": lambda x: x * jnp.ones((3, 1, 1)),
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x, (3, 4, 4)),
    "gather": lambda x: x[jnp.array([0, 0, 0])],
    "tile": lambda x: jnp.tile(x, (3, 1, 1)),
    "dynamic_update_slice": lambda x: put(jnp.ones((3, 4, 4)), x),
}


def assert_mixes(fn, n, args, primitive):
    with pytest.raises(drjax.PlanError, match=rf"{primitive} \(.* mixes the elements"):
        drjax.make_plan(drjax.program(clients=n)(fn))(*args)


@pytest.mark.parametrize("primitive, fn", named(MIXING))
def test_mixing_elements_is_an_error_that_names_the_operation(primitive, fn):
    x, i = np.ones((4, 4, 4), "float32"), np.arange(4, dtype="int32")
    run = lambda x, i, w: fn(identity(x), identity(i), w)  # noqa: E731
    assert_mixes(run, 4, (x, i, x), primitive)


@pytest.mark.parametrize("primitive, fn", named(OF_ONE))
def test_the_axis_of_a_single_element_is_neither_dropped_nor_repeated(primitive, fn):
    x = np.ones((1, 4, 4), "float32")
    assert_mixes(lambda x: fn(identity(x)), 1, [x], primitive)
