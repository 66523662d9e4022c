"""What users meet beside values: parameters, docs, errors, and otherwise silence."""

import ast
import inspect
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

import drjax

N = 5
X, W = jnp.arange(15.0).reshape(N, 3), jnp.arange(5.0)
WAYS = {"eager": lambda fn: fn, "jit": jax.jit, "make_jaxpr": jax.make_jaxpr}
HOW = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
AUTO, EXPLICIT = (AxisType.Auto,), (AxisType.Explicit,)
WITH_MESH = {
    "broadcast": drjax.broadcast,
    "map_fn": lambda x, **mesh: drjax.map_fn(lambda y: y, x, **mesh),
    "reduce_sum": drjax.reduce_sum,
    "reduce_mean": drjax.reduce_mean,
    "reduce_weighted_mean": lambda x, **mesh: drjax.reduce_weighted_mean(x, W, **mesh),
    "reduce_max": drjax.reduce_max,
    "reduce_min": drjax.reduce_min,
    "placement_index": lambda _, **mesh: drjax.placement_index(**mesh),
}
CALLS = {**WITH_MESH, "placement_size": lambda _: drjax.placement_size()}
OF_PLACED = [name for name in CALLS if name.startswith(("map", "reduce"))]
REDUCTIONS = [name for name in CALLS if name.startswith("reduce")]


def program(fn):
    return drjax.program(clients=N)(fn)


#
# The public surface.
#
PUBLIC_FUNCTIONS = [name for name in drjax.__all__ if name.islower()]
POSITIONAL = {name: ["x"] for name in CALLS} | {  # As in drjax 0.2.
    "map_fn": ["fn", "arg"],
    "reduce_weighted_mean": ["x", "w"],
    "placement_size": [],
    "placement_index": [],
    "program": [],
    "make_plan": ["fn"],
    "run_plan": ["plan"],
    "streaming": ["fn", "chunk_size"],
}


def test_all_names_what_exists_and_is_documented():
    assert len({*drjax.__all__}) == len(drjax.__all__)
    others = {"program", "make_plan", "run_plan", "streaming"}
    assert {*PUBLIC_FUNCTIONS} == {*CALLS, *others}
    for name in drjax.__all__:
        assert inspect.getdoc(getattr(drjax, name)), name


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_a_function_takes_exactly_its_documented_parameters(name):
    parameters = inspect.signature(getattr(drjax, name)).parameters.values()
    doc = inspect.getdoc(getattr(drjax, name)) or ""
    arguments = re.search(r"^Args:\n((?:  .*\n|\n)+)", doc, re.MULTILINE)
    assert arguments
    documented = re.findall(r"^  \**(\w+):", arguments[1], re.MULTILINE)
    assert [p.name for p in parameters] == documented
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[name]
    assert ("mesh" in documented) == (name in WITH_MESH)
    assert "\nExample:\n  >>> " in doc


def test_drjax_imports_only_public_jax_and_no_engine():
    files = [*pathlib.Path(drjax.__file__).parent.rglob("*.py")]
    assert len(files) > 1
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                assert not re.match(r"jax\._src|beam_runner|federated", module), file


