"""Makes the plan of a function: traces it, cuts its jaxpr, and tries another size."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import PartitionSpec

from drjax import _mesh, _program
from drjax._canonical import canonical
from drjax._cut import Cutter
from drjax._equations import PlanError
from drjax._jaxprs import struct
from drjax._placed import find_placed
from drjax._straighten import Straight, straighten, without_shardings
from drjax.plan import At, Plan


def make_plan(
    fn: Callable[..., Any], *, in_specs: Any = None, out_specs: Any = None
) -> Callable[..., Plan]:
    """Makes a function that returns the plan of `fn`, as `jax.make_jaxpr` its jaxpr.

    A plan says what the server does and what each element does, in as few rounds as the
    program's data dependencies allow. It is pure data, for engines other than XLA.

    Which arguments and results are placed is found from how they are used, unless it is
    said. An argument `[n, ...]` that the server hands out, as a mask, is said to be
    `PartitionSpec()`; else it is taken for what the elements have.

    Args:
      fn: a program, a derivative of one, or any function that calls some. It is traced,
        and for each placement traced twice more with other numbers of elements, which
        shows whether the plan depends on how many there are.
      in_specs: which positional arguments are placed: for each, or each of its leaves,
        or a subtree, a `jax.sharding.PartitionSpec` with the placement's name at the
        axis of the elements, as `P('clients')`; `P()` for the server's; None for not
        said.
      out_specs: the same for the results.

    Returns:
      A function of the arguments of `fn`, arrays or `jax.ShapeDtypeStruct`s, that
      returns a `Plan`.

    Raises:
      PlanError: if an operation on a placed value mixes its elements, or is not known;
        or if what is said of arguments and results is not how they are used.
      TypeError: if `fn` closes over a value that is being traced.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def loss(w, x):
      ...     return drjax.reduce_mean(drjax.map_fn(lambda x: (x - w) ** 2, x))
      >>> plan = drjax.make_plan(jax.grad(loss))(2.0, jnp.arange(3.0))
      >>> print(plan)
      server: 2 operations, 1 FLOP
      round over 'clients', 3 elements: each 6 operations, 4 FLOPs
        down: 2 x float32[] (8 B each, 24 B in all)
        own: float32[] (4 B each, 12 B in all)
        up, sum: float32[] (4 B each, 12 B in all)
      >>> print(drjax.run_plan(plan, 2.0, jnp.arange(3.0)))
      2.0

    References:
      Rush et al., DrJAX, arXiv:2403.07128, section on interpreting to MapReduce.
    """

    @functools.wraps(fn)
    def planned(*args: Any, **kwargs: Any) -> Plan:
        leaves, in_tree = jax.tree.flatten((args, kwargs))
        with _mesh.without_explicit_axes():
            plan = make(in_tree, leaves)
            bound = {p for p, n in plan.placements if not is_size_free(plan, p, n)}
            free = {p for p, _ in plan.placements} - bound
        return dataclasses.replace(plan, size_free=frozenset(free))

    def make(in_tree: Any, leaves: list[Any]) -> Plan:
        out_trees = []

        def flat(*leaves):
            args, kwargs = jax.tree.unflatten(in_tree, leaves)
            outs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
            out_trees.append(out_tree)
            return outs

        jaxpr = jax.make_jaxpr(flat)(*map(without_sharding, leaves))
        with _mesh.without_mesh():  # A plan has none.
            return cut(without_shardings(jaxpr), in_tree, out_trees[-1])

    def cut(jaxpr: Any, in_tree: Any, out_tree: Any) -> Plan:
        straight = straighten(jaxpr)
        if any(isinstance(x, Tracer) for x in straight.constants.values()):
            raise TypeError(
                "drjax.make_plan: the function closes over a value that an outer "
                "jax.jit, jax.grad or other transformation traces. A plan is data: "
                "make it outside, of the transformed function."
            )
        specs = tuple(in_specs) if isinstance(in_specs, list) else in_specs, None
        inputs = _stated("in_specs", specs, in_tree, straight.invars, straight)
        outputs = _stated("out_specs", out_specs, out_tree, straight.outvars, straight)
        facts = find_placed(
            straight,
            {straight.invars[i]: where for i, where in inputs.items() if where},
            {i: where for i, where in outputs.items() if where},
            ("in_specs", "out_specs"),
            {straight.invars[i] for i, where in inputs.items() if not where},
        )
        for i, where in outputs.items():
            v = straight.outvars[i]
            if not where and isinstance(v, Var) and v in facts.at:
                raise PlanError(
                    f"drjax.make_plan: out_specs say that result {i} is the server's, "
                    f"but it is placed over {facts.at[v].placement!r}, as "
                    f"{facts.why[v]} says. Reduce it, or say "
                    f"PartitionSpec({facts.at[v].placement!r})."
                )
        return Cutter(facts).plan(in_tree, out_tree)

    def is_size_free(plan: Plan, placement: str, n: int) -> bool:
        """Whether the plan is the same for other numbers of elements."""
        ours = canonical(plan, (placement, n))
        for other in (2 * n, 3 * n + 1):  # One is odd, one is even.
            leaves = []
            for i in plan.inputs:
                shape = list(plan.avals[i].shape)
                if i in plan.at and plan.at[i][:2] == (placement, n):
                    shape[plan.at[i].axis] = other
                leaves.append(struct(plan.avals[i].update(shape=tuple(shape))))
            try:
                with _program.resized(placement, n, other):
                    resized = make(plan.in_tree, leaves)
            except Exception:  # Whatever is raised where the sizes do not fit.
                return False
            if canonical(resized, (placement, other)) != ours:
                return False
        return True

    return planned


def without_sharding(x: Any) -> Any:
    """An argument, for a plan is for engines that have no such mesh."""
    if isinstance(x, jax.Array):
        weak_type = jax.typeof(x).weak_type
    elif isinstance(x, jax.ShapeDtypeStruct):
        weak_type = x.weak_type
    else:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak_type)


def _stated(
    what: str, specs: Any, tree: Any, variables: list[Any], straight: Straight
) -> dict[int, At | None]:
    """What is said of some leaves, by position: where they are placed, or None."""
    full = jax.tree.unflatten(tree, range(len(variables)))
    try:
        leaves = _mesh.specs_of_leaves(specs, full)
    except ValueError as e:
        raise ValueError(
            f"drjax.make_plan: {what} are {specs}, which is no prefix of the tree "
            f"{tree}. Give a tuple with a PartitionSpec or None for each argument."
        ) from e
    stated: dict[int, At | None] = {}
    for i, (spec, v) in enumerate(zip(leaves, variables, strict=True)):
        if spec is None:
            continue
        if not isinstance(spec, PartitionSpec) or sum(x is not None for x in spec) > 1:
            raise TypeError(
                f"drjax.make_plan: {what} hold {spec!r}, but a leaf is None or a "
                "PartitionSpec with the name of one placement at most."
            )
        stated[i] = None
        for axis, placement in enumerate(spec):
            if placement is not None:
                n = v.aval.shape[axis] if axis < v.aval.ndim else 0
                found = sorted({*_placements(straight)})
                if (placement, n) not in found:
                    raise PlanError(
                        f"drjax.make_plan: {what} say that leaf {i}, of type {v.aval}, "
                        f"has the elements of {placement!r} on axis {axis}. It has no "
                        "such axis, or one of another size: the placements in the "
                        f"function are {found}."
                    )
                stated[i] = At(placement, n, axis)
    return stated


def _placements(jaxpr: Any):
    """The name and the size of the placement of each operator."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("drjax_"):
            yield eqn.params["placement"], eqn.params["n"]
        for inner in jaxprs_in_params(eqn.params):
            yield from _placements(getattr(inner, "jaxpr", inner))
