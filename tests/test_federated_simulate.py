"""A simulated program is the program, of those clients whose numbers are finite."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drjax
import federated
from tests.helpers import assert_close

N = 7
MODEL = jnp.array([0.3, -0.2, 0.5])
DATA = jax.random.normal(jax.random.key(0), (N, 3))
GOOD = np.array([0, 2, 3, 6])
BAD = DATA.at[1].set(jnp.nan).at[4, 0].set(jnp.inf).at[5, 2].set(jnp.nan)


def loss(model, data):
    """The mean loss after a round of training."""

    @drjax.program(clients=len(data))
    def run(model, data):
        def of_client(model, x):
            return jnp.sum((model - x) ** 4) / 10

        steps = drjax.map_fn(jax.grad(of_client), (drjax.broadcast(model), data))
        model = model - 0.3 * drjax.reduce_mean(steps)
        losses = drjax.map_fn(of_client, (drjax.broadcast(model), data))
        return drjax.reduce_mean(losses)

    return run(model, data)


FUNCTIONS = {
    "value": loss,
    "gradient": jax.grad(loss, argnums=0),
    "hessian": jax.hessian(loss),
}
FUNCTION = pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)


@FUNCTION
def test_a_function_is_that_which_jit_compiles(fn):
    assert_close(federated.simulate(fn)(MODEL, DATA), jax.jit(fn)(MODEL, DATA))


@FUNCTION
def test_a_client_that_is_not_finite_is_in_no_part_of_a_call(fn):
    """Means, and those in its derivatives, are of the clients that are left."""
    got = federated.simulate(fn)(MODEL, BAD)
    assert_close(got, jax.jit(fn)(MODEL, DATA[GOOD]))


def test_the_others_keep_their_places():
    @drjax.program(clients=N)
    def run(data):
        doubles = drjax.map_fn(lambda x: 2 * x, data)
        parts = doubles, drjax.placement_index()
        return drjax.reduce_sum(doubles), drjax.placement_size(), parts

    _, size, (rows, index) = federated.simulate(run)(BAD)
    assert size == len(GOOD)
    kept = np.isin(np.arange(N), GOOD)
    np.testing.assert_array_equal(index, np.where(kept, np.arange(N), 0))
    np.testing.assert_array_equal(rows, np.where(kept[:, None], 2 * DATA, 0))


def test_one_function_takes_any_number_of_clients():
    simulated = federated.simulate(loss)
    for n in (N, 3, N):
        assert_close(simulated(MODEL, DATA[:n]), loss(MODEL, DATA[:n]))


def test_a_maximum_may_have_nothing_of_a_client():
    """Minus infinity is what it has without one; infinity is a client's mistake."""

    @drjax.program(clients=3)
    def run(x):
        return drjax.reduce_max(x), drjax.reduce_min(-x), drjax.placement_size()

    low = -jnp.inf
    x = jnp.array([[1.0, low], [low, low], [3.0, low]])
    assert_close(federated.simulate(run)(x), jax.jit(run)(x))
    largest, smallest, size = federated.simulate(run)(x.at[2, 0].set(jnp.inf))
    assert (largest.tolist(), smallest.tolist(), size) == ([1, low], [-1, -low], 2)


def test_a_sum_that_is_too_large_for_its_type_is_told(caplog):
    @drjax.program(clients=3)
    def run(x):
        return drjax.reduce_sum(x)

    with caplog.at_level(logging.WARNING, "federated"):
        got = federated.simulate(run)(jnp.full(3, 60_000, jnp.float16))
    assert np.isinf(got)
    assert "too large for its dtype" in caplog.text


def test_numbers_of_python_and_arrays_are_told_apart():
    """As jit does: a number gives way to the other's type, and an array does not."""

    @drjax.program(clients=2)
    def run(w, x):
        return w * drjax.reduce_sum(x)

    simulated, x = federated.simulate(run), jnp.ones(2, jnp.bfloat16)
    for w in (1.001, jnp.float32(1.001), 1.001):
        got, want = simulated(w, x), jax.jit(run)(w, x)
        assert got.dtype == want.dtype
        assert_close(got, want)


#
# Errors.
#
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.hessian])
def test_it_is_the_outermost(transform):
    with pytest.raises(TypeError, match=r"federated.simulate\(jax.grad\(loss\)\), not"):
        transform(federated.simulate(loss))(MODEL, DATA)


def test_a_program_has_clients_of_one_number():
    def of_two(x, y):
        return loss(MODEL, x) + loss(MODEL, y)

    with pytest.raises(ValueError, match=re.escape("but has [2, 3]. Decorate")):
        federated.simulate(of_two)(DATA[:2], DATA[:3])
    with pytest.raises(ValueError, match=r"sum is to have .* but has none"):
        federated.simulate(jnp.sum)(DATA)


def test_some_client_is_finite():
    with pytest.raises(ValueError, match=r"no client is left in loss: .* the 7 sends"):
        federated.simulate(loss)(MODEL, jnp.full_like(DATA, jnp.nan))
