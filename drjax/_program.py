"""Which placements are in scope: the `program` decorator and its lookup.

The active placements live in one `jax.make_user_context`: a thread-local value
that JAX makes part of the key of every trace and compilation cache. A jitted
helper traced for three clients is therefore traced again for five, and again
outside a program, where its operators raise.
"""

import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from drjax import _mesh

_F = TypeVar("_F", bound=Callable[..., Any])


class OperatorUndefinedError(RuntimeError):
    """Raised when an operator finds no placement to work on.

    The usual reasons: the call is outside a `drjax.program`; it runs in a thread
    that was started inside one (each thread has its own placements); or it is
    inside the rule of a `jax.custom_jvp` or `jax.custom_vjp`, which JAX runs
    whenever it differentiates, also after the program has returned.
    """


OperatorUndefinedError.__module__ = "drjax"  # As users name it.


class Placement(NamedTuple):
    """A placement in scope; the scope is a tuple of these, innermost last."""

    name: str
    size: int
    use_abstract_mesh: bool
    convolutions_as_matmuls: bool
    mesh: jax.sharding.Mesh | None  # That of a `with mesh:` around the program.
    own: bool  # Declared by the innermost program, so it may be left unnamed.
    mapped: bool  # Its `map_fn` body is being traced: it is out of reach there.


_scope = jax.make_user_context(default_value=())
# Sizes that a plan is tried with: `((name, declared), size)` of some placements.
_resized = jax.make_user_context(default_value=())


def program(
    *,
    placements: Mapping[str, int] | None = None,
    use_abstract_mesh: bool = True,
    convolutions_as_matmuls: bool = True,
    **placement_sizes: int,
) -> Callable[[_F], _F]:
    """Declares the placements that operators inside a function may use.

    The function stays an ordinary function: jit, grad, vmap, export and call it
    as any other. Inside it, and in whatever it calls, `broadcast`, `map_fn` and
    the `reduce_*` operators know the placement and its size `n`.

    A program called inside a program adds its placements; a placement of the same
    name hides the outer one. An operator without `placement=` uses the innermost
    program's placement, if that program declares just one.

    Args:
      placements: name and size of each placement, as a mapping. The name is also
        that of the mesh axis the placed values are sharded over, if the mesh in
        use has one.
      use_abstract_mesh: whether operators without `mesh=` use the mesh that
        `jax.set_mesh` installed.
      convolutions_as_matmuls: whether `map_fn` compiles convolutions for CPU and GPU as
        matmuls, which are faster there, where input and kernel both differ between
        elements. The result is the same up to rounding.
      **placement_sizes: the same as `placements`, as keywords.

    Returns:
      A decorator. The decorated function has the same signature.

    Raises:
      ValueError: if no placement is given, or a size is smaller than 1.
      TypeError: if a size is no Python integer, or the decorated function is a
        coroutine or generator: the placements would not hold across an `await` or a
        `yield`.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax
      >>> @drjax.program(clients=3)
      ... def sum_of_squares(x):
      ...     squares = drjax.map_fn(jnp.square, drjax.broadcast(x))
      ...     return drjax.reduce_sum(squares)
      >>> print(sum_of_squares(2.0))
      12.0

    References:
      Rush et al., DrJAX: Scalable and Differentiable MapReduce Primitives in JAX,
      arXiv:2403.07128.
    """
    if placements is not None and not isinstance(placements, Mapping):
        raise TypeError(
            "drjax.program: `placements` is a mapping from names to sizes, but got "
            f"{placements!r}. For a placement called 'placements', write "
            "drjax.program(placements={'placements': n})."
        )
    sizes = {**(placements or {}), **placement_sizes}
    if len(sizes) != len(placements or {}) + len(placement_sizes):
        raise ValueError(
            f"drjax.program: a placement is given twice, in {placements!r} and in "
            f"{placement_sizes!r}."
        )
    if not sizes:
        raise ValueError(
            "drjax.program: no placement given. Name one and its size, as in "
            "drjax.program(clients=10)."
        )
    declared = tuple(
        Placement(
            _checked_name(name),
            _checked_size(name, size),
            bool(use_abstract_mesh),
            bool(convolutions_as_matmuls),
            mesh=None,
            own=True,
            mapped=False,
        )
        for name, size in sizes.items()
    )

    def decorator(fn: _F) -> _F:
        _check_decorable(fn)

        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return _call_in_scope(declared, fn, args, kwargs)

        return wrapper  # pyright: ignore[reportReturnType]

    return decorator


