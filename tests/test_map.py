"""What stays in a jaxpr, what is compiled, what happens once, and what is let go."""

import functools
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PREFIX, equations, every, gradient, of_floats, operators
from jax.extend.core import check_jaxpr
from jax.interpreters.partial_eval import dce_jaxpr
from programs import PODS, PROGRAMS, XS, M, N, Program, V, W

import drjax

DERIVATIVES = {
    "itself": lambda f, xs: f,
    "jvp": lambda f, xs: lambda *xs: jax.jvp(f, xs, xs),
    "gradient": lambda f, xs: gradient(f, every(xs)),
    "hessian_vector": lambda f, xs: lambda *xs: jax.jvp(gradient(f, every(xs)), xs, xs),
    "gradient_of_gradient": lambda f, xs: gradient(gradient(f, every(xs)), every(xs)),
}

# What may be left outside maps, on placed values: elementwise arithmetic, changes of
# shape and type, and what JAX's transposes emit, reductions over the placement's axis.
# No matmul, no tanh, no loop: those are in the bodies. A split key is a scatter.
PLACED_ARITHMETIC = {
    *("add_any", "complex", "convert_element_type", "div", "eq", "exp", "integer_pow"),
    *("mul", "neg", "real", "sub"),
    *("broadcast_in_dim", "pad", "reshape", "slice", "squeeze"),
    *("random_split", "reduce_sum"),
}


def derivative_cases():
    for case in PROGRAMS:
        for name in DERIVATIVES:
            if (
                name == "itself"
                or (name == "jvp" and case.forward)
                or (name == "gradient" and case.reverse)
                or case.second
            ):
                yield pytest.param(name, case, id=f"{name}-{case}")


@pytest.mark.parametrize("name, case", [*derivative_cases()])
def test_a_derivative_is_made_of_operators_and_placed_arithmetic(name, case: Program):
    run, xs = of_floats(case.run, case.args)
    derivative = DERIVATIVES[name](run, xs)
    check_jaxpr(jax.make_jaxpr(derivative)(*xs).jaxpr)
    for eqn in equations(derivative, *xs):
        ours = eqn.primitive.name.startswith(PREFIX)
        atoms = [*eqn.invars, *eqn.outvars]
        placed = any({N, M} & set(getattr(v.aval, "shape", ())[:1]) for v in atoms)
        if not ours and placed:
            assert eqn.primitive.name in PLACED_ARITHMETIC, eqn


@pytest.mark.parametrize("case", [p for p in PROGRAMS if p.communication], ids=str)
def test_a_program_is_its_operators(case: Program):
    assert tuple(operators(case.run, *case.args)) == case.communication


def closed_over(body):
    run = drjax.program(clients=N)(
        lambda w, xs: drjax.reduce_sum(drjax.map_fn(lambda x: body(w, x), xs))
    )
    return run, lambda w, xs: jnp.sum(jax.vmap(lambda x: body(w, x))(xs), axis=0)


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def test_transposes_of_the_linear_operators_are_each_other():
    to_clients = drjax.program(clients=N)(drjax.broadcast)
    from_clients = drjax.program(clients=N)(drjax.reduce_sum)
    ct = drjax.program(clients=N)(drjax.broadcast)(W)
    assert operators(jax.linear_transpose(to_clients, W), ct) == ["reduce_sum"]
    assert operators(jax.linear_transpose(from_clients, XS), XS[0]) == ["broadcast"]


def test_gradient_of_what_is_sent_is_what_is_summed():
    run = drjax.program(clients=N)(
        lambda w: drjax.reduce_sum(
            drjax.map_fn(loss, (drjax.broadcast(w), XS)),
        )
    )
    names = ["broadcast", "map", "reduce_sum", "broadcast", "map", "reduce_sum"]
    assert operators(jax.value_and_grad(run), W) == names


def test_cotangent_of_a_closed_over_value_is_a_summed_result():
    run, _ = closed_over(loss)
    *_, transpose = [
        eqn
        for eqn in equations(jax.grad(run), W, XS)
        if eqn.primitive.name == "drjax_map"
    ]
    assert transpose.params["out_placed"] == (False,)
    assert [v.aval.shape for v in transpose.outvars] == [W.shape]


def test_mean_divides_by_the_placement_size_also_in_its_gradient():
    run = drjax.program(clients=N)(lambda x: jnp.sum(drjax.reduce_mean(x) ** 2))
    for eqn in equations(jax.grad(run), XS):
        for atom in eqn.invars:  # No literal holds the size.
            assert np.size(getattr(atom, "val", 0)) == 1
            assert getattr(atom, "val", 0) not in (N, 1 / N)
    assert "placement_size" in operators(jax.grad(run), XS)


