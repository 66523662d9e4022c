"""The streaming engine: a program run chunk by chunk, in the memory of a few chunks."""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from drjax import _chunks, _mesh
from drjax._describe import amount
from drjax._faster import faster
from drjax._jaxprs import as_fun, is_eager
from drjax._make_plan import make_plan, without_sharding
from drjax._reference import as_array, interpret
from drjax._rounds import Fed, Round
from drjax._sources import Elements, is_host_array, reader_of_array
from drjax.plan import MapReduce, Plan, Server, plans_in, reads_of


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
    exist for all elements. Results are those of `jax.jit(fn)` up to rounding. A sum of
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


class _Row:
    """One leaf of `Elements`: placed, with its elements along axis 0."""

    def __init__(self, source: Elements, leaf: int):
        self.source, self.leaf = source, leaf


class Streaming:
    """What `streaming` returns: call it, or let it `explain` what a call would do."""

    def __init__(
        self,
        fn: Callable[..., Any],
        chunk_size: int | None,
        rewrite: bool,
        progress: bool,
    ):
        is_size = isinstance(chunk_size, int) and chunk_size > 0
        if chunk_size is not None and (not is_size or isinstance(chunk_size, bool)):
            raise ValueError(
                "drjax.streaming: chunk_size is a number of elements, one at least, or "
                f"None, but got {chunk_size!r}."
            )
        functools.update_wrapper(self, fn)
        self._fn, self._progress = fn, progress
        self._options = chunk_size, rewrite
        self._traced: Any = jax.jit(fn)
        # By jaxpr, so that a plan is made anew when JAX would trace anew.
        self._engines: weakref.WeakKeyDictionary[Any, Engine]
        self._engines = weakref.WeakKeyDictionary()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = _values(self._fn, args, kwargs)
        engine = self._engine(args, kwargs)
        with (
            _automatic_mesh(values) as (mesh, values, restored),
            _progress_bar(self._progress) as bar,
        ):
            outs = engine.run(values, mesh, bar)
        return jax.tree.unflatten(engine.plan.out_tree, restored(outs))

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """Says in how many chunks each round would run, why, and in what memory."""
        values = _values(self._fn, args, kwargs)
        engine = self._engine(args, kwargs)
        with _automatic_mesh(values) as (mesh, *_):
            lines = engine.explained(engine.plan, mesh)
            return "\n".join(lines) or "no round: the server does all of it"

    def _engine(self, args: Any, kwargs: Any) -> "Engine":
        types, types_by_name = jax.tree.map(_struct, (args, kwargs))
        with _mesh.without_explicit_axes():  # As `make_plan` does.
            jaxpr = self._traced.trace(*types, **types_by_name).jaxpr
            if jaxpr not in self._engines:
                plan = make_plan(self._fn)(*types, **types_by_name)
                self._engines[jaxpr] = Engine(plan, *self._options)
            return self._engines[jaxpr]


def _no_bar(stage: MapReduce) -> Callable[[int], None]:
    return lambda count: None


class Engine:
    """Runs a plan chunk by chunk, and keeps what is compiled for it."""

    def __init__(self, plan: Plan, chunk_size: int | None = None, rewrite: bool = True):
        self.plan, self.chunk_size, self.rewrite = (
            plan.recomputed(),
            chunk_size,
            rewrite,
        )
        self._rounds: dict[Any, Round] = {}
        self._servers: dict[Server, Any] = {}

    def run(
        self, values: Sequence[Any], mesh: Mesh | None = None, bar: Any = _no_bar
    ) -> list[Any]:
        """Returns the results, leaf by leaf, for arguments leaf by leaf."""
        _check_readable(self.plan, values)
        run_round = functools.partial(self._run_round, mesh, bar)
        outs = interpret(self.plan, values, self._run_server, run_round)
        return [as_array(_whole(x)) for x in outs]

    def _run_server(self, plan: Plan, stage: Server, env: dict[int, Any]) -> None:
        if stage not in self._servers:
            self._servers[stage] = jax.jit(as_fun(stage.jaxpr))
        outs = self._servers[stage](*(_whole(env[i]) for i in stage.inputs))
        env.update(zip(stage.outputs, outs, strict=True))

    def _run_round(
        self,
        mesh: Mesh | None,
        bar: Any,
        plan: Plan,
        stage: MapReduce,
        env: dict[int, Any],
    ) -> None:
        fed: list[Fed] = []
        placed: list[Any] = []
        rows: dict[int, list[tuple[int, _Row]]] = {}
        for k, i in enumerate(stage.placed_inputs):
            x = env[i]
            if isinstance(x, _Row):
                rows.setdefault(id(x.source), []).append((k, x))
            elif is_host_array(x):
                fed.append(Fed(reader_of_array(x, plan.at[i].axis), (k,)))
            placed.append(None if isinstance(x, _Row) or is_host_array(x) else x)
        round_ = self.round(plan, stage, mesh)
        _check_order(round_, rows)
        fed += [_fed(group) for group in rows.values()]
        server = [_whole(env[i]) for i in stage.server_inputs]
        outs = round_.run(server, placed, fed, bar(stage))
        numbers = [*(i for _, i in stage.reductions), *stage.placed_outputs]
        env.update(zip(numbers, outs, strict=True))

    def round(self, plan: Plan, stage: MapReduce, mesh: Mesh | None) -> Round:
        is_spread = mesh is not None and mesh.shape.get(stage.placement, 1) > 1
        over = mesh if is_spread else None
        if (stage, over) not in self._rounds:
            platform, cores = jax.default_backend(), _chunks.cores()
            if mesh is not None:
                platform = mesh.devices.flat[0].platform
                cores = cores if mesh.size == 1 else 1
            n = stage.n if over is None else stage.n // over.shape[stage.placement]
            chunks = _chunks.choose(stage, n, self.chunk_size, platform, cores)
            is_replaced = self.rewrite and platform == "cpu"
            body = faster(stage.body) if is_replaced else stage.body
            self._rounds[stage, over] = Round(plan, stage, chunks, over, body)
        return self._rounds[stage, over]

    def explained(self, plan: Plan, mesh: Mesh | None) -> Iterator[str]:
        for stage in plan.stages:
            if isinstance(stage, MapReduce):
                round_ = self.round(plan, stage, mesh)
                chunks, count = round_.chunks, math.ceil(round_.n / round_.chunks.size)
                on = f" on each of {round_.devices} devices" * (round_.devices > 1)
                at_a_time = f", {chunks.lanes} at a time" * (chunks.lanes > 1)
                yield (
                    f"round over {stage.placement!r}, {stage.n} elements: {count} "
                    f"chunk{'s' * (count > 1)} of {chunks.size}{on}{at_a_time} "
                    f"({chunks.why}); {amount(chunks.bytes, 'B')} at most"
                )
            for inner in plans_in(stage):
                yield from ("  " + line for line in self.explained(inner, mesh))


