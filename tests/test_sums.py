"""Sums over elements are taken inside contractions, and are the sums."""

import jax
import jax.numpy as jnp
import pytest
from engines import in_chunks, streaming
from helpers import assert_close
from jax import lax
from jax.extend.core import jaxprs_in_params

import drjax
from drjax._export import of_chunk
from drjax._jaxprs import as_fun
from drjax.plan import MapReduce

N = 7


def _random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _dense(w, x):
    return jnp.tanh(x @ w)


def _layers(w, x):
    """The cotangent of w is added up in the carry of a scan."""
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0]


def _over_time(w, x):
    """And here in what it gives for each time."""
    _, ys = lax.scan(lambda c, row: (c, jnp.sin(row @ w)), 0.0, x)
    return ys


def _tied(w, x):
    """One of its two uses is not a contraction."""
    return jnp.sin(x @ w) @ (w.T * jnp.sum(x))


def _jitted(w, x):
    return jax.jit(_dense)(w, jax.nn.relu(x))


def _weighted(w, x):
    """Its cotangents are reversed, reshaped, cut out of padding, scaled and added."""
    reshaped = w[:, ::-1].reshape(-1, *w.shape)[0]
    return 3 * (x @ reshaped) / 7 - x @ jnp.pad(w, 1)[1:-1, 1:-1]


def _convolved(w, x):
    image = jnp.broadcast_to(x[None, :, :, None], (1, *x.shape, 1))
    kernel = w[:, :3, None, None] * jnp.ones(2)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )
    return jnp.sin(out)


def _remembered(w, x):
    return jax.checkpoint(_dense)(w, x)


def _branching(w, x):
    return lax.cond(jnp.sum(x) > 0, _dense, lambda w, x: 2 * _dense(w, x), w, x)


MOVED = [_dense, _layers, _over_time, _jitted, _weighted, _convolved]
NOT_MOVED = [_tied, _remembered, _branching]


def gradient(body):
    """The gradient with respect to a shared matrix, and its arguments."""
    w, x = _random(0, 4, 4 if body is _layers else 6), _random(1, N, 3, 4)

    @drjax.program(clients=N)
    def loss(w, x):
        return drjax.reduce_mean(drjax.map_fn(lambda x: jnp.mean(body(w, x) ** 2), x))

    return jax.grad(loss), (w, x)


@pytest.mark.parametrize("body", MOVED + NOT_MOVED)
@pytest.mark.parametrize("run", [streaming, in_chunks])
def test_the_sum_is_that_of_what_elements_give(run, body):
    """Also of elements that are padding, which is NaN."""
    fn, args = gradient(body)
    assert_close(run(drjax.make_plan(fn)(*args), *args), jax.jit(fn)(*args))


def largest(jaxpr, c):
    """The most numbers that one element has of any value in a chunk of c."""
    most = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        sizes = [v.aval.size // c for v in eqn.outvars if c in v.aval.shape]
        inner = [largest(sub, c) for sub in jaxprs_in_params(eqn.params)]
        most = max([most, *sizes, *inner])
    return most


@pytest.mark.parametrize("body", MOVED)
def test_no_element_has_a_part_as_large_as_the_matrix(body):
    """Of a matrix that is larger than all else."""
    fn, _ = gradient(body)
    w, x = _random(2, 40, 40), _random(3, N, 1, 40)
    plan = drjax.make_plan(fn)(w, x).recomputed()
    stage = [s for s in plan.stages if isinstance(s, MapReduce)][-1]
    c = 11
    index, *avals = stage.body.in_avals
    shared = len(stage.server_inputs)
    types = [jax.ShapeDtypeStruct((c,), "int32")]
    types += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals[:shared]]
    types += [jax.ShapeDtypeStruct((c, *a.shape), a.dtype) for a in avals[shared:]]
    jaxpr = jax.make_jaxpr(of_chunk(stage, whole=True))(*types)
    assert largest(jaxpr, c) < w.size
    assert (
        largest(jax.make_jaxpr(jax.vmap(as_fun(stage.body), in_axes(stage)))(*types), c)
        >= w.size
    )


def in_axes(stage):
    return (0, *[None] * len(stage.server_inputs), *[0] * len(stage.placed_inputs))
