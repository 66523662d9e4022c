"""Rounds by `federated.run`, beside the bare compiled round, and beside pfl.

The rounds are those of streaming.py: 50 clients with 50 examples each, batches of ten.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import drjax
import federated
from benchmarks.core import Clock, Row, clock, compare
from benchmarks.streaming import BATCH, CLIENTS, MODELS, _arguments, _peers

ROUNDS = 8


def _algorithm(model: str) -> federated.Algorithm:
    def loss(params, examples):
        logits = MODELS[model][0](params, examples["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"])

    return federated.fedavg(loss, optax.sgd(0.1), batch_size=BATCH)


def _data(x: Any, y: Any) -> federated.ClientData:
    tree = {"x": np.asarray(x), "y": np.asarray(y)}
    tree = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), tree)
    return federated.from_arrays(
        tree, np.repeat(np.arange(CLIENTS), len(tree["y"]) // CLIENTS)
    )


def _run(model: str) -> Clock:
    """The time of a round of `federated.run`, and of what it does between rounds."""
    params, x, y = _arguments(model)
    algorithm, data = _algorithm(model), _data(x, y)

    def run() -> list[float]:
        times: list[float] = []

        def note(rows, state):
            jax.block_until_ready(state)
            times.append(time.perf_counter())

        federated.run(
            algorithm,
            params,
            data,
            rounds=ROUNDS,
            cohort_size=CLIENTS,
            seed=0,
            callbacks=[note],
            progress=False,
        )
        return [float(np.median(np.diff(times[1:])))]

    return run


def _bare(model: str, engine: Callable[..., Any]) -> Clock:
    """The same round of a batch that is there."""
    params, x, y = _arguments(model)
    algorithm = _algorithm(model)
    batch = jax.device_put(federated.batch_of(_data(x, y), range(CLIENTS)))
    one = clock(
        engine(algorithm.round), algorithm.init(params), batch, jax.random.key(0)
    )
    return lambda: [float(np.median([one() for _ in range(ROUNDS)]))]


def federated_rounds(repeats: int, peers: str | None = None) -> Iterator[Row]:
    """Rounds of federated averaging of two models."""
    for name, engine, bar in (
        ("the bare round, streamed", drjax.streaming, 1.05),
        ("the bare round, jitted", jax.jit, 1),
    ):
        clocks = _run("mlp"), _bare("mlp", engine)
        title = f"MLP round of federated.run, beside {name}"
        yield from compare([title], clocks, bar, repeats)
    if peers is None:
        return
    with _peers(peers) as peer:
        for model, bar in (("mlp", 1 / 6), ("cnn", 1 / 0.8)):
            title = f"{model.upper()} round of federated.run, beside pfl 0.6"
            yield from compare([title], (_run(model), peer("pfl", model)), bar, repeats)


#
# Memory.
#
def _sum_of_squares(params: Any, examples: Any) -> Any:
    return ((params - examples) ** 2).sum(-1)


def _peak(cohort_size: int) -> float:
    """The most memory that a process had, for rounds over a million clients."""
    floats = 100_000
    counts = np.random.default_rng(0).integers(1, 9, 1_000_000)

    def examples(i):
        return np.full((counts[i], floats), i % 7, np.float32)

    data = federated.from_function(len(counts), counts, examples)
    algorithm = federated.fedavg(_sum_of_squares, optax.sgd(0.1), batch_size=4)
    params = np.zeros(floats, np.float32)
    options: Any = dict(rounds=2, cohort_size=cohort_size, seed=0, progress=False)
    federated.run(algorithm, params, data, **options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def federated_memory(repeats: int, peers: str | None = None) -> Iterator[Row]:
    """Memory of a process whose rounds have more and more clients of a million."""
    processes = multiprocessing.get_context("spawn")
    peaks = []
    for cohort_size in (250, 4000):
        with processes.Pool(1) as pool:
            peaks.append(pool.apply(_peak, (cohort_size,)))
    few, many = peaks
    title = "4000 clients a round out of a million, beside 250: peak memory"
    yield Row(title, many, few, "B", [many / few], 1.1)


FIGURES: dict[str, Callable[..., Iterator[Row]]] = {
    fn.__name__: fn for fn in (federated_rounds, federated_memory)
}
