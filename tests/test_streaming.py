"""The streaming engine: the same results, in the memory of a few chunks."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax

import drjax
from drjax._rounds import Round

ROOT = Path(__file__).parents[1]
N = 23


def program(fn, n=N):
    return drjax.program(clients=n)(fn)


def loss(w, x):
    def of_client(x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    return drjax.reduce_mean(drjax.map_fn(of_client, x))


W = jax.random.normal(jax.random.key(0), (3, 2))
XS = jax.random.normal(jax.random.key(1), (N, 4, 3))


#
# Sums.
#
def test_a_sum_is_as_accurate_for_many_elements_as_for_few():
    """To a few units in the last place, where plain addition loses three digits."""
    n = 300_000
    x = np.random.default_rng(0).uniform(size=n).astype(np.float32)
    total = drjax.streaming(program(drjax.reduce_sum, n), 10)(x)
    exact = np.sum(x, dtype=np.float64)
    plain = functools.reduce(np.add, x, np.float32(0))
    eps = np.finfo(np.float32).eps
    assert abs(total - exact) <= 2 * eps * exact
    assert abs(plain - exact) > 20 * eps * exact


def test_what_cancels_later_is_not_lost():
    """Were it added up in float32, 1 would be lost in 1e8."""
    x = np.repeat(np.array([1e8, 1, -1e8, 1], np.float32), 8 * 8 * 5)
    total = drjax.streaming(program(drjax.reduce_sum, x.size), 5)(x)
    assert total == np.sum(x, dtype=np.float64)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.complex64])
def test_sums_of_other_types(dtype):
    """They are as exact as their type can tell."""
    x = np.random.default_rng(0).uniform(1, 3, size=5000).astype(dtype)
    if dtype is np.complex64:
        x *= 1 + 2j
    total = drjax.streaming(program(drjax.reduce_sum, x.size), 7)(x)
    assert total.dtype == dtype
    wide = np.complex128 if dtype is np.complex64 else np.float64
    exact = np.sum(x.astype(wide))
    assert abs(np.asarray(total).astype(wide) - exact) < jnp.finfo(dtype).eps * abs(
        exact
    )


def test_integers_wrap_around():
    x = np.full(100, 2**30, np.int32) + np.arange(100, dtype=np.int32)
    total = drjax.streaming(program(drjax.reduce_sum, x.size), 7)(x)
    assert total == np.sum(x, dtype=np.int32)


@pytest.mark.parametrize(
    "values, want",
    [
        ([np.inf, 1], np.inf),
        ([np.inf, -np.inf], np.nan),
        ([np.nan, 1], np.nan),
        ([3e38, 3e38], np.inf),
    ],
)
def test_sums_of_what_is_not_finite(values, want):
    x = np.array(values * 10, np.float32)
    total = drjax.streaming(program(drjax.reduce_sum, x.size), 3)(x)
    np.testing.assert_equal(np.asarray(total), np.float32(want))


def test_the_same_chunks_give_the_same_bits():
    x = jax.random.normal(jax.random.key(3), (N, 40, 3)) * 1e3
    run = drjax.streaming(jax.grad(program(loss)), 2)
    first = np.asarray(run(W, x)).tobytes()
    for _ in range(5):
        assert np.asarray(run(W, x)).tobytes() == first
    again = drjax.streaming(jax.grad(program(loss)), 2)
    assert np.asarray(again(W, np.asarray(x))).tobytes() == first


@pytest.mark.parametrize("size", [1, 2, N - 1, N, N + 1, None])
def test_any_size_of_chunks_gives_the_result(size):
    fn = jax.value_and_grad(program(loss), (0, 1))
    assert_close(drjax.streaming(fn, size)(W, XS), jax.jit(fn)(W, XS))


#
# Rewritten bodies.
#
def convolutional(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=numbers)
    h = lax.reduce_window(
        jax.nn.relu(h), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return jnp.mean((h.reshape(len(x), -1) @ p["b"]) ** 2)


def train(steps, p, x):
    def step(p, x):
        grads = jax.grad(convolutional)(p, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, p, grads), None

    def of_client(x):
        return lax.scan(step, p, x, length=steps)[0]

    return drjax.reduce_mean(drjax.map_fn(of_client, x))


P = {
    "a": jax.random.normal(jax.random.key(4), (3, 3, 1, 2)),
    "b": jax.random.normal(jax.random.key(5), (3 * 2 * 2, 2)),
}


@pytest.mark.parametrize("steps", [2, 300])
def test_rewritten_bodies_compute_the_same(steps):
    """With the loop unrolled, and with one too long for that."""
    n = 3
    x = jax.random.normal(jax.random.key(6), (n, steps, 2, 6, 4, 1)) / 10
    fn = program(functools.partial(train, steps), n)
    want = drjax.streaming(fn, 1, rewrite=False)(P, x)
    rewritten = drjax.streaming(fn, 1)
    assert_close(rewritten(P, x), want)
    assert_close(want, jax.jit(fn)(P, x))


def _windows(dimensions, strides, padding):
    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, dimensions, strides, padding)

    return pool


@pytest.mark.parametrize(
    "pool",
    [
        _windows((1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        _windows((1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
        _windows((1, 3, 2, 1), (1, 1, 3, 1), [(0, 0), (1, 0), (0, 2), (0, 0)]),
        _windows((1, 2, 2, 1), (1, 3, 3, 1), "VALID"),  # Some are in no window.
        _windows((2, 2, 2, 2), (2, 1, 2, 1), "SAME"),
    ],
)
def test_gradients_of_pooling_by_slices(pool):
    """Many numbers are equal, some are NaN or infinite."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, 2, 7, 9, 3)).astype(np.float32)
    x[0, 0, 0, 0, 0], x[1, 1, 2:4] = np.nan, -np.inf
    weights = rng.normal(size=jax.eval_shape(pool, x[0]).shape).astype(np.float32)

    def total(x):
        pooled = drjax.map_fn(lambda x: pool(x), x)
        return drjax.reduce_sum(drjax.map_fn(lambda y: jnp.sum(weights * y), pooled))

    fn = jax.grad(program(total, 2))
    assert "select_and_scatter" in str(jax.make_jaxpr(fn)(x))
    assert_close(drjax.streaming(fn, 1)(x), jax.jit(fn)(x))


