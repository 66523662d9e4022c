"""Analytics and evaluation give what numpy gives on the examples of all clients."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import drjax
import federated
from drjax.plan import MapReduce, Scan
from federated._analytics import _ranks, histogram, mean, quantiles
from federated._batch import batch_of
from federated._data import from_mapping
from federated._evaluation import evaluate, evaluation

COUNTS = [4, 0, 1, 7, 3]  # One client has no example.


def examples_of(count, rng):
    x = rng.normal(size=(count, 2)).astype("float32")
    return {"x": x, "y": rng.integers(0, 3, count), "v": np.round(2 * x[:, 0]) / 2}


RNG = np.random.default_rng(0)
EACH = [examples_of(count, RNG) for count in COUNTS]
DATA = from_mapping({f"client {i}": tree for i, tree in enumerate(EACH)})
POOLED = jax.tree.map(lambda *xs: np.concatenate(xs), *EACH)

BATCHES = {
    "all have examples": batch_of(DATA, np.flatnonzero(COUNTS)),
    "one has none": batch_of(DATA, range(5), 7),
    "padded more, in another order": batch_of(DATA, [4, 2, 0, 1, 3], 10),
}
BATCH = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def value(examples):
    return examples["v"]


#
# Means, histograms, quantiles.
#
@BATCH
def test_a_mean_is_that_of_all_examples(batch):
    got = jax.jit(mean())(batch)
    assert_close(got, jax.tree.map(lambda x: x.mean(0), POOLED))


def test_padding_that_a_function_is_not_defined_for_is_in_no_result():
    """It is zero, of which the logarithm is infinite, and then divided by zero."""

    def undefined(examples):
        log = jnp.log(jnp.sum(examples["x"] ** 2, -1))
        return log / (log > -jnp.inf)

    @jax.jit
    def run(batch):
        median = quantiles(0.5, -20, 20, fn=undefined)(batch)
        return mean(undefined)(batch), histogram([-99, 0, 99], undefined)(batch), median

    logs = np.log(np.sum(POOLED["x"] ** 2, -1))
    average, counts, median = run(batch_of(DATA, range(5), 9))
    assert_close(average, logs.mean())
    np.testing.assert_array_equal(counts, np.histogram(logs, [-99, 0, 99])[0])
    np.testing.assert_allclose(median, np.sort(logs)[7], atol=1e-4)


EDGES = {
    "values on edges": [-2, -1, -0.5, 0, 0.5, 1, 1.5],
    "the last edge is a value": [-10, 0, POOLED["v"].max()],
    "the first edge is a value": [POOLED["v"].min(), 0.25],
    "edges twice": [-1, 0, 0, 0.5, 1, 1],
    "no value": [50, 60, 70],
}


@BATCH
@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES)
def test_a_histogram_is_that_of_numpy(edges, batch):
    got = jax.jit(histogram(edges, value))(batch)
    want, _ = np.histogram(POOLED["v"], edges)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


INTEGERS = {
    "int8": [-128, -127, 0, 126, 127],
    "uint8": [0, 1, 254, 255],
    "int32": [-(2**31), -1, 2**24, 2**24 + 1, 2**24 + 2, 2**31 - 1],
    "uint32": [0, 2**31, 3_000_000_000, 2**32 - 1],
}
WIDE_EDGES = {
    "beyond all of them": [-(2**40), 0, 2**40],
    "the ends of int32": [-(2**31), 2**31 - 1],
    "infinite": [-np.inf, 0.5, np.inf],
    "between": [-127.5, 2**24 + 0.5, 2**24 + 1, 2**31],
    "above all of them": [2**33, 2**34],
    "below all of them": [-(2**34), -(2**33)],
}


@pytest.mark.parametrize("edges", WIDE_EDGES.values(), ids=WIDE_EDGES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_histogram_of_integers_is_exact(dtype, edges):
    values = np.array(INTEGERS[dtype], dtype)
    batch = batch_of(from_mapping({"ann": values[::2], "bob": values[1::2]}), [0, 1])
    want, _ = np.histogram(values.astype(object), edges)
    np.testing.assert_array_equal(jax.jit(histogram(edges))(batch), want)


def test_a_mean_of_integers_has_the_digits_of_a_float():
    with jax.enable_x64(True):
        batch = batch_of(from_mapping({"ann": [2**24 + 1], "bob": [2**24 + 3]}), [0, 1])
        got = jax.jit(mean())(batch)
        assert got.dtype == np.float64
        assert got == 2**24 + 2


def test_programs_stream_as_they_jit():
    def run(params, batch):
        found = quantiles([0.2, 0.5], -9, 9, rounds=6, fn=value)(batch)
        return evaluation(metrics_of)(params, batch), mean()(batch), found

    batch = BATCHES["one has none"]
    got = drjax.streaming(run, chunk_size=2)(PARAMS, batch)
    assert_close(got, jax.jit(run)(PARAMS, batch))


def test_nan_is_in_no_bin():
    data = from_mapping({"ann": np.array([np.nan, 1, 2]), "bob": np.array([np.nan])})
    counts = jax.jit(histogram([0, 1, 2]))(batch_of(data, [0, 1]))
    np.testing.assert_array_equal(counts, [0, 2])


def quantile_of(values, q):
    """The smallest value that a part `q` of all are not above."""
    rank = max(1, -(-Fraction(str(q)) * len(values) // 1))
    return np.sort(values)[int(rank) - 1]


@BATCH
@pytest.mark.parametrize("rounds", [0, 1, 5, 16])
def test_a_quantile_is_within_half_of_the_last_interval(batch, rounds):
    qs = np.array([[0, 0.1, 0.25], [0.5, 0.9, 1]])
    low, high = -5.0, 6.0
    got = jax.jit(quantiles(qs, low, high, rounds=rounds, fn=value))(batch)
    want = [[quantile_of(POOLED["v"], q) for q in row] for row in qs]
    assert got.shape == qs.shape
    bound = (high - low) / 2 ** (rounds + 1)
    assert np.abs(got - np.array(want)).max() <= bound + 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 40, 100])
def test_a_quantile_has_the_rank_that_fractions_give(count):
    """Also where `q * count` is a whole number, that floats miss by a little."""
    values = np.arange(count, dtype="float32")
    batch = batch_of(from_mapping({"ann": values[::2], "bob": values[1::2]}), [0, 1])
    qs = [k / 100 for k in range(101)]
    got = jax.jit(quantiles(qs, -0.5, count, rounds=12))(batch)
    np.testing.assert_array_equal(np.round(got), [quantile_of(values, q) for q in qs])


@pytest.mark.parametrize("total", [2**20 - 1, 10**8, 10**9 + 7, 2**31 - 1])
def test_a_rank_has_more_digits_than_float32(total):
    """Of so many examples it would be a hundred off."""
    qs = np.array([k / 100 for k in range(101)])
    want = [max(1, -(-Fraction(str(q)) * total // 1)) for q in qs]
    got = np.asarray(_ranks(qs, jnp.int32(total)), np.int64)
    assert np.abs(got - np.array(want, np.int64)).max() <= total // 2**29
    assert got[-1] == total
    of_floats = np.asarray(_ranks(qs.astype(np.float32), jnp.int32(total)), np.int64)
    np.testing.assert_array_equal(of_floats, got)


def test_the_largest_of_millions_is_found():
    data = from_mapping(
        {"ann": np.zeros(5_000_000, np.int8), "bob": np.array([100], np.int8)}
    )
    batch = batch_of(data, [0, 1])
    got = jax.jit(quantiles(1.0, 0, 128, rounds=8))(batch)
    assert abs(got - 100) <= 0.25


def test_values_outside_count_as_the_nearer_bound():
    batch = BATCHES["one has none"]
    qs, low, high = [0, 0.2, 0.5, 1], -0.25, 0.75
    assert POOLED["v"].min() < low < high < POOLED["v"].max()
    got = jax.jit(quantiles(qs, low, high, rounds=10, fn=value))(batch)
    want = [quantile_of(np.clip(POOLED["v"], low, high), q) for q in qs]
    assert np.abs(got - np.array(want)).max() <= 1 / 2**11


def test_a_bisection_is_a_round_and_a_loop_of_one_round_each():
    """What leaves a client is how many examples it has, and how many are below."""
    fn = quantiles([0.1, 0.5, 0.9], -1, 1, rounds=6, fn=value)
    plan = drjax.make_plan(fn)(batch_of(DATA, range(5)))
    first, loop = [s for s in plan.stages if isinstance(s, MapReduce | Scan)]
    assert isinstance(first, MapReduce)
    assert isinstance(loop, Scan)
    assert loop.length == 6
    (inside,) = [s for s in loop.body.stages if isinstance(s, MapReduce)]
    sent = [
        [str(plan.avals[i]) for _, i in stage.reductions]
        for plan, stage in ((plan, first), (loop.body, inside))
    ]
    assert sent == [["int32[]"], ["int32[3]"]]
    assert "clients" in plan.size_free


def test_without_an_example_nothing_is_nan():
    @jax.jit
    def run(batch):
        of_nothing = mean()(batch), histogram([0, 1, 2], value)(batch)
        metrics = evaluation(metrics_of)(PARAMS, batch)
        return (*of_nothing, metrics), quantiles(0.5, -1, 1, rounds=8, fn=value)(batch)

    zeros, median = run(batch_of(DATA, [1, 1], 3))
    assert_close(zeros, jax.tree.map(jnp.zeros_like, zeros))
    assert 1 - 2 / 2**9 <= median <= 1


#
# Evaluation.
#
PARAMS = {"w": jnp.array([[0.5, -1.0, 2.0], [1.0, 0.3, 0.1]])}


def metrics_of(params, examples):
    logits = examples["x"] @ params["w"]
    chosen = jnp.take_along_axis(logits, examples["y"][:, None], 1)[:, 0]
    return {
        "accuracy": jnp.argmax(logits, -1) == examples["y"],
        "loss": jax.nn.logsumexp(logits, -1) - chosen,
    }


OF_EACH = [metrics_of(PARAMS, examples) for examples in EACH if len(examples["y"])]
MEANS = {
    name: np.array([np.mean(metrics[name]) for metrics in OF_EACH])
    for name in ("accuracy", "loss")
}
MEAN = {name: np.mean(x) for name, x in metrics_of(PARAMS, POOLED).items()}


@BATCH
def test_an_evaluation_is_the_mean_over_examples_and_over_clients(batch):
    got = jax.jit(evaluation(metrics_of))(PARAMS, batch)
    over_clients = {f"{name} over clients": x.mean() for name, x in MEANS.items()}
    assert {*got} == {*MEAN, *over_clients}
    for name, want in {**MEAN, **over_clients}.items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5)


def test_the_gradient_of_an_evaluation_is_that_on_all_examples():
    batch = batch_of(DATA, range(5), 9)
    run = evaluation(metrics_of)
    got = jax.jit(jax.grad(lambda params: run(params, batch)["loss"]))(PARAMS)
    pooled = jax.grad(lambda params: jnp.mean(metrics_of(params, POOLED)["loss"]))
    assert_close(got, jax.jit(pooled)(PARAMS))


def test_a_gradient_does_not_go_through_padding():
    """Where the metric has none: there it would be zero times infinity."""

    def metrics(p, x):
        return {"root": jnp.sqrt((p * x) ** 2), "log": jnp.log(p * x)}

    data = from_mapping({"ann": [1.0, 2.0, 3.0], "bob": [4.0]})
    batch = batch_of(data, [0, 1])

    def loss(p, batch):
        found = evaluation(metrics)(p, batch)
        return found["root"] + found["log"]

    def logs(p, batch):
        return mean(lambda x: jnp.log(p * x))(batch)

    for fn, want in ((loss, 2.5 + 0.5), (logs, 0.5)):  # 10 / 4, and 1 / p.
        for run in (jax.jit, federated.simulate):
            assert_close(run(jax.grad(fn))(jnp.float32(2), batch), want)


@pytest.mark.parametrize("batch_size", [1, 4, 15, 1000])
def test_held_out_examples_are_evaluated_whatever_the_batches(batch_size):
    got = evaluate(metrics_of, DATA, batch_size=batch_size)(PARAMS)
    want = dict(MEAN)
    for name, means in MEANS.items():
        percentiles = np.percentile(means, [10, 50, 90])
        for p, x in zip((10, 50, 90), percentiles, strict=True):
            want[f"{name} p{p}"] = x
    assert {*got} == {*want}
    for name, x in want.items():
        assert type(got[name]) is float
        np.testing.assert_allclose(got[name], x, rtol=1e-5)


def test_a_common_test_set_is_evaluated_as_that_of_all_clients():
    got = evaluate(metrics_of, jax.tree.map(jnp.asarray, POOLED), batch_size=4)(PARAMS)
    of_clients = evaluate(metrics_of, DATA, batch_size=4)(PARAMS)
    assert got == {name: of_clients[name] for name in ("accuracy", "loss")}


def test_a_model_gets_no_more_examples_than_a_batch_has_and_is_compiled_once():
    shapes = []

    def metrics(params, examples):
        shapes.append(examples["x"].shape)
        return metrics_of(params, examples)

    run = evaluate(metrics, DATA, batch_size=4)
    run(PARAMS)
    run(jax.tree.map(jnp.negative, PARAMS))
    assert shapes == [(4, 2)]


def test_a_client_is_read_once_and_not_without_examples():
    class Reads:
        num_examples, read = DATA.num_examples, []

        def __getitem__(self, i):
            self.read.append(i)
            return DATA[i]

    data = Reads()
    evaluate(metrics_of, data, batch_size=2)(PARAMS)
    assert data.read == [0, 2, 3, 4]


#
# What is wrong is said.
#
ERRORS = {
    "edges that decrease": (
        lambda: histogram([0, 2, 1]),
        "federated.histogram: the edges are two numbers or more that do not decrease",
    ),
    "one edge": (lambda: histogram([0]), "federated.histogram: the edges are two"),
    "percentages": (
        lambda: quantiles([10, 50], 0, 1),
        "federated.quantiles: qs are from 0 to 1, but got [10, 50]. Usually they are",
    ),
    "bounds in the wrong order": (
        lambda: quantiles(0.5, 1, 0),
        "federated.quantiles: the values are between low and high, but got low 1 and",
    ),
    "bounds without a middle": (
        lambda: quantiles(0.5, -np.inf, 0),
        "federated.quantiles: the values are between low and high, but got low -inf",
    ),
    "no number of rounds": (
        lambda: quantiles(0.5, 0, 1, rounds=-1),
        "federated.quantiles: rounds is 0 at least, but got -1",
    ),
    "complex metrics": (
        lambda: evaluate(lambda p, e: {"v": e["v"] * 1j}, DATA)(PARAMS),
        "federated.evaluate: metrics are real numbers, but 'v' is complex64",
    ),
    "examples that are no values": (
        lambda: histogram([0, 1])(batch_of(DATA, [0])),
        "federated.histogram: expected one array of values, but got a tree",
    ),
    "a value of all examples": (
        lambda: quantiles(0.5, 0, 1, fn=lambda e: e["v"].mean())(batch_of(DATA, [0])),
        "federated.quantiles: expected one value per example, [4], but the values has "
        "shape []. Usually the mean over the examples is taken already",
    ),
    "a mean of all examples": (
        lambda: mean(lambda e: {"v": e["v"].mean()})(batch_of(DATA, [0])),
        "federated.mean: expected one value per example, [4], but ['v'] has shape []",
    ),
    "metrics without names": (
        lambda: evaluation(lambda p, e: e["v"])(PARAMS, batch_of(DATA, [0])),
        "federated.evaluation: expected metrics as a dict, {name: [length]}, but got",
    ),
    "a metric of all examples": (
        lambda: evaluate(lambda p, e: {"v": e["v"].mean()}, DATA)(PARAMS),
        "federated.evaluate: expected one value per example, [15], but ['v'] has shape",
    ),
    "no example": (
        lambda: evaluate(metrics_of, DATA.select([1])),
        "federated.evaluate: the data has no example. Usually all of them are in",
    ),
    "rows are missing": (
        lambda: evaluate(metrics_of, {"x": np.ones((3, 2)), "y": np.ones(2)}),
        "federated.evaluate: the data is a ClientData, or a tree of arrays with a row",
    ),
    "no batch": (
        lambda: evaluate(metrics_of, DATA, batch_size=0),
        "federated.evaluate: batch_size is a number of examples, one at least, but got",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_why(name):
    call, text = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
