"""A plan computes what the program does, in few rounds, on every engine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import ENGINE, ENGINES, FEW, SLOW
from helpers import assert_close, every, gradient, of_floats
from jax import lax
from programs import (
    PROGRAMS,
    XS,
    M,
    N,
    Program,
    W,
    early_stopping,
    k_means,
    loss,
    program,
    scaffold,
    while_around,
)

import drjax
from drjax._jaxprs import is_var
from drjax._straighten import straighten
from drjax.plan import Branch, MapReduce, Scan, Server, While


def in_a_scan(fn, xs):
    """Three rounds of a function, whose results go into the next one's arguments."""

    def step(carry, _):
        outs = fn(*(x * carry.astype(jnp.result_type(x)) for x in xs))
        total = sum(jnp.sum(out).real for out in outs)
        return carry + 1e-3 * total, outs

    return lambda *_: lax.scan(step, jnp.float32(1), None, length=3)


TRANSFORMATIONS = {
    "itself": lambda fn, xs: fn,
    "jvp": lambda fn, xs: lambda *xs: jax.jvp(fn, xs, xs),
    "gradient": lambda fn, xs: gradient(fn, every(xs)),
    "gradient of gradient": lambda fn, xs: gradient(gradient(fn, every(xs)), every(xs)),
    "vmap": lambda fn, xs: lambda *xs: jax.vmap(fn)(*(jnp.stack([x, -x]) for x in xs)),
    "scan": in_a_scan,
}


def cases():
    for engine, case, name in itertools.product(ENGINES, PROGRAMS, TRANSFORMATIONS):
        possible = {
            "jvp": case.forward,
            "gradient": case.reverse,
            "gradient of gradient": case.second,
        }
        if not possible.get(name, True):
            continue
        if engine == "beam" and name == "scan":  # Programs with loops are rows too.
            continue
        if engine == "federated" and name in ("jvp", "vmap", "scan"):
            continue  # It runs stages as "streaming" does.
        if engine in FEW and name not in ("itself", "gradient", "scan"):
            continue
        slow = (
            engine in SLOW
            or name in ("gradient of gradient", "vmap")
            or (case.large and name != "itself")
        )
        yield pytest.param(
            *(ENGINES[engine], name, case),
            marks=[pytest.mark.slow] * slow,
            id=f"{engine}-{name}-{case}",
        )


@pytest.mark.parametrize("run, name, case", [*cases()])
def test_a_plan_computes_what_the_program_does(run, name, case: Program):
    fn, xs = of_floats(case.run, case.args)
    fn = TRANSFORMATIONS[name](fn, xs)
    plan = drjax.make_plan(fn)(*xs)
    check_stages(plan)
    assert_close(run(plan, *xs), jax.jit(fn)(*xs))


def check_stages(plan):
    """Every value is made before it is read, and once; operators are in the rounds."""
    known = {*plan.inputs, *plan.constants, *plan.sizes}
    for stage in plan.stages:
        reads, writes = [], []
        match stage:
            case Server():
                reads, writes = stage.inputs, stage.outputs
                names = {eqn.primitive.name for eqn in stage.jaxpr.jaxpr.eqns}
                assert not any(name.startswith("drjax_") for name in names)
            case MapReduce():
                reads = stage.server_inputs + stage.placed_inputs
                writes = tuple(i for _, i in stage.reductions) + stage.placed_outputs
                types = [plan.avals[i] for _, i in stage.reductions]
                types += map(plan.element, stage.placed_outputs)
                body = stage.body
                assert len(body.in_avals) == 1 + len(reads)
                for type_, aval in zip(types, body.out_avals, strict=True):
                    assert (type_.shape, type_.dtype) == (aval.shape, aval.dtype)
                assert not plan.scattered & {*stage.placed_outputs}
            case Scan():
                reads, writes = stage.constants + stage.init + stage.xs, stage.carry
                writes += stage.ys
                check_stages(stage.body)
            case While():
                reads = stage.predicate_constants + stage.body_constants + stage.init
                writes = stage.carry
                check_stages(stage.predicate)
                check_stages(stage.body)
            case Branch():
                reads, writes = (stage.index, *stage.operands), stage.results
                for branch in stage.branches:
                    check_stages(branch)
            case _:
                raise AssertionError(stage)
        assert known >= {*reads}
        assert not known & {*writes}
        known |= {*writes}
    assert known >= {*plan.outputs}