def test_unused_results_and_their_operands_leave_the_map():
    def first_of_two(xs, ys):
        def body(x, y):
            return jnp.sum(x), jnp.tanh(y @ W)

        return drjax.map_fn(body, (xs, ys))[0]

    jaxpr = jax.make_jaxpr(drjax.program(clients=N)(first_of_two))(XS, XS).jaxpr
    assert "dot_general" in str(jaxpr)
    left, used = dce_jaxpr(jaxpr, [True])[:2]
    assert used == [True, False]
    assert "dot_general" not in str(left)


#
# Compiled form.
#
def temporaries(fn, *args) -> int:
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def uses_shared_alone(w, x):
    return jnp.mean((x @ jnp.tanh(w @ w)) ** 2)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -1, 1),))


def clips_cotangents(w, x):
    return jnp.sum(jnp.tanh(clipped(x @ w) @ w.T))


MATRIX_DERIVATIVES = {
    "grad": jax.grad,
    "hvp": lambda f: lambda w, x: jax.jvp(lambda w: jax.grad(f)(w, x), (w,), (w,)),
    "grad_of_grad": lambda f: (
        lambda w, x: jax.grad(lambda w: jnp.sum(jax.grad(f)(w, x) ** 2))(w)
    ),
    "vmap_w": lambda f: (
        lambda w, x: jax.vmap(jax.grad(f), (0, None))(jnp.stack([w, -w]), x)
    ),
    "vmap_x": lambda f: (
        lambda w, x: jax.vmap(jax.grad(f), (None, 0))(w, jnp.stack([x, -x]))
    ),
}


@pytest.mark.parametrize(
    "derivative, body",
    [
        *((derivative, loss) for derivative in MATRIX_DERIVATIVES),
        # Backwards again, each element would keep its own cotangent of tanh(w @ w).
        *((d, uses_shared_alone) for d in MATRIX_DERIVATIVES if d != "grad_of_grad"),
        *((d, clips_cotangents) for d in ("grad", "vmap_x")),
    ],
)
def test_closed_over_matrix_needs_no_more_memory_than_plain_vmap(derivative, body):
    derivative = MATRIX_DERIVATIVES[derivative]
    n, d = 64, 128
    w, xs = jnp.ones((d, d)) / d, jnp.ones((n, 4, d))
    run = drjax.program(clients=n)(
        lambda w, xs: drjax.reduce_sum(drjax.map_fn(lambda x: body(w, x), xs))
    )
    plain = temporaries(
        derivative(lambda w, xs: jnp.sum(jax.vmap(lambda x: body(w, x))(xs))), w, xs
    )
    assert temporaries(derivative(run), w, xs) <= 1.1 * plain


@pytest.fixture
def compilations():
    """A list that grows with each XLA compilation."""
    seen: list[str] = []
    active = [True]

    def listen(event, *_, **__):
        if active[0] and event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active[0] = False


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.grad, jax.jit], ids=["", "grad", "jit"]
)
def test_a_second_call_compiles_nothing(wrap, compilations):
    run, _ = closed_over(loss)
    fn = wrap(run)
    jax.block_until_ready(fn(W, XS + 1))
    assert compilations
    compilations.clear()
    jax.block_until_ready(fn(2 * W, XS))
    # The operands themselves: `2 * W`.
    assert len(compilations) <= 1


#
# Effects.
#
EFFECT_DERIVATIVES = {
    "itself": (1, lambda f: f),
    "jit": (1, jax.jit),
    "jvp": (1, lambda f: lambda w: jax.jvp(f, (w,), (w,))),
    "linearize": (1, lambda f: lambda w: jax.linearize(f, w)[1](w)),
    "grad": (1, jax.grad),
    "grad_of_jit": (1, lambda f: jax.grad(jax.jit(f))),
    "jit_of_grad": (1, lambda f: jax.jit(jax.grad(f))),
    "checkpoint": (1, lambda f: jax.grad(jax.checkpoint(f))),
    "hvp": (1, lambda f: lambda w: jax.jvp(jax.grad(f), (w,), (w,))),
    "grad_of_grad": (1, lambda f: jax.grad(lambda w: jnp.sum(jax.grad(f)(w) ** 2))),
    "scan": (
        2,
        lambda f: (
            lambda w: jax.lax.scan(
                lambda w, _: (w - jax.grad(f)(w), None), w, None, length=2
            )
        ),
    ),
    "vmap": (2, lambda f: lambda w: jax.vmap(f)(jnp.stack([w, w]))),
}


