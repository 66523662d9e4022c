"""Draws `images/federated_algorithms.png`: the algorithms on digits; prints a table.

Fifty clients have digits in a Dirichlet(0.3) partition, and ten take part in a round.
Rates are tuned on digits that clients hold out, with seeds of their own. Then each
algorithm runs on all training digits, and is tested on digits that no client has. It is
compared with one model that is trained on all clients' digits, the ceiling, and with
models that single clients train alone, the floor. Both take as many steps, on as many
examples, as clients do in all.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import EngFormatter

import federated

CLIENTS, COHORT, ALPHA = 50, 10, 0.3
ROUNDS, EPOCHS, BATCH = 100, 5, 10
EXAMPLES = 29  # Of a client, or one less.
TUNING_SEEDS, SEEDS = (0, 1), range(100, 110)
TARGET = 0.9


#
# The model.
#
def initial(key):
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(two, (64, 10)) / 8,
        "b2": jnp.zeros(10),
    }


def predict(params, x):
    hidden = jax.nn.gelu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params, examples):
    logits = predict(params, examples["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"])


def accuracy(params, examples):
    return {"accuracy": predict(params, examples["x"]).argmax(-1) == examples["y"]}


#
# What runs, with which rates.
#
class Alone(NamedTuple):
    """Training without federation."""

    optimizer: Callable[[Any], optax.GradientTransformation]  # From a rate.
    rates: tuple[float, ...]  # To try.
    epochs: int
    batch_sizes: tuple[int, int]  # With all examples, and with those of a client.


class Entry(NamedTuple):
    """An algorithm, and what does the same amount of work without federation."""

    make: Callable[[Any], federated.Algorithm]  # From settings.
    grid: dict[str, tuple[float, ...]]  # To try, by name.
    alone: str


LOCAL: Any = dict(epochs=EPOCHS, batch_size=BATCH)
RATES = 0.03, 0.1, 0.3, 1.0
LARGE_RATES = 0.1, 0.3, 1.0, 3.0
ADAM_RATES = 0.003, 0.01, 0.03

PASSES = ROUNDS * COHORT // CLIENTS  # How often a client takes part.
ALONE = {
    "large batches": Alone(
        optax.sgd, LARGE_RATES, PASSES, (COHORT * EXAMPLES, EXAMPLES)
    ),
    "SGD": Alone(optax.sgd, RATES, PASSES * EPOCHS, (BATCH, BATCH)),
    "AdamW": Alone(optax.adamw, ADAM_RATES, PASSES * EPOCHS, (BATCH, BATCH)),
}


def adaptive(make, server_rates):
    return Entry(
        lambda s: make(loss, optax.sgd(s["client"]), s["server"], **LOCAL),
        dict(client=RATES[1:], server=server_rates),
        "SGD",
    )


ALGORITHMS = {
    "FedSGD": Entry(
        lambda s: federated.fedsgd(loss, optax.sgd(s["server"])),
        dict(server=LARGE_RATES),
        "large batches",
    ),
    "FedAvg": Entry(
        lambda s: federated.fedavg(loss, optax.sgd(s["client"]), **LOCAL),
        dict(client=RATES),
        "SGD",
    ),
    "FedProx": Entry(
        lambda s: federated.fedprox(loss, optax.sgd(s["client"]), mu=s["mu"], **LOCAL),
        dict(client=RATES[1:], mu=(0.01, 0.1, 1.0)),
        "SGD",
    ),
    "FedAdam": adaptive(federated.fedadam, (0.01, 0.03, 0.1)),
    "FedYogi": adaptive(federated.fedyogi, (0.01, 0.03, 0.1)),
    "FedAdagrad": adaptive(federated.fedadagrad, (0.03, 0.1, 0.3)),
    "SCAFFOLD": Entry(
        lambda s: federated.scaffold(loss, s["client"], population=CLIENTS, **LOCAL),
        dict(client=RATES),
        "SGD",
    ),
    "DiLoCo": Entry(
        lambda s: federated.diloco(
            loss,
            optax.adamw(s["client"]),
            optax.sgd(s["server"], momentum=0.9, nesterov=True),
            steps=EPOCHS * -(-EXAMPLES // BATCH),
            batch_size=BATCH,
        ),
        dict(client=(0.01, 0.03, 0.1), server=(0.03, 0.1, 0.3, 0.7)),
        "AdamW",
    ),
}


#
# Many runs at once.
#
def sweep(make, settings, model_seeds, seeds, data, test, **options):
    """The accuracy, `[k, rounds + 1]`, of runs which start from models of their own."""

    def made(setting):
        settings, seed = setting
        algorithm = make(settings)
        params = initial(jax.random.key(seed))
        return algorithm._replace(init=lambda _: algorithm.init(params))

    settings = {name: jnp.asarray(x) for name, x in settings.items()}
    result = federated.sweep(
        made,
        (settings, jnp.asarray(model_seeds)),
        initial(jax.random.key(0)),
        data,
        seeds=seeds,
        evaluate=federated.evaluate(accuracy, test),
        **options,
    )
    return result.metrics["accuracy"]


def crossed(**columns):
    """Each value with each of the others: columns of the same length."""
    rows = zip(*itertools.product(*columns.values()), strict=True)
    return dict(zip(columns, rows, strict=True))


def together(entry, grid, seeds, data, test, eval_every):
    """The accuracy in rounds, `[settings, seeds, rounds + 1]`."""
    columns = crossed(**grid, seed=seeds)
    runs = columns.pop("seed")
    options = dict(rounds=ROUNDS, cohort_size=COHORT, eval_every=eval_every)
    found = sweep(entry.make, columns, runs, runs, data, test, **options)
    return found.reshape(-1, len(seeds), ROUNDS + 1)


def apart(alone, rates, seeds, data, test):
    """The accuracy of models of single clients, `[rates, seeds, clients]`."""
    n = len(data)
    batch_size = alone.batch_sizes[n > 1]

    def make(setting):
        optimizer = alone.optimizer(setting["rate"])
        return federated.fedavg(
            loss, optimizer, epochs=alone.epochs, batch_size=batch_size
        )

    columns = crossed(rate=rates, seed=seeds, client=range(n))
    found = sweep(
        make,
        {"rate": columns["rate"]},
        columns["seed"],
        [s * n + i for s, i in zip(columns["seed"], columns["client"], strict=True)],
        data,
        test,
        rounds=1,
        cohort_size=1,
        sampler=lambda seed, round, data, size: np.array([seed % n]),
    )
    return found[:, 1].reshape(len(rates), len(seeds), n)


#
# Tuning, then the runs that are shown.
#
class Found(NamedTuple):
    """What is shown of an algorithm."""

    settings: dict[str, float]  # The best ones.
    tuning_runs: int
    curves: np.ndarray  # Accuracy, [seeds, rounds + 1].
    bytes: float  # What a client of a round receives and sends.


def run_algorithm(entry, tuning, final):
    scores = together(entry, entry.grid, TUNING_SEEDS, *tuning, eval_every=10)
    means = np.nanmean(scores, axis=2).mean(axis=1)  # NaN where not evaluated.
    settings = [*itertools.product(*entry.grid.values())]
    best = dict(zip(entry.grid, settings[means.argmax()], strict=True))
    grid = {name: (x,) for name, x in best.items()}
    (curves,) = together(entry, grid, SEEDS, *final, eval_every=1)
    params, options = initial(jax.random.key(0)), dict(seed=0, progress=False)
    algorithm, data = entry.make(best), final[0]
    one = federated.run(algorithm, params, data, rounds=1, cohort_size=1, **options)
    each = one.metrics["bytes_down"][1] + one.metrics["bytes_up"][1]
    return Found(best, len(settings) * len(TUNING_SEEDS), curves, each)


def run_alone(alone, tuning, final):
    """The ceiling and the floor: accuracy `[seeds]`."""

    def best(data_of):
        scores = apart(alone, alone.rates, TUNING_SEEDS, data_of(tuning[0]), tuning[1])
        rate = alone.rates[scores.mean(axis=(1, 2)).argmax()]
        found = apart(alone, (rate,), SEEDS, data_of(final[0]), final[1])
        return found[0].mean(axis=1)

    def whole(data):
        return federated.from_mapping({"all": federated.pooled(data)})

    return best(whole), best(lambda data: data)


HEADER = (
    "algorithm",
    f"rounds to {TARGET:.0%}",
    "MB until then",
    "mean over rounds",
    f"after {ROUNDS} rounds",
    "ceiling",
    "floor",
    "settings",
    "tuning runs",
)


def table(found, alone):
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, (settings, runs, curves, each) in found.items():
        has = curves >= TARGET
        rounds = np.where(has.any(axis=1), has.argmax(axis=1), np.inf)
        accuracies = [curves[:, 1:].mean(axis=1), curves[:, -1]]
        lines.append(
            [
                name,
                f"{np.median(rounds):g} ({rounds.min():g} to {rounds.max():g})",
                f"{np.median(rounds) * COHORT * each / 1e6:.1f}",
                *map(spread, [*accuracies, *alone[ALGORITHMS[name].alone]]),
                ", ".join(f"{what} {x:g}" for what, x in settings.items()),
                str(runs),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(x):
    return f"{100 * x.mean():.1f} ± {100 * x.std(ddof=1):.1f}"


#
# The figure.
#
PANELS = {
    "Averages": {"FedSGD": "tab:brown", "FedAvg": "0.3", "FedProx": "tab:cyan"},
    "Servers that adapt": {
        "FedAvg": "0.3",
        "FedAdam": "tab:blue",
        "FedYogi": "tab:pink",
        "FedAdagrad": "tab:green",
    },
    "Clients that keep something": {
        "FedAvg": "0.3",
        "SCAFFOLD": "tab:orange",
        "DiLoCo": "tab:red",
    },
}
# These are close to another one.
STYLES = {"FedProx": "--", "FedYogi": "--"}
TICKS = 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99


def plot(found, alone):
    figure, grid = plt.subplots(
        len(PANELS),
        2,
        figsize=(9, 8.5),
        layout="constrained",
        sharex="col",
        sharey=True,
    )
    for row, (title, colors) in zip(grid, PANELS.items(), strict=True):
        for axes, is_bytes in zip(row, (False, True), strict=True):
            for name, color in colors.items():
                draw(axes, name, found[name], color, is_bytes)
            axes.set_xscale("log")
            axes.set_yscale("logit")
            axes.set_ylim(0.15, 0.992)
            axes.set_yticks(TICKS, [f"{x:.0%}" for x in TICKS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            draw_alone(axes, {ALGORITHMS[name].alone for name in colors}, alone)
        row[0].set_title(title, loc="left")
        row[0].set_ylabel("test accuracy")
        row[0].legend(loc=(0.73, 0.25), frameon=False, fontsize="small")
    grid[-1, 0].set_xlabel("round")
    grid[-1, 0].xaxis.set_major_formatter("{x:g}")
    grid[-1, 1].set_xlabel("sent to clients and by them")
    grid[-1, 1].xaxis.set_major_formatter(EngFormatter("B"))
    path = Path(__file__).parent / "images" / "federated_algorithms.png"
    figure.savefig(path, dpi=150)


def draw(axes, name, found, color, is_bytes):
    """The mean over seeds and its deviations, of rounds that a logarithm has near."""
    edges = np.unique(np.geomspace(1, ROUNDS + 1, 30).astype(int))
    windows = [range(*pair) for pair in itertools.pairwise(edges)]
    x = np.array([np.mean(window) for window in windows])
    curves = np.stack([found.curves[:, window].mean(axis=1) for window in windows])
    middle, deviation = curves.mean(axis=1), curves.std(axis=1, ddof=1)
    x = x * COHORT * found.bytes if is_bytes else x
    axes.plot(x, middle, STYLES.get(name, "-"), color=color, lw=1.4, label=name)
    low, high = middle - deviation, np.minimum(middle + deviation, 0.995)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def draw_alone(axes, kinds, alone):
    ceilings, floors = (
        {kind: alone[kind][which].mean() for kind in sorted(kinds)}
        for which in range(2)
    )
    texts = [f"{x:.1%} ({kind})" for kind, x in ceilings.items()]
    label(axes, ceilings, f"all digits: {', '.join(texts)}", x=0.01, ha="left")
    texts = dict.fromkeys(f"{x:.0%}" for x in floors.values())
    label(axes, floors, f"a client's digits: {', '.join(texts)}", x=0.99, ha="right")


def label(axes, levels, text, x, ha):
    for level in levels.values():
        axes.axhline(level, color="0.2", lw=0.8, ls=(0, (4, 3)))
    axes.text(
        x,
        max(levels.values()),
        f"{text}\n",
        transform=axes.get_yaxis_transform(),
        ha=ha,
        va="center",
        fontsize="small",
    )


def main():
    train, test = federated.datasets.digits(jax.random.key(0))
    key = jax.random.key(1)
    data = federated.dirichlet(train, train["y"], CLIENTS, ALPHA, key)
    first, held_out = federated.hold_out(data, 0.2)
    # The clients' examples, and those to test on.
    tuning, final = (first, federated.pooled(held_out)), (data, test)
    alone = {kind: run_alone(x, tuning, final) for kind, x in ALONE.items()}
    found = {name: run_algorithm(x, tuning, final) for name, x in ALGORITHMS.items()}
    print(table(found, alone))
    plot(found, alone)


if __name__ == "__main__":
    main()
