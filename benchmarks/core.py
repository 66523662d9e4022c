"""What a drjax program costs beside the same program in plain JAX.

A figure is a function that yields rows. The speed of a machine changes from second to
second, so times are taken alternately in one process and compared as ratios only.

As a script, `core.py FIGURE REPEATS`, run by the Python of another environment, it
prints the rows of a `SHARED` figure for that environment's drjax, as JSON.
"""

import dataclasses
import functools
import itertools
import json
import logging
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import drjax

Fn = Callable[..., Any]
Clock = Callable[[], list[float]]  # Runs something; returns how long its parts took.


@dataclasses.dataclass
class Row:
    """Ours, the plain measurement, and the ratio of the two in each repeat."""

    name: str
    ours: float
    plain: float
    unit: str
    ratios: list[float]
    bar: float

    @property
    def ratio(self) -> float:
        return float(np.median(self.ratios))


def both(n: int, program: Fn) -> tuple[Fn, Fn]:
    """A function `(operators, *args)` with drjax's operators, and with plain JAX's."""

    def on_leaves(fn):
        return lambda x: fn(x) if hasattr(x, "shape") else jax.tree.map(fn, x)

    plain = types.SimpleNamespace(
        broadcast=on_leaves(lambda x: jnp.broadcast_to(x, (n, *x.shape))),
        map_fn=lambda fn, x: jax.vmap(fn)(*(x if isinstance(x, tuple) else (x,))),
        reduce_sum=on_leaves(lambda x: jnp.sum(x, axis=0)),
        reduce_mean=on_leaves(lambda x: jnp.mean(x, axis=0)),
        reduce_max=on_leaves(lambda x: jnp.max(x, axis=0)),
    )
    ours = drjax.program(clients=n)(lambda *args: program(drjax, *args))
    return ours, lambda *args: program(plain, *args)


def clock(fn: Fn, *args: Any) -> Clock:
    def run() -> list[float]:
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        return [time.perf_counter() - start]

    return run


def compare(
    names: Sequence[str], fns: Iterable[Clock], bar: float, repeats: int, seconds=0.2
) -> Iterator[Row]:
    """Times ours and plain alternately; one row for each part that they tell apart.

    A repeat takes about `seconds`, or one run of each.
    """
    ours, plain = fns
    _ = ours(), plain()  # Fills the caches.
    runs = int(np.clip(seconds / (sum(ours()) + sum(plain())), 1, 100))
    times = np.empty((2, repeats, runs, len(names)))
    for i, j in np.ndindex(repeats, runs):
        times[0, i, j] = ours()
        times[1, i, j] = plain()
    medians = np.median(times, axis=2)
    ratios = medians[0] / medians[1]
    for k, name in enumerate(names):
        a, b = np.median(medians[:, :, k], axis=1)
        yield Row(name, float(a), float(b), "s", ratios[:, k].tolist(), bar)


def compare_compiled(name: str, fns: Any, args: Any, repeats: int) -> Iterator[Row]:
    """Checks that two functions agree; compares run time and temporaries."""
    ours, plain = (jax.jit(fn).lower(*args).compile() for fn in fns)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-5)
    jax.tree.map(assert_close, ours(*args), plain(*args))
    clocks = clock(ours, *args), clock(plain, *args)
    yield from compare([name], clocks, 1.1, repeats)
    memory: list[Any] = [ours.memory_analysis(), plain.memory_analysis()]
    a, b = (float(m.temp_size_in_bytes) for m in memory)
    yield Row(f"{name}: temporaries", a, b, "B", [a / b if b else 1 + a], 1.1)


def gradients(repeats: int) -> Iterator[Row]:
    """Derivatives with respect to a matrix that every element uses."""

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def closed_over(ops, w, x):
        return ops.reduce_mean(ops.map_fn(lambda x: loss(w, x), x))

    def broadcast(ops, w, x):
        return ops.reduce_mean(ops.map_fn(loss, (ops.broadcast(w), x)))

    def hvp(fn):
        return lambda w, x: jax.jvp(lambda w: jax.grad(fn)(w, x), (w,), (w,))[1]

    def grad_of_grad(fn):
        return jax.grad(lambda w, x: jnp.sum(jax.grad(fn)(w, x) ** 2))

    def vmap_of_grad(fn):
        return jax.vmap(jax.grad(fn), (None, 0))

    # A matrix broadcast by hand is slow in plain JAX too: XLA:CPU writes out n copies.
    for program, n, width in ((closed_over, 256, 512), (broadcast, 64, 256)):
        w = jax.random.normal(jax.random.key(0), (width, width)) / width**0.5
        x = jax.random.normal(jax.random.key(1), (2, n, 8, width))
        for name, transform, args in (
            ("gradient", jax.grad, (w, x[0])),
            ("Hessian-vector product", hvp, (w, x[0])),
            ("gradient of gradient", grad_of_grad, (w, x[0])),
            ("vmap of gradient", vmap_of_grad, (w, x)),
        ):
            name = f"{name}, {program.__name__.replace('_', ' ')}"
            fns = map(transform, both(n, program))
            yield from compare_compiled(name, fns, args, repeats)


