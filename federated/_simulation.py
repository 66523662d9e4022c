"""One round: what the sampled clients of some data do in an algorithm."""

import logging
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drjax import PlanError, make_plan
from federated._algorithm import Algorithm
from federated._batch import lengths
from federated._checkpoint import digest
from federated._client_states import ClientStates
from federated._cohort import Cohort, States
from federated._engine import (
    PLACEMENT,
    Compiled,
    Engine,
    check_losses,
    structs_of,
)
from federated._sampling import Sampler

Row = dict[str, Any]
_log = logging.getLogger("federated")

# Batches are padded to at most so many lengths, for each of which clients' work is
# compiled.
LENGTHS = 4

# What a run adds to the metrics of a round.
RESERVED = {
    *("round", "cohort", "reported", "dropped", "late", "rejected", "completed"),
    *("bytes_down", "bytes_up", "padding"),
}


class Simulation:
    """The rounds of an algorithm over the clients of some data."""

    def __init__(
        self,
        algorithm: Algorithm,
        data: Any,
        engine: str | Callable[..., Any],
        first: Any,
    ):
        self._data, self._first = data, first
        self.states: ClientStates | None = None
        self._lengths = lengths(data.num_examples, LENGTHS)
        self._element = jax.tree.map(np.array, data[0])
        self._round = fn = algorithm.round
        self._is_whole = callable(engine)
        self._engine: Any = (
            Compiled(fn, engine) if callable(engine) else Engine(make_plan(fn))
        )
        self._communication: tuple[Any, Any] | None = None

    @property
    def compiled(self) -> int:
        return self._engine.compiled

    @property
    def digest(self) -> str:
        """Of how many examples clients have, and of those of the first."""
        return digest([np.asarray(self._data.num_examples, np.int64), self._element])

    def check(self, state: Any, asked: int, may_lose: bool) -> str:
        """Plans a round of so many clients; returns the plan's hash.

        Raises:
          ValueError: if the round cannot be run as is wanted.
        """
        clients = np.arange(asked)
        args = self._arguments(state, clients, key_of(0, 0))
        length = int(self._lengths[-1])
        try:
            plan = self._engine.plan(args, length)
        except PlanError:
            if not self._is_whole:
                raise
            new, *_ = jax.eval_shape(self._round, *structs_of(args, length))
            check_types("federated.run", state, new)
            return "no plan"
        sizes = {n for name, n in plan.placements if name == PLACEMENT}
        if sizes != {asked}:
            raise ValueError(
                f"federated.run: algorithm.round is to be a program over {PLACEMENT!r} "
                f"of the number that the batch has, {asked}, but its placements are "
                f"{plan.placements}. Decorate what it calls with "
                f"drjax.program({PLACEMENT}=len(batch.count))."
            )
        if may_lose and not self._is_whole:
            check_losses(plan)
        types = [plan.avals[i] for i in plan.outputs]
        new, *_ = jax.tree.unflatten(plan.out_tree, types)
        check_types("federated.run", state, new)
        self._communication = plan.communication(PLACEMENT)
        return plan.hash

    def _arguments(self, state: Any, clients: np.ndarray, key: Any) -> list[Any]:
        cohort = Cohort(self._data, clients, self._lengths, self._element)
        if self._first is None:
            return [state, cohort, key]
        types = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._first
        )

        def read(positions):
            assert self.states is not None
            return self.states.read(clients[positions])

        return [state, States(types, len(clients), read), cohort, key]

    def round(
        self,
        state: Any,
        clients: np.ndarray,
        reports: Any,
        key: Any,
        needed: int,
        number: int,
    ) -> tuple[Any, Row, Row]:
        """The state after a round, the algorithm's metrics, and what happened."""
        args = self._arguments(state, clients, key)
        cohort = args[-2]
        taken, rejected = reports.taken, reports.rejected
        outcome = None
        if len(taken) and len(taken) >= needed:
            outcome = self._engine.run(args, taken, cohort.lengths_of)
            taken = outcome.reported
            rejected += len(outcome.rejected)
        completed = outcome is not None and len(taken) >= max(1, needed)
        row: Row = {
            "cohort": len(clients),
            "reported": len(taken),
            "dropped": reports.dropped,
            "late": reports.late,
            "rejected": rejected,
            "completed": int(completed),
        }
        if self._communication is not None:
            down, up = self._communication
            row.update(bytes_down=down * len(clients), bytes_up=up * len(taken))
        if outcome is None or not completed:
            _log.warning(
                "federated.run: round %d changes nothing, for %d of %d clients have "
                "reported, and %d are needed.",
                number,
                len(taken),
                len(clients),
                needed,
            )
            return state, {}, row
        row["padding"] = 1 - int(cohort.counts[taken].sum()) / outcome.padded
        state, *new, metrics = outcome.result
        if self.states is not None:
            of_taken = jax.tree.map(lambda x: np.asarray(x)[outcome.rows], new[0])
            self.states.write(number, clients[taken], of_taken)
        if not isinstance(metrics, Mapping) or not all(
            isinstance(x, str) for x in metrics
        ):
            raise TypeError(
                "federated.run: the metrics of a round are a dict of numbers by name, "
                f"but got {metrics!r}."
            )
        found = {name: _number(name, x) for name, x in metrics.items()}
        return jax.tree.map(strong, state), found, row


