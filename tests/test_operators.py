"""Operators: values, dtypes and trees, against plain `jnp` and `jax.vmap`."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import drjax
from drjax._primitives import reduce_sum_p

N = 5
HOW = {"eager": lambda fn: fn, "jit": jax.jit}
EAGER_AND_JIT = pytest.mark.parametrize("how", HOW.values(), ids=HOW)
REDUCTIONS = {
    drjax.reduce_sum: jnp.sum,
    drjax.reduce_mean: jnp.mean,
    drjax.reduce_max: jnp.max,
    drjax.reduce_min: jnp.min,
}
DTYPES = [
    *("bool", "int8", "int16", "int32", "uint8", "uint32"),
    *("float16", "bfloat16", "float32", "complex64"),
]
X64_DTYPES = [*DTYPES, "int64", "uint64", "float64", "complex128"]
WEIGHT_DTYPES = ["bool", "uint8", "int32", "bfloat16", "float32", "complex64"]
X64_AND_DTYPE = pytest.mark.parametrize(
    "x64, dtype", [*((False, d) for d in DTYPES), *((True, d) for d in X64_DTYPES)]
)


def program(fn, n=N):
    return drjax.program(clients=n)(fn)


def sample(dtype, shape=(N, 3), seed=0):
    """Random numbers; integers over their whole range."""
    rng, dtype = np.random.default_rng(seed), jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(
            rng.integers(info.min, info.max, shape, dtype, endpoint=True)
        )
    x, y = rng.normal(size=(2, *shape))
    return jnp.asarray({"b": x > 0, "c": x + 1j * y}.get(dtype.kind, x), dtype)


X, W = sample("float32"), abs(sample("float32", (N,), seed=1))


def assert_same(got, want, terms=()):
    """Same structure and types; same values, but for a few roundings of the terms."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    sizes = [np.sum(np.abs(np.asarray(x, complex))) for x in jax.tree.leaves(terms)]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        if jnp.issubdtype(g.dtype, jnp.inexact):
            tolerance = 4 * float(jnp.finfo(g.dtype).eps) * max(sizes, default=1.0)
            g, w = np.asarray(g, complex), np.asarray(w, complex)
            np.testing.assert_allclose(g, w, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(g, w)


#
# Reductions.
#
@X64_AND_DTYPE
def test_reductions_agree_with_jnp(dtype, x64):
    with jax.enable_x64(x64):
        x = sample(dtype)
        reduce = program(lambda x: [reduce(x) for reduce in REDUCTIONS])
        want = jax.jit(lambda x: [plain(x, axis=0) for plain in REDUCTIONS.values()])(x)
        assert_same(reduce(x), want, x)
        assert_same(jax.jit(reduce)(x), want, x)
        shapes = jax.eval_shape(reduce, x)
        assert [(s.shape, s.dtype) for s in shapes] == [
            (w.shape, w.dtype) for w in want
        ]


@EAGER_AND_JIT
@pytest.mark.parametrize(
    "dtype, x",
    [
        ("bfloat16", [256, 1, 1]),
        ("float16", [2048, 1, 1]),
        ("float16", [60000, 60000, -60000]),
    ],
)
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype, x, how):
    x = jnp.array(x, dtype)
    assert how(program(drjax.reduce_sum, 3))(x) == x.astype("float32").sum()
    mean = x.astype("float32").mean().astype(dtype)
    assert how(program(drjax.reduce_mean, 3))(x) == mean


@pytest.mark.parametrize("dtype, value", [("float16", 2), ("int32", 2**30)])
def test_a_mean_does_not_overflow(dtype, value):
    x = jnp.full(100_000, value, dtype)
    np.testing.assert_allclose(program(drjax.reduce_mean, len(x))(x), value, rtol=1e-6)


