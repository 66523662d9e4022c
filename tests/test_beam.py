"""The Beam engine: bits, sources, bad elements, and what it refuses."""

import functools
import os
import pathlib
import pickletools
import re
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apache_beam.internal import cloudpickle
from apache_beam.pipeline import PipelineVisitor
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows
from helpers import assert_close, every, gradient, of_floats
from programs import PROGRAMS

import beam_runner
import drjax
from beam_runner import _files, _fold

ROOT = pathlib.Path(__file__).parents[1]
N = 23
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
W = np.array([0.5, -1, 2], np.float32)


def program(fn, n=N):
    return drjax.program(rows=n)(fn)


def of_rows(w, x):
    def of_row(x, w):
        return jnp.tanh(x @ w) ** 2

    return drjax.reduce_mean(drjax.map_fn(of_row, (x, drjax.broadcast(w))))


loss = program(of_rows)


class Slices:
    """A source that reads slices of an array, and notes which."""

    def __init__(self, x):
        self.x, self.num_elements = x, len(x)

    def read(self, low, high):
        return self.x[low:high]


def of_magnitudes(n, seed=0):
    """Numbers of 12 decades whose sum nearly cancels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n // 2) * 10 ** rng.uniform(-6, 6, n // 2)
    return rng.permutation(np.concatenate([x, -x * (1 + 1e-6)])).astype(np.float32)


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def through(transform, *inputs):
    """The elements of a transform's three results, by way of files of the runner."""
    kept = []
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        collections = tuple(
            pipeline | f"Input {k}" >> beam.Create(x) for k, x in enumerate(inputs)
        )
        given = collections if len(inputs) > 1 else (*collections, pipeline)[0]
        result = given | transform
        for name, collection in result._asdict().items():
            _ = collection | f"Keep {name}" >> beam.Map(_keep, key := len(KEPT), name)
            kept.append((key, name))
    return beam_runner.Result(
        *([x for k, n, x in KEPT if (k, n) == which] for which in kept)
    )


KEPT = []  # The runner's workers are threads of this process.


def _keep(x, key, name):
    KEPT.append((key, name, x))


def indexed(x):
    return [*enumerate(x)]


def nodes(pipeline):
    """The transforms of a pipeline that have no others in them."""
    found = []

    class Visitor(PipelineVisitor):
        def visit_transform(self, transform_node):
            found.append(transform_node)

    pipeline.visit(Visitor())
    return found


def struct(x):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)


#
# Bits.
#
@pytest.mark.parametrize("chunk_size", [None, 1, 7, N, 100])
def test_every_chunk_size_computes_what_jit_does(chunk_size):
    fn = jax.value_and_grad(loss)
    assert_close(beam_runner.run(fn, W, X, chunk_size=chunk_size), jax.jit(fn)(W, X))


def test_a_sum_is_as_accurate_for_many_elements_as_for_few():
    """Partial sums are kept in 64 bits, where plain addition loses digits."""
    n = 100_000
    x = np.random.default_rng(0).uniform(size=n).astype(np.float32)
    total = beam_runner.run(program(drjax.reduce_sum, n), x, chunk_size=64)
    exact, eps = np.sum(x, dtype=np.float64), np.finfo(np.float32).eps
    assert abs(total - exact) <= 2 * eps * exact
    assert abs(functools.reduce(np.add, x, np.float32(0)) - exact) > 20 * eps * exact


def test_bits_do_not_depend_on_the_order_in_which_elements_arrive():
    n = 1000
    x, total = of_magnitudes(n), program(drjax.reduce_sum, n)
    rng, transform = (
        np.random.default_rng(1),
        functools.partial(beam_runner.MapReduce, total, struct(x), chunk_size=10),
    )
    orders = (rng.permutation(n) for _ in range(3))
    sums = [through(transform(), [(i, x[i]) for i in order]).server for order in orders]
    assert all(same_bits(one, sums[0]) for one in sums)
    assert same_bits(sums[0], [beam_runner.run(total, x, chunk_size=10)])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(workers):
    n = 2000
    x, total = of_magnitudes(n), program(drjax.reduce_sum, n)
    options = {"direct_running_mode": "multi_threading", "direct_num_workers": workers}
    got = beam_runner.run(total, x, chunk_size=20, options=options)
    assert same_bits(got, beam_runner.run(total, x, chunk_size=20))


def test_folds_are_in_the_order_of_the_ranges():
    """In any other order, float64 gives other bits; ours does not look at the order."""
    x = of_magnitudes(70).astype(np.float64) * np.float64(np.pi)
    parts = [[x[i : i + 1]] for i in range(len(x))]
    rng = np.random.default_rng(0)
    for levels in (1, 2):
        found = set()
        for _ in range(3):
            fold = _fold.Fold(["sum"], [np.dtype(np.float64)], None, levels, "")
            name = f"fold {len(KEPT)}"
            with beam.Pipeline(runner=FnApiRunner()) as pipeline:
                order = [
                    _fold.by_group(levels, i, parts[i])
                    for i in rng.permutation(len(parts)).tolist()
                ]
                folded = pipeline | beam.Create(order, reshuffle=False) | fold
                _ = folded | beam.Map(_keep, 0, name)
            found |= {v.tobytes() for _, n, [v] in KEPT[-1:] if n == name}
        assert len(found) == 1
    naive = {np.sum(rng.permutation(x)).tobytes() for _ in range(20)}
    assert len(naive) > 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("chunk_size", [1, 100, 2000])
