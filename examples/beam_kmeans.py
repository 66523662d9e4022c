"""k-means on handwritten digits, a Beam pipeline for each round, until it converges.

A round assigns each image to its nearest centroid and moves each centroid to the mean
of what it got. It is one JAX function of the state, and `beam_runner.iterate` runs it
until a condition on the state holds. With `--checkpoints`, a run that was interrupted
goes on from its last round, to a bitwise identical result.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits

import beam_runner
import drjax

IMAGES = 1797
CLUSTERS = 10


class State(NamedTuple):
    """What is kept from round to round."""

    centroids: Any  # [CLUSTERS, 64]
    inertia: Any  # Sum of squared distances to the centroids before the last round.
    fall: Any  # By how much the inertia fell in the last round.


#
# The algorithm.
#
def first_state(images: np.ndarray, seed: int) -> State:
    chosen = np.random.default_rng(seed).choice(IMAGES, CLUSTERS, replace=False)
    return State(images[chosen], np.float32(np.inf), np.float32(np.inf))


def assign(centroids: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
    """What an image adds to each cluster's sum and size, and to the inertia."""
    distances = jnp.sum((centroids - image) ** 2, axis=1)
    member = jax.nn.one_hot(jnp.argmin(distances), CLUSTERS)
    return jnp.outer(member, image), member, jnp.min(distances)


@drjax.program(images=IMAGES)
def step(state: State, images: Any) -> State:
    centroids = drjax.broadcast(state.centroids)
    added = drjax.map_fn(assign, (centroids, images))
    sums, sizes, inertia = drjax.reduce_sum(added)
    means = sums / jnp.maximum(sizes, 1)[:, None]
    # A cluster that got no image stays where it is.
    centroids = jnp.where(sizes[:, None] > 0, means, state.centroids)
    return State(centroids, inertia, state.inertia - inertia)


def cluster(
    state: State, images: np.ndarray, rounds: int, **settings: Any
) -> tuple[beam_runner.Iterations, list[float]]:
    """Runs rounds until the inertia no longer falls; also returns it for each."""
    history: list[float] = []

    def has_converged(state):
        if np.isfinite(state.inertia):  # It is not before the first round.
            history.append(float(state.inertia))
        return state.fall <= 0

    done = beam_runner.iterate(
        step, state, images, until=has_converged, max_rounds=rounds, **settings
    )
    return done, history


#
# What the example shows.
#
def run_jit(state: State, images: np.ndarray, rounds: int) -> State:
    jitted = jax.jit(step)
    for _ in range(rounds):
        state = jitted(state, images)
    return state


def plot(state: State, history: Sequence[float], rounds: int, path: str) -> None:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
    left, right = parts
    left.suptitle("Centroids")
    for axes, centroid in zip(left.subplots(2, 5).flat, state.centroids, strict=True):
        axes.imshow(centroid.reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray")
    axes = right.subplots()
    numbers = range(rounds - len(history) + 1, rounds + 1)
    axes.plot(numbers, np.array(history) / 1e6, color="tab:orange")
    axes.set(title="Inertia, in millions", xlabel="round", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options are Beam's, as --temp_location.",
    )
    parser.add_argument("--runner", default="embedded", help="or one of Beam's")
    parser.add_argument("--rounds", type=int, default=100, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", help="a folder, from which a run goes on")
    parser.add_argument("--output", default="beam_kmeans.png", help="the plot")
    args, options = parser.parse_known_args(argv)

    images, _ = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    start = first_state(images, args.seed)
    done, history = cluster(
        start,
        images,
        args.rounds,
        checkpoint_dir=args.checkpoints,
        runner=args.runner,
        options=options,
    )
    ending = "no further fall" if done.is_done else "not yet done"
    print(f"{done.rounds} rounds, inertia {done.state.inertia:.0f}, {ending}")

    jitted = run_jit(start, images, done.rounds)
    print("           difference to jit")
    for name, got, expected in zip(State._fields, done.state, jitted, strict=True):
        print(f"{name:<10}{np.abs(got - expected).max():18.0e}")
    plot(done.state, history, done.rounds, args.output)
    print(f"Centroids and inertia in {args.output}")


if __name__ == "__main__":
    main()
