"""One round, chunk by chunk: what the streaming engine compiles, and how it is fed.

Chunk k goes to lane k modulo their number. A lane adds what its chunks reduce to totals
of its own, and writes what they place into a buffer of its own; on a mesh there is one
lane, with totals and a buffer on each device. At the end they are put together in
order, so that the same chunks give the same bits. The last chunk is as small as it
comes: nothing is padded.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from drjax import _accumulators as accumulators
from drjax._chunks import Chunks
from drjax._compat import ClosedJaxpr
from drjax._export import OPERATIONS, of_chunk
from drjax._jaxprs import as_fun
from drjax._sources import Read, ahead
from drjax.plan import MapReduce, Plan


class Fed(NamedTuple):
    """Some placed inputs of a round that are read from the host.

    Args:
      read: gives rows of each of them.
      positions: among the placed inputs.
    """

    read: Read
    positions: tuple[int, ...]


class Task(NamedTuple):
    """A chunk: its first element, its size, and its lane."""

    low: int
    size: int
    lane: int


class State(NamedTuple):
    """Of a lane: where its next chunk begins, and its place in the buffers; results."""

    low: Any
    position: Any
    totals: list[Any]
    buffers: list[Any]


class Round:
    """A round in chunks.

    Args:
      plan, stage: what is run.
      chunks: how.
      mesh: with an axis of the placement's name, over which the elements are spread; or
        None for one device.
      body: that of the stage, or one that computes the same, for chunks of one element.
    """

    def __init__(
        self,
        plan: Plan,
        stage: MapReduce,
        chunks: Chunks,
        mesh: Mesh | None,
        body: ClosedJaxpr,
    ):
        self.stage, self.chunks, self.mesh, self.body = stage, chunks, mesh, body
        self.devices = 1 if mesh is None else mesh.shape[stage.placement]
        self.n = stage.n // self.devices  # On each.
        self.in_axes = [plan.at[i].axis for i in stage.placed_inputs]
        self.out_axes = [plan.at[i].axis for i in stage.placed_outputs]
        self.operations = [operation for operation, _ in stage.reductions]
        self.reduced = stage.body.out_avals[: len(self.operations)]
        self.placed = stage.body.out_avals[len(self.operations) :]
        self._compiled: dict[Any, Any] = {}
        self._start = jax.jit(
            self._first_state, static_argnums=0, out_shardings=self._sharding(0)
        )
        self._finish = jax.jit(self._results)

    def _sharding(self, axis: int) -> NamedSharding | None:
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, P(*[None] * axis, self.stage.placement))

    def _tasks(self) -> Iterator[Task]:
        c, lanes = self.chunks.size, self.chunks.lanes
        for k, low in enumerate(range(0, self.n, c)):
            yield Task(low, min(c, self.n - low), k % lanes)

    def run(
        self,
        server: Sequence[Any],
        placed: Sequence[Any],
        fed: Sequence[Fed],
        done: Callable[[int], None],
    ) -> list[Any]:
        """Returns what is reduced, and the placed outputs.

        Args:
          server: the values that every element gets.
          placed: those of which it gets its part; None for what is `fed`.
          fed: what is read from the host.
          done: is told the number of elements of each finished chunk.
        """
        server = [*map(self._everywhere, server)]
        whole = [
            self._spread(x, axis)
            for x, axis in zip(placed, self.in_axes, strict=True)
            if x is not None
        ]
        hosted = tuple(k for source in fed for k in source.positions)
        states = [self._start(lane) for lane in range(self.chunks.lanes)]
        tokens: list[Any] = [None] * len(states)
        counts = [0] * len(states)

        def advance(step, fold, task, parts):
            """Runs a chunk once the one before has begun to be summed."""
            lane = task.lane
            states[lane], token = step(states[lane], server, whole, parts)
            counts[lane] += 1
            if counts[lane] % accumulators.FOLD == 0:
                states[lane] = states[lane]._replace(totals=fold(states[lane].totals))
            tokens[lane], before = token, tokens[lane]
            jax.block_until_ready(before)
            return task.size * self.devices

        with contextlib.ExitStack() as stack:
            submit = _in_threads(len(states), stack)
            pending: collections.deque[Future[int]] = collections.deque()
            tasks = stack.enter_context(contextlib.closing(self._parts(fed)))
            # What is read from the host waits in memory.
            ready = len(states) * (1 if fed else 2)
            steps, fold, types = {}, None, None
            for task, parts in tasks:
                args = server, whole, parts
                if not steps:  # The first chunk: how are its results sharded?
                    states = [self._settled(task.size, hosted, s, args) for s in states]
                    fold = self._fold(states[0].totals)
                    types = jax.tree.map(_type_of, states[0])  # These will be donated.
                if task.size not in steps:
                    steps[task.size] = self._step(task.size, hosted, types, args)
                step = steps[task.size]
                pending.append(submit(task.lane, advance, step, fold, task, parts))
                if len(pending) > ready:
                    done(pending.popleft().result())
            while pending:
                done(pending.popleft().result())
        return self._finish(states)

    #
    # Feeding.
    #
    def _parts(self, fed: Sequence[Fed]) -> Generator[tuple[Task, list[Any]]]:
        """Each task with what it needs of the host, read ahead by a thread."""
        if not fed:
            yield from ((task, []) for task in self._tasks())
            return

        def read(task):
            rows = []
            for source in fed:
                shards = [
                    source.read(low, low + task.size)
                    for low in range(task.low, self.stage.n, self.n)
                ]
                rows += map(np.concatenate, zip(*shards, strict=True))
            return task, rows

        reading = ahead(read, self._tasks(), depth=self.chunks.lanes)
        with contextlib.closing(reading):
            for task, rows in reading:
                yield task, jax.device_put(rows, self._sharding(0))

    def _everywhere(self, x: Any) -> Any:
        x = jnp.asarray(x)
        if self.mesh is None or x.sharding.device_set == {*self.mesh.devices.flat}:
            return x
        return jax.device_put(x, NamedSharding(self.mesh, P()))

    def _spread(self, x: Any, axis: int) -> Any:
        if self.mesh is None:
            return x
        spec: list[Any] = [None] * x.ndim
        sharding = x.sharding
        if isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh:
            spec[: len(sharding.spec)] = sharding.spec
            if spec[axis] == self.stage.placement:
                return x
        spec = [None if _has(names, self.stage.placement) else names for names in spec]
        spec[axis] = self.stage.placement
        return jax.device_put(x, NamedSharding(self.mesh, P(*spec)))

    #
    # What is compiled.
    #
    def _settled(
        self, size: int, hosted: tuple[int, ...], state: Any, args: Any
    ) -> Any:
        """A lane's first state, sharded as what a chunk adds to it."""
        if all(len(_devices(x)) < 2 for x in jax.tree.leaves(args)):
            return state
        key = "settled", size, hosted, *_shardings(args)
        if key not in self._compiled:
            compiled = self._jitted(size, hosted).lower(state, *args).compile()
            shardings, _ = compiled.output_shardings
            totals = [
                (x[0],) * 3 if isinstance(x, tuple) else x for x in shardings.totals
            ]
            self._compiled[key] = shardings._replace(totals=totals)
        return jax.device_put(state, self._compiled[key])

    def _step(self, size: int, hosted: tuple[int, ...], state: Any, args: Any) -> Any:
        """A chunk's compiled function, made in the thread that has JAX's settings."""
        key = size, hosted, *_shardings((state, args))
        if key not in self._compiled:
            options = {}
            if any(len(_devices(x)) > 1 for x in jax.tree.leaves(args)):
                shardings = jax.tree.map(lambda x: x.sharding, state)
                options = dict(out_shardings=(shardings, None))
            step = self._jitted(size, hosted, **options)
            self._compiled[key] = step.lower(state, *args).compile()
        return self._compiled[key]

    def _fold(self, totals: Any) -> Any:
        key = "fold", *_shardings(totals)
        if key not in self._compiled:
            fold = jax.jit(
                lambda totals: [*map(accumulators.fold, totals)],
                donate_argnums=0,
                out_shardings=jax.tree.map(lambda x: x.sharding, totals),
            )
            self._compiled[key] = fold.lower(totals).compile()
        return self._compiled[key]

    def _jitted(self, size: int, hosted: tuple[int, ...], **options: Any) -> Any:
        step = functools.partial(self._chunk, size, hosted)
        if self.mesh is not None:
            name = self.stage.placement
            placed = [
                P(*[None] * axis, name)
                for k, axis in enumerate(self.in_axes)
                if k not in hosted
            ]
            step = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(P(name), P(), placed, P(name)),
                out_specs=(P(name), P()),
                axis_names={name},
                check_vma=False,
            )
        return jax.jit(step, donate_argnums=0, **options)

    def _first_state(self, lane: int) -> State:
        """Of one lane; on a mesh with a leading axis for the devices."""
        lead = () if self.mesh is None else (self.devices,)
        low = jnp.full(lead, lane * self.chunks.size, "int32")
        position = jnp.zeros(lead, "int32")
        totals = [
            accumulators.start(operation, aval.update(shape=lead + aval.shape))
            for operation, aval in zip(self.operations, self.reduced, strict=True)
        ]
        chunks = -(-self.n // self.chunks.size)
        rows = -(-chunks // self.chunks.lanes) * self.chunks.size
        buffers = [
            jnp.zeros((*lead, rows, *aval.shape), aval.dtype) for aval in self.placed
        ]
        return State(low, position, totals, buffers)

    def _chunk(self, size, hosted, state, server, whole, parts):
        offset = 0
        if self.mesh is not None:
            offset = lax.axis_index(self.stage.placement) * self.n
            state = jax.tree.map(lambda x: x[0], state)
        low, position, totals, buffers = state
        given, held = dict(zip(hosted, parts, strict=True)), iter(whole)
        rows = [
            given[k] if k in given else _rows(next(held), low, size, axis)
            for k, axis in enumerate(self.in_axes)
        ]
        index = offset + low + jnp.arange(size, dtype="int32")
        if size == 1:
            own = [x[0] for x in (index, *rows)]
            outs = as_fun(self.body)(own[0], *server, *own[1:])
            outs = [*map(jnp.asarray, outs)]  # A constant is a number of Python.
            outs[len(totals) :] = [x[None] for x in outs[len(totals) :]]
        else:
            outs = of_chunk(self.stage, whole=True)(index, *server, *rows)
        added = zip(self.operations, totals, outs[: len(totals)], strict=True)
        totals = [accumulators.add(*one) for one in added]
        buffers = [
            lax.dynamic_update_slice_in_dim(buffer, rows, position, 0)
            for buffer, rows in zip(buffers, outs[len(totals) :], strict=True)
        ]
        step = self.chunks.lanes * self.chunks.size
        state = State(low + step, position + self.chunks.size, totals, buffers)
        if self.mesh is not None:
            state = jax.tree.map(lambda x: x[None], state)
        return state, low + size

    def _results(self, states: Any) -> list[Any]:
        results = []
        by_lane = zip(*(state.totals for state in states), strict=True)
        for operation, aval, lanes in zip(
            self.operations, self.reduced, by_lane, strict=True
        ):
            merge = functools.partial(accumulators.merge, operation)
            total = functools.reduce(merge, map(accumulators.fold, lanes))
            x = accumulators.finish(total)
            if self.mesh is not None:
                x = OPERATIONS[operation].reduce(x, axis=0)
            results.append(x.astype(aval.dtype))
        by_lane = zip(*(state.buffers for state in states), strict=True)
        for axis, lanes in zip(self.out_axes, by_lane, strict=True):
            x = jnp.moveaxis(self._in_order(lanes), 0, axis)
            if self.mesh is not None:
                x = lax.with_sharding_constraint(x, self._sharding(axis))
            results.append(x)
        return results

    def _in_order(self, lanes: Sequence[Any]) -> Any:
        """The buffers of all lanes, or of all devices, as one `[n, ...]`."""
        if self.mesh is not None:
            (x,) = lanes
            return x[:, : self.n].reshape(self.stage.n, *x.shape[2:])
        rows, *shape = lanes[0].shape
        size = self.chunks.size
        chunks = [x.reshape(rows // size, size, *shape) for x in lanes]
        joined = jnp.stack(chunks, 1).reshape(len(lanes) * rows, *shape)
        return joined[: self.n]


def _shardings(tree: Any) -> list[Any]:
    return [getattr(x, "sharding", None) for x in jax.tree.leaves(tree)]


def _type_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type, with how it is sharded if it is on several devices."""
    sharding = x.sharding if len(x.sharding.device_set) > 1 else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _devices(x: Any) -> set[Any]:
    return x.sharding.device_set if isinstance(x, jax.Array) else set()


def _has(names: Any, name: str) -> bool:
    return name in (names if isinstance(names, tuple) else (names,))


def _rows(x: Any, low: Any, size: int, axis: int) -> Any:
    return jnp.moveaxis(lax.dynamic_slice_in_dim(x, low, size, axis), axis, 0)


def _in_threads(lanes: int, stack: contextlib.ExitStack) -> Callable[..., Any]:
    """A function `(lane, fn, *args)` that gives a future; one lane needs no thread.

    XLA on CPUs runs what one thread calls one after the other.
    """
    if lanes == 1:

        def run(_, fn, *args):
            future: Future[Any] = Future()
            future.set_result(fn(*args))
            return future

        return run
    pools = [
        ThreadPoolExecutor(1, thread_name_prefix=f"drjax-lane-{i}")
        for i in range(lanes)
    ]
    for pool in pools:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return lambda lane, fn, *args: pools[lane].submit(fn, *args)