@pytest.mark.parametrize("name", EFFECT_DERIVATIVES)
@pytest.mark.parametrize(
    "nested", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"]
)
def test_an_effect_happens_once_for_each_element_and_call(name, nested):
    seen: list[float] = []

    def body(w, x):
        def note(w, x):
            jax.debug.callback(lambda x: seen.append(float(x)), x[0, 0] + 0 * w[0, 0])
            return jnp.tanh(x @ w)

        return jnp.sum(nested(note)(w, x))

    run, _ = closed_over(body)
    times, derivative = EFFECT_DERIVATIVES[name]
    jax.block_until_ready(derivative(lambda w: run(w, XS))(W))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), np.sort(np.repeat(XS[:, 0, 0], times)))


def test_a_map_that_only_has_effects_is_kept():
    seen: list[float] = []

    @drjax.program(clients=N)
    def run(xs):
        drjax.map_fn(
            lambda x: jax.debug.callback(lambda x: seen.append(float(x)), x[0, 0]), xs
        )

    jax.jit(run)(XS)
    jax.effects_barrier()
    assert len(seen) == N


#
# Surroundings.
#
def test_a_body_may_use_an_axis_name_of_an_outer_vmap():
    @drjax.program(clients=N)
    def run(w, xs):
        return drjax.reduce_sum(
            drjax.map_fn(lambda x: jnp.sum(x) * jax.lax.psum(w, "outer"), xs)
        )

    batch = jnp.stack([V, 2 * V])
    got = jax.vmap(run, (0, None), axis_name="outer")(batch, XS)
    np.testing.assert_allclose(got, [jnp.sum(XS) * 3 * V] * 2, rtol=1e-5)


@pytest.mark.parametrize("collective", [jax.lax.psum, lambda x, name: x + 0.0])
def test_a_body_may_use_an_outer_axis_that_no_operand_has(collective):
    @drjax.program(clients=N)
    def run(w):
        def body(y):
            return collective(y, "outer") + jax.lax.axis_index("outer")

        return drjax.map_fn(body, jnp.arange(5.0)) + 0 * w

    def plain(w):
        ys = jnp.arange(5.0) * (2.0 if collective is jax.lax.psum else 1.0)
        return ys + jax.lax.axis_index("outer") + 0 * w

    batch = jnp.arange(2.0)
    got, want = (jax.vmap(f, axis_name="outer")(batch) for f in (run, plain))
    np.testing.assert_allclose(got, want)