#
# Elements that are read.
#
class Clients:
    """A lazily indexed source, that remembers what was read and in which thread."""

    def __init__(self, n=N):
        self.n, self.read, self.threads = n, [], set()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        self.threads.add(threading.current_thread().name)
        return {"x": np.asarray(XS)[i % N], "i": i}


class Restarting:
    """An iterable that can be read again."""

    def __init__(self):
        self.clients = Clients()

    def __iter__(self):
        return (self.clients[i] for i in range(N))


def of_clients(w, clients):
    """The model after a step of the clients, their mean loss then, and for each."""

    def step(c):
        grads = jax.grad(lambda w: jnp.mean(jnp.tanh(c["x"] @ w) ** 2))(w)
        return w - c["i"] * grads

    w = drjax.reduce_mean(drjax.map_fn(step, clients))
    losses = drjax.map_fn(lambda c: jnp.sum((c["x"] @ w) ** 2), clients)
    return w, drjax.reduce_mean(losses), losses


ALL = {"x": XS, "i": jnp.arange(N)}


@pytest.mark.parametrize("size", [1, 4, N])
@pytest.mark.parametrize("source", [Clients, Restarting, lambda: [*Restarting()]])
def test_elements_are_read_in_place_of_a_placed_argument(source, size):
    """In two rounds, the second of which needs the result of the first."""
    clients = drjax.Elements(source(), N)
    assert_close(
        drjax.streaming(program(of_clients), size)(W, clients),
        jax.jit(program(of_clients))(W, ALL),
    )


