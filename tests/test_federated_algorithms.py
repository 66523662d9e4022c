"""The federated algorithms: as the papers have them, and what follows from that."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import federated_references as references
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, every, gradient, of_floats
from jax.test_util import check_jvp, check_vjp

import drjax
import federated
from drjax.plan import MapReduce


@pytest.fixture(autouse=True)
def in_float64():
    """Then what should be equal is equal to many digits."""
    with jax.enable_x64(True):
        yield


def assert_equal(got, want, rtol=1e-10):
    """Equal, but for how the last digits of float64 are rounded; and numbers."""

    def check(g, w):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=1e-12, equal_nan=False)

    jax.tree.map(check, got, want)


#
# Six unequal clients: logistic regression, of labels 1 and -1.
#
COUNTS = [7, 4, 0, 1, 5, 8]
LENGTH = max(COUNTS) + 3
POPULATION = len(COUNTS)
COHORTS = [[0, 1, 2, 3], [4, 2, 0, 5], [3, 0, 4, 1]]
PARAMS = {"bias": np.float64(0.3), "weights": np.array([0.5, -1.0, 0.2])}


def _client(count, seed):
    """Features and a label in each row; no two clients have the same optimum."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 3)) + rng.normal(size=3)
    label = np.sign(features @ rng.normal(size=3) + rng.logistic(size=count))
    return np.column_stack([features, label])


ROWS = [_client(count, seed) for seed, count in enumerate(COUNTS)]
DATA = federated.from_mapping(
    {f"client {i}": {"x": r[:, :-1], "label": r[:, -1]} for i, r in enumerate(ROWS)}
)


def loss(params, examples):
    margin = examples["x"] @ params["weights"] + params["bias"]
    return jax.nn.softplus(-examples["label"] * margin)


def _losses(x, rows):
    return np.log1p(np.exp(-rows[:, -1] * (rows[:, :-1] @ x[1:] + x[0])))


def _gradient(x, rows):
    inputs, label = np.insert(rows[:, :-1], 0, 1.0, axis=1), rows[:, -1]
    # The derivative of log(1 + exp(-label z)) by z.
    by_z = -label / (1 + np.exp(label * (inputs @ x)))
    return by_z @ inputs / len(rows)


PROBLEM = references.Problem(_losses, _gradient)


def vector(params):
    """Parameters as the references have them."""
    return np.insert(params["weights"], 0, params["bias"])


#
# The table of algorithms. A new one is a row.
#
class Rates(NamedTuple):
    client: Any
    server: Any


class Case(NamedTuple):
    call: Callable[..., federated.Algorithm]
    arguments: Callable[[Rates], tuple[Any, ...]]  # After the loss.
    options: Mapping[str, Any]
    reference: Callable[..., Any]  # (problem, x, rounds)
    down: int = 1  # So many models go to a client,
    up: int = 1  # and so many come from it.


RATES = Rates(0.4, 0.7)
STEPS: Any = dict(epochs=2, batch_size=3)
of_client = references.sgd(RATES.client)
of_server = references.sgd(RATES.server)


def with_momentum(rates):
    client = optax.sgd(rates.client, momentum=0.9)
    return client, optax.sgd(rates.server, momentum=0.5, nesterov=True)


FEDAVG = functools.partial(
    references.fedavg,
    client_optimizer=references.sgd(RATES.client, 0.9),
    server=references.sgd(RATES.server, 0.5, nesterov=True),
    **STEPS,
)


def adaptive(kind, **betas):
    """With a tau that is neither small beside the updates nor large."""
    server = references.adaptive(kind, RATES.server, **betas, tau=0.3)
    return Case(
        getattr(federated, f"fed{kind}"),
        lambda rates: (optax.sgd(rates.client), rates.server),
        dict(STEPS, **betas, tau=0.3),
        functools.partial(
            references.fedavg, client_optimizer=of_client, server=server, **STEPS
        ),
    )


@functools.wraps(federated.self_tuning_fedavg)
def call_self_tuning(loss, client, server, **options):
    starts: Any = dict(client_learning_rate=client, server_learning_rate=server)
    return federated.self_tuning_fedavg(loss, **starts, **options)


