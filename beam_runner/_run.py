"""Runs a program as Beam pipelines: one for each stretch of a plan without loops."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_runner import _environment, _files, _progress, _results, _work
from beam_runner._arguments import check_sources, values_of
from beam_runner._graph import (
    Elements,
    Graph,
    Made,
    Placed,
    Settings,
    Taking,
    as_sent,
    check_on_bad,
    checked_chunk_size,
    first_values,
    typed,
)
from beam_runner._sources import Whole, reader_of_array
from drjax import make_plan
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While, reads_of


class Bad(NamedTuple):
    """An element that was left out: where it was, and why."""

    placement: str
    index: int
    why: str


class Details(NamedTuple):
    """What a run gives.

    Args:
      result: what the program returns.
      bad: the elements that were left out.
      metrics: of all pipelines, by name.
      pipelines: how many there were.
    """

    result: Any
    bad: tuple[Bad, ...]
    metrics: dict[str, int]
    pipelines: int


def run(
    program: Callable[..., Any],
    *args: Any,
    runner: Any = "embedded",
    options: Any = None,
    chunk_size: int | None = None,
    temp_location: str | None = None,
    on_bad: str = "raise",
    progress: bool = False,
) -> Any:
    """Runs a program, or a derivative of one, as Apache Beam pipelines."""
    session = Session(runner, options, chunk_size, temp_location, on_bad, progress)
    return session.run(program, args).result


def run_with_details(
    program: Callable[..., Any],
    *args: Any,
    runner: Any = "embedded",
    options: Any = None,
    chunk_size: int | None = None,
    temp_location: str | None = None,
    on_bad: str = "raise",
    progress: bool = False,
) -> Details:
    """As `run`; also returns the elements that were left out, and metrics."""
    session = Session(runner, options, chunk_size, temp_location, on_bad, progress)
    return session.run(program, args)


class _Again(Exception):
    """More elements are bad: all starts again, without them."""


class Session:
    """How plans are run: the runner, its options, and where files are."""

    def __init__(
        self,
        runner: Any,
        options: Any,
        chunk_size: int | None,
        temp_location: str | None,
        on_bad: str,
        progress: bool,
    ):
        check_on_bad(on_bad)
        self.runner, self.options = _runner_of(runner), _options_of(options)
        self.chunk_size = checked_chunk_size(chunk_size)
        self.on_bad, self.progress = on_bad, progress
        said = self.options.view_as(GoogleCloudOptions).temp_location
        self.temp_location = temp_location or said
        if self.temp_location is None and not isinstance(self.runner, FnApiRunner):
            raise ValueError(
                f"beam_runner: a run on {type(self.runner).__name__} needs a "
                "temp_location, which is a folder that all its workers reach."
            )

    def run(self, program: Callable[..., Any], args: Sequence[Any]) -> Details:
        plan, leaves = plan_of(program, args)
        with self.open() as run:
            result = run.results(plan, run.staged(plan, leaves))
        return Details(result, tuple(sorted(run.bad)), run.metrics, run.pipelines)

    @contextlib.contextmanager
    def open(self) -> Generator["Run"]:
        """A run, with a folder while it lasts."""
        folder = _files.new_folder(self.temp_location or tempfile.gettempdir())
        try:
            yield Run(self, folder)
        finally:
            _files.remove(folder)


def plan_of(program: Callable[..., Any], args: Sequence[Any]) -> tuple[Plan, list[Any]]:
    """A plan that recomputes, and the arguments leaf by leaf."""
    values = values_of(args)
    plan = make_plan(program)(*values.structs).recomputed()
    check_sources(plan, values.leaves)
    return plan, values.leaves


class Run:
    """Interprets plans, and counts."""

    def __init__(self, session: Session, folder: str):
        self.session, self.folder = session, folder
        self.environment = _environment.record()
        self.bad: set[Bad] = set()
        self.metrics: dict[str, int] = {}
        self.pipelines = 0

    def staged(self, plan: Plan, leaves: Sequence[Any]) -> list[Any]:
        """Arguments of which those that rounds read are in files, written once."""
        rounds = (stage for stage in plan.stages if isinstance(stage, MapReduce))
        placed = {i for stage in rounds for i in stage.placed_inputs}
        staged = [*leaves]
        for k, i in enumerate(plan.inputs):
            if i in placed and not isinstance(leaves[k], Placed):
                dtype = as_sent(plan.avals[i]).dtype
                axis = plan.at[i].axis
                reader = reader_of_array(leaves[k], axis, dtype, self.folder)
                staged[k] = Placed(reader, 0)
        return staged

    def results(self, plan: Plan, leaves: Sequence[Any]) -> Any:
        """What a planned function returns; starts again while elements are bad."""
        while True:
            with contextlib.suppress(_Again):
                outs = self.plan(plan, leaves)
                break
        results = [
            result_of(plan.avals[i], self.whole(plan, i, x))
            for i, x in zip(plan.outputs, outs, strict=True)
        ]
        return jax.tree.unflatten(plan.out_tree, results)

    def plan(self, plan: Plan, inputs: Sequence[Any]) -> list[Any]:
        """The results of a plan, leaf by leaf; values are arrays, or `Placed`."""
        env = first_values(plan, inputs, self.elements(plan))
        stretch: list[Any] = []
        for k, stage in enumerate(plan.stages):
            if isinstance(stage, Server | MapReduce):
                stretch.append(stage)
            else:
                self.stretch(plan, stretch, plan.stages[k:], env)
                stretch = []
                self.loop(plan, stage, env)
        self.stretch(plan, stretch, (), env)
        return [env[i] for i in plan.outputs]

    def elements(self, plan: Plan) -> Elements:
        """Which elements take part: not those that were bad before."""
        elements = {}
        for placement, n in plan.placements:
            skip = sorted(bad.index for bad in self.bad if bad.placement == placement)
            if skip:
                left = np.int32(n - len(skip))
                taking = Taking(np.int32(n), np.array(skip, np.int32), left)
                elements[placement, n] = taking
        return elements

    def whole(self, plan: Plan, i: int, x: Any) -> Any:
        if not isinstance(x, Placed):
            return x
        return Whole(x.reader, x.leaf, *plan.at[i][1:]).value()

    def loop(self, plan: Plan, stage: Any, env: dict[int, Any]) -> None:
        """Runs a loop or branch here, and what is in it as pipelines."""

        def write(numbers: Sequence[int], values: Sequence[Any]) -> None:
            env.update(zip(numbers, values, strict=True))

        match stage:
            case Scan():
                constants = [env[i] for i in stage.constants]
                carry = [env[i] for i in stage.init]
                xs = [self.whole(plan, i, env[i]) for i in stage.xs]
                ys: list[Any] = [None] * stage.length
                steps = range(stage.length)
                for t in reversed(steps) if stage.reverse else steps:
                    inputs = [*constants, *carry, *(x[t] for x in xs)]
                    outs = self.plan(stage.body, inputs)
                    carry, numbers = outs[: len(carry)], stage.body.outputs
                    ys[t] = [
                        self.whole(stage.body, i, y)
                        for i, y in [*zip(numbers, outs, strict=True)][len(carry) :]
                    ]
                write(stage.carry, carry)
                avals = [as_sent(plan.avals[i]) for i in stage.ys]
                stacked = [np.zeros(aval.shape, aval.dtype) for aval in avals]
                if steps:
                    stacked = [np.stack(y) for y in zip(*ys, strict=True)]
                write(stage.ys, stacked)
            case While():
                constants = [env[i] for i in stage.body_constants]
                given = [env[i] for i in stage.predicate_constants]
                carry = [env[i] for i in stage.init]
                while self.plan(stage.predicate, [*given, *carry])[0]:
                    carry = self.plan(stage.body, [*constants, *carry])
                write(stage.carry, carry)
            case Branch():
                last = len(stage.branches) - 1
                branch = stage.branches[min(max(int(env[stage.index]), 0), last)]
                operands = [env[i] for i in stage.operands]
                write(stage.results, self.plan(branch, operands))

    def stretch(
        self,
        plan: Plan,
        stages: Sequence[Any],
        later: Sequence[Any],
        env: dict[int, Any],
    ) -> None:
        """Runs stages in one pipeline; what later ones read is in `env` then."""
        if not stages:
            return
        self.pipelines += 1
        session = self.session
        own = _files.join(self.folder, f"pipeline-{self.pipelines}")
        progress = _files.join(own, "progress") if session.progress else None
        for path in (own, progress):
            if path:
                _files.make_folder(path)
        settings = Settings(
            own,
            self.folder,
            session.chunk_size,
            session.on_bad,
            self.environment,
            progress,
        )
        pipeline = beam.Pipeline(runner=session.runner, options=session.options)
        graph = Graph(pipeline, settings, self.elements(plan))
        inner = dict(env)
        for stage in stages:
            graph.add(plan, stage, inner)
        read = {i for stage in later for i in reads_of(stage)} | {*plan.outputs}
        made = [i for i in read if isinstance(inner.get(i), Made)]
        saved = _results.save(graph, [typed(plan, inner, i) for i in made])
        with _bar(self.pipelines, graph.ranges, progress):
            result = pipeline.run()
            result.wait_until_finish()
        self.measure(result)
        if saved.bad is not None:
            self.leave_out(_files.read_json(saved.bad))
        dtypes = [as_sent(plan.avals[i]).dtype for i in made]
        values = _files.read_arrays(saved.values, dtypes)
        env.update(zip(made, values, strict=True))
        placed = (i for i in read if isinstance(inner.get(i), Placed))
        env.update((i, Placed(inner[i].reader, inner[i].leaf)) for i in placed)

    def leave_out(self, found: Sequence[Any]) -> None:
        """Notes bad elements; raises `_Again` if there are new ones."""
        new = {Bad(*bad) for bad in found} - self.bad
        if new:
            self.bad |= new
            raise _Again

    def measure(self, result: Any) -> None:
        """Adds up a pipeline's metrics; warns if workers were set up otherwise."""
        metrics = result.metrics().query(
            beam.metrics.MetricsFilter().with_namespace(_work.METRICS)
        )
        for metric in metrics["counters"]:
            self._add(metric.key.metric.name, metric.result)
        for metric in metrics["distributions"]:
            self._add(metric.key.metric.name, metric.result.sum)
        if self.metrics.get("environment_differences"):
            warnings.warn(
                "beam_runner: some workers have another numeric environment than this "
                "process, as their logs say; results may differ in their last bits "
                "from run to run.",
                UserWarning,
                stacklevel=2,
            )

    def _add(self, name: str, value: int) -> None:
        self.metrics[name] = self.metrics.get(name, 0) + value


def _bar(number: int, total: int, folder: str | None) -> Any:
    if folder is None:
        return contextlib.nullcontext()
    return _progress.bar(f"Pipeline {number}", folder, total)


def result_of(aval: Any, x: Any) -> Any:
    """A result as jit gives it."""
    if aval.dtype == jax.dtypes.float0:
        return np.zeros(aval.shape, aval.dtype)
    return jnp.asarray(_work.from_numpy(x, aval))


def _options_of(options: Any) -> PipelineOptions:
    match options:
        case PipelineOptions():
            return options
        case None:
            return PipelineOptions([])
        case dict():
            return PipelineOptions([], **options)
        case _:
            return PipelineOptions([*options])


def _runner_of(runner: Any) -> Any:
    if runner == "embedded":
        return FnApiRunner()
    if isinstance(runner, str):
        runner = create_runner(runner)
    _environment.check_runner(runner)
    return runner
