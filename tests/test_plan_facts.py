"""What a plan says: sizes, hash, placements of arguments, bytes, and its pictures."""

import dataclasses
import functools
import os
import subprocess
import sys
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import ENGINE
from helpers import assert_close
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import PROGRAMS, XS, M, N, W, program

import drjax
from drjax._describe import of_round
from drjax.plan import MapReduce, plans_in


def local_step(w, x):
    return w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)


def step(w, xs):
    new = drjax.map_fn(local_step, (drjax.broadcast(w), xs))
    return w - 0.5 * drjax.reduce_mean(drjax.broadcast(w) - new)


def train(w, xs):
    return lax.scan(lambda w, _: (step(w, xs), jnp.sum(w)), w, None, length=3)


def rounds(plan):
    """The rounds, also those in loops and branches."""
    return [stage for _, stage in rounds_and_plans(plan)]


def rounds_and_plans(plan):
    inner = [found for p in plan.inner for found in rounds_and_plans(p)]
    return inner + [(plan, s) for s in plan.stages if isinstance(s, MapReduce)]


#
# Plans for any number of elements.
#
def objective(w, xs):
    return jnp.sum(step(w, xs) ** 2)


SIZE_FREE = {
    "a round": step,
    "its gradient": jax.grad(objective),
    "its gradient's gradient": jax.grad(
        lambda w, xs: jnp.sum(jax.grad(objective)(w, xs) ** 2)
    ),
    "rounds in a loop": train,
    "own index": lambda w, xs: drjax.reduce_sum(
        drjax.map_fn(lambda x, i: i * x, (xs, drjax.placement_index()))
    ),
    "a sum over all axes": lambda w, xs: jnp.sum(drjax.map_fn(jnp.sin, xs)),
}
SIZED = {
    "jnp.mean": lambda w, xs: jnp.mean(drjax.map_fn(jnp.sin, xs), axis=0),
    "a literal of that shape": lambda w, xs: drjax.reduce_sum(xs * XS),
    "keys split on the server": lambda w, xs: drjax.reduce_sum(
        drjax.map_fn(jax.random.normal, jax.random.split(jax.random.key(0), N))
    ),
    "whether it is odd": lambda w, xs: drjax.reduce_sum(xs) * (len(xs) % 2),
    "len": lambda w, xs: drjax.reduce_sum(xs) / len(xs),
}


def for_elements(plan, name, n):
    """A plan for another number of elements."""

    def inner(stage):
        fields = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
        new = {k: v for k, v in fields.items() if isinstance(v, drjax.Plan)}
        new = {k: for_elements(v, name, n) for k, v in new.items()}
        if isinstance(stage, MapReduce) and stage.placement == name:
            new["n"] = n
        assert len(plans_in(stage)) == len(new) - ("n" in new)
        return dataclasses.replace(stage, **new)

    sizes = {i: (p, n if p == name else m) for i, (p, m) in plan.sizes.items()}
    stages = tuple(map(inner, plan.stages))
    avals, at = list(plan.avals), {}
    for i, where in plan.at.items():
        shape = list(avals[i].shape)
        shape[where.axis] = n
        avals[i] = avals[i].update(shape=tuple(shape))
        at[i] = where._replace(n=n)
    return dataclasses.replace(
        plan, stages=stages, sizes=sizes, at=at, avals=tuple(avals)
    )


@pytest.mark.parametrize("name", SIZE_FREE)
@ENGINE
def test_a_size_free_plan_runs_on_another_number_of_elements(run, name):
    fn = SIZE_FREE[name]
    plan = drjax.make_plan(program(fn))(W, XS)
    assert plan.size_free == {"clients"}
    more = jax.random.normal(jax.random.key(5), (M, *XS.shape[1:]))
    want = jax.jit(drjax.program(clients=M)(fn))(W, more)
    assert_close(run(for_elements(plan, "clients", M), W, more), want)


@pytest.mark.parametrize("name", SIZED)
def test_a_plan_that_needs_its_number_of_elements_says_so(name):
    assert drjax.make_plan(program(SIZED[name]))(W, XS).size_free == frozenset()


