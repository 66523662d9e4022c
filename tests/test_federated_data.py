"""Clients' data: partitions, splits and lazy reading."""

import jax
import numpy as np
import pytest

import federated

KEY = jax.random.key(0)


def labelled(examples, classes=10):
    """Examples that say which they are, and their classes, equally many of each."""
    y = np.random.default_rng(0).permutation(np.arange(examples) % classes)
    return {"row": np.arange(examples), "y": y}, y


PARTITIONS = {
    "iid": lambda tree, y, n, key: federated.iid(tree, n, key),
    "dirichlet": lambda tree, y, n, key: federated.dirichlet(tree, y, n, 0.3, key),
    "steep": lambda tree, y, n, key: federated.dirichlet(tree, y, n, 1e-9, key),
    "shards": lambda tree, y, n, key: federated.label_shards(tree, y, n, 2, key),
    "natural": lambda tree, y, n, key: federated.from_arrays(tree, y * 7 % n),
}


class Recorder:
    """An array that remembers what was read of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read = []

    def __getitem__(self, rows):
        self.read.append(rows)
        return self.array[rows]


#
# Partitions.
#
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
def test_every_example_is_at_exactly_one_client(partition):
    tree, y = labelled(503)
    data = partition(tree, y, 30, KEY)
    rows = federated.pooled(data)["row"]
    assert sorted(rows) == list(range(503))
    assert [len(data[i]["row"]) for i in range(len(data))] == list(data.num_examples)
    assert min(data.num_examples) > 0
    for i in range(len(data)):
        np.testing.assert_array_equal(data[i]["y"], y[data[i]["row"]])
        assert (np.diff(data[i]["row"]) > 0).all()


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
def test_the_key_alone_decides_a_partition(partition):
    tree, y = labelled(200)

    def rows(key):
        return list(federated.pooled(partition(tree, y, 20, key))["row"])

    assert rows(KEY) == rows(jax.random.key(0)) == rows(jax.random.PRNGKey(0))
    natural = partition is PARTITIONS["natural"]
    assert (rows(KEY) == rows(jax.random.key(1))) == natural


def test_a_partition_does_not_follow_numpys_generator_of_the_same_seed():
    y = np.random.default_rng(0).permutation(1000) % 2
    assert 0.4 < federated.iid(y, 2, KEY)[0].mean() < 0.6


@pytest.mark.parametrize("name", ["iid", "dirichlet", "steep", "shards"])
def test_partitions_are_of_nearly_equal_sizes(name):
    tree, y = labelled(503)
    counts = PARTITIONS[name](tree, y, 30, KEY).num_examples
    assert np.ptp(counts) <= (2 if name == "shards" else 1)


def mixtures(data, classes=10):
    return np.stack(
        [np.bincount(data[i]["y"], minlength=classes) for i in range(len(data))]
    ) / np.reshape(data.num_examples, (-1, 1))


def test_dirichlet_for_large_alpha_is_as_even_as_iid():
    tree, y = labelled(20_000)
    # Of 200 examples of 10 equal classes, a class's share deviates by 0.021.
    for data in (
        federated.dirichlet(tree, y, 100, 1e9, KEY),
        federated.iid(tree, 100, KEY),
    ):
        assert 0.015 < mixtures(data).std() < 0.027


def test_dirichlet_for_small_alpha_gives_a_client_one_class():
    tree, y = labelled(20_000)
    data = federated.dirichlet(tree, y, 100, 1e-9, KEY)
    # A class has the examples of ten clients: at most one client for each class gets
    # what is left over from others.
    assert (mixtures(data).max(axis=1) == 1).sum() >= 90


def test_dirichlet_has_the_variance_of_its_mixtures():
    # A share of a symmetric Dirichlet of K classes has the variance
    # (K - 1) / K^2 / (K alpha + 1). There are more examples than are dealt to the first
    # clients, whose classes do not run out.
    tree, y = labelled(100_000)
    for alpha in (0.3, 3.0):
        data = federated.dirichlet(tree, y, 1000, alpha, KEY)
        q = mixtures(data.select(range(300)))
        drawn = 0.09 / (10 * alpha + 1)
        multinomial = (0.1 * 0.9 - drawn) / 100
        np.testing.assert_allclose(q.var(), drawn + multinomial, rtol=0.15)


def test_dirichlet_mixtures_follow_the_shares_of_the_classes():
    y = np.repeat([0, 1], [9000, 1000])
    data = federated.dirichlet({"y": y}, y, 100, 5.0, KEY)
    first = mixtures(data.select(range(50)), 2).mean(axis=0)
    np.testing.assert_allclose(first, [0.9, 0.1], atol=0.04)


def test_a_client_has_no_more_classes_than_shards():
    tree, y = labelled(1000)
    for shards in (1, 2, 5):
        data = federated.label_shards(tree, y, 20, shards, KEY)
        assert ((mixtures(data) > 0).sum(axis=1) <= shards).all()


def test_labels_may_be_of_any_kind():
    tree, y = labelled(100)
    named = federated.dirichlet(tree, [f"class {c}" for c in y], 5, 0.5, KEY)
    numbered = federated.dirichlet(tree, y, 5, 0.5, KEY)
    np.testing.assert_array_equal(
        federated.pooled(named)["row"], federated.pooled(numbered)["row"]
    )


#
# Clients.
#
@pytest.mark.parametrize(
    "ids, names",
    [
        (np.array([3, 1, 3, 2]), [1, 2, 3]),
        (np.array(["b", "a", "b", "c"]), ["a", "b", "c"]),
        (["b", "a", "b", "c"], ["a", "b", "c"]),
        ([("b", 1), ("a", 2), ("b", 1), ("a", 3)], [("a", 2), ("a", 3), ("b", 1)]),
        (["b", 1, "b", None], ["b", 1, None]),
    ],
)
def test_natural_clients_are_sorted_where_they_can_be(ids, names):
    data = federated.from_arrays(np.arange(4), ids)
    assert list(data.ids) == names
    for i, name in enumerate(names):
        assert list(data[i]) == [j for j in range(4) if ids[j] == name]


def test_selections_compose():
    data = federated.from_arrays(np.arange(100), np.arange(100) // 10)
    chosen = data.select([7, 3, 5, 3]).select(np.array([2, 0, 3]))
    assert list(chosen.ids) == [5, 7, 3]
    assert list(chosen.num_examples) == [10] * 3
    assert [x[0] for x in (chosen[0], chosen[1], chosen[2])] == [50, 70, 30]
    assert len(data.select([])) == 0
    assert repr(data.select([])) == "ClientData: 0 clients, 0 examples"


def test_a_client_out_of_range_is_an_error():
    data = federated.from_arrays(np.arange(4), [0, 0, 1, 1])
    for wrong in (2, -1):
        with pytest.raises(IndexError, match=f"no client {wrong}; the data has 2"):
            data[wrong]
        with pytest.raises(IndexError, match=f"no client {wrong}; the data has 2"):
            data.select([0, wrong])
    assert [list(x) for x in data] == [[0, 1], [2, 3]]  # As a sequence: by IndexError.


def test_a_mask_is_no_selection():
    data = federated.from_arrays(np.arange(4), [0, 0, 1, 1])
    with pytest.raises(TypeError, match=r"indices are bool\[2\].*flatnonzero"):
        data.select(data.num_examples > 1)


def test_a_client_reads_its_own_rows_only():
    x = Recorder(np.arange(1000).reshape(100, 10))
    ids = np.arange(100) // 25
    ids[[3, 60]] = 7  # A client whose rows lie apart.
    data = federated.from_arrays({"x": x}, ids)
    train, held_out = federated.hold_out(data.select([4, 0, 1]), 0.5)
    assert x.read == []
    np.testing.assert_array_equal(held_out[0]["x"][:, 0], [600])
    np.testing.assert_array_equal(x.read.pop(), [3, 60])
    assert len(train[2]["x"]) == 13
    assert x.read.pop() == slice(25, 50)
    assert x.read == []


def test_a_file_is_read_where_a_client_is(tmp_path):
    # A sparse file of 200 GB, too much to read as a whole.
    shape = (2_000_000, 25_000)
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    file[10] = 1
    ids = np.arange(shape[0]) // 2
    data = federated.from_arrays(
        np.memmap(tmp_path / "x", np.float32, "r", shape=shape), ids
    )
    assert len(data) == 1_000_000
    np.testing.assert_array_equal(data[5][:, 0], [1, 0])
    apart = federated.from_arrays(file, np.arange(shape[0]) % 1_000_000)
    np.testing.assert_array_equal(apart[10][:, -1], [1, 0])


def test_rows_of_a_table_are_taken_by_place():
    """Those of pandas are indexed by label, which a sort or a filter leaves apart."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"who": [*"abab"], "x": range(4)}, index=[3, 1, 2, 0])
    data = federated.from_arrays({"x": table.x, "y": table.x.to_numpy()}, table.who)
    for i, rows in enumerate(([0, 2], [1, 3])):
        np.testing.assert_array_equal(data[i]["x"], rows)
        np.testing.assert_array_equal(data[i]["y"], rows)


