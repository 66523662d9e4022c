"""Runs a plan as pipelines, one for each stretch without loops; loops run here."""

import contextlib
import dataclasses
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
)
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import create_runner

from beam_runner import _environment, _files, _progress, _results, _runners, _work
from beam_runner._arguments import check_sources, values_of
from beam_runner._exports import exported_server
from beam_runner._graph import (
    Elements,
    Graph,
    Made,
    Placed,
    Settings,
    Taking,
    as_sent,
    check_on_bad,
    first_values,
    typed,
)
from beam_runner._sources import Whole, reader_of_array
from drjax import _mesh, make_plan
from drjax._export import checked_chunk_size
from drjax._numpy import from_numpy, to_numpy
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While, reads_of


@dataclasses.dataclass(frozen=True)
class Bad:
    """An element that was left out: where it was, and why."""

    placement: str
    index: int
    why: str


class _Again(Exception):
    """More elements are bad: all starts again, without them."""


class Session:
    """How plans are run: the runner, its options, and where files are."""

    def __init__(
        self,
        runner: Any = "embedded",
        options: Any = None,
        chunk_size: int | None = None,
        temp_location: str | os.PathLike[str] | None = None,
        on_bad: str = "raise",
        progress: bool = False,
    ):
        check_on_bad(on_bad)
        self.options = _options_of(options)
        self.runner = _runner_of(runner, self.options)
        self.chunk_size = checked_chunk_size("beam_runner", chunk_size)
        self.on_bad, self.progress = on_bad, progress
        said = self.options.view_as(GoogleCloudOptions).temp_location
        self.temp_location = _runners.temp_location(temp_location or said, self.runner)

    def run(
        self, program: Callable[..., Any], args: Sequence[Any]
    ) -> tuple[Any, "Run"]:
        """What a program returns, and the run, which knows what happened."""
        plan, leaves = plan_of(program, args)
        with self.open() as run:
            return run.results(plan, run.staged(plan, leaves)), run

    @contextlib.contextmanager
    def open(self) -> Generator["Run"]:
        """A run, with a folder while it lasts."""
        folder = _files.new_folder(self.temp_location)
        try:
            with _progress.bars(self.progress) as bars:
                yield Run(self, folder, bars)
        finally:
            _files.remove(folder)


def plan_of(program: Callable[..., Any], args: Sequence[Any]) -> tuple[Plan, list[Any]]:
    """A plan that recomputes, and the arguments leaf by leaf."""
    values = values_of(args)
    with _mesh.without_explicit_axes():  # As `make_plan` does.
        jaxpr = jax.jit(program).trace(*values.structs).jaxpr
    if jaxpr not in _plans:
        _plans[jaxpr] = make_plan(program)(*values.structs).recomputed()
    plan = _plans[jaxpr]
    check_sources(plan, values.leaves)
    return plan, values.leaves


# By jaxpr, so that a plan is made anew when JAX would trace anew.
_plans: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()


