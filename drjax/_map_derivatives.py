"""map_p's derivatives: forward mode, partial evaluation, reverse mode.

Write b for the body, x_i for the placed and s for the shared operands, y_i = b(x_i, s).

    jvp:        dy_i = Db(x_i, s)[dx_i, ds]
                is a map, over the same elements, of the body's jvp.
    transpose:  for b linear in (x_i, s), and cotangents ct_i,
                  sum_i <ct_i, b(x_i, s)>
                    = sum_i <b^T(ct_i)_x, x_i> + <sum_i b^T(ct_i)_s, s>
                is a map of the body's transpose: the cotangent of a placed operand is a
                placed result, and that of a shared operand a summed one.

So the derivative of a map is a map, and of a program a program, to any order.

References:
  Rush et al., Federated Automatic Differentiation, arXiv:2301.07806.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend import linear_util as lu
from jax.extend.core import gensym
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from drjax import _convolutions, _mesh
from drjax._compat import ClosedJaxpr
from drjax._contractions import contraction_bulk
from drjax._jaxprs import (
    as_fun,
    cached_by_jaxpr,
    dce,
    debug_info,
    drop,
    equations,
    is_in,
    is_var,
    merge,
    outputs_reached,
    pick,
    reached,
    struct,
    trace,
    where,
    without_effects,
    without_replayed_effects,
)
from drjax._map import abstract_eval, bind, evaluate, make_bulk, map_p


#
# Forward mode.
#
def _jvp(primals, tangents, *, body, in_placed, out_placed, name, bulk, **params):
    nonzero = tuple(not isinstance(t, ad.Zero) for t in tangents)
    jvp_body, nonzero_out, consts = _jvp_jaxpr(body, nonzero)
    results = bind(
        [*primals, *pick(tangents, nonzero)],
        consts,
        body=jvp_body,
        in_placed=[*in_placed, *pick(in_placed, nonzero)],
        out_placed=[*out_placed, *pick(out_placed, nonzero_out)],
        name=f"jvp_{name}",
        bulk=bulk and _jvp_bulk(bulk, nonzero, nonzero_out),
        **params,
    )
    outs, out_tangents = results[: len(out_placed)], results[len(out_placed) :]
    zeros = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    return outs, merge(nonzero_out, out_tangents, drop(zeros, nonzero_out))


@cached_by_jaxpr
def _jvp_jaxpr(jaxpr, nonzero):
    """(inputs, nonzero tangents) -> (outputs, nonzero tangents).

    Returns the jaxpr, which outputs have a nonzero tangent, and what the rule of a
    custom_jvp closed over.
    """
    inexact = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in jaxpr.out_avals]

    def fun(*args):
        primals, tangents = args[: len(nonzero)], args[len(nonzero) :]

        def of_varying(*varying):
            return as_fun(jaxpr)(*merge(nonzero, varying, drop(primals, nonzero)))

        outs, out_tangents = jax.jvp(of_varying, (*pick(primals, nonzero),), tangents)
        return [*outs, *pick(out_tangents, inexact)]

    tangent_avals = [aval.to_tangent_aval() for aval in pick(jaxpr.in_avals, nonzero)]
    with_tangents, consts = trace(
        fun, [*jaxpr.in_avals, *tangent_avals], debug_info(jaxpr)
    )
    # jax.jvp has made explicit zeros of the tangents that are always zero.
    n_in, n_out = len(nonzero), len(inexact)
    is_tangent = [
        n_in <= i < n_in + sum(nonzero) for i in range(len(with_tangents.in_avals))
    ]
    varies = outputs_reached(with_tangents, is_tangent)[n_out:]
    nonzero_out = merge(inexact, varies, [False] * (n_out - sum(inexact)))
    pruned, _ = dce(with_tangents, [True] * n_out + varies, keep_inputs=True)
    return pruned, tuple(nonzero_out), consts


def _jvp_bulk(bulk, nonzero, nonzero_out):
    """The bulk form of the jvp: the jvp of the bulk form."""
    varying = tuple(nonzero[i] for i in bulk.operands)
    jaxpr, varies, consts = _jvp_jaxpr(bulk.jaxpr, varying)
    if varies != tuple(nonzero_out[r] for r in bulk.results):
        return None
    tangent_operand = {i: len(nonzero) + k for k, i in enumerate(where(nonzero))}
    tangent_result = {r: len(nonzero_out) + k for k, r in enumerate(where(nonzero_out))}
    return make_bulk(
        jaxpr,
        consts,
        (*bulk.operands, *(tangent_operand[i] for i in pick(bulk.operands, varying))),
        (*bulk.results, *(tangent_result[r] for r in pick(bulk.results, varies))),
    )


ad.primitive_jvps[map_p] = _jvp


#
# Partial evaluation: one map computes what it can from the known operands, another the
# rest; residuals flow from the first to the second.
#
@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
    known: ClosedJaxpr  # known inputs -> known outputs, saved residuals
    unknown: ClosedJaxpr  # forwarded inputs and outputs, saved, unknown inputs -> rest
    out_known: tuple[bool, ...]
    forwarded_inputs: tuple[int, ...]  # The known inputs that are residuals,
    forwarded_outputs: tuple[int, ...]  # and the known outputs.


@cached_by_jaxpr
def _split(body, unknown_in, in_placed, out_placed) -> _Split:
    seen: dict[str, Any] = {}
    info = debug_info(body)

    def known_fun(*known_args):
        values = iter(known_args)
        partial_values = [
            pe.PartialVal.unknown(aval)
            if unknown
            else pe.PartialVal.known(next(values))
            for aval, unknown in zip(body.in_avals, unknown_in, strict=True)
        ]
        fun = lu.wrap_init(as_fun(body), debug_info=info)
        jaxpr, outs, residuals = pe.trace_to_jaxpr_nounits(fun, partial_values, False)
        out_known = tuple(out.is_known() for out in outs)
        seen.update(jaxpr=jaxpr, out_known=out_known)
        return [*(out.get_known() for out in pick(outs, out_known)), *residuals]

    # Partial evaluation runs no user code, so it closes over nothing.
    everything, consts = trace(known_fun, drop(body.in_avals, unknown_in), info)
    assert not consts, consts
    out_known = seen["out_known"]
    invars, outvars = everything.jaxpr.invars, everything.jaxpr.outvars
    outvars, residuals = outvars[: sum(out_known)], outvars[sum(out_known) :]

    # A residual is forwarded if it is an input or a placed output of the known map. It
    # is computed again if it depends on shared operands alone: saved, it would be n
    # copies of one value. Else it is saved.
    input_of = {v: i for i, v in enumerate(invars)}
    placed_outvars = zip(outvars, pick(out_placed, out_known), strict=True)
    output_of = {
        v: i for i, (v, placed) in enumerate(placed_outvars) if placed and is_var(v)
    }
    of_one_element = reached(everything, drop(in_placed, unknown_in))
    forwarded = [is_in(v, input_of) or is_in(v, output_of) for v in residuals]
    saved = [
        not f and is_in(v, of_one_element)
        for f, v in zip(forwarded, residuals, strict=True)
    ]
    again = [not f and not s for f, s in zip(forwarded, saved, strict=True)]

    pure = without_effects(everything)  # What is computed again depends on none.
    recompute, used = dce(pure, [False] * len(outvars) + again)
    forwarded_vars = set(pick(residuals, forwarded))
    forwarded_inputs = [
        i for i, v in enumerate(invars) if v in forwarded_vars or used[i]
    ]
    forwarded_outputs = [
        i for v, i in output_of.items() if v in forwarded_vars and v not in input_of
    ]

    def unknown_fun(*args):
        values = iter(args)
        env = {invars[i]: next(values) for i in forwarded_inputs}
        recomputed = as_fun(recompute)(*(env[v] for v in pick(invars, used)))
        env |= {outvars[i]: next(values) for i in forwarded_outputs}
        from_known = [next(values) for _ in where(saved)]
        new = merge(drop(saved, forwarded), from_known, recomputed)
        old = [env[v] for v in pick(residuals, forwarded)]
        return eval_jaxpr(seen["jaxpr"], merge(forwarded, old, new), *values)

    unknown_avals = [
        *(invars[i].aval for i in forwarded_inputs),
        *(outvars[i].aval for i in forwarded_outputs),
        *(v.aval for v in pick(residuals, saved)),
        *pick(body.in_avals, unknown_in),
    ]
    unknown, consts = trace(unknown_fun, unknown_avals, info)
    assert not consts, consts
    n_residuals = len(unknown_avals) - sum(unknown_in)
    is_unknown = [i >= n_residuals for i in range(len(unknown_avals))]
    unknown = without_replayed_effects(unknown, is_unknown)
    known, _ = dce(everything, [True] * len(outvars) + saved, keep_inputs=True)
    return _Split(
        known, unknown, out_known, tuple(forwarded_inputs), tuple(forwarded_outputs)
    )


def _split_params(split, unknown_in, *, in_placed, out_placed, name, bulk, **params):
    """The parameters of the known and of the unknown map."""
    known_in_placed = drop(in_placed, unknown_in)
    known_out_placed = pick(out_placed, split.out_known)
    saved_placed = [True] * (len(split.known.out_avals) - len(known_out_placed))
    known_in = [not unknown for unknown in unknown_in]
    known: dict[str, Any] = dict(
        params,
        body=split.known,
        in_placed=(*known_in_placed,),
        out_placed=(*known_out_placed, *saved_placed),
        name=name,
        bulk=bulk and bulk.restrict(where(split.out_known), where(known_in)),
    )
    unknown: dict[str, Any] = dict(
        params,
        body=split.unknown,
        in_placed=(
            *(known_in_placed[i] for i in split.forwarded_inputs),
            *(known_out_placed[i] for i in split.forwarded_outputs),
            *saved_placed,
            *pick(in_placed, unknown_in),
        ),
        out_placed=(*drop(out_placed, split.out_known),),
        name=f"lin_{name}",
    )
    unknown["bulk"] = contraction_bulk(
        split.unknown,
        unknown["in_placed"],
        unknown["out_placed"],
        *(params[key] for key in ("placement", "n", "mesh")),
    )
    return known, unknown


def _residuals(split, known_operands, known_results):
    """What the unknown map takes from the known map's operands and results."""
    n_known = sum(split.out_known)
    return [
        *(known_operands[i] for i in split.forwarded_inputs),
        *(known_results[i] for i in split.forwarded_outputs),
        *known_results[n_known:],
    ]


