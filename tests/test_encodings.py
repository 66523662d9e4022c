"""Sums of which what is sent is encoded: how far off, how biased, in how many bytes."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AUTO, KINDS, arrays_exchanged, assert_close, make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import drjax
from drjax.plan import MapReduce

N = 4
KEY = jax.random.key(0)
BLOCK = 16
INT8 = drjax.Int8(block_size=BLOCK)
BFLOAT16 = drjax.BFloat16()
# Of unlike magnitudes, with a last block that is not full.
VALUES = (
    jax.random.normal(jax.random.key(1), (N, 7, 5))
    * jnp.array([1, 9, 0.1, 3])[:, None, None]
)


def total(encoding, out_sharding=None, n=N):
    @drjax.program(clients=n)
    def of(x, key):
        options: Any = dict(encoding=encoding, out_sharding=out_sharding)
        return drjax.reduce_sum(x, key=key, **options)

    return of


def scales(x, block_size=BLOCK):
    """For each value of an array, a 127th of the largest in its block."""
    flat = np.abs(np.ravel(x))
    blocks = np.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)
    of_values = (blocks.max(1) / 127).repeat(block_size)[: len(flat)]
    return of_values.reshape(np.shape(x))


#
# What is rounded, and how.
#
def test_bfloat16_rounds_what_is_sent_to_the_nearest():
    rounded = np.float32(VALUES.astype(jnp.bfloat16))
    for run in (total(BFLOAT16), jax.jit(total(BFLOAT16))):
        assert_close(run(VALUES, None), rounded.sum(0))
    assert np.abs(rounded.sum(0) - VALUES.sum(0)).max() > 1e-3


def test_int8_is_off_by_less_than_a_scale_of_each_element():
    got = jax.vmap(total(INT8), (None, 0))(VALUES, jax.random.split(KEY, 50))
    bound = np.sum([scales(x) for x in VALUES], axis=0)
    error = np.abs(got - VALUES.sum(0))
    assert (error < 1.0001 * bound).all()
    assert error.max() > 0.3 * bound.max()


def is_mean_of(samples, want):
    """Whether samples have this mean, to 6 of its standard deviations."""
    deviation = np.std(samples, 0) / math.sqrt(len(samples))
    error = np.abs(np.mean(samples, 0) - want)
    return (error < 6 * deviation + 1e-5).all()


def test_int8_is_unbiased():
    got = jax.jit(jax.vmap(total(INT8), (None, 0)))(
        VALUES, jax.random.split(KEY, 10_000)
    )
    assert is_mean_of(got, VALUES.sum(0))


def test_elements_and_arrays_are_rounded_apart():
    """With the same noise for all, four equal values would be off by four as much."""
    same = jnp.full((N, 1000), 0.3).at[:, 0].set(1)
    tree = {"a": same, "b": same}
    got = jax.jit(total(drjax.Int8(1000)))(tree, KEY)
    off = {name: (np.asarray(x) - 1.2)[1:] * 127 for name, x in got.items()}
    # 0.3 * 127 is 38.1: one up in ten times, so a variance of 0.09.
    for x in off.values():
        assert 0.8 < np.var(x) / (N * 0.09) < 1.2
    assert abs(np.corrcoef(off["a"], off["b"])[0, 1]) < 0.2


@pytest.mark.parametrize("block_size", [1, 3, 5, 16, 100])
def test_multiples_of_the_scale_stay_as_they_are(block_size):
    x = np.random.default_rng(0).integers(-127, 128, (N, 20)).astype(np.float32)
    x[:, ::block_size] = 127
    assert_close(total(drjax.Int8(block_size))(x, KEY), x.sum(0))


def test_zeros_and_nothing():
    zeros = {
        "some": jnp.zeros((N, 3)),
        "none": jnp.zeros((N, 0)),
        "number": jnp.zeros(N),
    }
    assert_close(total(INT8)(zeros, KEY), jax.tree.map(lambda x: x[0], zeros))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    x = jnp.ones((N, 2 * BLOCK)).at[1, 3].set(bad)
    got = total(INT8)(x, KEY)
    assert np.isnan(got[:BLOCK]).all()
    assert_close(got[BLOCK:], jnp.full(BLOCK, float(N)))
    assert not np.isfinite(total(BFLOAT16)(x, KEY)[3])


def test_integers_are_summed_as_they_are():
    x = {"count": jnp.full(N, 1001), "x": VALUES}
    assert_close(total(INT8)(x, KEY)["count"], 4004)
    mean = drjax.program(clients=N)(
        lambda x: drjax.reduce_mean(x, encoding=INT8, key=KEY)
    )
    assert_close(mean(x)["count"], 1001.0)


@pytest.mark.parametrize("encoding", [BFLOAT16, INT8], ids=str)
def test_weighted_means_encode_what_is_floats_with_its_weights(encoding):
    def mean(x, w, encoding=encoding):
        options: Any = dict(encoding=encoding, key=KEY)
        return drjax.reduce_weighted_mean(x, w, **options)

    mean = drjax.program(clients=N)(mean)
    # Complex numbers are summed as they are, be it that the weights make them so.
    w = jnp.array([1 + 1j, 2, -1j, 3])
    assert_close(mean(VALUES, w), jnp.average(VALUES, axis=0, weights=w))
    plan = drjax.make_plan(mean)(jnp.ones((N, BLOCK), int), jnp.ones(N))
    assert plan.communication("clients")[1] == 4 + encoding.bytes(BLOCK)


def test_int8_needs_no_promotion_of_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        strict = total(INT8)(VALUES, KEY)
    assert_close(strict, total(INT8)(VALUES, KEY))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_keep_their_type(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(VALUES, dtype)
        for encoding in (INT8, BFLOAT16):
            got = total(encoding)(x, KEY)
            assert got.dtype == dtype
            bound = sum(map(scales, VALUES)) + 0.1 * np.abs(VALUES).sum(0)
            assert (np.abs(np.float32(got) - VALUES.sum(0)) < bound).all()


def test_means_are_of_the_same_sums():
    """That of weights is of weighted values, and the weights are as they are."""
    weights = jnp.array([1.0, 2.0, 0.5, 0.25])

    @drjax.program(clients=N)
    def means(x, key):
        options: Any = dict(encoding=INT8, key=key)
        weighted = drjax.reduce_weighted_mean(x, weights, **options)
        return drjax.reduce_mean(x, **options), weighted

    mean, weighted = means(VALUES, KEY)
    assert_close(mean, total(INT8)(VALUES, KEY) / N)
    of_weighted = total(INT8)(weights[:, None, None] * VALUES, KEY)
    assert_close(weighted, of_weighted / weights.sum())


def test_gaps_in_a_tree_stay():
    tree = {"gap": None, "x": VALUES[:, :4, :4]}
    for encoding in None, INT8:
        for spec in None, P():
            for axes in dict(clients=1), dict(clients=4):
                with jax.set_mesh(make_mesh(AUTO, **axes)):
                    got = total(encoding, spec)(tree, KEY)
                assert got["gap"] is None
                assert got["x"].shape == (4, 4)


def test_sums_of_half_floats_are_rounded_last():
    x = VALUES.astype(jnp.bfloat16)
    want = total(INT8)(x.astype(jnp.float32), KEY).astype(jnp.bfloat16)
    assert (total(INT8)(x, KEY) == want).all()


def test_random_numbers_are_drawn_once_for_all_arrays():
    """XLA takes long to compile a draw."""

    def draws(leaves):
        tree = [jnp.ones((N, 3 + i)) for i in range(leaves)]
        text = jax.jit(total(INT8)).lower(tree, KEY).as_text()
        return len(re.findall("call @.*(?:threefry|random_bits|uniform)", text))

    assert 0 < draws(1) == draws(9)


def test_no_cache_outlives_its_settings():
    """Of legacy keys, and of x64."""
    raw = jnp.arange(4, dtype="uint32")
    found = []
    for impl in "rbg", "unsafe_rbg":
        with jax.default_prng_impl(impl):
            got = total(INT8)(VALUES, raw)
            typed = jax.random.wrap_key_data(raw, impl=impl)
            assert_close(got, total(INT8)(VALUES, typed))
            found.append(got)
    assert_close(
        found[0], total(INT8)(VALUES, jax.random.wrap_key_data(raw, impl="rbg"))
    )
    with jax.enable_x64(True):
        assert_close(total(INT8)(VALUES, KEY), jax.jit(total(INT8))(VALUES, KEY))
        wide = total(INT8)(VALUES, KEY)
    assert_close(total(INT8)(VALUES, KEY), wide)


#
# Derivatives, transformations, plans.
#
@pytest.mark.parametrize("encoding", [INT8, BFLOAT16], ids=str)
def test_derivatives_are_those_of_the_exact_sum(encoding):
    def of(encoding):
        linear = jax.vjp(lambda x: total(encoding)(x, KEY), VALUES)[1]
        along = jnp.cos(VALUES)
        tangent = jax.jvp(lambda x: total(encoding)(x, KEY), (VALUES,), (along,))[1]
        return linear(jnp.sin(VALUES[0])), tangent

    assert_close(of(encoding), of(None))


def test_a_vmap_over_keys_is_a_loop_over_keys():
    keys = jax.random.split(KEY, 3)
    got = jax.vmap(total(INT8), (None, 0))(VALUES, keys)
    assert_close(got, jnp.stack([total(INT8)(VALUES, key) for key in keys]))


@pytest.mark.parametrize(
    "encoding, of_size",
    [
        (None, lambda size: 4 * size),
        (BFLOAT16, lambda size: 2 * size),
        (INT8, lambda size: size + 4 * math.ceil(size / BLOCK)),
    ],
    ids=["floats", "bfloat16", "int8"],
)
def test_a_plan_knows_the_bytes(encoding, of_size):
    tree = {"a": VALUES, "b": VALUES[:, 0]}
    plan = drjax.make_plan(total(encoding))(tree, KEY)
    (stage,) = [stage for stage in plan.stages if isinstance(stage, MapReduce)]
    assert len(stage.reductions) == 2
    _, up = plan.communication("clients")
    assert up == of_size(35) + of_size(5)
    assert plan.size_free == {"clients"}
    # Of several models at once, as for several seeds, each has blocks of its own.
    batched = drjax.make_plan(jax.vmap(total(encoding), (0, None)))
    plan = batched(jax.tree.map(lambda x: jnp.stack([x] * 3), tree), KEY)
    _, up = plan.communication("clients")
    assert up == 3 * (of_size(35) + of_size(5))


def test_a_gradient_sends_what_it_sends_without():
    def loss(encoding):
        return lambda x: jnp.sum(total(encoding)(x, KEY) ** 2)

    plans = [drjax.make_plan(jax.grad(loss(e)))(VALUES) for e in (None, INT8)]
    assert plans[0].rounds == plans[1].rounds


#
# Over a mesh.
#
MESH = dict(clients=4, model=2)
TREE = {
    "matrix": jax.random.normal(jax.random.key(2), (N, 24, 16)),
    "bias": jax.random.normal(jax.random.key(3), (N, 96)) * 100,
}
WHOLE = {"matrix": P(None, "model"), "bias": P()}
SCATTERED = {"matrix": P("clients", "model"), "bias": P(("model", "clients"))}
LATER = {"matrix": P("model", "clients"), "bias": P("clients")}
CLIENTS_FIRST = {"matrix": P(("clients", "model")), "bias": P(("clients", "model"))}


def on_mesh(kind, specs, encoding, tree=TREE, n=N, axes=MESH):
    """The sum over a mesh, of a tree that is sharded as the sum is over `model`."""
    mesh = make_mesh(kind, **axes)

    def put(x, spec):
        rest = ["model" if "model" in (axes or ()) else None for axes in spec]
        return jax.device_put(x, NamedSharding(mesh, P("clients", *rest)))

    with jax.set_mesh(mesh):
        placed = {name: put(x, specs[name]) for name, x in tree.items()}
        run = jax.jit(total(encoding, specs, n))
        compiled = run.lower(placed, KEY).compile()
        return lambda key: compiled(placed, key), compiled


def bound_on_mesh(x):
    """Each element's scale where arrays are not cut, and one of the sum's."""
    rows = np.abs(x).reshape(len(x), -1)
    return (rows.max(1).sum() + np.abs(rows.sum(0)).max() + rows.max()) / 127


@KINDS
@pytest.mark.parametrize(
    "specs",
    [WHOLE, SCATTERED, LATER, CLIENTS_FIRST],
    ids=["whole", "scattered", "later", "clients first"],
)
@pytest.mark.parametrize("encoding", [None, BFLOAT16, INT8], ids=str)
def test_sums_over_a_mesh_are_near_and_where_they_are_to_be(kind, specs, encoding):
    run, _ = on_mesh(kind, specs, encoding)
    got = run(KEY)
    for name, x in got.items():
        want = TREE[name].sum(0)
        assert (np.abs(x - want) < 1.01 * bound_on_mesh(TREE[name])).all()
        assert x.sharding.is_equivalent_to(
            NamedSharding(x.sharding.mesh, specs[name]), x.ndim
        )
        # All devices agree on what they have of it.
        parts: dict = {}
        for shard in x.addressable_shards:
            part = parts.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(part, shard.data)


@KINDS
@pytest.mark.parametrize("n", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_int8_over_a_mesh_is_unbiased(kind, n):
    tree = {"matrix": jnp.concatenate([TREE["matrix"]] * (n // N))}
    run, _ = on_mesh(kind, {"matrix": P(None, "model")}, INT8, tree, n)
    got = [np.asarray(run(key)["matrix"]) for key in jax.random.split(KEY, 300)]
    assert is_mean_of(got, tree["matrix"].sum(0))


@KINDS
def test_devices_with_unlike_parts_round_apart(kind):
    """Else the errors of a model that is sharded would add up."""
    x = jnp.full((N, 2, 1000), 0.3).at[:, :, 0].set(1)
    run, _ = on_mesh(kind, {"x": P("model")}, drjax.Int8(1000), {"x": x})
    errors = run(KEY)["x"][:, 1:] - 1.2
    assert abs(np.corrcoef(errors)[0, 1]) < 0.2


@KINDS
def test_meshes_may_change(kind):
    """What was traced under one is not used under another."""
    run = jax.vmap(total(INT8, P()), (None, 0))
    keys = jax.random.split(KEY, 3)
    want = run(VALUES, keys)
    for axes in (
        MESH,
        dict(clients=2, data=4),
        dict(clients=1, model=8),
        dict(clients=4),
    ):
        mesh = make_mesh(kind, **axes)
        with jax.set_mesh(mesh):
            x = jax.device_put(VALUES, NamedSharding(mesh, P("clients")))
            assert_close(
                jax.jit(run)(x, jax.device_put(keys, NamedSharding(mesh, P()))), want
            )


@pytest.mark.parametrize("encoding", [BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("spec", [P(), P("clients")])
def test_a_given_mesh_is_used_though_nothing_is_on_it(encoding, spec):
    mesh = make_mesh(AUTO, clients=4)
    x = TREE["matrix"]

    @drjax.program(clients=N)
    def run(x):
        options: Any = dict(encoding=encoding, key=KEY, out_sharding=spec)
        return drjax.reduce_sum(x, mesh=mesh, **options)

    for got in run(x), jax.jit(run)(x):
        assert (np.abs(got - x.sum(0)) < 1.01 * bound_on_mesh(x)).all()
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@KINDS
@pytest.mark.parametrize("encoding", [None, BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize(
    "axes", [MESH, pytest.param(dict(clients=1, model=8), marks=pytest.mark.slow)]
)
def test_results_and_tangents_are_sharded_as_is_said(kind, encoding, axes):
    for spec in P(), P("model"), P("clients", "model"):
        mesh = make_mesh(kind, **axes)
        wanted = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            x = jax.device_put(
                TREE["matrix"], NamedSharding(mesh, P("clients", None, "model"))
            )

            def run(x, spec=spec):
                return total(encoding, spec)(x, KEY)

            outs = jax.jit(lambda x, run=run: jax.jvp(run, (x,), (x,)))(x)
            for out in outs:
                assert out.sharding.is_equivalent_to(wanted, 2)
            assert_close(outs[1], TREE["matrix"].sum(0))

            # Types have to fit for that.
            def loss(x, run=run):
                carry = run(x)
                carry, _ = jax.lax.scan(
                    lambda c, _: (c + run(x), None), carry, length=2
                )
                return jnp.sum(carry)

            assert_close(jax.jit(jax.grad(loss))(x), jnp.full_like(x, 3.0))


def test_a_mesh_without_the_placement_shards_results_too():
    mesh = make_mesh(AUTO, model=8)
    with jax.set_mesh(mesh):
        for encoding in None, BFLOAT16, INT8:
            got = jax.jit(total(encoding, P("model")))(TREE["matrix"], KEY)
            assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("model")), 2)


@KINDS
@pytest.mark.parametrize("encoding", [BFLOAT16, INT8], ids=str)
def test_in_a_mapped_function_elements_are_rounded_just_so(kind, encoding):
    x = jax.random.normal(jax.random.key(4), (2, 4, 16))
    keys = jax.random.split(KEY, 2)

    @drjax.program(placements={"pods": 2, "clients": 4})
    def run(x, keys):
        def of_pod(x, key):
            options: Any = dict(encoding=encoding, key=key)
            return drjax.reduce_sum(x, placement="clients", **options)

        return drjax.map_fn(of_pod, (x, keys), placement="pods")

    want = jnp.stack([total(encoding)(x[i], keys[i]) for i in range(2)])
    assert_close(run(x, keys), want)
    mesh = make_mesh(kind, pods=2, clients=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("pods", "clients")))
        assert_close(jax.jit(run)(placed, keys), want)


@pytest.mark.parametrize("encoding", [BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("own_keys", [False, True])
def test_in_a_shard_map_each_has_the_sum_of_its_own(encoding, own_keys):
    mesh = make_mesh(AUTO, pods=8)
    x = jax.random.normal(jax.random.key(4), (8, N, 2 * BLOCK))

    def keys_of(i):
        return jax.random.fold_in(KEY, i) if own_keys else KEY

    def of_pod(x):
        return total(encoding)(x[0], keys_of(jax.lax.axis_index("pods")))[None]

    run = jax.shard_map(of_pod, mesh=mesh, in_specs=P("pods"), out_specs=P("pods"))
    want = jnp.stack([total(encoding)(x[i], keys_of(i)) for i in range(8)])
    assert_close(jax.jit(run)(x), want)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(run(x) ** 2)))(x)
    assert_close(slope, jnp.broadcast_to(2 * want[:, None], x.shape))


@pytest.mark.parametrize("encoding", [None, BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("spec", [None, P(), P("model"), P("clients")])
def test_in_a_shard_map_over_another_axis_the_sum_is_that_without(encoding, spec):
    mesh = make_mesh(AUTO, clients=2, model=2, data=2)
    x = jax.random.normal(jax.random.key(4), (2, N, 2 * BLOCK))
    run = jax.shard_map(
        lambda x: total(encoding, spec)(x[0], KEY)[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        got = jax.jit(run)(x)
    assert_close(got, jnp.stack([total(encoding)(x[i], KEY) for i in range(2)]))


def collectives(compiled):
    """The kind of each, and its type and size, array by array."""
    return [
        (kind, *array)
        for kind, arrays in arrays_exchanged(compiled)
        for array in arrays
    ]


@KINDS
def test_int8_is_exchanged_and_nothing_placed_is_gathered(kind):
    """What goes over the mesh are int8 of the sum's size, and scales."""
    for specs, kinds, size in (
        (WHOLE, {"all-to-all", "all-gather"}, 24 * 16 // 2 + 96),
        (SCATTERED, {"all-to-all"}, (24 * 16 + 96) // 2),
    ):
        _, compiled = on_mesh(kind, specs, INT8)
        found = collectives(compiled)
        assert {kind for kind, *_ in found} == kinds
        for kind_of in kinds:
            numbers = sum(s for k, dtype, s in found if (k, dtype) == (kind_of, "s8"))
            others = sum(s for k, dtype, s in found if k == kind_of and dtype != "s8")
            # Each part that a device gets has a last block that is not full.
            assert size <= numbers < size + 2 * N * BLOCK
            assert others == numbers / BLOCK


@KINDS
@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("spec", [P(), P("clients")])
def test_what_is_little_is_sent_as_floats_and_rounded_just_so(kind, n, spec):
    x = {str(i): jax.random.normal(jax.random.key(i), (n, 4)) for i in range(20)}
    mesh = make_mesh(kind, clients=4, model=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("clients")))
        compiled = jax.jit(total(INT8, spec, n)).lower(placed, KEY).compile()
    assert_close(compiled(placed, KEY), total(INT8, n=n)(x, KEY))
    assert {dtype for _, dtype, _ in collectives(compiled)} == {"f32"}


@KINDS
def test_little_beside_much_is_sent_as_floats(kind):
    """That is cut apart, and drawn apart."""
    little, much = P("clients"), P("clients", "model")
    tree = {"little": TREE["bias"][:, :8], "much": TREE["matrix"]}
    run, compiled = on_mesh(kind, {"little": little, "much": much}, INT8, tree)
    got = run(KEY)
    for name, x in tree.items():
        assert (np.abs(got[name] - x.sum(0)) < bound_on_mesh(x)).all()
    numbers = sum(s for _, dtype, s in collectives(compiled) if dtype == "s8")
    assert numbers == 24 * 16 // 2  # Its parts are of three blocks each.


@KINDS
def test_bfloat16_that_is_to_be_sharded_is_sent_once(kind):
    _, compiled = on_mesh(kind, {"matrix": P(None, "clients")}, BFLOAT16, TREE_OF_ONE)
    found = collectives(compiled)
    assert {kind for kind, *_ in found} == {"all-to-all"}
    assert sum(size for _, _, size in found) == 24 * 16
    # XLA for CPUs sends it as float32, but was given bfloat16.
    mesh = make_mesh(kind, **MESH)
    placed = jax.device_put(TREE["matrix"], NamedSharding(mesh, P("clients")))
    with jax.set_mesh(mesh):
        run = jax.jit(total(BFLOAT16, P(None, "clients")))
        text = run.lower(placed, KEY).as_text()
    (types,) = re.findall(r"stablehlo\.all_to_all.*: \(tensor<(.*?)>\)", text)
    assert types.endswith("xbf16")


TREE_OF_ONE = {"matrix": TREE["matrix"]}


def test_within_pods_first_and_then_across():
    """The sum in a pod is exact, and what goes between pods is int8."""
    mesh = make_mesh(AUTO, pods=2, clients=4)
    x = jax.random.normal(jax.random.key(4), (2, 4, 64))

    @drjax.program(placements={"pods": 2, "clients": 4})
    def run(x, key):
        def of_pod(x):
            return drjax.reduce_sum(x, placement="clients")

        sums = drjax.map_fn(of_pod, x, placement="pods")
        options: Any = dict(encoding=INT8, key=key, out_sharding=P())
        return drjax.reduce_sum(sums, placement="pods", **options)

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("pods", "clients")))
        compiled = jax.jit(run).lower(placed, KEY).compile()
        got = compiled(placed, KEY)
    assert np.abs(got - x.sum((0, 1))).max() < 1.01 * bound_on_mesh(x.sum(1))
    found = collectives(compiled)
    assert [s for k, dtype, s in found if k == "all-reduce"] == [64]
    assert {dtype for k, dtype, s in found if k == "all-to-all"} == {"s8", "f32"}


