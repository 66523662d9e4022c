"""Random programs: a plan is made of each, and computes what the program does.

A program is a list of steps, each the name of one in `STEPS` and what it was given:
numbers of earlier values, axes, names. Arguments come first. A step is one function; to
make a program it is run on types and its choices are drawn, later they are replayed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, every, gradient, is_float, of_floats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import drjax


@dataclasses.dataclass
class Value:
    x: Any
    axis: int | None = None  # Of the elements; None for a server value.
    is_made: bool = False  # A server value of no argument, but by a reduction.

    @property
    def led(self):
        assert self.axis is not None
        return jnp.moveaxis(self.x, self.axis, 0)

    def __str__(self):
        return f"{self.x.dtype}{list(self.x.shape)}, elements on axis {self.axis}"


def arguments(n):
    """Of the server; then placed; with sizes that may be n, too."""
    axes = [((), None), ((2,), None), ((5,), None), ((n,), 0), ((n, n), 0)]
    args, rng = [Value(jax.random.key(1))], np.random.default_rng(0)
    for shape, axis in [*axes, ((n, 3, 2), 0), ((5, n), 1)]:
        args.append(Value(jnp.asarray(rng.normal(size=shape), "float32"), axis))
    return [*args, Value(jnp.asarray(rng.integers(0, 4, (n, 2))), 0)]


class Impossible(Exception):
    """A step for which there is nothing to choose."""


class Step:
    """The values so far, and choices among them: drawn, or those of a step."""

    def __init__(self, n, values, chosen=(), draw=None, reverse=True):
        self.n, self.values, self.draw, self.reverse = n, [*values], draw, reverse
        self.given, self.made = iter(chosen), []

    def choose(self, options, drawn=None):
        if self.draw is None:
            return next(self.given)
        if drawn is None:
            if not (options := [*options]):
                raise Impossible
            drawn = self.draw(st.sampled_from(options))
        self.made.append(drawn)
        return drawn

    def value(self, accept=lambda v: True):
        """One of the last six that will do."""
        found = [i for i, v in enumerate(self.values) if i and accept(v)]
        return self.values[self.choose(found[:-7:-1])]

    def number(self):
        return self.value(lambda v: is_float(v.x))

    def server(self, accept=lambda v: True):
        return self.value(lambda v: v.axis is None and accept(v))

    def placed(self, accept=lambda v: True):
        return self.value(lambda v: v.axis is not None and accept(v))

    def floats(self):
        return self.placed(lambda v: is_float(v.x))

    def other(self, v):
        return self.choose(k for k in range(v.x.ndim) if k != v.axis)

    def block(self, *carry):
        """Steps after those so far, and `carry`, for a loop, branch or function."""
        values = [*self.values, *carry]
        return self.choose((), self.draw and steps(self, values, 3, BASIC))

    def run(self, block, *carry):
        values = [*self.values, *carry]
        for name, *chosen in block:
            values.append(STEPS[name](Step(self.n, values, chosen)))
        return values

    def like(self, v, block, *carry):
        """Which of a block's values, the last if possible, is of the type of `v`."""
        kinds = [
            (w.axis, w.x.shape, w.x.dtype)
            for w in (self.run(block, *carry) if self.draw else ())
        ]
        same = [i for i, t in enumerate(kinds) if t == (v.axis, v.x.shape, v.x.dtype)]
        return self.choose((), same[-1] if same else None)


def steps(outer, values, size, names):
    made = []
    for _ in range(size):
        name = outer.draw(st.sampled_from(["nothing", *names]))
        if name == "nothing" or (outer.reverse and name in ("ordered", "while")):
            continue
        step = Step(outer.n, values, (), outer.draw, outer.reverse)
        try:
            value = STEPS[name](step)
        except Impossible:
            continue
        if value.x.ndim <= 4 and value.x.size <= 400:
            values.append(value)
            made.append((name, *step.made))
    return made


