"""Callbacks: functions that see the rounds so far and may end a run."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from federated._metrics import Row, names_of


def early_stopping(
    metric: str,
    *,
    patience: int,
    min_delta: float = 0.0,
    mode: Literal["max", "min"] = "max",
) -> Callable[[Sequence[Row], Any], bool]:
    """Ends a run when a metric has stopped improving.

    What it says depends on the metrics of the rounds so far and on nothing else, so a
    run that was interrupted and resumed stops after the same round.

    Args:
      metric: its name in the rounds' metrics, such as `"test/accuracy"`.
      patience: how many values of it in a row, each of them no better than the best
        before, end the run. A round without one, between two evaluations, does not
        count; NaN is never better.
      min_delta: a value is better if it is so by more than this.
      mode: `"max"` if larger is better, `"min"` if smaller.

    Returns:
      A callback, `(rows, state) -> bool`: true to stop.

    Raises:
      ValueError: if an argument is out of range; from the callback, if there is no such
        metric.

    Example:
      >>> import federated
      >>> stop = federated.early_stopping("test/accuracy", patience=2)
      >>> rows = [
      ...     {"round": 10 * i, "test/accuracy": x}
      ...     for i, x in enumerate([0.1, 0.7, 0.6, 0.7])
      ... ]
      >>> stop(rows[:3], None), stop(rows, None)
      (False, True)
    """
    if patience < 1 or not min_delta >= 0 or mode not in ("max", "min"):
        raise ValueError(
            "federated.early_stopping: patience is at least 1, min_delta at least 0, "
            f'and mode "max" or "min"; they are {patience}, {min_delta} and {mode!r}.'
        )
    sign = 1 if mode == "max" else -1
    # What is known of the first `count` rows, up to `last`: a run that adds one at a
    # time need not be read from its start every time.
    count, values, best, worse = 0, 0, -float("inf"), 0
    last: Row | None = None

    def stop(rows: Sequence[Row], state: Any) -> bool:
        nonlocal count, last, values, best, worse
        if len(rows) < count or (count and rows[count - 1] is not last):
            count, values, best, worse = 0, 0, -float("inf"), 0
        for row in rows[count:]:
            if metric in row:
                values += 1
                value = sign * row[metric]
                if value > best + min_delta:
                    best, worse = value, 0
                else:
                    worse += 1
        count, last = len(rows), rows[-1]
        # Evaluations are in the first row. A round that changed nothing has no metrics.
        if not values and last.get("completed", "loss" in last):
            names = ", ".join(names_of(rows))
            raise ValueError(
                f"federated.early_stopping: there is no metric {metric!r}; there are "
                f"{names}."
            )
        return worse >= patience

    return stop
