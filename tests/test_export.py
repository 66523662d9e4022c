"""A stage runs in another process, alone or many elements at once."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import in_chunks
from helpers import assert_close
from programs import XS, N, W, program

import drjax
from drjax.plan import MapReduce, Server


def rounds(plan):
    return [stage for stage in plan.stages if isinstance(stage, MapReduce)]


@program
def doubling(w, x):
    """How often each element is doubled until it is large: for ever, if it is 0."""

    def count(x):
        start = jnp.abs(x), 0
        _, times = jax.lax.while_loop(
            lambda c: ~(c[0] > 100), lambda c: (2 * c[0], c[1] + 1), start
        )
        return w * times

    return drjax.reduce_mean(drjax.map_fn(count, x))


OTHER_PROCESS = """
import sys
import numpy as np
import jax

exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
inputs = [given[f"arr_{i}"] for i in range(len(given.files))]
np.savez(sys.argv[3], *exported.call(*inputs))
assert "drjax" not in sys.modules
"""


def in_another_process(data, inputs, folder):
    (folder / "stage").write_bytes(data)
    np.savez(folder / "inputs.npz", *inputs)
    files = [folder / name for name in ("stage", "inputs.npz", "outputs.npz")]
    subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, *map(str, files)],
        check=True,
        timeout=120,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    outputs = np.load(files[-1])
    return [outputs[f"arr_{i}"] for i in range(len(outputs.files))]


@pytest.mark.parametrize("chunk", [4, "symbolic"])
def test_a_chunk_runs_in_a_process_without_this_library(chunk, tmp_path):
    """Also where padding would run for ever: it is zero."""
    x = np.array([3, 0.1, 7, 50, 0.7], "float32")
    (stage,) = rounds(drjax.make_plan(doubling)(2.0, x))
    data = stage.export(chunk=chunk)
    zeros = np.zeros(4, np.float32)
    total = 0
    for low in (0, 4):
        own = x[low : low + 4]
        padded = np.concatenate([own, zeros])[:4]
        index = np.arange(low, low + 4, dtype=np.int32)
        inputs = [np.int32(len(own)), index, np.float32(2), padded]
        (part,) = in_another_process(data, inputs, tmp_path)
        total += part
    assert_close(total / N, doubling(2.0, x))


def test_one_element_and_the_server_run_in_a_process_without_this_library(tmp_path):
    x = np.array([3, 0.1, 7, 50, 0.7], "float32")
    plan = drjax.make_plan(doubling)(2.0, x)
    each = [
        in_another_process(
            rounds(plan)[0].export(), [np.int32(i), np.float32(2), v], tmp_path
        )[0]
        for i, v in enumerate(x[:2])
    ]
    assert_close(each, [2.0 * 6, 2.0 * 10])
    server = plan.stages[-1]
    assert isinstance(server, Server)
    known = {i: np.int32(N) for i in plan.sizes}  # The sum is the other input.
    inputs = [known.get(i, np.float32(sum(each))) for i in server.inputs]
    (mean,) = in_another_process(server.export(), inputs, tmp_path)
    assert_close(mean, sum(each) / N)


def test_platforms_are_those_named():
    def fn(w, x):
        return drjax.reduce_mean(drjax.map_fn(lambda x: jnp.sin(x) @ w, x))

    plan = drjax.make_plan(jax.jit(jax.grad(lambda w: jnp.sum(program(fn)(w, XS)))))(W)
    platforms = ("cpu", "cuda", "tpu")
    for stage in rounds(plan):
        for chunk in (None, 2, "symbolic"):
            data = stage.export(platforms=platforms, chunk=chunk)
            assert jax.export.deserialize(bytearray(data)).platforms == platforms


REDUCTIONS = {
    "sum": (jnp.sum, [np.float32, np.int8, np.uint32, np.complex64, bool]),
    "prod": (jnp.prod, [np.float32, np.int32]),
    "max": (jnp.max, [np.float32, np.int8, np.uint8, bool, jnp.float8_e4m3fn]),
    "min": (jnp.min, [np.float32, np.int8, np.uint8, bool, jnp.float8_e4m3fn]),
    "all": (jnp.all, [bool]),
    "any": (jnp.any, [bool]),
    "and": (lambda x, axis: jnp.bitwise_and.reduce(x, axis=axis), [np.uint8, np.int32]),
    "or": (lambda x, axis: jnp.bitwise_or.reduce(x, axis=axis), [np.uint8, np.int32]),
}


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name, (_, dtypes) in REDUCTIONS.items() for dtype in dtypes],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_is_invalid_is_in_no_reduction(name, dtype):
    """The smallest and largest values, so that no identity is taken for a value."""
    reduce, _ = REDUCTIONS[name]
    fn = program(lambda x: reduce(drjax.map_fn(lambda v: v, x), axis=0))
    rng = np.random.default_rng(0)
    if dtype is bool:
        x = np.stack([rng.random(N) > 0.5, np.ones(N, bool), np.zeros(N, bool)], 1)
    elif issubclass(dtype, np.integer):
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        x = rng.integers(low, high, (N, 3), dtype, endpoint=True)
        x[:, 0], x[:, 1] = low, high
    else:
        x = rng.normal(size=(N, 3)).astype(dtype)
        if dtype is not jnp.float8_e4m3fn:  # It has no infinity.
            x[:, 0], x[0, 1] = -np.inf, np.nan
    plan = drjax.make_plan(fn)(x)
    (stage,) = rounds(plan)
    assert len(stage.reductions) == 1
    got, want = in_chunks(plan, x), jax.jit(fn)(x)
    assert got.dtype == want.dtype
    assert_close(got, want)


def test_a_callback_cannot_be_exported():
    def fn(x):
        jax.debug.print("{}", x)
        return x

    mapped = program(lambda x: drjax.reduce_sum(drjax.map_fn(fn, x)))
    (stage,) = rounds(drjax.make_plan(mapped)(XS))
    with pytest.raises(NotImplementedError, match=r"debug.* cannot be exported"):
        stage.export(chunk=2)


def test_a_chunk_may_be_an_integer_of_numpy():
    (stage,) = rounds(drjax.make_plan(program(drjax.reduce_sum))(XS))
    two: Any = np.int64(2)
    exported = jax.export.deserialize(bytearray(stage.export(chunk=two)))
    assert exported.in_avals[-1].shape == (2, *XS.shape[1:])


@pytest.mark.parametrize("chunk", [0, -1, True, "all", 2.0])
def test_a_chunk_that_is_no_number_of_elements_is_an_error(chunk):
    (stage,) = rounds(drjax.make_plan(program(drjax.reduce_sum))(XS))
    with pytest.raises(ValueError, match="chunk"):
        stage.export(chunk=chunk)