class Run:
    """Interprets plans, and counts."""

    def __init__(self, session: Session, folder: str, bars: _progress.Bars):
        self.session, self.folder, self.bars = session, folder, bars
        self.environment = _environment.record()
        self.why: dict[tuple[str, int], dict[int, str]] = {}  # Elements are bad.
        self.metrics: dict[str, int] = {}
        self.pipelines = 0
        self.folders: list[str] = []  # Of pipelines that have made placed values.

    @property
    def bad(self) -> tuple[Bad, ...]:
        return tuple(
            Bad(placement, index, why)
            for (placement, _), whys in sorted(self.why.items())
            for index, why in sorted(whys.items())
        )

    def staged(self, plan: Plan, leaves: Sequence[Any]) -> list[Any]:
        """Arguments of which placed and large ones are in files, written once."""
        staged = [*leaves]
        for k, i in enumerate(plan.inputs):
            x, dtype = leaves[k], as_sent(plan.avals[i]).dtype
            if isinstance(x, Placed):
                continue
            if i in plan.at:
                axis = plan.at[i].axis
                staged[k] = Placed(reader_of_array(x, axis, dtype, self.folder), 0)
            else:
                staged[k] = _files.stage(np.asarray(x, dtype), self.folder)
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
        for folder in self.folders:
            _files.remove(folder)
        self.folders.clear()
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
        for key in plan.placements:
            if skip := sorted(self.why.get(key, ())):
                left = np.int32(key[1] - len(skip))
                taking = Taking(np.int32(key[1]), np.array(skip, np.int32), left)
                elements[key] = taking
        return elements

    def whole(self, plan: Plan, i: int, x: Any) -> Any:
        if not isinstance(x, Placed):
            return _files.load(x)
        return Whole(x.reader, x.leaf, *plan.at[i][1:]).value()

    def loop(
        self, plan: Plan, stage: Scan | While | Branch, env: dict[int, Any]
    ) -> None:
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
                while self.holds(stage.predicate, [*given, *carry]):
                    carry = self.plan(stage.body, [*constants, *carry])
                write(stage.carry, carry)
            case Branch():
                last = len(stage.branches) - 1
                index = int(self.whole(plan, stage.index, env[stage.index]))
                branch = stage.branches[min(max(index, 0), last)]
                operands = [env[i] for i in stage.operands]
                write(stage.results, self.plan(branch, operands))

    def holds(self, predicate: Plan, inputs: Sequence[Any]) -> bool:
        (out,) = self.plan(predicate, inputs)
        return bool(self.whole(predicate, predicate.outputs[0], out))

    def stretch(
        self,
        plan: Plan,
        stages: Sequence[Any],
        later: Sequence[Any],
        env: dict[int, Any],
    ) -> None:
        """Runs stages in one pipeline; what later ones read is in `env` then.

        What is the server's alone is run here: as conditions of loops.
        """
        if all(isinstance(stage, Server) for stage in stages):
            for stage in stages:
                self.serve(plan, stage, env)
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
        with self.bars.of_pipeline(self.pipelines, progress or "", graph.ranges):
            result = pipeline.run()
            result.wait_until_finish()
        self.measure(result)
        if saved.bad is not None:
            self.leave_out(_files.read_json(saved.bad))
        dtypes = [as_sent(plan.avals[i]).dtype for i in made]
        values = _files.read_arrays(saved.values, dtypes)
        env.update(zip(made, values, strict=True))
        placed = [i for i in read if isinstance(inner.get(i), Placed)]
        written = [i for i in placed if inner[i].after is not None]
        env.update((i, Placed(inner[i].reader, inner[i].leaf)) for i in written)
        if written:
            self.folders.append(own)
        else:
            _files.remove(own)

    def serve(self, plan: Plan, stage: Server, env: dict[int, Any]) -> None:
        program = _work.loaded(exported_server(stage))
        values = (self.whole(plan, i, env[i]) for i in stage.inputs)
        inputs = map(from_numpy, values, program.avals)
        outs = map(to_numpy, program(*inputs))
        env.update(zip(stage.outputs, outs, strict=True))

    def leave_out(self, found: Sequence[Any]) -> None:
        """Notes bad elements; raises `_Again` if there are some.

        Only those of the first round that has some: what later ones got was wrong.
        """
        for number, placement, n, index, why in sorted(found):
            if number == found[0][0]:
                self.why.setdefault((placement, n), {})[index] = why
        for key, why in self.why.items():
            _work.check_some_remain(*key, why)
        if found:
            raise _Again

    def measure(self, result: Any) -> None:
        """Adds up a pipeline's metrics; warns if workers were set up otherwise."""
        metrics = result.metrics().query(MetricsFilter().with_namespace(_work.METRICS))
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


def result_of(aval: Any, x: Any) -> Any:
    """A result as jit gives it."""
    x = from_numpy(x, aval)
    return x if aval.dtype == jax.dtypes.float0 else jnp.asarray(x)


def _options_of(options: Any) -> PipelineOptions:
    if isinstance(options, PipelineOptions):
        return options
    if (
        options is None
    ):  # The types are ours, and checking them takes a third of a start.
        return PipelineOptions([], pipeline_type_check=False)
    if not isinstance(options, dict):
        return PipelineOptions([*options])
    made = PipelineOptions([], **options)
    unknown = options.keys() - made.get_all_options().keys()
    if unknown:
        raise TypeError(f"beam_runner: Beam knows no options {sorted(unknown)}.")
    return made


def _runner_of(runner: Any, options: PipelineOptions) -> Any:
    said = options.view_as(StandardOptions).runner
    if runner == "embedded":
        if said:
            raise ValueError(
                f"beam_runner: the options say --runner={said}; say runner={said!r}."
            )
        return FnApiRunner()
    if isinstance(runner, str):
        _runners.refuse(runner.rpartition(".")[2])
        try:
            runner = create_runner(runner)
        except ValueError as e:
            raise ValueError(
                f"beam_runner: the runner is 'embedded', or one of Beam: {e}"
            ) from None
    _runners.check(runner)
    return runner
