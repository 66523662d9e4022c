"""Federated learning of a language model: the plays, with each speaking role a client.

A small recurrent network learns to predict the next character from the lines of 526
speakers, ten of whom train it in a round; the server is that of FedAdam. It is tested
on later lines of these speakers, and on speakers that it has never met. In the end it
writes some lines itself.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import federated

COHORT = 10
LENGTH = 80  # Characters of an example.
CHARACTERS = 77
MODEL = nn.Sequential(
    [nn.Embed(CHARACTERS, 32), nn.RNN(nn.GRUCell(128)), nn.Dense(CHARACTERS)]
)
PROMPT, WRITTEN, TEMPERATURE = "My lord, ", 400, 0.7


#
# The model. An example is a piece of text: `x` has the character before each of `y`.
#
def predict(params: Any, x: Any) -> Any:
    """The logits, [pieces, LENGTH, CHARACTERS], of what comes after each character."""
    return MODEL.apply(params, x)


def metrics(params: Any, pieces: Any) -> dict[str, jax.Array]:
    """Of each piece [pieces, LENGTH], the means over its characters: [pieces]."""
    logits = predict(params, pieces["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, pieces["y"])
    is_right = logits.argmax(axis=-1) == pieces["y"]
    is_text = pieces["y"] > 0  # 0 fills up a speaker's last piece.
    return {
        "loss": jnp.mean(losses, axis=-1, where=is_text),
        "accuracy": jnp.mean(is_right, axis=-1, where=is_text),
    }


def loss(params: Any, pieces: Any) -> jax.Array:
    return metrics(params, pieces)["loss"]


# The learning rates are from short trials with other seeds, on validation speakers.
ALGORITHM = federated.fedadam(
    loss, client_optimizer=optax.sgd(2.0), server_learning_rate=0.02, batch_size=10
)


#
# What the example shows.
#
def frequencies(data: federated.ClientData) -> np.ndarray:
    """The part of the text that each character is, without those that it lacks."""
    y = federated.pooled(data)["y"]
    counts = np.bincount(y[y > 0])
    return counts[counts > 0] / counts.sum()


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    names = ("accuracy", *(f"accuracy p{p}" for p in (10, 50, 90)))
    lines = [f"{'':<20}   loss   accuracy    of speakers: p10    p50    p90"]
    for row, found in rows.items():
        mean, p10, p50, p90 = (found[name] for name in names)
        numbers = f"{found['loss']:7.3f}{mean:11.1%}{p10:20.1%}{p50:7.1%}{p90:7.1%}"
        lines.append(f"{row:<20}{numbers}")
    return "\n".join(lines)


def write(params: Any, vocabulary: str, seed: int) -> str:
    """Some text that the model finds likely."""

    @jax.jit
    def draw(text, i):
        logits = predict(params, text[None])[0, i] / TEMPERATURE
        key = jax.random.fold_in(jax.random.key(seed), i)
        return jax.random.categorical(key, logits.at[0].set(-jnp.inf))

    text = np.zeros(1 + WRITTEN, np.int32)  # Every text starts after 0.
    text[1 : len(PROMPT) + 1] = [vocabulary.index(c) for c in PROMPT]
    for i in range(len(PROMPT), WRITTEN):
        text[i + 1] = draw(text, i)
    return "".join(vocabulary[c] for c in text[1:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--speakers", type=int, help="the first of each part alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="federated_plays", help="of the run")
    args = parser.parse_args(argv)

    def first(data: federated.ClientData) -> federated.ClientData:
        return data.select(np.arange(len(data))[: args.speakers])

    def evaluate(data: federated.ClientData) -> Any:
        return federated.evaluate(metrics, first(data), batch_size=256)

    for_split, for_model = jax.random.split(jax.random.key(args.seed))
    plays = federated.datasets.plays(for_split, length=LENGTH)
    train = first(plays.train)
    p = frequencies(train)
    print(f"{train}\nSingle characters have an entropy of {-p @ np.log(p):.3f} nats;")
    print(f"the most frequent is {p.max():.1%} of the text")

    evaluations = {
        "training speakers": evaluate(plays.held_out),
        "validation speakers": evaluate(plays.validation),
    }
    result = federated.run(
        ALGORITHM,
        MODEL.init(for_model, np.zeros((1, LENGTH), np.int32)),
        train,
        rounds=args.rounds,
        cohort_size=min(COHORT, len(train)),
        seed=args.seed,
        evaluate=evaluations,
        eval_every=25,
        folder=args.folder,
    )

    rows = {name: fn(result.params) for name, fn in evaluations.items()}
    rows["test speakers"] = evaluate(plays.test)(result.params)
    sent = sum(np.nansum(result.metrics[name]) for name in ("bytes_down", "bytes_up"))
    rounds = len(result.metrics["round"]) - 1
    print(f"After {rounds} rounds and {sent / 1e6:.0f} MB:\n{table(rows)}")
    print(f"\n{write(result.params, plays.vocabulary, args.seed)}\n")
    print(f"Curves in {Path(args.folder) / 'curves.png'}")


if __name__ == "__main__":
    main()