def self_tuning(learned, up, **options):
    """With all it learns by default, or less."""
    return Case(
        call_self_tuning,
        tuple,
        dict(STEPS, momentum=0.6, **options),
        functools.partial(
            references.self_tuning,
            client_rate=RATES.client,
            server_rate=RATES.server,
            momentum=0.6,
            learned=learned,
            hyper_optimizer=references.adam(0.1, b1=0.0),
            **STEPS,
        ),
        up=up,
    )


BY_CLIENTS = dict(epochs=3, batch_size=2, weighting="clients")
ALGORITHMS = {
    "fedsgd": Case(
        federated.fedsgd,
        lambda rates: (optax.sgd(rates.server, momentum=0.9),),
        {},
        functools.partial(references.fedsgd, server=references.sgd(RATES.server, 0.9)),
    ),
    "fedsgd by clients": Case(
        federated.fedsgd,
        lambda rates: (optax.sgd(rates.server),),
        dict(weighting="clients"),
        functools.partial(references.fedsgd, server=of_server, weighting="clients"),
    ),
    "fedavg": Case(federated.fedavg, with_momentum, STEPS, FEDAVG),
    "fedavg by clients": Case(
        federated.fedavg,
        lambda rates: (optax.adam(rates.client), optax.sgd(rates.server)),
        BY_CLIENTS,
        functools.partial(
            references.fedavg,
            client_optimizer=references.adam(RATES.client),
            server=of_server,
            **BY_CLIENTS,
        ),
    ),
    "fedprox": Case(
        federated.fedprox,
        with_momentum,
        dict(STEPS, mu=0.5),
        functools.partial(FEDAVG, mu=0.5),
    ),
    "fedadam": adaptive("adam", b1=0.8, b2=0.9),
    "fedyogi": adaptive("yogi", b1=0.8, b2=0.9),
    "fedadagrad": adaptive("adagrad", b1=0.8),
    "scaffold": Case(
        federated.scaffold,
        lambda rates: tuple(rates),
        dict(STEPS, population=POPULATION),
        functools.partial(
            references.scaffold,
            client_rate=RATES.client,
            server_rate=RATES.server,
            population=POPULATION,
            **STEPS,
        ),
        down=2,
        up=2,
    ),
    "diloco": Case(
        federated.diloco,
        lambda rates: (
            optax.adamw(rates.client, weight_decay=0.2),
            optax.sgd(rates.server, momentum=0.9, nesterov=True),
        ),
        dict(steps=4, batch_size=3),
        functools.partial(
            references.diloco,
            inner=references.adam(RATES.client, weight_decay=0.2),
            outer=references.sgd(RATES.server, 0.9, nesterov=True),
            steps=4,
            batch_size=3,
        ),
    ),
    "self-tuning": self_tuning([0, 1, 2], up=3),
    "self-tuning at the server": self_tuning([1, 2], up=1, learn_client_rate=False),
}
EACH = pytest.mark.parametrize("name", ALGORITHMS)


