"""The streaming engine beside hand-written JAX, and beside PyTorch and pfl.

A round of federated averaging: 50 clients with 50 examples each, five batches of ten.
PyTorch and pfl run in a process of their own, see peers.py, and are timed there; rounds
of ours and of theirs alternate.
"""

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import drjax
from benchmarks.core import Clock, Row, clock, compare

CLIENTS, BATCHES, BATCH = 50, 5, 10


#
# Models, as functions of parameters and a batch.
#
def _cross_entropy(logits: Any, y: Any) -> Any:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, y[..., None], -1))


def _mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["hidden"] + p["hidden bias"]) @ p["out"] + p["out bias"]


def _cnn(p: Any, x: Any) -> Any:
    for name in ("a", "b"):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, p[name], (1, 1), "SAME", dimension_numbers=numbers
        )
        x = jax.nn.relu(x + p[f"{name} bias"])
    window = (1, 2, 2, 1)
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    x = jax.nn.relu(x.reshape(len(x), -1) @ p["hidden"] + p["hidden bias"])
    return x @ p["out"] + p["out bias"]


MODELS: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "mlp": (_mlp, (784,), {"hidden": (784, 200), "out": (200, 10)}),
    "cnn": (
        _cnn,
        (32, 32, 3),
        {
            "a": (3, 3, 3, 32),
            "b": (3, 3, 32, 64),
            "hidden": (16 * 16 * 64, 128),
            "out": (128, 10),
        },
    ),
}


def _arguments(model: str) -> tuple[Any, Any, Any]:
    _, image, shapes = MODELS[model]
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in shapes.items():
        scale = np.prod(shape[:-1]) ** -0.5
        params[name] = jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        params[f"{name} bias"] = jnp.zeros(shape[-1])
    x = rng.normal(size=(CLIENTS, BATCHES, BATCH, *image))
    y = rng.integers(0, 10, (CLIENTS, BATCHES, BATCH))
    return params, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