def _partial_eval(jaxpr_trace, *tracers, body, **params):
    unknown_in = tuple(not t.is_known() for t in tracers)
    split = _split(body, unknown_in, params["in_placed"], params["out_placed"])
    known_params, unknown_params = _split_params(split, unknown_in, **params)
    known_operands = [t.pval.get_known() for t in drop(tracers, unknown_in)]
    known_results = _bind_unless_empty(known_operands, known_params)
    residuals = _residuals(split, known_operands, known_results)
    unknown_operands = [
        *map(jaxpr_trace.new_instantiated_const, residuals),
        *pick(tracers, unknown_in),
    ]
    unknown_outs = jaxpr_trace.default_process_primitive(
        map_p, unknown_operands, unknown_params
    )
    known_outs = known_results[: sum(split.out_known)]
    return merge(split.out_known, map(jaxpr_trace.new_const, known_outs), unknown_outs)


def _bind_unless_empty(operands, params):
    body = params["body"]
    empty = not body.out_avals and not body.effects
    return [] if empty else map_p.bind(*operands, **params)


pe.custom_partial_eval_rules[map_p] = _partial_eval


#
# Partial evaluation of an equation, for jax.checkpoint. The known part computes the
# known outputs and saves nothing; backwards, the whole map is computed again. If the
# body has effects, or the policy says to save what this map computes, the residuals are
# saved instead, so that nothing (an effect, above all) happens twice.
#
def _partial_eval_eqn(saveable, unknown_in, instantiated_in, eqn):
    unknown_in, params = tuple(unknown_in), dict(eqn.params)
    split = _split(
        params.pop("body"), unknown_in, params["in_placed"], params["out_placed"]
    )
    known_params, unknown_params = _split_params(split, unknown_in, **params)
    known_invars = drop(eqn.invars, unknown_in)
    known_outvars = pick(eqn.outvars, split.out_known)
    in_avals = [v.aval for v in eqn.invars]
    if split.known.effects or saveable(map_p, *in_avals, **eqn.params) is True:
        newvar = gensym()
        result_avals, _ = abstract_eval(**known_params)
        saved = [newvar(aval) for aval in result_avals[len(known_outvars) :]]
        residuals = _residuals(split, known_invars, [*known_outvars, *saved])
        instantiated = {*filter(is_var, pick(eqn.invars, instantiated_in))}
        needed = [v for v in residuals if not is_in(v, instantiated)]
        staged = eqn.replace(
            invars=[*residuals, *pick(eqn.invars, unknown_in)],
            outvars=drop(eqn.outvars, split.out_known),
            params=unknown_params,
            effects=split.unknown.effects,
        )
        instantiated_out = [not known for known in split.out_known]
    else:
        saved, needed, staged = [], drop(eqn.invars, instantiated_in), eqn
        instantiated_out = [True] * len(eqn.outvars)
        is_output = [i < len(known_outvars) for i in range(len(split.known.out_avals))]
        known_params["body"], _ = dce(split.known, is_output, keep_inputs=True)
        known_params["out_placed"] = known_params["out_placed"][: len(known_outvars)]
    known = eqn.replace(
        invars=known_invars,
        outvars=[*known_outvars, *saved],
        params=known_params,
        effects=known_params["body"].effects,
    )
    unknown_out = [not known for known in split.out_known]
    is_empty = not known.outvars and not known.effects
    needed = [*filter(is_var, needed)]
    return None if is_empty else known, staged, unknown_out, instantiated_out, needed


