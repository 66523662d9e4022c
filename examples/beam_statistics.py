"""Statistics of a dataset, as a step of an Apache Beam pipeline.

Mean, spread, range and covariance of all images are one JAX function, of which
`beam_runner.MapReduce` makes a transform. In a pipeline it takes records as they come,
in any order and from many machines, and what it gives goes into the next step. A few of
the records are damaged: they are left out, and the numbers are those of the others.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import beam_runner
import drjax

DAMAGED = 5
COMPONENTS = 4


class Statistics(NamedTuple):
    """Of all images, pixel by pixel; the covariance is that of pairs of pixels."""

    count: Any  # []
    mean: Any  # [64]
    std: Any  # [64]
    min: Any  # [64]
    max: Any  # [64]
    covariance: Any  # [64, 64]


def load_images(seed: int) -> np.ndarray:
    """The digits as rows of pixels from 0 to 16; a few have a pixel without a value."""
    images, _ = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    damaged = rng.choice(len(images), DAMAGED, replace=False)
    images[damaged, rng.integers(images.shape[1], size=DAMAGED)] = np.nan
    return images.astype(np.float32)


#
# The computation: one round, in which each image gives itself and a product.
#
def statistics(images: Any) -> Statistics:
    products = drjax.map_fn(lambda image: jnp.outer(image, image), images)
    mean, square = drjax.reduce_mean((images, products))
    covariance = square - jnp.outer(mean, mean)
    # Rounding can make a small variance negative.
    std = jnp.sqrt(jnp.maximum(jnp.diag(covariance), 0))
    low, high = drjax.reduce_min(images), drjax.reduce_max(images)
    return Statistics(drjax.placement_size(), mean, std, low, high, covariance)


def run_pipeline(
    images: np.ndarray, runner: str, options: Sequence[str] = ()
) -> tuple[Statistics, list[int]]:
    """The statistics of the good images, and the indices of the others."""
    program = drjax.program(images=len(images))(statistics)
    arriving = jax.ShapeDtypeStruct(images.shape, images.dtype)
    transform = beam_runner.MapReduce(program, arriving, on_bad="collect")
    with tempfile.TemporaryDirectory() as folder:
        arrays, indices = Path(folder) / "statistics.npz", Path(folder) / "bad.json"
        with beam.Pipeline(runner, PipelineOptions([*options])) as pipeline:
            records = pipeline | "Records" >> beam.Create(enumerate(images))
            result = records | "Statistics" >> transform
            _ = result.server | "Save" >> beam.Map(save_statistics, str(arrays))
            _ = (
                result.bad
                | "Index" >> beam.MapTuple(lambda placement, index, why: index)
                | "List" >> beam.combiners.ToList()
                | "Save indices" >> beam.Map(save_indices, str(indices))
            )
        with np.load(arrays) as saved:
            return Statistics(**saved), json.loads(indices.read_text())


def save_statistics(result: Statistics, path: str) -> None:
    np.savez(path, **result._asdict())


def save_indices(indices: Sequence[int], path: str) -> None:
    Path(path).write_text(json.dumps(sorted(indices)))


#
# What the example shows.
#
def numpy_statistics(images: np.ndarray) -> Statistics:
    x = images.astype(np.float64)
    covariance = np.cov(x, rowvar=False, bias=True)
    return Statistics(len(x), x.mean(0), x.std(0), x.min(0), x.max(0), covariance)


def compare(result: Statistics, good: np.ndarray) -> None:
    """Prints how far the result is from what jit and NumPy give for the good images."""
    jitted = jax.jit(drjax.program(images=len(good))(statistics))(good)
    expected = numpy_statistics(good)
    print("             largest value   difference to jit   difference to NumPy")
    for name, *values in zip(Statistics._fields, result, jitted, expected, strict=True):
        got, *others = (np.asarray(x, np.float64) for x in values)
        differences = [np.abs(got - other).max() for other in others]
        print(
            f"  {name:<11}{got.max():13.2f}{differences[0]:20.0e}{differences[1]:22.0e}"
        )


def plot(result: Statistics, path: str) -> None:
    variances, vectors = np.linalg.eigh(result.covariance)
    panels = [("mean", result.mean), ("standard deviation", result.std)]
    for k in range(1, COMPONENTS + 1):
        share = variances[-k] / variances.sum()
        panels.append((f"component {k}, {share:.0%}", vectors[:, -k]))
    figure = Figure(figsize=(8, 1.6), layout="constrained")
    for axes, (title, image) in zip(
        figure.subplots(1, len(panels)), panels, strict=True
    ):
        signed = image.min() < 0
        axes.imshow(
            image.reshape(8, 8),
            cmap="RdBu" if signed else "gray_r",
            vmin=-np.abs(image).max() if signed else 0,
            vmax=np.abs(image).max(),
        )
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options are Beam's, as --temp_location.",
    )
    parser.add_argument("--runner", default="FnApiRunner", help="one of Beam's")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged")
    parser.add_argument("--output", default="beam_statistics.png", help="the plot")
    args, options = parser.parse_known_args(argv)

    images = load_images(args.seed)
    program = drjax.program(images=len(images))(statistics)
    print(f"The statistics as a plan:\n{drjax.make_plan(program)(images)}\n")

    result, bad = run_pipeline(images, args.runner, options)
    print(
        f"{result.count} of {len(images)} images; left out: {', '.join(map(str, bad))}"
    )
    compare(result, np.delete(images, bad, axis=0))
    plot(result, args.output)
    print(f"Mean, standard deviation and principal components in {args.output}")


if __name__ == "__main__":
    main()
