"""What is sharded on which mesh, and which collectives a program compiles to."""

import contextlib
import itertools
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    AUTO,
    EXPLICIT,
    KINDS,
    arrays_exchanged,
    assert_close,
    every,
    gradient,
    make_mesh,
    of_floats,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import PROGRAMS, Program

import drjax

N, PODS, CLIENTS = 8, 2, 4
AXES = {
    "1d": dict(clients=8),
    "2d": dict(clients=4, model=2),
    "3d": dict(clients=2, data=2, model=2),
}


def put(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def spec(x):
    """The mesh axes over which each dimension is split, trailing Nones left out."""
    axes = [None if a == () else a for a in x.sharding.spec]
    while axes and axes[-1] is None:
        axes.pop()
    return tuple(axes)


def specs(tree):
    return [*map(spec, jax.tree.leaves(tree))]


#
# Collectives: kind and bytes of each, as compiled.
#
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def compile_and_run(fn, *args):
    """What a function returns, and the `(kind, bytes)` of every collective it needs."""
    compiled = jax.jit(fn).lower(*args).compile()
    found = [
        (kind, sum(BYTES[dtype] * size for dtype, size in arrays))
        for kind, arrays in arrays_exchanged(compiled)
    ]
    return compiled(*args), sorted(found)


def collectives(fn, *args):
    return compile_and_run(fn, *args)[1]


#
# Programs, each with drjax's operators, and by hand, with vmap, jnp and the mesh axis.
#
def by_hand(mesh):
    is_auto = AUTO in mesh.axis_types
    axis: Any = dict(spmd_axis_name="clients") if is_auto else {}

    def broadcast(x):
        placed = P("clients", *jax.typeof(x).sharding.spec)
        if not is_auto:
            shape = (N, *x.shape)
            return jnp.broadcast_to(x, shape, out_sharding=NamedSharding(mesh, placed))
        placed = NamedSharding(mesh, P("clients", *[P.UNCONSTRAINED] * x.ndim))
        x = jnp.broadcast_to(x, (N, *x.shape))
        return jax.lax.with_sharding_constraint(x, placed)

    return types.SimpleNamespace(
        broadcast=lambda tree: jax.tree.map(broadcast, tree),
        map_fn=lambda fn, args: jax.vmap(fn, **axis)(*args),
        reduce_mean=lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0), tree),
        reduce_weighted_mean=lambda tree, w: jax.tree.map(
            lambda x: jnp.sum(x * w[:, None, None], axis=0) / jnp.sum(w), tree
        ),
    )


def loss(params, x, y):
    w, v = params
    return jnp.mean((jnp.tanh(x @ w) @ v - y) ** 2)


def local_steps(params, x, y):
    def step(params, _):
        grads = jax.grad(loss)(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    new, _ = jax.lax.scan(step, params, None, length=3)
    return jax.tree.map(jnp.subtract, new, params)


def fedavg(ops, params, x, y):
    update = ops.map_fn(lambda x, y: local_steps(params, x, y), (x, y))
    return jax.tree.map(jnp.add, params, ops.reduce_mean(update))


def fedavg_sent(ops, params, x, y):
    update = ops.map_fn(local_steps, (ops.broadcast(params), x, y))
    return jax.tree.map(jnp.add, params, ops.reduce_mean(update))


def weighted(ops, params, x, y):
    update = ops.map_fn(lambda x, y: local_steps(params, x, y), (x, y))
    return ops.reduce_weighted_mean(update, jnp.sum(y**2, axis=(1, 2)))


def constrained(ops, params, x, y):
    def body(x, y):
        return jax.tree.map(inner_sharding, local_steps(params, x, y))

    return ops.reduce_mean(ops.map_fn(body, (x, y)))


def inner_sharding(w):
    """Splits the second axis of a matrix over the model axis."""
    if "model" not in jax.sharding.get_abstract_mesh().shape:
        return w
    if EXPLICIT in jax.sharding.get_abstract_mesh().axis_types:
        return jax.sharding.reshard(w, P(None, "model"))
    return jax.lax.with_sharding_constraint(w, P(None, "model"))


ROUNDS = [fedavg, fedavg_sent, weighted, constrained]
DERIVATIVES = {
    "value": lambda fn: fn,
    "jvp": lambda fn: lambda p, x, y: jax.jvp(lambda p: fn(p, x, y), (p,), (p,)),
    "gradient": lambda fn: jax.grad(squares(fn)),
    "gradient in data": lambda fn: jax.grad(squares(fn), 1),
    "hessian vector": lambda fn: (
        lambda p, x, y: jax.jvp(lambda p: jax.grad(squares(fn))(p, x, y), (p,), (p,))
    ),
}


def squares(fn):
    return lambda *args: sum(jnp.sum(x**2) for x in jax.tree.leaves(fn(*args)))


def assert_no_more(ours, hand):
    """No more collectives of any kind, and no more bytes.

    There are fewer in gradients: by hand, the cotangents of a value that the mapped
    function uses twice are summed over the clients twice.
    """
    for kind in {kind for kind, _ in ours + hand}:
        sizes, by_hand = ([b for k, b in cs if k == kind] for cs in (ours, hand))
        assert len(sizes) <= len(by_hand)
        assert sum(sizes) <= sum(by_hand)


def data():
    w, v, x, y = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(4, 6), (6, 2), (N, 16, 4), (N, 16, 2)])
    )
    return (w, v), x, y


