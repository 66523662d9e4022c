"""One round: what the sampled clients of some data do in an algorithm."""

import hashlib
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
from federated._client_states import ClientStates
from federated._cohort import Cohort, States
from federated._engine import PLACEMENT, Compiled, Engine, check_losses
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
        fn = algorithm.round
        self._is_whole = not isinstance(engine, str)
        self._engine: Any = (
            Compiled(fn, engine)
            if not isinstance(engine, str)
            else Engine(make_plan(fn))
        )
        self._communication: tuple[Any, Any] | None = None

    @property
    def compiled(self) -> int:
        return self._engine.compiled

    @property
    def digest(self) -> str:
        """Of how many examples clients have, and of those of the first."""
        digest = hashlib.sha256(np.asarray(self._data.num_examples, np.int64).tobytes())
        for x in jax.tree.leaves(self._element):
            digest.update(f"{x.dtype}{x.shape}".encode() + np.asarray(x).tobytes())
        return digest.hexdigest()

    def check(self, state: Any, asked: int, may_lose: bool) -> str:
        """Plans a round of so many clients; returns the plan's hash.

        Raises:
          ValueError: if the round cannot be run as is wanted.
        """
        clients = np.arange(asked)
        args = self._arguments(state, clients, jax.random.key(0))
        try:
            plan = self._engine.plan(args, int(self._lengths[-1]))
        except PlanError:
            if not self._is_whole:
                raise
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
def check_names(call: str, found: Collection[str], taken: Collection[str]) -> None:
    if twice := sorted({*found} & {*taken}):
        raise ValueError(
            f"{call}: {twice[0]!r} is the name of two metrics. Of `evaluate`, give one "
            "a name: evaluate={'test': fn} makes it 'test/...'."
        )


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if operator.index(value) < 1:
            raise ValueError(f"federated.run: {name} is 1 at least, but got {value}.")


def checked_seeds(call: str, seeds: Sequence[int]) -> list[int]:
    for seed in seeds:
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(
                f"{call}: a seed is between 0 and 2**32 - 1, for others would give "
                f"the keys of these, but got {seed}."
            )
    return [operator.index(seed) for seed in seeds]
