"""The federated examples run, learn, and go on where they were."""

import contextlib
import csv
import io
import re

import pytest

from examples import federated_digits, federated_plays

PNG = b"\x89PNG\r\n\x1a\n"


def printed_by(main, *argv):
    """What is printed, without the progress bar, which shows times."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*argv])
    return re.sub("^Rounds .*\n", "", printed.getvalue(), flags=re.MULTILINE)


def files_of(folder):
    """By path; of checkpoints also when they were written."""
    return {
        path: (path.read_bytes(), "checkpoints" in path.parts and path.stat().st_mtime)
        for path in folder.rglob("*")
        if path.is_file()
    }


#
# Digits.
#
def run_digits(folder, rounds):
    return printed_by(federated_digits.main, f"--rounds={rounds}", f"--folder={folder}")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of 20 rounds, done as ten and ten; the table after ten; the output."""
    folder = tmp_path_factory.mktemp("digits")
    run_digits(folder, rounds=10)
    before = (folder / "metrics.csv").read_text()
    return folder, before, run_digits(folder, rounds=20)


def test_a_few_rounds_learn_far_more_than_chance(digits):
    _, _, printed = digits
    found = re.search(r"^Test accuracy (.*)%, after 20 rounds$", printed, re.MULTILINE)
    assert found
    assert float(found[1]) > 60


def test_a_run_goes_on_where_it_was(digits):
    folder, before, _ = digits
    after = (folder / "metrics.csv").read_text()
    assert after.startswith(before)
    rounds = [row["round"] for row in csv.DictReader(io.StringIO(after))]
    assert rounds == [str(i) for i in range(21)]


def test_all_clients_asked_are_counted(digits):
    _, _, printed = digits
    (line,) = re.findall(r"^.* clients asked: .*$", printed, re.MULTILINE)
    asked, *parts = map(int, re.findall(r"\d+", line))
    averaged, lost, _ = parts
    assert asked == 20 * 13 == sum(parts)
    assert 20 * 8 <= averaged <= 20 * 10
    assert lost > 0


def test_what_is_sent_is_the_model(digits):
    """64 x 64 + 64 + 64 x 10 + 10 numbers of four bytes, and a few more."""
    folder, _, _ = digits
    _, *rows = csv.DictReader(io.StringIO((folder / "metrics.csv").read_text()))
    for row in rows:
        up, down = int(row["bytes_up"]), int(row["bytes_down"])
        assert 0 <= up / int(row["reported"]) - 4 * 4810 <= 16
        assert 0 <= down / int(row["cohort"]) - 4 * 4810 <= 16


def test_the_curves_are_a_png(digits):
    folder, _, printed = digits
    assert f"Curves in {folder / 'curves.png'}" in printed
    assert (folder / "curves.png").read_bytes().startswith(PNG)


def test_a_run_that_is_done_gives_the_same_again(digits):
    folder, _, printed = digits
    files = files_of(folder)
    assert run_digits(folder, rounds=20) == printed
    assert files_of(folder) == files


#
# The plays.
#
@pytest.mark.slow
def test_the_plays_are_learned_beyond_single_characters(tmp_path):
    def run():
        few = "--rounds=10", "--speakers=6", f"--folder={tmp_path}"
        return printed_by(federated_plays.main, *few)

    printed = run()
    entropy = re.search(r"entropy of (.*) nats;$", printed, re.MULTILINE)
    frequent = re.search(r"most frequent is (.*)% of the text", printed)
    assert entropy
    assert frequent
    rows = re.findall(r"^(\w+) speakers +(\S+) +(\S+)%", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["training", "validation", "test"]
    for _, loss, accuracy in rows:
        assert float(loss) < float(entropy[1]) - 0.2
        assert float(accuracy) > float(frequent[1]) + 5

    start = printed.index(federated_plays.PROMPT)
    text = printed[start : printed.rindex("\n\nCurves in ")]
    assert len(text) == federated_plays.WRITTEN

    files = files_of(tmp_path)
    assert run() == printed
    assert files_of(tmp_path) == files
