"""Scope: which placement an operator works on, and what `drjax.program` accepts."""

import functools
import importlib
import inspect
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import drjax

X = np.float32(2.0)
HOW = {"eager": lambda fn: fn, "jit": jax.jit}
EAGER_AND_JIT = pytest.mark.parametrize("how", HOW.values(), ids=HOW)
UNDEFINED = drjax.OperatorUndefinedError


def total(x, **which):
    """The server value `x`, times the size of the placement."""
    return drjax.reduce_sum(drjax.broadcast(x, **which), **which)


def in_program(n, fn):
    return drjax.program(clients=n)(fn)


def through_custom_jvp(fn):
    function = jax.custom_jvp(fn)
    function.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    return lambda x: function(x)


def through_scan(fn):
    def body(carry, _):
        return fn(carry), None

    return lambda x: jax.lax.scan(body, x, length=1)[0]


# Ways to apply a function once. JAX caches what it traces in each of them.
WRAPPERS = {
    "jit": jax.jit,
    "nested jit": lambda fn: jax.jit(jax.jit(fn)),
    "checkpoint": jax.checkpoint,
    "vmap": lambda fn: lambda x: jax.vmap(fn)(x[None])[0],
    "gradient": lambda fn: lambda x: x * jax.grad(jax.jit(fn))(x),
    "custom_jvp": through_custom_jvp,
    "cond": lambda fn: lambda x: jax.lax.cond(x > 0, fn, jnp.negative, x),
    "switch": lambda fn: lambda x: jax.lax.switch(1, [jnp.negative, fn], x),
    "scan": through_scan,
    "while": lambda fn: lambda x: jax.lax.while_loop(lambda x: x == X, fn, x),
    "fori": lambda fn: lambda x: jax.lax.fori_loop(0, 1, lambda _, x: fn(x), x),
}


@EAGER_AND_JIT
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_was_traced_in_one_scope_serves_no_other(wrap, how):
    helper = how(wrap(total))
    for n in (3, 5, 3):
        assert in_program(n, helper)(X) == n * X
    with pytest.raises(UNDEFINED, match="with no placement in scope"):
        helper(X)


def test_threads_each_see_their_own_placement():
    helper, sizes = jax.jit(total), range(1, 9)
    barrier = threading.Barrier(len(sizes), timeout=60)

    def run(n):
        def body(x):
            barrier.wait()  # All programs are active at once.
            first, inner = helper(x), in_program(n + 10, helper)(x)
            barrier.wait()
            return first, inner, helper(x), total(x)

        return in_program(n, body)(X)

    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(run, sizes))
    assert results == [(n * X, (n + 10) * X, n * X, n * X) for n in sizes]


