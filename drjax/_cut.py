"""Cuts a jaxpr into a plan: server work, and rounds over a placement.

Two questions are settled for each value of a jaxpr without calls:

  - Is it placed, over which placement, and at which axis? Operators say so of their
    operands and results. From there it is followed through arithmetic by the rules of
    `_rules.py`, forwards, and backwards to the arguments that are placed.
  - In which round is it known? The server knows what a round reduces after it. A placed
    value belongs to the round of the latest server value that it needs.

All that the elements do in one round is one body. Stages are built from the last one
back, so that each holds what is asked of it and no more.
"""

from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Var, mapped_aval

from drjax._compat import ClosedJaxpr
from drjax._element import Element
from drjax._equations import OF_PLACEMENT, PlanError, described, is_repeated
from drjax._jaxprs import is_var, trace
from drjax._map import map_p
from drjax._placed import Facts, communicates
from drjax._ports import operand_bounds
from drjax._primitives import placement_size_p
from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While

_OF_LITERALS = {"broadcast_in_dim", "convert_element_type", "iota"}


class Cutter:
    """Builds the stages of one plan."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.invars, self.outvars, self.eqns, self.constants, _ = facts.straight
        self.at = facts.at
        self.where = {**facts.scattered, **facts.at}
        self.producer = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.used = set(filter(is_var, self.outvars))
        self.used.update(v for e in self.eqns for v in filter(is_var, e.invars))
        # How many elements there are, the engine says.
        sizes = {
            eqn.outvars[0]: (eqn.params["placement"], eqn.params["n"])
            for eqn in self.eqns
            if eqn.primitive is placement_size_p
        }
        for v in sizes:
            del self.producer[v]
        # Of each equation the round, and what it is part of there: the work over a
        # placement (name and size), a loop or branch (position), the server's (None).
        self.stages: list[tuple[int, Any]] = []
        after_effects = 0
        for i, eqn in enumerate(self.eqns):
            part = self._part(i, eqn)
            r = max(map(self._ready, filter(is_var, eqn.invars)), default=0)
            if eqn.effects and not isinstance(part, tuple):  # The server's, in order.
                r = max(r, after_effects)
                after_effects = r + isinstance(part, int)
            self.stages.append((r, part))
        self._delay_server_work()
        # Of variables, and of literals where a stage needs one.
        self.numbers: dict[Any, int] = {}
        self.avals: list[Any] = []
        self.values: dict[int, Any] = {}
        self._ids([*self.invars, *self.constants, *sizes, *self.producer])
        self.sizes = {self.numbers[v]: of for v, of in sizes.items()}
        for v, value in self.constants.items():
            self.values[self.numbers[v]] = value

    def _part(self, i: int, eqn: Any) -> Any:
        if eqn.primitive is map_p or eqn.primitive in OF_PLACEMENT:
            return eqn.params["placement"], eqn.params["n"]
        variables = filter(is_var, [*eqn.outvars, *eqn.invars])
        of = next((self.at[v][:2] for v in variables if v in self.at), None)
        if inner := self.facts.flows.get(i):
            placed = all(v in self.at for v in eqn.outvars if v in self.used)
            return i if not placed or any(map(communicates, inner)) else of or i
        return of if i in self.facts.rules or self._is_repeated(i) else None

    def _ready(self, v: Var) -> int:
        """The first round that can use a value."""
        if v not in self.producer:
            return 0
        r, part = self.stages[self.producer[v]]
        is_reduced = isinstance(part, tuple) and v not in self.at
        return r + (is_reduced or isinstance(part, int))

    def _delay_server_work(self) -> None:
        """Moves it to the round before which it is used first, so that it is together.

        The server's part of a round comes before the elements'.
        """
        used: dict[Var, int] = {}
        for i, eqn in reversed([*enumerate(self.eqns)]):
            r, part = self.stages[i]
            users = [used[v] for v in eqn.outvars if v in used]
            if part is None and users and not eqn.effects:
                r = min(users)
                self.stages[i] = r, None
            for v in filter(is_var, eqn.invars):
                used[v] = min(r, used.get(v, r))

    def _is_repeated(self, i: int) -> bool:
        """Whether an equation makes a placed value of server values, or of none."""
        eqn = self.eqns[i]
        return any(v in self.at and is_repeated(eqn, self.at[v]) for v in eqn.outvars)

    def _is_literal(self, i: int | None) -> bool:
        """Whether an equation only gives a literal another type."""
        if i is None or self.eqns[i].primitive.name not in _OF_LITERALS:
            return False
        operands = filter(is_var, self.eqns[i].invars)
        return all(self._is_literal(self.producer.get(v)) for v in operands)

    def plan(self, in_tree: Any = None, out_tree: Any = None) -> Plan:
        asked: dict[Any, dict[Var, None]] = {}  # By stage; ordered sets.

        def ask(variables):
            for v in variables:
                if v in self.producer:
                    asked.setdefault(self.stages[self.producer[v]], {})[v] = None

        ask(filter(is_var, self.outvars))
        effects = {s for e, s in zip(self.eqns, self.stages, strict=True) if e.effects}
        last = max((r for r, _ in self.stages), default=0)
        flows = [part for _, part in self.stages if isinstance(part, int)]
        placements = sorted({where[:2] for where in self.where.values()})
        stages: list[Any] = []
        for r in range(last, -1, -1):
            for part in [*reversed(flows), *placements, None]:
                if (r, part) not in asked and (r, part) not in effects:
                    continue
                wanted = [*asked.get((r, part), ())]
                if part is None:
                    stage, reads = self._server(r, wanted)
                elif isinstance(part, int):
                    stage, reads = self._flow(part)
                else:
                    stage, reads = self._map_reduce(r, part, wanted)
                stages.append(stage)
                ask(reads)
        outputs = self._ids(self.outvars)
        return Plan(
            stages=tuple(reversed(stages)),
            avals=tuple(self.avals),
            at={self.numbers[v]: where for v, where in self.where.items()},
            scattered=frozenset(self._ids(self.facts.scattered)),
            inputs=self._ids(self.invars),
            constants=self.values,
            sizes=self.sizes,
            outputs=outputs,
            in_tree=in_tree,
            out_tree=out_tree,
        )

    def _ids(self, atoms: Any) -> tuple[int, ...]:
        return tuple(map(self._id, atoms))

    def _id(self, atom: Any) -> int:
        key = atom if is_var(atom) else id(atom)
        if key not in self.numbers:
            self.numbers[key] = len(self.avals)
            self.avals.append(atom.aval)
            if not is_var(atom):
                self.values[self.numbers[key]] = atom.val
        return self.numbers[key]

    def _needed(self, stage: Any, wanted: list[Var]) -> tuple[list[int], list[Var]]:
        """The equations that a stage runs for what is wanted, and what it reads.

        A round makes again what is the same for all elements, rather than keep it.
        """
        needed: set[int] = set()
        reads: dict[Var, None] = {}  # An ordered set.
        todo = list(wanted)
        for i, eqn in enumerate(self.eqns):
            if eqn.effects and self.stages[i] == stage:
                needed.add(i)
                todo += filter(is_var, eqn.invars)
        while todo:
            v = todo.pop()
            i = self.producer.get(v)
            if i is None or not (
                self.stages[i] == stage
                or (
                    isinstance(stage[1], tuple)
                    and (self._is_repeated(i) or self._is_literal(i))
                )
            ):
                reads[v] = None
            elif i not in needed:
                needed.add(i)
                todo += filter(is_var, self.eqns[i].invars)
        return sorted(needed), [*reads]

    def _uses(self, needed: list[int]) -> tuple[set[Var], set[Var]]:
        """What the elements get of the values in some equations: all, or a part."""
        uses: tuple[set[Var], set[Var]] = set(), set()
        for i in needed:
            eqn = self.eqns[i]
            own = self.facts.own_operands(i)
            for v, is_own in zip(eqn.invars, own, strict=True):
                if is_var(v):
                    uses[is_own].add(v)
        return uses

    def _server(self, r: int, wanted: list[Var]) -> tuple[Server, list[Var]]:
        needed, reads = self._needed((r, None), wanted)
        eqns = [self.eqns[i] for i in needed]
        template = self.facts.straight.template
        jaxpr = template.replace(
            constvars=[],
            invars=reads,
            outvars=wanted,
            eqns=eqns,
            effects=set().union(*(eqn.effects for eqn in eqns)),
            debug_info=template.debug_info.with_unknown_names(),
        )
        stage = Server(ClosedJaxpr(jaxpr, ()), self._ids(reads), self._ids(wanted))
        return stage, reads

    def _map_reduce(
        self, r: int, part: tuple[str, int], wanted: list[Var]
    ) -> tuple[MapReduce, list[Var]]:
        needed, reads = self._needed((r, part), wanted)
        wholes, owns = self._uses(needed)
        server = [v for v in reads if v in wholes]
        placed = [v for v in reads if v in owns]
        outs = [v for v in wanted if v in self.at]
        sums = [v for v in wanted if v not in self.at]
        operation: dict[Any, Any] = {}

        def body(index, *args):
            env = Element(self.facts, index)
            for v, x in zip(server, args[: len(server)], strict=True):
                env.write(v, x)
            for v, x in zip(placed, args[len(server) :], strict=True):
                env.write_own(v, x)
            for i in needed:
                operations = env.run(i)
                operation.update(zip(self.eqns[i].outvars, operations, strict=True))
            return [*map(env.read_whole, sums), *map(env.read_own, outs)]

        info = self.facts.straight.template.debug_info.with_unknown_names()
        placement, n = part
        avals = [
            ShapedArray((), jnp.dtype("int32")),
            *(v.aval for v in server),
            *(mapped_aval(n, self.where[v].axis, v.aval) for v in placed),
        ]
        jaxpr, consts = trace(body, avals, info)
        assert not consts, consts
        stage = MapReduce(
            placement=placement,
            n=n,
            body=jaxpr,
            server_inputs=self._ids(server),
            placed_inputs=self._ids(placed),
            reductions=tuple((operation[v], self.numbers[v]) for v in sums),
            placed_outputs=self._ids(outs),
        ).pruned()
        used = {*stage.server_inputs, *stage.placed_inputs}
        return stage, [v for v in reads if self.numbers[v] in used]

    def _flow(self, i: int) -> tuple[Any, list[Var]]:
        """A loop or branch that communicates; its jaxprs are plans of their own."""
        eqn = self.eqns[i]
        plans = [Cutter(facts).plan() for facts in self.facts.flows[i]]
        ids, results = self._ids(eqn.invars), self._ids(eqn.outvars)
        if eqn.primitive.name == "scan":
            a, b = operand_bounds(eqn)
            stage: Any = Scan(
                body=plans[0],
                length=eqn.params["length"],
                reverse=eqn.params["reverse"],
                constants=ids[:a],
                init=ids[a:b],
                xs=ids[b:],
                carry=results[: b - a],
                ys=results[b - a :],
            )
        elif eqn.primitive.name == "while":
            a, b = operand_bounds(eqn)
            if eqn.params["cond_jaxpr"].out_avals[0].shape:
                raise PlanError(
                    f"drjax.make_plan: {described(eqn)} is a loop of each of several "
                    "with arithmetic that combines the elements. Combine them with "
                    "drjax.reduce_*."
                )
            stage = While(
                predicate=plans[0],
                body=plans[1],
                predicate_constants=ids[:a],
                body_constants=ids[a:b],
                init=ids[b:],
                carry=results,
            )
        else:
            stage = Branch(tuple(plans), ids[0], ids[1:], results)
        return stage, list(filter(is_var, eqn.invars))
