"""A plan whose rounds make residuals again, rather than keep them."""

import dataclasses
from typing import Any

from drjax._jaxprs import as_fun, debug_info, trace
from drjax.plan import Branch, MapReduce, Plan, Scan, While, reads_of


def recomputed(plan: Plan) -> Plan:
    """The plan in which no round keeps what only a later one reads (`Plan.recomputed`).

    What the rounds before did comes first in a round's body, each once.
    """
    stages: list[Any] = []
    makers: dict[int, MapReduce] = {}  # Of placed values; in order.
    for stage in plan.stages:
        if isinstance(stage, MapReduce):
            stages.append(_after(_sources(stage, makers), stage))
            if not stage.body.effects:  # They are not to happen again.
                makers.update(dict.fromkeys(stage.placed_outputs, stage))
        else:
            stages.append(_with_inner(stage))
    read = {*plan.outputs}.union(*map(reads_of, stages))
    stages = [_keep(s, read) if isinstance(s, MapReduce) else s for s in stages]
    return dataclasses.replace(plan, stages=tuple(filter(None, stages)))


def _with_inner(stage: Any) -> Any:
    """A loop or branch with plans that recompute."""
    match stage:
        case Scan():
            return dataclasses.replace(stage, body=recomputed(stage.body))
        case While():
            plans = recomputed(stage.predicate), recomputed(stage.body)
            return dataclasses.replace(stage, predicate=plans[0], body=plans[1])
        case Branch():
            plans = tuple(map(recomputed, stage.branches))
            return dataclasses.replace(stage, branches=plans)
        case _:
            return stage


def _sources(stage: MapReduce, makers: dict[int, MapReduce]) -> list[MapReduce]:
    """The rounds that make what a round reads, and what these read, in order."""
    found: set[int] = set()
    todo = [*stage.placed_inputs]
    while todo:
        source = makers.get(todo.pop())
        is_same = source and (source.placement, source.n) == (stage.placement, stage.n)
        if source and is_same and id(source) not in found:
            found.add(id(source))
            todo += source.placed_inputs
    sources = dict.fromkeys(makers.values())
    return [source for source in sources if id(source) in found]


def _after(sources: list[MapReduce], stage: MapReduce) -> MapReduce:
    """A round that makes itself what it reads of other rounds' placed results."""
    if not sources:
        return stage
    parts = [*sources, stage]
    made = {i for source in sources for i in source.placed_outputs}
    server: dict[int, Any] = {}  # The types of the inputs.
    placed: dict[int, Any] = {}
    for part in parts:
        _, *avals = part.body.in_avals
        n = len(part.server_inputs)
        server.update(zip(part.server_inputs, avals[:n], strict=True))
        own = zip(part.placed_inputs, avals[n:], strict=True)
        placed.update((i, aval) for i, aval in own if i not in made)

    def body(index, *args):
        whole = dict(zip(server, args[: len(server)], strict=True))
        own = dict(zip(placed, args[len(server) :], strict=True))
        outs: list[Any] = []
        for part in parts:
            inputs = [whole[i] for i in part.server_inputs]
            inputs += [own[i] for i in part.placed_inputs]
            outs = as_fun(part.body)(index, *inputs)
            reduced = len(part.reductions)
            own.update(zip(part.placed_outputs, outs[reduced:], strict=True))
        return outs

    avals = [stage.body.in_avals[0], *server.values(), *placed.values()]
    jaxpr, consts = trace(body, avals, debug_info(stage.body))
    assert not consts, consts
    return dataclasses.replace(
        stage, body=jaxpr, server_inputs=tuple(server), placed_inputs=tuple(placed)
    ).pruned()


def _keep(stage: MapReduce, read: set[int]) -> MapReduce | None:
    """A round with those placed results only that something reads."""
    stage = stage.pruned([i in read for i in stage.placed_outputs])
    return stage if stage.body.out_avals or stage.body.effects else None
