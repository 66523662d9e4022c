"""Parquet files as a source: every row, by its number."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import beam_runner
import drjax

N, FILES, GROUP = 103, 4, 11
RNG = np.random.default_rng(0)
COLUMNS = {
    "label": RNG.integers(-5, 5, N),
    "weight": RNG.normal(size=N).astype(np.float32),
    "flag": RNG.integers(0, 2, N).astype(bool),
    "image": RNG.normal(size=(N, 6)).astype(np.float32),
}
WORDS = [RNG.integers(1, 100, size).tolist() for size in RNG.integers(0, 5, N)]


def write(path, columns, words=None):
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(x.reshape(-1), x.shape[1])
        if x.ndim > 1
        else pa.array(x)
        for name, x in columns.items()
    }
    if words is not None:
        arrays["words"] = pa.array(words, pa.list_(pa.int32()))
    pq.write_table(pa.table(arrays), path, row_group_size=GROUP)


@pytest.fixture
def folder(tmp_path):
    for k, rows in enumerate(np.array_split(np.arange(N), FILES)):
        columns = {name: x[rows] for name, x in COLUMNS.items()}
        write(tmp_path / f"{k}.parquet", columns, [WORDS[i] for i in rows])
    return tmp_path


def test_any_rows_are_those_that_were_written(folder):
    source = beam_runner.from_parquet(folder / "*.parquet", [*COLUMNS, "words"], pad=5)
    assert source.num_elements == N
    cuts = [(0, N), (0, 1), (N - 1, N), *np.sort(RNG.integers(0, N, (50, 2)), axis=1)]
    for low, high in cuts:
        if low == high:
            continue
        got = source.read(int(low), int(high))
        for name, x in COLUMNS.items():
            assert got[name].dtype == x.dtype
            assert np.array_equal(got[name], x[low:high])
        lengths = [len(words) for words in WORDS[low:high]]
        assert got["words_length"].tolist() == lengths
        padded = [words + [0] * (5 - len(words)) for words in WORDS[low:high]]
        assert got["words"].tolist() == padded


def test_a_program_over_files_is_that_over_their_rows(folder):
    @drjax.program(rows=N)
    def total(rows):
        parts = drjax.map_fn(lambda row: row["weight"] * row["image"], rows)
        return drjax.reduce_sum(parts)

    source = beam_runner.from_parquet(str(folder / "*.parquet"), ["weight", "image"])
    got = beam_runner.run(total, source, chunk_size=9)
    want = np.sum(COLUMNS["weight"][:, None].astype(float) * COLUMNS["image"], axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    again = beam_runner.run(total, pickle.loads(pickle.dumps(source)), chunk_size=9)
    assert np.array_equal(got, again)


def test_rows_without_a_value_are_bad_elements(tmp_path):
    values = [None if i == 7 else float(i) for i in range(20)]
    pq.write_table(pa.table({"x": values}), tmp_path / "x.parquet")
    source = beam_runner.from_parquet(tmp_path / "*.parquet", "x")
    total = drjax.program(rows=20)(lambda rows: drjax.reduce_sum(rows["x"]))
    text = "element 7 of 'rows'(.|\n)*without a value"
    with pytest.raises(beam_runner.BadElementError, match=text):
        beam_runner.run(total, source, chunk_size=4)
    details = beam_runner.run_with_details(
        total, source, chunk_size=4, on_bad="collect"
    )
    assert float(details.result) == sum(range(20)) - 7
    assert [bad.index for bad in details.bad] == [7]


def test_rows_that_are_not_there(folder):
    source = beam_runner.from_parquet(folder / "*.parquet", "label")
    for low, high in ((0, N + 1), (4, 4), (-1, 3)):
        with pytest.raises(IndexError, match=f"of {N} rows"):
            source.read(low, high)


def test_a_file_that_was_written_anew_is_noticed(folder):
    source = beam_runner.from_parquet(folder / "*.parquet", "label")
    write(folder / "0.parquet", {"label": np.arange(3)})
    with pytest.raises(OSError, match="has been written anew"):
        source.read(0, 3)


def test_lists_that_are_longer_than_the_padding(folder):
    source = beam_runner.from_parquet(folder / "*.parquet", "words", pad={"words": 2})
    with pytest.raises(ValueError, match="is to be padded to 2"):
        source.read(0, N)


def test_what_is_refused(folder, tmp_path):
    read = beam_runner.from_parquet
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read(folder / "*.csv", "label")
    with pytest.raises(IsADirectoryError, match="its files are"):
        read(folder, "label")
    with pytest.raises(ValueError, match="has no column 'lable'"):
        read(folder / "*.parquet", ["lable"])
    with pytest.raises(ValueError, match="Say to which size they are padded"):
        read(folder / "*.parquet", "words")
    names = folder / "names.parquet"
    pq.write_table(pa.table({"name": ["a", "b"]}), names)
    with pytest.raises(TypeError, match="numbers and booleans"):
        read(names, "name")
    write(folder / "4.parquet", {"label": np.arange(3.0)})
    with pytest.raises(ValueError, match="are \\['double'\\], but those of"):
        read(folder / "[0-4].parquet", "label")
    write(folder / "empty.parquet", {"label": np.arange(0)})
    with pytest.raises(ValueError, match="have no rows"):
        read(folder / "empty.parquet", "label")
