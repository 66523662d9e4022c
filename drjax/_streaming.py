"""The streaming engine: a program run chunk by chunk, in the memory of a few chunks."""

import contextlib
import functools
import math
import types
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from drjax import _chunks, _mesh
from drjax._arguments import (
    Row,
    check_order,
    check_readable,
    fed_rows,
    platform_of,
    streamed,
    struct_of,
    values_of,
    with_wholes,
)
from drjax._describe import amount
from drjax._export import checked_chunk_size
from drjax._faster import faster
from drjax._jaxprs import as_fun
from drjax._make_plan import make_plan
from drjax._reference import as_array, interpret
from drjax._rounds import Fed, Round
from drjax._sources import is_host_array, reader_of_array
from drjax.plan import (
    MapReduce,
    Plan,
    Server,
    plans_in,
)


def streaming(
    fn: Callable[..., Any],
    chunk_size: int | None = None,
    *,
    rewrite: bool = True,
    progress: bool = False,
) -> "Streaming":
    """Makes a function that runs `fn` chunk by chunk, in the memory of a few chunks.

    Its plan is run, see `make_plan`: in a round, chunks of elements are mapped and what
    they give is reduced one after the other, so that the placed values in between never
    exist for all elements. Results are those of `jax.jit(fn)` up to rounding, but for
    what is drawn with keys of the `rbg` kinds, as `jax.vmap` draws otherwise. A sum of
    floats is kept in pairs of numbers with twice the digits (in float32 pairs for
    narrower ones), so that it is as accurate for many elements as for few. The same
    chunks give the same bits.

    It runs on the device of the arguments, or on a mesh: that which `jax.set_mesh` has
    installed, or over which the arguments are sharded. If that has an axis of a
    placement's name, each device runs chunks of its own elements, and what they have
    reduced is combined once, at the end of a round.

    Args:
      fn: a program, a derivative of one, or any function that calls some.
      chunk_size: elements of a placement, on each device, that are mapped at a time; by
        default it is found from shapes and from the kind of device, see `explain`.
      rewrite: whether the body of a round may be replaced by one that is the same up to
        rounding, and faster on CPUs: unrolled loops of convolutions, and gradients of
        pooling as slices.
      progress: whether rounds show a progress bar; it needs the package `rich`.

    Returns:
      A function of the arguments of `fn`, and of `Elements` in place of placed ones.
      A large array of the host, as a numpy.memmap, is read piece by piece where it is
      placed. It returns arrays of JAX. Its method `explain` takes the same arguments,
      and says how the rounds are run.

    Raises:
      TypeError: if it is differentiated, vmapped or jitted: `streaming(jax.grad(fn))`,
        not `jax.grad(streaming(fn))`.
      PlanError: as `make_plan`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=10_000)
      ... def loss(w, x):
      ...     return drjax.reduce_mean(drjax.map_fn(lambda x: (x - w) ** 2, x))
      >>> gradient = drjax.streaming(jax.grad(loss))
      >>> print(gradient(2.0, jnp.linspace(0, 1, 10_000)))
      3.0
    """
    return Streaming(fn, chunk_size, rewrite, progress)


class Streaming:
    """What `streaming` returns: call it, or let it `explain` what a call would do."""

    def __init__(
        self,
        fn: Callable[..., Any],
        chunk_size: int | None,
        rewrite: bool,
        progress: bool,
    ):
        chunk_size = checked_chunk_size("drjax.streaming", chunk_size)
        functools.update_wrapper(self, fn, updated=())
        self._fn, self._progress = fn, progress
        self._options = chunk_size, rewrite
        self._traced: Any = jax.jit(fn)
        # By jaxpr, so that a plan is made anew when JAX would trace anew.
        self._engines: weakref.WeakKeyDictionary[Any, Engine]
        self._engines = weakref.WeakKeyDictionary()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = values_of(self._fn, args, kwargs)
        engine = self._engine(args, kwargs)
        with (
            _automatic_mesh(values) as (mesh, values, restored),
            _progress_bar(self._progress) as bar,
        ):
            outs = engine.run(values, mesh, bar)
        return jax.tree.unflatten(engine.plan.out_tree, restored(outs))

    def __get__(self, obj: Any, _: Any = None) -> Any:
        """As a function does, which is a method of an object."""
        return self if obj is None else types.MethodType(self, obj)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """Says in how many chunks each round would run, why, and in what memory."""
        values = values_of(self._fn, args, kwargs)
        engine = self._engine(args, kwargs)
        with _automatic_mesh(values) as (mesh, *_):
            lines = engine.explained(engine.plan, mesh, platform_of(mesh, values))
            return "\n".join(lines) or "no round: the server does all of it"

    def _engine(self, args: Any, kwargs: Any) -> "Engine":
        structs, by_name = jax.tree.map(struct_of, (args, kwargs))
        with _mesh.without_explicit_axes():  # As `make_plan` does.
            jaxpr = self._traced.trace(*structs, **by_name).jaxpr
            if jaxpr not in self._engines:
                plan = make_plan(self._fn)(*structs, **by_name)
                self._engines[jaxpr] = Engine(plan, *self._options)
            return self._engines[jaxpr]


def _no_bar(stage: MapReduce) -> Callable[[int], None]:
    return lambda count: None