@EAGER_AND_JIT
@pytest.mark.parametrize("reduce", [drjax.reduce_max, drjax.reduce_min])
@pytest.mark.parametrize("x", [X, jnp.round(X), 0 * X, X.at[2].set(jnp.nan)])
def test_gradients_of_extrema_share_ties_as_in_jnp(reduce, x, how):
    def gradient(fn):
        return how(jax.grad(lambda x: fn(x) @ jnp.arange(3.0)))(x)

    want = gradient(lambda x: REDUCTIONS[reduce](x, axis=0))
    np.testing.assert_allclose(gradient(program(reduce)), want, rtol=1e-6)


@pytest.mark.parametrize("reduce", [drjax.reduce_max, drjax.reduce_min])
def test_derivatives_of_extrema_match_finite_differences_without_ties(reduce):
    x = jnp.array([0.5, -1.0, 1.0, 0.0, -0.5])
    fn = jax.jit(program(lambda x: reduce(jnp.sin(x)) ** 2))
    check_grads(fn, (x,), order=1, modes=("fwd", "rev"), rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_with_a_mask_selects_one_element(dtype):
    @jax.jit
    @program
    def select(x, i):
        return drjax.reduce_sum(x * (drjax.placement_index() == i).astype(x.dtype))

    x = sample(dtype, (N,))
    for i in (0, N - 1):
        assert select(x, i) == x[i]


#
# Weighted means.
#
@EAGER_AND_JIT
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((), "float32"),
        ((), "int32"),
        ((), "bool"),
        ((2,), "float32"),
        ((3, 1), "int32"),
        ((3, 2), "float32"),
    ],
)
def test_a_weighted_mean_weighs_each_element(shape, dtype, how):
    x = sample("float32", (N, 3, 2))
    w = jnp.ceil(sample("float32", (N, *shape), seed=1) ** 2).astype(dtype)
    got = how(program(drjax.reduce_weighted_mean))(x, w)
    weighted = sum(np.asarray(w_i) * x_i for w_i, x_i in zip(w, x, strict=True))
    np.testing.assert_allclose(got, weighted / np.sum(w, axis=0), rtol=1e-5, atol=1e-6)


@X64_AND_DTYPE
def test_a_weighted_mean_has_the_dtype_of_average(dtype, x64):
    with jax.enable_x64(x64):
        for weight_dtype in WEIGHT_DTYPES + ["int64", "float64"] * x64:
            x, w = jnp.ones((N, 3), dtype), jnp.ones(N, weight_dtype)
            got = jax.eval_shape(program(drjax.reduce_weighted_mean), x, w)
            want = jax.eval_shape(lambda x, w: jnp.average(x, 0, weights=w), x, w)
            assert (got.shape, got.dtype) == (want.shape, want.dtype), weight_dtype


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_weights_are_summed_in_the_precision_of_the_result(dtype):
    with jax.enable_x64(True):
        x, w = sample("float64"), jnp.array([2**24, 1, 1, 1, 1], dtype)
        got = program(drjax.reduce_weighted_mean)(x, w)
        np.testing.assert_allclose(got, jnp.average(x, 0, weights=w), rtol=1e-12)


@pytest.mark.parametrize(
    "weights, powers, denominators",
    [
        (lambda w: w, (1, 1, 1), 1),
        (lambda w: {"a": w, "b": w**2}, (1, 2, 2), 2),
        (lambda w: {"a": w, "b": (w, {"c": w})}, (1, 1, 1), 1),
        (lambda w: {"a": w, "b": (w**2, w**3)}, (1, 2, 3), 3),
    ],
)
def test_weights_are_a_prefix_and_each_is_summed_once(weights, powers, denominators):
    def mean(x, w):
        tree = {"a": x, "b": (x**2, {"c": x**3})}
        return drjax.reduce_weighted_mean(tree, weights(w))

    p = powers
    of_x = [jnp.average(X ** (i + 1), 0, weights=W ** p[i]) for i in range(3)]
    want = {"a": of_x[0], "b": (of_x[1], {"c": of_x[2]})}
    assert_same(program(mean)(X, W), want, X**3)
    eqns = jax.make_jaxpr(program(mean))(X, W).jaxpr.eqns
    assert [eqn.primitive for eqn in eqns].count(reduce_sum_p) == 3 + denominators