def compilation(repeats: int) -> Iterator[Row]:
    """Tracing, lowering and compiling 102 operators."""
    x = jnp.ones(16)

    def program(factors):
        def run(ops, x):
            for f in factors:
                x = ops.map_fn(lambda v, f=f: jnp.sin(v) * f, ops.broadcast(x))
                x = ops.reduce_mean(x)
            return x

        return run

    def stages(fn: Fn) -> Clock:
        def run() -> list[float]:
            jitted: Any = jax.jit(lambda x: fn(x))  # No cache knows it.
            times, stage = [time.perf_counter()], jitted.trace(x)
            times.append(time.perf_counter())
            for step in ("lower", "compile"):
                stage = getattr(stage, step)()
                times.append(time.perf_counter())
            return [times[-1] - times[0], *np.diff(times).tolist()]

        return run

    def grad(fn: Fn) -> Fn:
        return jax.grad(lambda x: jnp.sum(fn(x)))

    # A body that is traced again costs nothing more, so look at different ones too.
    for name, transform, factors in (
        ("102 operators", lambda fn: fn, [2] * 34),
        ("102 different operators", lambda fn: fn, range(34)),
        ("gradient of 102 operators", grad, [2] * 34),
        ("gradient of 102 different operators", grad, range(34)),
    ):
        names = [name, *(f"{name}: {step}" for step in ("trace", "lower", "compile"))]
        clocks = (stages(transform(fn)) for fn in both(8, program(factors)))
        yield from compare(names, clocks, 1.1, repeats, seconds=0.6)


def eager(repeats: int) -> Iterator[Row]:
    """Operators called one by one, under no transformation."""
    calls, x, w = 20, jnp.ones((8, 16)), jnp.ones(16)
    tree = {f"leaf{i}": x + i for i in range(20)}

    def affine(tree):
        return jax.tree.map(lambda v: v * 2 + 1, tree)

    cases: dict[str, Fn] = {
        "broadcast": lambda ops, x: ops.broadcast(x),
        "map_fn": lambda ops, x: ops.map_fn(affine, x),
        "map_fn of a new lambda": lambda ops, x: ops.map_fn(lambda v: affine(v), x),
        "reduce_sum": lambda ops, x: ops.reduce_sum(x),
        "reduce_mean": lambda ops, x: ops.reduce_mean(x),
        "reduce_max": lambda ops, x: ops.reduce_max(x),
    }
    for (name, call), (what, arg) in itertools.product(
        cases.items(), (("array", x), ("20 leaves", tree))
    ):
        if hasattr(drjax, name.split()[0]):  # reduce_max is new.
            program = functools.partial(_repeated, call, calls)
            clocks = (clock(fn, arg) for fn in both(8, program))
            for row in compare([f"{name}, {what}"], clocks, 1.5, repeats):
                row.ours, row.plain = row.ours / calls, row.plain / calls
                yield row
    for name, transform in (("3 operators", lambda f: f), ("their gradient", jax.grad)):
        clocks = (clock(transform(fn), w, x) for fn in both(8, three_operators))
        yield from compare([name], clocks, 1.5, repeats)


def _repeated(call, calls, ops, x):
    return [call(ops, x) for _ in range(calls)]


def three_operators(ops, w, x):
    placed = ops.map_fn(lambda w, x: jnp.tanh(w * x), (ops.broadcast(w), x))
    return jnp.sum(ops.reduce_mean(placed))