def test_derivatives_inside_a_shard_map_equal_plain():
    mesh = jax.make_mesh((1,), ("pods",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss_of(mapped):
        def of_pod(w, xs):
            return jax.lax.psum(jnp.mean(mapped(lambda x: jnp.sin(x * w), xs)), "pods")

        return jax.shard_map(
            of_pod, mesh=mesh, in_specs=(spec(), spec(None, "pods")), out_specs=spec()
        )

    run = drjax.program(clients=N)(loss_of(drjax.map_fn))
    plain = loss_of(lambda fn, xs: jax.vmap(fn)(xs))
    for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        got, want = (jax.jit(derivative(f))(2.0, XS) for f in (run, plain))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    # What differs between pods is not taken for what is the same.
    varying = jax.shard_map(
        lambda xs: drjax.map_fn(lambda x: jnp.sum(x), xs),
        mesh=mesh,
        in_specs=spec(None, "pods"),
        out_specs=spec(),
    )
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(drjax.program(clients=N)(varying))(XS)


def test_a_rule_that_is_not_linear_acts_on_each_elements_cotangent():
    def closed(w):
        total = drjax.reduce_sum(drjax.map_fn(lambda x: jnp.sum(x @ clipped(w)), XS))
        return 10 * total

    def sent(w):
        each = drjax.map_fn(
            lambda w, x: jnp.sum(x @ clipped(w)), (drjax.broadcast(w), XS)
        )
        return 10 * drjax.reduce_sum(each)

    closed, sent = drjax.program(clients=N)(closed), drjax.program(clients=N)(sent)
    np.testing.assert_allclose(jax.grad(closed)(W), jax.grad(sent)(W), rtol=1e-5)


def test_a_checkpoint_that_saves_maps_is_well_formed():
    @drjax.program(clients=N)
    def run(w):
        u = jnp.sin(w)
        mapped = drjax.map_fn(lambda x: jnp.tanh(x @ u) * jnp.sum(u), XS)
        return jnp.sum(mapped**2) + jnp.sum(u * jnp.cos(u))

    def policy(primitive, *_, **__):
        return primitive.name == "drjax_map"

    with jax.enable_checks(True):
        got = jax.jit(jax.grad(jax.checkpoint(run, policy=policy)))(W)
    np.testing.assert_allclose(got, jax.grad(run)(W), rtol=1e-4)


def test_an_outer_spmd_axis_name_reaches_the_body():
    mesh = jax.make_mesh((1,), ("outer",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    @drjax.program(clients=N)
    def run(x):
        return drjax.map_fn(lambda x: jax.lax.with_sharding_constraint(x, spec), x)

    batched = jax.vmap(run, spmd_axis_name="outer")
    text = jax.jit(batched).lower(jnp.stack([XS, XS])).as_text()
    assert '"outer"' in text


def test_no_tracer_leaks():
    run, plain = closed_over(loss)
    with jax.checking_leaks():
        got = jax.jit(jax.grad(run))(W, XS)
        jax.jit(jax.hessian(run))(W, XS)
    np.testing.assert_allclose(got, jax.grad(plain)(W, XS), rtol=1e-5)


def test_programs_run_under_disable_jit():
    run, plain = closed_over(loss)
    with jax.disable_jit():
        got = jax.grad(run)(W, XS)
    np.testing.assert_allclose(got, jax.grad(plain)(W, XS), rtol=1e-5)


def test_integers_have_float0_cotangents():
    @drjax.program(clients=N)
    def run(i, x):
        return jnp.sum(drjax.reduce_sum(drjax.map_fn(lambda i, x: i * x, (i, x))))

    i, x = jnp.arange(N), jnp.ones(N)
    di, dx = jax.grad(run, (0, 1), allow_int=True)(i, x)
    assert di.dtype == jax.dtypes.float0
    assert di.shape == (N,)
    np.testing.assert_array_equal(dx, i)


def test_the_rule_of_a_custom_derivative_may_close_over_arrays():
    table = np.linspace(1, 2, 3)

    @jax.custom_jvp
    def scaled(x):
        return x * table

    scaled.defjvp(lambda p, t: (p[0] * table, t[0] * table * 2))
    run, plain = closed_over(lambda w, x: jnp.sum(scaled(x) ** 2 * w[:, 0]))
    for derivative in (jax.grad, lambda f: jax.jit(jax.grad(f, 1))):
        got, want = derivative(run)(W, XS), derivative(plain)(W, XS)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def bodies(jaxpr):
    maps = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "drjax_map"]
    return [eqn.params["body"] for eqn in maps]


def test_a_body_traced_again_is_the_same_body():
    @drjax.program(clients=N)
    def run(x, factors):
        for factor in factors:
            x = drjax.map_fn(lambda v, f=factor: jnp.sin(v) * f, x)
        return x

    traced = jax.make_jaxpr(run, static_argnums=1)
    same, again, other = (
        bodies(traced(jnp.ones(N), factors)) for factors in ((2, 2), (2,), (3,))
    )
    assert len({id(body) for body in same + again}) == 1
    assert other[0] is not same[0]


def test_bodies_that_differ_are_told_apart():
    constants = (0.0, -0.0, np.nan, 1, 1.0, True, 1j, np.int8(1), np.float16(1))
    inputs = (jnp.ones(N), jnp.ones(N, int), jnp.ones(N, jnp.bfloat16))
    for c, x in itertools.product(constants, inputs):
        times = functools.partial(lambda c, v: v * c, c)
        run = drjax.program(clients=N)(functools.partial(drjax.map_fn, times))
        got = jax.jit(run)(x)
        want = jax.vmap(times)(x)
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), (c, x)


def test_no_cache_keeps_a_dropped_program_alive():
    class Held:  # What programs and mapped functions close over.
        value = 2.0

    def build(i):
        held = Held()

        @jax.custom_jvp
        def double(x):
            return x * held.value

        double.defjvp(lambda p, t: (p[0] * held.value, t[0] * held.value))

        @drjax.program(clients=M)
        def run(w):
            placed = drjax.map_fn(lambda x: x * i, PODS[:, 0, 0])
            placed = drjax.map_fn(lambda x: double(x) * w * held.value, placed)
            return drjax.reduce_sum(placed)

        return jax.make_jaxpr(jax.grad(run))(2.0), weakref.ref(held)

    helds, all_bodies = [], []
    for i in range(1000):
        jaxpr, held = build(i)
        helds.append(held)
        all_bodies += map(weakref.ref, bodies(jaxpr))
        del jaxpr
    gc.collect()
    assert len(all_bodies) >= 2000
    # JAX itself keeps what it traced last.
    assert sum(held() is not None for held in helds) < 20
    # We keep 128 small bodies, equations alone, and a few that derive from each.
    assert sum(body() is not None for body in all_bodies) < 128 * 3 + 20
