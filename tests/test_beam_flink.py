"""The Beam engine on a Flink cluster of this machine: jit's results, the same bits."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_close, every, gradient, of_floats
from programs import PROGRAMS

import beam_runner
from beam_runner import flink

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = pathlib.Path(os.environ.get("FLINK_FOLDER", ROOT / ".flink"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "lib").is_dir() or shutil.which("java") is None,
        reason="Flink is not here: it needs Java 17 and Maven, and `make flink`.",
    ),
    pytest.mark.xdist_group("flink"),
]
ROWS = {
    str(case): case
    for case in PROGRAMS
    if str(case) in {"extremes", "fedavg", "k_means", "key_for_each_client"}
}


@pytest.fixture(scope="module")
def flags():
    with flink.cluster(FOLDER) as flags:
        yield flags


def on_flink(flags, folder, fn, *args, on_bad="keep"):
    return beam_runner.run(
        fn,
        *args,
        runner="PortableRunner",
        options=flags,
        chunk_size=2,
        temp_location=folder,
        on_bad=on_bad,
    )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("how", ["itself", "gradient"])
def test_programs_and_gradients(flags, tmp_path, name, how):
    fn, xs = of_floats(ROWS[name].run, ROWS[name].args)
    fn = gradient(fn, every(xs)) if how == "gradient" else fn
    got = on_flink(flags, tmp_path, fn, *xs)
    here = beam_runner.run(fn, *xs, chunk_size=2, on_bad="keep")
    assert_close(got, jax.jit(fn)(*xs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(here), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    assert not [*tmp_path.iterdir()]


def test_a_bad_element_is_named(flags, tmp_path):
    fn, (x,) = ROWS["extremes"].run, ROWS["extremes"].args
    x = np.array(x)
    x[3] = np.nan
    with pytest.raises(RuntimeError, match="element 3 of 'clients' is bad"):
        on_flink(flags, tmp_path, fn, x, on_bad="raise")