@EAGER_AND_JIT
def test_a_total_weight_of_zero_gives_nan_or_the_default(how):
    @how
    @program
    def mean(x, w, default=None):
        return drjax.reduce_weighted_mean(x, w, default=default)

    w = jnp.stack([W, 0 * W, jnp.linspace(-1, 1, N)], axis=1)  # Totals: some, 0, 0.
    some = float(jnp.average(X[:, 0], weights=W))
    np.testing.assert_allclose(mean(X, w)[:2], [some, jnp.nan], rtol=1e-5)
    np.testing.assert_allclose(mean(X, w, 7), [some, 7, 7], rtol=1e-5)
    got = mean({"a": X, "b": (X, X)}, w, {"a": 7.0, "b": jnp.array([1.0, 2.0, 3.0])})
    np.testing.assert_allclose(got["a"], [some, 7, 7], rtol=1e-5)
    np.testing.assert_allclose(got["b"], [[some, 2, 3]] * 2, rtol=1e-5)

    gradient = jax.grad(lambda x, w, d: jnp.sum(mean(x, w, d)), (0, 1, 2))
    *got, of_default = gradient(X, w, jnp.float32(7))
    want = jax.grad(lambda x, w: jnp.average(x, weights=w), (0, 1))(X[:, 0], W)
    for g, column in zip(got, want, strict=True):
        np.testing.assert_allclose(g[:, 0], column, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(g[:, 1:], 0)
    assert of_default == 2


#
# Trees, generated and chosen.
#
@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    first: Any
    second: Any


def trees(n):
    dtypes = st.sampled_from(["bool", "int8", "float16", "float32", "complex64"])
    shapes = st.lists(st.integers(0, 2), max_size=2).map(lambda shape: (n, *shape))
    return st.recursive(
        st.builds(sample, dtypes, shapes, st.integers(0, 9)) | st.none(),
        lambda tree: st.one_of(
            st.dictionaries(st.sampled_from("abc"), tree, max_size=2),
            st.lists(tree, max_size=2).map(tuple),
            st.builds(Pair, tree, tree),
        ),
        max_leaves=3,
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([1, 3]).flatmap(lambda n: st.tuples(st.just(n), trees(n))))
def test_operators_on_any_tree_are_jnp_on_stacked_rows(n_and_tree):
    n, tree = n_and_tree
    rows = [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(n)]
    backwards = jax.tree.map(lambda x: x[::-1], tree)

    def stack(rows):
        return jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    def fn(*args):
        return args, jax.tree.map(lambda x: 2 * x.sum(), args)

    assert_same(program(drjax.broadcast, n)(rows[0]), stack([rows[0]] * n))
    of_rows = [fn(*row) if isinstance(tree, tuple) else fn(row) for row in rows]
    mapped = program(lambda x: drjax.map_fn(fn, x), n)
    assert_same(mapped(tree), stack(of_rows), tree)
    assert_same(mapped(backwards), stack(of_rows[::-1]), tree)
    for reduce, plain in REDUCTIONS.items():
        want = jax.tree.map(lambda x, plain=plain: plain(x, axis=0), tree)
        assert_same(program(reduce, n)(tree), want, tree)
        assert_same(program(reduce, n)(backwards), want, tree)


Named = collections.namedtuple("Named", "a b")
GRAPH, STATE = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
STATES = jax.tree.map(lambda x: jnp.stack([i * x for i in range(N)]), STATE)
KEYS = jax.random.split(jax.random.key(0), N)


def apply(state, x):
    model = nnx.merge(GRAPH, state)
    return nnx.state(model), model(x)


def assert_same_and_as_weak(got, want):
    assert_same(got, want)
    assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, want)


