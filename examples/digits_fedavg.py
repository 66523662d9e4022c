"""Federated averaging on handwritten digits, and the gradient through a round.

Fifty clients hold about thirty of scikit-learn's digits each, most of them of few
classes. A round sends the model to all clients, lets each train it on its own digits,
and steps along the average of what they changed. As a round is one JAX function, it
has a gradient too: here with respect to the two learning rates.
"""

import argparse
import functools
import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.progress import track
from sklearn.datasets import load_digits

import beam_runner
import drjax
import federated

CLIENTS = 50
CLASSES = 10
TEST_SIZE = 360
BATCH_SIZE = 10
DIRICHLET_ALPHA = 0.5  # The smaller, the fewer classes a client has.

# Smooth, so that the finite differences below are precise.
HIDDEN = 64
MODEL = nn.Sequential([nn.Dense(HIDDEN), nn.gelu, nn.Dense(CLASSES)])
server_optimizer = functools.partial(optax.sgd, momentum=0.9)


class Rates(NamedTuple):
    """Learning rates, each a scalar."""

    client: Any
    server: Any


class Examples(NamedTuple):
    """Padded digits; `...` is `batch`, or `clients, batches, batch`."""

    images: Any  # [..., 64]
    labels: Any  # [...]
    mask: Any  # [...], false for padding


class State(NamedTuple):
    """What the server keeps from round to round."""

    params: Any
    optimizer: optax.OptState


RATES = Rates(client=np.float32(0.1), server=np.float32(1))


def load_data(seed: int) -> tuple[Examples, Examples]:
    """Training digits, each class split unevenly over the clients, and test digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    test, train = np.split(rng.permutation(len(images)), [TEST_SIZE])
    shares = rng.dirichlet(np.full(CLIENTS, DIRICHLET_ALPHA), size=CLASSES)
    owners = np.array([rng.choice(CLIENTS, p=shares[labels[i]]) for i in train])
    rows = [train[owners == client] for client in range(CLIENTS)]

    batches = -(-max(map(len, rows)) // BATCH_SIZE)
    index = np.zeros((CLIENTS, batches * BATCH_SIZE), int)
    mask = np.zeros(index.shape, bool)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row
        mask[i, : len(row)] = True
    index, mask = (x.reshape(CLIENTS, batches, BATCH_SIZE) for x in (index, mask))
    return (
        Examples(images[index], labels[index], mask),
        Examples(images[test], labels[test], np.ones(TEST_SIZE, bool)),
    )


#
# The algorithm.
#
def predict(params: Any, images: Any) -> Any:
    return MODEL.apply(params, images)


def mean_loss(params: Any, examples: Examples) -> jax.Array:
    logits = predict(params, examples.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
    count = jnp.maximum(examples.mask.sum(), 1)  # A batch may be all padding.
    return jnp.sum(losses * examples.mask) / count


def client_update(params: Any, rate: jax.Array, examples: Examples) -> Any:
    """What one pass of SGD over a client's batches changes."""

    def step(params, batch):
        grads = jax.grad(mean_loss)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

    trained, _ = jax.lax.scan(step, params, examples)
    return jax.tree.map(jnp.subtract, params, trained)


@drjax.program(clients=CLIENTS)
def federated_round(rates: Rates, state: State, clients: Examples) -> State:
    params, rate = drjax.broadcast((state.params, rates.client))
    updates = drjax.map_fn(client_update, (params, rate, clients))
    update = drjax.reduce_weighted_mean(updates, clients.mask.sum(axis=(1, 2)))
    optimizer = server_optimizer(rates.server)
    change, optimizer_state = optimizer.update(update, state.optimizer)
    return State(optax.apply_updates(state.params, change), optimizer_state)


@drjax.program(clients=CLIENTS)
def training_loss(params: Any, clients: Examples) -> jax.Array:
    losses = drjax.map_fn(mean_loss, (drjax.broadcast(params), clients))
    return drjax.reduce_weighted_mean(losses, clients.mask.sum(axis=(1, 2)))


def loss_after_round(rates: Rates, state: State, clients: Examples) -> jax.Array:
    return training_loss(federated_round(rates, state, clients).params, clients)


#
# What the example shows.
#
def train(state: State, clients: Examples, test: Examples, rounds: int) -> np.ndarray:
    """Returns the training loss and test accuracy, at first and after each round."""
    run_round = jax.jit(federated_round)

    @jax.jit
    def evaluate(params):
        predicted = predict(params, test.images).argmax(axis=-1)
        return training_loss(params, clients), jnp.mean(predicted == test.labels)

    history = [evaluate(state.params)]
    for _ in track(range(rounds), "Training"):
        state = run_round(RATES, state, clients)
        history.append(evaluate(state.params))
    return np.array(history)


def compare_with_finite_differences(state: State, clients: Examples) -> None:
    loss = jax.jit(loss_after_round)
    gradient = jax.jit(jax.grad(loss_after_round))(RATES, state, clients)
    print("            gradient   finite difference   relative difference")
    for name, rate, slope in zip(Rates._fields, RATES, gradient, strict=True):
        above = RATES._replace(**{name: 1.03 * rate})
        below = RATES._replace(**{name: 0.97 * rate})
        change = loss(above, state, clients) - loss(below, state, clients)
        expected = change / (0.06 * rate)
        relative = abs(slope / expected - 1)
        print(f"  {name} {slope:13.6f} {expected:19.6f} {relative:21.0e}")


