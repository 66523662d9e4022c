"""A round of local training communicates once, however many replicas there are."""

import dataclasses
import functools
import importlib.util
import math

import jax
import numpy as np
import optax
import pytest
from helpers import assert_close

from benchmarks import hlo, weak_scaling
from benchmarks.local_rounds import (
    ENCODED,
    Setting,
    arguments,
    compiled,
    make_mesh,
)
from benchmarks.weak_scaling import Cost, Row, cost, faults
from examples import transformer

CONFIG = transformer.Config(64, 2, 32, 4, 16, dtype="float32", remat=False)
TINY = Setting(CONFIG, steps=3, batch=2)
# Its arrays are larger than blocks.
NOT_SO_TINY = Setting(dataclasses.replace(CONFIG, width=128), steps=2, batch=1)
no_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'drjax[topologies]'",
)


QUICKLY = {"xla_backend_optimization_level": 0}  # Of code for the CPU, not of HLO.


@functools.cache
def on_cpu(program, hand):
    mesh = make_mesh(jax.devices()[:8], model=2)
    return mesh, compiled(program, TINY, mesh, hand=hand, options=QUICKLY)


def bytes_of_params(mesh):
    """On each device."""
    params = arguments(TINY, mesh)[1].params
    shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(params)]
    return 4 * sum(map(math.prod, shards))


def values(types):
    """Arrays of some types: learning rates, a state, and data."""
    rng = np.random.default_rng(0)

    def value(x):
        if x.dtype == "int32":
            data = rng.integers(50, size=x.shape, dtype="int32")
        else:
            data = np.float32(0.1 * rng.random(x.shape))
        return jax.device_put(data, x.sharding)

    return jax.tree.map(value, types)


def assert_no_more(ours, hand):
    """No more of anything, but for what a schedule adds to temporaries."""
    scale = {"temporaries": 1.02}
    for what, value in ours.totals().items():
        assert value <= hand.totals()[what] * scale.get(what, 1)
    for kind, (times, _) in ours.over_replicas.items():
        assert times <= hand.over_replicas[kind][0]


@pytest.mark.parametrize(
    "program", ["round", pytest.param("gradient", marks=pytest.mark.slow)]
)
def test_both_ways_to_write_a_program_compute_the_same(program):
    mesh, ours = on_cpu(program, hand=False)
    args = values(arguments(TINY, mesh))
    args = args[:3] if program == "round" else args
    _, hand = on_cpu(program, hand=True)
    assert_close(ours(*args), hand(*args))
    assert not [
        *faults([Row("cpu:8", 8, 4, program, cost(ours, mesh), cost(hand, mesh))])
    ]


def test_a_round_sums_its_parameters_and_loss_over_the_replicas_and_no_more():
    mesh, ours = on_cpu("round", hand=False)
    assert cost(ours, mesh).over_replicas == {
        "all-reduce": (1, bytes_of_params(mesh) + 4)
    }


def test_its_gradient_sums_over_the_replicas_three_times():
    """The round, what the loss after it gives back, and what the round gives back."""
    mesh, ours = on_cpu("gradient", hand=False)
    ((kind, (_, size)),) = cost(ours, mesh).over_replicas.items()
    assert kind == "all-reduce"
    params = bytes_of_params(mesh)
    assert 3 * params <= size < 3.01 * params


def test_all_else_is_within_replicas_and_in_each_local_step():
    mesh, ours = on_cpu("round", hand=False)
    found = hlo.collectives(ours.as_text())
    within = [c for c in found if c.axes(mesh.shape) == ("model",)]
    assert within
    assert all(c.times % TINY.steps == 0 for c in within)


#
# For TPUs.
#
@no_libtpu
def test_a_round_is_one_all_reduce_on_a_tpu_too():
    mesh = make_mesh(weak_scaling.topology("v5e:2x2"), model=2)
    found = cost(compiled("round", TINY, mesh, hand=False), mesh)
    assert found.over_replicas == {"all-reduce": (1, bytes_of_params(mesh) + 4)}
    assert {*found.within} == {"all-reduce"}


@no_libtpu
@pytest.mark.parametrize("program", ENCODED)
def test_encoded_rounds_send_fewer_bytes(program):
    mesh = make_mesh(weak_scaling.topology("v5e:4x4"), model=2)
    ours, hand = (
        cost(compiled(program, NOT_SO_TINY, mesh, hand=hand), mesh)
        for hand in (False, True)
    )
    assert not [*faults([Row("v5e:4x4", 16, 8, program, ours, hand)])]
    assert ours.within == hand.within


@pytest.mark.parametrize("program", ENCODED)
def test_encoded_rounds_are_near_those_that_are_not(program):
    mesh, plain = on_cpu("round", hand=True)
    args = values(arguments(TINY, mesh)[:3])
    state, loss = on_cpu(program, hand=False)[1](*args)
    want, want_loss = plain(*args)
    np.testing.assert_allclose(loss, want_loss, rtol=0.01)
    moved = jax.tree.map(np.subtract, want.params, args[1].params)
    off = jax.tree.map(np.subtract, state.params, want.params)
    assert 0 < optax.tree.norm(off) < 0.02 * optax.tree.norm(moved)


@no_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("program", ["round", "gradient"])
@pytest.mark.parametrize(
    "small, large",
    [("v5e:2x2", "v5e:16x16"), ("v5p:4x4x4", "v5p:16x16x24"), ("v4:4x4x4", "v4:8x8x8")],
)
def test_a_device_does_the_same_however_many_there_are(small, large, program):
    found = weak_scaling.rows([small, large], [program], TINY)
    few, many = (row for row in found if row)
    for row in (few, many):
        assert_no_more(row.ours, row.hand)
    for what, value in many.ours.totals().items():
        rel = (
            0.05 if what == "temporaries" else 0
        )  # Tiny ones, of which a page is much.
        assert value == pytest.approx(few.ours.totals()[what], rel=rel)
    assert many.ours.over_replicas == few.ours.over_replicas


def test_bars_are_those_of_the_benchmark():
    cost = Cost(1e9, 1000, {"all-reduce": (1, 400)}, {"all-reduce": (8, 90)}, 700)
    row = Row("v5e:2x2", 4, 2, "round", cost, cost)
    assert not [*faults([row, row._replace(topology="v5e:4x4")])]
    twice = cost._replace(over_replicas={"all-reduce": (2, 400)})
    gathers = cost._replace(over_replicas={"all-gather": (1, 400)})
    more = cost._replace(temporaries=1020)
    for worse in (twice, gathers):
        (one, *_) = faults([row._replace(ours=worse)])
        assert "not one all-reduce" in one
    (one,) = faults([row._replace(ours=more)])
    assert "temporaries are 1.02" in one
    (one,) = faults([row, row._replace(ours=more, hand=more)])
    assert "between 1000 and 1020" in one
    halved = row._replace(program="bfloat16 round", ours=cost._replace(sent=350))
    assert not [*faults([halved])]
    (one,) = faults([halved._replace(ours=cost._replace(sent=360))])
    assert "sends 0.51429 of float32" in one
    nothing = cost._replace(sent=0, over_replicas={})
    (one,) = faults([halved._replace(ours=nothing)])
    assert "not {'all-reduce'}, but {}" in one


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"pip install 'drjax\[topologies\]'"):
        weak_scaling.topology("v5e:2x2")