#
# Arguments.
#
def _values(fn: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments leaf by leaf: arrays of JAX, those of the host to read, rows."""
    _check_outermost(fn, (args, kwargs))
    values: list[Any] = []
    for leaf in jax.tree.leaves((args, kwargs)):
        if isinstance(leaf, Elements):
            count = len(jax.tree.leaves(leaf.element))
            values += [_Row(leaf, k) for k in range(count)]
        else:
            values.append(leaf if _is_read(leaf) else as_array(leaf))
    return values


# An array of the host with more bytes than that is read piece by piece.
_SMALL = 2**24


def _is_read(x: Any) -> bool:
    if not is_host_array(x):
        return False
    in_memory = type(x).__module__ == "numpy" and not isinstance(x, np.memmap)
    return not in_memory or x.nbytes > _SMALL


def _struct(leaf: Any) -> Any:
    """What stands for an argument when the function is traced."""
    if isinstance(leaf, Elements):
        return leaf.structs()
    if is_host_array(leaf):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return without_sharding(leaf)


def _check_outermost(fn: Any, args: Any) -> None:
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
    if is_traced or not is_eager():
        name = getattr(fn, "__name__", "fn")
        raise TypeError(
            f"drjax.streaming({name}) was called inside a function that JAX "
            "transforms, by jax.jit, jax.grad or another. It runs on the host, chunk "
            "by chunk, and can only be outermost. Transform first: "
            f"drjax.streaming(jax.grad({name})), not jax.grad(drjax.streaming({name}))."
            " It compiles by itself."
        )


def _whole(x: Any) -> Any:
    """A value that is needed at once."""
    if isinstance(x, _Row):
        return jnp.asarray(x.source.reader()(0, x.source.n)[x.leaf])
    return jnp.asarray(x) if is_host_array(x) else x


def _fed(group: list[tuple[int, _Row]]) -> Fed:
    """What a source gives of the leaves that a round reads."""
    read = group[0][1].source.reader()
    leaves = [row.leaf for _, row in group]

    def read_leaves(low: int, high: int) -> list[Any]:
        rows = read(low, high)
        return [rows[leaf] for leaf in leaves]

    return Fed(read_leaves, tuple(k for k, _ in group))


def _check_readable(plan: Plan, values: Sequence[Any]) -> None:
    """Refuses to read an iterator twice, before anything is read."""
    given = zip(plan.inputs, values, strict=True)
    rows = {i: x.source for i, x in given if isinstance(x, _Row)}
    readers: dict[int, list[Any]] = {}
    for stage in plan.stages:
        read = {rows[i] for i in reads_of(stage) if i in rows}
        for source in read:
            times = 2 if plans_in(stage) else 1
            readers.setdefault(id(source), []).extend([source] * times)
    for sources in readers.values():
        if len(sources) > 1 and sources[0].is_one_shot:
            raise ValueError(
                "drjax.streaming: an iterator was given as Elements, but the plan "
                "reads the elements more than once, as that of a gradient or of a loop "
                "may. Give a sequence, or an iterable that starts again with iter()."
            )


def _check_order(round_: Round, rows: dict[int, list[tuple[int, _Row]]]) -> None:
    sources = [group[0][1].source for group in rows.values()]
    if round_.devices > 1 and not all(source.is_indexable for source in sources):
        raise ValueError(
            "drjax.streaming: on a mesh each device reads elements of its own, but an "
            "iterable gives them in order only. Give a sequence."
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
        yield lambda stage: lambda count: None
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