def data_on(mesh, *, split_model):
    """Data over the clients; matrices whole, or their columns over the model axis."""
    (w, v), x, y = data()
    columns = (None, "model") if split_model and "model" in mesh.shape else ()
    params = put(mesh, w, *columns), put(mesh, v, *columns)
    return params, put(mesh, x, "clients"), put(mesh, y, "clients")


def tables():
    """Two-dimensional meshes, and more of them in the slow tests."""
    for axes, split_model, kind in [
        ("2d", True, AUTO),
        ("2d", False, EXPLICIT),
        ("2d", False, AUTO),
        ("2d", True, EXPLICIT),
        *itertools.product(("1d", "3d"), [False], (AUTO, EXPLICIT)),
    ]:
        for program, derivative in itertools.product(ROUNDS, DERIVATIVES):
            quick = axes == "2d" and split_model == (kind == AUTO)
            yield pytest.param(
                *(kind, axes, split_model, program, derivative),
                marks=[] if quick else pytest.mark.slow,
                id=f"{kind}-{axes}-{split_model}-{program.__name__}-{derivative}",
            )


@pytest.mark.parametrize("kind, axes, split_model, program, derivative", [*tables()])
def test_a_round_communicates_no_more_than_one_written_by_hand(
    kind, axes, split_model, program, derivative
):
    mesh = make_mesh(kind, **AXES[axes])
    transform = DERIVATIVES[derivative]
    run = transform(drjax.program(clients=N)(lambda *args: program(drjax, *args)))
    hand = transform(lambda *args: program(by_hand(mesh), *args))
    unsharded = jax.jit(run)(*data())
    with jax.set_mesh(mesh):
        args = data_on(mesh, split_model=split_model)
        got, ours = compile_and_run(run, *args)
        want, by_hand_too = compile_and_run(hand, *args)
    assert_close(got, unsharded)
    assert specs(got) == specs(want)
    assert_no_more(ours, by_hand_too)
    if not split_model and program is not constrained:
        assert {kind for kind, _ in ours} == {"all-reduce"}


@KINDS
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("program", [fedavg, fedavg_sent], ids=lambda fn: fn.__name__)
def test_a_round_is_one_all_reduce_and_its_gradient_one_more(program, axes, kind):
    mesh = make_mesh(kind, **AXES[axes])
    run = drjax.program(clients=N)(lambda *args: program(drjax, *args))
    with jax.set_mesh(mesh):
        args = data_on(mesh, split_model=False)
        tree = sum(4 * leaf.size for leaf in args[0])
        assert collectives(run, *args) == [("all-reduce", tree)]  # All leaves in one.
        of_gradient = collectives(jax.grad(squares(run)), *args)
        assert len(of_gradient) == 2
        assert of_gradient[-1] == ("all-reduce", tree)


#
# Inside a mapped function: what plain vmap can do, with the same collectives.
#
def matmul(w, x):
    return jnp.tanh(x @ w)


def constrained_matmul(w, x):
    return inner_sharding(matmul(w, x))


def over_all_axes(w, x):
    columns = P(None, "model")
    return jax.shard_map(matmul, in_specs=(columns, P()), out_specs=columns)(w, x)


def over_the_model_axis(w, x):
    columns = P(None, "model")
    return jax.shard_map(
        matmul, in_specs=(columns, P()), out_specs=columns, axis_names={"model"}
    )(w, x)


