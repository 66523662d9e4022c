"""Clients with unequal numbers of examples, for the tests of federated rounds."""

from typing import Any

import jax.numpy as jnp
import numpy as np

N = 12
COUNTS = np.array([3, 1, 7, 2, 30, 5, 1, 9, 2, 31, 4, 6])


MODEL = jnp.array([0.3, -0.2, 0.5])


class Data:
    """Clients with rows of three numbers; remembers which of them are read."""

    def __init__(self, counts=COUNTS):
        self.num_examples, self.ids = np.asarray(counts), range(len(counts))
        self.read = []

    def __len__(self):
        return len(self.num_examples)

    def __getitem__(self, i) -> Any:
        self.read.append(i)
        rng = np.random.default_rng(i)
        return {"x": rng.normal(size=(self.num_examples[i], 3)).astype(np.float32)}

    def select(self, indices):
        raise NotImplementedError


class WithNan(Data):
    bad: Any = (2, 9)

    def __getitem__(self, i):
        x = super().__getitem__(i)["x"]
        x[-1] = np.nan if i in self.bad else x[-1]
        return {"x": x}