def test_a_thread_started_inside_a_program_has_no_placement():
    def body(x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(total, x).result()

    with pytest.raises(UNDEFINED, match="thread"):
        in_program(3, body)(X)


def test_what_runs_after_the_program_has_returned_has_no_placement():
    lazily = in_program(3, lambda x: map(total, [x]))(X)
    with pytest.raises(
        UNDEFINED, match=r"drjax\.broadcast was called with no placement"
    ):
        next(lazily)


def fail(x):
    raise KeyError("on purpose")


@EAGER_AND_JIT
@pytest.mark.parametrize(
    "failing", [fail, lambda x: drjax.map_fn(fail, drjax.broadcast(x))]
)
def test_a_program_that_raises_leaves_nothing_behind(failing, how):
    def outer(x):
        with pytest.raises(KeyError, match="on purpose"):
            in_program(5, failing)(x)
        return total(x)

    assert how(in_program(3, outer))(X) == 3 * X
    with pytest.raises(KeyError, match="on purpose"):
        how(in_program(3, failing))(X)
    with pytest.raises(UNDEFINED, match="with no placement in scope"):
        total(X)


#
# What may be decorated, and with which placements.
#
async def coroutine(*_): ...


def generator(*_):
    yield


async def async_generator(*_):
    yield


@pytest.mark.parametrize("kind", [coroutine, generator, async_generator])
@pytest.mark.parametrize(
    "form",
    [
        lambda fn: fn,
        lambda fn: functools.partial(fn, 1),
        lambda fn: types.MethodType(fn, 1),
        lambda fn: type("Class", (), {"__call__": fn})(),
    ],
    ids=["function", "partial", "method", "object"],
)
def test_what_runs_later_cannot_be_a_program(kind, form):
    says = kind.__name__.replace("_", " ") + " function.* after the call has returned"
    with pytest.raises(TypeError, match=says):
        in_program(3, form(kind))


def test_a_program_keeps_the_metadata_and_arguments_of_its_function():
    @drjax.program(clients=3)
    def scaled_total(x, *, scale: float = 1.0):
        """What it does."""
        return total(x) * scale

    names = (scaled_total.__name__, scaled_total.__doc__)
    assert names == ("scaled_total", "What it does.")
    assert str(inspect.signature(scaled_total)) == "(x, *, scale: float = 1.0)"
    assert scaled_total(x=X, scale=2.0) == 2.0 * scaled_total(X) == 6 * X


def test_methods_and_partial_objects_can_be_programs():
    class Model:
        scale = 2.0

        @drjax.program(clients=3)
        def of_instance(self, x):
            return self.scale * total(x)

        @classmethod
        @drjax.program(clients=3)
        def of_class(cls, x):
            return cls.scale * total(x)

    partial = in_program(3, functools.partial(lambda scale, x: scale * total(x), 2.0))
    assert Model().of_instance(X) == Model.of_class(X) == partial(X) == 6 * X


@pytest.mark.parametrize("integer", [int, np.int32, np.uint8, np.int64])
def test_a_size_is_an_integer_from_one(integer):
    assert in_program(integer(3), total)(X) == 3 * X
    with pytest.raises(ValueError, match="'clients' must be at least 1, but got 0"):
        drjax.program(clients=integer(0))


@pytest.mark.parametrize("size", [2.0, "x", True, np.True_, None, (3,), np.arange(3)])
def test_a_size_that_is_no_integer_is_an_error(size):
    with pytest.raises(TypeError, match=r"'clients' must be a Python integer, but got"):
        drjax.program(clients=size)


@EAGER_AND_JIT
def test_a_size_computed_by_jax_is_an_error_traced_or_not(how):
    with pytest.raises(TypeError, match=r"'clients' must be a Python .*batch\.shape"):
        how(lambda n: in_program(n, total)(X))(jnp.int32(3))


def test_placements_are_given_as_keywords_or_as_a_mapping():
    @drjax.program(placements={"placements": 2, "any name": 3}, clients=4)
    def sizes():
        names = ("placements", "any name", "clients")
        return [int(drjax.placement_size(placement=name)) for name in names]

    assert sizes() == [2, 3, 4]


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (dict(clients=-1), ValueError, "'clients' must be at least 1, but got -1"),
        (dict(), ValueError, "no placement given"),
        (dict(placements={}), ValueError, "no placement given"),
        (dict(placements={"clients": 3}, clients=3), ValueError, "given twice"),
        (dict(placements=3), TypeError, "mapping from names to sizes, but got 3"),
        (dict(placements=[("clients", 3)]), TypeError, "mapping from names to sizes"),
        (dict(placements={1: 3}), TypeError, "name is a string, but got 1"),
        (dict(placements={None: 3}), TypeError, "name is a string, but got None"),
    ],
)
def test_bad_placements_are_errors(arguments, error, says):
    with pytest.raises(error, match=rf"drjax\.program: .*{says}"):
        drjax.program(**arguments)


def test_use_abstract_mesh_says_whether_the_installed_mesh_is_used():
    # Operators refuse this mesh, so its use shows.
    mesh = Mesh(jax.devices()[:1], ("other",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert drjax.program(clients=3, use_abstract_mesh=False)(total)(X) == 3 * X
        with pytest.raises(ValueError, match="'other'"):
            drjax.program(clients=3, use_abstract_mesh=True)(total)(X)


#
# Several placements, and programs inside programs.
#
@EAGER_AND_JIT
def test_with_several_placements_an_operator_names_its_own(how):
    two = drjax.program(pods=4, clients=32)
    assert how(two(functools.partial(total, placement="pods")))(X) == 4 * X
    assert how(two(functools.partial(total, placement="clients")))(X) == 32 * X
    with pytest.raises(ValueError, match=r"broadcast: ambiguous.*'pods', 'clients'"):
        how(two(total))(X)
    with pytest.raises(ValueError, match=r"unknown placement 'x'.*'pods', 'clients'"):
        how(two(functools.partial(total, placement="x")))(X)


@EAGER_AND_JIT
@pytest.mark.parametrize("outer_name, seen", [("pods", 3), ("clients", 5)])
def test_an_inner_program_adds_its_placement_or_hides_one(outer_name, seen, how):
    inner = in_program(5, lambda x: (total(x), total(x, placement=outer_name)))
    outer = drjax.program(placements={outer_name: 3})
    program = outer(lambda x: (total(x), inner(x), total(x)))
    assert how(program)(X) == (3 * X, (5 * X, seen * X), 3 * X)


@EAGER_AND_JIT
def test_inside_a_mapped_body_other_placements_are_in_reach(how):
    clients: dict[str, Any] = dict(placement="clients")

    def of_pod(x):
        copies = drjax.broadcast(x, **clients)
        index = drjax.placement_index(**clients)
        placed = drjax.map_fn(lambda c, i: c * x + i, (copies, index), **clients)
        return placed, drjax.reduce_sum(placed, **clients)

    @drjax.program(pods=4, clients=32)
    def program(x):
        return drjax.map_fn(of_pod, x, placement="pods")

    x = jnp.arange(8.0).reshape(4, 2)
    placed, summed = how(program)(x)  # [4, 32, 2] and [4, 2]
    np.testing.assert_array_equal(placed, x[:, None] ** 2 + jnp.arange(32)[:, None])
    np.testing.assert_array_equal(summed, placed.sum(1))


@EAGER_AND_JIT
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("broadcast", [X]),
        ("map_fn", [jnp.sin, X]),
        ("reduce_sum", [X]),
        ("reduce_mean", [X]),
        ("reduce_weighted_mean", [X, X]),
        ("reduce_max", [X]),
        ("placement_size", []),
        ("placement_index", []),
    ],
)
def test_an_operator_over_the_mapped_placement_is_an_error_in_its_body(
    name, arguments, how
):
    def program(x):
        return drjax.map_fn(lambda _: getattr(drjax, name)(*arguments), x)

    with pytest.raises(ValueError, match=f"{name} over 'clients'.* mapped over"):
        how(in_program(3, program))(jnp.ones(3))


