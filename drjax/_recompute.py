"""A plan whose rounds make residuals again, rather than keep them."""

import dataclasses
from typing import Any

from drjax._jaxprs import as_fun, dce, debug_info, pick, trace, without_effects
from drjax.plan import MapReduce, Plan, reads_of


def recomputed(plan: Plan) -> Plan:
    """The plan in which no round keeps what only a later one reads (`Plan.recomputed`).

    What a round did is prepended to the later round's body. So a round then reads
    nothing placed but what the program has from elsewhere: its arguments, say.
    """
    stages: list[Any] = []
    makers: dict[int, MapReduce] = {}  # Of placed values.
    for stage in plan.stages:
        stage = _with_inner(stage)
        if isinstance(stage, MapReduce):
            for source in dict.fromkeys(map(makers.get, stage.placed_inputs)):
                if source and (source.placement, source.n) == (
                    stage.placement,
                    stage.n,
                ):
                    stage = _prepend(source, stage)
            makers.update(dict.fromkeys(stage.placed_outputs, stage))
        stages.append(stage)
    read = {*plan.outputs}.union(*map(reads_of, stages))
    stages = [_keep(s, read) if isinstance(s, MapReduce) else s for s in stages]
    return dataclasses.replace(plan, stages=tuple(filter(None, stages)))


def _with_inner(stage: Any) -> Any:
    """A loop or branch with plans that recompute."""
    changed = {}
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if isinstance(value, Plan):
            changed[field.name] = recomputed(value)
        elif field.name == "branches":
            changed[field.name] = tuple(map(recomputed, value))
    return dataclasses.replace(stage, **changed)


def _prepend(source: MapReduce, stage: MapReduce) -> MapReduce:
    """A round that makes itself what it reads of another one's placed results."""
    made = [i in stage.placed_inputs for i in source.placed_outputs]
    again = [*(False for _ in source.reductions), *made]
    first, _ = dce(without_effects(source.body), again, keep_inputs=True)
    results = pick(source.placed_outputs, made)
    server = tuple(dict.fromkeys(source.server_inputs + stage.server_inputs))
    placed = tuple(dict.fromkeys(source.placed_inputs + stage.placed_inputs))
    placed = tuple(i for i in placed if i not in results)
    types = {}
    for s in (source, stage):
        inputs = (*s.server_inputs, *((i, "own") for i in s.placed_inputs))
        types.update(zip(inputs, s.body.in_avals[1:], strict=True))

    def body(index, *args):
        # A value that is handed out and sent whole, too, is an input twice.
        env: dict[Any, Any] = dict(zip(server, args[: len(server)], strict=True))
        keys = [(i, "own") for i in placed]
        env.update(zip(keys, args[len(server) :], strict=True))

        def run(s, jaxpr):
            whole = [env[i] for i in s.server_inputs]
            return as_fun(jaxpr)(
                index, *whole, *(env[i, "own"] for i in s.placed_inputs)
            )

        outs = run(source, first)
        env.update(zip([(i, "own") for i in results], outs, strict=True))
        return run(stage, stage.body)

    avals = [types[i] for i in server] + [types[i, "own"] for i in placed]
    info = debug_info(stage.body)
    jaxpr, consts = trace(body, [stage.body.in_avals[0], *avals], info)
    assert not consts, consts
    return dataclasses.replace(
        stage, body=jaxpr, server_inputs=server, placed_inputs=placed
    ).pruned()


def _keep(stage: MapReduce, read: set[int]) -> MapReduce | None:
    """A round with those placed results only that something reads."""
    stage = stage.pruned([i in read for i in stage.placed_outputs])
    return stage if stage.body.out_avals or stage.body.effects else None