def some(*names, slow=()):
    """Algorithms that between them have all the parts; some of them are slow tests."""
    marked = [pytest.param(name, marks=pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("name", [*names, *marked])


# Most of the time goes to the compiler, which need not try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(name: str, rates: Any = RATES, loss: Any = loss, **changes: Any):
    case = ALGORITHMS[name]
    return case.call(loss, *case.arguments(rates), **{**case.options, **changes})


def round_of(algorithm):
    """`(state, client_states, batch, key)` to the first two and metrics, of any."""

    def round(state, client_states, batch, key):
        if algorithm.client_init is not None:
            return algorithm.round(state, client_states, batch, key)
        state, metrics = algorithm.round(state, batch, key)
        return state, client_states, metrics

    return round


def by_rates(name):
    """The round with the learning rates as its first argument."""
    return lambda rates, *args: round_of(make(name, rates))(*args)


@functools.cache
def compiled(name):
    return jit(by_rates(name))


def stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def rows(tree, indices):
    return jax.tree.map(lambda x: x[np.array(indices)], tree)


def first_arguments(name, cohort, length=LENGTH, params=PARAMS):
    """Arguments of a first round. Clients without states have None for them."""
    algorithm = make(name)
    new = algorithm.client_init and algorithm.client_init(params)
    batch = federated.batch_of(DATA, cohort, length)
    client_states = stacked([new] * len(cohort))
    return algorithm.init(params), client_states, batch, jax.random.key(0)


@functools.cache
def later_arguments(name):
    """Arguments of a second round, when no state is as it was made."""
    state, client_states, batch, key = first_arguments(name, COHORTS[0])
    state, client_states, _ = compiled(name)(RATES, state, client_states, batch, key)
    return state, client_states, batch, jax.random.key(1)


def model_after(name, cohort):
    """The model after a first round, as a vector."""
    state, _, _ = compiled(name)(RATES, *first_arguments(name, cohort))
    return vector(make(name).params(state))


def first_model(fedavg, cohort):
    batch = federated.batch_of(DATA, cohort, LENGTH)
    state, _ = jit(fedavg.round)(fedavg.init(PARAMS), batch, jax.random.key(0))
    return vector(fedavg.params(state))


#
# As the papers have them.
#
def follow_reference(name, check):
    """Three rounds, beside those of the reference, of cohorts that change.

    The clients' states are carried from round to round by their index.
    """
    algorithm = make(name)
    keys = [jax.random.key(t) for t in range(len(COHORTS))]
    rounds = [
        ([(i, ROWS[i]) for i in cohort], key)
        for cohort, key in zip(COHORTS, keys, strict=True)
    ]
    reference = ALGORITHMS[name].reference(PROBLEM, vector(PARAMS), rounds)
    state, kept = algorithm.init(PARAMS), {}
    for cohort, key, (x, metrics) in zip(COHORTS, keys, reference, strict=True):
        new = algorithm.client_init and algorithm.client_init(algorithm.params(state))
        state, client_states, got = compiled(name)(
            RATES,
            state,
            stacked([kept.get(i, new) for i in cohort]),
            federated.batch_of(DATA, cohort, LENGTH),
            key,
        )
        kept.update((i, rows(client_states, k)) for k, i in enumerate(cohort))
        check(vector(algorithm.params(state)), x)
        check({metric: got[metric] for metric in metrics}, metrics)


@EACH
def test_three_rounds_equal_those_of_the_reference(name):
    follow_reference(name, assert_equal)


@some("fedavg", slow=["fedsgd", "scaffold", "diloco"])
def test_rounds_in_float32_are_close_to_the_reference(name):
    with jax.enable_x64(False):
        follow_reference(name, assert_close)


#
# What does not matter.
#
@some(slow=["fedsgd", "fedavg", "scaffold", "diloco"])
def test_jit_does_not_matter(name):
    args = later_arguments(name)
    assert_equal(round_of(make(name))(*args), compiled(name)(RATES, *args))


@some("fedavg", slow=["fedsgd", "scaffold", "diloco"])
def test_the_length_of_the_padding_does_not_matter(name):
    state, client_states, batch, key = later_arguments(name)
    shorter = federated.batch_of(DATA, batch.client)
    assert len(shorter.mask[0]) < LENGTH
    got = jit(round_of(make(name)))(state, client_states, shorter, key)
    assert_equal(got, compiled(name)(RATES, state, client_states, batch, key))


@EACH
def test_the_order_of_the_cohort_does_not_matter(name):
    state, client_states, batch, key = later_arguments(name)
    order = [2, 0, 3, 1]
    got = compiled(name)(
        RATES, state, rows(client_states, order), rows(batch, order), key
    )
    state, client_states, metrics = compiled(name)(
        RATES, state, client_states, batch, key
    )
    assert_equal(got, (state, rows(client_states, order), metrics))


@some("fedsgd", slow=["fedavg", "scaffold", "diloco"])
def test_streaming_gives_the_same(name):
    args = later_arguments(name)
    got = drjax.streaming(round_of(make(name)), chunk_size=3)(*args)
    assert_equal(got, compiled(name)(RATES, *args))


@EACH
def test_a_round_keeps_the_types_of_its_state(name):
    """In half precision too: one may scan over rounds, and bytes are as expected."""
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), PARAMS)
        args = first_arguments(name, COHORTS[0], params=params)
        batch = jax.tree.map(
            lambda x, dtype=dtype: x.astype(dtype) if x.dtype == float else x, args[2]
        )
        got = jax.eval_shape(round_of(make(name)), *args[:2], batch, args[3])
        want = jax.eval_shape(lambda *args: args, *args[:2])
        assert jax.tree.leaves(got[:2]) == jax.tree.leaves(want)