def _call_in_scope(
    declared: tuple[Placement, ...], fn: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if sizes := dict(_resized.value):
        declared = tuple(
            p._replace(size=sizes.get((p.name, p.size), p.size)) for p in declared
        )
    if (mesh := _mesh.of_with_statement()) is not None:
        declared = tuple(p._replace(mesh=mesh) for p in declared)
    scope = declared
    if (outer := _scope.value) and not _in_custom_rule():
        names = {p.name for p in declared}
        kept = (p._replace(own=False) for p in outer if p.name not in names)
        scope = (*kept, *declared)
    with _scope(scope):
        return fn(*args, **kwargs)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(
            f"drjax.program: a placement's name is a string, but got {name!r}."
        )
    return name


def _checked_size(name: str, size: Any) -> int:
    try:
        if isinstance(size, bool | jax.Array):  # No array is an index under jit.
            raise TypeError
        as_int = operator.index(size)
    except TypeError:
        raise TypeError(
            f"drjax.program: the size of placement {name!r} must be a Python integer, "
            f"but got {size!r} of type {type(size).__name__}. If it comes from data, "
            "use a shape, as in drjax.program(clients=batch.shape[0])."
        ) from None
    if as_int < 1:
        raise ValueError(
            f"drjax.program: the size of placement {name!r} must be at least 1, but "
            f"got {as_int}."
        )
    return as_int


def _check_decorable(fn: Any) -> None:
    if not callable(fn):
        raise TypeError(f"drjax.program decorates a function, but got {fn!r}.")
    for kind, is_kind in (
        ("a coroutine", inspect.iscoroutinefunction),
        ("a generator", inspect.isgeneratorfunction),
        ("an async generator", inspect.isasyncgenfunction),
    ):
        if is_kind(fn) or is_kind(type(fn).__call__):
            raise TypeError(
                f"drjax.program cannot decorate {kind} function ({fn!r}): its body "
                "runs after the call has returned, when the placements are no longer "
                "in scope. Decorate the function that does the computing and call it "
                "from there."
            )


def resolve(operator_name: str, name: str | None) -> Placement:
    """The placement an operator works on: `name`, or the innermost program's."""
    scope = _scope.value
    if not scope:
        raise OperatorUndefinedError(
            f"drjax.{operator_name} was called with no placement in scope. Call it "
            "inside a function decorated with drjax.program(clients=n). A thread "
            "started inside a program has no placement, nor has the rule of a "
            "custom_jvp or custom_vjp: decorate the function that runs there."
        )
    if _in_custom_rule():
        raise OperatorUndefinedError(
            f"drjax.{operator_name} was called in the rule of a jax.custom_jvp, "
            "custom_vjp or custom_vmap. JAX runs the rule when it transforms the "
            "function, maybe after the program has returned, so the rule does not know "
            "the program's placements. Decorate the rule itself with drjax.program."
        )
    if name is None:
        own = [p for p in scope if p.own]
        if len(own) > 1:
            raise ValueError(
                f"drjax.{operator_name}: ambiguous placement, {_names(scope)} are in "
                f"scope. Name one, as in drjax.{operator_name}(..., "
                f"placement={own[0].name!r})."
            )
        found = own[0]
    else:
        found = next((p for p in scope if p.name == name), None)
        if found is None:
            raise ValueError(
                f"drjax.{operator_name}: unknown placement {name!r}; in scope: "
                f"{_names(scope)}."
            )
    if found.mapped:
        raise ValueError(
            f"drjax.{operator_name} over {found.name!r} was called inside a function "
            f"mapped over {found.name!r}: there, each element is alone. Do it before "
            "or after the map_fn, and pass the result in as an argument or close over "
            "it."
        )
    return found


def _names(scope: tuple[Placement, ...]) -> str:
    return ", ".join(repr(p.name) for p in scope)


def mapped_names() -> set[str]:
    """The placements of whose maps a body is being traced."""
    return {p.name for p in _scope.value if p.mapped}


def mapped_scope(name: str) -> Any:
    """The context in which the body of a map over placement `name` is traced."""
    return _scope(
        tuple(p._replace(mapped=True) if p.name == name else p for p in _scope.value)
    )


def resized(name: str, declared: int, size: int) -> Any:
    """The context in which programs with so many elements have another number."""
    return _resized((((name, declared), size),))


def _in_custom_rule() -> bool:
    """Whether a custom transformation rule runs, within no program of its own.

    JAX runs such a rule when it differentiates or vmaps. By then the program around the
    custom function may have returned, and the scope may be that of a program which
    merely transforms it: broadcast would use that one's size, a wrong number without an
    error. No public mechanism tells the two apart, so a rule sees no placement but
    those of a program whose frame is nearer than JAX's call of the rule.
    """
    rule_callers, program_code = _rule_callers(), _call_in_scope.__code__
    frame = sys._getframe(2)
    while frame is not None and (code := frame.f_code) is not program_code:
        if id(code) in rule_callers:  # A code object's own hash is slow.
            return True
        frame = frame.f_back
    return False


@functools.cache
def _rule_callers() -> dict[int, types.CodeType]:
    """The code objects from which JAX calls custom rules, learnt by watching it."""
    callers: dict[int, types.CodeType] = {}

    def watch() -> None:
        code = sys._getframe(2).f_code
        callers[id(code)] = code

    @jax.custom_jvp
    def with_jvp(x: Any) -> Any:
        return x

    @with_jvp.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        watch()
        return primals[0], tangents[0]

    @jax.custom_vjp
    def with_vjp(x: Any) -> Any:
        return x

    def fwd(x: Any) -> Any:
        watch()
        return x, None

    def bwd(_: Any, ct: Any) -> Any:
        watch()
        return (ct,)

    with_vjp.defvjp(fwd, bwd)

    @jax.custom_batching.custom_vmap
    def with_vmap(x: Any) -> Any:
        return x

    @with_vmap.def_vmap
    def _(size: int, batched: Any, x: Any) -> Any:
        watch()
        return x, True

    # Only traced: nothing is compiled and no backend is initialised.
    scalar, vector = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((), (1,)))
    jax.eval_shape(jax.grad(lambda x: with_vjp(with_jvp(x))), scalar)
    jax.eval_shape(jax.vmap(with_vmap), vector)
    return callers