def test_a_mapping_is_read_when_a_client_is_asked_for():
    class Disk(dict):
        read = 0

        def __getitem__(self, name):
            self.read += 1
            return super().__getitem__(name)

    disk = Disk(ann=[1.0, 3.0], bob=[4.0], cy=[])
    data = federated.from_mapping(disk)
    assert disk.read == 3
    assert list(data.num_examples) == [2, 1, 0]
    disk["bob"] = [5.0]
    assert list(data[1]) == [5.0]


def test_trees_keep_their_structure():
    tree = {"x": np.zeros((4, 2)), "more": (np.arange(4), [1, 2, 3, 4], None)}
    data = federated.from_arrays(tree, [0, 0, 1, 1])
    assert jax.tree.structure(data[0]) == jax.tree.structure(
        {"x": 0, "more": (0, 0, None)}
    )
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(data[0]))
    assert repr(data) == (
        "ClientData: 2 clients, 4 examples, 2 to 2 each; "
        "more.0: int64[], more.1: int64[], x: float64[2]"
    )


def test_a_population_of_a_million_is_made_as_it_is_read():
    made = []

    def make(i):
        made.append(i)
        return np.full(i % 3, i)

    data = federated.from_function(1_000_000, np.arange(1_000_000) % 3, make)
    train, held_out = federated.hold_out(data, 0.5)
    parts = federated.split_clients(train, (0.5, 0.5), KEY)
    assert sum(map(len, parts)) == 1_000_000
    assert not made
    assert list(held_out[5]) == [5]
    assert made == [5]
    named = federated.from_function(["a", "b"], [1, 2], lambda i: np.zeros(i + 1))
    assert list(named.ids) == ["a", "b"]


