"""The text of Shakespeare's plays for a language model: replicas' parts, and held out.

A text is an int32 array of characters by number; 0 stands before what a speaker says.
"""

from typing import Any

import jax
import numpy as np

from federated import datasets

HELD_OUT = 256  # Examples.


def load(replicas: int) -> Any:
    """The texts of replicas, that of validation, that of the test, and the characters.

    Speakers are dealt out to replicas, so that each has a part of its own; those of
    validation and test are others.
    """
    plays = datasets.plays(jax.random.key(0))

    def speakers(part: Any) -> list[np.ndarray]:
        lines = [part[i]["y"] for i in range(len(part))]
        # 0 also fills up the last piece of what each says.
        return [np.r_[0, x[x > 0]].astype(np.int32) for x in lines]

    train = speakers(plays.train)
    texts = [np.concatenate(train[i::replicas]) for i in range(replicas)]
    held_out = (speakers(part) for part in (plays.validation, plays.test))
    return texts, *map(np.concatenate, held_out), plays.vocabulary


def drawn(text: np.ndarray, shape: Any, *seed: int) -> np.ndarray:
    """Pieces from anywhere in a text, `shape` in all; the last axis is along it."""
    *size, length = shape
    starts = np.random.default_rng(seed).integers(len(text) - length + 1, size=size)
    return text[starts[..., None] + np.arange(length)]


def spread(text: np.ndarray, length: int) -> np.ndarray:
    """Pieces from all over a text, `[HELD_OUT, length + 1]`."""
    starts = np.linspace(0, len(text) - length - 1, HELD_OUT).astype(int)
    return text[starts[:, None] + np.arange(length + 1)]


def entropy(texts: Any) -> float:
    """Of single characters, in nats."""
    counts = np.bincount(np.concatenate(texts))[1:]
    p = counts[counts > 0] / counts.sum()
    return float(-p @ np.log(p))