def _update(model: str, params: Any, x: Any, y: Any) -> Any:
    """What a client's pass over its batches makes of the parameters."""

    def loss(params, x, y):
        return _cross_entropy(MODELS[model][0](params, x), y)

    def step(params, batch):
        grads = jax.grad(loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    return lax.scan(step, params, (x, y))[0]


def _program(model: str) -> Callable[..., Any]:
    @drjax.program(clients=CLIENTS)
    def run(params, x, y):
        update = functools.partial(_update, model, params)
        return drjax.reduce_mean(drjax.map_fn(update, (x, y)))

    return run


def _scan(model: str) -> Callable[..., Any]:
    """The same by hand: one client after the other in one compiled loop."""

    @jax.jit
    def run(params, x, y):
        def add(total, data):
            new = _update(model, params, *data)
            return jax.tree.map(jnp.add, total, new), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = lax.scan(add, zeros, (x, y))
        return jax.tree.map(lambda t: t / CLIENTS, total)

    return run


def _check(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


#
# Peers.
#
@contextlib.contextmanager
def _peers(python: str) -> Any:
    """Gives a function of what and model that gives a clock."""
    process = subprocess.Popen(
        [python, str(Path(__file__).with_name("peers.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def peer(what: str, model: str) -> Clock:
        def run() -> list[float]:
            print(what, model, file=process.stdin, flush=True)
            for line in iter(process.stdout.readline, ""):  # pyright: ignore
                if line.startswith("seconds "):
                    return [float(line.split()[1])]
            raise RuntimeError(f"{python} ended: does it have torch and pfl?")

        return run

    try:
        yield peer
    finally:
        process.stdin.close()
        process.wait()


#
# Figures.
#
def rounds(repeats: int, peers: str | None = None) -> Iterator[Row]:
    """Rounds of federated averaging of two models."""

    def rows(model, others):
        args = _arguments(model)
        ours = clock(drjax.streaming(_program(model)), *args)
        for name, (other, bar) in others.items():
            title = f"{model.upper()} round, beside {name}"
            yield from compare([title], (ours, other), bar, repeats)

    args = _arguments("mlp")
    scan, vmapped = _scan("mlp"), jax.jit(_program("mlp"))
    _check(drjax.streaming(_program("mlp"))(*args), scan(*args))
    others = {
        "a scan over clients": (clock(scan, *args), 1.05),
        "vmap over clients": (clock(vmapped, *args), 1 / 3),
    }
    yield from rows("mlp", others)
    if peers is None:
        return
    with _peers(peers) as peer:  # Not before: their threads would be in the way.
        for model, bars in (("mlp", (1, 1 / 6)), ("cnn", (1 / 0.8, 1 / 0.8))):
            pairs = zip(("torch", "pfl"), ("PyTorch", "pfl 0.6"), bars, strict=True)
            others = {name: (peer(what, model), bar) for what, name, bar in pairs}
            yield from rows(model, others)


def gradients_of_many(repeats: int, peers: str | None = None) -> Iterator[Row]:
    """The gradient of a model's mean loss over examples, each an element."""
    n, chunk = 60_000, 1000
    params, *_ = _arguments("mlp")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n, 784)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, n), jnp.int32)

    def loss_of(params, x, y):
        return _cross_entropy(_mlp(params, x), y)

    @drjax.program(clients=n)
    def loss(params, x, y):
        losses = drjax.map_fn(functools.partial(loss_of, params), (x, y))
        return drjax.reduce_mean(losses)

    @jax.jit
    def by_hand(params, x, y):
        def add(total, low):
            rows = (lax.dynamic_slice_in_dim(v, low, chunk) for v in (x, y))
            grads = jax.grad(loss_of)(params, *rows)
            return jax.tree.map(jnp.add, total, grads), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = lax.scan(add, zeros, jnp.arange(0, n, chunk))
        return jax.tree.map(lambda t: t * chunk / n, total)

    ours = drjax.streaming(jax.grad(loss))
    _check(ours(params, x, y), by_hand(params, x, y))
    for name, other in (
        ("a scan over chunks of 1000", by_hand),
        ("jit", jax.jit(jax.grad(loss))),
    ):
        clocks = clock(ours, params, x, y), clock(other, params, x, y)
        title = f"MLP gradient of 60,000 examples, beside {name}"
        yield from compare([title], clocks, 1 / 0.8, repeats)


def memory(repeats: int, peers: str | None = None) -> Iterator[Row]:
    """Two local steps of clients with a million floats each."""

    def program(n):
        @drjax.program(clients=n)
        def run(w, x):
            def train(x):
                def step(w, _):
                    return w - 0.1 * jax.grad(lambda w: jnp.sum((w - x) ** 2))(w), None

                return lax.scan(step, w, length=2)[0]

            return drjax.reduce_mean(drjax.map_fn(train, x))

        return run

    def temporaries(n):
        """Of all lanes, as compiled, with their totals."""
        run = drjax.streaming(program(n))
        jax.block_until_ready(run(jnp.zeros(1_000_000), jnp.ones(n)))
        (engine,) = run._engines.values()
        (round_,) = engine._rounds.values()
        chunk = max(
            step.memory_analysis().temp_size_in_bytes
            + step.memory_analysis().output_size_in_bytes
            for key, step in round_._compiled.items()
            if isinstance(key[0], int)
        )
        return float(round_.chunks.lanes * chunk)

    n = 4096
    few, many, most = map(temporaries, (1000, n, 10_000))
    types = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1_000_000,), (n,)))
    compiled: Any = jax.jit(program(n)).lower(*types).compile()
    vmapped = float(compiled.memory_analysis().temp_size_in_bytes)
    title = f"{n} clients x 1M floats: temporaries, beside vmap"
    yield Row(title, many, vmapped, "B", [many / vmapped], 1e8 / vmapped)
    yield Row("the same for 10,000, beside 1000", most, few, "B", [most / few], 1)


FIGURES: dict[str, Callable[..., Iterator[Row]]] = {
    fn.__name__: fn for fn in (rounds, gradients_of_many, memory)
}
