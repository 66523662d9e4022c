"""Every program, under every transformation, equals plain JAX under the same one."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, every, gradient, is_float, like, of_floats, scalar
from jax.test_util import check_grads
from programs import PROGRAMS, Program

FORWARD = [p for p in PROGRAMS if p.forward]
REVERSE = [p for p in PROGRAMS if p.reverse]
SECOND = [p for p in PROGRAMS if p.second]
# For complex inputs, JAX has no jacfwd, no jacrev and no checkpoint with a policy.
REAL = [p for p in PROGRAMS if p.name != "complex_numbers"]


# Each takes a function of arrays and the arrays.
TRANSFORMATIONS = {
    "eager": (PROGRAMS, lambda f, xs: f(*xs)),
    "jit": (PROGRAMS, lambda f, xs: jax.jit(f)(*xs)),
    "jvp": (FORWARD, lambda f, xs: jax.jvp(f, xs, like(1, xs))),
    "eager_gradient": (REVERSE, lambda f, xs: gradient(f, every(xs))(*xs)),
    "gradient": (REVERSE, lambda f, xs: jax.jit(gradient(jax.jit(f), every(xs)))(*xs)),
    "gradient_of_first": (REVERSE, lambda f, xs: jax.jit(gradient(f, (0,)))(*xs)),
    "linearize": (SECOND, lambda f, xs: jax.linearize(f, *xs)[1](*like(1, xs))),
    "checkpoint": (
        REVERSE,
        lambda f, xs: jax.jit(gradient(jax.checkpoint(f), every(xs)))(*xs),
    ),
    "checkpoint_all": (
        [p for p in REVERSE if p in REAL],
        lambda f, xs: jax.jit(
            gradient(
                jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable),
                every(xs),
            )
        )(*xs),
    ),
    "hessian_vector": (
        SECOND,
        lambda f, xs: jax.jit(
            lambda *xs: jax.jvp(gradient(f, every(xs)), xs, like(1, xs))
        )(*xs),
    ),
    "gradient_of_gradient": (
        SECOND,
        lambda f, xs: jax.jit(gradient(gradient(f, every(xs)), every(xs)))(*xs),
    ),
    "jacfwd": (
        [p for p in FORWARD if p in REAL],
        lambda f, xs: jax.jit(jax.jacfwd(f))(*xs),
    ),
    "jacrev": (
        [p for p in REVERSE if p in REAL],
        lambda f, xs: jax.jit(jax.jacrev(f))(*xs),
    ),
    "vmap_of_gradient": (
        REVERSE,
        lambda f, xs: jax.jit(jax.vmap(gradient(f, every(xs))))(
            *(jnp.stack([x, 2 * x]) for x in xs)
        ),
    ),
    "scan": (
        REVERSE,
        lambda f, xs: jax.jit(
            lambda *xs: jax.lax.scan(
                lambda xs, _: (
                    tuple(
                        x - 0.01 * g
                        for x, g in zip(xs, gradient(f, every(xs))(*xs), strict=True)
                    ),
                    None,
                ),
                xs,
                None,
                length=2,
            )
        )(*(jnp.asarray(x) * 1.0 for x in xs)),
    ),
}


# With `sent` bodies these repeat much of what they do with `closed_over` ones.
SLOW = {"checkpoint_all", "gradient_of_first", "jacfwd", "jacrev", "linearize", "scan"}
SLOW_IF_LARGE = {
    *("checkpoint", "eager_gradient", "gradient_of_gradient", "hessian_vector"),
    "vmap_of_gradient",
}


def is_slow(name, case):
    if case.large:
        return name in SLOW | SLOW_IF_LARGE
    return name in SLOW and case.name.endswith("_sent")


@pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(
            name,
            case,
            id=f"{name}-{case}",
            marks=[pytest.mark.slow] * is_slow(name, case),
        )
        for name, (cases, _) in TRANSFORMATIONS.items()
        for case in cases
    ],
)
def test_transformed_program_equals_transformed_plain_function(name, case: Program):
    _, transform = TRANSFORMATIONS[name]
    run, xs = of_floats(case.run, case.args)
    plain, _ = of_floats(case.plain, case.args)
    assert_close(transform(run, xs), transform(plain, xs))


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_vmap_over_any_argument_and_axis_equals_plain(case: Program):
    run, xs = of_floats(case.run, case.args)
    plain, _ = of_floats(case.plain, case.args)
    for i, x in enumerate(xs):
        for axis in {0, jnp.ndim(x)}:
            in_axes = [axis if j == i else None for j in range(len(xs))]
            batch = [*xs[:i], jnp.stack([x, 2 * x, -x], axis), *xs[i + 1 :]]
            got, want = (jax.jit(jax.vmap(f, in_axes))(*batch) for f in (run, plain))
            assert_close(got, want)


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_results_of_any_dtype_equal_plain(case: Program):
    got, want = case.run(*case.args), case.plain(*case.args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.result_type(g) == jnp.result_type(w)
    assert_close(got, want)


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_exported_program_gives_the_same(case: Program):
    run, xs = of_floats(case.run, case.args)
    exported = jax.export.export(jax.jit(run))(*xs)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(*xs), run(*xs))


@pytest.mark.slow
@pytest.mark.parametrize(
    # The rules of custom_jvp and custom_vjp in the table are wrong on purpose. What is
    # encoded has the derivative of its mean.
    "case",
    [p for p in SECOND if not re.search("custom|encoded", p.name) and p in REAL],
    ids=str,
)
def test_derivatives_match_finite_differences_to_second_order(case: Program):
    with jax.enable_x64(True):
        args = jax.tree.map(
            lambda x: jnp.asarray(x, "float64") if is_float(x) else x, case.args
        )
        run, xs = of_floats(case.run, args)
        check_grads(jax.jit(scalar(run)), xs, order=2, modes=("fwd", "rev"), rtol=1e-4)