#
# Steps: operators, arithmetic, and changes of shape.
#
BODIES = [
    lambda x, y, s: jnp.tanh(x * jnp.mean(y) + jnp.sum(s)),
    lambda x, y, s: jnp.sin(jnp.sum(x)) * y,
    lambda x, y, s: x * y.mean() > 0.137,
    lambda x, y, s: jnp.sum(x > 0.137) + jnp.arange(2),
    lambda x, y, s: lax.fori_loop(0, 2, lambda i, c: jnp.sin(c) + s.mean(), 1.0 * x),
    lambda x, y, s: lax.cond(jnp.mean(x) > 0.137, jnp.sin, jnp.cos, 1.0 * y),
    lambda x, y, s: jnp.tanh(jnp.multiply.outer(jnp.mean(x), s)),
]
UNARY = {
    "sin": jnp.sin,
    "relu": jax.nn.relu,  # A custom_jvp.
    "where": lambda x: jnp.where(x > 0.137, x, -0.3),
    "float": lambda x: jnp.float32(x),
    "positive": lambda x: x > 0.137,
    "checkpoint": jax.checkpoint(lambda x: jnp.tanh(jnp.cos(x))),
}
BINARY = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: jnp.tanh(x * y),
    "max": jnp.maximum,
    "where": lambda x, y: jnp.where(x > 0.137, x, y),
}
ALONG = {
    "reverse": jnp.flip,
    "stride": lambda x, k: x[tuple([slice(None)] * k + [slice(None, None, 2)])],
    "twice": lambda x, k: jnp.concatenate([x, jnp.sin(x)], axis=k),
    "pad": lambda x, k: jnp.pad(x, [(int(k == d), 0) for d in range(x.ndim)]),
    "cumsum": jnp.cumsum,
    "split": lambda x, k: jnp.split(x, [1], axis=k)[0],
    "roll": lambda x, k: jnp.roll(x, 1, axis=k),
    "tile": lambda x, k: jnp.tile(x, [1 + (k == d) for d in range(x.ndim)]),
}
OVER = {
    **{"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "all": jnp.all},
    "std": lambda x, k: jnp.sqrt(jnp.var(x, k) + 0.1),
}


def map_(e):
    body, x, y, s = e.choose(range(len(BODIES))), e.placed(), e.placed(), e.server()
    fn = BODIES[body]
    return Value(drjax.map_fn(lambda x, y: fn(x, y, s.x), (x.led, y.led)), 0)


def reduce_(e):
    how, v = e.choose(["sum", "mean", "max", "min", "weighted_mean"]), e.placed()
    weights = [e.placed(lambda w: w.x.ndim == 1).x ** 2 + 0.1] if how[0] == "w" else []
    return Value(getattr(drjax, f"reduce_{how}")(v.led, *weights), None, True)


def keys(e):
    keys = jax.random.split(e.values[0].x, e.n)
    if e.choose([True, False]):
        return Value(drjax.map_fn(lambda k: jax.random.normal(k, (2,)), keys), 0)
    return Value(jax.vmap(jax.random.normal)(keys), 0)


def unary(e):
    name, v = e.choose(UNARY), e.value()
    return Value(UNARY[name](v.x), v.axis, v.is_made)


def binary(e):
    name, v = e.choose(BINARY), e.placed()
    w = e.placed(lambda w: w.led.shape[1:] in (v.led.shape[1:], ()))
    y = w.led.reshape(e.n, *(w.led.shape[1:] or [1] * (v.x.ndim - 1)))
    return Value(BINARY[name](v.x, jnp.moveaxis(y, 0, v.axis)), v.axis)


def with_server(e):
    name, v = e.choose(BINARY), e.placed()
    s = e.server(lambda s: s.x.shape in (v.led.shape[1:], ())).x
    pair = (jnp.expand_dims(s, v.axis) if s.ndim else s, v.x)
    return Value(BINARY[name](*pair[:: e.choose([1, -1])]), v.axis)


def with_constant(e):
    v, how = e.placed(), e.choose(["iota", "numpy", "full"])
    c = np.cos(np.arange(v.x.size, dtype="f")).reshape(v.x.shape)
    if how != "full":
        c = jnp.arange(e.n) if how == "iota" else np.arange(e.n, dtype="f")
        c = c.reshape([-1 if k == v.axis else 1 for k in range(v.x.ndim)])
    return Value(v.x + c, v.axis)


def hand_out(e):
    """A server value, a part for each element: one that no argument goes into."""
    s = e.server(lambda s: s.is_made and e.n in s.x.shape)
    v = e.placed(lambda v: v.x.shape == s.x.shape)
    return Value(BINARY[e.choose(BINARY)](v.x, s.x), v.axis)


def transpose(e):
    v = e.placed()
    k = e.choose(range(v.x.ndim))
    order = [*range(k, v.x.ndim), *range(k)]
    return Value(v.x.transpose(order), order.index(v.axis))


def expand(e):
    v = e.placed()
    k = e.choose(range(v.x.ndim + 1))
    x = jnp.expand_dims(v.x, k)
    x = jnp.concatenate([x, 0.5 * x], axis=k) if e.choose([True, False]) else x
    return Value(x, v.axis + (k <= v.axis))


def flatten(e):
    v = e.placed()
    before = [-1] if v.axis else []
    after = [int(np.prod(v.x.shape[v.axis + 1 :]))] if v.axis + 1 < v.x.ndim else []
    return Value(v.x.reshape(*before, e.n, *after, *e.choose([[], [1]])), len(before))


def along(e):
    name, v = e.choose(ALONG), e.placed()
    return Value(ALONG[name](v.x, e.other(v)), v.axis)


def ordered(e):
    fn, v = e.choose(["sort", "argsort", "cumprod"]), e.floats()
    return Value(getattr(jnp, fn)(v.x, axis=e.other(v)), v.axis)


def over(e):
    name, v = e.choose(OVER), e.placed()
    k = e.other(v)
    return Value(OVER[name](v.x, k), v.axis - (k < v.axis))


def over_elements(e):
    """Over the elements, and over all axes as well."""
    name, v = e.choose(OVER), e.placed()
    return Value(OVER[name](v.x, v.axis if e.choose([0, 1]) else None), None, True)


def einsum(e):
    v, w = [e.floats(), e.number()][:: e.choose([1, -1])]
    new, names = iter("abcdefgh"), []
    for x in (v, w):
        taken = dict(zip(names[0] if names else [], v.x.shape, strict=bool(names)))
        taken.pop("n", None)
        names.append([])
        for k, size in enumerate(x.x.shape):
            free = [a for a in taken if taken[a] == size and a not in names[-1]]
            name = "n" if k == x.axis else e.choose([*free, next(new)])
            names[-1].append(name)
    out = [a for a in sorted({*names[0], *names[1]}) if e.choose([True, False])]
    x = jnp.einsum(f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}", v.x, w.x)
    return Value(x, out.index("n") if "n" in out else None)


#
# Loops, branches and functions, around other steps.
#
def bounded(x, y):
    return jnp.tanh(x + y) if is_float(x) else y


def scan(e):
    """Carries a value, and perhaps goes through the rows of another one."""
    v, w = e.value(), e.floats()
    over, axes = e.other(w) if e.choose([True, False]) else None, []
    rows = w.x[None] if over is None else jnp.moveaxis(w.x, over, 0)
    axis = w.axis if over is None else w.axis - (over < w.axis)
    block = e.block(v, Value(rows[0], axis) if e.draw else None)
    k = e.like(v, block, v, Value(rows[0], axis))

    def step(x, row):
        values = e.run(block, Value(x, v.axis), Value(row, axis))
        axes.append(values[-1].axis)
        return bounded(x, values[k].x), values[-1].x

    x, ys = lax.scan(step, v.x, rows, reverse=e.choose([False, True]))
    if e.choose([True, False]):
        return Value(x, v.axis)
    return Value(ys, None if axes[-1] is None else axes[-1] + 1)


def loop(e, fori=False):
    v = e.number()
    block = e.block(v)
    k, sums = e.like(v, block, v), e.choose([True, False])

    def step(i, x):
        return bounded(x, e.run(block, Value(x, v.axis))[k].x) + 0.1 * i

    def more(c):
        return (c[0] < 3) & (jnp.sum(c[1]) < 7.0137 if sums else True)

    if fori:
        return Value(lax.fori_loop(0, 2, step, v.x), v.axis)
    x = lax.while_loop(more, lambda c: (c[0] + 1, step(*c)), (0, v.x))[1]
    return Value(x, v.axis)


def cond(e):
    v, s = e.value(), e.server()
    blocks = [e.block(), e.block()]
    ks = [e.like(v, block) for block in blocks]
    a, b = (lambda b=b, k=k: e.run(b)[k].x for b, k in zip(blocks, ks, strict=True))
    return Value(lax.cond(jnp.mean(s.x) > 0.137, a, lambda: bounded(v.x, b())), v.axis)


def function(e):
    how, v, axes = e.choose(["jit", "checkpoint", "vmap"]), e.number(), []
    block = e.block(v)

    def fn(x):
        last = e.run(block, Value(x, v.axis))[-1]
        axes.append(last.axis)
        return last.x

    x = getattr(jax, how)(fn)(jnp.stack([v.x, -v.x]) if how == "vmap" else v.x)
    return Value(x, axes[-1] if axes[-1] is None else axes[-1] + (how == "vmap"))


BASIC = {
    **{f.__name__: f for f in (reduce_, map_, keys, unary, binary, with_server)},
    **{f.__name__: f for f in (with_constant, hand_out, transpose, expand, flatten)},
    **{f.__name__: f for f in (along, ordered, over, over_elements, einsum)},
    "broadcast": lambda e: Value(drjax.broadcast(e.server().x), 0),
    "index": lambda e: Value(drjax.placement_index(), 0),
    "size": lambda e: Value(drjax.placement_size()),
}
STEPS = {
    **BASIC,
    **dict(scan=scan, fori=lambda e: loop(e, True), cond=cond, function=function),
    "while": loop,
}
MIXING = {
    "reverse": lambda x: x[::-1],
    "first": lambda x: x[0],
    "others": lambda x: x[1:] - x[:-1],
    "cumsum": jnp.cumsum,
    "sort": lambda x: jnp.sort(x, axis=0),
    "argmax": lambda x: jnp.argmax(x, axis=0),
    "outer": lambda x: jnp.tensordot(x, x, 0),
}


@dataclasses.dataclass(eq=False)
class Case:
    n: int
    stated: bool  # Whether it is said which arguments are placed.
    steps: list[Any]
    mixing: str | None = None

    def __call__(self, *args):
        def body(*args):
            values = self.start(args).run(self.steps)
            outs = [drjax.reduce_sum(args[4]), *(v.x for v in values[-4:])]
            if self.mixing:
                last = next(v for v in reversed(values) if v.axis is not None)
                outs.append(MIXING[self.mixing](drjax.map_fn(jnp.sin, last.led)))
            return outs

        return drjax.program(clients=self.n)(body)(*args)

    def start(self, args, *how):
        axes = [v.axis for v in arguments(self.n)]
        return Step(self.n, map(Value, args, axes), (), *how)

    @property
    def args(self):
        return [v.x for v in arguments(self.n)]

    def specs(self, accept=lambda x: True, batch=()):
        """For `in_specs`: of some arguments, with axes for a batch."""
        if not self.stated:
            return None
        axes = [v.axis for v in arguments(self.n) if accept(v.x)]
        names = [[None] * a + ["clients"] if a is not None else [] for a in axes]
        return tuple(P(*batch, *entry) for entry in names)

    def __repr__(self):
        """The steps, and the values by number; those of blocks are numbered on."""
        lines = [f"{self.n} elements, {self.stated=}, {self.mixing=}"]

        def types(*args):
            names = [*["argument"] * len(args), *self.steps]
            for i, v in enumerate(self.start(args).run(self.steps)):
                lines.append(f"  {i}: {names[i]} -> {v}")

        jax.eval_shape(drjax.program(clients=self.n)(types), *self.args)
        return "\n".join(lines)

    def _repr_pretty_(self, printer, cycle):  # What Hypothesis prints.
        printer.text(repr(self))


@st.composite
def cases(draw, size=6, reverse=False, mixing=False):
    case = Case(draw(st.sampled_from([5, 1, 2, 3])), draw(st.booleans()), [])

    def make(*args):
        start = case.start(args, draw, reverse)
        case.steps = steps(start, start.values, size, STEPS)

    jax.eval_shape(drjax.program(clients=case.n)(make), *case.args)
    if mixing:
        case.mixing = draw(st.sampled_from([*MIXING]))
    return case


def checked(fn, args, specs):
    plan = drjax.make_plan(fn, in_specs=specs)(*args)
    want = jax.jit(fn)(*args)
    assert_close(drjax.run_plan(plan, *args), want)
    return plan, want


def examples(number):
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore
    )


@examples(20)
@given(cases())
def test_a_random_program_is_planned(case):
    checked(case, case.args, case.specs())


@examples(10)
@given(cases(size=3, mixing=True))
def test_a_random_program_that_mixes_elements_is_refused(case):
    if case.n > 1:
        with pytest.raises(drjax.PlanError):
            drjax.make_plan(case)(*case.args)


@pytest.mark.slow
@examples(50)
@given(cases(reverse=True), st.sampled_from(["itself", "gradient", "vmap"]))
def test_what_is_derived_from_a_random_program_is_planned(case, how):
    fn, xs = of_floats(case, case.args)
    batch = (None,) if how == "vmap" else ()
    if how == "gradient":
        fn = gradient(fn, every(xs))
    if how == "vmap":
        fn, xs = jax.vmap(fn), [jnp.stack([x, 0.5 - x]) for x in xs]
    plan, want = checked(fn, xs, case.specs(is_float, batch))
    assert_close(drjax.run_plan(plan.recomputed(), *xs), want)
