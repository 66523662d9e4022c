"""A program as a transform of one's own pipeline."""

import atexit
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam import pvalue
from apache_beam.options.pipeline_options import GoogleCloudOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from beam_runner import _environment, _files, _gather, _results, _runners, _work
from beam_runner._arguments import (
    argument_of,
    check_sources,
    check_uses,
    collections_of,
    read_of,
)
from beam_runner._graph import (
    Elements,
    Graph,
    Made,
    Placed,
    Settings,
    Taking,
    all_of,
    as_sent,
    check_on_bad,
    first_values,
    typed,
)
from beam_runner._sources import ChunkFiles
from drjax import make_plan
from drjax._export import checked_chunk_size
from drjax.plan import MapReduce as Round
from drjax.plan import Plan, reads_of


class Result(NamedTuple):
    """What a `MapReduce` gives.

    Args:
      server: a PCollection of one tree, as the program returns it, of NumPy arrays; in
        place of placed leaves it has None.
      placed: a PCollection of `(index, tree)`, in which other leaves are None; it is
        empty if the program returns nothing placed.
      bad: a PCollection of `(placement, index, why)`, of the elements that were left
        out; empty unless `on_bad='collect'`.
    """

    server: Any
    placed: Any
    bad: Any


class MapReduce(beam.PTransform):
    """A program, or a derivative of one, as a transform of a pipeline.

    It is applied to the PCollections of those arguments that arrive in one: to a tuple
    of them, in the order of the arguments; or to the pipeline, if none does.
    A placed argument arrives as `(index, tree)`, an element each, in any order: they
    are gathered by index, and duplicates and gaps are errors. The index of a value of
    nested placements, `[pods, clients, ...]`, may be a tuple. Or it comes as `Chunks`,
    which are not gathered: which elements are in a chunk is the caller's choice then,
    and a result has the same bits for the same choice. A `Source` needs no PCollection;
    workers read it by index. A server's argument arrives as a PCollection of one tree.

    What `run` says about chunks, bits and bad elements holds here too. Scans are
    unrolled. Constructing and applying it runs nothing; the first element of a source
    is read for its types.

    Args:
      program: a program, a derivative of one, or any function that calls some.
      *args: its arguments: trees of `jax.ShapeDtypeStruct`, `[n, ...]` if placed, or
        `Chunks`, for those that arrive; else values, as in `run`.
      chunk_size: as in `run`.
      temp_location: as in `run`; by default that of the pipeline's options. What is
        written there is not removed, for the results are read from it.
      on_bad: as in `run`. With "collect" a program of several rounds, or one whose
        round depends on how many elements there are, runs several times: what one round
        leaves out, all are to leave out, and only then is known what a later one gets.
      any_number: whether another number of elements may arrive than the program says.
        Its plan must be the same for all numbers, see `drjax.Plan.size_free`.

    Raises:
      PlanError, TypeError, ValueError, NotImplementedError: at once, as in `run`; or if
        the program communicates in a while loop or a condition; or when it is applied,
        if a PCollection is unbounded or has windows.

    Example:
      >>> import apache_beam as beam
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import beam_runner
      >>> import drjax
      >>> from apache_beam.runners.portability.fn_api_runner import FnApiRunner
      >>> @drjax.program(words=4)
      ... def mean_length(length):
      ...     return drjax.reduce_mean(length.astype(jnp.float32))
      >>> with beam.Pipeline(runner=FnApiRunner()) as pipeline:
      ...     words = beam.Create([*enumerate(["a", "map", "and", "reduce"])])
      ...     lengths = pipeline | words | beam.MapTuple(lambda i, word: (i, len(word)))
      ...     lengths_type = jax.ShapeDtypeStruct((4,), jnp.int32)
      ...     result = lengths | beam_runner.MapReduce(mean_length, lengths_type)
      ...     _ = result.server | beam.Map(print)
      3.25
    """

    def __init__(
        self,
        program: Callable[..., Any],
        *args: Any,
        chunk_size: int | None = None,
        temp_location: str | os.PathLike[str] | None = None,
        on_bad: str = "raise",
        any_number: bool = False,
    ):
        super().__init__()
        check_on_bad(on_bad)
        self.chunk_size, self.on_bad = (
            checked_chunk_size("beam_runner", chunk_size),
            on_bad,
        )
        self.temp_location, self.any_number = temp_location, any_number
        self.arguments = [argument_of(k, arg) for k, arg in enumerate(args, 1)]
        structs = [argument.structs for argument in self.arguments]
        self.plan = make_plan(program)(*structs).recomputed()
        leaves = [leaf for argument in self.arguments for leaf in argument.leaves]
        check_sources(self.plan, leaves)
        check_uses(self.plan, self.arguments, any_number)

    def expand(self, input_or_inputs: Any) -> Any:
        arriving = [x for x in self.arguments if x.arrives]
        collections = collections_of(input_or_inputs, arriving)
        pipeline = (
            input_or_inputs.pipeline if not collections else collections[0].pipeline
        )
        _runners.check(pipeline.runner)
        folder = self._folder(pipeline)
        settings = Settings(folder, self.chunk_size, self.on_bad, _environment.record())
        values, elements = self._arrive(
            {x.name: c for x, c in zip(arriving, collections, strict=True)}, folder
        )
        plan, found = self.plan, None
        if self.on_bad == "collect" and not _is_found_in_time(plan):
            found, elements = self._find_bad(pipeline, settings, values, elements)
            settings = settings._replace(on_bad=_work.LEFT)
        graph = Graph(pipeline, settings, elements)
        env = first_values(plan, values, elements)
        for stage in plan.stages:
            graph.add(plan, stage, env)
            if isinstance(stage, Round) and graph.bad:
                found = _results.bad(graph)
                elements = _without(found, plan, elements, "")
                env.update((i, elements[key].size) for i, key in plan.sizes.items())
        outs = [typed(plan, env, i) for i in plan.outputs]
        return Result(
            _results.server(graph, plan.out_tree, outs),
            _results.placed(graph, plan.out_tree, outs, elements),
            (_results.bad(graph) if found is None else found)
            | "Bad/Give" >> beam.Map(_public),
        )

    def _find_bad(
        self,
        pipeline: Any,
        settings: Settings,
        values: Sequence[Any],
        elements: Elements,
    ) -> tuple[Any, Elements]:
        """Finds the bad elements: round by round, each without those found before.

        What a round gets is right only if earlier ones have left out theirs. A plan
        with loops is looked at as a whole.
        """
        plan = self.plan
        rounds = 1 if plan.inner else plan.rounds
        found = pipeline | "Found 0" >> beam.Create([])
        for k in range(1, rounds + 1):
            folder = _files.join(settings.folder, f"find-{k}")
            _files.make_folder(folder)
            up_to = None if plan.inner else k
            own = settings._replace(folder=folder)
            find = _FindBad(plan, own, elements, values, up_to)
            more = pipeline | f"Find bad {k}" >> find
            found = (found, more) | f"Found {k}" >> beam.Flatten()
            elements = _without(found, plan, elements, f" {k}")
        return found, elements

    def _folder(self, pipeline: Any) -> str:
        """A folder for files; what is in the machine's temporary one is removed."""
        options = pipeline.options.view_as(GoogleCloudOptions)
        said = self.temp_location or options.temp_location
        folder = _files.new_folder(_runners.temp_location(said, pipeline.runner))
        if said is None and isinstance(pipeline.runner, FnApiRunner):
            weakref.finalize(pipeline, _files.remove, folder)
        elif said is None:  # Another runner may go on when the pipeline is forgotten.
            atexit.register(_files.remove, folder)
        return folder

    def _arrive(
        self, collections: Mapping[str, Any], folder: str
    ) -> tuple[list[Any], Elements]:
        """The arguments leaf by leaf, and how many elements have arrived."""
        plan, numbers = self.plan, iter(self.plan.inputs)
        read = read_of(plan)
        values: list[Any] = []
        elements: Elements = {}
        for argument in self.arguments:
            inputs = [*itertools.islice(numbers, len(argument.leaves))]
            if not argument.arrives:
                values += argument.leaves
                continue
            name, collection = argument.name, collections[argument.name]
            used = [i for i in inputs if i in read]
            if not used:
                values += [None] * len(inputs)
                continue
            at = next((plan.at[i] for i in used if i in plan.at), None)
            if at is None:
                check = functools.partial(_server_leaves, name, argument.structs)
                trees = (
                    collection | f"{name.capitalize()}/List" >> beam.combiners.ToList()
                )
                made = trees | name.capitalize() >> beam.Map(check)
                values += [Made(made, k) for k in range(len(inputs))]
                continue
            dtypes = tuple(as_sent(plan.avals[i]).dtype for i in inputs)
            size = argument.size or _gather.file_size(argument.structs, at.n)
            files = ChunkFiles(
                _files.join(folder, name.replace(" ", "-")), size, dtypes
            )
            _files.make_folder(files.folder)
            n = None if self.any_number else at.n
            are_chunks = argument.size is not None
            gather = _gather.Gather(name, argument.structs, n, files, are_chunks)
            arrived = collection | name.capitalize() >> gather
            if n is None:
                key = at.placement, at.n
                if key in elements:
                    same = functools.partial(_same_count, name)
                    first = pvalue.AsSingleton(elements[key].n.producer)
                    label = f"As many of {name}"
                    arrived = arrived | label >> beam.Map(same, first)
                else:
                    count = Made(arrived, 0)
                    elements[key] = Taking(count, np.zeros(0, np.int32), count)
            values += [Placed(files, k, arrived) for k in range(len(inputs))]
        return values, elements