pe.partial_eval_jaxpr_custom_rules[map_p] = _partial_eval_eqn


#
# Reverse mode: the transpose of a map that is linear in some operands.
#
def _transpose(cts, *args, body, in_placed, out_placed, name, bulk, **params):
    linear = tuple(ad.is_undefined_primal(x) for x in args)
    has_ct = tuple(not isinstance(ct, ad.Zero) for ct in cts)
    transposed, nonzero, consts = _transpose_jaxpr(body, linear, has_ct)
    operand_placed = [*drop(in_placed, linear), *pick(out_placed, has_ct)]
    result_placed = pick(pick(in_placed, linear), nonzero)
    at = tuple(params[key] for key in ("placement", "n", "mesh"))
    new_bulk = None
    if not all(result_placed):
        new_bulk = _transpose_bulk(
            body, bulk, linear, has_ct, nonzero, in_placed, out_placed, *at
        ) or contraction_bulk(
            transposed,
            (*operand_placed, *(False for _ in consts)),
            tuple(result_placed),
            *at,
        )
    results = bind(
        [*drop(args, linear), *pick(cts, has_ct)],
        consts,
        body=transposed,
        in_placed=operand_placed,
        out_placed=result_placed,
        name=f"transpose_{name}",
        bulk=new_bulk,
        **params,
    )
    zeros = [ad.Zero(x.aval.to_ct_aval()) for x in pick(args, linear)]
    in_cts = merge(nonzero, results, drop(zeros, nonzero))
    return merge(linear, in_cts, [None] * len(args))