@EAGER_AND_JIT
@pytest.mark.parametrize(
    "fn, arg",
    [
        (lambda x: {"square": x * x, "x": (x,)}, X),
        (lambda x: x + 1, (X,)),
        (lambda x, y: {"sum": x + y, "x": x}, (X, W)),
        (lambda x, y: Named(y, x), Named(X, W)),  # It is a tuple.
        (lambda xs: xs[0] * xs[1], [X, W]),
        (lambda x, none, tree: (none, x, tree["a"] is None), (X, None, {"a": None})),
        (lambda x: (1, 2.0, True, 1j, np.arange(2), None, x), np.asarray(X)),
        (lambda x: (), X),
        (jax.random.normal, KEYS),
        (lambda key: jax.random.split(key, 2), KEYS),
        (apply, (STATES, X)),
    ],
)
def test_map_fn_is_vmap_with_a_tuple_unpacked(fn, arg, how):
    want = how(jax.vmap(fn))(*(arg if isinstance(arg, tuple) else [arg]))
    assert_same_and_as_weak(how(program(lambda x: drjax.map_fn(fn, x)))(arg), want)


@EAGER_AND_JIT
def test_a_map_of_no_arguments_repeats_its_value(how):
    got = how(program(lambda: drjax.map_fn(lambda: (1, X[0]), ())))()
    assert_same(got, (jnp.full(N, 1), jnp.stack([X[0]] * N)))


@EAGER_AND_JIT
@pytest.mark.parametrize(
    "x", [2, 2.0, True, 1j, np.float64(2), np.arange(3), KEYS[0], KEYS, X, STATE, None]
)
def test_broadcast_is_broadcast_to(x, how):
    want = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *jnp.shape(x))), x)
    assert_same_and_as_weak(how(program(lambda: drjax.broadcast(x)))(), want)


@pytest.mark.parametrize("x", [2, 2.0, True, 1j, np.float64(2), np.arange(3.0), X])
def test_operators_work_under_disable_jit(x):
    rows = np.stack([x] * N)
    with jax.disable_jit():
        assert_same(program(drjax.broadcast)(x), jnp.asarray(rows))
        for reduce, plain in REDUCTIONS.items():
            assert_same(program(reduce)(rows), plain(rows, axis=0), rows)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("how", [*HOW.values(), jax.vmap], ids=[*HOW, "vmap"])
def test_size_and_index_are_int32_in_every_context(how, x64):
    def fn(x):
        return drjax.placement_size() + x, drjax.placement_index() + x

    with jax.enable_x64(x64):
        x = np.arange(3, dtype="int32")[:, None]  # [3, 1]
        size, index = how(program(fn))(x)
    assert_same(size, jnp.int32(N) + x)
    assert_same(index.reshape(3, N), jnp.arange(N, dtype="int32") + x)


#
# Integer inputs.
#
@EAGER_AND_JIT
@pytest.mark.parametrize(
    "fn, plain",
    [
        (drjax.reduce_sum, lambda k: jnp.sum(k, 0)),
        (drjax.reduce_mean, lambda k: jnp.mean(k, 0)),
        (drjax.reduce_max, lambda k: jnp.max(k, 0)),
        (drjax.broadcast, lambda k: jnp.stack([k] * N)),
        (lambda k: drjax.map_fn(lambda k: (k, k / 2), k), lambda k: (k, k / 2)),
        (lambda k: drjax.reduce_weighted_mean(X, k), lambda k: k @ X / jnp.sum(k)),
    ],
)
def test_integers_have_float0_derivatives_as_in_jax(fn, plain, how):
    def derivative_of(x):
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return np.ones(x.shape, x.dtype if inexact else jax.dtypes.float0)

    def derivatives(fn):
        out, pullback = jax.vjp(fn, k)
        tangent = jax.jvp(fn, (k,), (derivative_of(k),))[1]
        gradient = jax.grad(
            lambda k: 1.0 * sum(jnp.sum(x) for x in jax.tree.leaves(fn(k))),
            allow_int=True,
        )
        return tangent, pullback(jax.tree.map(derivative_of, out)), gradient(k)

    k = jnp.arange(1, N + 1)
    got, want = derivatives(how(program(fn))), derivatives(how(plain))
    assert got[2].dtype == jax.dtypes.float0
    assert_same(got, want)