#
# Algorithms, and the communication that each needs.
#
@program
def fedavg(w, xs):
    def train(w, x):
        return lax.fori_loop(0, 3, lambda _, w: w - 0.1 * jax.grad(loss)(w, x), w)

    deltas = drjax.map_fn(train, (drjax.broadcast(w), xs))
    return drjax.reduce_mean(deltas)


@program
def loss_after_fedavg(w, xs):
    new = fedavg(w, xs)
    return drjax.reduce_mean(drjax.map_fn(lambda x: loss(new, x), xs))


@program
def softmax_over_the_clients(w, xs):
    logits = drjax.map_fn(jnp.sum, xs)
    shifted = logits - drjax.broadcast(drjax.reduce_max(logits))
    weights = jnp.exp(shifted) / drjax.broadcast(drjax.reduce_sum(jnp.exp(shifted)))
    return drjax.reduce_sum(weights[:, None, None] * xs)


@program
def keys_of_the_server(w, xs):
    keys = jax.random.split(jax.random.key(0), N)
    noise = drjax.map_fn(lambda key: jax.random.normal(key, (4, 3)), keys)
    chosen = jnp.arange(N) % 2 == 0
    return drjax.reduce_sum(jnp.where(chosen[:, None, None], xs + noise, 0))


@program
def arithmetic_on_placed_values(w, xs):
    """Contractions and sums that go over the elements, too, and none that do not."""
    y = jnp.concatenate([xs, xs[:, ::-1] ** 2], axis=1).transpose(2, 0, 1)
    z = jnp.einsum("cna,cnb->ab", y, y), jnp.einsum("cna,cb->ab", y, w)
    centred = xs - xs.mean(axis=1, keepdims=True)
    return z, jnp.sum(centred.reshape(N, -1) ** 2), jnp.cumsum(xs, axis=1).max(axis=0)


ALGORITHMS = {  # And how many rounds each is, those in loops left out.
    fedavg: 1,
    loss_after_fedavg: 2,
    scaffold: 1,  # To begin with, the clients are sent zeros.
    while_around: 0,
    early_stopping: 0,
    softmax_over_the_clients: 3,
    k_means: 1,
    keys_of_the_server: 1,
}


@pytest.mark.parametrize("fn", ALGORITHMS, ids=lambda fn: fn.__name__)
@ENGINE
def test_an_algorithm_is_as_many_rounds_as_it_needs(run, fn):
    plan = drjax.make_plan(fn)(W, XS)
    check_stages(plan)
    assert plan.rounds == ALGORITHMS[fn]
    assert_close(run(plan, W, XS), jax.jit(fn)(W, XS))


def rounds_needed(fn, args, is_placed):
    """The longest chain of reductions, each of which waits for the one before.

    A round reduces what needs as many reductions as there were rounds before it, and
    makes the placed results that do.
    """
    straight = straighten(jax.make_jaxpr(fn)(*args))
    level = dict.fromkeys(straight.invars, 0) | dict.fromkeys(straight.constants, 0)
    for eqn in straight.eqns:
        before = max((level[v] for v in eqn.invars if is_var(v)), default=0)
        is_reduction = eqn.primitive.name.startswith("drjax_reduce")
        placed = eqn.params.get("out_placed", [not is_reduction] * len(eqn.outvars))
        for v, stays in zip(eqn.outvars, placed, strict=True):
            level[v] = before + (not stays)
    outs = zip(straight.outvars, is_placed, strict=True)
    return max([*level.values(), *(level[v] + 1 for v, placed in outs if placed)])


@pytest.mark.parametrize("name", ["itself", "gradient"])
@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_a_plan_has_as_many_rounds_as_reductions_wait_for_each_other(case, name):
    if name == "gradient" and not case.reverse:
        pytest.skip("It has no gradient.")
    fn, xs = of_floats(case.run, case.args)
    fn = TRANSFORMATIONS[name](fn, xs)
    plan = drjax.make_plan(fn)(*xs)
    if not plan.inner:
        is_placed = [i in plan.at for i in plan.outputs]
        assert plan.rounds == rounds_needed(fn, xs, is_placed)