def with_a_collective(w, x):
    return jax.shard_map(
        lambda w, x: jax.lax.psum(jnp.sum(matmul(w, x)), "model"),
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
        axis_names={"model"},
    )(w, x)


LEAVES_AN_AXIS_ALONE = [over_the_model_axis, with_a_collective]
INNER_DERIVATIVES = {
    "value": lambda fn: fn,
    "gradient": lambda fn: jax.grad(squares(fn), (0, 1)),
    "hessian vector": lambda fn: (
        lambda w, x: jax.jvp(lambda w: jax.grad(squares(fn))(w, x), (w,), (w,))
    ),
}


@pytest.mark.parametrize("derivative", INNER_DERIVATIVES)
@pytest.mark.parametrize(
    "body",
    [matmul, constrained_matmul, over_all_axes, *LEAVES_AN_AXIS_ALONE],
    ids=lambda fn: fn.__name__,
)
@KINDS
def test_sharding_in_a_mapped_function_is_kept(kind, body, derivative):
    mesh = make_mesh(kind, **AXES["2d"])
    # With the axis's name, vmap fails at a shard_map that leaves that axis alone.
    named = kind == AUTO and body not in LEAVES_AN_AXIS_ALONE
    axis: Any = dict(spmd_axis_name="clients") if named else {}

    def hand(w, x):
        return jnp.sum(jax.vmap(lambda x: body(w, x), **axis)(x), axis=0)

    @drjax.program(clients=N)
    def program(w, x):
        return drjax.reduce_sum(drjax.map_fn(lambda x: body(w, x), x))

    transform = INNER_DERIVATIVES[derivative]
    w, x = (
        jax.random.normal(jax.random.key(i), s)
        for i, s in enumerate([(4, 6), (N, 3, 4)])
    )
    with jax.set_mesh(mesh):
        args = put(mesh, w, None, "model"), put(mesh, x, "clients")
        got, ours = compile_and_run(transform(program), *args)
        want, by_hand_too = compile_and_run(transform(hand), *args)
    assert_close(got, want)
    assert specs(got) == specs(want)
    # JAX 0.10 gathers at a shard_map under an explicit mesh, in plain vmap too.
    if kind == AUTO or jax.__version_info__ >= (0, 12):
        assert_no_more(ours, by_hand_too)
        assert "all-gather" not in dict(ours)


#
# Every program of the shared table, on a mesh.
#
# There, JAX asks for the sharding of a gather, and vmaps no searchsorted.
NOT_EXPLICIT = {"gather_closed_over", "searchsorted_in_a_body"}


def on_meshes():
    # Between devices sums of int8 are rounded again, see test_encodings.py.
    cases = [case for case in PROGRAMS if case.name != "encoded_as_int8"]
    for kind, case in itertools.product((AUTO, EXPLICIT), cases):
        if kind == EXPLICIT and case.name in NOT_EXPLICIT:
            continue
        yield pytest.param(kind, False, case, id=f"{kind}-value-{case}")
        if case.reverse:
            marks = pytest.mark.slow
            yield pytest.param(kind, True, case, marks=marks, id=f"{kind}-grad-{case}")


@pytest.mark.parametrize("kind, of_gradient, case", [*on_meshes()])
def test_a_program_on_a_mesh_computes_the_same(kind, of_gradient, case: Program):
    fn, xs = of_floats(case.run, case.args)
    fn = gradient(fn, every(xs)) if of_gradient else fn
    want = jax.jit(fn)(*xs)
    mesh = make_mesh(kind, clients=5, pods=1)
    with jax.set_mesh(mesh):
        if kind == EXPLICIT:
            xs = [put(mesh, x, *["clients"] * (jnp.shape(x)[:1] == (5,))) for x in xs]
        assert_close(jax.jit(fn)(*xs), want)


