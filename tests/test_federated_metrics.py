"""What a run writes and shows: files, curves, the bar, and when to stop."""

import csv
import importlib
import io
import math
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from federated import _metrics
from federated._callbacks import early_stopping
from federated._curves import TRAINING, plot
from federated._metrics import Files, to_columns
from federated._progress import progress_bar

Event = importlib.import_module("tensorboardX.proto.event_pb2").Event


def rows_of(rounds: int, *, seed: int = 0, every: int = 4, evaluated: bool = True):
    """Rounds of ten clients, evaluated now and then; the first two have no loss."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, float | int]] = []
    for i in range(rounds + 1):
        row: dict[str, float | int] = {"round": i}
        if i:
            lost = int(rng.integers(3))
            row |= {"reported": 10 - lost, "dropped": lost}
            row |= {"bytes_down": 12_340, "bytes_up": 1_234 * (10 - lost)}
        if i > 1:
            row["loss"] = float(rng.exponential() / i)
        if evaluated and i % every == 0:
            drawn = np.sort(rng.uniform(size=4)).tolist()
            names = ("", " p10", " p50", " p90")
            row |= {f"test/accuracy{n}": x for n, x in zip(names, drawn, strict=True)}
        rows.append(row)
    return rows


def contents(folder):
    """The bytes of all files below a folder, by path."""
    files = [x for x in folder.rglob("*") if x.is_file()]
    return {str(x.relative_to(folder)): x.read_bytes() for x in files}


def written(folder, rows):
    Files(folder).write(rows)
    return contents(folder)


#
# The table.
#


def test_table_gives_every_number_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**64, 500, np.uint64)
    floats = [*bits.view(np.float64).tolist(), -0.0, 5e-324, math.inf, -math.inf, 0.1]
    floats = [x for x in floats if not math.isnan(x)]
    rows = [{"round": i, "x": x, "n": 2**53 + i} for i, x in enumerate(floats)]
    written(tmp_path, rows)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        read = [*csv.DictReader(file)]
    assert [struct.pack("d", float(row["x"])) for row in read] == [
        struct.pack("d", x) for x in floats
    ]
    assert [(int(row["round"]), int(row["n"])) for row in read] == [
        (row["round"], row["n"]) for row in rows
    ]


def test_table_has_columns_as_they_appear_and_leaves_missing_ones_empty(tmp_path):
    rows = [{"round": 0, "z": math.nan}, {"round": 1, "a": 1, "z": 0.5}, {"round": 2}]
    written(tmp_path, rows)
    table = (tmp_path / "metrics.csv").read_text()
    assert table == "round,z,a\n0,nan,\n1,0.5,1\n2,,\n"


def test_columns_are_arrays_with_nan_where_there_is_no_value():
    columns = to_columns([{"round": 0}, {"round": 1, "n": 3}, {"round": 2, "n": 5}])
    assert [*columns] == ["round", "n"]
    assert columns["round"].dtype == np.int64
    np.testing.assert_array_equal(columns["round"], [0, 1, 2])
    np.testing.assert_array_equal(columns["n"], [np.nan, 3, 5])


#
# TensorBoard's events.
#


def crc32c(data: bytes) -> int:
    """RFC 3720's checksum, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(data: bytes):
    """The records of a TFRecord file, their checksums checked."""
    file = io.BytesIO(data)
    while header := file.read(8):
        size = struct.unpack("<Q", header)[0]
        assert struct.unpack("<I", file.read(4)) == (masked(header),)
        record = file.read(size)
        assert struct.unpack("<I", file.read(4)) == (masked(record),)
        yield record


def test_checksum_is_that_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283


def test_events_are_the_rows_as_float32(tmp_path):
    rows = rows_of(30)
    (path,) = [path for path in written(tmp_path, rows) if "tfevents" in path]
    records = read_records((tmp_path / path).read_bytes())
    first, *events = [Event.FromString(record) for record in records]
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in events] == [row["round"] for row in rows]
    for event, row in zip(events, rows, strict=True):
        found = {value.tag: value.simple_value for value in event.summary.value}
        row = {name: float(np.float32(x)) for name, x in row.items()}
        assert {"round": event.wall_time, **found} == row


def test_missing_package_is_an_error_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto", None)
    with pytest.raises(ImportError, match=r"needs the package tensorboardX: pip inst"):
        Files(tmp_path)


#
# The same bytes, whatever happens.
#