@ENGINE
def test_the_gradient_of_a_round_is_a_round_more(run):
    def objective(w, xs):
        return jnp.sum(fedavg(w, xs) ** 2)

    assert drjax.make_plan(objective)(W, XS).rounds == 1
    plan = drjax.make_plan(jax.grad(objective))(W, XS)
    assert plan.rounds == 2
    assert_close(run(plan, W, XS), jax.grad(objective)(W, XS))


@ENGINE
def test_placed_arithmetic_is_cut(run):
    def fn(w, xs):  # An operator says which argument is placed.
        return arithmetic_on_placed_values(w, xs), drjax.reduce_sum(xs)

    fn = program(fn)
    plan = drjax.make_plan(fn)(W, XS)
    assert plan.rounds == 1
    assert plan.at.keys() >= {plan.inputs[1]}
    assert plan.inputs[0] not in plan.at
    assert_close(run(plan, W, XS), jax.jit(fn)(W, XS))


@ENGINE
def test_another_axis_of_the_same_size_is_not_the_placement(run):
    x = np.random.default_rng(0).normal(size=(N, N, N)).astype("float32")
    fn = program(lambda x: drjax.reduce_sum(drjax.map_fn(jnp.cumsum, x.sum(axis=2))))
    plan = drjax.make_plan(fn)(x)
    assert plan.at[plan.inputs[0]].axis == 0
    assert_close(run(plan, x), jax.jit(fn)(x))


def test_what_an_element_prints_is_printed_once_by_each(capfd):
    @program
    def fn(x):
        drjax.map_fn(lambda v: jax.debug.print("element {}", v), x)
        return x

    x = jnp.arange(5.0)
    drjax.run_plan(drjax.make_plan(fn)(x), x)
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.splitlines()) == [
        f"element {i}.0" for i in range(N)
    ]


def test_the_axis_of_a_single_element_is_not_repeated():
    @drjax.program(clients=1)
    def fn(x):
        return drjax.map_fn(jnp.sin, x) + jnp.ones((3, 2))

    with pytest.raises(drjax.PlanError, match="mixes"):
        drjax.make_plan(fn)(jnp.ones((1, 2)))


SQUARE = np.random.default_rng(0).normal(size=(N, N)).astype("float32")
ROW = SQUARE[0]


def sines(x):
    return drjax.map_fn(jnp.sin, x)


def handed_out_and_reversed(x):
    t = jnp.tanh(drjax.reduce_sum(x))
    return sines(x) * t[:, None], t[::-1]


def handed_out_and_whole(x, u):
    t = jnp.tanh(u)
    return sines(x) * t[:, None] + drjax.map_fn(lambda row: row * jnp.sum(t), x)


def trained_and_handed_out(x, w):
    def step(w, _):
        return w - 0.1 * drjax.reduce_sum(drjax.map_fn(lambda row: row * w, x)), None

    return lax.scan(step, w, None, length=2)[0] * drjax.map_fn(jnp.sum, x)


def drawn_in_a_branch(x):
    def draw():
        return jax.random.normal(jax.random.key(0), (N, N))

    return lax.cond(drjax.placement_size() > 9, lambda: sines(x), draw)


def sorted_in_a_loop(x):
    return lax.fori_loop(0, 2, lambda _, c: jnp.argsort(c, axis=-1) * 1.0, sines(x))


OF_THE_SERVER, OF_EACH = jax.sharding.PartitionSpec(), None
HANDED_OUT = {  # Server values with a row for each element, and which are stated.
    "a sum": (lambda x: drjax.reduce_sum(x) * drjax.map_fn(jnp.sum, x), 1),
    "a mapped sum": (lambda x: drjax.map_fn(jnp.cos, drjax.reduce_sum(x)), 1),
    "a summed product": (
        lambda x: drjax.reduce_sum(
            jnp.tanh(drjax.reduce_sum(x)) * drjax.map_fn(jnp.sum, x)
        ),
        1,
    ),
    "a sum by arithmetic": (
        lambda x: jnp.sum(sines(x), 0) * drjax.map_fn(jnp.sum, x),
        1,
    ),
    "a row and a repeated row": (
        lambda x, u: sines(x) * jnp.broadcast_to(u, (N, N)) + u[:, None],
        2,
    ),
    "a row, and all": (handed_out_and_whole, 2),
    "a reversed one": (handed_out_and_reversed, 1),
    "one from a loop": (trained_and_handed_out, 2),
    "one drawn in a branch": (drawn_in_a_branch, 1),
    "none in a loop": (sorted_in_a_loop, 1),
}


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
@pytest.mark.parametrize("name", HANDED_OUT)
@ENGINE
def test_what_the_server_hands_out_is_its_own(run, name, batched):
    """Where rows and columns are as many, so that no size tells them apart."""
    fn, count = HANDED_OUT[name]
    args, specs = (SQUARE, ROW)[:count], (OF_EACH, OF_THE_SERVER)[:count]
    fn = program(fn)
    if batched:
        fn, args = jax.vmap(fn), tuple(np.stack([x, 0.5 * x, -x]) for x in args)
    plan = drjax.make_plan(fn, in_specs=specs)(*args)
    check_stages(plan)
    assert_close(run(plan, *args), jax.jit(fn)(*args))