#
# Who counts, and how much.
#
@some(slow=["fedsgd", "fedavg", "scaffold", "diloco"])
def test_a_lost_client_is_as_one_who_was_not_asked(name):
    """An engine that loses the last one runs the plan without it, and with the size."""
    state, client_states, batch, key = later_arguments(name)
    plan = drjax.make_plan(round_of(make(name)))(state, client_states, batch, key)
    n = len(COHORTS[0]) - 1
    fewer = dataclasses.replace(
        plan,
        sizes={i: (placement, n) for i, (placement, _) in plan.sizes.items()},
        stages=tuple(
            dataclasses.replace(stage, n=n) if isinstance(stage, MapReduce) else stage
            for stage in plan.stages
        ),
    )
    got = drjax.run_plan(fewer, state, client_states, batch, key)
    first = range(n)
    want = jit(round_of(make(name)))(
        state, rows(client_states, first), rows(batch, first), key
    )
    assert_equal(got, want)


@EACH
def test_a_mean_is_over_clients_with_examples(name):
    """As that of each of them twice, which has the same weights."""
    assert_equal(model_after(name, [0, 2, 1, 2]), model_after(name, [0, 0, 1, 1]))


@EACH
def test_a_cohort_without_examples_leaves_the_model(name):
    args = first_arguments(name, [2, 2, 2, 2])
    state, client_states, metrics = compiled(name)(RATES, *args)
    assert_equal(make(name).params(state), PARAMS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((client_states, metrics)))


@pytest.mark.parametrize(
    "name, weights", [("fedavg", COUNTS), ("fedavg by clients", np.ones(6))]
)
def test_a_client_that_is_there_thrice_counts_thrice(name, weights):
    """With its examples, or as a client; the servers' first steps are linear."""
    weights = np.array([3 * weights[0], weights[1]])
    alone = [model_after(name, [0] * 4), model_after(name, [1] * 4)]
    both = model_after(name, [0, 1, 0, 0])
    assert_equal(both, weights @ alone / sum(weights))


#
# One algorithm as a case of another.
#
def test_fedavg_of_one_full_step_is_fedsgd():
    """The clients' learning rate is then the server's."""
    fedavg = federated.fedavg(loss, optax.sgd(RATES.server), batch_size=LENGTH)
    assert_equal(first_model(fedavg, COHORTS[1]), model_after("fedsgd", COHORTS[1]))


def test_fedprox_without_its_term_is_fedavg():
    args = later_arguments("fedavg")
    got = jit(make("fedprox", mu=0.0).round)(args[0], *args[2:])
    assert_equal(got, compiled("fedavg")(RATES, *args)[::2])


def test_a_first_round_of_scaffold_is_fedavg_by_clients():
    optimizers = optax.sgd(RATES.client), optax.sgd(RATES.server)
    fedavg = federated.fedavg(loss, *optimizers, weighting="clients", **STEPS)
    assert_equal(model_after("scaffold", COHORTS[1]), first_model(fedavg, COHORTS[1]))