def test_files_do_not_depend_on_when_they_were_written(tmp_path):
    rows, rng = rows_of(50, every=7), random.Random(0)
    expected = written(tmp_path / "at once", rows)
    for trial in range(5):
        files = Files(tmp_path / str(trial))
        ends = {len(rows), *rng.sample(range(1, len(rows)), 1 + 10 * trial)}
        for end in sorted(ends):
            files.write(rows[:end])
            table = (tmp_path / str(trial) / "metrics.csv").read_text()
            assert len(table.splitlines()) == end + 1
        assert contents(tmp_path / str(trial)) == expected


def test_torn_files_are_mended_by_the_rows_of_a_checkpoint(tmp_path):
    rows, rng = rows_of(40), random.Random(0)
    expected = written(tmp_path / "at once", rows)
    for trial in range(20):
        folder = tmp_path / str(trial)
        written(folder, rows[: rng.randrange(1, len(rows))])
        for path, data in contents(folder).items():
            torn = data[: rng.randrange(len(data))] + b"?" * rng.randrange(2)
            (folder / path).write_bytes(torn)
        (folder / ".metrics.csv.new").write_bytes(b"round,lo")
        files = Files(folder)
        checkpoint = rng.randrange(1, len(rows))
        for end in (checkpoint, len(rows)):
            files.write(rows[:end])
        assert contents(folder) == expected


def test_files_that_have_more_rows_are_cut_in_place(tmp_path):
    # TensorBoard, and `tail -f`, would go on reading a file that was replaced.
    rows = rows_of(20)
    paths = [tmp_path / path for path in written(tmp_path, rows)]
    inodes = [path.stat().st_ino for path in paths]
    files = Files(tmp_path)
    files.write(rows[:10])
    files.write(rows)
    assert [path.stat().st_ino for path in paths] == inodes


WRITER = """
    import runpy, sys
    metrics = runpy.run_path(sys.argv[1])  # Without JAX, which takes a while.
    rows = eval(sys.stdin.read())
    start = 1
    while True:
        files = metrics["Files"](sys.argv[2])
        for end in range(start, len(rows) + 1):
            files.write(rows[:end])
            print(end, flush=True)
        start = 1 + start % 17
"""


def test_killed_writers_leave_what_a_checkpoint_mends(tmp_path):
    rows, rng = rows_of(300, every=3), random.Random(0)
    expected = written(tmp_path / "at once", rows)
    folder = tmp_path / "killed"
    command = (sys.executable, "-c", textwrap.dedent(WRITER), _metrics.__file__, folder)
    for _ in range(4):
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin
            assert process.stdout
            process.stdin.write(repr(rows).encode())
            process.stdin.close()
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
        files = Files(folder)
        files.write(rows[: rng.randrange(1, len(rows))])
        files.write(rows)
        assert contents(folder) == expected


#
# When to stop.
#


def accuracies(values):
    return [{"round": i, "test/accuracy": x} for i, x in enumerate(values)]


def stopping_round(callback, rows):
    ends = range(1, len(rows) + 1)
    return next((end - 1 for end in ends if callback(rows[:end], None)), None)


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_stops_when_patience_values_are_no_better_than_the_best_before(patience):
    rows = accuracies([0.1, 0.5, 0.3, 0.9, *[0.9] * 10])
    first = 2 if patience == 1 else 3 + patience
    stop = early_stopping("test/accuracy", patience=patience)
    assert stopping_round(stop, rows) == first


def test_a_metric_that_gets_better_never_stops():
    rows = accuracies(np.linspace(0, 1, 30).tolist())
    assert stopping_round(early_stopping("test/accuracy", patience=1), rows) is None


def test_better_means_by_more_than_min_delta():
    rows = accuracies([0, 0.25, 0.5, 0.75])
    less, equal = (
        early_stopping("test/accuracy", patience=1, min_delta=delta)
        for delta in (0.2, 0.25)
    )
    assert stopping_round(less, rows) is None
    assert stopping_round(equal, rows) == 1


def test_smallest_is_largest_of_the_negatives():
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=30).tolist()
        negatives = accuracies([-x for x in values])
        largest = early_stopping("test/accuracy", patience=4)
        smallest = early_stopping("test/accuracy", patience=4, mode="min")
        expected = stopping_round(largest, accuracies(values))
        assert stopping_round(smallest, negatives) == expected