#
# Meshes. Values on many devices are tested elsewhere.
#
@pytest.mark.parametrize("how", [WAYS["eager"], jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "axis, kind", [("clients", AUTO), ("other", AUTO), ("clients", EXPLICIT)]
)
def test_a_mesh_of_one_device_changes_no_value(axis, kind, how):
    mesh = Mesh(jax.devices()[:1], (axis,), axis_types=kind)
    for fn in WITH_MESH.values():
        want = program(fn)(X)
        given = program(lambda x, fn=fn: fn(x, mesh=mesh))
        if kind == AUTO:
            np.testing.assert_allclose(how(given)(X), want, rtol=1e-6)
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(how(given)(X), want, rtol=1e-6)
            np.testing.assert_allclose(how(program(fn))(X), want, rtol=1e-6)


@HOW
@pytest.mark.parametrize(
    "axes, kinds, says",
    [
        (dict(clients=2), AUTO, "axis 'clients' of size 2 does not divide .* size 5"),
        (dict(x=1), EXPLICIT, r"explicit axes \('x',\) has no axis 'clients'"),
        (dict(clients=1, x=1), AUTO + EXPLICIT, "mixes Auto and Explicit"),
        (dict(clients=1), EXPLICIT, r"must be installed.*jax\.set_mesh\(mesh\)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(axes, kinds, says, how):
    mesh = AbstractMesh((*axes.values(),), (*axes,), axis_types=kinds)
    for name, fn in WITH_MESH.items():
        with pytest.raises(ValueError, match=rf"drjax\.{name} over 'clients'.*{says}"):
            how(program(lambda x, fn=fn: fn(x, mesh=mesh)))(X)


#
# Other errors.
#
@HOW
@pytest.mark.parametrize("name", CALLS)
def test_an_operator_outside_a_program_is_an_error(name, how):
    says = rf"drjax\.{name} was called with no placement.*drjax\.program\(clients=n\)"
    with pytest.raises(drjax.OperatorUndefinedError, match=says):
        how(CALLS[name])(X)


@HOW
@pytest.mark.parametrize(
    "names, bad, error, says",
    [
        (
            OF_PLACED,
            lambda x: x[:4],
            ValueError,
            ["axis 5", "shape (4, 3)", "declared"],
        ),
        (OF_PLACED, lambda x: x[0, 0], ValueError, ["shape ()", "broadcast it first"]),
        (OF_PLACED, lambda x: 2.0, ValueError, ["shape ()", "broadcast it first"]),
        (
            [*OF_PLACED, "broadcast"],
            lambda x: "text",
            TypeError,
            [
                "must be an array",
                "'text' of type str",
                "Leave it out, or close over it",
            ],
        ),
        (
            [*OF_PLACED, "broadcast"],
            lambda x: np.array([None] * N),
            TypeError,
            ["must be an array", "None, None", "Leave it out, or close over it"],
        ),
        (
            REDUCTIONS,
            lambda x: jax.random.split(jax.random.key(0), N),
            TypeError,
            ["dtype key<fry>", "cannot be reduced"],
        ),
    ],
)
def test_a_bad_leaf_is_an_error_that_names_it(names, bad, error, says, how):
    for name in names:
        fn = program(lambda x, name=name: CALLS[name]({"a": [x, bad(x)]}))
        with pytest.raises(error) as caught:
            how(fn)(X)
        for part in (f"drjax.{name} over 'clients'", "leaf ['a'][1] ", *says):
            assert part in str(caught.value)


@HOW
@pytest.mark.parametrize(
    "x, w, default, says",
    [
        ({"a": X}, {"b": W}, None, r"'w' must be one array, or .* prefix"),
        (X, {"a": W}, None, r"'w' must be one array, or .* prefix"),
        (X, W[:4], None, r"leading axis 5, but `w` has shape \(4,\)"),
        ({"a": X}, X[:, :2], None, r"weights of leaf \['a'\] have shape \(5, 2\)"),
        (X, X[:, None], None, r"weights of leaf x have shape \(5, 1, 3\)"),
        ({"a": X}, W, {"b": 1.0}, r"'default' must be one .* prefix"),
        ({"a": W}, W, np.ones(3), r"default.* \['a'\].* shape \(3,\)"),
        ({"a": X}, W, np.ones(2), r"default.* \['a'\].* shape \(2,\)"),
        ({"a": X}, W, "text", "must be an array, but .* 'text'"),
    ],
)
def test_weights_and_defaults_that_do_not_fit_are_errors(x, w, default, says, how):
    def mean(x, w):
        return drjax.reduce_weighted_mean(x, w, default=default)

    says = f"(?s)drjax.reduce_weighted_mean over 'clients'.*{says}"
    with pytest.raises((ValueError, TypeError), match=says):
        how(program(mean))(x, w)


@HOW
def test_what_is_mapped_must_be_a_function(how):
    with pytest.raises(TypeError, match=r"drjax\.map_fn over 'clients'.* function"):
        how(program(lambda x: drjax.map_fn(x, x)))(X)


@HOW
def test_what_a_mapped_function_returns_must_be_arrays(how):
    says = r"map_fn over 'clients'.* leaf \['b'\] of its result is 'text' of type str"
    with pytest.raises(TypeError, match=says):
        how(program(lambda x: drjax.map_fn(lambda v: {"a": v, "b": "text"}, x)))(X)


#
# Silence.
#
SCRIPT = """
import logging
import pathlib

records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel(logging.DEBUG)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import drjax

logging.getLogger("jax").setLevel(logging.WARNING)
for name in ("absl", *logging.root.manager.loggerDict):
    if name.startswith(("absl", "drjax")):
        logging.getLogger(name).setLevel(logging.DEBUG)


@drjax.program(clients=4)
def step(w, x, examples):
    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def local(start, x, i):
        gradient = jax.grad(loss)(start, x)
        return (w - 0.1 * gradient) * (i >= 0), loss(w, x)

    models, losses = drjax.map_fn(
        local, (drjax.broadcast(w), x, drjax.placement_index())
    )
    new = drjax.reduce_weighted_mean(models, examples, default=w)
    metrics = drjax.reduce_mean((losses, examples)), drjax.reduce_max(losses)
    others = drjax.reduce_sum(examples > 1), drjax.reduce_min(x.astype("bfloat16"))
    constants = drjax.broadcast((1, 2.0, np.ones(2)))
    return new, metrics, others, constants, drjax.placement_size()


def scalar(w, x, examples):
    return jnp.sum(step(w, x, examples)[0] ** 2)


def run(*fns):
    args = np.ones(3), np.arange(24.0).reshape(4, 2, 3) / 24, np.arange(4)
    for fn in fns:
        jax.block_until_ready(fn(*args))


run(step, jax.jit(step), jax.grad(scalar))
for kind in (AxisType.Auto, AxisType.Explicit):
    with jax.set_mesh(jax.make_mesh((2,), ("clients",), axis_types=(kind,))):
        run(step, jax.jit(jax.value_and_grad(scalar)))

here = str(pathlib.Path(drjax.__file__).parent)
for r in records:
    if r.name.startswith(("absl", "drjax")) or r.pathname.startswith(here):
        print(r.name, r.pathname, r.getMessage())
"""


def test_a_program_emits_no_warning_and_no_log_line():
    devices = "--xla_force_host_platform_device_count=2"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert not finished.stdout