#
# Wrong use.
#
@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(encoding="int8"), TypeError, "BFloat16 or drjax.Int8, but got 'int8'"),
        (dict(encoding=INT8), ValueError, "needs a key"),
        (dict(encoding=INT8, key=jax.random.split(KEY, N)), TypeError, "one key"),
        (dict(encoding=INT8, key=jnp.float32(1)), TypeError, "one key"),
        (dict(encoding=INT8, key=np.zeros(3, np.uint32)), TypeError, "one key"),
        (dict(encoding=INT8, key="key"), TypeError, "one key"),
        (dict(out_sharding="model"), TypeError, "PartitionSpec"),
        (dict(out_sharding=[P(), P()]), ValueError, "prefix"),
    ],
)
@pytest.mark.parametrize("name", ["reduce_sum", "reduce_mean", "reduce_weighted_mean"])
def test_wrong_options_are_errors(name, options, error, message):
    weights = [jnp.ones(N)] * (name == "reduce_weighted_mean")
    run = drjax.program(clients=N)(
        lambda x: getattr(drjax, name)(x, *weights, **options)
    )
    with pytest.raises(error, match=rf"^drjax\.{name} over 'clients': .*{message}"):
        run(VALUES)


def test_int8_has_to_know_how_a_mesh_cuts_arrays():
    with (
        jax.set_mesh(make_mesh(AUTO, **MESH)),
        pytest.raises(ValueError, match=r"'model': 2.*out_sharding"),
    ):
        jax.jit(total(INT8))(TREE, KEY)


