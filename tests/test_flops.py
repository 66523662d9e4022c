"""What a jaxpr costs: XLA's count where it has no loops, and theorems for the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import drjax
from drjax._flops import Flops, flops

A, B = jnp.ones((5, 7)), jnp.ones((7, 3))
IMAGES, KERNEL = jnp.ones((2, 3, 9, 9)), jnp.ones((4, 3, 3, 3))


def of(fn, *args):
    return flops(jax.make_jaxpr(fn)(*args))


def total(fn, *args):
    counted = of(fn, *args)
    assert not counted.at_least
    return counted.total


def conv(padding: Any = "VALID", strides=(1, 1), **more):
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, **more)


def mlp(a, b):
    return jnp.sum(jax.nn.relu(a @ b) * 2 - 1)


LOOP_FREE = {
    "add and mul": (lambda a: -a * a + a / 3, A),
    "matmul": (jnp.matmul, A, B),
    "batched matmul": (jax.vmap(jnp.matmul), jnp.ones((4, 5, 7)), jnp.ones((4, 7, 3))),
    "mlp": (mlp, A, B),
    "reductions": (lambda a: jnp.sum(a, 0) * jnp.max(a) + jnp.prod(a), A),
    "scatter": (lambda a: lax.scatter_add(
        a, jnp.array([[1], [1]]), a[:2], lax.ScatterDimensionNumbers((1,), (0,), (0,))
    ), A),
    "pooling": (lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
    ), IMAGES),
    "conv": (conv(), IMAGES, KERNEL),
    "conv same": (conv("SAME", (2, 2)), IMAGES, KERNEL),
    "conv dilated": (conv(rhs_dilation=(2, 1)), IMAGES, KERNEL),
    "conv transposed": (conv([(1, 2), (0, 3)], lhs_dilation=(2, 3)), IMAGES, KERNEL),
    "conv grouped": (conv(feature_group_count=3), IMAGES, jnp.ones((6, 1, 3, 3))),
    "conv in batch groups": (conv(batch_group_count=2), IMAGES, KERNEL),
}  # fmt: skip


@pytest.mark.parametrize("fn, args", [(f, a) for f, *a in LOOP_FREE.values()])
def test_without_loops_it_is_the_count_of_xla(fn, args):
    cost: Any = jax.jit(fn).lower(*args).cost_analysis()
    assert total(fn, *args) == cost["flops"]


@pytest.mark.parametrize("n", [0, 1, 6])
def test_a_loop_costs_each_of_its_trips(n):
    def step(a, _):
        return jnp.sin(a @ a.T @ a), jnp.sum(a)

    loop = total(lambda a: lax.scan(step, a, None, length=n), A)
    assert loop == n * total(step, A, None)
    fori = total(lambda a: lax.fori_loop(0, n, lambda _, a: step(a, _)[0], a), A)
    assert fori == n * total(lambda a: step(a, None)[0], A)


def test_calls_cost_what_is_called():
    expected = total(mlp, A, B)
    with_jvp, with_vjp = jax.custom_jvp(mlp), jax.custom_vjp(mlp)
    with_jvp.defjvps(None, None)
    with_vjp.defvjp(lambda a, b: (mlp(a, b), ()), lambda _, ct: (A, B))
    for call in (jax.jit(mlp), jax.checkpoint(mlp), with_jvp, with_vjp):
        assert total(call, A, B) == expected


def test_a_map_costs_each_of_its_elements():
    n, once = 4, total(mlp, A, B)
    xs, ys = jnp.ones((n, *A.shape)), jnp.ones((n, *B.shape))

    @drjax.program(placements={"clients": n})
    def placed(xs, ys):
        return drjax.map_fn(mlp, (xs, ys))

    @drjax.program(placements={"clients": n})
    def loss(xs, b):
        return drjax.reduce_sum(drjax.map_fn(lambda a: mlp(a, b), xs))

    assert total(placed, xs, ys) == n * once
    assert total(loss, xs, B) == n * once + n - 1
    # The cotangent of the shared operand is summed over the elements.
    element = total(jax.value_and_grad(mlp, 1), A, B)
    mapped = total(jax.value_and_grad(loss, 1), xs, B)
    assert mapped == n * element + n - 1 + (n - 1) * B.size


@pytest.mark.parametrize("fn, args", [
    (jnp.matmul, (A, B)),
    (conv(), (IMAGES, KERNEL)),
    (conv("SAME", (2, 3), rhs_dilation=(2, 1)), (IMAGES, KERNEL)),
])  # fmt: skip
def test_each_derivative_of_a_product_is_one_more(fn, args):
    ct, forward = fn(*args), total(fn, *args)

    def derivatives(*args):
        return jax.vjp(fn, *args)[1](ct)

    assert total(derivatives, *args) == 3 * forward  # With the value, which is unused.


def test_of_branches_the_one_with_most_counts():
    def branches(i, a):
        return lax.switch(i, [jnp.sum, lambda a: jnp.sum(a @ a.T), jnp.max], a)

    assert total(branches, 1, A) == total(lambda a: jnp.sum(a @ a.T), A)


def test_where_more_may_be_done_it_says_so():
    def until(a):
        return lax.while_loop(lambda a: a[0] < 9, lambda a: a + 1, a)

    ones = jnp.ones(5)
    assert of(until, ones) == Flops(5, at_least=True)
    assert of(lambda a: lax.fori_loop(0, 3, lambda _, a: until(a), a), ones) == (15, 1)
    # Integers are not counted, however many.
    assert of(until, jnp.ones(5, int)) == Flops(0)
    assert of(lambda a: jax.pure_callback(np.sin, a, a), ones) == Flops(0, True)


def test_other_conventions():
    n, c = 6, A.astype(complex)
    square = jnp.ones((n, n))
    assert total(lambda c: c @ c.T, c) == 4 * total(lambda a: a @ a.T, A)
    assert total(lambda c: c.T.real > 1, c) == 0
    assert total(jnp.linalg.cholesky, square) == n**3 // 3 + 2 * n**2  # (A + A^T) / 2
    # An LU decomposition, and two triangular solves for each right-hand side.
    solve = total(jnp.linalg.solve, square, square[:, :2])
    assert solve == 2 * n**3 // 3 + 2 * 2 * n**2
    assert total(jnp.fft.fft, jnp.ones((3, 8), complex)) == 3 * 5 * 8 * 3
    assert total(jnp.fft.rfft, jnp.ones((3, 8))) == 3 * 5 * 8 * 3 / 2
