"""A plan takes the values that JAX takes: keys, float0, empty trees, effects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import ENGINE, in_chunks
from helpers import assert_close
from jax import lax
from programs import XS, N, program

import drjax

X, I = np.arange(N, dtype="float32"), np.arange(N)  # noqa: E741
ZEROS = np.zeros(N, jax.dtypes.float0)
KEY = jax.random.key(3)


def scaled(i, x):
    return drjax.reduce_sum(drjax.map_fn(lambda i, x: i * jnp.sin(x), (i, x)))


def derivative_of_an_integer(i, x, di, dx):
    return jax.jvp(program(scaled), (i, x), (di, dx))


def rounds_of_integers(x):
    def step(carry, _):
        total, count, flag = carry
        parts = drjax.map_fn(lambda v: (v, v.astype(int), v > count), x)
        more, n, any_large = drjax.reduce_sum(parts)
        return (total + more, count + n % 3, flag | (any_large > 0)), count

    return lax.scan(step, (0.0, 0, False), None, length=3)


CASES = {
    "nothing": (lambda: (), ()),
    "empty trees": (lambda a: {"x": a, "y": (), "z": None}, ({},)),
    "constants": (lambda: (np.arange(3.0), 2, True), ()),
    "arguments": (lambda x, s: (x, s, (s, 1.5), drjax.reduce_sum(x)), (X, 2.0)),
    "a result twice": (lambda x: (drjax.reduce_sum(x),) * 2, (X,)),
    "a placed constant": (lambda: drjax.map_fn(jnp.sin, I * 1.0), ()),
    "what no element changes": (lambda x: drjax.map_fn(lambda v: 3.0, x), (X,)),
    "no entries": (
        lambda x: drjax.reduce_sum(drjax.map_fn(lambda v: v[:0], x)),
        (XS,),
    ),
    "float0 arguments": (derivative_of_an_integer, (I, X, ZEROS, X)),
    "float0 results": (jax.grad(program(scaled), (0, 1), allow_int=True), (I, X)),
    "bools": (lambda b: drjax.reduce_max(drjax.map_fn(jnp.logical_not, b)), (I > 2,)),
    "integers in a loop": (rounds_of_integers, (X,)),
    "halves": (
        lambda x: (drjax.reduce_mean(x), drjax.reduce_sum(x)),
        (X.astype("float16"),),
    ),
    "keys as arguments": (
        lambda keys: drjax.reduce_sum(drjax.map_fn(jax.random.normal, keys)),
        (jax.random.split(KEY, N),),
    ),
    "keys as results": (
        lambda key: (drjax.map_fn(jax.random.split, jax.random.split(key, N)), key),
        (KEY,),
    ),
    "keys folded in": (
        lambda key: drjax.map_fn(
            jax.random.fold_in, (drjax.broadcast(key), drjax.placement_index())
        ),
        (KEY,),
    ),
    "random numbers outside a map": (
        lambda key: drjax.reduce_sum(
            jax.vmap(lambda key: jax.random.normal(key, (3,)))(
                drjax.map_fn(lambda key: key, jax.random.split(key, N))
            )
        ),
        (KEY,),
    ),
}


def contents(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return np.zeros(x.shape) if x.dtype == jax.dtypes.float0 else x


@pytest.mark.parametrize("name", CASES)
@ENGINE
def test_values_of_every_kind(run, name):
    fn, args = CASES[name]
    fn = program(fn)
    got, want = run(drjax.make_plan(fn)(*args), *args), jax.jit(fn)(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (jnp.shape(g), jnp.result_type(g)) == (w.shape, w.dtype)
        assert_close(contents(jnp.asarray(g) if jnp.isscalar(g) else g), contents(w))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_each_element_draws_as_it_would_alone(impl):
    """JAX draws other numbers from a batch of these keys than from each alone."""
    keys = jax.random.split(jax.random.key(0, impl=impl), N)

    def fn(keys):
        return drjax.map_fn(lambda key: jax.random.normal(key, (2,)), keys)

    got = drjax.run_plan(drjax.make_plan(program(fn))(keys), keys)
    assert_close(got, [jnp.stack([jax.random.normal(key, (2,)) for key in keys])])


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_each_element_of_a_chunk_draws_as_it_would_alone(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), N)
    fn = program(lambda keys: drjax.map_fn(jax.random.normal, keys))
    got = in_chunks(drjax.make_plan(fn)(keys), keys)
    assert_close(got, [jnp.stack([jax.random.normal(key) for key in keys])])


def test_many_halves_are_summed_as_jit_sums_them():
    """In float16, 2048 + 1 is 2048."""
    x = jnp.ones(101, "float16").at[0].set(2048)
    fn = drjax.program(clients=len(x))(drjax.reduce_sum)
    assert drjax.run_plan(drjax.make_plan(fn)(x), x) == 2148


def test_arguments_may_be_given_by_name():
    def fn(x, *, scale):
        return drjax.reduce_sum(x) * scale["a"]

    plan = drjax.make_plan(program(fn))(X, scale={"a": 2.0})
    assert drjax.run_plan(plan, X, scale={"a": 3.0}) == 30
    with pytest.raises(TypeError, match="structure"):
        drjax.run_plan(plan, X)


def test_effects_in_order_stay_in_order(capfd):
    def fn(x):
        jax.debug.print("first {}", drjax.reduce_sum(x), ordered=True)
        jax.debug.print("second", ordered=True)
        return x

    drjax.run_plan(drjax.make_plan(program(fn))(X), X)
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == ["first 10.0", "second"]


def test_what_the_server_prints_is_printed_in_order(capfd):
    def fn(x):
        jax.debug.print("before")
        total = drjax.reduce_sum(drjax.map_fn(lambda v: 2 * v, x))
        jax.debug.print("after {}", total)
        return total

    drjax.run_plan(drjax.make_plan(program(fn))(X), X)
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == ["before", "after 20.0"]
