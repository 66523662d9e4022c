"""What clients do in a round of a plan: compiled for chunks, and fed with any clients.

Clients are read by blocks of some megabytes, and mapped by chunks of these. Chunk k
goes to lane k modulo their number, a thread with totals of its own; in the end these
are put together in order. The same clients in the same order give the same bits.
"""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from drjax import _accumulators as accumulators
from drjax import _chunks
from drjax._export import of_chunk
from drjax._faster import faster
from drjax._jaxprs import as_fun
from drjax._numpy import as_sent, from_numpy, to_numpy
from drjax._rounds import _in_threads as in_threads
from drjax._sources import ahead
from drjax.plan import MapReduce, Plan
from federated._cohort import Row

# Bytes of the clients' own values that are read at a time.
_BLOCK = 2**22


class ClientWork:
    """A round's body, compiled for chunks of clients."""

    def __init__(self, plan: Plan, stage: MapReduce):
        self.stage = stage
        platform = jax.default_backend()
        self.chunks = _chunks.choose(stage, stage.n, None, platform, _chunks.cores())
        self.axes = [plan.at[i].axis for i in stage.placed_inputs]
        self.operations = [operation for operation, _ in stage.reductions]
        self.reduced = stage.body.out_avals[: len(self.operations)]
        self.placed = stage.body.out_avals[len(self.operations) :]
        own = stage.body.in_avals[1 + len(stage.server_inputs) :]
        size = self.chunks.size
        bytes_of_chunk = size * sum(x.size * x.dtype.itemsize for x in own)
        chunks = min(-(-stage.n // size), max(1, _BLOCK // max(1, bytes_of_chunk)))
        self.block = chunks * size
        # On the device already, for numbers of numpy take longer to be passed.
        self.full = jax.device_put(np.int32(size))
        self.lows = [jax.device_put(np.int32(k * size)) for k in range(chunks)]
        self._body = faster(stage.body) if platform == "cpu" else stage.body
        self._steps: dict[Any, Any] = {}
        self._fold: Any = None
        self.which_are_finite = jax.jit(self._which_are_finite)
        self._finish = jax.jit(self._finished)
        self._start = jax.jit(
            lambda: [*map(accumulators.start, self.operations, self.reduced)]
        )

    @property
    def compiled(self) -> int:
        return len(self._steps)

    def start(self) -> list[Any]:
        """The totals of no client."""
        return self._start()

    def step(self, is_full: bool, args: Any) -> Any:
        """`(totals, low, count, server, block) -> (totals, placed, token)`, compiled.

        It is compiled in the thread that has JAX's settings.
        """
        _, _, _, server, _ = args
        key = is_full, *(x.sharding for x in server)
        if key not in self._steps:
            fn = self._full if is_full else self._partial
            jitted = jax.jit(fn, donate_argnums=0)
            self._steps[key] = jitted.lower(*args).compile()
        return self._steps[key]

    def fold(self, totals: Any) -> Any:
        """The compiled function that folds totals."""
        if self._fold is None:
            fold = jax.jit(
                lambda totals: [*map(accumulators.fold, totals)], donate_argnums=0
            )
            self._fold = fold.lower(totals).compile()
        return self._fold

    def finish(self, lanes: Sequence[Any]) -> list[Any]:
        """What is reduced, of the totals of all lanes."""
        return self._finish([*lanes])

    def _full(self, totals, low, count, server, block):
        index, *rows = self._chunk(block, low)
        if self.chunks.size > 1:
            outs = of_chunk(self.stage, whole=True)(index, *server, *rows)
        else:
            own = [x[0] for x in (index, *rows)]
            outs = as_fun(self._body)(own[0], *server, *own[1:])
            outs = [*map(jnp.asarray, outs)]  # A constant is a number of Python.
            outs[len(totals) :] = [x[None] for x in outs[len(totals) :]]
        return self._added(totals, outs, low)

    def _partial(self, totals, low, count, server, block):
        index, *rows = self._chunk(block, low)
        outs = of_chunk(self.stage, wide_sums=True)(count, index, *server, *rows)
        return self._added(totals, outs, low)

    def _chunk(self, block, low):
        size = self.chunks.size
        return [lax.dynamic_slice_in_dim(x, low, size) for x in block]

    def _which_are_finite(self, low, server, block):
        """Of each client in a chunk, whether all that it sends is finite."""

        def is_finite(own):
            outs = as_fun(self._body)(own[0], *server, *own[1:])
            return are_finite(self.operations, outs[: len(self.operations)])

        rows = self._chunk(block, low)
        if self.chunks.size == 1:
            return is_finite([x[0] for x in rows])[None]
        return lax.map(is_finite, rows)

    def _added(self, totals, outs, low):
        parts = outs[: len(totals)]
        added = zip(self.operations, totals, parts, strict=True)
        totals = [accumulators.add(*one) for one in added]
        return totals, outs[len(totals) :], low + 1

    def _finished(self, lanes):
        results = []
        by_lane = zip(*lanes, strict=True)
        for operation, aval, totals in zip(
            self.operations, self.reduced, by_lane, strict=True
        ):
            total, *others = map(accumulators.fold, totals)
            for other in others:
                total = accumulators.merge(operation, total, other)
            results.append(accumulators.finish(total).astype(aval.dtype))
        return results


def are_finite(operations: Sequence[str], values: Sequence[Any]) -> Any:
    """Whether all that is reduced by these operations is finite.

    Minus infinity is nothing to a maximum, and infinity nothing to a minimum.
    """
    found = []
    for operation, x in zip(operations, map(jnp.asarray, values), strict=True):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            if operation == "max":
                is_good = x < jnp.inf
            elif operation == "min":
                is_good = x > -jnp.inf
            else:
                is_good = jnp.isfinite(x)
            found.append(is_good.all())
    return jnp.array(found).all()


class Clients(NamedTuple):
    """Clients that take part in a round.

    Args:
      positions: int `[m]`, theirs among all.
      length: of their batches.
      work: what they do.
    """

    positions: np.ndarray
    length: int
    work: ClientWork


class Block(NamedTuple):
    """Clients that are read together, by position; what they do; their values."""

    positions: np.ndarray
    length: int
    work: ClientWork
    values: Any = None  # Their positions, and the placed inputs, `[block, ...]`.


class Call:
    """A round of some clients.

    Args:
      groups: the clients; the work of each group reduces to the same types.
      plan, stage: what is run; the stage of the first group.
      env: the values of the plan. Placed ones are arrays, or rows that are read.
    """

    def __init__(
        self,
        groups: Sequence[Clients],
        plan: Plan,
        stage: MapReduce,
        env: dict[int, Any],
    ):
        self.groups, self.stage, self.work = groups, stage, groups[0].work
        self.x64 = bool(jax.config.read("jax_enable_x64"))
        self.server = [jnp.asarray(env[i]) for i in stage.server_inputs]
        self.placed = [env[i] for i in stage.placed_inputs]
        self.outputs = [
            (plan.at[i].axis, aval)
            for i, aval in zip(stage.placed_outputs, self.work.placed, strict=True)
        ]

    def run(self) -> tuple[list[Any], list[Any]]:
        """Returns what is reduced, and placed outputs, with zeros for other clients."""
        lanes = max(group.work.chunks.lanes for group in self.groups)
        totals: list[Any] = [self.work.start() for _ in range(lanes)]
        tokens: list[Any] = [None] * lanes
        counts = [0] * lanes
        fold = self.work.fold(totals[0])
        outputs = [
            np.zeros((self.stage.n, *sent.shape), sent.dtype)
            for sent in (as_sent(aval) for _, aval in self.outputs)
        ]

        def advance(lane, step, args, positions):
            """Runs a chunk once the one before has begun to be summed."""
            totals[lane], placed, token = step(totals[lane], *args)
            counts[lane] += 1
            if counts[lane] % accumulators.FOLD == 0:
                totals[lane] = fold(totals[lane])
            tokens[lane], before = token, tokens[lane]
            jax.block_until_ready(before)
            for output, x in zip(outputs, placed, strict=True):
                output[positions] = to_numpy(x)[: len(positions)]

        with contextlib.ExitStack() as stack:
            submit = in_threads(lanes, stack)
            pending: collections.deque[Future[None]] = collections.deque()
            chunks = stack.enter_context(self._chunks())
            for k, (work, args, positions) in enumerate(chunks):
                is_full = len(positions) == work.chunks.size
                step = work.step(is_full, (totals[0], *args))
                lane = k % lanes
                pending.append(submit(lane, advance, lane, step, args, positions))
                if len(pending) > 2 * lanes:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        placed = [
            jnp.moveaxis(jnp.asarray(from_numpy(x, aval)), 0, axis)
            for x, (axis, aval) in zip(outputs, self.outputs, strict=True)
        ]
        return self.work.finish(totals), placed

    def not_finite(self) -> np.ndarray:
        """The positions of the clients that send what is not finite."""
        bad = [np.zeros(0, np.int32)]
        with self._chunks() as chunks:
            for work, (low, _, server, block), positions in chunks:
                is_finite = work.which_are_finite(low, server, block)
                bad.append(positions[~np.asarray(is_finite)[: len(positions)]])
        return np.concatenate(bad)

    #
    # Feeding.
    #
    @contextlib.contextmanager
    def _chunks(self) -> Any:
        """Gives each chunk's work, arguments and positions, read ahead by a thread."""
        with contextlib.closing(ahead(self._read, self._blocks(), depth=1)) as blocks:
            yield (chunk for block in blocks for chunk in self._of_block(block))

    def _blocks(self) -> Iterator[Block]:
        for positions, length, work in self.groups:
            for low in range(0, len(positions), work.block):
                yield Block(positions[low : low + work.block], length, work)

    def _read(self, block: Block) -> Block:
        """The block with its values, where clients are missing with those of one."""
        with jax.enable_x64(self.x64):  # It is a thread's.
            return block._replace(values=jax.device_put(self._values(block)))

    def _values(self, block: Block) -> list[Any]:
        positions, length, work, _ = block
        sources = {id(x.source): x.source for x in self.placed if isinstance(x, Row)}
        read = {
            key: jax.tree.leaves(source.read(positions, length))
            for key, source in sources.items()
        }
        missing = work.block - len(positions)
        index = np.concatenate([positions, positions[:1].repeat(missing)])
        values: list[Any] = [index.astype(np.int32)]
        for x, axis in zip(self.placed, work.axes, strict=True):
            if isinstance(x, Row):
                values.append(_extended(read[id(x.source)][x.leaf], missing))
            else:
                values.append(jnp.moveaxis(x.take(index, axis), axis, 0))
        return values

    def _of_block(self, block: Block) -> Iterator[Any]:
        positions, _, work, values = block
        size = work.chunks.size
        for k, low in enumerate(range(0, len(positions), size)):
            of_chunk = positions[low : low + size]
            count = work.full
            if len(of_chunk) < size:
                count = jax.device_put(np.int32(len(of_chunk)))
            args = work.lows[k], count, self.server, values
            yield work, args, of_chunk


def _extended(x: np.ndarray, missing: int) -> np.ndarray:
    return np.concatenate([x, x[:1].repeat(missing, axis=0)]) if missing else x