#
# What comes out placed is sharded over the placement, however the mesh is given.
#
OPERATORS = {
    "broadcast": lambda x, **mesh: drjax.broadcast(jnp.sum(x, 0), **mesh),
    "broadcast of a key": lambda x, **mesh: drjax.broadcast(jax.random.key(0), **mesh),
    "map_fn": lambda x, **mesh: drjax.map_fn(jnp.sin, x, **mesh),
    "map_fn of a constant": lambda x, **mesh: drjax.map_fn(lambda _: 1, x, **mesh),
    "map_fn of keys": lambda x, **mesh: drjax.map_fn(
        lambda key: (jax.random.normal(key, (3,)), jax.random.split(key)),
        jax.random.split(jax.random.key(0), N),
        **mesh,
    ),
    "map_fn of two": lambda x, **mesh: drjax.map_fn(
        jnp.add, (x, drjax.broadcast(1.0, **mesh)), **mesh
    ),
    "placement_index": lambda x, **mesh: drjax.placement_index(**mesh),
}
X = np.arange(16.0, dtype="float32").reshape(N, 2)


@contextlib.contextmanager
def legacy(mesh):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with mesh:
            yield


GIVEN = {
    "set_mesh": (jax.set_mesh, lambda mesh: {}),
    "mesh=": (lambda _: contextlib.nullcontext(), lambda mesh: dict(mesh=mesh)),
    "both": (jax.set_mesh, lambda mesh: dict(mesh=mesh)),
    "abstract": (jax.set_mesh, lambda mesh: dict(mesh=mesh.abstract_mesh)),
    "legacy": (legacy, lambda mesh: {}),
    "legacy and mesh=": (legacy, lambda mesh: dict(mesh=mesh)),
}


WAYS = [(AUTO, given) for given in GIVEN] + [
    (EXPLICIT, given) for given in ("set_mesh", "both", "abstract")
]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind, given", WAYS)
def test_placed_results_are_sharded_over_the_placement(kind, given, name):
    mesh = make_mesh(kind, **AXES["2d"])
    context, arguments = GIVEN[given]

    @drjax.program(clients=N)
    def run(x):
        return OPERATORS[name](x, **arguments(mesh))

    want = drjax.program(clients=N)(OPERATORS[name])(X)
    with context(mesh):
        for x in (X, put(mesh, X, "clients"), put(mesh, X, "model")):
            for how in [jax.jit] if given == "legacy" else [jax.jit, lambda fn: fn]:
                got = how(run)(x)
                assert {*specs(got)} == {("clients",)}
                for out, expected in zip(
                    *map(jax.tree.leaves, (got, want)), strict=True
                ):
                    if not jnp.issubdtype(out.dtype, jax.dtypes.extended):
                        assert_close(out, expected)