def sampled(
    sampler: Sampler, seed: int, number: int, data: Any, size: int
) -> np.ndarray:
    clients = np.asarray(sampler(seed, number, data, size))
    is_right = clients.shape == (size,) and clients.dtype.kind in "iu"
    is_right = is_right and len({*clients.tolist()}) == size
    if not is_right or clients.min() < 0 or clients.max() >= len(data):
        raise ValueError(
            f"federated.run: the sampler is to give {size} distinct clients out of "
            f"{len(data)}, by index, but for round {number} it gave {clients}."
        )
    return clients


def evaluated(evaluators: Mapping[str, Any], params: Any) -> Row:
    found: Row = {}
    for prefix, fn in evaluators.items():
        metrics = fn(params) if fn is not None else {}
        for name, x in metrics.items():
            found[f"{prefix}/{name}" if prefix else name] = _number(name, x)
    return found


def key_of(seed: int, round: int) -> Any:
    """The key of a round.

    Of one kind, whatever is configured: with keys of the kind `rbg`, what clients draw
    depends on the engine, on the cohort and on padding.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), round)


def strong(x: Any) -> Any:
    """An array whose type does not give way, so that it is the same when restored."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if x.aval.weak_type else x


def _number(name: str, x: Any) -> float | int:
    x = np.asarray(x)
    is_number = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == np.bool_
    if x.shape or not is_number or jnp.iscomplexobj(x):
        raise ValueError(
            f"federated.run: a metric is a number, but {name!r} is {x.dtype}{x.shape}."
        )
    return int(x) if x.dtype.kind in "biu" else float(x)


#
# Checks.
#
def check_arguments(
    call: str, algorithm: Any, data: Any, rounds: int, cohort_size: int
) -> None:
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"{call}: the algorithm is an Algorithm, as federated.fedavg makes one, "
            f"but got {type(algorithm).__name__}."
        )
    for name in ("ids", "num_examples", "__len__", "__getitem__"):
        if not hasattr(data, name):
            raise TypeError(
                f"{call}: data is a ClientData, as federated.from_arrays makes one, "
                f"but got {type(data).__name__}, which has no {name!r}."
            )
    if operator.index(rounds) < 0 or operator.index(cohort_size) < 1:
        raise ValueError(
            f"{call}: rounds is 0 at least and cohort_size 1 at least, but got "
            f"rounds={rounds} and cohort_size={cohort_size}."
        )


def check_enough(call: str, asked: int, data: Any) -> None:
    if asked > len(data):
        raise ValueError(
            f"{call}: {asked} clients are to be asked in a round, but there are "
            f"{len(data)}."
        )


def check_types(call: str, old: Any, new: Any, what: str = "state") -> None:
    """Refuses a state that a round gives other types: it could not be restored."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            f"{call}: the {what} that a round gives is {jax.tree.structure(new)}, but "
            f"it got {jax.tree.structure(old)}: it is to keep its structure."
        )
    leaves = jax.tree.leaves_with_path(old)
    for (path, x), y in zip(leaves, jax.tree.leaves(new), strict=True):
        types = [(a.dtype, a.shape) for a in (jnp.asarray(x), y)]
        if types[0] != types[1]:
            (was, of), (dtype, shape) = types
            raise ValueError(
                f"{call}: {jax.tree_util.keystr(path) or 'it'} of the {what} that a "
                f"round gives is {dtype}{shape}, but it got {was}{of}: it is to keep "
                "its type. Usually it starts as a number of Python, or is computed "
                "with one of a wider dtype: convert it."
            )


def check_names(call: str, found: Collection[str], taken: Collection[str]) -> None:
    if twice := sorted({*found} & {*taken}):
        raise ValueError(
            f"{call}: {twice[0]!r} is the name of two metrics. Of `evaluate`, give one "
            "a name: evaluate={'test': fn} makes it 'test/...'."
        )


def check_positive(call: str, **values: int) -> None:
    for name, value in values.items():
        if operator.index(value) < 1:
            raise ValueError(f"{call}: {name} is 1 at least, but got {value}.")


def checked_seeds(call: str, seeds: Sequence[int]) -> list[int]:
    for seed in seeds:
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(
                f"{call}: a seed is between 0 and 2**32 - 1, for others would give "
                f"the keys of these, but got {seed}."
            )
    return [operator.index(seed) for seed in seeds]