def test_placements_of_one_name_are_size_free_only_if_all_are():
    def fn(x, y):
        free = drjax.program(clients=4)(drjax.reduce_sum)
        bound = drjax.program(clients=3)(lambda y: drjax.map_fn(jnp.sin, y).mean(0))
        return free(x), bound(y)

    assert not drjax.make_plan(fn)(jnp.ones(4), jnp.ones(3)).size_free


def test_each_placement_is_size_free_or_not():
    @drjax.program(pods=M)
    def fn(w, x):
        @program
        def of_pod(pod):
            return drjax.reduce_mean(drjax.map_fn(lambda v: jnp.tanh(v * w), pod))

        return drjax.reduce_mean(drjax.map_fn(of_pod, x))

    assert drjax.make_plan(fn)(2.0, jnp.ones((M, N))).size_free == {"pods"}


#
# Hashes.
#
HASH = """
import jax, numpy as np, drjax

@drjax.program(clients=4)
def fn(w, x, key):
    scales = np.arange(3, dtype=np.float32)
    def one(x, key):
        noise = jax.random.normal(key, x.shape)
        return jax.lax.fori_loop(0, 3, lambda _, v: jax.nn.relu(v * w + noise), x)
    out = drjax.map_fn(one, (x * scales, jax.random.split(key, 4)))
    return drjax.reduce_mean(out)

grad = jax.grad(lambda *args: fn(*args).sum())
args = 2.0, np.ones((4, 3), np.float32), jax.random.key(0)
print(drjax.make_plan(grad)(*args).hash)
"""


def test_a_hash_is_the_same_in_other_processes():
    def run(seed, source):
        path = os.pathsep.join(sys.path)
        env = dict(os.environ, PYTHONHASHSEED=seed, PYTHONPATH=path)
        done = subprocess.run(
            [sys.executable, "-c", source], env=env, check=True, capture_output=True
        )
        return done.stdout.strip()

    # Neither names nor lines are in it.
    other = "\n\n" + HASH.replace("noise", "eps")
    hashes = {run("1", HASH), run("2", HASH), run("3", other)}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


def test_a_hash_tells_programs_apart():
    ones, constant = jnp.ones(3), np.arange(3, dtype=np.float32)
    variants = [
        (lambda x: drjax.reduce_sum(x), N),
        (lambda x: drjax.reduce_max(x), N),
        (lambda x: drjax.reduce_sum(x), M),
        (lambda x: drjax.reduce_mean(x), N),
        (lambda x: drjax.reduce_sum(x * 2.0), N),
        (lambda x: drjax.reduce_sum(x * 3.0), N),
        (lambda x: drjax.reduce_sum(x * -0.0), N),
        (lambda x: drjax.reduce_sum(x * 0.0), N),
        (lambda x: drjax.reduce_sum(x * constant), N),
        (lambda x: drjax.reduce_sum(x * constant[::-1]), N),
        (lambda x: (drjax.reduce_sum(x), x), N),
        (lambda x: lax.fori_loop(0, 3, lambda _, s: s * drjax.reduce_sum(x), ones), N),
        (lambda x: lax.fori_loop(0, 4, lambda _, s: s * drjax.reduce_sum(x), ones), N),
    ]
    hashes = {
        drjax.make_plan(drjax.program(clients=n)(fn))(jnp.ones((n, 3))).hash
        for fn, n in variants
    }
    assert len(hashes) == len(variants)
    plan = drjax.make_plan(program(lambda x: drjax.reduce_sum(x * constant)))
    assert plan(jnp.ones((N, 3))).hash in hashes
    assert plan(jnp.ones((N, 3), "float16")).hash not in hashes


def test_a_hash_tells_callbacks_apart():
    def one(x):
        return np.sin(x)

    def other(x):
        return np.cos(x)

    def call(callback):
        fn = lambda x: jax.pure_callback(callback, x, x, vmap_method="sequential")  # noqa: E731
        return drjax.make_plan(program(lambda x: drjax.map_fn(fn, x)))(XS).hash

    assert call(one) == call(one)
    assert call(one) != call(other)