def compare_engines(fn: Any, *args: Any) -> None:
    """Runs a function on each engine; prints its time, its memory and what differs."""
    compiled = jax.jit(fn).lower(*args).compile()
    analysis: Any = compiled.memory_analysis()
    temporaries = analysis.temp_size_in_bytes / 1e6
    streaming = drjax.streaming(fn)
    explanation = streaming.explain(*args)
    rows = {
        "jit": (compiled, f"{temporaries:.3g} MB"),
        "streaming": (streaming, explanation.split("; ")[-1]),
        "beam": (functools.partial(beam_runner.run, fn), ""),
        "federated": (federated.simulate(fn), ""),
    }
    want = jax.tree.leaves(compiled(*args))
    print("engine      seconds     temporaries   difference to jit")
    for name, (run, memory) in rows.items():
        got, seconds = jax.tree.leaves(run(*args)), []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            seconds.append(time.perf_counter() - start)
        difference = max(np.abs(a - b).max() for a, b in zip(got, want, strict=True))
        print(f"{name:<12}{min(seconds):<7.4f}{memory:>16}{difference:20.0e}")
    print(f"streaming: {explanation}")


def print_operators(jaxpr: Any) -> None:
    """Prints what a jaxpr maps, and what it sends between server and clients."""

    def title(eqn):
        return eqn.primitive.name.removeprefix("drjax_"), eqn.params.get("name", "")

    operators = [e for e in jaxpr.eqns if e.primitive.name.startswith("drjax_")]
    for (kind, name), group in itertools.groupby(operators, key=title):
        eqns = list(group)
        sent = [v for eqn in eqns for v in eqn.invars if kind == "broadcast"]
        sent += [v for eqn in eqns for v in eqn.outvars if kind == "reduce_sum"]
        print(f"  {kind:<12}{name}{'  '.join(str(v.aval) for v in sent)}")


def on_mesh(state: State, clients: Examples) -> None:
    """Runs a round on a mesh of 2 x 4 devices, and prints what they communicate.

    Two groups of devices have half the clients each; in a group, each device has a
    quarter of the hidden units of every model.
    """
    axes = ("clients", "model")
    mesh = jax.make_mesh((2, 4), axes, axis_types=(AxisType.Auto,) * 2)

    def split_hidden(x):
        hidden = [i for i, size in enumerate(np.shape(x)) if size == HIDDEN][-1:]
        axes = ["model" if i in hidden else None for i in range(np.ndim(x))]
        return NamedSharding(mesh, P(*axes))

    with jax.set_mesh(mesh):
        sharded = jax.device_put(state, jax.tree.map(split_hidden, state))
        placed = jax.device_put(clients, NamedSharding(mesh, P("clients")))
        compiled = jax.jit(federated_round).lower(RATES, sharded, placed).compile()
        new = compiled(RATES, sharded, placed)
    alone = federated_round(RATES, state, clients)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), new, alone)
    print(
        f"Largest difference from one device: {max(jax.tree.leaves(differences)):.0e}"
    )
    collective = (
        r"= (.*) (all-[a-z]+|collective-permute|reduce-scatter)\(.*op_name=\"(.*?)\""
    )
    for shapes, kind, name in re.findall(collective, compiled.as_text() or ""):
        shapes = re.sub(r"{.*?}|/\*.*?\*/", "", shapes)
        _, *path = name.split("/")
        print(
            f"  {kind}  {' ... '.join(dict.fromkeys(path[:1] + path[-1:]))}  {shapes}"
        )


def plot(history: np.ndarray, path: str) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(history[:, 1], color="tab:blue")
    final = f"{history[-1, 1]:.1%}"
    left.set(title=f"Test accuracy, {final} in the end", xlabel="round", ylim=(0, 1))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.plot(history[:, 0], color="tab:orange")
    right.set(title="Training loss", xlabel="round", ylim=(0, None))
    for axes in (left, right):
        axes.margins(x=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="digits_fedavg.png", help="the plot")
    parser.add_argument("--jaxpr", action="store_true", help="print whole jaxprs")
    args = parser.parse_args(argv)

    clients, test = load_data(args.seed)
    n = clients.mask.sum(axis=(1, 2))
    print(f"{n.sum()} digits at {CLIENTS} clients, {n.min()} to {n.max()} each")
    params = MODEL.init(jax.random.key(args.seed), test.images[:1])
    state = State(params, server_optimizer(RATES.server).init(params))

    history = train(state, clients, test, args.rounds)
    plot(history, args.output)
    print(f"Test accuracy {history[-1, 1]:.1%}; learning curve in {args.output}")

    print("\nThe derivative of the loss after the first round, by learning rate:")
    compare_with_finite_differences(state, clients)

    show = print if args.jaxpr else print_operators
    for title, fn in (
        ("The loss after a round", loss_after_round),
        ("Its gradient", jax.grad(loss_after_round)),
    ):
        jaxpr = jax.make_jaxpr(fn)(RATES, state, clients)
        print(f"\n{title}, as JAX sees it:")
        show(jaxpr)

    for title, fn, name in (
        ("A round", federated_round, "plan"),
        ("The gradient of the loss after it", jax.grad(loss_after_round), "gradient"),
    ):
        plan = drjax.make_plan(fn)(RATES, state, clients)
        page = Path(args.output).with_suffix(f".{name}.html")
        page.write_text(plan.to_html(), encoding="utf-8")
        print(f"\n{title}, as a plan; drawn in {page}:\n{plan}")

    if jax.device_count() >= 8:
        print("\nA round on 8 devices, 2 x 4 of clients x model:")
        on_mesh(state, clients)

    for title, fn in (
        ("A round", federated_round),
        ("The gradient of the loss after it", jax.grad(loss_after_round)),
    ):
        print(f"\n{title}, on each engine:")
        compare_engines(fn, RATES, state, clients)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # Virtual ones.
    main()