class Engine:
    """Runs a plan chunk by chunk, and keeps what is compiled for it."""

    def __init__(self, plan: Plan, chunk_size: int | None = None, rewrite: bool = True):
        self.plan = plan.recomputed()
        self.chunk_size, self.rewrite = chunk_size, rewrite
        self._streamed = streamed(self.plan)
        self._rounds: dict[Any, Round] = {}
        self._servers: dict[Server, Any] = {}

    def run(
        self, values: Sequence[Any], mesh: Mesh | None = None, bar: Any = _no_bar
    ) -> list[Any]:
        """Returns the results, leaf by leaf, for arguments leaf by leaf."""
        check_readable(self.plan, self._streamed, values)
        values = with_wholes(self.plan, self._streamed, values)
        platform = platform_of(mesh, values)
        run_round = functools.partial(self._run_round, mesh, platform, bar)
        outs = interpret(self.plan, values, self._run_server, run_round)
        return [*map(as_array, outs)]

    def _run_server(self, plan: Plan, stage: Server, env: dict[int, Any]) -> None:
        if stage not in self._servers:
            self._servers[stage] = jax.jit(as_fun(stage.jaxpr))
        outs = self._servers[stage](*(env[i] for i in stage.inputs))
        env.update(zip(stage.outputs, outs, strict=True))

    def _run_round(
        self,
        mesh: Mesh | None,
        platform: str,
        bar: Any,
        plan: Plan,
        stage: MapReduce,
        env: dict[int, Any],
    ) -> None:
        fed: list[Fed] = []
        placed: list[Any] = []
        rows: dict[int, list[tuple[int, Row]]] = {}
        for k, i in enumerate(stage.placed_inputs):
            x = env[i]
            if isinstance(x, Row):
                rows.setdefault(id(x.source), []).append((k, x))
            elif is_host_array(x):
                fed.append(Fed(reader_of_array(x, plan.at[i].axis), (k,)))
            placed.append(None if isinstance(x, Row) or is_host_array(x) else x)
        round_ = self.round(plan, stage, mesh, platform)
        check_order(round_, rows)
        fed += [fed_rows(group) for group in rows.values()]
        server = [env[i] for i in stage.server_inputs]
        outs = round_.run(server, placed, fed, bar(stage))
        numbers = [*(i for _, i in stage.reductions), *stage.placed_outputs]
        env.update(zip(numbers, outs, strict=True))

    def round(
        self, plan: Plan, stage: MapReduce, mesh: Mesh | None, platform: str
    ) -> Round:
        is_spread = mesh is not None and mesh.shape.get(stage.placement, 1) > 1
        over = mesh if is_spread else None
        key = stage, over, platform
        if key not in self._rounds:
            cores = _chunks.cores() if mesh is None or mesh.size == 1 else 1
            n = stage.n if over is None else stage.n // over.shape[stage.placement]
            chunks = _chunks.choose(stage, n, self.chunk_size, platform, cores)
            is_replaced = self.rewrite and platform == "cpu"
            body = faster(stage.body) if is_replaced else stage.body
            self._rounds[key] = Round(plan, stage, chunks, over, body)
        return self._rounds[key]

    def explained(self, plan: Plan, mesh: Mesh | None, platform: str) -> Iterator[str]:
        for stage in plan.stages:
            if isinstance(stage, MapReduce):
                round_ = self.round(plan, stage, mesh, platform)
                chunks, count = round_.chunks, math.ceil(round_.n / round_.chunks.size)
                on = f" on each of {round_.devices} devices" * (round_.devices > 1)
                at_a_time = f", {chunks.lanes} at a time" * (chunks.lanes > 1)
                yield (
                    f"round over {stage.placement!r}, {stage.n} elements: {count} "
                    f"chunk{'s' * (count > 1)} of {chunks.size}{on}{at_a_time} "
                    f"({chunks.why}); {amount(chunks.bytes, 'B')} at most"
                )
            for inner in plans_in(stage):
                yield from (
                    "  " + line for line in self.explained(inner, mesh, platform)
                )


#
# Meshes.
#
@contextlib.contextmanager
def _automatic_mesh(values: list[Any]) -> Generator[tuple[Mesh | None, list[Any], Any]]:
    """The mesh to run on, with automatic axes, and the values on it.

    Also gives what puts results onto the mesh as it is: a plan has no types with
    explicit axes, so they are set aside meanwhile.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        shardings = (x.sharding for x in values if isinstance(x, jax.Array))
        meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding))
        mesh = next((m for m in meshes if isinstance(m, Mesh) and m.size > 1), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        yield mesh, values, lambda outs: outs
        return
    auto = Mesh(mesh.devices, mesh.axis_names)

    def to(mesh, x):
        if not (isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)):
            return x
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    with jax.set_mesh(auto):
        yield auto, [to(auto, x) for x in values], lambda xs: [to(mesh, x) for x in xs]


#
# Progress.
#
@contextlib.contextmanager
def _progress_bar(shown: bool) -> Generator[Callable[[MapReduce], Any]]:
    """Gives a function of a round that gives one of how many elements are done."""
    if not shown:
        yield _no_bar
        return
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError as e:
        raise ImportError(
            "drjax.streaming: progress=True shows the bars of the package rich: "
            "pip install rich."
        ) from e
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:

        def of(stage):
            task = progress.add_task(stage.placement, total=stage.n)
            return lambda count: progress.advance(task, count)

        yield of