#
# Which arguments and results are placed.
#
def test_an_argument_that_is_stated_to_be_the_servers_is_handed_out():
    found = drjax.make_plan(program(step))(W, XS)
    stated = drjax.make_plan(program(step), in_specs=(None, P()))(W, XS)
    (own,), (handed_out,) = rounds(found), rounds(stated)
    assert of_round(found, own).own.bytes == XS[0].nbytes
    assert of_round(found, own).scattered.bytes == 0
    assert of_round(stated, handed_out).own.bytes == 0
    assert of_round(stated, handed_out).scattered.bytes == XS[0].nbytes
    assert_close(drjax.run_plan(stated, W, XS), program(step)(W, XS))


@ENGINE
def test_what_is_handed_out_may_be_used_whole_too(run):
    def fn(weights, xs):
        share = weights / drjax.broadcast(jnp.sum(weights))  # The server's sum.
        spread = drjax.map_fn(lambda w: jnp.max(weights) - w, weights)  # Sent whole.
        return drjax.reduce_sum(share[:, None, None] * xs), drjax.reduce_sum(spread)

    weights = jnp.arange(1.0, N + 1)
    plan = drjax.make_plan(program(fn), in_specs=(P(), None))(weights, XS)
    assert_close(run(plan, weights, XS), program(fn)(weights, XS))


def test_an_argument_can_be_stated_where_nothing_shows_that_it_is_placed():
    def fn(w, xs, more):
        return step(w, xs), {"norms": jnp.sum(more**2, axis=0)}

    more = {"a": XS.transpose(1, 0, 2)}
    specs = (None, P("clients"), {"a": P(None, "clients")})
    plan = drjax.make_plan(
        program(lambda w, xs, more: fn(w, xs, more["a"])),
        in_specs=specs,
        out_specs=(P(), P("clients")),
    )(W, XS, more)
    assert plan.at[plan.inputs[2]].axis == 1
    assert plan.at[plan.outputs[1]].axis == 0
    want = program(fn)(W, XS, more["a"])
    assert_close(drjax.run_plan(plan, W, XS, more), want)


def square(x):
    return drjax.map_fn(jnp.sin, x)