def test_sums_of_halves_are_not_rounded_before_the_end(dtype, chunk_size):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(99, 101, 1000), rng.uniform(-101, -99, 1000)])
    x = x.astype(dtype)
    total = beam_runner.run(program(drjax.reduce_sum, len(x)), x, chunk_size=chunk_size)
    exact = np.sum(x.astype(np.float64))
    assert total.dtype == dtype
    assert abs(float(total) - exact) <= float(jnp.finfo(dtype).eps) * abs(exact)


def test_integers_wrap_around_as_under_jit():
    x = np.full(N, 2**30, np.int32)
    total = program(lambda x: (drjax.reduce_sum(x), drjax.reduce_max(x)))
    got, want = beam_runner.run(total, x, chunk_size=4), jax.jit(total)(x)
    assert [*map(int, got)] == [*map(int, want)]


def test_nan_goes_through_extremes_as_under_jit():
    x = X.copy()
    x[4, 1], x[5, 2] = np.nan, np.inf
    extremes = program(lambda x: (drjax.reduce_max(x), drjax.reduce_min(x)))
    got = beam_runner.run(extremes, x, chunk_size=4, on_bad="keep")
    assert_close(got, jax.jit(extremes)(x))


def test_elements_draw_the_same_numbers_whatever_the_chunks():
    def noise(x):
        keys = drjax.map_fn(
            jax.random.fold_in,
            (drjax.broadcast(jax.random.key(0)), drjax.placement_index()),
        )
        return drjax.map_fn(
            lambda key, x: x + jax.random.normal(key, x.shape), (keys, x)
        )

    noisy = program(noise)
    for chunk_size in (1, 6):
        assert_close(
            beam_runner.run(noisy, X, chunk_size=chunk_size), jax.jit(noisy)(X)
        )


#
# Where elements come from.
#
def test_sources_and_arrays_give_the_same_bits(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "f.npy", np.asfortranarray(X))
    longer = np.memmap(tmp_path / "long", np.float32, "w+", 0, (N + 5, 3))
    longer[5:] = X
    raw = np.memmap(tmp_path / "raw", np.float64, "w+", 24, X.shape)
    raw[:] = X
    longer.flush()
    raw.flush()
    want = beam_runner.run(jax.grad(loss), W, X, chunk_size=4)
    for x in (
        jnp.asarray(X),
        Slices(X),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        np.load(tmp_path / "f.npy", mmap_mode="r"),
        longer[5:],
        raw,
    ):
        assert same_bits(beam_runner.run(jax.grad(loss), W, x, chunk_size=4), want)


READS = []


class Noted(Slices):
    def read(self, low, high):
        READS.append((low, high))
        return super().read(low, high)


def test_a_source_is_read_once_a_round_in_chunks_and_by_index():
    READS.clear()
    beam_runner.run(loss, W, Noted(X), chunk_size=10)
    assert sorted(READS) == [(0, 1), (0, 10), (10, 20), (20, N)]


class Reused(Slices):
    """It gives the same array again and again."""

    def read(self, low, high):
        if not hasattr(self, "buffer"):
            self.buffer = np.zeros((100, *self.x.shape[1:]), self.x.dtype)
        self.buffer[: high - low] = self.x[low:high]
        return self.buffer[: high - low]


def test_a_source_may_use_its_arrays_again():
    x = np.arange(5000, dtype=np.float32)
    total = program(drjax.reduce_sum, len(x))
    assert beam_runner.run(total, Reused(x), chunk_size=10) == x.sum()
    x[7] = np.nan
    got = beam_runner.run(total, Reused(x), chunk_size=10, on_bad="collect")
    assert got == np.nansum(x)


def test_a_source_whose_dtype_changes_is_refused():
    class Drifting(Slices):
        def read(self, low, high):
            return np.array(self.x[low:high])

    total = program(drjax.reduce_sum, 4)
    with pytest.raises(TypeError, match="float64, which does not go into int32"):
        beam_runner.run(total, Drifting([1, 2.5, 3.75, 4.5]), chunk_size=2)
    with pytest.raises(beam_runner.BadElementError, match="do not fit into int32"):
        beam_runner.run(total, Drifting([1, 2, 2**40, 4]), chunk_size=2)


def test_arrays_of_the_same_bytes_are_told_apart():
    x = np.ones((2, 512, 1024), np.float32)

    def both(x):
        return drjax.reduce_sum(x), drjax.reduce_sum(x.reshape(2, 1024, 512))

    got = beam_runner.run(program(both, 2), x)
    assert [y.shape for y in got] == [(512, 1024), (1024, 512)]


def test_a_memmap_that_is_changed_in_memory_only(tmp_path):
    np.zeros(5, np.float32).tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", np.float32, "c")
    x[:] = 1
    assert beam_runner.run(program(drjax.reduce_sum, 5), x) == 5


def test_files_of_earlier_rounds_are_removed(tmp_path):
    sizes = []

    def until(state):
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        sizes.append(sum(path.stat().st_size for path in files))
        return False

    added = program(lambda state, x: state + drjax.reduce_sum(x), 2)
    x, state = np.ones((2, 2**18), np.float32), np.zeros(2**18, np.float32)
    beam_runner.iterate(
        added, state, x, until=until, max_rounds=3, temp_location=tmp_path, chunk_size=1
    )
    assert sizes[0] >= x.nbytes
    assert sizes[3] == sizes[2] == sizes[1]