def server_vector(x):
    """A value of the server with as many entries as there are elements."""
    hot = drjax.map_fn(lambda i: jax.nn.one_hot(i, N), drjax.placement_index())
    return jnp.tanh(drjax.reduce_sum(hot * drjax.map_fn(jnp.sum, x)[:, None]))


def times(x, u):
    return drjax.map_fn(lambda row, k: row * k, (x, u))


def in_one_branch(x):
    u = server_vector(x)
    whole = lambda: drjax.map_fn(lambda row: row * jnp.sum(u * u[::-1]), x)  # noqa: E731
    return [lax.cond(p, lambda: times(x, u), whole) for p in (u[0] > 9, u[0] < 9)]


def in_a_body_and_whole_in_its_predicate(x):
    def body(c):
        return times(*c), c[1] - 1.0

    start = x, server_vector(x)
    return lax.while_loop(lambda c: jnp.max(jnp.cumsum(c[1])) > -3, body, start)


def masks_of_rounds(x):
    def step(w, mask):
        first = jnp.argsort(mask)[0]
        return w + drjax.reduce_sum(times(x, mask)) * first, None

    masks = jax.random.uniform(jax.random.key(1), (3, N))
    return lax.scan(step, jnp.zeros(N), masks)[0]


IN_FLOWS = [in_one_branch, in_a_body_and_whole_in_its_predicate, masks_of_rounds]


@pytest.mark.parametrize("fn", IN_FLOWS, ids=lambda fn: fn.__name__)
@ENGINE
def test_loops_and_branches_are_handed_what_is_the_servers(run, fn):
    fn = program(fn)
    plan = drjax.make_plan(fn)(SQUARE)
    check_stages(plan)
    assert_close(run(plan, SQUARE), jax.jit(fn)(SQUARE))


@pytest.mark.parametrize(
    "local",
    [
        lambda x: lax.fori_loop(0, 3, lambda _, v: jnp.cos(v) + 0.1, x),
        lambda x: lax.cond(True, jnp.cos, jnp.tanh, x),
    ],
    ids=["loop", "branch"],
)
def test_what_happens_to_an_argument_before_a_map_is_the_elements_work(local):
    plan = drjax.make_plan(program(lambda x: sines(local(x))))(SQUARE)
    assert [type(stage) for stage in plan.stages] == [MapReduce]
    assert not plan.scattered
    assert_close(drjax.run_plan(plan, SQUARE), jnp.sin(local(SQUARE)))


def test_an_element_is_handed_the_least_that_its_part_is_made_of():
    @program
    def fn(mask, x):
        kept = jnp.where(mask.reshape(N, 1, 1), x, 0) + jnp.where(
            mask[:, None, None], 2 * x, 0
        )
        return drjax.reduce_sum(kept)

    mask = np.arange(N) > 2
    plan = drjax.make_plan(fn, in_specs=(OF_THE_SERVER, None))(mask, XS)
    (stage,) = plan.stages
    assert isinstance(stage, MapReduce)
    assert [plan.avals[i].shape for i in plan.scattered] == [(N,)]
    assert stage.server_inputs == ()  # The zeros are no message.
    assert_close(drjax.run_plan(plan, mask, XS), fn(mask, XS))


def test_what_is_handed_out_in_another_shape_may_be_used_whole_in_it():
    def fn(weights, x):
        column = weights.reshape(N, 1)
        return sines(x) * column, jnp.sort(column, axis=0)

    plan = drjax.make_plan(program(fn), in_specs=(OF_THE_SERVER, None))(ROW, SQUARE)
    assert plan.rounds == 1
    assert_close(drjax.run_plan(plan, ROW, SQUARE), program(fn)(ROW, SQUARE))


