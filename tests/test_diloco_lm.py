"""The language model trained with local steps: its text, its bytes, its runs."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drjax
from benchmarks import hlo
from examples import diloco_lm, plays_text, transformer

ROOT = Path(diloco_lm.__file__).parents[1]
Settings = diloco_lm.Settings
# Two replicas that take few and small steps.
SHORT = Settings(replicas=2, rounds=4, steps=6, batch=2, pod_steps=3, delay=1)


#
# The text.
#
@pytest.fixture(scope="module")
def text():
    return plays_text.load(4)


def roles(text):
    """The texts of speakers, which 0 separates."""
    return {x.tobytes() for x in np.split(text, np.flatnonzero(text == 0))[1:]}


def test_replicas_have_speakers_of_their_own_and_others_are_held_out(text):
    texts, validation, test, _ = text
    parts = [roles(x) for x in (*texts, validation, test)]
    assert len(parts) == 6
    assert min(map(len, parts)) > 60
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_replicas_share_the_same_text_however_many_they_are(text):
    texts, *held_out, _ = text
    (whole,), *same, _ = plays_text.load(1)
    assert roles(whole) == set.union(*map(roles, texts))
    for a, b in zip(held_out, same, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_drawn_is_pieces_of_the_text_and_other_ones_for_another_seed():
    text, shape = np.arange(1000), (6, 2, 65)
    a, again, b = (plays_text.drawn(text, shape, 0, x, 1) for x in (1, 1, 2))
    assert a.shape == shape
    assert (np.diff(a) == 1).all()
    assert (a != b).any()
    np.testing.assert_array_equal(a, again)


#
# What is sent.
#
def bytes_sent(settings):
    """In a round, in units of the parameters' bytes."""
    algorithm = diloco_lm.make_algorithm(settings)
    config = transformer.CONFIGS[settings.model]
    state = jax.eval_shape(
        lambda key: algorithm.init(transformer.init(config, key)), jax.random.key(0)
    )
    sizes = algorithm.placements.values()
    shape = *sizes, settings.steps, settings.batch, config.length + 1
    examples = jax.ShapeDtypeStruct(shape, "int32")
    plan = drjax.make_plan(algorithm.round)(state, examples, jax.random.key(0))
    model = sum(4 * x.size for x in jax.tree.leaves(state.params))
    outer, *_ = algorithm.placements
    return sum(plan.communication(outer)) / model


@pytest.mark.parametrize(
    "mode, models",
    [("diloco", 2), ("streaming", 2), ("nested", 2), ("data-parallel", 2 * 6)],
)
def test_a_round_sends_the_model_down_and_up_and_data_parallel_each_step(mode, models):
    assert bytes_sent(dataclasses.replace(SHORT, mode=mode)) == models


@pytest.mark.parametrize("mode", diloco_lm.MODES)
@pytest.mark.parametrize("encoding, size", [("bfloat16", 2), ("int8", 1 + 4 / 128)])
def test_what_is_encoded_is_sent_up_in_fewer_bytes(mode, encoding, size):
    plain = dataclasses.replace(SHORT, mode=mode)
    down = bytes_sent(plain) / 2  # As much as up.
    up = bytes_sent(dataclasses.replace(plain, encoding=encoding)) - down
    # The blocks of small arrays are not full.
    assert up / down == pytest.approx(size / 4, rel=0.01)


#
# Errors.
#
def test_pods_that_do_not_divide_the_replicas_are_an_error():
    with pytest.raises(ValueError, match="3 pods do not divide 2 replicas"):
        diloco_lm.make_algorithm(dataclasses.replace(SHORT, mode="nested", pods=3))


def test_more_devices_for_a_model_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="8 devices, 16 of them for a model, do not"):
        diloco_lm.make_mesh({"replicas": 2}, 16)


def test_a_folder_of_other_settings_is_an_error(tmp_path):
    state, sharding = (
        {"x": jnp.arange(3.0)},
        {"x": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
    )
    saved = diloco_lm.Checkpoints(tmp_path, SHORT)
    saved.save(1, state, [{"round": 1}])
    saved.close()
    other = dataclasses.replace(SHORT, rate=0.5, batch=3)
    with pytest.raises(ValueError, match=r"other settings of batch, rate\. Name"):
        diloco_lm.Checkpoints(tmp_path, other).restore(state, sharding)


@pytest.mark.parametrize(
    "placements, model, sizes",
    [
        ({"replicas": 4}, 2, (4, 2)),
        ({"replicas": 2}, 1, (2, 1)),
        ({"replicas": 6}, 1, (2, 1)),
        ({"pods": 2, "replicas": 2}, 2, (2, 2, 2)),
    ],
)
def test_the_mesh_has_as_many_devices_as_the_placements_can_use(
    placements, model, sizes
):
    mesh = diloco_lm.make_mesh(placements, model)
    assert mesh.axis_names == (*placements, "model")
    assert mesh.devices.shape == sizes


#
# Runs.
#
@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, encoding", [*((x, "none") for x in diloco_lm.MODES), ("streaming", "int8")]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_curve(mode, encoding, tmp_path):
    settings = dataclasses.replace(SHORT, mode=mode, encoding=encoding)
    at_once = diloco_lm.train(settings, tmp_path / "at_once")
    diloco_lm.train(settings, tmp_path / "stopped", until=2)
    assert diloco_lm.train(settings, tmp_path / "stopped") == at_once
    assert [row["round"] for row in at_once] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["streaming", "nested"])