#
# Splits.
#
def test_a_split_has_each_client_once():
    data = federated.from_arrays(np.arange(300), np.arange(300) // 3)
    parts = federated.split_clients(data, (0.8, 0.1, 0.1), KEY)
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(i for part in parts for i in part.ids) == list(range(100))
    assert all((np.diff(part.ids) > 0).all() for part in parts)
    again = federated.split_clients(data, (0.8, 0.1, 0.1), KEY)
    other = federated.split_clients(data, (0.8, 0.1, 0.1), jax.random.key(1))
    assert list(parts[1].ids) == list(again[1].ids) != list(other[1].ids)


@pytest.mark.parametrize("fraction", [0.2, 0.29, 0.5, 0.99])
def test_held_out_examples_are_the_last(fraction):
    sizes = [1, 2, 5, 99, 100]
    data = federated.from_arrays(np.arange(207), np.repeat(np.arange(5), sizes))
    train, held_out = federated.hold_out(data, fraction)
    for i, size in enumerate(sizes):
        np.testing.assert_array_equal(np.r_[train[i], held_out[i]], data[i])
        assert len(train[i]) == train.num_examples[i] >= 1
        assert len(held_out[i]) == held_out.num_examples[i]
        assert len(held_out[i]) == size * round(100 * fraction) // 100
    assert list(train.ids) == list(held_out.ids) == list(data.ids)


def test_splits_take_any_class_with_the_members_of_client_data():
    class Own:
        ids = ("ann", "bob")
        num_examples = np.array([5, 5])

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return np.arange(5) + 10 * i

        def select(self, indices):
            return federated.from_mapping({self.ids[i]: self[i] for i in indices})

    train, held_out = federated.hold_out(Own(), 0.2)
    assert list(held_out[1]) == [14]
    assert len(federated.pooled(train)) == 8
    a, b = federated.split_clients(Own(), (0.5, 0.5), KEY)
    assert {*a.ids, *b.ids} == {"ann", "bob"}


#
# Errors.
#
X = np.zeros((4, 2))
Y = np.arange(4)
TWO = federated.iid(X, 2, KEY)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: federated.from_arrays({"a": X, "b": X[:3]}, Y),
            ValueError,
            r"from_arrays: .*\['a'\] has the shape \(4, 2\), and \['b'\] \(3, 2\)",
        ),
        (
            lambda: federated.from_arrays({"a": 1.0}, Y),
            ValueError,
            r"scalar at \['a'\]",
        ),
        (
            lambda: federated.from_arrays(X, Y[:3]),
            ValueError,
            r"ids has the shape \(3,\)",
        ),
        (lambda: federated.from_arrays(X[:0], []), ValueError, "no example"),
        (lambda: federated.from_arrays({}, []), ValueError, "has no array"),
        (lambda: federated.from_mapping({}), ValueError, "mapping is empty"),
        (
            lambda: federated.from_mapping({"ann": [1.0], "bob": [2]}),
            ValueError,
            r"of 'ann' are float64\[\], but those of 'bob' int64\[\]",
        ),
        (
            lambda: federated.from_function(0, [], Y.take),
            ValueError,
            "is 0; it must be",
        ),
        (lambda: federated.from_function([], [], Y.take), ValueError, "there is no id"),
        (lambda: federated.from_function(2, [1], Y.take), ValueError, r"shape \(1,\)"),
        (lambda: federated.from_function(1, [-1], Y.take), ValueError, "the least -1"),
        (
            lambda: federated.from_function(1, [5], lambda i: Y)[0],
            ValueError,
            r"fn\(0\) gave 4 examples, where num_examples\[0\] is 5",
        ),
        (lambda: federated.iid(X, 0, KEY), ValueError, "clients is 0; it must be"),
        (
            lambda: federated.iid(X, 5, KEY),
            ValueError,
            "5 clients, but only 4 examples",
        ),
        (lambda: federated.iid(X, 2, 0), TypeError, "key is 0; give one of jax.random"),
        (lambda: federated.iid(X, 2, jax.random.split(KEY)), TypeError, "give one of"),
        (
            lambda: federated.dirichlet(X, Y, 2, 0, KEY),
            ValueError,
            "alpha is 0; it must",
        ),
        (
            lambda: federated.dirichlet(X, Y[:1], 2, 1, KEY),
            ValueError,
            "labels has the",
        ),
        (
            lambda: federated.label_shards(X, Y, 2, 0, KEY),
            ValueError,
            "_client is 0; it",
        ),
        (lambda: federated.label_shards(X, Y, 3, 2, KEY), ValueError, "6 shards, but"),
        (
            lambda: federated.split_clients(TWO, (0.5, 0.4), KEY),
            ValueError,
            r"\[0.5, 0.4\]; they must be positive and add up to 1",
        ),
        (
            lambda: federated.split_clients(TWO, (0.9, 0.1), KEY),
            ValueError,
            r"of 2 clients are \[2, 0\]",
        ),
        (
            lambda: federated.hold_out(TWO, 1.0),
            ValueError,
            "is 1.0; it must be between",
        ),
        (lambda: federated.pooled(TWO.select([])), ValueError, "no client"),
    ],
)
def test_what_is_wrong_is_said(call, error, text):
    with pytest.raises(error, match=text):
        call()
