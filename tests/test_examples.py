"""The example runs, learns, and shows what it promises."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import digits_fedavg


def run_digits(path, rounds):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        digits_fedavg.main([f"--rounds={rounds}", f"--output={path}"])
    return printed.getvalue()


@pytest.fixture(scope="module")
def plot(tmp_path_factory):
    return tmp_path_factory.mktemp("digits") / "plot.png"


@pytest.fixture(scope="module")
def printed(plot):
    return run_digits(plot, rounds=10)


def accuracy(printed):
    (percentage,) = re.findall(r"^Test accuracy (.*)%;", printed, re.MULTILINE)
    return float(percentage) / 100


def operators(printed, title):
    """Kind and name of the operators of a jaxpr, as printed under a title."""
    (section,) = re.findall(rf"^{title}, .*:\n((?:  .*\n)+)", printed, re.MULTILINE)
    pairs = re.findall(r"^  (\w+) +(\S+)", section, re.MULTILINE)
    return [(kind, name) if kind == "map" else kind for kind, name in pairs]


def test_a_few_rounds_learn_far_more_than_chance(printed):
    assert accuracy(printed) > 0.6


@pytest.mark.slow
def test_all_rounds_learn_the_digits(tmp_path):
    assert accuracy(run_digits(tmp_path / "plot.png", rounds=60)) > 0.95


def test_every_engine_gives_what_jit_gives(printed):
    rows = re.findall(r"^(jit|streaming|beam|federated) .* (\S+)$", printed, re.M)
    assert [name for name, _ in rows] == ["jit", "streaming", "beam", "federated"] * 2
    assert all(float(difference) < 1e-5 for _, difference in rows)


def test_gradient_agrees_with_finite_differences(printed):
    rows = re.findall(
        r"^  (client|server) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE
    )
    assert [name for name, *_ in rows] == ["client", "server"]
    for _, gradient, difference, relative in rows:
        assert float(gradient) == pytest.approx(float(difference), rel=1e-3)
        assert float(relative) < 1e-3


def test_operators_survive_in_the_round(printed):
    assert operators(printed, "The loss after a round") == [
        *("broadcast", ("map", "client_update"), "reduce_sum"),
        *("broadcast", ("map", "mean_loss"), "reduce_sum"),
    ]


def test_operators_survive_in_its_gradient(printed):
    assert operators(printed, "Its gradient") == [
        *("broadcast", ("map", "jvp_client_update"), "reduce_sum"),
        *("broadcast", ("map", "jvp_mean_loss"), "reduce_sum"),
        *("broadcast", ("map", "transpose_lin_jvp_mean_loss"), "reduce_sum"),
        *("broadcast", ("map", "transpose_lin_jvp_client_update"), "reduce_sum"),
    ]


def test_plot_is_a_png(printed, plot):
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plans_are_printed_and_drawn(printed, plot):
    for title, name, rounds in (
        ("A round", "plan", 1),
        ("The gradient of the loss after it", "gradient", 3),
    ):
        page = plot.with_suffix(f".{name}.html")
        (plan,) = re.findall(
            rf"^{title}, as a plan; drawn in {page}:\n((?:.+\n)+)", printed, re.M
        )
        assert len(re.findall("^round over 'clients', 50", plan, re.M)) == rounds
        assert page.read_text().count("50 × clients") == rounds


def test_a_mesh_computes_the_same_with_one_sum_over_the_clients(printed):
    (section,) = re.findall(r"^A round on 8 devices, .*:\n((?:.+\n)+)", printed, re.M)
    first, *collectives = section.splitlines()
    assert float(first.split()[-1]) < 1e-6
    assert len(re.findall("all-reduce +reduce_sum", section)) == 1
    # The other one sums over the hidden units of a model.
    assert len(collectives) == 2
    assert "all-reduce  client_update" in section


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])  # Of a process, which has 25 clients.
def test_two_processes_compute_what_one_does(devices):
    command = [sys.executable, "-m", "examples.digits_processes", "--rounds=3"]
    done = subprocess.run(
        command,
        cwd=Path(digits_fedavg.__file__).parents[1],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Process 1 of 2" in done.stdout
    difference = re.search(r"Largest difference .*: (\S+)$", done.stdout, re.M)
    assert difference
    assert float(difference[1]) < 1e-5
