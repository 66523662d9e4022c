"""Sampling, faults, runs, and runs that are interrupted."""

import contextlib
import csv
import functools
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated_clients import COUNTS, MODEL, Data, N, WithNan
from helpers import assert_close

import drjax
import federated
from federated import _client_states

#
# Sampling and faults.
#
SAMPLERS = {
    "uniform": federated.uniform,
    "weighted": federated.weighted,
    "shuffled": federated.shuffled,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_functions_of_the_seed_and_the_round(name):
    sampler, data = SAMPLERS[name], Data()
    state = repr(np.random.get_state())
    for number in range(1, 6):
        cohort = sampler(7, number, data, 5)
        assert len({*cohort.tolist()}) == 5
        assert {*cohort.tolist()} <= {*range(N)}
        np.testing.assert_array_equal(cohort, sampler(7, number, data, 5))
    several = [tuple(sampler(s, r, data, 5)) for s in range(5) for r in range(1, 3)]
    assert len({*several}) > 5
    assert repr(np.random.get_state()) == state


def test_shuffled_takes_each_client_once_before_any_again():
    taken = [federated.shuffled(3, number, Data(), 4) for number in range(1, 7)]
    for first in (0, 3):
        passed = np.concatenate(taken[first : first + 3])
        assert sorted(passed.tolist()) == [*range(N)]


def test_weighted_sampling_follows_the_numbers_of_examples():
    """Of one client a round: within five standard deviations, never an empty one."""
    counts = np.array([0, 1, 2, 7])
    data, rounds = Data(counts), 4000
    seen = np.bincount(
        [federated.weighted(0, r, data, 1)[0] for r in range(rounds)], minlength=4
    )
    p = counts / counts.sum()
    assert seen[0] == 0
    assert (np.abs(seen - rounds * p) <= 5 * np.sqrt(rounds * p * (1 - p))).all()


FAULTS = {
    "none": (federated.Faults(), dict(reported=10)),
    "all lost": (federated.Faults(dropout=1), dict(dropped=10)),
    "all late": (federated.Faults(deadline=0), dict(late=10)),
    "all NaN": (federated.Faults(nan=1), dict(rejected=10)),
    "more asked": (federated.Faults(over_selection=0.5), dict(reported=10, late=5)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_table_of_faults(name):
    faults, want = FAULTS[name]
    asked = faults.asked(10)
    for number in range(5):
        taken, *others = faults.reports(0, number, asked, 10)
        got = dict(
            zip(
                ("reported", "dropped", "late", "rejected"),
                [len(taken), *others],
                strict=True,
            )
        )
        assert got == {**dict.fromkeys(got, 0), **want}


def test_faults_are_as_frequent_as_they_say():
    faults, asked, rounds = federated.Faults(dropout=0.3, nan=0.2), 20, 400
    reports = [faults.reports(1, r, asked, asked) for r in range(rounds)]
    again = [faults.reports(1, r, asked, asked) for r in range(rounds)]
    for a, b in zip(reports, again, strict=True):
        assert_close(a, b)
    n = asked * rounds
    for count, p in (
        (sum(r.dropped for r in reports), 0.3),
        (sum(r.rejected for r in reports), 0.7 * 0.2),
        (sum(len(r.taken) for r in reports), 0.7 * 0.8),
    ):
        assert abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))


#
# Runs.
#
def squared(model, examples):
    return jnp.sum((model - examples["x"]) ** 2, -1)


FEDAVG = federated.fedavg(squared, optax.sgd(0.1), optax.sgd(0.5), batch_size=4)
SCAFFOLD = federated.scaffold(squared, 0.05, population=N, batch_size=4)
DILOCO = federated.diloco(squared, optax.sgd(0.1), steps=3, batch_size=4)


def run(algorithm=FEDAVG, data=None, **options):
    defaults: dict[str, Any] = dict(rounds=7, cohort_size=5, seed=2, progress=False)
    return federated.run(algorithm, MODEL, data or Data(), **{**defaults, **options})


def test_a_run_is_the_rounds_one_after_the_other():
    """By hand, with plain `jax.jit` and the documented samples and keys."""
    state, metrics = FEDAVG.init(MODEL), {}
    for number in range(1, 5):
        clients = federated.uniform(2, number, Data(), 5)
        key = jax.random.fold_in(jax.random.key(2), number)
        batch = federated.batch_of(Data(), clients)
        state, metrics = jax.jit(FEDAVG.round)(state, batch, key)
    for engine in ("streaming", jax.jit):
        result = run(rounds=4, engine=engine)
        assert_close(result.state, state)
        assert_close(result.metrics["loss"][-1], float(metrics["loss"]))


@pytest.mark.parametrize("algorithm", [FEDAVG, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_engines_agree_when_clients_are_lost(algorithm):
    options: dict[str, Any] = dict(
        faults=federated.Faults(dropout=0.3), min_fraction=0.2
    )
    a, b = (run(algorithm, engine=e, **options) for e in ("streaming", jax.jit))
    assert a.metrics["dropped"][1:].sum() > 0
    assert_close(a.state, b.state)
    assert_close(a.metrics["reported"], b.metrics["reported"])


def test_a_round_with_too_few_reports_changes_nothing(caplog):
    """And says so. The next rounds are as if there had been none like it."""
    faults = federated.Faults(dropout=0.5)
    with caplog.at_level(logging.WARNING, "federated"):
        states = []
        result = run(
            faults=faults,
            min_fraction=0.6,
            callbacks=[lambda rows, state: states.append(state.params)],
        )
    completed = result.metrics["completed"][1:]
    failed = np.flatnonzero(completed == 0)
    assert 0 < len(failed) < len(completed)
    before = [MODEL, *states]
    for i, is_completed in enumerate(completed):
        same = np.array_equal(before[i], states[i])
        assert same != bool(is_completed)
        assert (result.metrics["reported"][1 + i] >= 3) == bool(is_completed)
    assert caplog.text.count("changes nothing") == len(failed)


def test_clients_that_send_nan_are_counted():
    result = run(data=WithNan(), cohort_size=N, min_fraction=0.5, rounds=2)
    assert result.metrics["rejected"][1:].tolist() == [2, 2]
    assert result.metrics["reported"][1:].tolist() == [N - 2, N - 2]
    assert np.isfinite(result.params).all()


@pytest.mark.parametrize(
    "algorithm, down, up",
    [
        (
            FEDAVG,
            12 + 8,
            12 + 4 + 4,
        ),  # The model and a key; the model, loss and weight.
        (SCAFFOLD, 12 + 12 + 8, 12 + 12 + 4 + 4 + 4),
    ],
    ids=["fedavg", "scaffold"],
)
def test_bytes_are_those_of_the_plan(algorithm, down, up):
    """Down to all those asked, and up from those who report."""
    metrics = run(
        algorithm, faults=federated.Faults(dropout=0.4), min_fraction=0
    ).metrics
    assert set(metrics["bytes_down"][1:]) == {5 * down}
    assert len({*metrics["reported"][1:]}) > 1
    assert_close(metrics["bytes_up"][1:], up * metrics["reported"][1:])


def test_a_run_that_may_lose_clients_does_not_take_their_number_for_a_constant():
    def round(state, batch, key):
        total = drjax.program(clients=len(batch.count))(drjax.reduce_sum)(batch.count)
        return total / len(batch.count), {}

    algorithm = federated.Algorithm(lambda p: p, round, lambda s: s)
    faults = federated.Faults(dropout=0.1)
    with pytest.raises(ValueError, match="with their number as a constant"):
        run(algorithm, faults=faults, min_fraction=0.1, rounds=0)


def test_states_are_those_of_reporting_clients_alone(tmp_path):
    """On disk only for clients seen, and unchanged for those that are lost."""
    faults = federated.Faults(dropout=0.5)
    options: dict[str, Any] = dict(faults=faults, min_fraction=0.0, rounds=3)
    result = run(SCAFFOLD, folder=tmp_path, checkpoint_every=1, **options)
    with contextlib.closing(sqlite3.connect(tmp_path / "clients.sqlite")) as file:
        rows = file.execute("select client, round from states").fetchall()
    asked = [federated.uniform(2, r, Data(), 5) for r in range(1, 4)]
    reported = [asked[r - 1][faults.reports(2, r, 5, 5).taken] for r in range(1, 4)]
    last = {int(c): r for r, clients in enumerate(reported, 1) for c in clients}
    assert dict(sorted(rows)) == last
    assert sum(map(len, reported)) == result.metrics["reported"][1:].sum()


def test_states_of_clients_go_back_and_are_forgotten(tmp_path):
    first = {"a": np.zeros(2, np.float32), "b": np.int32(7)}
    opened = _client_states.ClientStates(tmp_path / "x.sqlite", first)
    with contextlib.closing(opened) as states:
        for number in (1, 2, 4):
            new = {
                "a": np.full((2, 2), number, np.float32),
                "b": np.array([number] * 2, np.int32),
            }
            states.write(number, np.array([3, 5]), new)
        assert states.read([5, 8])["a"].tolist() == [[4, 4], [0, 0]]
        states.forget_before(2)
        states.go_back_to(3)
        assert states.read([5, 8])["b"].tolist() == [2, 7]
        states.go_back_to(1)  # There was a row of round 1, which 2 stood for.
        assert states.read([5])["b"].tolist() == [7]


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_sweep_is_the_runs_one_by_one(name):
    """For rates and seeds of their own."""

    def make(rate):
        if name == "scaffold":
            return federated.scaffold(squared, rate, population=N, batch_size=4)
        return federated.fedavg(squared, optax.sgd(rate), batch_size=4)

    def norm(model):
        return {"norm": jnp.sum(model**2)}

    rates, seeds = jnp.array([0.02, 0.1]), [2, 5]
    options: dict[str, Any] = dict(
        rounds=3, cohort_size=5, evaluate=norm, eval_every=2, progress=False
    )
    swept = federated.sweep(make, rates, MODEL, Data(), seeds=seeds, **options)
    for i, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        one = run(make(rate), seed=seed, engine=jax.jit, **options)
        assert_close(jax.tree.map(lambda x, i=i: x[i], swept.states), one.state)
        for metric in ("norm", "loss"):
            assert_close(swept.metrics[metric][i], one.metrics[metric])


@pytest.mark.parametrize("algorithm", [FEDAVG, DILOCO], ids=["fedavg", "diloco"])
def test_what_is_drawn_does_not_depend_on_the_kind_of_keys(algorithm):
    """Keys of the kind `rbg` draw other numbers for each engine, and for padding."""
    want = run(algorithm, rounds=2)
    with jax.default_prng_impl("rbg"):
        for engine in ("streaming", jax.jit):
            assert_close(run(algorithm, rounds=2, engine=engine).state, want.state)


#
# Runs that are interrupted.
#
class Interruption(Exception):
    pass


def files_in(folder):
    names = ("metrics.csv", "curves.png", "tensorboard/events.out.tfevents.0")
    return {name: Path(folder, name).read_bytes() for name in names}


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("algorithm", [FEDAVG, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_a_run_that_goes_on_ends_with_the_same_bits(algorithm, tmp_path):
    def options(name):
        return dict(
            folder=tmp_path / name,
            checkpoint_every=2,
            eval_every=3,
            evaluate={"test": lambda p: {"norm": jnp.sum(p**2)}},
            faults=federated.Faults(dropout=0.2),
            min_fraction=0.4,
        )

    whole = run(algorithm, **options("whole"))

    def interrupt(rows, state):
        if len(rows) in (4, 6):  # After rounds 3 and 5: once each, for rows go on.
            raise Interruption

    interrupted = 0
    while True:
        try:
            again = run(
                algorithm, **options("parts"), callbacks=[interrupt] * (interrupted < 2)
            )
            break
        except Interruption:
            interrupted += 1
    assert interrupted == 2
    assert bits(again.state) == bits(whole.state)
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")
    for name, values in whole.metrics.items():
        np.testing.assert_array_equal(again.metrics[name], values)


SCRIPT = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import jax
    import test_federated_run as t
    result = t.run(t.SCAFFOLD, rounds=40, folder=sys.argv[1], checkpoint_every=2,
        evaluate={{"test": lambda p: {{"norm": float((p**2).sum())}}}})
    print(repr(t.bits(result.state)))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    """Also while it writes; it is killed twenty times."""
    root = Path(__file__).parents[1]
    script = textwrap.dedent(SCRIPT.format(tests=str(root / "tests"), root=str(root)))

    def start(name):
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    begin = time.perf_counter()
    whole = start("whole")
    want, errors = whole.communicate()
    assert whole.returncode == 0, errors
    seconds = time.perf_counter() - begin
    rng, kills = np.random.default_rng(0), 0
    for _ in range(60):
        process = start("parts")
        # Most of the time goes into the start; kills are spread over all of it.
        wait = rng.uniform(0.3, 1.1) * seconds if kills < 20 else None
        try:
            got, errors = process.communicate(timeout=wait)
            assert process.returncode == 0, errors
            assert got == want
            if kills >= 20:
                break
            (tmp_path / "parts").rename(tmp_path / f"parts {kills} {wait}")
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills == 20
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")


def test_a_run_can_be_made_longer(tmp_path):
    run(rounds=3, folder=tmp_path)
    longer = run(rounds=7, folder=tmp_path)
    assert bits(longer.state) == bits(run().state)
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        assert [row["round"] for row in csv.DictReader(file)] == [*map(str, range(8))]


def test_early_stopping_ends_a_run_for_good(tmp_path):
    stop = federated.early_stopping("loss", patience=1, mode="min", min_delta=1e3)
    first = run(folder=tmp_path, callbacks=[stop])
    again = run(folder=tmp_path, callbacks=[stop])
    assert len(first.metrics["round"]) == len(again.metrics["round"]) < 8


#
# Wrong use.
#
@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(cohort_size=13), ValueError, "13 clients are to be asked.*there are 12"),
        (dict(cohort_size=0), ValueError, "cohort_size 1 at least"),
        (dict(min_fraction=2), ValueError, "between 0 and 1"),
        (dict(seed=-1), ValueError, "a seed is between 0"),
        (dict(seed=2**32), ValueError, "a seed is between 0"),
        (dict(eval_every=0), ValueError, "eval_every is 1 at least"),
        (
            dict(algorithm=FEDAVG._replace(round=lambda s, b, k: (s, {}))),
            ValueError,
            "is to be a program over 'clients'",
        ),
        (dict(engine="magic"), ValueError, "engine is 'streaming', or a function"),
        (dict(algorithm=squared), TypeError, "is an Algorithm"),
        (dict(data={"a": 1}), TypeError, "data is a ClientData"),
        (
            dict(faults=federated.Faults(dropout=0.1)),
            ValueError,
            "lower min_fraction, or over_selection",
        ),
        (dict(faults=federated.Faults(nan=2)), ValueError, "nan is a probability"),
        (
            dict(faults=federated.Faults(over_selection=float("inf"))),
            ValueError,
            "over_selection is not negative, and finite",
        ),
        (
            dict(
                algorithm=FEDAVG._replace(
                    round=lambda *args: (FEDAVG.round(*args)[0], [1.0])
                )
            ),
            TypeError,
            "are a dict of numbers by name",
        ),
        (
            dict(sampler=lambda *_: np.zeros(5, int)),
            ValueError,
            "5 distinct clients out of 12",
        ),
        (
            dict(evaluate=lambda p: {"norm": p}),
            ValueError,
            r"a metric is a number, but 'norm' is float32\(3,\)",
        ),
        (
            dict(evaluate=lambda p: {"loss": 0.0}, eval_every=1),
            ValueError,
            "'loss' is the name of two metrics",
        ),
    ],
)
def test_errors_say_what_came_and_what_to_do(options, error, text):
    with pytest.raises(error, match=rf"federated.*{text}"):
        run(**options)


def test_what_clients_keep_belongs_to_the_checkpoints(tmp_path):
    run(SCAFFOLD, rounds=2, folder=tmp_path)
    (tmp_path / "clients.sqlite").unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole folder"):
        run(SCAFFOLD, rounds=4, folder=tmp_path)


def test_a_state_may_hold_keys_empty_arrays_and_halves(tmp_path):
    """And comes back from a checkpoint with its types."""

    def init(params):
        key = jax.random.key(1)
        half = params.astype(jnp.bfloat16)
        return {
            "p": params,
            "key": key,
            "none": None,
            "e": jnp.zeros((0, 2)),
            "h": half,
        }

    def round(state, batch, key):
        (new, _), metrics = FEDAVG.round(FEDAVG.init(state["p"]), batch, key)
        later = jax.random.fold_in(state["key"], 1)
        return dict(state, p=new, key=later, h=state["h"] * 2), metrics

    algorithm = federated.Algorithm(init, round, lambda state: state["p"])
    want = run(algorithm, rounds=3).state
    run(algorithm, rounds=2, folder=tmp_path)
    got = run(algorithm, rounds=3, folder=tmp_path).state
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    keys = (jax.random.key_data(state.pop("key")) for state in (got, want))
    assert_close(*keys)
    assert bits(got) == bits(want)


def test_a_state_may_have_no_array(tmp_path):
    def round(state, batch, key):
        return state, {
            "mean": federated.mean()(batch._replace(data=batch.data["x"]))[0]
        }

    algorithm = federated.Algorithm(lambda p: (), round, lambda state: ())
    want = run(algorithm, rounds=3)
    run(algorithm, rounds=2, folder=tmp_path)
    got = run(algorithm, rounds=3, folder=tmp_path)
    assert_close(got.metrics["mean"], want.metrics["mean"])


def changing(state, batch, key):
    return {"p": state["p"], "rate": state["rate"] * 0.9}, FEDAVG.round(
        FEDAVG.init(state["p"]), batch, key
    )[1]


@pytest.mark.parametrize("engine", ["streaming", jax.jit], ids=["streaming", "jit"])
def test_a_round_keeps_the_types_of_the_state(engine):
    """Or what is restored would not be what there was: here an integer, 0."""
    algorithm = federated.Algorithm(
        lambda p: {"p": p, "rate": 1}, changing, lambda state: state["p"]
    )
    with pytest.raises(
        ValueError, match=r"\['rate'\] of the state .* is float32\(\), but it got int32"
    ):
        run(algorithm, engine=engine)
    more = algorithm._replace(init=lambda p: {"p": p, "rate": 1.0, "more": p})
    with pytest.raises(ValueError, match="it is to keep its structure"):
        run(more, engine=engine)
    good = algorithm._replace(init=lambda p: {"p": p, "rate": 1.0})
    assert_close(run(good, rounds=2, engine=engine).state["rate"], 0.81)


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    seen = []

    def start_another(rows, state):
        seen.append(rows[-1]["round"])
        with pytest.raises(RuntimeError, match="another run writes to"):
            run(folder=tmp_path)

    run(rounds=2, folder=tmp_path, callbacks=[start_another])
    assert seen == [1, 2]
    run(rounds=3, folder=tmp_path)


def take_from(first, seed, round, data, size):
    return np.arange(first, first + size)


def test_what_a_run_is_started_with_has_a_name_in_every_process(tmp_path):
    """A sampler's address in memory has not; what it is given is part of it."""
    sampler = functools.partial(take_from, 2)
    run(rounds=2, folder=tmp_path, sampler=sampler)
    run(rounds=3, folder=tmp_path, sampler=functools.partial(take_from, 2))
    with pytest.raises(ValueError, match=r"take_from, \(2,\).* there and .*\(3,\)"):
        run(rounds=4, folder=tmp_path, sampler=functools.partial(take_from, 3))


def test_what_draws_is_looked_for_before_the_work(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "federated._curves", raising=False)
    monkeypatch.delattr(federated, "_curves", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        run(folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_jit_may_not_be_disabled_for_the_engine():
    with jax.disable_jit():
        with pytest.raises(RuntimeError, match=r"jax\.disable_jit forbids"):
            run(rounds=1)
        eager = run(rounds=1, engine=lambda round: round)
    assert_close(eager.state, run(rounds=1).state)


#
# Wrong use of sweeps.
#
@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(cohort_size=13), ValueError, "13 clients are to be asked.*there are 12"),
        (dict(cohort_size=0), ValueError, "cohort_size 1 at least"),
        (dict(rounds=-1), ValueError, "rounds is 0 at least"),
        (dict(eval_every=0), ValueError, "eval_every is 1 at least"),
        (dict(seeds=[]), ValueError, "no seeds"),
        (dict(seeds=[-1, 0]), ValueError, "a seed is between 0"),
        (dict(seeds=[0]), ValueError, "there are 1 seeds"),
        (dict(data={"a": 1}), TypeError, "data is a ClientData"),
    ],
)
def test_errors_of_sweeps_say_what_came(options, error, text):
    given: dict[str, Any] = dict(data=Data(), rounds=2, cohort_size=5, seeds=[0, 1])
    given.update(options, progress=False)
    with pytest.raises(error, match=rf"federated.sweep: .*{text}"):
        federated.sweep(lambda _: FEDAVG, jnp.zeros(2), MODEL, **given)


def test_a_sweep_keeps_the_types_of_what_clients_keep():
    def round(state, kept, batch, key):
        new, metrics = FEDAVG.round(state, batch, key)
        return new, kept + 0.5, metrics

    algorithm = FEDAVG._replace(round=round, client_init=lambda p: jnp.int32(0))
    options: dict[str, Any] = dict(rounds=1, cohort_size=5, progress=False)
    with pytest.raises(ValueError, match=r"clients' state .* is float32.* got int32"):
        federated.sweep(
            lambda _: algorithm, None, MODEL, Data(), seeds=range(2), **options
        )


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(rounds=2, folder=tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="seed is 2 there and 3 here"):
        run(rounds=4, folder=tmp_path, seed=3)
    faster = federated.fedavg(squared, optax.sgd(0.2), optax.sgd(0.5), batch_size=4)
    with pytest.raises(ValueError, match=r"round is '.*' there"):
        run(faster, rounds=4, folder=tmp_path)
    with pytest.raises(ValueError, match=r"data is '.*' there"):
        run(data=Data(COUNTS[::-1]), rounds=4, folder=tmp_path)
    other = FEDAVG._replace(init=lambda params: FEDAVG.init(params + 1))
    with pytest.raises(ValueError, match=r"start is '.*' there"):
        run(other, rounds=4, folder=tmp_path)
    with pytest.raises(ValueError, match="has a run of 2 rounds"):
        run(rounds=1, folder=tmp_path)
    with pytest.raises(FileExistsError, match="has checkpoints of a run"):
        run(rounds=4, folder=tmp_path, resume=False)
    assert files_in(tmp_path) == before