class _FindBad(beam.PTransform):
    """Runs a plan up to its k-th round, to find the elements that are bad in that."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        elements: Elements,
        values: Sequence[Any],
        k: int | None,
    ):
        super().__init__()
        self.arguments = plan, values, settings, elements, k

    def expand(self, input_or_inputs: Any) -> Any:
        plan, values, settings, elements, k = self.arguments
        graph = Graph(input_or_inputs.pipeline, settings, elements)
        env = first_values(plan, values, elements)
        for stage in plan.stages:
            graph.add(plan, stage, env)
            if k is not None and len(graph.bad) == k:
                graph.bad = graph.bad[-1:]
                break
        return _results.bad(graph)


def _public(found: tuple[Any, ...]) -> tuple[str, int, str]:
    _, placement, _, index, why = found
    return placement, index, why


def _is_found_in_time(plan: Plan) -> bool:
    """Whether all that is bad is known before anything depends on how many are left."""
    rounds = [k for k, s in enumerate(plan.stages) if isinstance(s, Round)]
    if plan.inner or len(rounds) > 1:
        return False
    before = plan.stages[: 1 + max(rounds, default=-1)]
    read = (i for stage in before for i in reads_of(stage))
    return plan.sizes.keys().isdisjoint(read)


def _without(bad: Any, plan: Plan, elements: Elements, label: str) -> Elements:
    """The elements without the bad ones."""
    result = {}
    listed = bad | f"List bad{label}" >> beam.combiners.ToList()
    for key in plan.placements:
        taking = elements.get(key, all_of(key[1]))
        sides: list[Any] = [pvalue.AsSingleton(listed)]
        n: Any = taking.n
        if isinstance(n, Made):
            sides.append(pvalue.AsSingleton(n.producer))
        name = f"Good {key[0]} {key[1]}{label}"
        known = None if isinstance(n, Made) else int(n)
        remaining = functools.partial(_remaining, key, known)
        start = bad.pipeline | f"{name}/Start" >> beam.Impulse()
        made = start | name >> beam.Map(remaining, *sides)
        result[key] = Taking(n, Made(made, 0), Made(made, 1))
    return result


def _remaining(
    key: tuple[str, int], n: int | None, _: Any, bad: Sequence[Any], *counts: Any
) -> list[np.ndarray]:
    """The positions of bad elements, and how many others there are."""
    if n is None:
        n = int(counts[0][0])
    why = {index: why for _, *other, index, why in bad if tuple(other) == key}
    if n:
        _work.check_some_remain(key[0], n, why)
    return [np.array(sorted(why), np.int32), np.array(n - len(why), np.int32)]


def _server_leaves(name: str, structs: Any, trees: Sequence[Any]) -> list[np.ndarray]:
    if len(trees) != 1:
        raise ValueError(
            f"beam_runner.MapReduce: {name} is the server's, so that its PCollection "
            f"is to have one tree, but it has {len(trees)}."
        )
    return _gather.leaves_of(name, trees[0], structs, 0, ())


def _same_count(name: str, mine: Sequence[Any], first: Sequence[Any]) -> Any:
    if int(mine[0]) != int(first[0]):
        raise ValueError(
            f"beam_runner.MapReduce: {mine[0]} elements of {name} have arrived, but "
            f"{first[0]} of another argument of this placement."
        )
    return mine