def test_rounds_without_the_metric_do_not_count():
    rows = accuracies([0.5, 0.4, 0.3])
    apart = [row for r in rows for row in (r, {"round": 0}, {"round": 0})]
    stop = early_stopping("test/accuracy", patience=2)
    assert stopping_round(stop, rows) == 2
    assert stopping_round(stop, apart) == 6


def test_nan_is_never_better():
    stop = early_stopping("test/accuracy", patience=2)
    assert stopping_round(stop, accuracies([math.nan, 0.1, math.nan, 0.2])) is None
    assert stopping_round(stop, accuracies([0.1, math.nan, math.nan])) == 2
    assert stopping_round(stop, accuracies([math.nan, math.nan])) == 1


def test_stopping_is_a_function_of_the_rows():
    # A callback that has seen other rounds, and other runs, says what a new one does.
    old = early_stopping("loss", patience=3, mode="min")
    rng = random.Random(0)
    runs = [rows_of(20, seed=seed) for seed in range(5)]
    for _ in range(500):
        rows = rng.choice(runs)[: rng.randrange(1, 22)]
        new = early_stopping("loss", patience=3, mode="min")
        assert old(rows, None) == new(rows, None)


def test_stopping_names_the_metrics_that_there_are():
    stop = early_stopping("test/acuracy", patience=3)
    with pytest.raises(
        ValueError, match=r"no metric 'test/acuracy'; there are round, "
    ):
        stopping_round(stop, rows_of(5))


def test_stopping_names_them_also_where_there_is_no_loss():
    """But not after a round that changed nothing, which has no metrics."""
    stop = early_stopping("nrom", patience=3)
    assert not stop([{"round": 0}, {"round": 1, "completed": 0}], None)
    with pytest.raises(ValueError, match=r"no metric 'nrom'; there are .*norm"):
        stop([{"round": 0}, {"round": 1, "completed": 1, "norm": 2.0}], None)


@pytest.mark.parametrize(
    "arguments",
    [dict(patience=0), dict(patience=1, min_delta=-1), dict(patience=1, mode="best")],
)
def test_stopping_refuses_what_is_out_of_range(arguments):
    with pytest.raises(ValueError, match="early_stopping: patience is at least 1, min"):
        early_stopping("loss", **arguments)


#
# What is seen.
#


def has_color(path, color) -> bool:
    return bool((np.abs(imread(path)[..., :3] - to_rgb(color)) < 1 / 128).all(-1).any())


@pytest.mark.parametrize("evaluated", [True, False])
def test_curves_are_a_function_of_the_rows(tmp_path, evaluated):
    rows = rows_of(30, evaluated=evaluated)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        plot(rows, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert has_color(paths[0], TRAINING)
    assert has_color(paths[0], "tab:blue") == evaluated


def test_each_evaluated_metric_has_a_panel(tmp_path):
    rows = rows_of(10)
    heights = []
    for names in ([], ["error"], ["error", "validation/auc"]):
        for name in names:
            rows[0][name] = rows[10][name] = 0.5
        plot(rows, tmp_path / "a.png")
        heights.append(imread(tmp_path / "a.png").shape[0])
    assert heights[2] - heights[1] == heights[1] - heights[0] > 0


def test_names_are_drawn_as_they_are(tmp_path):
    rows = [{"round": 0, "a$\\b$/x$_$": 0.5}, {"round": 1, "a$\\b$/x$_$": 0.7}]
    plot(rows, tmp_path / "a.png")
    assert has_color(tmp_path / "a.png", "tab:blue")


def test_curves_of_a_run_without_anything_to_draw(tmp_path):
    for rows in ([{"round": 0}], [{"round": 0}, {"round": 1, "loss": math.nan}]):
        plot(rows, tmp_path / "a.png")
        assert imread(tmp_path / "a.png").shape[1] > 100


def test_bar_ends_with_the_latest_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bar("Rounds", 9) as show:
        for row in [{"round": 0, "error": 0.5, "error p10": 0.1}, *rows_of(9)[1:]]:
            show(row)
    out = capsys.readouterr().out
    loss, accuracy = rows_of(9)[9]["loss"], rows_of(9)[8]["test/accuracy"]
    assert "Rounds" in out
    assert "9/9" in out
    assert f"loss {loss:.4g}  error 0.5  test/accuracy {accuracy:.4g}" in out


def test_no_bar_prints_nothing(capsys):
    with progress_bar("Rounds", 9, enabled=False) as show:
        for row in rows_of(9):
            show(row)
    assert capsys.readouterr().out == ""
