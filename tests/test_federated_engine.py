"""A round is that of the clients that report, however they are read."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_clients import COUNTS, MODEL, Data, N, WithNan
from helpers import assert_close

import drjax
import federated
from federated import _batch
from federated._cohort import Cohort
from federated._engine import Engine


def loss(model, batch):
    """A mean over clients, of what a step of each makes of its own mean."""

    @drjax.program(clients=len(batch.count))
    def run(model, batch):
        def of_client(model, b):
            def mean(model):
                errors = jnp.sum(jnp.tanh(b.data["x"] - model) ** 2, -1)
                return jnp.sum(errors * b.mask) / b.count

            return mean(model - 0.3 * jax.grad(mean)(model))

        losses = drjax.map_fn(of_client, (drjax.broadcast(model), batch))
        return drjax.reduce_mean(losses), drjax.reduce_max(losses)

    return run(model, batch)


def value_and_gradient(model, batch):
    return jax.value_and_grad(lambda model: loss(model, batch)[0])(model)


FUNCTIONS = {"value": loss, "gradient": value_and_gradient}
SUBSETS = {"all": range(N), "some": [1, 2, 4, 9, 11], "one": [4]}


def run_engine(fn, clients, reporting, most=4, data=None):
    data = data or Data()
    lengths = _batch.lengths(data.num_examples, most)
    cohort = Cohort(data, clients, lengths, data[0])
    engine = Engine(drjax.make_plan(fn))
    reporting = np.asarray(reporting)
    return engine, engine.run((MODEL, cohort), reporting, cohort.lengths_of)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_round_is_that_of_the_clients_that_report(name, subset, most):
    """As a compiled program for these alone: means have their number as denominator.

    Whatever the lengths are that batches are padded to.
    """
    clients = np.random.default_rng(0).permutation(N)
    reporting = np.array(SUBSETS[subset])
    _, outcome = run_engine(FUNCTIONS[name], clients, reporting, most)
    batch = federated.batch_of(Data(), clients[reporting])
    assert_close(outcome.result, jax.jit(FUNCTIONS[name])(MODEL, batch))
    assert len(outcome.rejected) == 0


def test_a_round_in_64_bits():
    """Also where that is set for a thread, for data are read by another."""
    with jax.enable_x64(True):
        clients = np.arange(N)

        def mean(model, batch):
            return loss(model.astype(float), batch)

        _, outcome = run_engine(mean, clients, clients, data=Data64())
        want = jax.jit(mean)(MODEL, federated.batch_of(Data64(), clients))
        assert outcome.result[0].dtype == want[0].dtype == np.float64
        np.testing.assert_allclose(outcome.result, want, rtol=1e-14)


class Data64(Data):
    def __getitem__(self, i):
        return {"x": super().__getitem__(i)["x"].astype(np.float64)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_client_that_sends_nan_is_refused(name):
    """The result is that of the others."""
    engine, outcome = run_engine(
        FUNCTIONS[name], np.arange(N), range(N), data=WithNan()
    )
    good = np.setdiff1d(np.arange(N), WithNan.bad)
    batch = federated.batch_of(Data(), good)
    assert_close(outcome.result, jax.jit(FUNCTIONS[name])(MODEL, batch))
    assert outcome.rejected.tolist() == [*WithNan.bad]
    assert outcome.reported.tolist() == good.tolist()


def roots(model, batch):
    """A mean of roots: at zero only the derivative is not finite."""

    @drjax.program(clients=len(batch.count))
    def run(model, batch):
        def of_client(model, b):
            return jnp.sqrt(jnp.sum((model * (b.client != 3)) ** 2))

        return drjax.reduce_mean(
            drjax.map_fn(of_client, (drjax.broadcast(model), batch))
        )

    return run(model, batch)


def test_a_client_lost_in_a_later_stage_is_in_no_stage():
    """A value and its gradient have the same denominator."""
    fn = jax.value_and_grad(roots)
    _, outcome = run_engine(fn, np.arange(N), range(N))
    assert outcome.rejected.tolist() == [3]
    good = np.setdiff1d(np.arange(N), [3])
    assert_close(outcome.result, fn(MODEL, federated.batch_of(Data(), good)))
    assert_close(run_engine(roots, np.arange(N), range(N))[1].rejected, np.zeros(0))


def test_nothing_is_left_if_all_send_nan():
    data = WithNan()
    data.bad = range(N)
    _, outcome = run_engine(loss, np.arange(N), range(N), data=data)
    assert outcome.result is None
    assert len(outcome.reported) == 0


def test_nothing_is_compiled_for_the_number_of_clients():
    data, seen = Data(), []
    cohort = Cohort(data, np.arange(N), _batch.lengths(COUNTS, 3), data[0])
    engine = Engine(drjax.make_plan(loss))
    engine.run((MODEL, cohort), np.arange(N), cohort.lengths_of)
    compiled = engine.compiled
    for m in range(1, N):
        reporting = np.random.default_rng(m).permutation(N)[:m]
        outcome = engine.run((MODEL, cohort), np.sort(reporting), cohort.lengths_of)
        seen.append(len(outcome.reported))
        assert engine.compiled <= 2 * 3  # A full chunk, and one that is not, a length.
    assert seen == [*range(1, N)]
    assert compiled <= engine.compiled


def mean_of_counts(model, batch):
    total = drjax.program(clients=len(batch.count))(drjax.reduce_sum)(batch.count)
    return total / len(batch.count)


def test_clients_are_not_lost_where_their_number_is_a_constant():
    """For that would be the number of all, and the mean wrong."""
    _, outcome = run_engine(mean_of_counts, np.arange(N), range(N))
    assert_close(outcome.result, np.float32(COUNTS.mean()))
    with pytest.raises(ValueError, match="with their number as a constant"):
        run_engine(mean_of_counts, np.arange(N), [1, 2])


def test_derivatives_run_with_batches_of_several_lengths():
    """So clients with few examples do not run with the padding of the largest."""
    counts = np.array([1, 1, 1, 1, 1, 1, 40, 1])
    data = Data(counts)
    _, outcome = run_engine(value_and_gradient, np.arange(8), range(8), 2, data)
    assert outcome.padded == counts.sum()
    batch = federated.batch_of(data, range(8))
    assert_close(outcome.result, jax.jit(value_and_gradient)(MODEL, batch))


class SameBuffer(Data):
    buffer = np.zeros((100, 3), np.float32)

    def __getitem__(self, i):
        x = super().__getitem__(i)["x"]
        self.buffer[: len(x)] = x
        return {"x": self.buffer[: len(x)]}


def test_a_source_may_use_its_arrays_again():
    clients = np.arange(N)
    _, outcome = run_engine(loss, clients, clients, data=SameBuffer())
    assert_close(outcome.result, run_engine(loss, clients, clients)[1].result)


class Changed(Data):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def __getitem__(self, i):
        x = super().__getitem__(i)
        return self.change(x) if i == 3 else x


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda x: {"y": x["x"]}, "are a tree"),
        (lambda x: {"x": x["x"].astype(int)}, r"client 3 has an array int64\(2, 3\)"),
        (lambda x: {"x": x["x"][:, :1]}, r"float32\(2, 1\), but float32\(2, 3\)"),
        (lambda x: {"x": x["x"][:1]}, r"float32\(1, 3\), but float32\(2, 3\)"),
    ],
)
def test_clients_whose_examples_are_of_other_types_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        federated.batch_of(Changed(change), range(N))


@pytest.mark.parametrize("clients", [[-1], [N], [0.5], [True], []])
def test_clients_of_a_batch_are_indices(clients):
    with pytest.raises(ValueError, match=r"federated\.batch_of"):
        federated.batch_of(Data(), clients)


def test_each_client_is_read_once_a_round_and_no_other():
    data = Data(np.full(1_000_000, 3))
    clients = np.array([5, 999_999, 123_456])
    run_engine(loss, clients, [0, 2], data=data)
    assert sorted(data.read) == [0, 5, 123_456]  # The first one for its types.


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_lengths_have_the_least_padding(most):
    """Beside all choices; small sizes are not rounded up."""
    rng = np.random.default_rng(most)
    for _ in range(10):
        sizes = rng.integers(0, 9, rng.integers(1, 20))
        largest = max(1, sizes.max())

        def padded(lengths, sizes=sizes):
            lengths = np.sort(lengths)
            return lengths[np.searchsorted(lengths, sizes)].sum()

        choices = itertools.chain.from_iterable(
            itertools.combinations(range(1, largest), k) for k in range(most)
        )
        best = min(padded([*choice, largest]) for choice in choices)
        found = _batch.lengths(sizes, most)
        if len(found) == most:
            assert padded(found) == best
        else:  # Fewer, if little is padding.
            assert padded(found) <= sizes.clip(1).sum() / 0.8
