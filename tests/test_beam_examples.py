"""The Beam examples run, and compute what they promise."""

import contextlib
import io
import re

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

import beam_runner
from examples import beam_kmeans, beam_parquet_gradient, beam_statistics

PNG = b"\x89PNG\r\n\x1a\n"


def printed_by(main, *argv):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*argv])
    return printed.getvalue()


def numbers(printed, name):
    """Those in the row of a printed table."""
    (row,) = re.findall(rf"^ *{name} +(.*)$", printed, re.MULTILINE)
    return [float(number) for number in row.split()]


#
# Statistics.
#
@pytest.fixture(scope="module")
def images():
    """A part of the digits, with all that are damaged and some that are not."""
    images = beam_statistics.load_images(seed=1)
    damaged = np.isnan(images).any(axis=1)
    return images[damaged | (np.arange(len(images)) % 20 == 0)]


def test_statistics_are_numpys_of_the_good_images(images):
    result, bad = beam_statistics.run_pipeline(images, "FnApiRunner")
    damaged = np.isnan(images).any(axis=1)
    assert bad == np.flatnonzero(damaged).tolist()
    assert len(bad) == beam_statistics.DAMAGED
    good = images[~damaged].astype(np.float64)
    assert result.count == len(good)
    np.testing.assert_allclose(result.mean, good.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(result.std, good.std(axis=0), atol=1e-4)
    np.testing.assert_array_equal(result.min, good.min(axis=0))
    np.testing.assert_array_equal(result.max, good.max(axis=0))
    covariance = np.cov(good, rowvar=False, bias=True)
    np.testing.assert_allclose(result.covariance, covariance, atol=1e-4)


def test_equal_images_have_no_variance():
    images = np.full((34, 64), 7, np.float32)
    images[[3, 33], 5] = np.nan, np.inf
    result, bad = beam_statistics.run_pipeline(images, "FnApiRunner")
    assert bad == [3, 33]
    assert result.count == 32  # By which a division is exact.
    for x in (result.mean, result.min, result.max):
        np.testing.assert_array_equal(x, 7)
    for x in (result.std, result.covariance):
        np.testing.assert_array_equal(x, 0)


def test_statistics_are_printed_and_drawn(tmp_path):
    plot = tmp_path / "plot.png"
    printed = printed_by(beam_statistics.main, "--seed=3", f"--output={plot}")
    images = beam_statistics.load_images(seed=3)
    (row,) = re.findall(r"; left out: (.*)$", printed, re.MULTILINE)
    damaged = np.flatnonzero(np.isnan(images).any(axis=1))
    assert row == ", ".join(map(str, damaged))
    assert numbers(printed, "count") == [len(images) - len(damaged), 0, 0]
    for name in beam_statistics.Statistics._fields:
        _, *differences = numbers(printed, name)
        assert max(differences) < 1e-4
    assert len(re.findall("^round over 'images'", printed, re.MULTILINE)) == 1
    assert plot.read_bytes().startswith(PNG)


#
# k-means.
#
@pytest.fixture(scope="module")
def digits():
    images, _ = load_digits(return_X_y=True)
    return images.astype(np.float32)


def lloyd(centroids, images):
    """A round of k-means, and the inertia before it."""
    distances = ((images[:, None] - centroids) ** 2).sum(axis=2)
    nearest = distances.argmin(axis=1)
    means = [
        images[nearest == k].mean(axis=0) if (nearest == k).any() else centroid
        for k, centroid in enumerate(centroids)
    ]
    return np.array(means), distances.min(axis=1).sum()


def test_rounds_are_those_of_k_means_and_an_empty_cluster_stays(digits):
    start = beam_kmeans.first_state(digits, seed=0)
    start.centroids[4] = 1000  # Nothing is near.
    done, history = beam_kmeans.cluster(start, digits, rounds=3)
    centroids, expected = start.centroids.astype(np.float64), []
    for _ in range(3):
        centroids, inertia = lloyd(centroids, digits)
        expected.append(inertia)
    assert (done.rounds, done.is_done) == (3, False)
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    np.testing.assert_allclose(done.state.centroids, centroids, atol=1e-3)
    np.testing.assert_array_equal(done.state.centroids[4], 1000)


def test_an_interrupted_run_ends_with_the_same_bits(digits, tmp_path):
    start = beam_kmeans.first_state(digits, seed=1)
    settings = {"checkpoint_dir": str(tmp_path), "chunk_size": 500}
    stopped, _ = beam_kmeans.cluster(start, digits, 3, **settings)
    resumed, history = beam_kmeans.cluster(start, digits, 4, **settings)
    whole, whole_history = beam_kmeans.cluster(start, digits, 4, chunk_size=500)
    assert (stopped.rounds, resumed.rounds, whole.rounds) == (3, 4, 4)
    assert history == whole_history[2:]
    for a, b in zip(resumed.state, whole.state, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (stopped.state.centroids != resumed.state.centroids).any()


@pytest.mark.slow
def test_k_means_ends_where_no_image_changes_its_cluster(digits):
    start = beam_kmeans.first_state(digits, seed=0)
    done, history = beam_kmeans.cluster(start, digits, rounds=100)
    assert done.is_done
    assert len(history) == done.rounds < 100
    assert (np.diff(history)[:-1] < 0).all()
    centroids, _ = lloyd(np.asarray(done.state.centroids, np.float64), digits)
    np.testing.assert_allclose(done.state.centroids, centroids, atol=1e-4)


def test_k_means_is_printed_drawn_and_resumed(tmp_path):
    plot, folder = tmp_path / "plot.png", tmp_path / "checkpoints"
    argv = f"--output={plot}", f"--checkpoints={folder}"
    first = printed_by(beam_kmeans.main, "--rounds=1", *argv)
    assert first.startswith("1 rounds, ")
    plot.unlink()
    second = printed_by(beam_kmeans.main, "--rounds=2", *argv)
    assert second.startswith("2 rounds, ")
    (difference,) = numbers(second, "centroids")
    assert difference < 1e-4
    assert plot.read_bytes().startswith(PNG)


#
# A gradient over Parquet files.
#
def test_gradient_over_parquet_is_that_of_jit(tmp_path):
    beam_parquet_gradient.load_data(seed=0, folder=str(tmp_path))
    assert len([*tmp_path.iterdir()]) == beam_parquet_gradient.FILES
    table = pq.read_table(tmp_path)
    rows = {
        "image": np.array(table["image"].to_pylist(), np.float32),
        "label": table["label"].to_numpy(),
    }
    files = beam_runner.from_parquet(f"{tmp_path}/*.parquet", ["image", "label"])
    params = beam_parquet_gradient.first_state(seed=0).params
    program = beam_parquet_gradient.loss_and_gradient
    got = beam_runner.run(program, params, files, chunk_size=64)
    expected = jax.jit(program)(params, rows)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def trained(path, rounds):
    """Loss before and after training, accuracy, and what was printed."""
    main = beam_parquet_gradient.main
    printed = printed_by(main, f"--rounds={rounds}", f"--output={path}")
    (losses,) = re.findall(r"^Training loss (\S+) before, (\S+) after", printed, re.M)
    (percentage,) = re.findall(r"^Test accuracy (.*)%;", printed, re.MULTILINE)
    return *map(float, losses), float(percentage) / 100, printed


def test_a_few_rounds_over_parquet_learn(tmp_path):
    plot = tmp_path / "plot.png"
    before, after, accuracy, printed = trained(plot, rounds=3)
    assert after < before / 1.5
    assert accuracy > 0.5
    for name in ("loss", "gradient"):
        assert numbers(printed, name)[-1] < 1e-5
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_all_rounds_over_parquet_learn_the_digits(tmp_path):
    _, after, accuracy, _ = trained(tmp_path / "plot.png", rounds=20)
    assert after < 0.2
    assert accuracy > 0.95
