"""The device mesh: which one an operator uses, and how values are laid out on it.

A placed value `[n, ...]` is sharded over the mesh axis that bears the placement's
name, if the mesh has one; its other axes are left as they are. The mesh is
resolved when an operator is bound and carried as a parameter of the primitive, so
that it is never hidden from jit.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.api_util
import jax.extend
from jax.core import ShapedArray
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from drjax import _compat
from drjax._jaxprs import is_eager, trace

if TYPE_CHECKING:
    from drjax._program import Placement

_T = TypeVar("_T")
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def resolve(
    operator_name: str, mesh: Mesh | None, placement: "Placement"
) -> Mesh | None:
    """The mesh to shard a placed value over; None where nothing is to be sharded."""
    installed = jax.sharding.get_abstract_mesh()
    if mesh is None:
        mesh = placement.mesh if installed.empty else installed
        if mesh is None or not placement.use_abstract_mesh:
            return None
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"drjax.{operator_name} over {placement.name!r}: `mesh` must be a "
            f"jax.sharding.Mesh or AbstractMesh, but got {mesh!r}."
        )
    if is_eager() and not _same_axes(mesh, installed):
        raise ValueError(
            f"drjax.{operator_name} over {placement.name!r}: `mesh` has the axes "
            f"{dict(mesh.shape)}, and the mesh that jax.set_mesh installed has others, "
            f"{dict(installed.shape)}. JAX runs that under jax.jit only: use it, or "
            "one mesh."
        )
    if AxisType.Manual in installed.axis_types and _same_axes(mesh, installed):
        mesh = installed  # Inside a shard_map, that says which axes are manual.
    if mesh.empty:
        return None
    name = placement.name
    axis_types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Auto in mesh.axis_types and AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"drjax.{operator_name} over {name!r}: the mesh mixes Auto and Explicit "
            f"axes ({axis_types}); make them all one or the other."
        )
    if name not in axis_types:
        if AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"drjax.{operator_name} over {name!r}: the mesh with explicit axes "
                f"{mesh.axis_names} has no axis {name!r}. Add one (of size 1 if the "
                "placement is not to be split), or make the axes Auto."
            )
        return None
    if AxisType.Explicit in mesh.axis_types and installed.empty:
        raise ValueError(
            f"drjax.{operator_name} over {name!r}: a mesh with explicit axes must be "
            "installed, for JAX keeps it in the types of arrays. Run the program under "
            "`with jax.set_mesh(mesh):`."
        )
    if axis_types[name] == AxisType.Manual:  # Inside a shard_map over the placement.
        return None
    if placement.size % mesh.shape[name]:
        raise ValueError(
            f"drjax.{operator_name} over {name!r}: the mesh axis {name!r} of size "
            f"{mesh.shape[name]} does not divide the placement's size "
            f"{placement.size}. Choose a placement that is a multiple of it."
        )
    return mesh


def _same_axes(mesh: Mesh, installed: Mesh) -> bool:
    return installed.empty or mesh.shape == installed.shape


def of_with_statement() -> jax.sharding.Mesh | None:
    """The mesh of a `with mesh:`, the way before `jax.set_mesh`, while tracing.

    No function tells it, but a sharding constraint finds it.
    """
    if is_eager() or not jax.sharding.get_abstract_mesh().empty:
        return None
    try:
        jaxpr, _ = trace(_constrained, [_SCALAR], _CONSTRAINED_INFO)
    except RuntimeError:  # There is none.
        return None
    return jaxpr.jaxpr.eqns[0].params["sharding"].mesh


def _constrained(x: Any) -> list[Any]:
    return [jax.lax.with_sharding_constraint(x, P())]


_SCALAR = ShapedArray((), jax.numpy.dtype("float32"))
_CONSTRAINED_INFO = jax.api_util.debug_info("drjax", _constrained, (0.0,), {})


def is_auto(mesh: Mesh | None) -> bool:
    return mesh is not None and {*mesh.axis_types} == {AxisType.Auto}


def is_explicit(mesh: Mesh | None) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def in_element(fn: Callable[[], _T], placement: str, n: int, mesh: Mesh | None) -> _T:
    """Calls `fn` as what one element runs.

    Under an explicit mesh that is in a vmap over the placement's axis, which tells a
    `jax.shard_map` over all axes to leave this one out.
    """
    if not is_explicit(mesh):
        return fn()
    results = []
    indices = jax.ShapeDtypeStruct(
        (n,),
        "int32",
        sharding=NamedSharding(mesh, P(placement)),  # pyright: ignore
    )
    jax.eval_shape(jax.vmap(lambda _: results.append(fn())), indices)
    return results[0]


def shard_placed(x: Any, placement: str, mesh: Mesh | None) -> Any:
    """Shards axis 0 of one array over the placement, and leaves the others alone."""
    return x if mesh is None else _shard_placed(x, placement, mesh)


def without_shards(x: Any) -> Any:
    """Gathers axis 0 of one array if its type says that it is sharded."""
    spec = getattr(jax.typeof(x).sharding, "spec", ())
    if not spec or spec[0] is None:
        return x
    return jax.sharding.reshard(x, P(None, *spec[1:]))


def without_explicit_axes() -> Any:
    """The context without the installed mesh, if its axes would be in types."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return contextlib.nullcontext()
    return without_mesh()


