"""Trains on Parquet files: each gradient is a pass of a Beam pipeline over all of them.

The loss of a small network over all rows of a dataset is one JAX function, and so is
its gradient. `beam_runner` runs both where the files are: workers read the row groups
that they need, and send back sums over rows. The gradient is that of the whole dataset,
as `jax.jit` has it, and not of a batch.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.progress import Progress
from sklearn.datasets import load_digits

import beam_runner
import drjax

TRAIN = 1437
FILES = 4
CLASSES = 10
MODEL = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(CLASSES)])
OPTIMIZER = optax.adam(0.03)


class State(NamedTuple):
    """What is kept from round to round."""

    params: Any
    optimizer: optax.OptState
    loss: Any  # Of the training data, before the last round.


def load_data(seed: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Writes training digits to Parquet files; returns images and labels for tests."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = np.split(order, [TRAIN])
    for k, rows in enumerate(np.array_split(train, FILES)):
        pixels = pa.FixedSizeListArray.from_arrays(
            images[rows].ravel(), images.shape[1]
        )
        table = pa.table({"image": pixels, "label": labels[rows]})
        pq.write_table(table, Path(folder) / f"digits-{k}.parquet")
    return images[test], labels[test]


#
# The computation.
#
def predict(params: Any, images: Any) -> Any:
    return MODEL.apply(params, images)


@drjax.program(digits=TRAIN)
def training_loss(params: Any, digits: Any) -> jax.Array:
    def loss(params, digit):
        logits = predict(params, digit["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, digit["label"])

    return drjax.reduce_mean(drjax.map_fn(loss, (drjax.broadcast(params), digits)))


loss_and_gradient = jax.value_and_grad(training_loss)


def first_state(seed: int) -> State:
    params = MODEL.init(jax.random.key(seed), jnp.zeros(64))
    return State(params, OPTIMIZER.init(params), np.float32(np.nan))


def step(state: State, digits: Any) -> State:
    loss, gradient = loss_and_gradient(state.params, digits)
    updates, optimizer = OPTIMIZER.update(gradient, state.optimizer)
    return State(optax.apply_updates(state.params, updates), optimizer, loss)


#
# What the example shows.
#
def compare_with_jit(params: Any, digits: Any, **settings: Any) -> None:
    """Prints how far a gradient over the files is from that of their rows in memory."""
    got = beam_runner.run(loss_and_gradient, params, digits, **settings)
    expected = jax.jit(loss_and_gradient)(params, digits.read(0, TRAIN))
    print("            largest value   difference to jit")
    for name, *trees in zip(("loss", "gradient"), got, expected, strict=True):
        a, b = (ravel_pytree(tree)[0] for tree in trees)
        print(f"  {name:<10}{np.abs(a).max():13.4f}{np.abs(a - b).max():20.0e}")


def train(
    state: State, digits: Any, test: Any, rounds: int, **settings: Any
) -> np.ndarray:
    """Returns the training loss and test accuracy, at first and after each round."""
    images, labels = test
    losses: list[Any] = []
    accuracies: list[Any] = []
    with Progress() as progress:
        task = progress.add_task("Training", total=rounds)

        def note(state):
            predicted = predict(state.params, images).argmax(axis=-1)
            accuracies.append(np.mean(predicted == labels))
            losses.append(state.loss)
            progress.update(task, completed=len(losses) - 1)
            return False  # All rounds are run.

        done = beam_runner.iterate(
            step, state, digits, until=note, max_rounds=rounds, **settings
        )
    last = beam_runner.run(training_loss, done.state.params, digits, **settings)
    return np.stack([[*losses[1:], last], accuracies], axis=1)


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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options are Beam's, as --temp_location.",
    )
    parser.add_argument("--runner", default="embedded", help="or one of Beam's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="beam_parquet_gradient.png", help="plot")
    args, options = parser.parse_known_args(argv)
    settings = {"runner": args.runner, "options": options}

    with tempfile.TemporaryDirectory() as folder:
        test = load_data(args.seed, folder)
        digits = beam_runner.from_parquet(f"{folder}/*.parquet", ["image", "label"])
        print(f"{digits.num_elements} digits in {FILES} files")
        state = first_state(args.seed)
        compare_with_jit(state.params, digits, **settings)
        history = train(state, digits, test, args.rounds, **settings)
    (first, _), (last, accuracy) = history[0], history[-1]
    print(f"Training loss {first:.3f} before, {last:.3f} after {args.rounds} rounds")
    plot(history, args.output)
    print(f"Test accuracy {accuracy:.1%}; learning curve in {args.output}")


if __name__ == "__main__":
    main()
