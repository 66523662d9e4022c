"""The Beam engine beside hand-written JAX, beside a naive pipeline, and what it adds.

What a pipeline takes however few elements it has is a figure of its own, and apart from
the others: these give the seconds of all elements less those of a third of them, over
the number of elements between; of ours, and of what it is compared with. (Two chunks
would be too few: at the end of a long bundle, Beam's sampler of states sleeps for up to
0.2 s.)
"""

import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from jax.flatten_util import ravel_pytree

import beam_runner
import drjax
from beam_runner._exports import exported_full, exported_round
from benchmarks.core import Clock, Row, clock, compare
from drjax.plan import MapReduce, Server

ROWS = 20_000  # That a process holds: a source repeats them. Chunks divide it.


#
# Data, and what is computed of them: of one element, and of a chunk by hand.
#
@functools.cache
def _rows(width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, width)).astype(np.float32)
    return x, rng.integers(0, 10, ROWS, np.int32)


class Repeated:
    """Vectors, with labels, which cost next to nothing to read."""

    def __init__(self, num_elements: int, width: int):
        self.num_elements, self.width = num_elements, width

    def read(self, low: int, high: int) -> Any:
        x, y = _rows(self.width)
        first = low % ROWS
        return x[first : first + high - low], y[first : first + high - low]


def _params() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(keys[0], (784, 200)) / 28,
        "hidden bias": jnp.zeros(200),
        "out": jax.random.normal(keys[1], (200, 10)) / 200**0.5,
        "out bias": jnp.zeros(10),
    }


def _loss(p: Any, x: Any, y: Any) -> Any:
    """Of one example, or the sum of many."""
    hidden = jnp.tanh(x @ p["hidden"] + p["hidden bias"])
    log_p = jax.nn.log_softmax(hidden @ p["out"] + p["out bias"])
    return -jnp.sum(jnp.take_along_axis(log_p, y[..., None], -1))


def _gradient(n: int) -> Callable[..., Any]:
    @drjax.program(examples=n)
    def loss(params, data):
        return drjax.reduce_mean(drjax.map_fn(functools.partial(_loss, params), data))

    return jax.grad(loss)


def _moments(n: int) -> Callable[..., Any]:
    @drjax.program(examples=n)
    def moments(data):
        pairs = drjax.map_fn(lambda x, _: (x, jnp.outer(x, x)), data)
        return _centred(*drjax.reduce_mean(pairs))

    return moments


def _centred(mean: Any, second: Any) -> Any:
    return mean, second - jnp.outer(mean, mean)


def _sums_of_chunk(x: Any, _: Any) -> Any:
    return jnp.sum(x, axis=0), x.T @ x


def _by_hand(of_chunk: Callable[..., Any], args: Any, n: int, source: Any, size: int):
    """The mean of what is computed of chunks; one runs while the next one is read."""
    add = _adding(of_chunk)
    zero = jax.eval_shape(of_chunk, *args, *source.read(0, 1))
    total = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), zero)
    for low in range(0, n, size):
        total = add(total, *args, *source.read(low, min(low + size, n)))
    return jax.tree.map(lambda t: t / n, total)


@functools.cache
def _adding(of_chunk: Callable[..., Any]) -> Callable[..., Any]:
    def add(total, *args):
        return jax.tree.map(jnp.add, total, of_chunk(*args))

    return jax.jit(add, donate_argnums=0)


#
# The naive pipeline: element by element, each result a vector.
#
@jax.jit
def _gradient_vector(params: Any, x: Any, y: Any) -> Any:
    return ravel_pytree(jax.grad(_loss)(params, x, y))[0]


@jax.jit
def _moments_vector(x: Any, _: Any) -> Any:
    return ravel_pytree((x, jnp.outer(x, x)))[0]


def _gradient_of_one(params: Any, row: Any) -> np.ndarray:
    return np.asarray(_gradient_vector(params, *row))


def _moments_of_one(row: Any) -> np.ndarray:
    return np.asarray(_moments_vector(*row))


def _naive(of_one: Callable[..., Any], width: int, n: int) -> None:
    x, y = Repeated(n, width).read(0, n)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        rows = pipeline | beam.Create([*zip(x, y, strict=True)])
        _ = rows | beam.Map(of_one) | beam.CombineGlobally(sum)


#
# Figures.
#
def _each(run: Callable[[int], Any], few: int, many: int) -> Clock:
    """Seconds of an element, the start apart; `run` runs some number of them."""

    def seconds() -> list[float]:
        times = [clock(run, n)()[0] for n in (few, many)]
        return [(times[1] - times[0]) / (many - few)]

    return seconds