def without_mesh() -> Any:
    """The context without the installed mesh."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


@functools.lru_cache(maxsize=128)
def context_without_mesh(context: Any) -> Any:
    """An equation's context, of which the mesh is none."""
    if context.cur_abstract_mesh.empty:
        return context
    with context.manager, without_mesh():
        jaxpr, _ = trace(lambda x: [jax.lax.neg(x)], [_SCALAR], _CONSTRAINED_INFO)
    return jaxpr.jaxpr.eqns[0].ctx


@functools.partial(_compat.inlined_jit, static_argnames=("placement", "mesh"))
def _shard_placed(x: Any, placement: str, mesh: Mesh) -> Any:
    if is_explicit(mesh):
        spec = [
            None
            if placement in (axes if isinstance(axes, tuple) else (axes,))
            else axes
            for axes in jax.typeof(x).sharding.spec[1:]
        ]
        return jax.sharding.reshard(x, NamedSharding(mesh, P(placement, *spec)))
    spec = P(placement, *[P.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def constrained(x: Any, spec: Any, mesh: Mesh | None) -> Any:
    """A server value, sharded as is said; as it is, if nothing is."""
    if spec is None or mesh is None:
        return x
    if is_explicit(mesh):
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def specs_of_leaves(specs: Any, tree: Any) -> list[Any]:
    """For each leaf of a tree, what stands for it in a prefix of the tree.

    A `PartitionSpec` or None there stands for all leaves below it. What is something
    else is the caller's to refuse.

    Raises:
      ValueError: if it is no prefix.
    """

    def is_spec(x):
        return x is None or isinstance(x, P)

    def repeated(spec, subtree):
        return [spec] * len(jax.tree.leaves(subtree))

    of_leaves = jax.tree.map(repeated, specs, tree, is_leaf=is_spec)
    return jax.tree.leaves(of_leaves, is_leaf=is_spec)


def axes_of_each(spec: Any) -> list[tuple[str, ...]]:
    """The mesh axes over which each axis of an array is said to be sharded."""
    of_axes = [None if axes is P.UNCONSTRAINED else axes for axes in spec or ()]
    return [
        () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        for axes in of_axes
    ]


def shards(placement: str, mesh: Mesh | None) -> int:
    """Over how many shards the elements of a placement are spread."""
    return 1 if mesh is None else mesh.shape[placement]


def per_shard(placement: str, n: int, mesh: Mesh | None) -> int:
    """How many elements a shard has."""
    return n // shards(placement, mesh)


def split(x: Any, placement: str, mesh: Mesh) -> Any:
    """`[n, ...]` to `[shards, n / shards, ...]`; each element stays where it is."""
    s = shards(placement, mesh)
    return _reshape(x, (s, x.shape[0] // s, *x.shape[1:]), 1, placement, mesh)


def join(x: Any, placement: str, mesh: Mesh) -> Any:
    """The inverse of `split`."""
    return _reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), 2, placement, mesh)


def _reshape(x: Any, shape: Any, done: int, placement: str, mesh: Mesh) -> Any:
    if not is_explicit(mesh):
        return shard_placed(jax.lax.reshape(x, shape), placement, mesh)
    rest = jax.typeof(x).sharding.spec[done:]
    new = [None] * (len(shape) - 1 - len(rest))
    sharding = NamedSharding(mesh, P(placement, *new, *rest))
    return jax.lax.reshape(x, shape, out_sharding=sharding)


def placed_aval(element: Any, placement: str, n: int, mesh: Mesh | None) -> Any:
    """The type of a placed value, given that of one element."""
    axis = placement if is_explicit(mesh) else None
    if axis is not None and element.sharding.mesh.empty:
        abstract = mesh.abstract_mesh if isinstance(mesh, jax.sharding.Mesh) else mesh
        element = element.update(
            sharding=NamedSharding(abstract, element.sharding.spec)  # pyright: ignore
        )
    return jax.extend.core.unmapped_aval(n, 0, element, axis)
