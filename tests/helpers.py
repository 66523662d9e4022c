"""What the tests share: functions of arrays, comparing, meshes, and what was traced."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from drjax._map import map_p

PREFIX = "drjax_"
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
COLLECTIVE = re.compile(
    r"= (\S+|\([^)]*\)) "
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def make_mesh(kind, **axes):
    return jax.make_mesh((*axes.values(),), (*axes,), axis_types=(kind,) * len(axes))


def arrays_exchanged(compiled):
    """Of each collective of a compiled program, its kind and its `(dtype, size)`s."""
    found = []
    for shapes, kind in COLLECTIVE.findall(compiled.as_text() or ""):
        arrays = [
            (dtype, math.prod(map(int, filter(None, dims.split(",")))))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        found.append((kind, arrays))
    return found


def equations(fn, *args):
    """The equations of a function, also in control flow, but not in mapped bodies."""

    def walk(jaxpr):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            inner = [] if eqn.primitive is map_p else [*jaxprs_in_params(eqn.params)]
            if not inner:
                yield eqn
            for sub in inner:
                yield from walk(sub)

    return [*walk(jax.make_jaxpr(fn)(*args))]


def operators(fn, *args):
    """The names of our primitives, in order."""
    names = [eqn.primitive.name for eqn in equations(fn, *args)]
    return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]


def is_float(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def of_floats(fn, args):
    """A function of the inexact leaves of its arguments, to its inexact results."""
    leaves, tree = jax.tree.flatten(args)
    floats = [is_float(x) for x in leaves]

    def flat(*xs):
        given = iter(xs)
        full = [next(given) if f else x for f, x in zip(floats, leaves, strict=True)]
        outs = jax.tree.leaves(fn(*jax.tree.unflatten(tree, full)))
        return [out for out in outs if is_float(out)]

    return flat, tuple(x for f, x in zip(floats, leaves, strict=True) if f)


def like(seed, tree):
    """Random arrays of the same types."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [
        jax.random.normal(k, jnp.shape(x)).astype(jnp.result_type(x))
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def scalar(fn):
    """A real scalar of a function's results that treats each entry differently."""

    def weighted(out):
        weights = np.cos(np.arange(np.size(out))).reshape(np.shape(out))
        return jnp.sum((out * weights.astype(out.dtype)).real)

    return lambda *xs: sum(map(weighted, fn(*xs)), start=jnp.zeros(()))


def gradient(fn, argnums):
    def grad(*xs):
        # For a complex x, jax.grad gives the conjugate of what we would compare; any
        # fixed convention does, for both sides share it.
        return list(jax.grad(scalar(fn), argnums)(*xs))

    return grad


def every(xs):
    return tuple(range(len(xs)))


def assert_close(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)
