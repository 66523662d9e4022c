"""Runs an algorithm for many rounds: who takes part, and what is written down."""

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from federated._algorithm import Algorithm
from federated._faults import Faults, at_least, check
from federated._metrics import to_columns
from federated._progress import progress_bar
from federated._records import Records
from federated._sampling import Sampler, uniform
from federated._simulation import (
    RESERVED,
    Row,
    Simulation,
    check_arguments,
    check_enough,
    check_names,
    check_positive,
    checked_seeds,
    evaluated,
    key_of,
    sampled,
    strong,
)

Callback = Callable[[Sequence[Row], Any], bool | None]


class Result(NamedTuple):
    """What a run ends with.

    Args:
      state: the algorithm's state.
      params: the model in it.
      metrics: arrays by name, each `[rounds + 1]`: before the first round, and after
        each. NaN where there is none.
      compiled: how many programs were compiled for the clients' work.
    """

    state: Any
    params: Any
    metrics: dict[str, np.ndarray]
    compiled: int


def run(
    algorithm: Algorithm,
    params: Any,
    data: Any,
    *,
    rounds: int,
    cohort_size: int,
    seed: int,
    sampler: Sampler = uniform,
    faults: Faults | None = None,
    min_fraction: float = 1.0,
    engine: str | Callable[[Callable[..., Any]], Callable[..., Any]] = "streaming",
    evaluate: Callable[[Any], Mapping[str, Any]]
    | Mapping[str, Callable[[Any], Mapping[str, Any]]]
    | None = None,
    eval_every: int = 10,
    callbacks: Sequence[Callback] = (),
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """Runs an algorithm for many rounds.

    A round samples clients, loses some if there are faults, and calls
    `algorithm.round` with the others and the key `fold_in(key(seed), round)`, a
    threefry key. All that is drawn is a function of the seed and the round. If what is
    reduced is not finite, the clients whose contributions are not are refused, and the
    round is done again without them.

    The metrics of a round are those of the algorithm and of `evaluate`, and:

    - `cohort`, `reported`, `dropped`, `late`, `rejected`: how many clients were asked,
      are in the round, were lost, came too late or were not needed, and were refused;
    - `completed`: 0 for a round that too few have reported to, which changes nothing;
    - `bytes_down`, `bytes_up`: what all those asked were sent, and what all those in
      the round have sent, as the plan has it;
    - `padding`: the part of the examples in batches that is padding.

    In `folder` it leaves `metrics.csv`, `tensorboard/` and `curves.png`, and for itself
    `checkpoints/` and `clients.sqlite`, what clients keep. A run with the same folder
    goes on from the last checkpoint, and ends with the same state and the same bytes in
    these files as one that was not interrupted, on the same machine and versions.
    (One that is made longer keeps the evaluation after what was its last round.) A
    folder is of one run at a time.

    Args:
      algorithm: an `Algorithm`.
      params: the model to begin with, a tree of arrays.
      data: a `ClientData`.
      rounds: how many, those of an earlier run in `folder` among them.
      cohort_size: how many clients a round needs.
      seed: of all that is random.
      sampler: `(seed, round, data, size) -> int [size]`: `uniform`, `weighted`,
        `shuffled` or another.
      faults: what goes wrong; None for nothing.
      min_fraction: of `cohort_size`; a round in which fewer report changes nothing.
      engine: "streaming" maps clients a few at a time, in little memory. Or what makes
        a round run on a whole batch, such as `jax.jit`; it compiles again for each
        number of clients, and does not look for what is not finite.
      evaluate: `params -> metrics`, see `evaluate`; or several of them by name, as
        `{"test": fn}`, whose metrics are then named `test/accuracy`. It is called
        before the first round, after each `eval_every` and after round `rounds`.
      eval_every: rounds.
      callbacks: functions of the rounds' metrics so far and of the state, called after
        each round. One that returns true ends the run. It is to be a function of its
        arguments, see `early_stopping`.
      folder: where to write to, and to go on from; None for nowhere.
      checkpoint_every: rounds.
      resume: false to refuse a folder that has checkpoints.
      progress: whether to show a bar.

    Returns:
      A `Result`.

    Raises:
      ValueError: if an argument is out of range, the folder holds another run, or a
        round does not keep the types of the state.
      FileExistsError: if the folder has checkpoints, and `resume` is false.
      RuntimeError: if another run writes to the folder.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> def loss(model, x):
      ...     return (x - model) ** 2 / 2
      >>> fedavg = federated.fedavg(loss, optax.sgd(0.5), batch_size=2)
      >>> result = federated.run(
      ...     fedavg,
      ...     jnp.zeros(()),
      ...     data,
      ...     rounds=8,
      ...     cohort_size=2,
      ...     seed=0,
      ...     progress=False,
      ... )
      >>> print(f"{result.params:.2f}")
      2.99
    """
    call = "federated.run"
    check_arguments(call, algorithm, data, rounds, cohort_size)
    _check(min_fraction, engine)
    check_positive(call, eval_every=eval_every, checkpoint_every=checkpoint_every)
    (seed,) = checked_seeds(call, [seed])
    check(faults := faults or Faults(), cohort_size, min_fraction)
    asked, needed = faults.asked(cohort_size), at_least(min_fraction * cohort_size)
    check_enough(call, asked, data)
    evaluators = evaluate if isinstance(evaluate, Mapping) else {"": evaluate}
    state = jax.tree.map(strong, algorithm.init(params))
    first = None
    if algorithm.client_init is not None:
        first = jax.tree.map(strong, algorithm.client_init(params))
    simulation = Simulation(algorithm, data, engine, first)
    settings = dict(
        round=simulation.check(state, asked, may_lose=faults != Faults()),
        engine=_name(engine),
        data=simulation.digest,
        seed=seed,
        cohort_size=operator.index(cohort_size),
        faults=[str(float(x)) for x in faults],
        min_fraction=float(min_fraction),
        sampler=_name(sampler),
        eval_every=operator.index(eval_every),
    )
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(
            contextlib.closing(Records(folder, settings, state, first, resume))
        )
        state, rows = records.state, records.rows
        if len(rows) > rounds + 1:
            raise ValueError(
                f"federated.run: {folder} has a run of {len(rows) - 1} rounds, but "
                f"rounds={rounds}. Name another folder."
            )
        simulation.states = records.clients
        show = stack.enter_context(progress_bar("Rounds", rounds, progress))
        if not rows:
            found = evaluated(evaluators, algorithm.params(state))
            check_names(call, found, RESERVED)
            rows.append({"round": 0, **found})
            records.save(state)
        show(rows[0])
        show(rows[-1])
        stopped = len(rows) > 1 and _called(callbacks, rows, state)
        for number in range(len(rows), rounds + 1):
            if stopped:
                break
            clients = sampled(sampler, seed, number, data, asked)
            reports = faults.reports(seed, number, asked, cohort_size)
            state, found, counts = simulation.round(
                state, clients, reports, key_of(seed, number), needed, number
            )
            check_names(call, found, RESERVED | rows[0].keys())
            row = {"round": number, **found, **counts}
            if number % eval_every == 0 or number == rounds:
                row.update(evaluated(evaluators, algorithm.params(state)))
            rows.append(row)
            show(row)
            stopped = _called(callbacks, rows, state)
            if number % checkpoint_every == 0 or number == rounds or stopped:
                records.save(state)
        records.plot()
    compiled = simulation.compiled
    return Result(state, algorithm.params(state), to_columns(rows), compiled)


def _called(callbacks: Sequence[Callback], rows: Sequence[Row], state: Any) -> bool:
    """Calls all of them; whether one ends the run."""
    return True in [bool(callback(rows, state)) for callback in callbacks]


def _name(what: Any) -> str:
    """A name that is the same in another process."""
    if isinstance(what, functools.partial):
        return f"{_name(what.func)}, {what.args}, {what.keywords}"
    if isinstance(what, str):
        return what
    return getattr(what, "__qualname__", type(what).__qualname__)


def _check(min_fraction: float, engine: Any) -> None:
    if not 0 <= min_fraction <= 1:
        raise ValueError(
            f"federated.run: min_fraction is between 0 and 1, but got {min_fraction}."
        )
    if engine != "streaming" and not callable(engine):
        raise ValueError(
            "federated.run: engine is 'streaming', or a function such as jax.jit, but "
            f"got {engine!r}."
        )
