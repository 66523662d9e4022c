"""What clients run, as one file: it is all that they need."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, every, gradient, of_floats
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import PROGRAMS, N, program

import drjax
from drjax._export import OPERATIONS
from drjax._reference import _run_server, interpret
from drjax.plan import MapReduce, Scan
from federated import _artefact
from federated._artefact import load_clients
from federated._export_clients import export_clients

ROOT = Path(__file__).parents[1]


def rounds_of(plan, path=""):
    """The rounds of a plan, also in loops and branches, by path."""
    for k, stage in enumerate(plan.stages):
        if isinstance(stage, MapReduce):
            yield f"{path}{k}", stage
        names = {"body": getattr(stage, "body", None)}
        names["predicate"] = getattr(stage, "predicate", None)
        branches = getattr(stage, "branches", ())
        names |= {f"branches/{j}": branch for j, branch in enumerate(branches)}
        for name, inner in names.items():
            if isinstance(inner, drjax.Plan):
                yield from rounds_of(inner, f"{path}{k}/{name}/")


def run(plan, data, args, clients_have=None):
    """Runs a plan with the file for its rounds.

    What a client has is its part of the plan's values, or what `clients_have` of it.
    """
    clients = load_clients(data)
    says_of = {says["path"]: says for says in clients.manifest["rounds"]}
    path_of = {id(stage): path for path, stage in rounds_of(plan)}

    def run_round(plan, stage, env):
        says = says_of[path_of[id(stage)]]
        call, sends = clients.rounds[says["path"]], says["sends"]
        server = [env[i] for i in stage.server_inputs]
        results = []
        for element in range(stage.n):
            parts = [
                jax.lax.index_in_dim(env[i], element, plan.at[i].axis, keepdims=False)
                for i in stage.placed_inputs
            ]
            if clients_have:
                parts = clients_have.own(says, element, parts)
            results.append(call(jnp.int32(element), *server, *parts))
            if clients_have:
                clients_have.keep(says, element, results[-1][len(sends) :])
        outs = [jnp.stack(values) for values in zip(*results, strict=True)]
        for sent, values, (_, i) in zip(sends, outs, stage.reductions, strict=False):
            reduced = OPERATIONS[sent["operation"]].reduce(values, axis=0)
            env[i] = reduced.astype(values.dtype)
        for i, values in zip(stage.placed_outputs, outs[len(sends) :], strict=True):
            env[i] = jnp.moveaxis(values, 0, plan.at[i].axis)

    outs = interpret(plan, jax.tree.leaves(args), _run_server, run_round)
    return jax.tree.unflatten(plan.out_tree, outs)


#
# It is all that clients need.
#
QUICK = ["fedavg", "scaffold", "cond_around", "while_around", "counts_and_flags"]


def cases():
    for case in PROGRAMS:
        for name in ("itself", "gradient"):
            is_quick = case.name in QUICK and (
                name == "itself" or case.name == "fedavg"
            )
            if name == "itself" or case.reverse:
                marks = [] if is_quick else [pytest.mark.slow]
                yield pytest.param(case, name, marks=marks, id=f"{name}-{case}")


@pytest.mark.parametrize("case, name", [*cases()])
def test_a_plan_with_the_file_for_its_rounds_computes_what_jit_does(case, name):
    fn, xs = of_floats(case.run, case.args)
    fn = fn if name == "itself" else gradient(fn, every(xs))
    plan = drjax.make_plan(fn)(*xs)
    if not [*rounds_of(plan)]:
        with pytest.raises(ValueError, match="the plan has no round"):
            export_clients(plan)
        return
    assert_close(run(plan, export_clients(plan), xs), jax.jit(fn)(*xs))


def case(name):
    (found,) = [case for case in PROGRAMS if case.name == name]
    return found


def fedavg_gradient():
    fn, xs = of_floats(case("fedavg").run, case("fedavg").args)
    return gradient(fn, every(xs)), xs


class Memory:
    """What clients have: their parts of the arguments, and what they kept last."""

    def __init__(self, plan, args):
        self.plan, self.leaves, self.kept, self.now = plan, args, {}, 0

    def own(self, says, element, parts):
        found = []
        for value, part in zip(says["own"], parts, strict=True):
            made = [self.made(origin, element, part) for origin in value["from"]]
            found.append(max(made, key=lambda timed: timed[0])[1])
        return found

    def made(self, origin, element, part):
        """When a value was made, and the value; nothing was before all."""
        if "argument" in origin:
            axis = self.plan.at[self.plan.inputs[origin["leaf"]]].axis
            return 0, jnp.moveaxis(self.leaves[origin["leaf"]], axis, 0)[element]
        if "round" in origin:
            return self.kept.get((origin["round"], origin["kept"], element), (-1, None))
        return 0, part

    def keep(self, says, element, values):
        self.now += 1
        for number, x in enumerate(values):
            self.kept[says["path"], number, element] = self.now, x


@pytest.mark.parametrize("name", ["fedavg's gradient", "scaffold", "keys"])
def test_a_client_has_what_the_manifest_says_it_has(name):
    """Its own inputs are found where they are said to be, and give the same."""
    if name == "fedavg's gradient":
        fn, args = fedavg_gradient()
    else:
        row = case("scaffold" if name == "scaffold" else "key_for_each_client")
        fn, args = row.run, row.args
    plan = drjax.make_plan(fn)(*args)
    data, memory = export_clients(plan), Memory(plan, jax.tree.leaves(args))
    assert_close(run(plan, data, args, memory), jax.jit(fn)(*args))
    rounds = load_clients(data).manifest["rounds"]
    origins = [of for says in rounds for own in says["own"] for of in own["from"]]
    kinds = {"keys": {"server"}, "scaffold": {"argument", "leaf", "round", "kept"}}
    assert set().union(*origins) == kinds.get(name, {"argument", "leaf"})


def test_arguments_are_named_as_they_are_given():
    @program
    def total(w, tree, *, mask):
        return drjax.reduce_sum(
            drjax.map_fn(lambda x, y, m: w * x * y * m, (tree["x"], tree["y"][0], mask))
        )

    x = jnp.arange(5.0)
    plan = drjax.make_plan(total)(2.0, {"x": x, "y": [x]}, mask=x)
    (says,) = load_clients(export_clients(plan)).manifest["rounds"]
    names = {"args[1]['x']": 1, "args[1]['y'][0]": 2, "kwargs['mask']": 3}
    origins = [value["from"] for value in says["own"]]
    assert {of[0]["argument"]: of[0]["leaf"] for of in origins} == names
    assert says["server"] == [{"shape": [], "dtype": "float32"}]


def test_what_the_server_hands_out_is_not_said_to_be_a_client_s():
    fn = program(lambda mask, x: drjax.reduce_sum(mask * x))
    mask, x = np.ones(N, "float32"), np.ones(N, "int32")
    plan = drjax.make_plan(fn, in_specs=(P(), P("clients")))(mask, x)
    (says,) = load_clients(export_clients(plan)).manifest["rounds"]
    origins = {value["type"]["dtype"]: value["from"] for value in says["own"]}
    assert origins["float32"] == [{"server": "part"}]
    assert origins["int32"] == [{"argument": "args[1]", "leaf": 1}]


def test_only_what_is_reduced_leaves_a_client():
    @program
    def fn(w, x):
        own = drjax.map_fn(lambda x: x - w, x)
        return drjax.reduce_sum(own**2), drjax.reduce_max(jnp.abs(own)), own

    plan = drjax.make_plan(fn)(1.0, jnp.arange(5.0))
    (says,) = load_clients(export_clients(plan)).manifest["rounds"]
    scalar = {"shape": [], "dtype": "float32"}
    sends = [{"type": scalar, "operation": name} for name in ("sum", "max")]
    assert sorted(says["sends"], key=str) == sorted(sends, key=str)
    assert says["keeps"] == [scalar]
    assert (says["placement"], says["n"]) == ("clients", N)


@program
def key_and_loop(w, key, x):
    """Three rounds with a key that is the server's, and placed keys."""
    keys = drjax.map_fn(jax.random.fold_in, (drjax.broadcast(key), jnp.arange(N)))

    def step(w, _):
        def noisy(key, x):
            return w * x + jax.random.normal(key, x.shape)

        return drjax.reduce_mean(drjax.map_fn(noisy, (keys, x))), None

    return jax.lax.scan(step, w, length=3)[0], keys


