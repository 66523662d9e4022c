"""A mapped convolution computed as matmuls is that convolution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType

import drjax

N = 4
DN = ("NHWC", "HWIO", "NHWC")


def program(body, on=True):
    """Maps `body` over inputs and kernels."""
    declare = drjax.program(clients=N, convolutions_as_matmuls=on)
    return declare(lambda *args: drjax.map_fn(body, args))


def lowered(fn, *args) -> str:
    return jax.jit(fn).lower(*args).as_text()


def normal(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def value_and_gradients(run):
    return jax.value_and_grad(lambda *args: jnp.real(run(*args)), (0, 1))


def with_second_order(run):
    def norm(x, w):
        return sum(jnp.sum(jnp.abs(g) ** 2) for g in value_and_gradients(run)(x, w)[1])

    return lambda x, w: (value_and_gradients(run)(x, w), jax.grad(norm, (0, 1))(x, w))


def assert_same(body, *args, derivatives=value_and_gradients, tolerance=1e-4):
    """Compares with the untouched body, each result relative to its largest entry."""

    def results(on):
        run = program(body, on)
        return jax.jit(derivatives(lambda *args: jnp.mean(run(*args) ** 2)))(*args)

    ours, plain = results(True), results(False)
    for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v.astype(jnp.promote_types(v.dtype, "f4"))) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * (1e-6 + np.abs(b).max()))


@st.composite
def convolutions(draw):
    """A convolution of one element, and the shapes of its input and kernel."""
    n = draw(st.sampled_from([0, 1, 2, 2]))
    axis = st.tuples(
        st.integers(4, 9),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 2),
        st.integers(1, 2),
        st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
    )
    axes = draw(st.lists(axis, min_size=n, max_size=n))
    sizes, taps, strides, lhs_dilation, rhs_dilation, padding = (
        [axis[i] for axis in axes] for i in range(6)
    )
    groups, of = draw(st.sampled_from([(1, ""), (2, "feature"), (2, "batch")]))
    channels = draw(st.sampled_from([1, 2, 35]))
    batch, outputs = 2, 2 * draw(st.integers(1, 2))
    x_shape = (batch, channels * (groups if of == "feature" else 1), *sizes)
    w_shape = (outputs, channels, *taps)
    x_spec, w_spec, out_spec = (draw(st.permutations(range(n + 2))) for _ in range(3))

    def body(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            lax.ConvDimensionNumbers(*map(tuple, (x_spec, w_spec, out_spec))),
            **({f"{of}_group_count": groups} if of else {}),
        )

    shapes = []
    for shape, spec in ((x_shape, x_spec), (w_shape, w_spec)):
        laid_out = [0] * (n + 2)
        for size, position in zip(shape, spec, strict=True):
            laid_out[position] = size
        shapes.append((N, *laid_out))
    return body, *shapes


@settings(max_examples=12, deadline=None)
@given(convolutions())
def test_values_and_derivatives_are_those_of_the_convolution(case):
    body, x_shape, w_shape = case
    assert_same(body, normal(0, x_shape), normal(1, w_shape))


def convolve(x, w, strides=(1, 1), **options: Any):
    options.setdefault("dimension_numbers", DN)
    return lax.conv_general_dilated(x, w, strides, "SAME", **options)


def scanned(x, w):
    def step(w, _):
        grad = jax.grad(lambda w: jnp.mean(jnp.tanh(convolve(x, w)) ** 2))(w)
        return w - 0.1 * grad, None

    return lax.scan(step, w, None, length=2)[0]


def in_cond(x, w):
    return lax.cond(x[0, 0, 0, 0] > 0, convolve, lambda x, w: -convolve(x, w), x, w)


def in_while(x, w):
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(convolve(x, w)), x)


WRAPPED = {
    "plain": convolve,
    "strided": functools.partial(convolve, strides=(2, 2)),
    "scan": scanned,
    "cond": in_cond,
    "while": in_while,
    "jit": jax.jit(convolve),
    "checkpoint": jax.checkpoint(lambda x, w: jnp.tanh(convolve(x, w))),
    "remat_scan": jax.checkpoint(scanned),
}
X, W = normal(0, (N, 2, 6, 6, 3)), normal(1, (N, 3, 3, 3, 3))


@pytest.mark.parametrize("body", WRAPPED.values(), ids=WRAPPED)
def test_in_control_flow(body):
    assert_same(body, X, W)


@pytest.mark.parametrize("name", ["strided", "scan"])
def test_second_order(name):
    assert_same(WRAPPED[name], X, W, derivatives=with_second_order)


@pytest.mark.parametrize(
    "dtype, tolerance", [("bfloat16", 0.05), ("float16", 0.01), ("complex64", 1e-4)]
)
def test_other_dtypes(dtype, tolerance):
    assert_same(convolve, X.astype(dtype), W.astype(dtype), tolerance=tolerance)


def test_a_wider_result_and_the_precision_are_kept():
    half = X.astype("bfloat16"), W.astype("bfloat16")
    body = functools.partial(
        convolve, preferred_element_type=jnp.float32, precision="highest"
    )
    ours, plain = (program(body, on) for on in (True, False))
    assert ours(*half).dtype == jnp.float32
    np.testing.assert_allclose(ours(*half), plain(*half), rtol=1e-5, atol=1e-4)
    assert "precision = [HIGHEST, HIGHEST]" in lowered(ours, *half)


def summed(on):
    run = program(scanned, on)
    return lambda x, w: jnp.sum(run(x, w))


def closed_over(on):
    declare = drjax.program(clients=N, convolutions_as_matmuls=on)
    run = declare(lambda x, w: drjax.map_fn(lambda x: scanned(x, w), x))
    return lambda x, w: jnp.sum(run(x, w))


TRANSFORMS = {
    "value": lambda f: f,
    "gradient": lambda f: jax.grad(f, (0, 1)),
    "vmap of gradient": lambda f: jax.vmap(jax.grad(f), (None, 0)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", [summed, closed_over])
def test_no_grouped_convolution_is_left(make, transform):
    w = W if make is summed else W[0]
    w = jnp.stack([w, w + 1]) if transform == "vmap of gradient" else w
    ours, plain = (TRANSFORMS[transform](make(on)) for on in (True, False))
    groups = f"_group_count = {N}"
    assert groups in lowered(plain, X, w)
    assert groups not in lowered(ours, X, w)
    for a, b in zip(*map(jax.tree.leaves, (ours(X, w), plain(X, w))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_shared_kernel_stays_a_convolution():
    run = drjax.program(clients=N)(
        lambda x, w: drjax.map_fn(lambda x: convolve(x, w), x)
    )
    assert "stablehlo.convolution" in lowered(run, X, W[0])
    assert "dot_general" not in lowered(run, X, W[0])


def test_a_map_over_one_element_stays_a_convolution():
    run = drjax.program(clients=1)(lambda *args: drjax.map_fn(convolve, args))
    assert "stablehlo.convolution" in lowered(run, X[:1], W[:1])


def test_a_large_kernel_with_many_positions_stays_a_convolution():
    x, w = normal(0, (N, 1, 24, 24, 1)), normal(1, (N, 12, 12, 1, 1))
    assert "stablehlo.convolution" in lowered(program(convolve), x, w)
    assert_same(convolve, x, w)


def test_the_body_in_the_jaxpr_is_untouched():
    jaxpr = str(jax.make_jaxpr(program(scanned))(X, W))
    assert "conv_general_dilated" in jaxpr
    assert "drjax_convolution" not in jaxpr


def test_maps_in_a_map():
    def nested(on):
        @drjax.program(pods=2, clients=2, convolutions_as_matmuls=on)
        def run(x, w):
            def pod(x, w):
                return drjax.map_fn(convolve, (x, w), placement="clients")

            return drjax.map_fn(pod, (x, w), placement="pods")

        return run

    args = [v.reshape(2, 2, *v.shape[1:]) for v in (X, W)]
    np.testing.assert_allclose(nested(True)(*args), nested(False)(*args), atol=1e-4)
    assert "stablehlo.convolution" not in lowered(nested(True), *args)


@pytest.mark.parametrize("platforms", [["tpu"], ["cuda"], ["cpu", "cuda", "tpu"]])
def test_only_cpu_and_gpu_get_matmuls(platforms):
    run = jax.jit(program(scanned))
    exported = jax.export.export(run, platforms=platforms)(X, W)
    text = exported.mlir_module()
    assert (f"_group_count = {N}" in text) == ("tpu" in platforms)
    if "cpu" in platforms:
        np.testing.assert_allclose(exported.call(X, W), run(X, W), rtol=1e-5)


@pytest.mark.parametrize("shape", ["b, 6, 6, 3", "2, h, h, 3"])
def test_symbolic_shapes_can_be_exported(shape):
    run = jax.jit(program(convolve))
    x = jax.ShapeDtypeStruct((N, *jax.export.symbolic_shape(shape)), X.dtype)
    exported = jax.export.export(run, platforms=["cpu"])(x, W)
    np.testing.assert_allclose(exported.call(X, W), run(X, W), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("make", [summed, closed_over])
def test_elements_stay_on_their_devices(kind, make):
    mesh = jax.make_mesh((N,), ("clients",), axis_types=(kind,))
    want = jax.grad(make(False), (0, 1))(X, W if make is summed else W[0])
    with jax.set_mesh(mesh):
        spec = jax.P("clients")
        x = jax.device_put(np.asarray(X), jax.NamedSharding(mesh, spec))
        w = jax.device_put(
            np.asarray(W if make is summed else W[0]),
            jax.NamedSharding(mesh, spec if make is summed else jax.P()),
        )
        compiled = jax.jit(jax.grad(make(True), (0, 1))).lower(x, w).compile()
        assert "all-gather" not in (compiled.as_text() or "")
        for a, b in zip(compiled(x, w), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
