"""The stages of a plan, as transforms of a pipeline.

Values are arrays, known when the pipeline is built; `Made`, by the pipeline; or
`Placed`, in files or in a source, which workers read.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam import pvalue

from beam_runner import _environment, _files, _fold, _work
from beam_runner._exports import exported_full, exported_round, exported_server
from beam_runner._range import RunRange
from beam_runner._sources import ChunkFiles, Reader, Whole, reader_of_array
from drjax import _chunks
from drjax._numpy import as_sent, to_numpy
from drjax.plan import At, MapReduce, Plan, Scan, Server

CHUNKS_OF_RANGE = 16  # At most, unless there are very many: what a worker gets at once.


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A value of the server that a pipeline makes: one of a list."""

    producer: Any  # A PCollection of one list.
    position: int


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A placed value: what reads it, which leaf it is, and what must be done before."""

    reader: Reader
    leaf: int
    after: Any = None  # A PCollection of the pipeline that writes it.


class Settings(NamedTuple):
    """How stages are run.

    Args:
      folder: for files.
      chunk_size: elements in a chunk; None, to choose.
      on_bad: as in `run`.
      environment: what workers are to have.
      progress: a folder with a file for each range that is done, or None.
    """

    folder: str
    chunk_size: int | None
    on_bad: str
    environment: _environment.Recorded
    progress: str | None = None


class Typed(NamedTuple):
    """A value with its type, and where its elements are, if it is placed."""

    value: Any
    aval: Any
    at: At | None


class Taking(NamedTuple):
    """Which elements take part in a run.

    Args:
      n: how many there are; int32.
      skip: the positions of those that are left out; int32.
      size: how many remain; int32.
    """

    n: Any
    skip: Any
    size: Any


def all_of(n: int) -> Taking:
    return Taking(np.int32(n), np.zeros(0, np.int32), np.int32(n))


Elements = dict[tuple[str, int], Taking]


def first_values(
    plan: Plan, inputs: Sequence[Any], elements: Elements
) -> dict[int, Any]:
    """The values that are there before the first stage, by number."""
    env: dict[int, Any] = {i: to_numpy(x) for i, x in plan.constants.items()}
    for i, placement in plan.sizes.items():
        env[i] = elements.get(placement, all_of(placement[1])).size
    return env | dict(zip(plan.inputs, inputs, strict=True))


class Graph:
    """A pipeline to which the stages of a plan are added.

    Args:
      pipeline: a Beam pipeline.
      settings: how stages are run.
      elements: of placements, by name and planned `n`, where it is not all of them.
    """

    def __init__(
        self,
        pipeline: Any,
        settings: Settings,
        elements: Elements | None = None,
    ):
        self.pipeline, self.settings = pipeline, settings
        self.elements = elements or {}
        self.bad: list[tuple[str, int, Any]] = []  # Of rounds: placement, n, elements.
        self.ranges = 0  # Of all rounds, as far as they are known.
        self._names: dict[str, int] = {}

    def run(self, plan: Plan, inputs: Sequence[Any]) -> list[Any]:
        """Adds all stages of a plan; returns its results, leaf by leaf."""
        env = first_values(plan, inputs, self.elements)
        for stage in plan.stages:
            self.add(plan, stage, env)
        return [env[i] for i in plan.outputs]

    def add(self, plan: Plan, stage: Any, env: dict[int, Any]) -> None:
        """Adds a stage of a plan; what it gives is in `env` then."""
        match stage:
            case Server():
                values = [typed(plan, env, i) for i in stage.inputs]
                program, count = exported_server(stage), len(stage.outputs)
                made = self._serve("Server", program, values, count)
                env.update(zip(stage.outputs, made, strict=True))
            case MapReduce():
                self._add_round(plan, stage, env)
            case Scan():
                self._add_scan(plan, stage, env)
            case _:
                raise NotImplementedError(
                    "beam_runner.MapReduce: the program communicates in a while loop "
                    "or a condition, whose course is known only when it runs, and the "
                    "steps of a pipeline are fixed before. Use beam_runner.run; or "
                    "beam_runner.iterate, for rounds until a condition holds."
                )

    def compute(self, name: str, fn: Any, values: Sequence[Typed]) -> list[Made]:
        """Adds a function of values, which gives a list of arrays."""
        structs = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in values]
        program = jax.export.export(jax.jit(fn))(*structs)
        count = len(program.out_avals)
        return self._serve(name, bytes(program.serialize()), values, count)

    def _serve(
        self, name: str, program: bytes, values: Sequence[Typed], count: int
    ) -> list[Made]:
        name, settings = self.label(name), self.settings
        picks, sides = self.picks(values)
        serve = _work.Serve(program, picks, settings.folder, settings.environment)
        producer = self.start(name) | f"{name}/Run" >> beam.ParDo(serve, *sides)
        return [Made(producer, k) for k in range(count)]

    def start(self, name: str) -> Any:
        """What a step that runs once is applied to.

        Not what another step gives: that is a side input only. Where a PCollection is
        a side input and what a step is applied to, Beam's FnApiRunner may take steps in
        a wrong order, by the order of a set.
        """
        return self.pipeline | f"{name}/Start" >> beam.Impulse()

    def _add_round(self, plan: Plan, stage: MapReduce, env: dict[int, Any]) -> None:
        settings, name = self.settings, self.label(f"Round over {stage.placement}")
        chunk = chunk_size(stage, settings.chunk_size)
        elements = self.elements.get((stage.placement, stage.n), all_of(stage.n))
        is_known = not isinstance(elements.n, Made)
        handed_out = [i for i in stage.placed_inputs if isinstance(env[i], Made)]
        values = [typed(plan, env, i) for i in (*stage.server_inputs, *handed_out)]
        values += [Typed(x, None, None) for x in (elements.n, elements.skip)]
        picks, sides = self.picks(values)
        server, rest = (
            picks[: len(stage.server_inputs)],
            picks[len(stage.server_inputs) :],
        )
        rows, waits = self._rows(
            plan, stage, env, dict(zip(handed_out, rest, strict=False))
        )

        avals = [plan.avals[i] for _, i in stage.reductions]
        outputs = [as_sent(aval).dtype for aval in stage.body.out_avals[len(avals) :]]
        files = ChunkFiles(
            _files.join(settings.folder, name.replace(" ", "-")), chunk, tuple(outputs)
        )
        if outputs:
            _files.make_folder(files.folder)
        pieces = ranges(stage.n, chunk) if is_known else None
        levels = _fold.levels(len(pieces)) if pieces else 2
        work = _work.Work(
            name=name.replace(" ", "-"),
            program=exported_round(stage, chunk),
            full=exported_full(stage, chunk),
            placement=stage.placement,
            chunk=chunk,
            n=rest[-2],
            server=server,
            placed=rows,
            skip=rest[-1],
            operations=tuple(operation for operation, _ in stage.reductions),
            dtypes=tuple(aval.dtype for aval in avals),
            levels=levels,
            outputs=files,
            on_bad=settings.on_bad,
            folder=settings.folder,
            environment=settings.environment,
            progress=settings.progress,
        )
        self.ranges += len(pieces or ())
        count = [] if is_known else [pvalue.AsSingleton(elements.n.producer)]
        todo = self.start(name) | f"{name}/Ranges" >> beam.FlatMap(
            _ranges_of, chunk if pieces is None else pieces, *count
        )
        if pieces is None or len(pieces) > 1:
            todo |= f"{name}/Spread" >> beam.Reshuffle()
        run = beam.ParDo(RunRange(work), *sides, *waits)
        run = run.with_output_types(tuple[int, Any])  # The key is coded as a number.
        if settings.on_bad == "collect":
            done = todo | f"{name}/Map" >> run.with_outputs("bad", main="reduced")
            self.bad.append((stage.placement, stage.n, done.bad))
            reduced = done.reduced
        else:
            reduced = todo | f"{name}/Map" >> run
        may_be_none = not is_known or settings.on_bad == "collect"
        folded = reduced | f"{name}/Fold" >> _fold.Fold(
            work.operations,
            work.dtypes,
            [aval.shape for aval in avals] if may_be_none else None,
            levels,
            settings.folder,
        )
        env.update((i, Made(folded, k)) for k, (_, i) in enumerate(stage.reductions))
        for k, i in enumerate(stage.placed_outputs):
            env[i] = Placed(files, k, folded)

    def _add_scan(self, plan: Plan, stage: Scan, env: dict[int, Any]) -> None:
        """Adds a loop step by step."""
        constants = [env[i] for i in stage.constants]
        carry = [env[i] for i in stage.init]
        body, n, steps = stage.body, len(stage.xs), range(stage.length)
        slices = self.compute(
            "Slices",
            lambda *xs: [x[t] for t in steps for x in xs],
            [typed(plan, env, i) for i in stage.xs],
        )
        ys: list[Any] = [[] for _ in steps]
        for t in reversed(steps) if stage.reverse else steps:
            outs = self.run(body, [*constants, *carry, *slices[t * n : (t + 1) * n]])
            given = dict(zip(body.outputs, outs, strict=True))
            carry = outs[: len(carry)]
            ys[t] = [typed(body, given, i) for i in body.outputs[len(carry) :]]
        count, avals = len(stage.ys), [plan.avals[i] for i in stage.ys]

        def stack(*ys: Any) -> list[Any]:
            if not ys:
                return [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
            return [jnp.stack(ys[k::count]) for k in range(count)]

        stacked = self.compute("Stack", stack, [*itertools.chain(*ys)])
        env.update(zip((*stage.carry, *stage.ys), [*carry, *stacked], strict=True))

    def _rows(
        self,
        plan: Plan,
        stage: MapReduce,
        env: dict[int, Any],
        handed_out: dict[int, _work.Pick],
    ) -> tuple[tuple[_work.Rows, ...], list[Any]]:
        """How placed inputs are read, those of one reader together; what is before."""
        groups: dict[Any, list[tuple[int, Placed]]] = {}
        rows = []
        for k, i in enumerate(stage.placed_inputs):
            axis, value = plan.at[i].axis, env[i]
            if i in handed_out:
                rows.append(_work.Rows(handed_out[i], (axis,), (k,)))
                continue
            if not isinstance(value, Placed):
                dtype, folder = as_sent(plan.avals[i]).dtype, self.settings.folder
                value = Placed(reader_of_array(value, axis, dtype, folder), 0)
                env[i] = value
            groups.setdefault(id(value.reader), []).append((k, value))
        for group in groups.values():
            inputs, values = zip(*group, strict=True)
            leaves = tuple(value.leaf for value in values)
            rows.append(_work.Rows(values[0].reader, leaves, inputs))
        placed = itertools.chain(*groups.values())
        waits = [x.after for _, x in placed if x.after is not None]
        return tuple(rows), [pvalue.AsIter(x) for x in dict.fromkeys(waits)]

    def picks(
        self, values: Sequence[Typed]
    ) -> tuple[tuple[_work.Pick, ...], list[Any]]:
        """Where values are, and the side inputs with those that the pipeline makes."""
        made = [x.value.producer for x in values if isinstance(x.value, Made)]
        placed = [x.value.after for x in values if isinstance(x.value, Placed)]
        producers = [*dict.fromkeys(made)]
        picks = []
        for x, aval, at in values:
            if isinstance(x, Made):
                picks.append(_work.Pick(producers.index(x.producer), x.position))
            elif isinstance(x, Placed):
                assert at is not None
                whole = Whole(x.reader, x.leaf, at.n, at.axis)
                picks.append(_work.Pick(None, whole))
            elif isinstance(x, _files.Staged):
                picks.append(_work.Pick(None, x))
            else:
                dtype = None if aval is None else as_sent(aval).dtype
                staged = _files.stage(np.asarray(x, dtype), self.settings.folder)
                picks.append(_work.Pick(None, staged))
        waits = [x for x in dict.fromkeys(placed) if x is not None]
        sides = [*map(pvalue.AsSingleton, producers), *map(pvalue.AsIter, waits)]
        return tuple(picks), sides

    def label(self, name: str) -> str:
        """A label that no other transform has, the same for the same program."""
        number = self._names[name] = self._names.get(name, 0) + 1
        return name if number == 1 else f"{name} ({number})"


def typed(plan: Plan, env: dict[int, Any], i: int) -> Typed:
    return Typed(env[i], plan.avals[i], plan.at.get(i))


def chunk_size(stage: MapReduce, said: int | None) -> int:
    return _chunks.choose(stage, stage.n, said, jax.default_backend(), 1).size


def check_on_bad(on_bad: str) -> None:
    if on_bad not in _work.ON_BAD:
        raise ValueError(
            f"beam_runner: on_bad is one of {_work.ON_BAD}, but got {on_bad!r}."
        )


def ranges(n: int, chunk: int) -> list[tuple[int, int, int]]:
    """Pieces of the chunks of n elements: their numbers, and the chunks in them."""
    chunks = -(-n // chunk)
    each = min(CHUNKS_OF_RANGE, -(-chunks // _fold.FAN_IN))
    each = max(1, each, -(-chunks // _fold.MAX_RANGES))
    lows = range(0, chunks, each)
    return [(k, low, min(low + each, chunks)) for k, low in enumerate(lows)]


def _ranges_of(_: Any, of: Any, *sizes: Any) -> list[tuple[int, int, int]]:
    """Ranges that are known; or, by the size of a chunk, those of a size."""
    return of if isinstance(of, list) else ranges(int(sizes[0][0]), of)
