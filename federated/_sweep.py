"""Many runs at once: seeds and hyperparameters as an axis of one compiled round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from federated._algorithm import Algorithm
from federated._batch import batch_of, lengths
from federated._progress import progress_bar
from federated._sampling import Sampler, uniform
from federated._simulation import (
    LENGTHS,
    check_arguments,
    check_enough,
    check_names,
    check_positive,
    check_types,
    checked_seeds,
    evaluated,
    key_of,
    sampled,
    strong,
)


class Sweep(NamedTuple):
    """What many runs end with.

    Args:
      states: the algorithms' states, with a leading axis `[k, ...]`.
      params: the models in them, the same.
      metrics: arrays by name, each `[k, rounds + 1]`: before the first round, and after
        each. NaN where there is none.
    """

    states: Any
    params: Any
    metrics: dict[str, np.ndarray]


def sweep(
    make: Callable[[Any], Algorithm],
    settings: Any,
    params: Any,
    data: Any,
    *,
    rounds: int,
    cohort_size: int,
    seeds: Sequence[int],
    sampler: Sampler = uniform,
    evaluate: Callable[[Any], Mapping[str, Any]]
    | Mapping[str, Callable[[Any], Mapping[str, Any]]]
    | None = None,
    eval_every: int = 10,
    progress: bool = True,
) -> Sweep:
    """Runs an algorithm with `k` settings and seeds at once, as one vmapped round.

    Run `i` is what `run(make(settings[i]), ..., seed=seeds[i], engine=jax.jit)` gives,
    without faults. All `k` cohorts of a round are in memory, and so are the states of
    all clients that keep some: this is for many small runs.

    Args:
      make: from one setting, whose numbers are traced, to an `Algorithm`.
      settings: a tree of arrays `[k, ...]`, such as learning rates; None if only seeds
        differ.
      params, data: as of `run`, the same for all.
      rounds, cohort_size, sampler: as of `run`.
      seeds: of each run, `k` of them.
      evaluate, eval_every, progress: as of `run`.

    Returns:
      A `Sweep`.

    Raises:
      ValueError: if settings and seeds are not equally many, an argument is out of
        range, or a round does not keep the types of states.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [5.0]})
      >>> def loss(model, x):
      ...     return (x - model) ** 2 / 2
      >>> def make(rate):
      ...     return federated.fedsgd(loss, optax.sgd(rate))
      >>> rates = jnp.array([0.1, 1.0])
      >>> result = federated.sweep(
      ...     make,
      ...     rates,
      ...     jnp.zeros(()),
      ...     data,
      ...     rounds=5,
      ...     cohort_size=2,
      ...     seeds=[0, 0],
      ...     progress=False,
      ... )
      >>> print([f"{x:.2f}" for x in result.params])
      ['1.23', '3.00']
    """
    call = "federated.sweep"
    seeds = checked_seeds(call, [*seeds])
    if not seeds:
        raise ValueError(f"{call}: there are no seeds, one for each run.")
    k = len(seeds)
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(settings)}
    if sizes - {(k,)}:
        raise ValueError(
            f"federated.sweep: there are {k} seeds, so settings are arrays [{k}, ...], "
            f"but some have leading axes {sorted(sizes)}. Repeat the seeds, or the "
            "settings."
        )
    one = make(_nth(settings, 0))
    check_arguments(call, one, data, rounds, cohort_size)
    check_positive(call, eval_every=eval_every)
    check_enough(call, cohort_size, data)
    num_examples = np.asarray(data.num_examples)
    evaluators = evaluate if isinstance(evaluate, Mapping) else {"": evaluate}
    fits = lengths(num_examples, LENGTHS)
    is_stateful = one.client_init is not None

    def over_runs(fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn(algorithm, *args)` of each run."""
        return jax.jit(
            jax.vmap(
                lambda setting, *args: fn(make(setting), *args),
                axis_size=k,
            )
        )

    def first(algorithm):
        state = jax.tree.map(strong, algorithm.init(params))
        if not is_stateful:
            return state, None
        kept = jax.tree.map(strong, algorithm.client_init(params))
        return state, jax.tree.map(lambda x: jnp.stack([x] * len(data)), kept)

    def one_round(algorithm, state, kept, batch, key):
        if not is_stateful:
            new, metrics = algorithm.round(state, batch, key)
        else:
            placed = jax.tree.map(lambda x: x[batch.client], kept)
            new, after, metrics = algorithm.round(state, placed, batch, key)
            after = jax.tree.map(strong, after)
            check_types(call, placed, after, "clients' state")
            kept = jax.tree.map(lambda x, y: x.at[batch.client].set(y), kept, after)
        new = jax.tree.map(strong, new)
        check_types(call, state, new)
        return new, kept, metrics

    run_round = over_runs(one_round)
    params_of = over_runs(lambda algorithm, state: algorithm.params(state))
    state, kept = over_runs(first)(settings)
    metrics: dict[str, np.ndarray] = {}

    def note(number: int, found: Mapping[str, Any]) -> None:
        for name, x in found.items():
            column = metrics.setdefault(name, np.full((k, rounds + 1), np.nan))
            column[:, number] = x

    def evaluate_all() -> dict[str, Any]:
        models = params_of(settings, state)
        rows = [evaluated(evaluators, _nth(models, i)) for i in range(k)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    with progress_bar(f"{k} runs", rounds, progress) as show:
        note(0, first_metrics := evaluate_all())
        names = {"round", *first_metrics}
        for number in range(1, rounds + 1):
            cohorts = [sampled(sampler, s, number, data, cohort_size) for s in seeds]
            most = max(int(num_examples[cohort].max()) for cohort in cohorts)
            length = int(fits[np.searchsorted(fits, most)])
            batches = [batch_of(data, cohort, length) for cohort in cohorts]
            batch = jax.tree.map(lambda *x: np.stack(x), *batches)
            keys = [key_of(s, number) for s in seeds]
            state, kept, found = run_round(
                settings, state, kept, batch, jnp.stack(keys)
            )
            check_names(call, found, names)
            note(number, found)
            if number % eval_every == 0 or number == rounds:
                note(number, evaluate_all())
            means: dict[str, float] = {
                name: float(np.mean(column[:, number]))
                for name, column in metrics.items()
            }
            show({"round": number, **{n: x for n, x in means.items() if x == x}})
    return Sweep(state, params_of(settings, state), metrics)


def _nth(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)