def test_an_iterator_is_read_once():
    def fn(clients):
        return drjax.reduce_sum(drjax.map_fn(lambda c: c["x"] * c["i"], clients))

    run = drjax.streaming(program(fn), 4)
    iterator = iter(Restarting())
    elements = drjax.Elements(iterator, N)
    assert_close(run(elements), jax.jit(program(fn))(ALL))
    with pytest.raises(ValueError, match="has been read already"):
        run(elements)
    with pytest.raises(ValueError, match="reads the elements more than once"):
        drjax.streaming(program(of_clients))(W, drjax.Elements(iter(Restarting()), N))


def test_elements_are_read_ahead_by_another_thread_and_not_far():
    clients = Clients(1000)
    run = drjax.streaming(program(lambda c: drjax.reduce_max(c["i"]), 1000), 10)
    far = []

    def watch(count):
        far.append(len(clients.read) - count)

    watched, finish = [0], Round.run

    def run_round(self, server, placed, fed, done):
        def counted(count):
            watched[0] += count
            watch(watched[0])
            done(count)

        return finish(self, server, placed, fed, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Round, "run", run_round)
        assert run(drjax.Elements(clients)) == 999
    assert max(far) <= 10 * 6 * max(1, 2 * (os.cpu_count() or 1))
    assert clients.threads - {threading.current_thread().name}
    assert not [t for t in threading.enumerate() if t.name.startswith("drjax")]


@pytest.mark.parametrize(
    "source, n, error",
    [
        (lambda: iter([1.0]), None, "is not known"),
        (lambda: [1.0, 2.0], 3, "n is 3, but the source has 2"),
        (lambda: 3.0, None, "a sequence"),
    ],
)
def test_a_source_that_is_none_is_an_error(source, n, error):
    with pytest.raises((TypeError, ValueError), match=error):
        drjax.Elements(source(), n)