def _check(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def beam_gradient(repeats: int) -> Iterator[Row]:
    """The gradient of a model's mean loss over 600,000 examples."""
    n, size, width, params = 600_000, 1000, 784, _params()

    def ours(n):
        source = Repeated(n, width)
        return beam_runner.run(_gradient(n), params, source, chunk_size=size)

    def by_hand(n):
        return _by_hand(jax.grad(_loss), (params,), n, Repeated(n, width), size)

    naive = functools.partial(_naive, functools.partial(_gradient_of_one, params), 784)
    _check(ours(5000), by_hand(5000))
    yield from _rows_of("MLP gradient", (ours, by_hand, naive), n, 0.8, repeats)


def beam_moments(repeats: int) -> Iterator[Row]:
    """Mean and covariance of a million vectors of 64, in one round."""
    n, size, width = 1_000_000, 10_000, 64

    def ours(n):
        return beam_runner.run(_moments(n), Repeated(n, width), chunk_size=size)

    def by_hand(n):
        return _centred(*_by_hand(_sums_of_chunk, (), n, Repeated(n, width), size))

    naive = functools.partial(_naive, _moments_of_one, width)
    _check(ours(15_000), by_hand(15_000))
    runs = ours, by_hand, naive
    yield from _rows_of("Mean and covariance", runs, n, 0.5, repeats)


def _rows_of(name: str, runs: Any, n: int, share: float, repeats: int) -> Iterator[Row]:
    """Seconds of an element: ours beside JAX in one process, and beside naive Beam.

    A repeat is one run of each.
    """
    ours, by_hand, naive = runs
    title = f"{name}, an element of {n:,}, beside JAX over chunks"
    clocks = _each(ours, n // 3, n), _each(by_hand, n // 3, n)
    yield from compare([title], clocks, 1 / share, repeats, seconds=0)
    title = f"{name}, an element, beside Beam element by element"
    clocks = _each(ours, n // 3, n), _each(naive, 10, 1010)
    yield from compare([title], clocks, 1 / 60, repeats, seconds=0)


def beam_start(repeats: int) -> Iterator[Row]:
    """A pipeline over eight elements, and more rounds in it, all compiled before."""
    x = np.ones(8, np.float32)

    def program(rounds):
        @drjax.program(examples=8)
        def run(w, x):
            for _ in range(rounds):
                w = drjax.broadcast(w)
                w = drjax.reduce_mean(drjax.map_fn(lambda w, x: w * x, (w, x)))
            return w

        return run

    def export(rounds):
        plan = drjax.make_plan(program(rounds))(np.float32(1), x).recomputed()
        for stage in plan.stages:
            if isinstance(stage, Server):
                stage.export()
            elif isinstance(stage, MapReduce):
                exported_round(stage, 8)
                exported_full(stage, 8)

    def ours(rounds):
        return beam_runner.run(program(rounds), np.float32(1), x)

    runs = [
        clock(fn, rounds) for rounds in (1, 5) for fn in (lambda k: ours(k), export)
    ]
    # The first time of all is left out: it compiles.
    times = np.array([[run()[0] for run in runs] for _ in range(repeats + 1)])[1:]
    one, export_one, five, _ = times.T
    yield _below("A pipeline of one round", one, 0.3)
    yield _below("of it: planned and exported", export_one, 0.3)
    yield _below("A further round, and the server's step", (five - one) / 4, 0.1)


def _below(name: str, seconds: np.ndarray, limit: float) -> Row:
    ratios = (seconds / limit).tolist()
    return Row(name, float(np.median(seconds)), limit, "s", ratios, 1)


def beam_broadcast(repeats: int) -> Iterator[Row]:
    """A value of 400 MB that goes to all elements."""
    x = np.ones(8, np.float32)
    w = np.random.default_rng(0).random(100_000_000, np.float32)

    @drjax.program(examples=8)
    def program(w, x):
        return drjax.reduce_sum(drjax.map_fn(lambda x: w[:2] * x, x))

    def seconds() -> list[float]:
        times = [clock(beam_runner.run, program, v, x)()[0] for v in (w[:2], w)]
        return [times[1] - times[0]]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value"
        w.tofile(path)

        def read() -> list[float]:
            start = time.perf_counter()
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256").digest()
            return [time.perf_counter() - start]

        title = "400 MB to all elements, beside reading and hashing it"
        yield from compare([title], (seconds, read), 2, repeats)


FIGURES: dict[str, Callable[[int], Iterator[Row]]] = {
    fn.__name__: fn for fn in (beam_gradient, beam_moments, beam_start, beam_broadcast)
}