def test_a_tree_may_hold_sources_and_arrays():
    @program
    def total(tree):
        rows = drjax.map_fn(lambda t: t["x"].sum() * t["y"], tree)
        return drjax.reduce_sum(rows)

    y = np.arange(N, dtype=np.float32)
    got = beam_runner.run(total, {"x": Slices(X), "y": y}, chunk_size=4)
    assert_close(got, total({"x": X, "y": y}))


def test_large_values_go_through_files_that_are_checked(tmp_path):
    big = np.random.default_rng(0).normal(size=_files.LARGE // 4).astype(np.float32)
    staged = _files.stage(big, str(tmp_path))
    assert isinstance(staged, _files.Staged)
    assert _files.stage(big.copy(), str(tmp_path)) == staged
    assert np.array_equal(_files.load(staged), big)
    with open(staged.path, "r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    _files._checked.clear()  # As in another process.
    with pytest.raises(ValueError, match="is damaged"):
        _files.load(staged)


def test_large_server_values_and_reductions():
    big = np.random.default_rng(0).normal(size=400_000).astype(np.float32)
    x = np.arange(5, dtype=np.float32)
    scaled = drjax.program(rows=5)(
        lambda v, x: drjax.reduce_sum(
            drjax.map_fn(lambda v, x: v * x, (drjax.broadcast(v * 2), x))
        )
    )
    assert_close(beam_runner.run(scaled, big, x, chunk_size=1), jax.jit(scaled)(big, x))


def test_large_placed_values_around_loops():
    """Each pipeline's files go when it ends; values that are needed later do not."""
    x = np.random.default_rng(0).normal(size=(4, 2**17)).astype(np.float32)
    mean = drjax.program(rows=4)(drjax.reduce_mean)

    def rounds(x):
        first = mean(x)  # An argument, and a closed-over constant: C.
        last, y = jax.lax.fori_loop(
            0, 2, lambda i, c: (mean(c[1] - c[0]), c[1] / 2), (first + mean(C), x)
        )
        return mean(y * C - last)

    C = x[::-1].copy()
    assert_close(beam_runner.run(rounds, x), jax.jit(rounds)(x))


def test_what_is_the_servers_alone_needs_no_pipeline():
    details = beam_runner.run_with_details(lambda w: jnp.sin(w) * 2, W)
    assert_close(details.result, np.sin(W) * 2)
    assert details.pipelines == 0

    def until_small(w, x):
        return jax.lax.while_loop(
            lambda w: jnp.sum(w**2) > 1, lambda w: w * loss(w, x), w
        )

    details = beam_runner.run_with_details(until_small, W, X)
    assert_close(details.result, jax.jit(until_small)(W, X))
    assert 1 <= details.pipelines <= 20


def test_bfloat16_goes_through_files():
    double = program(lambda x: (drjax.map_fn(lambda x: 2 * x, x), drjax.reduce_sum(x)))
    x = jnp.asarray(X, jnp.bfloat16)
    rows, total = beam_runner.run(double, x, chunk_size=4)
    assert rows.dtype == total.dtype == jnp.bfloat16
    assert same_bits(rows, 2 * x)


def test_nothing_is_left_in_the_temporary_folder(tmp_path):
    double = program(lambda x: drjax.map_fn(lambda x: 2 * x, x))
    beam_runner.run(double, X, temp_location=str(tmp_path))
    with pytest.raises(beam_runner.BadElementError):
        beam_runner.run(double, X * np.nan, temp_location=str(tmp_path))
    assert not [*tmp_path.iterdir()]


#
# The transform.
#
def test_the_three_ways_in_which_elements_arrive_give_the_same_bits():
    fn = jax.grad(loss)
    made = functools.partial(beam_runner.MapReduce, fn, W, chunk_size=5)
    backwards = indexed(X)[::-1]
    chunks = [(i, X[i : i + 5]) for i in range(0, N, 5)]
    ways = [
        through(made(Slices(X))),
        through(made(struct(X)), backwards),
        through(made(beam_runner.Chunks(struct(X), 5)), chunks[::-1]),
    ]
    assert all(
        same_bits(way.server, [beam_runner.run(fn, W, X, chunk_size=5)]) for way in ways
    )


def test_server_arguments_arrive_in_a_collection_of_one():
    transform = beam_runner.MapReduce(loss, struct(W), struct(X), chunk_size=5)
    result = through(transform, [W], indexed(X))
    assert_close(result.server, [loss(W, X)])


def test_placed_results_come_by_index():
    both = program(
        lambda x: {"rows": drjax.map_fn(lambda x: 2 * x, x), "sum": drjax.reduce_sum(x)}
    )
    result = through(beam_runner.MapReduce(both, struct(X), chunk_size=5), indexed(X))
    ((server,),) = (result.server,)
    assert server["rows"] is None
    assert_close(server["sum"], X.sum(axis=0))
    assert sorted(i for i, _ in result.placed) == [*range(N)]
    for i, tree in result.placed:
        assert tree["sum"] is None
        assert np.array_equal(tree["rows"], 2 * X[i])


def test_scans_are_unrolled_and_other_loops_are_refused():
    def descend(w, x):
        def step(w, rate):
            w = w - rate * jax.grad(loss)(w, x)
            return w, loss(w, x)

        return jax.lax.scan(step, w, jnp.array([0.1, 0.2, 0.3]))

    transform = beam_runner.MapReduce(descend, W, struct(X), chunk_size=8)
    assert_close(through(transform, indexed(X)).server, [descend(W, X)])

    def until_small(w, x):
        return jax.lax.while_loop(lambda w: loss(w, x) > 0.1, lambda w: 0.9 * w, w)

    with pytest.raises(NotImplementedError, match=r"beam_runner\.run"):
        through(beam_runner.MapReduce(until_small, W, struct(X)), indexed(X))
    assert_close(beam_runner.run(until_small, W, X), until_small(W, X))


def test_nested_placements_arrive_by_composite_keys():
    pods, clients = 3, 4
    x = np.random.default_rng(0).normal(size=(pods, clients, 2)).astype(np.float32)

    @drjax.program(pods=pods, clients=clients)
    def variance_of_means(x):
        def of_pod(x):
            return drjax.reduce_mean(x, placement="clients")

        means = drjax.map_fn(of_pod, x, placement="pods")
        return drjax.reduce_mean(means**2, placement="pods")

    elements = [((p, c), x[p, c]) for c in range(clients) for p in range(pods)]
    transform = beam_runner.MapReduce(variance_of_means, struct(x), chunk_size=2)
    assert_close(through(transform, elements).server, [variance_of_means(x)])
    with pytest.raises(ValueError, match=r"index \(2, 3\)"):
        through(beam_runner.MapReduce(variance_of_means, struct(x)), elements[:-1])


@pytest.mark.parametrize("n", [1, 9, 50])
def test_any_number_of_elements(n):
    """Of a plan that is the same for all; a mean divides by those that have arrived."""
    x = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    fn = jax.grad(loss)
    transform = beam_runner.MapReduce(fn, W, struct(X), chunk_size=4, any_number=True)
    assert_close(
        through(transform, indexed(x)).server,
        [jax.grad(program(of_rows, n))(W, x)],
    )


def test_gaps_among_any_number_are_errors():
    total = program(lambda x: drjax.reduce_sum(x * drjax.placement_index()), 8)
    structs = jax.ShapeDtypeStruct((8,), jnp.float32)
    make = functools.partial(beam_runner.MapReduce, total, any_number=True)
    one = np.ones(2, np.float32)
    chunks = [(0, one[:1]), (2, one), (4, one)]
    with pytest.raises(ValueError, match="missing among those from index 0 to 1"):
        through(make(beam_runner.Chunks(structs, 2)), chunks)
    with pytest.raises(ValueError, match="has the index 1"):
        through(make(structs), [(i, 1.0) for i in (0, 2, 3)])


def test_what_is_not_read_may_arrive():
    first = program(lambda t, unused: drjax.reduce_sum(t["a"]))
    table = {"a": X[:, 0], "b": X}
    rows = [(i, {"a": X[i, 0], "b": X[i]}) for i in range(N)]
    transform = beam_runner.MapReduce(first, struct(table), struct(W))
    assert_close(through(transform, rows, [W]).server, [X[:, 0].sum()])


def test_a_transform_keeps_what_it_was_given():
    x, results = np.ones(2, np.float32), []
    for k in (1, 2):
        x[...] = k
        results.append(beam_runner.MapReduce(program(drjax.reduce_sum, 2), x))
    assert [float(through(result).server[0]) for result in results] == [2, 4]


def test_a_servers_argument_arrives_once():
    transform = functools.partial(beam_runner.MapReduce, loss, struct(W), X)
    for trees in ([], [W, W]):
        with pytest.raises(ValueError, match=f"argument 1(.|\n)*has {len(trees)}"):
            through(transform(), trees)


def test_no_elements_at_all():
    def of_none(fn):
        transform = beam_runner.MapReduce(program(fn), struct(X), any_number=True)
        return through(transform, []).server

    (total,) = of_none(drjax.reduce_sum)
    assert np.array_equal(total, np.zeros(3))
    with pytest.raises(ValueError, match="no elements at all"):
        of_none(drjax.reduce_max)


def test_building_a_pipeline_reads_and_runs_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError

    transform = beam_runner.MapReduce(loss, W, Slices(X))
    monkeypatch.setattr(Slices, "read", fail)
    pipeline = beam.Pipeline(runner=FnApiRunner())
    assert isinstance(pipeline | transform, beam_runner.Result)


def test_labels_are_those_of_the_program_and_stable():
    def two_rounds(w, x):
        return loss(w - jax.grad(loss)(w, x), x)

    def labels():
        pipeline = beam.Pipeline(runner=FnApiRunner())
        _ = pipeline | beam_runner.MapReduce(two_rounds, W, Slices(X))
        return [node.full_label for node in nodes(pipeline)]

    names = labels()
    assert names == labels()
    assert len({*names}) == len(names)
    assert any("Round over rows (2)" in name for name in names)


@pytest.mark.parametrize("on_bad", ["raise", "collect"])
@pytest.mark.parametrize("any_number", [False, True])
def test_no_collection_is_both_a_side_input_and_what_a_step_is_applied_to(
    on_bad, any_number
):
    """Beam's FnApiRunner would take steps in a wrong order, in some runs."""

    def two_rounds(w, x):
        return loss(w - jax.grad(loss)(w, x), x), doubled(x)

    doubled = program(lambda x: drjax.map_fn(lambda x: 2 * x, x))
    transform = beam_runner.MapReduce(
        two_rounds, W, struct(X), on_bad=on_bad, any_number=any_number
    )
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam.Create(indexed(X)) | transform
    main, side = set(), set()
    proto: Any = pipeline.to_runner_api()
    for node in proto.components.transforms.values():
        if node.spec.urn == "beam:transform:pardo:v1":
            payload = beam_runner_api_pb2.ParDoPayload.FromString(node.spec.payload)
            for tag, collection in node.inputs.items():
                (side if tag in payload.side_inputs else main).add(collection)
        elif not node.subtransforms:
            main.update(node.inputs.values())
    assert len(side) > 3
    assert not main & side


@pytest.mark.parametrize("on_bad", ["raise", "collect"])
def test_keys_are_coded_as_numbers(on_bad):
    """So that they are alike on all runners, and nothing is pickled to compare them."""
    pipeline = beam.Pipeline(runner=FnApiRunner())
    transform = beam_runner.MapReduce(
        loss, W, struct(X), chunk_size=1, on_bad=on_bad, any_number=True
    )
    _ = pipeline | beam.Create(indexed(X)) | transform
    proto: Any = pipeline.to_runner_api()
    parts = proto.components
    keys = {}
    for node in parts.transforms.values():
        is_ours = "Round over" in node.unique_name or "Argument" in node.unique_name
        if node.spec.urn == "beam:transform:group_by_key:v1" and is_ours:
            (collection,) = node.inputs.values()
            coder = parts.coders[parts.pcollections[collection].coder_id]
            key = parts.coders[coder.component_coder_ids[0]]
            keys[node.unique_name] = key.spec.urn
    assert any("Fold/Gather groups" in name for name in keys)
    beams = {name for name in keys if re.search("Reshuffle|CombinePerKey", name)}
    assert {keys[name] for name in keys.keys() - beams} == {"beam:coder:varint:v1"}


def test_resource_hints_reach_the_work():
    pipeline = beam.Pipeline(runner=FnApiRunner())
    transform = beam_runner.MapReduce(loss, W, Slices(X))
    _ = pipeline | transform.with_resource_hints(min_ram="7GB")
    proto: Any = pipeline.to_runner_api()
    hinted = [
        proto.components.environments[node.environment_id].resource_hints
        for node in proto.components.transforms.values()
        if node.unique_name.endswith("Map")
    ]
    assert hinted
    assert all(
        hints["beam:resources:min_ram_bytes:v1"] == b"7000000000" for hints in hinted
    )


def test_metrics_count_elements_and_bytes():
    details, again = (
        beam_runner.run_with_details(jax.grad(loss), W, X, chunk_size=5)
        for _ in range(2)
    )
    plan = drjax.make_plan(jax.grad(loss))(W, X)
    assert details.metrics["elements"] == plan.rounds * N
    assert details.metrics["bytes_up"] > 0
    assert details.metrics["bytes_down"] >= W.nbytes
    assert not again.metrics.get("compile_ms")  # Once in a process.


#
# Bad elements.
#
class Broken(Slices):
    def __init__(self, x, broken):
        super().__init__(x)
        self.broken = broken

    def read(self, low, high):
        for i in self.broken:
            if low <= i < high:
                raise OSError(f"no file for row {i}")
        return super().read(low, high)


def with_nan(*rows):
    x = X.copy()
    x[[*rows], 1] = np.nan
    return x


def test_a_bad_element_ends_the_run_with_its_index():
    with pytest.raises(beam_runner.BadElementError, match="element 11 of 'rows'"):
        beam_runner.run(loss, W, with_nan(11), chunk_size=5)
    text = r"element 11 of 'rows'(.|\n)*no file for row 11(.|\n)*in read"
    with pytest.raises(beam_runner.BadElementError, match=text):
        beam_runner.run(loss, W, Broken(X, [11]), chunk_size=5)


@pytest.mark.parametrize("chunk_size", [1, 5, N])
def test_bad_elements_are_left_out_of_all_rounds(chunk_size):
    """A value and its gradient are those of the others alone."""
    nan, broken = (0, 7, 8), (8, 9, 22)
    good = np.delete(X, [*{*nan, *broken}], axis=0)
    source = Broken(with_nan(*nan), broken)
    others = program(of_rows, len(good))
    fn = jax.value_and_grad
    details = beam_runner.run_with_details(
        fn(loss), W, source, chunk_size=chunk_size, on_bad="collect"
    )
    assert_close(details.result, fn(others)(W, good))
    assert [bad.index for bad in details.bad] == sorted({*nan, *broken})
    transform = beam_runner.MapReduce(
        fn(loss), W, source, chunk_size=chunk_size, on_bad="collect"
    )
    result = through(transform)
    assert_close(result.server, [fn(others)(W, good)])
    assert sorted({i for _, i, _ in result.bad}) == sorted({*nan, *broken})


def test_an_element_that_is_bad_in_the_second_round_only():
    def centre(x):
        mean = drjax.reduce_mean(x)
        inverse = drjax.map_fn(lambda x, m: 1 / (x - m), (x, drjax.broadcast(mean)))
        return mean, drjax.reduce_mean(inverse)

    centred = program(centre)
    x = np.array([*range(N)], np.float32)  # The mean is one of them.
    good = np.delete(x, N // 2)
    good = np.where(good == 0, -1, good)  # And then is not one again.
    x = np.insert(good, N // 2, good.mean())
    details = beam_runner.run_with_details(centred, x, on_bad="collect", chunk_size=4)
    assert [bad.index for bad in details.bad] == [N // 2]
    others = program(centre, N - 1)
    assert_close(details.result, others(good))
    result = through(beam_runner.MapReduce(centred, x, on_bad="collect", chunk_size=4))
    assert_close(result.server, [others(good)])


def test_what_a_later_round_gets_is_right_before_it_is_judged():
    """Were the mean that of five, 3, the second element would seem bad too."""

    def centre(x):
        mean = drjax.reduce_mean(x)
        return drjax.reduce_sum(drjax.map_fn(lambda x: 1 / (x - mean), x))

    x = np.array([np.nan, 3, 2, 5, 5], np.float32)
    want = program(centre, 4)(x[1:])
    centred = program(centre, 5)
    details = beam_runner.run_with_details(centred, x, on_bad="collect")
    assert [bad.index for bad in details.bad] == [0]
    assert_close(details.result, want)
    result = through(beam_runner.MapReduce(centred, x, on_bad="collect"))
    assert_close(result.server, [want])
    assert [index for _, index, _ in result.bad] == [0]


def test_placements_of_one_name_have_bad_elements_of_their_own():
    few, many = program(drjax.reduce_mean, 5), program(drjax.reduce_mean, 9)

    def both(x, y):
        return few(x), many(y)

    x, y = np.arange(5, dtype=np.float32), np.ones(9, np.float32)
    y[[3, 7]] = np.nan
    got = beam_runner.run(both, x, y, on_bad="collect")
    assert_close(got, (2.0, 1.0))
    got = through(beam_runner.MapReduce(both, x, y, on_bad="collect")).server
    assert_close(got, [(2.0, 1.0)])


def test_placed_results_of_bad_elements():
    rows = program(
        lambda x: (
            drjax.map_fn(lambda x: x / 2, x),
            drjax.map_fn(lambda x: jnp.int32(x[0] > 0) + 1, x),
        )
    )
    halves, signs = beam_runner.run(rows, with_nan(3), on_bad="collect", chunk_size=5)
    assert np.isnan(halves[3]).all()
    assert signs[3] == 0
    others = [i for i in range(N) if i != 3]
    assert np.array_equal(halves[np.array(others)], X[others] / 2)
    result = through(beam_runner.MapReduce(rows, with_nan(3), on_bad="collect"))
    assert sorted(i for i, _ in result.placed) == others


def test_infinities_that_mask_are_not_bad():
    @program
    def masked(x):
        is_in = drjax.placement_index() % 2 == 0
        return drjax.reduce_max(jnp.where(is_in[:, None], x, -jnp.inf))

    assert_close(beam_runner.run(masked, X, chunk_size=1), masked(X))


def test_a_sum_that_overflows_is_no_fault_of_an_element():
    x = np.full(N, 3e38, np.float32)
    total = beam_runner.run(program(drjax.reduce_sum), x, chunk_size=5)
    assert np.isposinf(total)


def test_if_all_are_bad_there_is_no_result():
    with pytest.raises(beam_runner.BadElementError, match="all 23 elements"):
        beam_runner.run(loss, W * np.nan, X, on_bad="collect")
    with pytest.raises(beam_runner.BadElementError, match="the server sends"):
        beam_runner.run(loss, W * np.nan, X)


#
# Rounds until a condition holds.
#
def step(state, x):
    w, _ = state
    value, gradient = jax.value_and_grad(loss)(w, x)
    return w - 0.5 * gradient, value


def run_steps(folder=None, rounds=6, x=X, step=step, **options):
    return beam_runner.iterate(
        step,
        (W, np.float32(np.inf)),
        x,
        until=lambda state: state[1] < 1e-6,
        max_rounds=rounds,
        checkpoint_dir=folder and str(folder),
        chunk_size=8,
        **options,
    )


def test_an_interrupted_iteration_goes_on_with_the_same_bits(tmp_path):
    whole = run_steps()
    assert (whole.rounds, whole.is_done) == (6, False)
    assert run_steps(tmp_path, rounds=4).rounds == 4
    assert len([*tmp_path.iterdir()]) == 2
    resumed = run_steps(tmp_path)
    assert same_bits(resumed.state, whole.state)
    assert resumed.metrics["elements"] == whole.metrics["elements"] / 3
    again = run_steps(tmp_path)
    assert same_bits(again.state, whole.state)
    assert not again.metrics


def test_until_is_looked_at_before_each_round():
    seen = []

    def until(state):
        seen.append(float(state))
        return state >= 3

    counted = program(lambda count, x: count + drjax.reduce_max(x))
    x = np.ones(N, np.float32)
    done = beam_runner.iterate(counted, np.float32(0), x, until=until, max_rounds=9)
    assert (float(done.state), done.rounds, done.is_done) == (3, 3, True)
    assert seen == [0, 1, 2, 3]


def test_checkpoints_of_another_run_or_damaged_ones_are_refused(tmp_path):
    run_steps(tmp_path, rounds=2)
    with pytest.raises(ValueError, match=r"another run: it\s+differs in arguments"):
        run_steps(tmp_path, x=X + 1)
    with pytest.raises(ValueError, match="differs in plan"):
        run_steps(tmp_path, step=lambda state, x: step((state[0] * 2, state[1]), x))
    (last,) = tmp_path.glob("round-00000002.npz")
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        run_steps(tmp_path)
    last.unlink()
    assert same_bits(run_steps(tmp_path).state, run_steps().state)


def test_a_step_is_to_give_a_state_like_its_own():
    with pytest.raises(TypeError, match="a state like the one"):
        run_steps(step=lambda state, x: step(state, x)[0])


KILLED = """
    import sys
    sys.path.insert(0, {tests!r})
    import numpy as np
    from test_beam import run_steps, same_bits
    print("begun", flush=True)
    state = run_steps(sys.argv[1], rounds=25).state
    np.savez(sys.argv[2], *state)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out.npz"
    script.write_text(textwrap.dedent(KILLED.format(tests=str(ROOT / "tests"))))
    command = [sys.executable, script, tmp_path / "checkpoints", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"}
    rng, kills = np.random.default_rng(0), 0
    while not out.exists():
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout
            process.stdout.readline()
            if kills < 4:
                time.sleep(rng.uniform(0.5, 4))
                process.send_signal(signal.SIGKILL)
                kills += 1
    with np.load(out) as arrays:
        assert same_bits([*arrays.values()], run_steps(rounds=25).state)


#
# Processes.
#
PROCESSES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    import beam_runner, drjax

    @drjax.program(rows=500)
    def loss(w, x):
        return drjax.reduce_mean(drjax.map_fn(lambda x: jnp.tanh(x @ w) ** 2, x))

    if __name__ == "__main__":
        x = np.random.default_rng(0).normal(size=(500, 40)).astype(np.float32)
        w = np.linspace(-1, 1, 40, dtype=np.float32)
        fn = jax.value_and_grad(loss)
        modes = {"direct_running_mode": "multi_processing", "direct_num_workers": 2}
        one = beam_runner.run(fn, w, x, chunk_size=10)
        two = beam_runner.run(fn, w, x, chunk_size=10, options=modes)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
            assert np.array_equal(a, b), (a, b)
        np.testing.assert_allclose(two[1], jax.jit(fn)(w, x)[1], rtol=1e-5, atol=1e-7)
        bad = x.copy()
        bad[123] = np.nan
        try:
            beam_runner.run(fn, w, bad, chunk_size=10, options=modes)
        except Exception as e:
            assert "element 123 of 'rows'" in str(e), e
        else:
            raise AssertionError
        print("same bits")
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_processes_compute_the_same_bits(tmp_path, devices):
    """Workers, which import neither this program nor JAX's settings, are set alike."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PROCESSES))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert "same bits" in done.stdout, done.stderr[-3000:]
    assert "numeric environment" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extremes", "fedavg", "key_for_each_client"])
@pytest.mark.parametrize("how", ["itself", "gradient"])
def test_programs_of_the_table_in_processes(name, how):
    (case,) = (case for case in PROGRAMS if str(case) == name)
    fn, xs = of_floats(case.run, case.args)
    fn = gradient(fn, every(xs)) if how == "gradient" else fn
    modes = {"direct_running_mode": "multi_processing", "direct_num_workers": 2}
    run = functools.partial(beam_runner.run, fn, *xs, chunk_size=2, on_bad="keep")
    got = run(options=modes)
    assert_close(got, jax.jit(fn)(*xs))
    assert same_bits(got, run())


#
# What is refused, before work starts.
#
def test_dask_is_refused_and_others_are_warned_of():
    with pytest.raises(ValueError, match="DaskRunner gives wrong results"):
        beam_runner.run(loss, W, X, runner="DaskRunner")

    class OtherRunner(FnApiRunner):
        pass

    class DaskRunner(FnApiRunner):  # By name: the real one needs Dask.
        pass

    with pytest.warns(UserWarning, match="not tested on OtherRunner"):
        beam_runner.run(loss, W, X, runner=OtherRunner())
    pipeline = beam.Pipeline(runner=DaskRunner())
    with pytest.raises(ValueError, match="DaskRunner gives wrong results"):
        _ = pipeline | beam_runner.MapReduce(loss, W, X)


def test_options_that_are_wrong():
    with pytest.raises(ValueError, match="chunk_size is a number"):
        beam_runner.run(loss, W, X, chunk_size=0)
    with pytest.raises(ValueError, match="on_bad is one of"):
        beam_runner.run(loss, W, X, on_bad="ignore")
    with pytest.raises(ValueError, match="options say --runner"):
        beam_runner.run(loss, W, X, options=["--runner=FlinkRunner"])
    with pytest.raises(TypeError, match="knows no options"):
        beam_runner.run(loss, W, X, options={"workers": 3})
    with pytest.raises(ValueError, match="'embedded', or one of Beam"):
        beam_runner.run(loss, W, X, runner="Embeded")
    with pytest.raises(ValueError, match="on_bad is one of"):
        beam_runner.MapReduce(loss, W, X, on_bad="skip")


def test_a_source_that_holds_data_or_is_not_placed():
    data = np.random.default_rng(0).normal(size=(5_000_000, 1))
    with pytest.raises(ValueError, match=r"pickles to 40 MB(.|\n)*__main__"):
        beam_runner.run(program(drjax.reduce_sum, len(data)), Slices(data))
    with pytest.raises(TypeError, match="does not use as placed"):
        beam_runner.run(loss, Slices(W), X)


def test_a_source_of_rows_that_differ():
    class Ragged(Slices):
        def read(self, low, high):
            return self.x[low:high, : 2 + (low == 0)]

    with pytest.raises(TypeError, match=r"read\(5, 10\) gives(.|\n)*float32\[5, 2\]"):
        beam_runner.run(loss, W, Ragged(X), chunk_size=5)


@pytest.mark.parametrize(
    "elements, message",
    [
        (indexed(X)[:-2], r"no element of argument 2 has the index 21; 2 are missing"),
        ([*indexed(X), (4, X[4])], "two elements of argument 2 have the index 4"),
        ([*indexed(X), (23, X[4])], "has the index 23, but there are 23"),
        ([*X], "has no index(.|\n)*from_parquet"),
        ([(f"row {i}", x) for i, x in enumerate(X)], "has no index"),
        ([(i, x[:2]) for i, x in enumerate(X)], r"float32\[3\], but is float32\[2\]"),
        ([(i, x + 1j) for i, x in enumerate(X)], "does not go into float32"),
    ],
)
def test_elements_that_do_not_fit(elements, message):
    transform = beam_runner.MapReduce(loss, W, struct(X), chunk_size=5)
    with pytest.raises((ValueError, TypeError), match=message):
        through(transform, elements)


@pytest.mark.parametrize(
    "chunks, message",
    [
        ([(0, X[:10])], "10 elements of argument 2 have arrived"),
        ([(0, X[:10]), (10, X[10:20]), (20, X[20:]), (0, X[:10])], "came twice"),
        ([(5, X[5:15])], "begin at multiples"),
        ([(0, X[:7])], "all but the last one are full"),
    ],
)
def test_chunks_that_do_not_fit(chunks, message):
    given = beam_runner.Chunks(struct(X), 10)
    with pytest.raises(ValueError, match=message):
        through(beam_runner.MapReduce(loss, W, given), chunks)


def test_windows_and_unbounded_collections_are_refused():
    pipeline = beam.Pipeline(runner=FnApiRunner())
    elements: Any = pipeline | beam.Create(indexed(X))
    windows = elements | beam.WindowInto(FixedWindows(10))
    transform = functools.partial(beam_runner.MapReduce, loss, W, struct(X))
    with pytest.raises(ValueError, match="not in the global window"):
        _ = windows | "a" >> transform()
    elements.is_bounded = False
    with pytest.raises(ValueError, match="unbounded"):
        _ = elements | "b" >> transform()


def test_arguments_that_arrive_are_counted():
    with pytest.raises(TypeError, match=r"to 1 PCollections(.|\n)*1, argument 2"):
        through(beam_runner.MapReduce(loss, struct(W), struct(X)), indexed(X))
    with pytest.raises(TypeError, match="neither all values nor all"):
        beam_runner.MapReduce(loss, W, {"a": X, "b": struct(X)})


def test_any_number_needs_a_plan_without_a_size():
    wrong = program(lambda x: drjax.reduce_sum(x * jnp.arange(N)[:, None]))
    with pytest.raises(ValueError, match="depends on how many 'rows'"):
        beam_runner.MapReduce(wrong, struct(X), any_number=True)
    with pytest.raises(ValueError, match="not all that is placed"):
        beam_runner.MapReduce(loss, W, X, any_number=True)


def test_workers_need_nothing_of_the_program():
    """They get StableHLO and numbers; no pickle refers to this module."""
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam_runner.MapReduce(jax.grad(loss), W, X)
    transforms = (node.transform for node in nodes(pipeline))
    pickles = [cloudpickle.dumps(x.fn) for x in transforms if hasattr(x, "fn")]
    strings = [
        {x for _, x, _ in pickletools.genops(data) if isinstance(x, str)}
        for data in pickles
    ]
    assert any("RunRange" in names for names in strings)
    assert not any(__name__ in names for names in strings)


def test_progress_of_two_rounds_comes_to_its_end(capsys):
    def two_rounds(w, x):
        return loss(w - jax.grad(loss)(w, x), x)

    beam_runner.run(two_rounds, W, X, chunk_size=5, progress=True)
    assert "10/10" in capsys.readouterr().out


def test_progress_shows_what_is_done(capsys):
    beam_runner.run(loss, W, X, chunk_size=5, progress=True)
    assert re.search(r"Pipeline 1 .*100%.* 5/5", capsys.readouterr().out)


def test_progress_of_rounds_is_one_bar(capsys):
    run_steps(rounds=2, progress=True)
    printed = capsys.readouterr().out
    assert re.search(r"Rounds .*100%.* 2/2", printed)
    assert "Pipeline" not in printed.splitlines()[-1]


def test_assert_that_works_on_results():
    """The results are ordinary PCollections of trees of NumPy arrays."""
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        largest = beam_runner.MapReduce(program(drjax.reduce_max), X[:, 0])
        result: Any = pipeline | largest
        assert_that(result.server | beam.Map(float), equal_to([float(X[:, 0].max())]))
