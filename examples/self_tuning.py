"""Federated averaging that learns its rates as it trains, beside rates that were tuned.

Fifty clients hold two dozen of scikit-learn's digits each, most of them of few
classes. Federated averaging with momentum has three numbers to choose: the learning
rates of clients and server, and the momentum. Here they are learned, by the gradient
through each round, from several starts. Beside it are runs that keep the start, and the
tuned choice: the best fixed one of a grid, in mean accuracy over the rounds, found with
other seeds and on the digits of other clients. The test digits are nobody's.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits

import federated

CLIENTS = 50
VALIDATION_CLIENTS = 10
COHORT = 10
TEST_SIZE = 360
DIRICHLET_ALPHA = 0.3
BATCH_SIZE = 10
TARGET = 0.9  # An accuracy.
AT_ONCE = 10  # So many seeds run as one vmapped function.
FIRST_TUNING_SEED = 100
ALONE = 0.03, 0.1, 0.3, 1.0  # Rates, of SGD without federation.
MODEL = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(10)])


class Rates(NamedTuple):
    """What is chosen or learned, each a scalar."""

    client: Any
    server: Any
    momentum: Any


STARTS = {
    "default": Rates(0.5, 1.0, 0.9),
    "low": Rates(0.1, 1.0, 0.9),
    "far too low": Rates(0.01, 1.0, 0.5),
    "too high": Rates(0.7, 2.0, 0.9),
}
GRID = [
    Rates(*rates)
    for rates in itertools.product(
        (0.1, 0.2, 0.3, 0.5, 0.7, 1.0), (0.5, 1.0, 1.5, 2.0), (0.5, 0.7, 0.8, 0.9)
    )
]


class Problem(NamedTuple):
    """What a seed determines."""

    data: Any  # A batch of all clients, those for validation last.
    cohorts: Any  # [rounds, COHORT]
    seed: Any
    test: Any  # The same for all.


class Curves(NamedTuple):
    """After each round; `...` is of the seeds, and of the choices of rates."""

    accuracy: Any  # [..., rounds], on test digits.
    validation: Any  # [..., rounds], the same on digits of validation clients.
    rates: Rates  # [..., rounds], as the round used them.


def make_problem(seed: int, rounds: int) -> Problem:
    bunch: Any = load_digits()
    digits: dict[str, Any] = {
        "x": np.float32(bunch.data / 16),
        "y": np.int32(bunch.target),
    }
    order = np.random.default_rng(1).permutation(len(digits["y"]))
    test, train = (
        {name: x[rows] for name, x in digits.items()}
        for rows in np.split(order, [TEST_SIZE])
    )
    n = CLIENTS + VALIDATION_CLIENTS
    key = jax.random.key(seed)
    data = federated.dirichlet(train, train["y"], n, DIRICHLET_ALPHA, key)
    training = data.select(range(CLIENTS))
    cohorts = [federated.uniform(seed, i, training, COHORT) for i in range(rounds)]
    return Problem(federated.batch_of(data, range(n)), np.stack(cohorts), seed, test)


def loss(params: Any, examples: Any) -> jax.Array:
    logits: Any = MODEL.apply(params, examples["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"])


def accuracy(params: Any, examples: Any, mask: Any = True) -> jax.Array:
    logits: Any = MODEL.apply(params, examples["x"])
    return jnp.mean(logits.argmax(-1) == examples["y"], where=mask)


#
# What is compared, each from given rates.
#
def fixed(rates: Rates) -> federated.Algorithm:
    server = optax.sgd(rates.server, momentum=rates.momentum)
    return federated.fedavg(
        loss, optax.sgd(rates.client), server, batch_size=BATCH_SIZE
    )


def learned(rates: Rates, learn_client_rate: bool = True) -> federated.Algorithm:
    return federated.self_tuning_fedavg(
        loss,
        client_learning_rate=rates.client,
        server_learning_rate=rates.server,
        momentum=rates.momentum,
        learn_client_rate=learn_client_rate,
        batch_size=BATCH_SIZE,
    )


def server_learned(rates: Rates) -> federated.Algorithm:
    return learned(rates, learn_client_rate=False)


WAYS = {"nothing": fixed, "server's two": server_learned, "all three": learned}


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def train(make: Callable[..., Any], rates: Rates, problem: Problem) -> Curves:
    """Runs an algorithm from given rates, on each of several problems."""
    algorithm, key = make(rates), jax.random.key(problem.seed)
    held_out = jax.tree.map(lambda x: x[CLIENTS:], problem.data)

    def step(state, at):
        number, cohort = at
        batch = jax.tree.map(lambda x: x[cohort], problem.data)
        key_of_round = jax.random.fold_in(key, number)
        state, metrics = algorithm.round(state, batch, key_of_round)
        params = algorithm.params(state)
        names = "client_learning_rate", "server_learning_rate", "momentum"
        used = [metrics.get(name, x) for name, x in zip(names, rates, strict=True)]
        return state, Curves(
            accuracy(params, problem.test),
            accuracy(params, held_out.data, held_out.mask),
            Rates(*used),
        )

    state = algorithm.init(MODEL.init(key, problem.test["x"][:1]))
    rounds = jnp.arange(len(problem.cohorts)), problem.cohorts
    return jax.lax.scan(step, state, rounds)[1]


def train_each(
    make: Callable[..., Any],
    choices: Sequence[Rates],
    seeds: Sequence[int],
    rounds: int,
) -> Curves:
    """The curves from each choice of rates, with each seed."""
    problems = [make_problem(seed, rounds) for seed in seeds]
    groups = [
        jax.tree.map(lambda *x: np.stack(x), *problems[i : i + AT_ONCE])
        for i in range(0, len(seeds), AT_ONCE)
    ]
    rows = []
    for choice in track(choices, f"{make.__name__:<14}", transient=True):
        rates = Rates(*map(jnp.float32, choice))
        curves = [train(make, rates, group) for group in groups]
        rows.append(jax.tree.map(lambda *x: np.concatenate(x), *curves))
    return jax.tree.map(lambda *x: np.stack(x), *rows)


def train_alone(epochs: int, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> Any:
    """Accuracies `[seeds]` of SGD on all digits of clients, and on those of each."""

    @jax.jit
    def sgd(rate, problem):
        clients = jax.tree.map(lambda x: x[:CLIENTS, None], problem.data)
        # One client that has all of them: what is padding goes to the end.
        first = jnp.argsort(~clients.mask.reshape(-1))
        data = jax.tree.map(
            lambda x: x.reshape(1, -1, *x.shape[3:])[:, first], clients.data
        )
        mask, number = clients.mask.reshape(1, -1)[:, first], jnp.zeros(1, int)
        count = clients.count.sum(keepdims=True)[0]
        united = federated.Batch(data, mask, count, number)
        local: Any = dict(epochs=epochs, batch_size=BATCH_SIZE)
        fedavg = federated.fedavg(loss, optax.sgd(rate), optax.sgd(1.0), **local)
        key = jax.random.key(problem.seed)
        state = fedavg.init(MODEL.init(key, problem.test["x"][:1]))
        held_out = jax.tree.map(lambda x: x[CLIENTS:], problem.data)

        def trained(batch):
            params = fedavg.params(fedavg.round(state, batch, key)[0])
            on_held_out = accuracy(params, held_out.data, held_out.mask)
            return accuracy(params, problem.test), on_held_out

        each = jax.lax.map(trained, clients)
        return trained(united), jax.tree.map(jnp.mean, each)

    def accuracies(seeds):  # [test or held-out, all or each, rate, seed]
        problems = [make_problem(seed, 1) for seed in seeds]
        of_rates = [[sgd(rate, problem) for problem in problems] for rate in ALONE]
        return np.moveaxis(np.array(of_rates), (2, 3), (1, 0))

    best = accuracies(tuning_seeds)[1].mean(-1).argmax(-1)
    return accuracies(seeds)[0][np.arange(2), best]


def megabytes_per_round(make: Callable[..., Any]) -> float:
    """What goes down to a client and up from it, as `run` counts it."""
    problem = make_problem(0, 1)
    examples = {name: x[:COHORT] for name, x in problem.test.items()}
    data = federated.from_arrays(examples, np.arange(COHORT))
    params = MODEL.init(jax.random.key(0), problem.test["x"][:1])
    options: Any = dict(rounds=1, cohort_size=COHORT, seed=0, progress=False)
    metrics = federated.run(make(STARTS["default"]), params, data, **options).metrics
    return (metrics["bytes_down"] + metrics["bytes_up"])[-1] / COHORT / 1e6


#
# What is shown.
#
def mean_and_interval(x: np.ndarray) -> tuple[float, float]:
    """The mean over seeds, and half of its 95 % interval by Student's t."""
    quantile = stats.t.ppf(0.975, len(x) - 1)
    return float(x.mean()), quantile * x.std(ddof=1) / np.sqrt(len(x))


