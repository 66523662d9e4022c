"""How the jaxprs in scan, while and cond are joined to their equation's values."""

from typing import Any, NamedTuple

from drjax import _compat


class Port(NamedTuple):
    """How a jaxpr in a loop or branch is joined to the equation's values.

    For each input of the jaxpr, and each output that is a result, the position of the
    operand or result, and by how much an axis is further back there.
    """

    jaxpr: Any
    operands: list[tuple[int, int]]
    results: list[tuple[int, int]]
    carries: list[tuple[int, int]]  # Operands and results in which a carry is.


def operand_bounds(eqn: Any) -> tuple[int, int]:
    """Where a loop's operands are divided.

    Constants, carry and slices of a scan; constants of the predicate, constants of the
    body, and carry of a while.
    """
    if eqn.primitive.name == "scan":
        first, second = _compat.scan_counts(eqn)
    else:
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    return first, first + second


def _ports_of_scan(eqn):
    n_consts, carried = operand_bounds(eqn)
    n_carry = carried - n_consts
    return [
        Port(
            eqn.params["jaxpr"],
            [(j, int(j >= carried)) for j in range(len(eqn.invars))],
            [(k, int(k >= n_carry)) for k in range(len(eqn.outvars))],
            [(n_consts + k, k) for k in range(n_carry)],
        )
    ]


def _ports_of_while(eqn):
    n_cond, n_consts = operand_bounds(eqn)
    init = [(j, 0) for j in range(n_consts, len(eqn.invars))]
    results = [(k, 0) for k in range(len(eqn.outvars))]
    of_cond = [(j, 0) for j in range(n_cond)]
    of_body = [(j, 0) for j in range(n_cond, n_consts)]
    carries = [(j, k) for k, (j, _) in enumerate(init)]
    return [
        Port(eqn.params["cond_jaxpr"], of_cond + init, [], carries),
        Port(eqn.params["body_jaxpr"], of_body + init, results, carries),
    ]


def _ports_of_cond(eqn):
    operands = [(j, 0) for j in range(1, len(eqn.invars))]
    results = [(k, 0) for k in range(len(eqn.outvars))]
    return [Port(jaxpr, operands, results, []) for jaxpr in eqn.params["branches"]]


PORTS = {"scan": _ports_of_scan, "while": _ports_of_while, "cond": _ports_of_cond}
