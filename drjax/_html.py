"""A plan as a picture: the server on the left, the elements on the right."""

from html import escape
from typing import Any

from drjax._describe import Values, amount, of_round, title, work
from drjax._flops import flops
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While

_STYLE = """
.drjax-plan { font: 14px/1.4 system-ui, sans-serif; max-width: 60em; overflow-x: auto;
  padding-bottom: 1em; }
.drjax-plan > div { min-width: 48em; }
.drjax-plan .row { display: grid; grid-template-columns: 15em 1fr 16em; }
.drjax-plan .lane { display: flex; justify-content: center; align-items: center;
  background: linear-gradient(#8886 0 0) center / 2px 100% no-repeat; }
.drjax-plan .card { border: 1px solid #8888; border-radius: 6px; padding: .5em .8em;
  margin: .4em 0; background: #dbe9fb; color: #123; width: 100%; box-sizing: border-box;
  overflow-wrap: anywhere; }
.drjax-plan .elements { background: #fdebcf; width: calc(100% - 12px);
  margin: .5em 12px .9em 0;
  box-shadow: 5px 5px 0 -1px #fdebcf, 5px 5px 0 0 #8888,
              10px 10px 0 -1px #fdebcf, 10px 10px 0 0 #8888; }
.drjax-plan .wire { display: flex; flex-direction: column; justify-content: center;
  gap: .7em; padding: 0 .6em; text-align: center; overflow-wrap: anywhere; }
.drjax-plan .arrow { border-bottom: 2px solid; position: relative; padding: 0 12px; }
.drjax-plan .down { color: #2166ac; } .drjax-plan .up { color: #b35806; }
.drjax-plan .arrow::after { content: ""; position: absolute; bottom: -6px;
  border: 5px solid transparent; }
.drjax-plan .down::after { right: -5px; border-left-color: currentColor; }
.drjax-plan .up::after { left: -5px; border-right-color: currentColor; }
.drjax-plan .flow { border: 2px dashed #8888; border-radius: 8px; padding: .3em .6em;
  margin: .5em 0; }
.drjax-plan h4 { margin: .3em 0; font-size: 1em; }
.drjax-plan small { display: block; opacity: .85; }
.drjax-plan summary { font-size: 12.5px; }
.drjax-plan pre { font-size: 11px; overflow: auto; max-height: 30em; }
"""


def page(plan: Plan) -> str:
    """A page with the picture, which needs nothing else."""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        "<title>Plan</title>\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<body>\n{figure(plan)}\n</body>\n</html>\n"
    )


def figure(plan: Plan) -> str:
    """The picture, for a notebook."""
    header = '<div class="row"><b>Server</b><b></b><b>Elements</b></div>'
    return (
        f'<div class="drjax-plan">\n<style>{_STYLE}</style>\n{header}\n'
        f"{_stages(plan)}\n</div>"
    )


def _stages(plan: Plan) -> str:
    stages = [_stage(plan, stage) for stage in plan.stages]
    return "\n".join(stages) or "<small>nothing to do</small>"


def _stage(plan: Plan, stage: Any) -> str:
    head = escape(title(stage))
    match stage:
        case Server():
            count = work(stage.jaxpr, flops(stage.jaxpr))
            card = _card("", "Server work", count, stage.jaxpr)
            return _row(card, "", "")
        case MapReduce():
            return _round(plan, stage)
        case Scan():
            return _flow(head, _stages(stage.body))
        case While():
            do = _stages(stage.body)
            return _flow(head, _stages(stage.predicate) + "\n<h4>do</h4>\n" + do)
        case Branch():
            branches = enumerate(map(_stages, stage.branches))
            inner = "\n".join(
                f"<h4>branch {i}</h4>\n{branch}" for i, branch in branches
            )
            return _flow(head, inner)
        case _:
            raise AssertionError(stage)


def _round(plan: Plan, stage: MapReduce) -> str:
    r = of_round(plan, stage)
    wires = [
        _arrow(direction, values, stage.n)
        for direction, values in (("down", r.down), ("down", r.scattered), ("up", r.up))
        if values.types
    ]
    notes = [
        f"{values.title}: {values} ({amount(values.bytes, 'B')})"
        for values in (r.own, r.kept_before, r.kept, r.results)
        if values.types
    ]
    head = f"{stage.n} × {stage.placement}"
    card = _card("elements", head, work(stage.body, r.flops), stage.body, notes)
    return _row('<div class="lane"></div>', "\n".join(wires), card)


def _row(server: str, wire: str, elements: str) -> str:
    return (
        f'<div class="row">\n<div class="lane">{server}</div>\n'
        f'<div class="wire">{wire}</div>\n<div>{elements}</div>\n</div>'
    )


def _arrow(direction: str, values: Values, n: int) -> str:
    each, in_all = amount(values.bytes, "B"), amount(n * values.bytes, "B")
    return (
        f'<div class="arrow {direction}">{escape(values.title)}: {each}'
        f"<small>{escape(str(values))}; {in_all} in all</small></div>"
    )


def _card(kind: str, head: str, count: str, jaxpr: Any, notes: Any = ()) -> str:
    rows = "".join(f"<small>{escape(note)}</small>" for note in notes)
    lines = str(jaxpr).splitlines()
    if len(lines) > 200:
        lines = [*lines[:200], f"... and {len(lines) - 200} lines more"]
    return (
        f'<div class="card {kind}"><b>{escape(head)}</b>{rows}'
        f"<details><summary>{escape(count)}</summary>"
        f"<pre>{escape(chr(10).join(lines))}</pre></details></div>"
    )


def _flow(head: str, inner: str) -> str:
    return f'<div class="flow"><h4>{head}</h4>\n{inner}\n</div>'