def test_a_long_chain_of_arithmetic_is_followed_back():
    @program
    def fn(x):
        for _ in range(2000):
            x = x * 1.001
        return drjax.reduce_sum(x)

    plan = drjax.make_plan(fn)(ROW)
    assert plan.at[plan.inputs[0]].axis == 0
    assert plan.rounds == 1


def test_operators_in_a_call_that_is_not_known_are_an_error():
    mesh = jax.make_mesh((1,), ("other",))
    spec = jax.sharding.PartitionSpec()

    @program
    def fn(x):
        return jax.shard_map(sines, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    with pytest.raises(drjax.PlanError, match=r"shard_map .* holds operators"):
        drjax.make_plan(fn)(ROW)


def test_operators_in_a_custom_vmap_are_found():
    total = jax.custom_batching.custom_vmap(drjax.reduce_sum)
    total.def_vmap(lambda size, batched, x: (jnp.sum(x, axis=1), True))
    plan = drjax.make_plan(program(lambda x: total(sines(x))))(ROW)
    assert plan.rounds == 1
    assert_close(drjax.run_plan(plan, ROW), jnp.sum(jnp.sin(ROW)))


@ENGINE
def test_a_linear_solve_of_each_element_is_planned(run):
    def fn(x):
        spd = drjax.map_fn(lambda v: v.T @ v + jnp.eye(3), x)
        solved = jnp.linalg.solve(spd, x[:, :3])
        return jnp.sum(solved**2), drjax.reduce_mean(jnp.linalg.inv(spd))

    fn = program(fn)
    for f in (fn, jax.grad(lambda x: fn(x)[0])):
        assert_close(run(drjax.make_plan(f)(XS), XS), jax.jit(f)(XS))


@ENGINE
def test_placements_of_one_name_and_two_sizes_are_two(run):
    if run is ENGINES["federated"]:
        pytest.skip(
            "federated.simulate refuses two numbers of clients, and is tested so"
        )

    def fn(x, y):
        first = program(lambda x: drjax.reduce_mean(drjax.map_fn(jnp.sin, x)))
        second = drjax.program(clients=M)(
            lambda y, s: drjax.reduce_sum(drjax.map_fn(lambda v: v * s, y))
        )
        return second(y, first(x)), first(x) * second(y, 2.0)

    x, y = jnp.arange(1.0, N + 1), jnp.arange(1.0, M + 1)
    plan = drjax.make_plan(fn)(x, y)
    check_stages(plan)
    assert plan.placements == [("clients", N), ("clients", M)]
    assert_close(run(plan, x, y), jax.jit(fn)(x, y))


@ENGINE
def test_loops_in_a_batch_stop_one_by_one(run):
    @program
    def with_operators(x):
        def body(v):
            return v + drjax.reduce_sum(x)

        return lax.while_loop(lambda v: v < 30, body, jnp.float32(0))

    @program
    def without(x):
        y = drjax.map_fn(lambda v: v[0], x)
        return jax.vmap(lambda v: lax.while_loop(lambda v: v < 9, lambda v: 2 * v, v))(
            y
        )

    x = jnp.arange(1.0, 2 * N + 1).reshape(2, N)
    for fn, arg in ((jax.vmap(with_operators), x), (without, x.T)):
        plan = drjax.make_plan(fn)(arg)
        check_stages(plan)
        assert_close(run(plan, arg), jax.jit(fn)(arg))


#
# What cannot be cut, and what is said about it.
#
MIXING = {
    "rev": lambda x: x[::-1],
    "slice": lambda x: x[0],
    "cumsum": lambda x: jnp.cumsum(x, axis=0),
    "reshape": lambda x: x.reshape(-1),
    "dot_general": lambda x: x[:, 0] @ x[:, 0].T,
    "sort": lambda x: jnp.sort(x, axis=0),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_elements_is_an_error_that_names_operation_and_line(name):
    @program
    def run(x):
        placed = drjax.map_fn(jnp.sin, x)
        return MIXING[name](placed)

    says = (
        rf"{name}.*test_plan\.py:\d+.* mixes the elements of 'clients'.*drjax\.map_fn"
    )
    with pytest.raises(drjax.PlanError, match=says):
        drjax.make_plan(run)(XS)


def test_an_unknown_operation_is_an_error_and_no_guess():
    @program
    def run(x):
        placed = drjax.map_fn(jnp.sin, x)
        return jax.pure_callback(np.sort, placed, placed)

    says = r"pure_callback .* is not known.*drjax\.map_fn"
    with pytest.raises(drjax.PlanError, match=says):
        drjax.make_plan(run)(XS)


@pytest.mark.parametrize(
    "whole",
    [
        lambda x: drjax.map_fn(lambda v: v - jnp.mean(x, 0), x),
        lambda x: drjax.map_fn(lambda v: v - jnp.mean(x, 0), drjax.map_fn(jnp.sin, x)),
        lambda x: drjax.reduce_sum(drjax.broadcast(x)) + drjax.reduce_sum(x),
    ],
    ids=["itself", "another", "broadcast"],
)
def test_to_send_the_elements_what_is_placed_is_an_error(whole):
    @program
    def run(x):
        return whole(x), drjax.reduce_sum(x)

    with pytest.raises(drjax.PlanError, match=r"whole\. Each element has its own"):
        drjax.make_plan(run)(XS)


def test_a_scan_over_the_elements_is_an_error():
    @program
    def run(x):
        return lax.scan(lambda c, v: (c + v, None), 0.0, drjax.map_fn(jnp.sum, x))

    with pytest.raises(drjax.PlanError, match="one after the other"):
        drjax.make_plan(run)(XS)


def test_arguments_that_do_not_fit_are_errors():
    plan = drjax.make_plan(fedavg)(W, XS)
    with pytest.raises(TypeError, match="structure"):
        drjax.run_plan(plan, W)
    with pytest.raises(TypeError, match=r"float32\[3,2\], but got .*\[2,3\]"):
        drjax.run_plan(plan, W.T, XS)


#
# Each rule against vmap of the function of one element.
#
ONE = {
    "add": lambda x, y: x + y,
    "select": lambda x, y: jnp.where(x > 0, x, y),
    "clamp": lambda x, y: jnp.clip(x, -0.5, 0.5) * y,
    "reshape": lambda x, y: x.reshape(6, 2),
    "squeeze": lambda x, y: x[None, :, None].squeeze((0, 2)),
    "transpose": lambda x, y: jnp.einsum("ab->ba", x),
    "slice": lambda x, y: x[1:3, ::2],
    "pad": lambda x, y: jnp.pad(x, ((1, 2), (0, 1))),
    "concatenate": lambda x, y: jnp.concatenate([x, y], axis=1),
    "sort": lambda x, y: jnp.sort(x, axis=0),
    "argmax": lambda x, y: jnp.argmax(x, axis=1),
    "reduce": lambda x, y: (x.sum(0), x.max(1), x.prod(0), jnp.all(x > 0, 1)),
    "cumsum": lambda x, y: jnp.cumsum(x, axis=0),
    "dot": lambda x, y: (x @ y.T, jnp.einsum("ab,ab->b", x, y)),
    "constant": lambda x, y: jnp.tensordot(x, np.arange(6.0).reshape(3, 2), 1),
    "random": lambda x, y: (
        x + jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), x.shape)
    ),
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ONE)
@ENGINE
def test_a_rule_is_the_vmap_of_the_function_of_one_element(run, name, axis):
    def fn(x, y):
        # Only the sum tells that the arguments are placed, and on which axis.
        outs = jax.vmap(ONE[name], axis, axis)(x, y)
        return [
            drjax.reduce_sum(jnp.moveaxis(out, axis, 0)) if out.ndim > axis else out
            for out in jax.tree.leaves(outs)
        ]

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(4, 3)).astype("float32") for _ in range(2))
    x, y = (np.stack([a * i for i in range(1, M + 1)], axis) for a in (x, y))
    if any(
        out.ndim <= axis for out in jax.tree.leaves(jax.vmap(ONE[name], axis)(x, y))
    ):
        axis = 0
        x, y = (np.moveaxis(a, np.shape(a).index(M), 0) for a in (x, y))
    fn = drjax.program(clients=M)(fn)
    plan = drjax.make_plan(fn)(x, y)
    assert plan.rounds == 1
    assert plan.at[plan.inputs[0]].axis == axis
    assert_close(run(plan, x, y), jax.jit(fn)(x, y))