@pytest.mark.parametrize(
    "rows, error",
    [
        ([np.ones(3)] * (N - 1) + [np.ones(4)], f"element {N - 1} is .*Elements are"),
        (
            [np.ones(3)] * (N - 1) + [{"x": np.ones(3)}],
            "Elements are trees of the same",
        ),
        (iter([np.ones(3)] * (N - 1)), f"ended after {N - 1} elements"),
        (iter([np.ones(3)] * (N + 1)), f"more than the {N} elements"),
        (iter([]), "has no element"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_bad_elements_are_an_error(rows, error):
    with pytest.raises(ValueError, match=error):
        drjax.streaming(program(drjax.reduce_sum), 4)(drjax.Elements(rows, N))
    assert not [t for t in threading.enumerate() if t.name.startswith("drjax")]


def test_what_a_source_raises_is_raised():
    class Broken(Clients):
        def __getitem__(self, i):
            if i == 17:
                raise OSError("client 17 is gone")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="client 17 is gone"):
        drjax.streaming(program(of_clients), 3)(W, drjax.Elements(Broken()))


def test_a_memory_map_is_read_and_closed_over_arrays_are_not_copied(tmp_path):
    x = np.asarray(XS, np.float64)  # JAX makes float32 of it, as under jit.
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    fn = jax.grad(program(loss))
    assert_close(drjax.streaming(fn, 4)(W, mapped), jax.jit(fn)(W, XS))


#
# Memory, and what is compiled.
#
PEAK = """
import resource, sys, threading
import jax, jax.numpy as jnp, numpy as np
import drjax

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

{setup}
warm()
before = megabytes()
run()
print(megabytes() - before)
"""


def peak_megabytes(setup):
    """By how much a call raises the peak of a new process's memory."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK.format(setup=textwrap.dedent(setup))],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert not result.returncode, result.stderr
    return float(result.stdout)


@pytest.mark.parametrize(
    "fn", ["train", "jax.grad(lambda *a: jnp.sum(train(*a) ** 2))"]
)
def test_local_training_needs_the_memory_of_a_few_elements(fn):
    """A million floats for each of 1000 clients: 4 GB for each step, all at once."""
    setup = f"""
    def round_(n):
        @drjax.program(clients=n)
        def train(w, x):
            def local(x):
                def step(w, _):
                    return w - 0.1 * jax.grad(lambda w: jnp.sum((w - x) ** 2))(w), None
                return jax.lax.scan(step, w, length=2)[0]
            return drjax.reduce_mean(drjax.map_fn(local, x))

        return drjax.streaming({fn})(jnp.zeros(1_000_000), jnp.ones(n))

    warm = lambda: round_(8).block_until_ready()
    run = lambda: round_(1000).block_until_ready()
    """
    assert peak_megabytes(setup) < 100


@pytest.mark.slow
@pytest.mark.parametrize("n", [1000, 100_000])
def test_memory_does_not_grow_with_the_number_of_elements(n):
    """10 kB for each of the elements, which are made when they are read."""
    setup = f"""
    def run(n={n}):
        @drjax.program(clients=n)
        def fn(w, x):
            return drjax.reduce_mean(drjax.map_fn(lambda x: jnp.sum((x - w) ** 2), x))
        rows = (np.full(2500, i % 7, np.float32) for i in range(n))
        w = jnp.ones(2500)
        drjax.streaming(jax.grad(fn))(w, drjax.Elements(rows, n)).block_until_ready()

    warm = lambda: run(100)
    """
    assert peak_megabytes(setup) < 100


def test_a_file_is_larger_than_the_memory_it_takes(tmp_path):
    """It has 250 MB, and two rounds read it. Pages of a mapped file would count."""
    n, width = 2500, 25_000
    with (tmp_path / "x").open("wb") as file:
        for i in range(n):
            np.full(width, i, np.float32).tofile(file)
    setup = f"""
    class File:
        shape, dtype, ndim = ({n}, {width}), np.dtype("float32"), 2

        def __getitem__(self, index):
            low, high, _ = index[0].indices({n})
            count = (high - low) * {width}
            start, path = low * {4 * width}, {str(tmp_path / "x")!r}
            return np.fromfile(path, "f4", count, offset=start).reshape(-1, {width})

    @drjax.program(clients={n})
    def fn(x):
        mean = drjax.reduce_mean(x)
        return drjax.reduce_max(drjax.map_fn(lambda x: jnp.max(x - mean), x))

    warm = lambda: drjax.streaming(fn, 20)(jnp.zeros(({n}, 1)))
    def run():
        assert np.isclose(drjax.streaming(fn, 20)(File()), {(n - 1) / 2})
    """
    assert peak_megabytes(setup) < 100


def test_what_is_expected_is_not_less_than_what_is_compiled_for():
    """XLA's own count of temporaries, for one chunk."""
    fn = jax.grad(program(loss, 400))
    w, x = jnp.ones((100, 100)), jnp.ones((400, 4, 100))
    for size in (1, 7, 100):
        run = drjax.streaming(fn, size)
        run(w, x)
        (engine,) = run._engines.values()
        for round_ in engine._rounds.values():
            chunks = round_.chunks
            steps = [c for key, c in round_._compiled.items() if key[0] == size]
            assert steps
            for step in steps:
                temporaries = step.memory_analysis().temp_size_in_bytes
                assert temporaries * chunks.lanes <= chunks.bytes
                assert chunks.bytes < 20 * (temporaries + w.nbytes) * chunks.lanes


def test_a_second_call_compiles_nothing_and_a_round_at_most_two_chunks():
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/backend_compile_duration"):
            compiled.append(event)

    run, others = drjax.streaming(jax.grad(program(loss)), 4), (W + 1, XS * 2)
    run(W, XS)
    (engine,) = run._engines.values()
    (round_,) = engine._rounds.values()
    sizes = [key[0] for key in round_._compiled if isinstance(key[0], int)]
    assert sorted(sizes) == [N % 4, 4]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(W, XS)
        run(*others)
        assert not compiled
        run(W, np.asarray(XS)[:, :2])  # Of another shape.
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_settings_of_jax_are_those_of_the_call():
    """Also in the threads, and after a call with others."""
    run = drjax.streaming(program(loss), 2)
    narrow = run(W, XS)
    with jax.enable_x64(True):
        wide = run(np.asarray(W, np.float64), np.asarray(XS, np.float64))
        want = jax.jit(program(loss))(*(np.asarray(x, np.float64) for x in (W, XS)))
    assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(wide, want, rtol=1e-14)
    assert run(W, XS) == narrow


#
# Effects, errors, and interruption.
#
@pytest.mark.parametrize("size", [1, 2, 4, None])
def test_effects_happen_once_for_each_element(size):
    seen = []

    def fn(x):
        def show(i, x):
            jax.debug.callback(lambda i: seen.append(int(i)), i)
            return x

        return drjax.reduce_sum(drjax.map_fn(show, (drjax.placement_index(), x)))

    drjax.streaming(program(fn), size)(jnp.ones(N))
    jax.effects_barrier()
    assert sorted(seen) == [*range(N)]
    if size in (1, None):
        assert seen == sorted(seen)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax.jit(drjax.streaming(program(loss)))(W, XS),
        lambda: jax.grad(drjax.streaming(program(loss)))(W, XS),
        lambda: jax.vmap(drjax.streaming(program(loss)), (0, None))(W[None], XS),
        lambda: jax.grad(lambda w: drjax.streaming(lambda: program(loss)(w, XS))())(W),
        lambda: jax.jit(lambda: drjax.streaming(program(loss))(W, XS))(),
    ],
)
def test_a_transformed_one_is_an_error_that_says_the_order(call):
    with pytest.raises(TypeError, match=r"drjax\.streaming\(jax\.grad\("):
        call()


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "all"])
def test_a_chunk_size_that_is_none_is_an_error(size):
    with pytest.raises(ValueError, match="chunk_size"):
        drjax.streaming(program(loss), size)