def test_an_encoded_run_on_a_mesh_is_near_an_exact_one(mode, tmp_path):
    settings = dataclasses.replace(
        SHORT, mode=mode, replicas=4, rounds=2, model_devices=2
    )
    exact = diloco_lm.train(settings, tmp_path / "exact")
    encoded = dataclasses.replace(settings, encoding="int8")
    for a, b in zip(diloco_lm.train(encoded, tmp_path), exact, strict=True):
        assert a["bytes"] < 0.64 * b["bytes"]
        assert a["validation"] == pytest.approx(b["validation"], rel=3e-3)
        assert a["validation"] != b["validation"]


@pytest.mark.slow
def test_pods_send_each_other_what_is_encoded():
    """Over pods int8 goes, in a quarter of the bytes; within them, what went before."""

    def sent(encoding):
        settings = dataclasses.replace(
            SHORT, mode="nested", replicas=4, model_devices=2, encoding=encoding
        )
        algorithm = diloco_lm.make_algorithm(settings)
        mesh = diloco_lm.make_mesh(algorithm.placements, 2)
        config, key = transformer.CONFIGS["tiny"], jax.random.key(0)
        like = jax.eval_shape(
            lambda k: algorithm.init(transformer.init(config, k)), key
        )
        split = diloco_lm.shardings(mesh, like)
        examples = jax.ShapeDtypeStruct((2, 2, 6, 2, config.length + 1), "int32")
        with jax.set_mesh(mesh):
            run = diloco_lm.jitted_round(algorithm, split)
            text = run.lower(*like, examples, key).compile().as_text() or ""
        of_pods = {True: 0.0, False: 0.0}
        for found in hlo.collectives(text):
            of_pods["pods" in found.axes(mesh.shape)] += found.times * found.sent
        return of_pods[True], of_pods[False]

    (over, within), (encoded, same) = sent("none"), sent("int8")
    assert encoded < 0.28 * over
    assert same == within


@pytest.mark.slow
def test_a_short_run_learns_more_than_single_characters(tmp_path, capsys):
    short = "--rounds=4", "--steps=20", "--batch=8"
    diloco_lm.main([*short, f"--folder={tmp_path}"])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "curve.json").read_text())["rows"]
    assert rows[-1]["validation"] < 2.9
    assert "Single characters have an entropy of 3.15" in printed
    assert diloco_lm.PROMPT in printed
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    beside = tmp_path / "beside"
    diloco_lm.main(
        [
            *(*short, "--mode=nested", "--until=1"),
            *(f"--folder={beside}", "--beside", f"{tmp_path}"),
        ]
    )
    assert (beside / "curve.png").stat().st_size > 0


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    """Each has two of four devices, two of which share a model."""
    settings = dataclasses.replace(SHORT, rounds=2, model_devices=2)
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(settings).items()
    ]
    command = [sys.executable, "-m", "examples.diloco_lm", *options]
    command += [f"--folder={tmp_path}", f"--coordinator={address}", "--processes=2"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, f"--process={i}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    printed = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert "2 replicas x 2 model devices" in printed[0][0]
    assert diloco_lm.PROMPT not in printed[1][0]  # The first speaks for both.
    together = json.loads((tmp_path / "curve.json").read_text())["rows"]
    alone = diloco_lm.train(settings, tmp_path / "alone")
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


#
# On TPUs, as their compiler schedules it.
#
_COMPILE = """
import functools, sys
import jax, numpy as np, optax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from examples import diloco, diloco_lm, transformer

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
devices = np.array(topology.devices).reshape(4, 2)
mesh = jax.sharding.Mesh(devices, ("replicas", "model"), (AxisType.Auto,) * 2)
config = transformer.Config(2048, 2, 1024, 8, 128)
algorithm = diloco.streaming(
    functools.partial(transformer.loss, config), optax.adamw(1e-3),
    optax.sgd(0.7, momentum=0.9, nesterov=True),
    replicas=4, fragments=1, delay=2, mixing=0.5,
)
init = lambda key: algorithm.init(transformer.init(config, key))
key = jax.random.key(0)
like = jax.eval_shape(init, key)
split = diloco_lm.shardings(mesh, like)
state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, split
)
placed = NamedSharding(mesh, PartitionSpec("replicas"))
examples = jax.ShapeDtypeStruct((4, 4, 2, 129), "int32", sharding=placed)
with jax.set_mesh(mesh):
    run = diloco_lm.jitted_round(algorithm, split)
    compiled = run.lower(*state, examples, key).compile(compiler_options=OPTIONS)
print(compiled.as_text())
"""
# All-reduces of this size and more run on the SparseCores: those of fragments, and not
# those within a model.
_OPTIONS = {
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes": "4000000",
}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed, which compiles for TPUs: pip install libtpu",
)
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="this JAX cannot read what libtpu makes of an all-reduce on SparseCores",
)
def test_a_fragments_reduction_overlaps_local_steps_on_tpus():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    code = f"OPTIONS = {_OPTIONS}\n{_COMPILE}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, entry = done.stdout.split("\nENTRY ")
    lines = entry.splitlines()  # In the order of the schedule.

    def where(pattern):
        return [i for i, line in enumerate(lines) if re.search(pattern, line)]

    (begin,) = where(r"^ *%all-reduce\S*-update = ")
    (end,) = where(r"^ *%all-reduce\S*-done = ")
    first, second = where(r"^ *%while.*local_steps")
    assert first < begin < second < end
    # All matrices are in it: 12 x 1024 x 1024 of each block, and the tokens.
    (shapes,) = re.findall(r" = \((.*)\) \S+-done\(", lines[end])
    sizes = [
        math.prod(map(int, x.split(",")))
        for x in re.findall(r"f32\[([\d,]+)\]", shapes)
    ]
    assert sum(sizes) == (2 * 12 * 1024 + 2048) * 1024 // 2
