"""What differs between the supported series of JAX, 0.10 and 0.12."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import partial_eval as pe

# In 0.12 `ClosedJaxpr` is `Jaxpr` itself, its constants leading inputs with values, and
# type checkers do not see that name.
if TYPE_CHECKING:

    class ClosedJaxpr:
        """What type checkers are told of it."""

        jaxpr: Any
        consts: Any
        in_avals: list[Any]
        out_avals: list[Any]
        effects: Any

        def __init__(self, jaxpr: Any, consts: Any) -> None: ...

else:
    from jax.extend.core import ClosedJaxpr


# A jit that leaves no trace of itself in an outer jaxpr.
_inline: Any = getattr(jax, "Inline", None)
inlined_jit = functools.partial(
    jax.jit, inline=_inline.JAX_EARLY if _inline is not None else True
)


def register_dce_rule(
    primitive: Primitive,
    rule: Callable[[list[bool], JaxprEqn], tuple[list[bool], JaxprEqn | None]],
) -> None:
    """Registers a rule `(used_outputs, eqn) -> (used_inputs, eqn or None)`.

    JAX 0.10 calls it like that; 0.12 as `(used_outputs, live_inputs, eqn)`.
    """
    pe.dce_rules[primitive] = lambda used_outputs, *rest: rule(used_outputs, rest[-1])


def open_consts(jaxpr: Any, n: int) -> ClosedJaxpr:
    """Turns the `n` constants of a just traced jaxpr into trailing inputs.

    They are its leading inputs in JAX 0.12, and constvars in 0.10.
    """
    variables = [*jaxpr.constvars, *jaxpr.invars]
    invars = [*variables[n:], *variables[:n]]
    return ClosedJaxpr(jaxpr.replace(constvars=[], invars=invars), ())


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are its carry."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    constants, carry, _ = eqn.params["ft_in"].unpack()
    return len(constants), len(carry)
