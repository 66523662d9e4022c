"""The streaming engine on meshes: each device has chunks of its own elements."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, arrays_exchanged, assert_close, make_mesh
from test_sharding import put, spec

import drjax

N = 48
W = jax.random.normal(jax.random.key(0), (6, 8))
XS = jax.random.normal(jax.random.key(1), (N, 4, 6))


@drjax.program(clients=N)
def train(w, x):
    """The mean of what the clients learn, the largest loss, and all of them."""

    def of_client(w, x):
        loss, grad = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
        return w - 0.1 * grad, loss

    new, losses = drjax.map_fn(of_client, (drjax.broadcast(w), x))
    return drjax.reduce_mean(new), drjax.reduce_max(losses), losses


def after(w, x):
    new, largest, _ = train(w, x)
    return jnp.sum(new**2) + largest


FUNCTIONS = {
    "itself": train,
    "gradient": jax.grad(after),
    "in the placed argument": jax.grad(after, (0, 1)),
}
MESHES = {
    "clients": dict(clients=8),
    "clients and model": dict(clients=4, model=2),
    "one shard": dict(clients=1, model=2),
}


def steps(run):
    """What is compiled for chunks."""
    (engine,) = run._engines.values()
    for round_ in engine._rounds.values():
        for key, compiled in round_._compiled.items():
            if isinstance(key[0], int):
                yield round_, compiled


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["itself", pytest.param("gradient", marks=SLOW), "in the placed argument"]
)
@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 5, None])
@pytest.mark.parametrize(
    "axes", ["clients", "clients and model", pytest.param("one shard", marks=SLOW)]
)
@KINDS
def test_a_mesh_gives_the_result_and_chunks_do_not_communicate(kind, axes, size, name):
    """But over the model's axis."""
    fn = FUNCTIONS[name]
    mesh = make_mesh(kind, **MESHES[axes])
    want = jax.jit(fn)(W, XS)
    with jax.set_mesh(mesh):
        w = put(mesh, W, None, "model" if "model" in MESHES[axes] else None)
        x = put(mesh, XS, "clients")
        run = drjax.streaming(fn, size)
        got = run(w, x)
        assert_close(got, want)
        expected = jax.tree.map(spec, jax.jit(fn)(w, x))
    if name == "itself" and axes != "one shard":
        assert jax.tree.map(spec, got) == expected
    for round_, compiled in steps(run):
        kinds = {kind for kind, _ in arrays_exchanged(compiled)}
        assert kinds <= ({"all-reduce"} if "model" in MESHES[axes] else set())
        assert round_.devices == MESHES[axes]["clients"]


def test_devices_are_put_together_once():
    mesh = make_mesh(jax.sharding.AxisType.Auto, clients=8)
    run = drjax.streaming(train, 2)
    with jax.set_mesh(mesh):
        run(W, put(mesh, XS, "clients"))
        for round_, _ in steps(run):
            finish = round_._finish.lower([round_._start(0)]).compile()
            kinds = [kind for kind, _ in arrays_exchanged(finish)]
            assert kinds
            assert {*kinds} == {"all-reduce"}


@KINDS
@pytest.mark.parametrize("size", [2, None])
def test_each_device_reads_its_own_elements(kind, size):
    mesh = make_mesh(kind, clients=8)
    want = jax.jit(train)(W, XS)
    for x in (np.asarray(XS), drjax.Elements([*np.asarray(XS)])):
        with jax.set_mesh(mesh):
            assert_close(drjax.streaming(train, size)(W, x), want)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="in order only"):
        drjax.streaming(train, size)(W, drjax.Elements(iter(np.asarray(XS)), N))


def test_the_mesh_may_be_that_of_the_arguments():
    mesh = make_mesh(jax.sharding.AxisType.Auto, clients=8)
    run = drjax.streaming(train)
    new, _, losses = run(W, put(mesh, XS, "clients"))
    assert_close(new, jax.jit(train)(W, XS)[0])
    assert spec(losses) == ("clients",)
    assert "on each of 8 devices" in run.explain(W, put(mesh, XS, "clients"))
    assert "devices" not in run.explain(W, XS)


@pytest.mark.parametrize("installed", [True, False])
def test_a_device_that_is_not_the_first(installed):
    device = jax.devices()[3]
    context = jax.default_device(device) if installed else contextlib.nullcontext()
    with context:
        w, x = (jax.device_put(np.asarray(v), device) for v in (W, XS))
        outs = drjax.streaming(train, 5)(w, x)
    assert all(out.devices() == {device} for out in outs)
    assert_close(outs, jax.jit(train)(W, XS))


def test_a_placement_that_the_mesh_does_not_divide_is_an_error():
    mesh = make_mesh(jax.sharding.AxisType.Auto, clients=8)
    fn = drjax.program(clients=10)(drjax.reduce_sum)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="does not divide"):
        drjax.streaming(fn)(jnp.ones(10))