CONTRADICTIONS = {
    "an argument": (
        dict(in_specs=P(None, "clients")),
        square,
        r"axis 1, as in_specs says, and .*axis 0, as drjax_map.*test_plan_facts.py:\d+",
    ),
    "a result": (
        dict(out_specs=P(None, "clients")),
        square,
        r"axis 0, as drjax_map.*test_plan_facts.py:\d+.*axis 1, as out_specs says",
    ),
    "a result of the server's": (
        dict(out_specs=P()),
        square,
        r"out_specs say that result 0 is the server's.*placed.*test_plan_facts.py:\d+",
    ),
    "two uses": (
        {},
        lambda x: (square(x), square(x.T)),
        r"axis 1, as transpose.*facts.py:\d+.*axis 0, as drjax_map.*facts.py:\d+",
    ),
    "another size": (
        dict(in_specs=P("pods")),
        square,
        r"elements of 'pods' on axis 0.*\('clients', 5\)",
    ),
    "too many axes": (
        dict(in_specs=P(None, None, None, "clients")),
        square,
        r"elements of 'clients' on axis 3",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_shows_both_uses(name):
    stated, fn, says = CONTRADICTIONS[name]
    with pytest.raises(drjax.PlanError, match=says):
        drjax.make_plan(program(fn), **stated)(jnp.ones((N, N)))


@pytest.mark.parametrize(
    "specs, error, says",
    [
        ((P(), P(), P()), ValueError, "no prefix"),
        (({"w": None}, None), ValueError, "no prefix"),
        (("clients", None), TypeError, "None or a PartitionSpec"),
        ((P("clients", "pods"), None), TypeError, "one placement at most"),
    ],
)
def test_specs_that_do_not_fit_are_errors(specs, error, says):
    with pytest.raises(error, match=says):
        drjax.make_plan(program(step), in_specs=specs)(W, XS)


#
# Bytes, and what people read.
#
def test_the_bytes_of_a_round_are_those_of_what_is_sent():
    params = {"w": W, "b": jnp.zeros(2, "float16")}

    def fn(params, xs, key):
        keys = jax.random.split(key, N)
        masks = jnp.array([True, False] * N)[:N]
        out = drjax.map_fn(
            lambda x, key, m: m * (x @ params["w"] + params["b"]), (xs, keys, masks)
        )
        return drjax.reduce_mean(out), drjax.map_fn(jnp.sum, xs)

    key = jax.random.key(0)
    plan = drjax.make_plan(program(fn))(params, XS, key)
    (stage,) = rounds(plan)
    r = of_round(plan, stage)
    assert r.down.bytes == sum(x.nbytes for x in params.values())
    assert r.scattered.bytes == 1  # The mask; nobody uses the key.
    assert r.own.bytes == XS[0].nbytes
    assert r.up.bytes == jnp.zeros((4, 2)).nbytes
    assert r.results.bytes == 4
    assert r.kept.bytes == r.kept_before.bytes == 0
    assert r.flops.total == 2 * 4 * 3 * 2 + 4 * 2 + 4 * 2 + (4 * 3 - 1)


def test_a_plan_prints_what_goes_to_an_element_and_back():
    lines = str(drjax.make_plan(program(train))(W, XS)).splitlines()
    assert lines[0] == "scan, 3 times"
    assert "  round over 'clients', 5 elements: each" in "\n".join(lines)
    assert "    down: float32[3, 2] (24 B each, 120 B in all)" in lines
    assert "    own: float32[4, 3] (48 B each, 240 B in all)" in lines
    assert "    up, sum: float32[3, 2] (24 B each, 120 B in all)" in lines


class Checker(HTMLParser):
    """Every tag that is opened is closed; nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert "url(" not in data
        assert "@import" not in data
        self.words += data


@pytest.mark.parametrize(
    "fn",
    [
        train,
        jax.grad(objective),
        lambda w, xs: lax.cond(w[0, 0] > 0, lambda: step(w, xs), lambda: w),
        lambda w, xs: lax.while_loop(lambda w: w[0, 0] > 0, lambda w: step(w, xs), w),
        lambda w, xs: (),
    ],
    ids=["scan", "gradient", "cond", "while", "nothing"],
)
def test_a_picture_says_what_the_text_says(fn):
    plan = drjax.make_plan(program(fn))(W, XS)
    checker = Checker()
    checker.feed(plan.to_html())
    assert not checker.open
    for of, stage in rounds_and_plans(plan):
        r = of_round(of, stage)
        assert f"{stage.n} × {stage.placement}" in checker.words
        for values in (r.down, r.own, r.up):
            assert not values.types or str(values) in checker.words
    assert ("nothing to do" in checker.words) == ("nothing to do" in str(plan))
    assert plan._repr_html_() in plan.to_html()


def test_what_is_written_in_a_picture_is_escaped():
    name = "<script>alert(1)</script>"
    fn = drjax.program(placements={name: 2})(drjax.reduce_sum)
    page = drjax.make_plan(fn)(jnp.ones(2)).to_html()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


#
# Residuals.
#
def test_a_recomputing_round_reads_nothing_that_a_round_kept():
    plan = drjax.make_plan(program(jax.grad(objective)))(W, XS)
    first, second = rounds(plan)
    assert plan.residuals(first)
    kept, read = of_round(plan, first), of_round(plan, second)
    assert kept.kept.types == read.kept_before.types
    assert not plan.residuals(second)
    again = plan.recomputed()
    assert all(not again.residuals(stage) for stage in rounds(again))
    assert {i for s in rounds(again) for i in s.placed_inputs} == {plan.inputs[1]}
    assert len(rounds(again)) == 2


def test_to_recompute_does_each_round_before_once():
    """Momentum of two rounds is kept at the clients."""

    def fn(w, xs):
        older = old = drjax.map_fn(jnp.sum, xs)
        for _ in range(6):
            mean = drjax.broadcast(drjax.reduce_mean(old))
            pair = old, older, mean
            older, old = old, drjax.map_fn(lambda a, b, m: jnp.sin(a - m) + b, pair)
        return drjax.reduce_sum(old)

    plan = drjax.make_plan(program(fn))(W, XS)
    again = plan.recomputed()
    work = [of_round(plan, stage).flops.total for stage in rounds(plan)]
    redone = [of_round(again, stage).flops.total for stage in rounds(again)]
    assert len(redone) == len(work) == 7
    assert redone == [sum(work[: i + 1]) for i in range(7)]
    assert_close(drjax.run_plan(again, W, XS), program(fn)(W, XS))


def test_what_an_effect_gives_is_kept_not_recomputed(capfd):
    def fn(w, xs):
        def one(x):
            def step(v, _):
                jax.debug.print("step")
                return jnp.tanh(v), None

            return lax.scan(step, x, None, length=2)[0]

        y = drjax.map_fn(one, xs)
        return drjax.reduce_sum(y * drjax.broadcast(drjax.reduce_mean(y)))

    plan = drjax.make_plan(program(fn))(W, XS).recomputed()
    got = drjax.run_plan(plan, W, XS)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("step") == 2 * N
    assert_close(got, program(fn)(W, XS))


def test_what_an_element_prints_is_not_printed_again_to_recompute(capfd):
    def fn(w, xs):
        def one(x):
            jax.debug.print("element")
            return jnp.tanh(x @ w)

        y = drjax.map_fn(one, xs)
        return drjax.reduce_sum(y * drjax.broadcast(drjax.reduce_mean(y)))

    plan = drjax.make_plan(program(fn))(W, XS).recomputed()
    assert len(rounds(plan)) == 2
    drjax.run_plan(plan, W, XS)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("element") == N


#
# Meshes.
#
@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    kinds = (request.param,) * 2
    return jax.make_mesh((N, 1), ("clients", "model"), kinds, devices=jax.devices()[:N])


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_a_plan_made_on_a_mesh_is_the_plan_without_it(case, mesh):
    def shard(x):
        spec = P("clients") if jnp.shape(x)[:1] == (N,) else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    want = drjax.make_plan(case.run)(*case.args)
    with jax.set_mesh(mesh):
        got = drjax.make_plan(case.run)(*jax.tree.map(shard, case.args))
    assert got.hash == want.hash


def test_a_sharding_constraint_is_no_part_of_a_plan():
    mesh = jax.make_mesh((1, 1), ("clients", "model"), (AxisType.Auto,) * 2)

    def split(x, *spec):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def fn(w, xs, split):
        def one(x):
            step = lambda v, _: (split(jnp.tanh(v @ w @ w.T), None, "model"), None)  # noqa: E731
            return lax.scan(step, split(x, None, "model"), None, length=2)[0]

        out = split(drjax.map_fn(one, split(xs, "clients")), "clients") * 2
        return split(drjax.reduce_sum(out), None, "model")

    constrained = drjax.make_plan(program(functools.partial(fn, split=split)))(W, XS)
    plain = drjax.make_plan(program(functools.partial(fn, split=lambda x, *_: x)))
    assert constrained.hash == plain(W, XS).hash


#
# What an element gets and sends in all, in bytes.
#
def test_communication_counts_rounds_in_loops_and_branches():
    def once(x, w):
        """A round that sends a float32 each way."""
        return drjax.reduce_sum(drjax.map_fn(lambda x: jnp.sin(x * w), x))

    def loop(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, w: once(x, w), w)

    def branch(x, w):
        return jax.lax.cond(
            w > 0, lambda w: once(x, once(x, w)), lambda w: once(x, w), w
        )

    def unknown(x, w):
        return jax.lax.while_loop(lambda w: w > 0, lambda w: once(x, w), w)

    def perhaps(*branches):
        def fn(x, w):
            of = [lambda w, f=f: f(x, w) for f in branches]
            return jax.lax.cond(w > 0, *of, w)

        return fn

    for fn, want in (
        *((once, 4), (loop, 7 * 4), (branch, 2 * 4), (unknown, np.nan)),
        *((perhaps(unknown, once), np.nan), (perhaps(once, unknown), np.nan)),
    ):
        plan = drjax.make_plan(program(fn))(jnp.ones(N), 0.5)
        np.testing.assert_equal(plan.communication("clients"), (want, want))


def test_communication_of_no_such_placement_is_an_error():
    plan = drjax.make_plan(program(drjax.reduce_sum))(jnp.ones(N))
    with pytest.raises(ValueError, match=r"'pods'.*\['clients'\]"):
        plan.communication("pods")
