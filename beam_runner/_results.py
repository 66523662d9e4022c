"""What is done with results: written for the driver, or given as PCollections."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import numpy as np
from apache_beam import pvalue

from beam_runner import _files, _work
from beam_runner._graph import Elements, Graph, Made, Placed, Typed, all_of
from beam_runner._sources import Reader, reader_of_array


class Saved(NamedTuple):
    """Where results are written; `bad` is None if no element is left out."""

    values: str
    bad: str | None


def save(graph: Graph, values: Sequence[Typed]) -> Saved:
    """Adds what writes values of the server, and bad elements."""
    folder = graph.settings.folder
    saved = Saved(
        _files.join(folder, "values"), _files.join(folder, "bad") if graph.bad else None
    )
    picks, sides = graph.picks(values)
    start = graph.start("Results")
    write = functools.partial(_save, saved.values, picks)
    _ = start | "Results/Save" >> beam.Map(write, *sides)
    if saved.bad is not None:
        listed = bad(graph) | "Results/List" >> beam.combiners.ToList()
        _ = listed | "Results/Bad" >> beam.Map(functools.partial(_save_bad, saved.bad))
    return saved


def _save(path: str, picks: Sequence[_work.Pick], _: Any, *producers: Any) -> None:
    _files.write_arrays(path, _work.picked(picks, producers))


def _save_bad(path: str, found: Sequence[Any]) -> None:
    _files.write_json(path, sorted(found))


def bad(graph: Graph) -> Any:
    """Adds the bad elements of all rounds: `(round, placement, n, index, why)`."""
    named = [
        found | f"Bad/{k}" >> beam.Map(functools.partial(_named, k, placement, n))
        for k, (placement, n, found) in enumerate(graph.bad, 1)
    ]
    return named | "Bad/All" >> beam.Flatten(pipeline=graph.pipeline)


def _named(k: int, placement: str, n: int, found: tuple[int, str]) -> tuple[Any, ...]:
    return k, placement, n, *found


def server(graph: Graph, tree: Any, outs: Sequence[Typed]) -> Any:
    """Adds the results in a tree; None stands for placed ones."""
    values = [x for x in outs if not is_placed(x)]
    picks, sides = graph.picks(values)
    numbers = iter(range(len(values)))
    places = [None if is_placed(x) else next(numbers) for x in outs]
    give = functools.partial(_tree, jax.tree.unflatten(tree, places), picks)
    start = graph.start("Result")
    return start | "Result/Server" >> beam.Map(give, *sides)


def is_placed(x: Typed) -> bool:
    """Whether a result is given element by element: placed, not handed out."""
    return x.at is not None and not isinstance(x.value, Made)


def _tree(places: Any, picks: Sequence[_work.Pick], _: Any, *producers: Any) -> Any:
    values = _work.picked(picks, producers)
    return jax.tree.map(lambda k: np.array(values[k]), places)


def placed(graph: Graph, tree: Any, outs: Sequence[Typed], elements: Elements) -> Any:
    """Adds the placed results as `(index, tree)`; None stands for the others."""
    values = [x for x in outs if is_placed(x)]
    keys = {x.at[:2] for x in values if x.at is not None}
    if not keys:
        return graph.pipeline | "Result/Placed" >> beam.Create([])
    if len(keys) > 1:
        raise NotImplementedError(
            "beam_runner.MapReduce: the program returns values of several placements, "
            f"{sorted(keys)}, which have no common index. Use a transform for each."
        )
    (key,) = keys
    taking = elements.get(key, all_of(key[1]))
    readers, waits = [], []
    for value, _, at in values:
        assert at is not None
        if not isinstance(value, Placed):
            folder = graph.settings.folder
            value = Placed(reader_of_array(value, at.axis, value.dtype, folder), 0)
        waits += [value.after] * (value.after is not None)
        readers.append((value.reader, value.leaf))
    numbers = iter(range(len(values)))
    places = [next(numbers) if is_placed(x) else None for x in outs]
    skeleton = jax.tree.unflatten(tree, places)
    (skip,), sides = graph.picks([Typed(taking.skip, None, None)])
    give = _GiveRows(skeleton, readers, skip)
    sides += [pvalue.AsIter(x) for x in dict.fromkeys(waits)]
    (n,), count = graph.picks([Typed(taking.n, None, None)])
    pieces = graph.start("Placed") | "Result/Ranges" >> beam.ParDo(_Pieces(n), *count)
    return (
        pieces
        | "Result/Spread" >> beam.Reshuffle()
        | "Result/Placed" >> beam.ParDo(give, *sides)
    )


ROWS = 256  # That are read at once.


class _Pieces(beam.DoFn):
    """An element that only starts it, to pieces of all elements."""

    def __init__(self, n: _work.Pick):
        self.n = n

    def process(self, element: Any, *producers: Any) -> Iterator[tuple[int, int]]:
        n = int(_work.picked([self.n], producers)[0])
        each = ROWS * max(1, -(-n // (ROWS * 1024)))
        for low in range(0, n, each):
            yield low, min(low + each, n)


class _GiveRows(beam.DoFn):
    """A piece, by its first and last index, to its elements."""

    def __init__(self, places: Any, readers: Sequence[tuple[Reader, int]], skip: Any):
        self.places, self.readers, self.skip = places, readers, skip

    def process(self, element: Any, *producers: Any) -> Iterator[Any]:
        skip = {*_work.picked([self.skip], producers)[0].tolist()}
        first, last = element
        for low in range(first, last, ROWS):
            high = min(low + ROWS, last)
            columns = [reader.read(low, high)[leaf] for reader, leaf in self.readers]
            for i in range(low, high):
                if i not in skip:
                    row = [x[i - low] for x in columns]
                    yield i, jax.tree.map(row.__getitem__, self.places)