@EAGER_AND_JIT
def test_a_program_inside_a_mapped_body_may_reuse_the_name(how):
    per_element = in_program(5, drjax.broadcast)
    program = in_program(3, lambda x: drjax.map_fn(per_element, drjax.broadcast(x)))
    assert how(program)(X).shape == (3, 5)


def test_operators_work_in_a_module_that_knows_no_program(tmp_path, monkeypatch):
    (tmp_path / "knows_no_program.py").write_text(
        "import drjax\n"
        "from drjax import broadcast, reduce_sum\n"
        "def through_module(x): return drjax.reduce_sum(drjax.broadcast(x))\n"
        "def by_name(x): return reduce_sum(broadcast(x))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    helpers = importlib.import_module("knows_no_program")
    for helper in (helpers.through_module, helpers.by_name):
        assert in_program(3, helper)(X) == 3 * X


@EAGER_AND_JIT
@pytest.mark.parametrize("name", ["clients", "users"])
@pytest.mark.parametrize("n", [2, 5])
def test_a_program_may_be_built_inside_a_differentiated_function(name, n, how):
    def loss(x):
        @drjax.program(placements={name: x.shape[0]})
        def mean_square(x):
            return drjax.reduce_mean(x**2, placement=name)

        return mean_square(x)

    x = jnp.arange(float(n))
    np.testing.assert_allclose(how(jax.grad(loss))(x), 2 * x / n, rtol=1e-6)


#
# The rules of custom_jvp and custom_vjp, which JAX runs when it differentiates. Below,
# each function is 3 * x, and so is its derivative if `helper(y)` is 3 * y in its rule.
#
def custom_jvp(helper, decorate=lambda rule: rule):
    fn = jax.custom_jvp(lambda x: 3 * x)
    fn.defjvp(decorate(lambda primals, tangents: (3 * primals[0], helper(*tangents))))
    return fn


def custom_fwd(helper, decorate=lambda rule: rule):
    fn = jax.custom_vjp(lambda x: 3 * x)
    fn.defvjp(decorate(lambda x: (3 * x, helper(x))), lambda y, ct: (ct * y / X,))
    return fn


def custom_bwd(helper, decorate=lambda rule: rule):
    fn = jax.custom_vjp(lambda x: 3 * x)
    fn.defvjp(lambda x: (3 * x, None), decorate(lambda _, ct: (helper(ct),)))
    return fn


def pull_back_elsewhere(fn):
    return lambda x: in_program(5, jax.vjp(fn, x)[1])(np.float32(1))[0]


CUSTOM = pytest.mark.parametrize("custom", [custom_jvp, custom_fwd, custom_bwd])


@CUSTOM
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda fn: jax.grad(in_program(3, fn)),
        lambda fn: in_program(3, jax.grad(fn)),
        lambda fn: in_program(3, jax.jit(jax.grad(through_scan(fn)))),
        lambda fn: jax.grad(in_program(3, jax.checkpoint(fn))),
        lambda fn: in_program(5, jax.grad(in_program(3, fn))),
        lambda fn: in_program(5, jax.grad(jax.jit(in_program(3, fn)))),
        lambda fn: pull_back_elsewhere(jax.jit(in_program(3, fn))),
    ],
)
def test_a_custom_rule_needs_a_program_of_its_own(custom, differentiate):
    with pytest.raises(UNDEFINED, match="rule"):
        differentiate(custom(total))(X)
    assert differentiate(custom(total, drjax.program(clients=3)))(X) == 3
