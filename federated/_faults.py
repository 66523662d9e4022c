"""What goes wrong in a round: clients that are lost, late, or send no numbers."""

import math
from typing import NamedTuple

import numpy as np

from federated._sampling import generator


class Faults(NamedTuple):
    """Clients that do not report in time, as a function of the seed and the round.

    More clients than the cohort needs may be asked; the round takes those who report
    first. Who takes part is settled before the round counts: a client that is lost in
    any stage is in none of it, so that a value and its gradient have the same
    denominators.

    Args:
      dropout: the probability that a client is lost on the way.
      nan: the probability that what it sends is not finite, and so is refused.
      over_selection: how many more clients are asked, as a fraction of the cohort.
      deadline: when the round ends, in times of what the median client takes.
      spread: the standard deviation of the logarithm of the times they take.

    Example:
      >>> import federated
      >>> faults = federated.Faults(dropout=0.1, over_selection=0.3, deadline=2.0)
      >>> faults.asked(10)
      13
    """

    dropout: float = 0.0
    nan: float = 0.0
    over_selection: float = 0.0
    deadline: float = math.inf
    spread: float = 0.5

    def asked(self, cohort_size: int) -> int:
        """How many clients are asked."""
        return at_least(cohort_size * (1 + self.over_selection))

    def reports(self, seed: int, round: int, asked: int, cohort_size: int) -> "Reports":
        """Who reports of those asked, by position."""
        rng = generator("faults", seed, round)
        is_lost = rng.random(asked) < self.dropout
        is_nan = rng.random(asked) < self.nan
        times = rng.lognormal(0.0, self.spread, asked)
        order = np.argsort(times, kind="stable")
        arrived = order[~is_lost[order] & (times[order] <= self.deadline)]
        taken = arrived[~is_nan[arrived]][:cohort_size]
        # The server looks at reports as they come, until it has enough.
        end = times[taken[-1]] if len(taken) == cohort_size else math.inf
        rejected = arrived[is_nan[arrived] & (times[arrived] < end)]
        dropped = int(is_lost.sum())
        late = asked - dropped - len(taken) - len(rejected)
        return Reports(np.sort(taken), dropped, late, len(rejected))


class Reports(NamedTuple):
    """Who has reported.

    Args:
      taken: int, the positions of those who are in the round, in order.
      dropped, late, rejected: how many others were lost, came too late or were not
        needed any more, and sent what is not finite.
    """

    taken: np.ndarray
    dropped: int
    late: int
    rejected: int


def at_least(x: float) -> int:
    """The whole number from `x` on, which may have been rounded up itself."""
    return math.ceil(x - 1e-9)


def check(faults: Faults, cohort_size: int, min_fraction: float) -> None:
    """Refuses what makes no sense, before the first round."""
    for name in ("dropout", "nan"):
        if not 0 <= getattr(faults, name) <= 1:
            raise ValueError(
                f"federated.Faults: {name} is a probability, but got "
                f"{getattr(faults, name)}."
            )
    for name in ("over_selection", "deadline", "spread"):
        value = getattr(faults, name)
        if not value >= 0 or (name != "deadline" and value == math.inf):
            raise ValueError(
                f"federated.Faults: {name} is not negative"
                f"{', and finite' if name != 'deadline' else ''}, but got {value}."
            )
    may_lose = faults.dropout or faults.nan or faults.deadline < math.inf
    if may_lose and min_fraction == 1 and faults.asked(cohort_size) == cohort_size:
        raise ValueError(
            "federated.run: clients may be lost, as faults say, but min_fraction is 1 "
            "and no more clients are asked than a cohort has: each round with a loss "
            "would count for nothing. Give a lower min_fraction, or over_selection."
        )