@cached_by_jaxpr
def _transpose_jaxpr(jaxpr, linear, has_ct):
    """(non-linear inputs, cotangents) -> nonzero cotangents of the linear inputs.

    Returns the jaxpr, which linear inputs have one, and what the rule of a custom_vjp
    closed over.
    """
    fun, avals = _transpose_fun(
        as_fun(jaxpr), jaxpr.in_avals, jaxpr.out_avals, linear, has_ct
    )
    transposed, consts = trace(fun, avals, debug_info(jaxpr))
    n_constant = len(linear) - sum(linear)
    is_ct = [
        n_constant <= i < n_constant + sum(has_ct)
        for i in range(len(transposed.in_avals))
    ]
    nonzero = outputs_reached(transposed, is_ct)
    pruned, _ = dce(transposed, nonzero, keep_inputs=True)
    return pruned, tuple(nonzero), consts


def _transpose_fun(fun, in_avals, out_avals, linear, has_ct):
    """(non-linear inputs, cotangents) -> cotangents, and the types of its inputs."""
    constant_avals, linear_avals = drop(in_avals, linear), pick(in_avals, linear)

    def transposed(*args):
        constant, cts = args[: len(constant_avals)], args[len(constant_avals) :]

        def of_linear(*xs):
            return pick(fun(*merge(linear, xs, constant)), has_ct)

        return jax.linear_transpose(of_linear, *map(struct, linear_avals))([*cts])

    ct_avals = [aval.to_ct_aval() for aval in pick(out_avals, has_ct)]
    return transposed, [*constant_avals, *ct_avals]


@cached_by_jaxpr
def _transpose_bulk(
    body, bulk, linear, has_ct, nonzero, in_placed, out_placed, placement, n, mesh
):
    """The bulk form of a transpose: the transpose of the vmapped body.

    None for what linearizing leaves of a custom_vjp, whose rule need not be linear: the
    transpose applies it to each element's cotangent, and this would, to their sum.
    """
    if any(equations(body, "custom_lin")) or _convolutions.refused(body, mesh):
        return None

    def whole(avals, placed):
        return [
            _mesh.placed_aval(aval, placement, n, mesh) if p else aval
            for aval, p in zip(avals, placed, strict=True)
        ]

    fun, avals = _transpose_fun(
        evaluate(body, bulk, in_placed, out_placed, placement, n, mesh),
        whole(body.in_avals, in_placed),
        whole(body.out_avals, out_placed),
        linear,
        has_ct,
    )
    try:
        transposed, consts = trace(fun, avals, debug_info(body))
    except NotImplementedError:  # JAX cannot transpose what vmap makes of some conds.
        return None
    pruned, _ = dce(transposed, nonzero, keep_inputs=True)
    return make_bulk(pruned, consts, range(len(avals)), range(sum(nonzero)))


ad.primitive_transposes[map_p] = _transpose