@pytest.mark.parametrize("learn_client_rate", [True, False])
def test_self_tuning_that_takes_no_steps_is_fedavg_with_momentum(learn_client_rate):
    frozen = make(
        "self-tuning",
        learn_client_rate=learn_client_rate,
        hyper_optimizer=optax.sgd(0.0),
    )
    server = optax.sgd(RATES.server, momentum=0.6)
    fedavg = federated.fedavg(loss, optax.sgd(RATES.client), server, **STEPS)
    models = []
    for algorithm in frozen, fedavg:
        state, run_round = algorithm.init(PARAMS), jit(algorithm.round)
        for t, cohort in enumerate(COHORTS):
            batch = federated.batch_of(DATA, cohort, LENGTH)
            state, _ = run_round(state, batch, jax.random.key(t))
        models.append(algorithm.params(state))
    assert_equal(*models)


#
# Derivatives.
#
def smooth(name):
    """A round, of the learning rates and of the server's state."""
    # One client has steps without examples, and one nothing else.
    state, client_states, batch, key = first_arguments(name, [3, 2, 1], length=4)

    def after_round(rates, state):
        return by_rates(name)(rates, state, client_states, batch, key)

    return of_floats(after_round, (RATES, state))


def check_derivatives(fn, args):
    """They equal finite differences, in both modes."""
    run, push = jit(fn), jit(lambda args, along: jax.jvp(fn, args, along))
    check_jvp(run, push, args, eps=1e-5)
    pull = jit(lambda args, along: jax.vjp(fn, *args)[1](along))
    check_vjp(
        run, lambda *args: (run(*args), functools.partial(pull, args)), args, eps=1e-5
    )


@some("fedsgd", slow=["fedavg", "fedavg by clients", "fedyogi", "scaffold", "diloco"])
def test_derivatives_by_rates_and_the_state_equal_finite_differences(name):
    """With Adam too, whose root has no derivative at zero: where no step is taken."""
    check_derivatives(*smooth(name))


@pytest.mark.slow
def test_second_derivatives_of_fedavg_equal_finite_differences():
    run, args = smooth("fedavg")
    check_derivatives(gradient(run, every(args)), args)


@some("fedavg", slow=["fedsgd", "scaffold", "diloco"])
def test_a_sweep_of_learning_rates_is_a_vmap(name):
    args = later_arguments(name)
    sweep = Rates(np.array([0.1, 0.3, 0.9]), np.array([1.0, 0.5, 0.2]))
    swept = jax.vmap(by_rates(name), in_axes=(0, None, None, None, None))
    got = jit(swept)(sweep, *args)
    each = [compiled(name)(Rates(*rates), *args) for rates in zip(*sweep, strict=True)]
    assert_equal(got, stacked(each))


#
# Communication.
#
@EACH
def test_what_goes_between_server_and_clients(name):
    """One round; models, with a key and two numbers down and three up at most."""
    args = first_arguments(name, COHORTS[0])
    plan = drjax.make_plan(round_of(make(name)))(*args)
    (stage,) = [s for s in plan.stages if isinstance(s, MapReduce)]
    assert (plan.rounds, stage.placement) == (1, "clients")
    assert plan.size_free == {"clients"}

    def sizes(numbers):
        return sorted(
            plan.avals[i].size * plan.avals[i].dtype.itemsize for i in numbers
        )

    down, up = sizes(stage.server_inputs), sizes(i for _, i in stage.reductions)
    model = sum(x.nbytes for x in PARAMS.values())
    of_down, of_up = ALGORITHMS[name].down * model, ALGORITHMS[name].up * model
    assert of_down <= sum(down) <= of_down + 3 * 8
    assert of_up <= sum(up) <= of_up + 3 * 8
    # All else stays with the client: its state.
    kept = [x.size * x.dtype.itemsize for x in jax.tree.leaves(args[1])]
    assert sizes(stage.placed_outputs) == sorted(kept)