def test_of_what_is_not_cut_it_need_not_know():
    x = {"count": jnp.ones((N, 4), int), "x": jnp.ones((N, 8))}
    run = total(INT8, {"count": None, "x": P()})
    with jax.set_mesh(make_mesh(AUTO, **MESH)):
        assert_close(jax.jit(run)(x, KEY)["count"], jnp.full(4, N))


@pytest.mark.parametrize("encoding", [None, BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("spec", [P(P.UNCONSTRAINED), P("clients", P.UNCONSTRAINED)])
def test_some_of_a_sharding_may_be_left_to_xla(spec, encoding):
    with jax.set_mesh(jax.make_mesh((4,), ("clients",), axis_types=(AUTO,))):
        got = jax.jit(total(encoding, spec))(TREE["matrix"], KEY)
    assert np.abs(got - TREE["matrix"].sum(0)).max() < 0.2


@pytest.mark.parametrize("encoding", [None, BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize(
    "spec", [P("nowhere"), P("model"), P(*[None] * 4), P(None, *["clients"] * 2)]
)
def test_a_sharding_has_to_fit(spec, encoding):
    """7 rows over 2 devices do not."""
    with (
        jax.set_mesh(make_mesh(AUTO, **MESH)),
        pytest.raises(
            ValueError, match=r"^drjax\.reduce_sum .*`out_sharding`.*\(7, 5\)"
        ),
    ):
        jax.jit(total(encoding, spec))(VALUES, KEY)


def test_a_block_has_a_value_at_least():
    with pytest.raises(ValueError, match=r"^drjax\.Int8: .*got 0"):
        drjax.Int8(0)
    assert hash(drjax.Int8(np.array(16))) == hash(INT8)  # pyright: ignore
    for wrong in "16", 16.0:
        with pytest.raises(TypeError):
            drjax.Int8(wrong)  # pyright: ignore[reportArgumentType]
