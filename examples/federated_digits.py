"""Federated averaging on handwritten digits: a run that may be interrupted.

Fifty clients hold about thirty of scikit-learn's digits each, most of them of few
classes. In each round thirteen of them are asked, one in ten is lost, and the first ten
that answer are averaged by a server with momentum. The run leaves its metrics, curves
and checkpoints in a folder: stop it whenever you like, and start it again to go on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

import federated

CLIENTS = 50
COHORT = 10
DIRICHLET_ALPHA = 0.3  # The smaller, the fewer classes a client has.
FAULTS = federated.Faults(dropout=0.1, over_selection=0.3)
MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])


def predict(params: Any, x: Any) -> Any:
    """The logits, [batch, 10], of images [batch, 64]."""
    return MODEL.apply(params, x)


def loss(params: Any, digits: Any) -> jax.Array:
    """The loss of each digit, [batch]."""
    logits = predict(params, digits["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits["y"])


def metrics(params: Any, digits: Any) -> dict[str, jax.Array]:
    """Of each digit too, [batch]: `federated.evaluate` takes means."""
    is_right = predict(params, digits["x"]).argmax(axis=-1) == digits["y"]
    return {"accuracy": is_right}


# The learning rates are from short trials with other seeds, on what clients hold out.
ALGORITHM = federated.fedavg(
    loss,
    client_optimizer=optax.sgd(0.1),
    server_optimizer=optax.sgd(1.0, momentum=0.9),
    epochs=3,
    batch_size=10,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="federated_digits", help="of the run")
    args = parser.parse_args(argv)

    # The data: a test set in common, and clients that each hold out a fifth.
    for_split, for_clients, for_model = jax.random.split(jax.random.key(args.seed), 3)
    digits, test = federated.datasets.digits(for_split)
    clients = federated.dirichlet(
        digits, digits["y"], CLIENTS, DIRICHLET_ALPHA, for_clients
    )
    train, held_out = federated.hold_out(clients, 0.2)
    classes = [len(np.unique(train[i]["y"])) for i in range(CLIENTS)]
    print(f"{train}\n{np.mean(classes):.1f} of 10 classes each, on average")

    result = federated.run(
        ALGORITHM,
        MODEL.init(for_model, test["x"][:1]),
        train,
        rounds=args.rounds,
        cohort_size=COHORT,
        seed=args.seed,
        faults=FAULTS,
        min_fraction=0.8,
        evaluate={
            "test": federated.evaluate(metrics, test),
            "held out": federated.evaluate(metrics, held_out),
        },
        eval_every=5,
        folder=args.folder,
    )

    def total(name: str) -> float:
        return float(np.nansum(result.metrics[name]))

    final = {name: values[-1] for name, values in result.metrics.items()}
    print(
        f"Test accuracy {final['test/accuracy']:.1%}, after {final['round']:.0f} "
        "rounds\n"
        f"On what clients hold out {final['held out/accuracy']:.1%}; of the clients "
        f"p10 {final['held out/accuracy p10']:.0%}, "
        f"p50 {final['held out/accuracy p50']:.0%}, "
        f"p90 {final['held out/accuracy p90']:.0%}\n"
        f"{total('cohort'):.0f} clients asked: {total('reported'):.0f} averaged, "
        f"{total('dropped'):.0f} lost, {total('late'):.0f} not needed any more\n"
        f"{total('bytes_down') / 1e6:.1f} MB down, {total('bytes_up') / 1e6:.1f} MB up"
    )
    folder = Path(args.folder)
    print(f"Curves in {folder / 'curves.png'}, numbers in {folder / 'metrics.csv'}")


if __name__ == "__main__":
    main()