def compilations(repeats: int) -> Iterator[Row]:
    """How many a second identical call needs."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        events.append(event)

    def count(fn: Fn) -> int:
        for _ in range(2):
            events.clear()
            jax.block_until_ready(fn(jnp.ones(16), jnp.ones((8, 16))))
        return sum(event.endswith("/backend_compile_duration") for event in events)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert count(lambda *_: jax.jit(lambda x: x + 1)(1.0)) == 1, "nothing listens"
        for name, transform in (
            ("eager", lambda fn: fn),
            ("eager gradient", jax.grad),
            ("eager vmap", lambda fn: jax.vmap(fn, (None, None), axis_size=2)),
            ("jit", jax.jit),
            ("jit of gradient", lambda fn: jax.jit(jax.grad(fn))),
        ):
            ours, plain = (count(transform(fn)) for fn in both(8, three_operators))
            yield Row(f"second call, {name}: compilations", ours, plain, "", [ours], 0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def fedavg(repeats: int) -> Iterator[Row]:
    """A round of federated averaging, and its gradients in the learning rates."""
    n, sizes, key = 50, [784, 200, 10], jax.random.key(0)
    params = [
        (jax.random.normal(key, (i, o)) / i**0.5, jnp.zeros(o))
        for i, o in itertools.pairwise(sizes)
    ]
    x = jax.random.normal(key, (n, 5, 10, 784))  # Five batches of ten for each client.
    y = jax.random.randint(key, (n, 5, 10), 0, 10)

    def loss(params, x, y):
        (w, b), (v, c) = params
        log_p = jax.nn.log_softmax(jnp.tanh(x @ w + b) @ v + c)
        return -jnp.mean(jnp.take_along_axis(log_p, y[..., None], -1))

    def program(ops, server_rate, client_rate, params, x, y):
        def update(x, y):
            def step(p, batch):
                grads = jax.grad(loss)(p, *batch)
                return jax.tree.map(lambda p, g: p - client_rate * g, p, grads), None

            new, _ = jax.lax.scan(step, params, (x, y))
            return jax.tree.map(jnp.subtract, new, params)

        mean = ops.reduce_mean(ops.map_fn(update, (x, y)))
        return jax.tree.map(lambda p, u: p + server_rate * u, params, mean)

    def gradient(argnum):
        return lambda fn: jax.grad(lambda *a: loss(fn(*a), x[0], y[0]), argnum)

    for name, transform in (
        ("FedAvg round", lambda fn: fn),
        ("FedAvg gradient, server rate", gradient(0)),
        ("FedAvg gradient, client rate", gradient(1)),
    ):
        fns = map(transform, both(n, program))
        yield from compare_compiled(name, fns, (1.0, 0.1, params, x, y), repeats)


def convolutions(repeats: int) -> Iterator[Row]:
    """A round of a convolutional network, beside the same with grouped convolutions."""
    n, key = 16, jax.random.key(0)
    shapes = {"a": (3, 3, 1, 16), "b": (3, 3, 16, 32), "dense": (7 * 7 * 32, 10)}
    params = {
        name: jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5
        for name, shape in shapes.items()
    }
    x = jax.random.normal(key, (n, 2, 8, 28, 28, 1))  # Two batches for each client.
    y = jax.random.randint(key, (n, 2, 8), 0, 10)

    def layer(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        b, h, w, c = x.shape
        return jnp.tanh(x).reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))

    def loss(p, x, y):
        features = layer(layer(x, p["a"]), p["b"])
        log_p = jax.nn.log_softmax(features.reshape(len(x), -1) @ p["dense"])
        return -jnp.mean(jnp.take_along_axis(log_p, y[..., None], -1))

    def round_(as_matmuls):
        @drjax.program(clients=n, convolutions_as_matmuls=as_matmuls)
        def run(params, x, y):
            def update(x, y):
                def step(p, batch):
                    grads = jax.grad(loss)(p, *batch)
                    return jax.tree.map(lambda p, g: p - 0.1 * g, p, grads), None

                return jax.lax.scan(step, params, (x, y))[0]

            return drjax.reduce_mean(drjax.map_fn(update, (x, y)))

        return run

    def gradient(fn):
        return jax.grad(lambda params, x, y: loss(fn(params, x, y), x[0, 0], y[0, 0]))

    for name, transform in (("round", lambda fn: fn), ("gradient of it", gradient)):
        name = f"convolutional network, {name}"
        fns = (transform(round_(as_matmuls)) for as_matmuls in (True, False))
        yield from compare_compiled(name, fns, (params, x, y), repeats)


FIGURES: dict[str, Callable[[int], Iterator[Row]]] = {
    fn.__name__: fn
    for fn in (gradients, compilation, eager, compilations, fedavg, convolutions)
}
SHARED = ("compilation", "eager")  # Their operators are in drjax since 0.2.

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # drjax 0.2 logs one at nearly every operator.
    rows = FIGURES[sys.argv[1]](int(sys.argv[2]))
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