INTERRUPTED = """
import sys, threading, time
import jax.numpy as jnp, numpy as np
import drjax

n = 10**6
def rows():
    for i in range(n):
        if i == 100:
            print("reading", flush=True)
        time.sleep(0.001)
        yield np.float32(i)

run = drjax.streaming(drjax.program(clients=n)(drjax.reduce_sum), 10, progress=True)
try:
    run(drjax.Elements(rows(), n))
except KeyboardInterrupt:
    alive = [t.name for t in threading.enumerate() if t.name.startswith("drjax")]
    print("interrupted", alive, flush=True)
"""


def test_ctrl_c_stops_reading_and_leaves_no_thread():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("reading" in line for line in lines)
    rest = None
    while rest is None:  # Python drops an interrupt that meets a finalizer.
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            rest, _ = process.communicate(timeout=20)
    assert "interrupted []" in rest
    assert process.returncode == 0


def test_progress_is_shown_for_each_round(capsys):
    drjax.streaming(program(loss), 4, progress=True)(W, XS)
    shown = capsys.readouterr().out
    assert "clients" in shown
    assert f"{N}/{N}" in shown


def test_what_it_chose_is_said_and_the_same_each_time():
    def explain(w, x):
        return drjax.streaming(jax.grad(program(loss))).explain(w, x)

    assert explain(W, XS) == explain(W + 1, XS * 2)
    assert "round over 'clients', 23 elements: 1 chunk of 23" in explain(W, XS)
    assert (
        drjax.streaming(program(loss), 5)
        .explain(W, XS)
        .startswith("round over 'clients', 23 elements: 5 chunks of 5")
    )
    assert drjax.streaming(jnp.sin).explain(1.0).startswith("no round")


#
# Arguments that are not read by a round alone.
#
def test_elements_whose_placement_is_on_another_axis_are_read_at_once():
    def fn(x):
        return drjax.map_fn(jnp.sum, x.T)

    x = np.arange(25, dtype=np.float32).reshape(5, 5)
    run = drjax.streaming(program(fn, 5))
    assert_close(run(drjax.Elements([*x])), jax.jit(program(fn, 5))(x))