def rounds_to_target(curves: np.ndarray) -> np.ndarray:
    """One more than there are, where it is never reached."""
    there = curves >= TARGET
    return np.where(there.any(-1), there.argmax(-1), curves.shape[-1]) + 1


def percent(x: np.ndarray, sign: str = "") -> str:
    mean, half = mean_and_interval(100 * x)
    return f"{mean:{sign}.1f} ± {half:.1f}"


def print_table(
    title: str, tuned: Curves, runs: Mapping[Any, Curves], rounds: Mapping[str, Any]
) -> None:
    """Prints a row for each run, of as many rounds as its way of learning has."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("start", "learns"):
        table.add_column(column, no_wrap=True)
    for column in (f"rounds to {TARGET:.0%}", "mean", "less tuned", "final"):
        table.add_column(column, justify="right", no_wrap=True)

    shown: dict[Any, Any] = {"tuned": tuned.accuracy[:, : rounds["nothing"]]}
    for start, way in itertools.product(STARTS, WAYS):
        shown[start, way] = runs[start, way].accuracy[:, : rounds[way]]
    best = shown["tuned"].mean(1)
    for name, accuracies in shown.items():
        start, way = (name, "") if name == "tuned" else name
        needed = rounds_to_target(accuracies)
        mean, half = mean_and_interval(needed)
        never = needed.max() > accuracies.shape[1]
        table.add_row(
            start if way in ("", "nothing") else "",
            way,
            f"{'≥ ' if never else ''}{mean:.1f} ± {half:.1f}",
            percent(accuracies.mean(1)),
            percent(accuracies.mean(1) - best, "+") if way else "",
            percent(accuracies[:, -1]),
            end_section=way in ("", "all three"),
        )
    Console(width=100).print(table)


def draw(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """The mean over seeds, with its 95 % interval."""
    mean, half = np.array([mean_and_interval(column) for column in y.T]).T
    axes.plot(x, mean, **style)
    band = dict(color=style["color"], alpha=0.15, lw=0)
    axes.fill_between(x, mean - half, mean + half, **band)


RATE_TICKS = {"client": (0.01, 0.03, 0.1, 0.3, 1), "server": (0.5, 1, 2, 5)}


def plot(
    path: str,
    best: Rates,
    tuned: Curves,
    runs: Mapping[Any, Curves],
    grid: Mapping[str, np.ndarray],
    rounds: int,
    megabytes: Mapping[str, float],
) -> None:
    figure = Figure(figsize=(8, 12), layout="constrained")
    panels = figure.subplots(4, 2).flatten()
    (by_round, by_bytes, others, starts), learned_rates = panels[:4], panels[4:]
    number = np.arange(1, rounds + 1)
    black: Any = dict(color="black", lw=1.2)
    colors = {
        "nothing": "tab:gray",
        "server's two": "tab:green",
        "all three": "tab:blue",
    }

    draw(by_round, number, tuned.accuracy[:, :rounds], label="tuned", **black)
    draw(by_bytes, megabytes["nothing"] * number, tuned.accuracy[:, :rounds], **black)
    for way, color in colors.items():
        accuracies = runs["default", way].accuracy
        label = f"learns {way}"
        draw(by_round, number, accuracies[:, :rounds], color=color, label=label)
        sent = megabytes[way] * np.arange(1, accuracies.shape[1] + 1)
        within = sent <= megabytes["nothing"] * rounds
        draw(by_bytes, sent[within], accuracies[:, within], color=color)
    by_round.set(title="From the default start, by rounds", xlabel="round")
    by_bytes.set(
        title="From the default start, by bytes", xlabel="MB to and from a client"
    )
    by_round.legend(frameon=False, loc="lower right")

    draw(others, number, tuned.accuracy[:, :rounds], **black)
    palette = "tab:blue", "tab:orange", "tab:red", "tab:purple"
    of_start = dict(zip(STARTS, palette, strict=True))
    for start in [*STARTS][1:]:
        for way, line in ("nothing", ":"), ("all three", "-"):
            accuracies = runs[start, way].accuracy[:, :rounds]
            draw(others, number, accuracies, color=of_start[start], ls=line)
    others.set(title="From other starts; dotted: not learned", xlabel="round")

    means = {way: accuracies.mean((1, 2)) for way, accuracies in grid.items()}
    for way in "server's two", "all three":
        style: Any = dict(color=colors[way], alpha=0.6, label=f"learns {way}")
        starts.plot(means["nothing"], means[way], ".", **style)
    starts.plot([0, 1], [0, 1], color="tab:gray", lw=0.8)
    starts.axhline(means["nothing"].max(), **black)
    low = min(x.min() for x in means.values()) - 0.02
    starts.set(
        title=f"Mean accuracy from {len(GRID)} starts",
        xlabel="not learned",
        ylabel="learned",
        xlim=(low, 0.9),
        ylim=(low, 0.9),
    )
    starts.legend(frameon=False, loc="lower right")
    starts.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in by_round, by_bytes, others, starts:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in by_round, by_bytes:
        axes.set_ylim(0.5, 1)

    for axes, name, choice in zip(learned_rates, Rates._fields, best, strict=False):
        axes.axhline(choice, label="tuned", **black)
        for start, color in of_start.items():
            values = getattr(runs[start, "all three"].rates, name)[:, :rounds]
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            axes.plot(number, middle, color=color, label=f"{start} start")
            axes.fill_between(number, low, high, color=color, alpha=0.15, lw=0)
        axes.set(title=f"{name} rate".replace("momentum rate", "momentum"))
        axes.set_xlabel("round")
        if name != "momentum":
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_yticks(ticks := RATE_TICKS[name], [f"{x:g}" for x in ticks])
    learned_rates[-1].axis("off")
    handles = learned_rates[0].get_legend_handles_labels()
    learned_rates[-1].legend(*handles, frameon=False, loc="upper left")
    for axes in [*figure.axes][:-1]:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=20, help="for the comparison")
    parser.add_argument("--tuning-seeds", type=int, default=10)
    parser.add_argument("--output", default="self_tuning.png", help="the plot")
    args = parser.parse_args(argv)

    megabytes = {way: megabytes_per_round(make) for way, make in WAYS.items()}
    for way, x in megabytes.items():
        print(f"{x * 1e3:.1f} kB to and from a client in a round that learns {way}")
    # As many rounds as there are bytes for, if learning all three takes args.rounds.
    bytes_there_are = args.rounds * max(megabytes.values())
    affordable = {way: round(bytes_there_are / x) for way, x in megabytes.items()}
    longest = max(affordable.values())

    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + args.tuning_seeds)
    grid = {
        way: train_each(make, GRID, tuning_seeds, longest) for way, make in WAYS.items()
    }
    best = {}
    for number in args.rounds, longest:
        validation = grid["nothing"].validation[..., :number].mean((1, 2))
        best[number] = GRID[int(validation.argmax())]
        tuning_runs = len(GRID) * args.tuning_seeds
        print(f"Tuned for {number} rounds, by {tuning_runs} runs: {best[number]}")

    runs = {}
    for way, make in WAYS.items():
        choices: dict[Any, Rates] = STARTS | (best if way == "nothing" else {})
        curves = train_each(make, [*choices.values()], range(args.seeds), longest)
        for i, start in enumerate(choices):
            runs[start, way] = jax.tree.map(lambda x, i=i: x[i], curves)
    tuned = {number: runs.pop((number, "nothing")) for number in best}

    as_many = dict.fromkeys(WAYS, args.rounds)
    print_table(f"{args.rounds} rounds", tuned[args.rounds], runs, as_many)
    print_table("As many bytes", tuned[longest], runs, affordable)
    epochs = args.rounds * COHORT // CLIENTS
    together, apart = train_alone(epochs, range(args.seeds), tuning_seeds)
    print(f"One model of all digits, in {epochs} epochs: {percent(together)}")
    print(f"One client's own model, in as many: {percent(apart)}")
    accuracies = {way: x.accuracy[..., : args.rounds] for way, x in grid.items()}
    tuned_for = best[args.rounds], tuned[args.rounds]
    plot(args.output, *tuned_for, runs, accuracies, args.rounds, megabytes)


if __name__ == "__main__":
    main()