KEYED = (jnp.ones(2), jax.random.key(3), jnp.arange(2.0 * N).reshape(N, 2))


def test_keys_are_described_by_what_they_are_made_of():
    plan = drjax.make_plan(key_and_loop)(*KEYED)
    clients = load_clients(export_clients(plan))
    first, inside = clients.manifest["rounds"]
    data = {"shape": [2], "dtype": "uint32", "impl": "threefry2x32"}
    key = {"shape": [], "dtype": "key<fry>", "key_data": data}
    assert first["server"] == [key]
    assert first["keeps"] == [key]
    assert key in [value["type"] for value in inside["own"]]
    assert isinstance(plan.stages[int(inside["path"].split("/")[0])], Scan)
    (kept,) = clients.rounds[first["path"]](jnp.int32(2), KEYED[1])
    want = jax.random.fold_in(KEYED[1], 2)
    assert jnp.all(kept == want)


ALONE = """
import importlib.util
import sys

import jax
import numpy as np

for name in ("drjax", "federated", "programs"):
    sys.modules[name] = None  # Importing it is an error.
spec = importlib.util.spec_from_file_location("artefact", sys.argv[1])
artefact = importlib.util.module_from_spec(spec)
spec.loader.exec_module(artefact)
clients = artefact.load_clients(open(sys.argv[2], "rb").read())
(inside,) = [says for says in clients.manifest["rounds"] if "/" in says["path"]]
given, own = np.load(sys.argv[3]), []
for value in inside["own"]:
    if "key_data" in value["type"]:
        impl = value["type"]["key_data"]["impl"]
        own.append(jax.random.wrap_key_data(given["key"], impl=impl))
    else:
        own.append(given["x"])
(sent,) = clients.rounds[inside["path"]](np.int32(2), given["w"], *own)
np.save(sys.argv[4], sent)
"""