def rounds_in_a_scan(xs):
    """A scan over all elements, which it also gives back."""

    def step(total, x):
        placed = drjax.map_fn(lambda i: i * x, drjax.placement_index())
        return total + drjax.reduce_sum(placed), x

    return lax.scan(step, 0.0, xs)


def test_elements_may_be_needed_as_a_whole():
    rows = np.arange(N, dtype=np.float32)
    fn = program(rounds_in_a_scan)
    want = jax.jit(fn)(rows)
    assert_close(drjax.streaming(fn)(drjax.Elements([*rows])), want)
    assert_close(drjax.streaming(fn)(drjax.Elements(iter(rows), N)), want)

    def twice(x):
        return drjax.reduce_sum(x), x

    got = drjax.streaming(program(twice))(drjax.Elements(iter(rows), N))
    assert_close(got, (rows.sum(), rows))


@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_of_the_host_in_a_scan_over_rounds(axis, tmp_path):
    """Each round reads its part of the file; the elements are on either axis."""

    def fn(xs):
        def step(total, x):
            placed = drjax.map_fn(jnp.sin, jnp.moveaxis(x, axis, 0))
            return total + jnp.sum(drjax.reduce_sum(placed)), None

        return lax.scan(step, 0.0, xs)[0]

    x = np.random.default_rng(0).normal(size=(3, N, N)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_close(drjax.streaming(program(fn), 4)(mapped), jax.jit(program(fn))(x))


#
# What a sum must not lose.
#
def test_halves_are_scaled_before_they_overflow():
    """As gradients of a scaled loss are."""

    def fn(a, g):
        return drjax.reduce_sum(drjax.map_fn(lambda a, g: (a.T @ g) / 1024, (a, g)))

    a, g = jnp.full((8, 4, 3), 4, jnp.float16), jnp.full((8, 4, 2), 2000, jnp.float16)
    for size in (1, 3, 8):
        assert (drjax.streaming(program(fn, 8), size)(a, g) == 250).all()


def test_a_change_is_not_lost_in_what_was_changed():
    """The mean of (w - g) - w, in which w is ten thousand times as large as g."""

    def fn(w, x):
        def change(w, x):
            return (w - 1e-3 * x.T @ (x @ w - 1)) - w

        return drjax.reduce_mean(drjax.map_fn(change, (drjax.broadcast(w), x)))

    n = 512
    rng = np.random.default_rng(0)
    x = (1e-2 * rng.normal(size=(n, 2, 3))).astype(np.float32)
    w = (100 * rng.normal(size=(3, 3))).astype(np.float32)
    wide = x.astype(float)
    exact = -1e-3 * np.einsum("nij,nik->jk", wide, wide @ w.astype(float) - 1) / n

    def error(got):
        return np.abs(got - exact).max()

    want = error(jax.jit(program(fn, n))(w, x))
    assert error(drjax.streaming(program(fn, n), n)(w, x)) <= 1.5 * want


def test_floats_of_eight_bits():
    x = jnp.ones(100, jnp.float8_e4m3fn)
    assert drjax.streaming(program(drjax.reduce_sum, 100), 7)(x) == 96  # Or 104.
    with jax.numpy_dtype_promotion("strict"):
        x = jnp.ones(100, jnp.bfloat16)
        assert drjax.streaming(program(drjax.reduce_sum, 100), 7)(x) == 100


#
# As functions are.
#
def test_it_may_be_a_method():
    class Model:
        w = W

        @drjax.streaming
        def loss(self, x):
            return program(loss)(self.w, x)

    with pytest.raises(TypeError, match="Model"):  # As jit says of such an argument.
        Model().loss(XS)


def test_arguments_on_the_device_stay_there():
    run = drjax.streaming(jax.grad(program(loss)), np.int64(4))  # pyright: ignore
    want = run(W, XS)
    with jax.transfer_guard("disallow"):
        got = run(W, XS)
    assert_close(got, want)