#
# Least squares, where all is in closed form. The loss of client i is a constant and
# (x - x_i) A_i (x - x_i) / 2, where A_i = X_i^T X_i / n_i and x_i is its optimum. A
# step of gradient descent on all its examples takes x - x_i to (I - r A_i) (x - x_i).
# So K of them change x by -D_i (x - x_i), where D_i = I - (I - r A_i)^K.
#
SIZES = [5, 8, 6]
K = 5
_RNG = np.random.default_rng(0)
XS = [_RNG.normal(size=(n, 2)) * [1.0, 1.5] for n in SIZES]
YS = [x @ _RNG.normal(size=2) * 2 + _RNG.normal(size=len(x)) for x in XS]
SQUARES = federated.from_mapping(
    {f"{n} examples": {"x": x, "y": y} for n, x, y in zip(SIZES, XS, YS, strict=True)}
)
A = [x.T @ x / len(x) for x in XS]
OPTIMA = [np.linalg.lstsq(x, y)[0] for x, y in zip(XS, YS, strict=True)]


def square(params, examples):
    return (examples["x"] @ params - examples["y"]) ** 2 / 2


def power(a, rate, k):
    return np.linalg.matrix_power(np.eye(len(a)) - rate * a, k)


def stationary(matrices):
    """Where the sum of matrices @ (x - optima) is zero."""
    pull = sum(m @ x for m, x in zip(matrices, OPTIMA, strict=True))
    return np.linalg.solve(sum(matrices), pull)


def after_many_rounds(algorithm):
    batch = federated.batch_of(SQUARES, range(len(SIZES)))
    start = np.zeros(2)
    new = algorithm.client_init and algorithm.client_init(start)
    round = round_of(algorithm)

    def step(carry, _):
        state, client_states = carry
        return round(state, client_states, batch, jax.random.key(0))[:2], None

    def run(*carry):
        return jax.lax.scan(step, carry, length=400)[0]

    state, _ = jit(run)(algorithm.init(start), stacked([new] * len(SIZES)))
    return algorithm.params(state)


def test_scaffold_reaches_the_optimum_where_fedavg_keeps_its_bias():
    """Clients count the same here.

    The optimum has sum_i A_i (x - x_i) = 0. FedAvg stops where its mean update is zero,
    at sum_i D_i (x - x_i) = 0. D_i is not a multiple of A_i: the clients drift.
    """
    steps: Any = dict(epochs=K, batch_size=max(SIZES))
    scaffold = federated.scaffold(square, 0.2, population=len(SIZES), **steps)
    fedavg = federated.fedavg(square, optax.sgd(0.2), weighting="clients", **steps)
    optimum = stationary(A)
    biased = stationary([np.eye(2) - power(a, 0.2, K) for a in A])
    assert np.linalg.norm(biased - optimum) > 0.1
    assert_equal(after_many_rounds(scaffold), optimum, rtol=1e-9)
    assert_equal(after_many_rounds(fedavg), biased, rtol=1e-9)


def test_hypergradients_equal_their_closed_form():
    """The loss of all examples after three rounds, by the rates of clients and server.

    They are r and s. With w_i = n_i / n, a round is x' = x - s u, where u is
    sum_i w_i D_i (x - x_i). So the derivative of x by a rate p goes on as
    dx' = dx - s du - (ds/dp) u, where du = sum_i w_i (D_i dx + (dD_i/dp) (x - x_i)) and
    dD_i/dr = K A_i (I - r A_i)^(K-1). The gradient of the loss is
    sum_i w_i A_i (x - x_i).
    """
    client, server = 0.15, 0.8
    weights = np.array(SIZES) / sum(SIZES)
    x = np.array([1.0, -1.0])

    def total(matrices, vectors):
        terms = zip(weights, matrices, vectors, strict=True)
        return sum(w * m @ v for w, m, v in terms)

    d = [np.eye(2) - power(a, client, K) for a in A]
    d_by_client = [K * a @ power(a, client, K - 1) for a in A]
    by_client, by_server, y = np.zeros(2), np.zeros(2), x
    for _ in range(3):
        off = [y - optimum for optimum in OPTIMA]
        u = total(d, off)
        u_by_client = total(d, [by_client] * 3) + total(d_by_client, off)
        u_by_server = total(d, [by_server] * 3)
        by_client = by_client - server * u_by_client
        by_server = by_server - server * u_by_server - u
        y = y - server * u
    gradient = total(A, [y - optimum for optimum in OPTIMA])
    want = gradient @ by_client, gradient @ by_server

    def after(rates):
        algorithm = federated.fedavg(
            square,
            optax.sgd(rates[0]),
            optax.sgd(rates[1]),
            epochs=K,
            batch_size=max(SIZES),
        )
        batch, state = federated.batch_of(SQUARES, range(3)), algorithm.init(x)
        for t in range(3):
            state, _ = algorithm.round(state, batch, jax.random.key(t))
        losses = jax.vmap(square, (None, 0))(algorithm.params(state), batch.data)
        return jnp.sum(losses * batch.mask) / jnp.sum(batch.count)

    assert_equal(jit(jax.grad(after))((client, server)), want)


