"""Training with local steps: how the ways to do it relate; and a transformer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import diloco, transformer

LAYERS, WIDTH, REPLICAS = 4, 3, 4
INNER = optax.adamw(0.02)
OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)


def loss(params, examples):
    x, y = examples[..., :-1], examples[..., -1]
    for layer in params["blocks"]["w"]:
        x = x + jnp.tanh(x @ layer)
    return jnp.mean((x @ params["out"] - y) ** 2)


@pytest.fixture
def params():
    blocks, out = jax.random.split(jax.random.key(0))
    w = 0.3 * jax.random.normal(blocks, (LAYERS, WIDTH, WIDTH))
    return {"blocks": {"w": w}, "out": jax.random.normal(out, (WIDTH,))}


def examples(steps, rounds=3):
    shape = rounds, REPLICAS, steps, 5, WIDTH + 1
    return jax.random.normal(jax.random.key(1), shape)


def trained(algorithm, params, rounds):
    """The state after rounds, and the losses."""
    run, state, losses = jax.jit(algorithm.round), algorithm.init(params), []
    for i, x in enumerate(rounds):
        sizes = algorithm.placements.values()
        key = jax.random.key(i)
        state, found = run(state, x.reshape(*sizes, *x.shape[1:]), key)
        losses.append(found.reshape(REPLICAS))
    return state, jnp.stack(losses)


def assert_close(a, b, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6} | tolerance
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


#
# One way is another.
#
def test_streaming_of_one_fragment_without_delay_is_diloco(params):
    rounds = examples(steps=6)
    plain = diloco.diloco(loss, INNER, OUTER, replicas=REPLICAS)
    whole = diloco.streaming(
        loss, INNER, OUTER, replicas=REPLICAS, fragments=1, delay=0, mixing=0.0
    )
    (want, losses), (got, got_losses) = (
        trained(x, params, rounds) for x in (plain, whole)
    )
    assert_close(got.params, want.params)
    assert_close(got.outer, [want.outer])
    assert_close(got.replicas.inner, want.replicas)
    assert_close(got_losses, losses)


def test_diloco_of_one_step_of_sgd_is_data_parallel(params):
    rounds = examples(steps=1, rounds=6)
    sgd = optax.sgd(0.1)
    local = diloco.diloco(loss, sgd, optax.sgd(1.0), replicas=REPLICAS)
    synchronous = diloco.data_parallel(loss, sgd, replicas=REPLICAS)
    want, losses = trained(synchronous, params, rounds)
    got, got_losses = trained(local, params, rounds)
    assert_close(got.params, want.params)
    assert_close(got_losses, losses)


def test_data_parallel_is_training_on_all_examples(params):
    (x,) = examples(steps=6, rounds=1)
    synchronous = diloco.data_parallel(loss, INNER, replicas=REPLICAS)
    got, _ = trained(synchronous, params, [x])
    together = jnp.moveaxis(x, 0, 1).reshape(6, -1, WIDTH + 1)
    want, _, _ = diloco.train(loss, INNER, params, INNER.init(params), together)
    assert_close(got.params, want)


@pytest.mark.parametrize("pods", [1, 2, 4])
def test_pods_that_meet_whenever_they_average_are_diloco(params, pods):
    rounds = examples(steps=6)
    plain = diloco.diloco(loss, INNER, OUTER, replicas=REPLICAS)
    each = REPLICAS // pods
    nested = diloco.nested(loss, INNER, OUTER, pods=pods, replicas=each, pod_steps=6)
    want, losses = trained(plain, params, rounds)
    got, got_losses = trained(nested, params, rounds)
    assert_close(got.params, want.params)
    assert_close(got_losses, losses)


def test_pods_of_one_replica_are_diloco(params):
    rounds = examples(steps=6)
    plain = diloco.diloco(loss, INNER, OUTER, replicas=REPLICAS)
    nested = diloco.nested(loss, INNER, OUTER, pods=REPLICAS, replicas=1, pod_steps=2)
    want, _ = trained(plain, params, rounds)
    got, _ = trained(nested, params, rounds)
    assert_close(got.params, want.params)


def test_a_pod_averages_between_the_rounds(params):
    """Two averages in a round of one pod are two rounds of plain averaging."""
    rounds = examples(steps=6)
    average = optax.sgd(1.0)
    nested = diloco.nested(loss, INNER, average, pods=1, replicas=REPLICAS, pod_steps=3)
    plain = diloco.diloco(loss, INNER, average, replicas=REPLICAS)
    halves = rounds.reshape(3, REPLICAS, 2, 3, 5, -1).swapaxes(1, 2)
    got, _ = trained(nested, params, rounds)
    want, _ = trained(plain, params, halves.reshape(6, REPLICAS, 3, 5, -1))
    assert_close(got.params, want.params)


def test_replicas_that_keep_all_of_their_own_train_alone(params):
    rounds = examples(steps=6)
    deaf = diloco.streaming(
        loss, INNER, OUTER, replicas=REPLICAS, fragments=2, delay=1, mixing=1.0
    )
    state, _ = trained(deaf, params, rounds)
    alone = jax.jit(functools.partial(diloco.train, loss, INNER))
    for i in range(REPLICAS):
        own = rounds[:, i].reshape(-1, 5, WIDTH + 1)
        want, _, _ = alone(params, INNER.init(params), own)
        assert_close(jax.tree.map(lambda x, i=i: x[i], state.replicas.params), want)


#
# Streaming, as the paper writes it: step by step.
#
def streaming_by(fragments, delay, mixing=0.5):
    how: Any = dict(fragments=fragments, delay=delay, mixing=mixing)
    return diloco.streaming(loss, INNER, OUTER, replicas=REPLICAS, **how)


@pytest.mark.parametrize("fragments, delay", [(1, 0), (1, 6), (2, 1), (2, 3), (3, 2)])
def test_streaming_is_what_the_paper_says(params, fragments, delay):
    mixing, steps, rounds = 0.3, 6, examples(steps=6)
    streaming = streaming_by(fragments, delay, mixing)
    got, _ = trained(streaming, params, rounds)

    take, put = (
        functools.partial(fn, count=fragments)
        for fn in (diloco.fragment, diloco.with_fragment)
    )
    step = jax.jit(functools.partial(diloco.train, loss, INNER))
    server = params
    outer = [OUTER.init(take(params, i)) for i in range(fragments)]
    own, kept = [params] * REPLICAS, [INNER.init(params)] * REPLICAS
    under_way = []  # When it arrives, the fragment and its mean change.
    in_turn = rounds.swapaxes(1, 2).reshape(-1, REPLICAS, 1, 5, WIDTH + 1)
    for t in range(len(in_turn) + 1):  # After so many steps.
        for m in range(REPLICAS if t else 0):
            own[m], kept[m], _ = step(own[m], kept[m], in_turn[t - 1, m])
        turn, rest = divmod(t + delay, steps // fragments)
        for what in "arrives", "is taken", "arrives":
            if what == "is taken" and turn and not rest:
                i = (turn - 1) % fragments
                changes = [optax.tree.sub(take(server, i), take(y, i)) for y in own]
                mean = jax.tree.map(lambda *x: sum(x) / REPLICAS, *changes)
                under_way.append((t + delay, i, mean))
            elif what == "arrives" and under_way and under_way[0][0] == t:
                _, i, change = under_way.pop(0)
                updates, outer[i] = OUTER.update(change, outer[i])
                new = optax.apply_updates(take(server, i), updates)
                server = put(server, i, part=new)
                for m in range(REPLICAS):
                    mixed = jax.tree.map(
                        lambda a, b: mixing * a + (1 - mixing) * b, take(own[m], i), new
                    )
                    own[m] = put(own[m], i, part=mixed)
    assert_close(got.params, server)
    assert_close(got.replicas.params, jax.tree.map(lambda *x: jnp.stack(x), *own))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fragments_are_the_parameters_each_once(params, count):
    zeros = jax.tree.map(jnp.zeros_like, params)
    for i in range(count):
        part = diloco.fragment(params, i, count)
        zeros = diloco.with_fragment(zeros, i, count, part)
    sizes = [
        sum(x.size for x in jax.tree.leaves(diloco.fragment(params, i, count)))
        for i in range(count)
    ]
    jax.tree.map(np.testing.assert_array_equal, zeros, params)
    assert sum(sizes) == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("fragments, delay", [(4, 0), (2, 4)])
def test_fragments_that_do_not_fit_the_steps_are_an_error(params, fragments, delay):
    streaming = streaming_by(fragments, delay)
    with pytest.raises(ValueError, match=f"6 steps, {fragments} fragments and a delay"):
        trained(streaming, params, examples(steps=6))


#
# On a mesh.
#
def test_a_round_of_diloco_is_one_all_reduce(params):
    mesh = jax.make_mesh((4,), ("replicas",), axis_types=(AxisType.Auto,))
    plain = diloco.diloco(loss, INNER, OUTER, replicas=REPLICAS)
    with jax.set_mesh(mesh):
        placed = jax.device_put(examples(6)[0], NamedSharding(mesh, P("replicas")))
        state = jax.device_put(plain.init(params), NamedSharding(mesh, P()))
        run = jax.jit(plain.round).lower(state, placed, jax.random.key(0))
        text = run.compile().as_text() or ""
    assert text.count(" all-reduce(") == 1
    assert "all-gather" not in text


#
# The transformer.
#
SMALL = transformer.Config(16, 2, 32, 4, 12, dtype="float32")


@pytest.fixture(scope="module")
def small():
    return transformer.init(SMALL, jax.random.key(0))


def tokens(*shape):
    return jax.random.randint(jax.random.key(2), shape, 0, SMALL.vocab)


def test_a_token_does_not_see_those_after_it(small):
    text = tokens(1, 12)
    other = text.at[:, 7:].set((text[:, 7:] + 1) % SMALL.vocab)
    logits = jax.jit(functools.partial(transformer.logits, SMALL))
    a, b = (logits(small, x)[0] for x in (text, other))
    np.testing.assert_array_equal(a[:7], b[:7])
    assert (a[7:] != b[7:]).any(axis=-1).all()


def test_to_compute_activations_again_changes_nothing(small):
    keeps = dataclasses.replace(SMALL, remat=False)
    grads = [
        jax.jit(jax.grad(functools.partial(transformer.loss, config)))(
            small, tokens(2, 13)
        )
        for config in (SMALL, keeps)
    ]
    assert_close(*grads)


def test_the_program_does_not_grow_with_depth(small):
    def operations(layers):
        config = dataclasses.replace(SMALL, layers=layers)
        shapes = jax.eval_shape(
            functools.partial(transformer.init, config), jax.random.key(0)
        )
        grad = jax.grad(functools.partial(transformer.loss, config))
        return str(jax.make_jaxpr(grad)(shapes, tokens(2, 13))).count("\n")

    assert operations(2) == operations(20)


def test_a_split_model_is_the_model(small):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    split = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        small,
        transformer.specs(SMALL),
    )
    grad = jax.jit(jax.grad(functools.partial(transformer.loss, SMALL)))
    with jax.set_mesh(mesh):
        compiled = grad.lower(split, tokens(2, 13)).compile()
        got = compiled(split, tokens(2, 13))
    assert_close(got, grad(small, tokens(2, 13)), atol=1e-5)
    matrices = [x for x in jax.tree.leaves(split) if x.ndim > 2]
    assert all(x.addressable_shards[0].data.size * 4 == x.size for x in matrices)


def test_a_cold_sample_is_what_is_likeliest(small):
    """Also beyond what the model looks back."""
    n, count = 3, 2 * SMALL.length
    sample = functools.partial(transformer.sample, SMALL, count=count, temperature=1e-6)
    logits = jax.jit(functools.partial(transformer.logits, SMALL))
    text = jax.jit(sample)(small, tokens(n), key=jax.random.key(0))
    np.testing.assert_array_equal(text[:n], tokens(n))
    for i in range(n, n + count):
        start = max(0, i - SMALL.length)
        window = text[None, start : start + SMALL.length]
        assert text[i] == logits(small, window)[0, i - start - 1].argmax()
