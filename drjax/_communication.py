"""What an element receives and sends in a plan, in bytes."""

import math

from drjax._describe import of_round
from drjax.plan import Branch, MapReduce, Plan, Scan, While


def communication(plan: Plan, placement: str) -> tuple[int | float, int | float]:
    """See `Plan.communication`."""
    names = sorted({name for name, _ in plan.placements})
    if placement not in names:
        raise ValueError(
            f"drjax.Plan.communication: there is no placement {placement!r} in the "
            f"plan, which has {names}. One inside a mapped function is in its body."
        )
    return _bytes(plan, placement)


def _bytes(plan: Plan, placement: str) -> tuple[int | float, int | float]:
    down = up = 0
    for stage in plan.stages:
        match stage:
            case MapReduce() if stage.placement == placement:
                part = of_round(plan, stage)
                more = part.down.bytes + part.scattered.bytes, part.up.bytes
            case Scan():
                one = _bytes(stage.body, placement)
                more = one[0] * stage.length, one[1] * stage.length
            case While():
                bodies = (stage.predicate, stage.body)
                any_ = any(sum(_bytes(body, placement)) for body in bodies)
                more = (math.nan, math.nan) if any_ else (0, 0)
            case Branch():
                parts = [_bytes(branch, placement) for branch in stage.branches]
                more = max(parts, key=lambda x: (math.isnan(sum(x)), sum(x)))
            case _:
                more = 0, 0
        down, up = down + more[0], up + more[1]
    return down, up