#
# Halves.
#
MANY = federated.from_arrays(np.full(50 * 64, 30, np.float32), np.repeat(range(50), 64))


def half_loss(w, x):
    return (x.astype(w.dtype) - w) ** 2 / 2


@pytest.mark.parametrize("name", ["fedsgd", "fedavg", "self_tuning", "scaffold"])
def test_halves_hold_what_many_clients_send(name):
    """Sums of 3200 gradients of 30 are beyond float16; means are not."""
    options: dict[str, Any] = dict(batch_size=64)
    algorithm = {
        "fedsgd": lambda: federated.fedsgd(half_loss, optax.sgd(0.1)),
        "fedavg": lambda: federated.fedavg(half_loss, optax.sgd(0.1), **options),
        "self_tuning": lambda: federated.self_tuning_fedavg(
            half_loss,
            client_learning_rate=0.1,
            momentum=1e-4,
            hyper_optimizer=optax.sgd(0.0),
            **options,
        ),
        "scaffold": lambda: federated.scaffold(
            half_loss, 0.1, population=50, **options
        ),
    }[name]()
    result = federated.run(
        algorithm,
        jnp.float16(0),
        MANY,
        rounds=2,
        cohort_size=50,
        seed=0,
        progress=False,
    )
    assert result.params.dtype == jnp.float16
    assert abs(float(result.params) - 30 * (1 - 0.9**2)) < 0.05
    for x in jax.tree.leaves(result.state):
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_a_traced_mu_keeps_the_type_of_halves():
    def make(mu):
        sgd = optax.sgd(0.1, momentum=0.9)
        return federated.fedprox(half_loss, sgd, mu=mu, batch_size=8)

    mus = jnp.array([0.0, 1.0])
    options: dict[str, Any] = dict(rounds=2, cohort_size=5, progress=False)
    start = jnp.bfloat16(0)
    swept = federated.sweep(make, mus, start, MANY, seeds=[0, 0], **options)
    for mu, got in zip((0.0, 1.0), swept.params, strict=True):
        want = federated.run(make(mu), start, MANY, seed=0, **options).params
        np.testing.assert_allclose(float(got), float(want), rtol=0.02)


#
# Wrong use.
#
@EACH
def test_a_loss_of_the_whole_batch_is_an_error(name):
    algorithm = make(name, loss=lambda *args: jnp.mean(loss(*args)))
    call = ALGORITHMS[name].call.__name__
    args = first_arguments(name, COHORTS[0])
    with pytest.raises(ValueError, match=rf"^federated\.{call}: .*loss.*example"):
        jax.eval_shape(round_of(algorithm), *args)


WRONG = {
    "batch_size": (0, -1),
    "epochs": (0,),
    "steps": (0,),
    "population": (0,),
    "weighting": ("size",),
    "momentum": (0.0, 1.0),
}


@EACH
def test_wrong_options_are_errors(name):
    case = ALGORITHMS[name]
    defaults = {} if name in ("scaffold", "diloco") else dict(weighting="examples")
    for option in {**defaults, **case.options}.keys() & WRONG.keys():
        for value in WRONG[option]:
            with pytest.raises(
                ValueError, match=rf"^federated\.\w+: .*{value}"
            ) as info:
                make(name, **{option: value})
            assert str(info.value).startswith(f"federated.{case.call.__name__}: ")
            assert option in str(info.value)