def test_a_client_needs_neither_the_program_nor_this_library(tmp_path):
    plan = drjax.make_plan(key_and_loop)(*KEYED)
    (tmp_path / "clients").write_bytes(export_clients(plan))
    w, key, xs = KEYED
    key, x = jax.random.fold_in(key, 2), xs[2]
    np.savez(tmp_path / "given.npz", w=w, key=jax.random.key_data(key), x=x)
    files = [tmp_path / name for name in ("clients", "given.npz", "sent.npy")]
    subprocess.run(
        [sys.executable, "-c", ALONE, str(_artefact.__file__), *map(str, files)],
        check=True,
        timeout=120,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert_close(np.load(files[-1]), w * x + jax.random.normal(key, x.shape))


#
# Its bytes.
#
WRITES = """
import sys

sys.path[:0] = [sys.argv[1], sys.argv[2]]
import theprogram
from federated._export_clients import export_clients

sys.stdout.buffer.write(export_clients(theprogram.plan()))
"""


def source_of_program(lines):
    """A program, so many lines down its file."""
    return "\n" * lines + (
        "import drjax, jax, jax.numpy as jnp\n"
        "def plan():\n"
        "    @drjax.program(clients=3)\n"
        "    def fn(w, x):\n"
        "        def train(x):\n"
        "            return jax.lax.fori_loop(0, 3, lambda i, w: jnp.sin(w * x), w)\n"
        "        return drjax.reduce_mean(drjax.map_fn(train, x))\n"
        "    return drjax.make_plan(jax.grad(fn))(1.0, jnp.arange(3.0))\n"
    )


def test_a_plan_has_the_same_bytes_in_another_process_and_another_place(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "theprogram.py"
    file.write_text(source_of_program(lines=9))
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(file.parent), str(ROOT)],
        check=True,
        timeout=120,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"},
    )
    here: dict[str, Any] = {}
    exec(compile(source_of_program(lines=0), str(tmp_path / "here.py"), "exec"), here)
    first, again = (export_clients(here["plan"]()) for _ in range(2))
    assert first == again == done.stdout


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_is_not_in_it(kind):
    fn, xs = fedavg_gradient()
    plan = drjax.make_plan(fn)(*xs)
    alone = export_clients(plan)
    with jax.set_mesh(jax.make_mesh((N,), ("clients",), axis_types=(kind,))):
        assert export_clients(plan) == alone


def test_no_path_of_the_source_is_in_it():
    fn, xs = fedavg_gradient()
    plan = drjax.make_plan(fn)(*xs)
    stages = dict(rounds_of(plan))
    assert any(b"programs.py" in stage.export() for stage in stages.values())
    data = export_clients(plan)
    assert b".py" not in data
    assert str(ROOT).encode() not in data


def test_a_file_for_several_platforms_runs_on_each_of_them():
    plan = drjax.make_plan(program(drjax.reduce_sum))(jnp.arange(5.0))
    clients = load_clients(export_clients(plan, platforms=("tpu", "cpu")))
    assert clients.manifest["platforms"] == ["tpu", "cpu"]
    assert clients.manifest["plan"] == plan.hash
    (call,) = clients.rounds.values()
    assert_close(call(jnp.int32(0), 7.0), [7.0])


#
# What cannot be written.
#
def test_what_is_no_plan_has_no_clients():
    with pytest.raises(
        TypeError, match=r"expected a plan, but got function\. Make one"
    ):
        export_clients(program(drjax.reduce_sum))  # pyright: ignore[reportArgumentType]
    plan = drjax.make_plan(jnp.sin)(1.0)
    with pytest.raises(ValueError, match="the plan has no round, so there is nothing"):
        export_clients(plan)


def test_clients_cannot_call_this_process():
    def body(x):
        jax.debug.print("{}", x)
        return x

    fn = program(lambda x: drjax.reduce_sum(drjax.map_fn(body, x)))
    with pytest.raises(NotImplementedError, match="it calls Python in this process"):
        export_clients(drjax.make_plan(fn)(jnp.arange(5.0)))