@pytest.mark.parametrize("how", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_installed_mesh_is_used_if_the_program_says_so(name, how):
    run = drjax.program(clients=N, use_abstract_mesh=False)(OPERATORS[name])
    for context in (jax.set_mesh, legacy):
        with context(make_mesh(AUTO, **AXES["1d"])):
            for out in jax.tree.leaves(how(run)(X)):
                assert "clients" not in spec_or_none(out)


def spec_or_none(x):
    return spec(x) if isinstance(x.sharding, NamedSharding) else ()


def test_two_unlike_meshes_are_an_error_eagerly():
    run = drjax.program(clients=N)(
        lambda x: drjax.broadcast(x, mesh=make_mesh(AUTO, **AXES["2d"]))
    )
    with jax.set_mesh(make_mesh(AUTO, **AXES["1d"])):
        assert spec(jax.jit(run)(1.0)) == ("clients",)
        with pytest.raises(ValueError, match=r"broadcast over 'clients'.* has others"):
            run(1.0)


def test_a_vmapped_program_keeps_the_axes_of_both():
    mesh = make_mesh(AUTO, model=2, clients=4)
    run = drjax.program(clients=N)(lambda x: drjax.map_fn(jnp.sin, x))
    with jax.set_mesh(mesh):
        xs = put(mesh, np.stack([X, X]), "model")
        out = jax.jit(jax.vmap(run, spmd_axis_name="model"))(xs)
        assert spec(out) == ("model", "clients")


#
# Several placements, each over its own axis.
#
@drjax.program(pods=PODS, clients=CLIENTS)
def nested(w, x):
    def pod(w, x):
        new = drjax.map_fn(
            lambda w, x: w - 0.1 * jax.grad(lambda w: jnp.sum(matmul(w, x) ** 2))(w),
            (drjax.broadcast(w, placement="clients"), x),
            placement="clients",
        )
        return drjax.reduce_mean(new, placement="clients"), new

    sent = drjax.broadcast(w, placement="pods")
    of_pods, of_clients = drjax.map_fn(pod, (sent, x), placement="pods")
    return drjax.reduce_max(of_pods, placement="pods"), of_clients


@pytest.mark.parametrize(
    "axes", [dict(pods=2, clients=4), dict(model=2, clients=2, pods=2)], ids=str
)
@KINDS
def test_nested_placements_are_sharded_over_their_own_axes(kind, axes):
    w = jax.random.normal(jax.random.key(0), (4, 6))
    x = jax.random.normal(jax.random.key(1), (PODS, CLIENTS, 3, 4))
    of_max = jax.grad(lambda w, x: jnp.sum(nested(w, x)[0] ** 2), (0, 1))
    want = jax.jit(nested)(w, x), jax.jit(of_max)(w, x)
    mesh = make_mesh(kind, **axes)
    with jax.set_mesh(mesh):
        args = put(mesh, w), put(mesh, x, "pods", "clients")
        got = jax.jit(nested)(*args), jax.jit(of_max)(*args)
        assert_close(got, want)
        assert spec(got[0][1]) == spec(got[1][1]) == ("pods", "clients")
        matrix = 4 * w.size
        # A mean over the clients within each pod, then a maximum over the pods.
        assert collectives(nested, *args) == [("all-reduce", matrix)] * 2
        assert {*dict(collectives(of_max, *args))} == {"all-reduce"}


def test_a_partly_manual_mesh_is_left_to_shard_map():
    mesh = make_mesh(AUTO, pods=2, clients=4)
    run = drjax.program(clients=CLIENTS)(
        lambda x: drjax.reduce_sum(drjax.map_fn(jnp.sin, x))
    )

    def shard(x):
        return jax.lax.psum(run(x), "pods")

    x = np.arange(8.0, dtype="float32")
    with jax.set_mesh(mesh):
        total = jax.shard_map(
            shard, in_specs=P("pods"), out_specs=P(), axis_names={"pods"}
        )
        assert_close(jax.jit(total)(x), np.sin(x).sum())
        assert_close(jax.jit(jax.grad(total))(x), np.cos(x))


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
@KINDS
def test_any_number_of_elements_in_a_shard_gives_the_same_gradient(kind, clients):
    mesh = make_mesh(kind, clients=clients)

    def body(w, x):
        return jax.nn.relu(x * w) + jnp.sin(x)

    def repeated(w, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: body(w, x), x)

    x = np.arange(8.0, dtype="float32") - 3
    for fn, w in ((body, 0.5), (repeated, put(mesh, jnp.float32(0.5)))):

        @drjax.program(clients=N)
        def run(w, x, fn=fn):  # The weight is closed over, and sent.
            sent = drjax.map_fn(fn, (drjax.broadcast(w), x))
            return drjax.reduce_sum(drjax.map_fn(lambda s, x: s * fn(w, x), (sent, x)))

        plain = jax.vmap(fn, (None, 0))
        want = jax.grad(lambda w, x, plain=plain: jnp.sum(plain(w, x) ** 2))(0.5, x)
        with jax.set_mesh(mesh):
            placed = put(mesh, x, "clients")
            assert_close(jax.jit(jax.grad(run))(w, placed), want)
            assert_close(jax.grad(run)(w, placed), want)


@pytest.mark.parametrize("axis", ["clients", "model"])
def test_a_program_without_the_installed_mesh_takes_sharded_arguments(axis):
    @drjax.program(clients=N, use_abstract_mesh=False)
    def run(x):
        return drjax.reduce_sum(drjax.map_fn(jnp.multiply, (x, drjax.broadcast(2.0))))

    mesh = make_mesh(EXPLICIT, **AXES["2d"])
    with jax.set_mesh(mesh):
        x = put(mesh, X[:, 0], axis)
        assert_close(jax.jit(run)(x), 2 * X[:, 0].sum())
        assert_close(jax.jit(jax.grad(run))(x), np.full(N, 2.0))


@KINDS
def test_in_a_shard_map_over_the_placement_a_given_mesh_says_nothing(kind):
    mesh = make_mesh(kind, clients=8)
    run = drjax.program(clients=2)(lambda x: drjax.map_fn(jnp.sin, x, mesh=mesh))
    x = np.arange(16.0, dtype="float32")
    with jax.set_mesh(mesh):
        over_all = jax.shard_map(run, in_specs=P("clients"), out_specs=P("clients"))
        assert_close(jax.jit(over_all)(put(mesh, x, "clients")), np.sin(x))
