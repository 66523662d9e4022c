"""Writes what the clients of a plan run as one file."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.export import Exported
from jax.extend import mlir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import ir, make_ir_context
from jax.sharding import Mesh

from drjax.plan import Branch, MapReduce, Plan, Scan, Server, While
from federated._artefact import FORMAT, SUFFIX, VERSION, packed, type_of

# Where a client's value comes from: ("argument", leaf), ("round", path, number) or
# ("server",). A loop may give it several.
Origins = set[tuple[Any, ...]]
Rounds = dict[str, tuple[MapReduce, list[Origins]]]


def export_clients(plan: Plan, *, platforms: Sequence[str] | None = None) -> bytes:
    """Writes what the clients of a plan run as one file, for `load_clients`.

    The file is a zip archive: a manifest, and the StableHLO of each round, for one
    client. The same plan gives the same bytes in every process of one JAX. Paths and
    lines of the program's source are not in it; names of its functions are.

    The manifest, `manifest.json`, has

    - `format` and `version` of the file; `plan`, the plan's hash; `jax`, the version
      that wrote it; `platforms`;
    - `rounds`, a list in the order of the plan. Each has

      - `path`, such as `2/body/0`: the number of a stage in the plan, or in the `body`
        or `predicate` of a loop, or in one of the `branches` of another;
      - `placement` and `n`, its number of elements;
      - `server`: what the server sends to all clients;
      - `own`: what a client has, and `from` where. `{"argument": "args[1]", "leaf": 1}`
        is an argument of the program, `{"round": "0", "kept": 2}` what the client has
        kept in another round, `{"server": "part"}` its part of what the server hands
        out. In a loop it may be one the first time, and another one later. Where a loop
        slices or stacks values, it is a slice;
      - `sends`: what leaves the client, and the `operation` that reduces it over all of
        them, as `sum`. Nothing else leaves it;
      - `keeps`: what the client keeps for later rounds, or as its part of a result;
      - `sha256`, `size` and `calling_convention` of its StableHLO.

    A type is a `shape` and a `dtype`. A typed PRNG key has a dtype as `key<fry>`, and
    `key_data`: what `jax.random.key_data` gives of it, and the `impl` with which
    `jax.random.wrap_key_data` makes it again.

    Args:
      plan: the plan of a program, or of a derivative of one.
      platforms: as 'cpu', 'cuda', 'rocm' and 'tpu'; by default this process's.

    Returns:
      The bytes of the file.

    Raises:
      TypeError: if `plan` is not a plan.
      ValueError: if it has no round.
      NotImplementedError: if a round calls Python, as by `jax.debug.print`.

    Example:
      >>> import jax.numpy as jnp
      >>> import drjax, federated
      >>> @drjax.program(clients=3)
      ... def total(w, x):
      ...     return drjax.reduce_sum(drjax.map_fn(lambda x: w * x, x))
      >>> plan = drjax.make_plan(total)(2.0, jnp.arange(3.0))
      >>> clients = federated.load_clients(federated.export_clients(plan))
      >>> (round,) = clients.manifest["rounds"]
      >>> print(round["own"][0]["from"], round["sends"][0]["operation"])
      [{'argument': 'args[1]', 'leaf': 1}] sum
      >>> (sent,) = clients.rounds[round["path"]](jnp.int32(0), 2.0, 5.0)
      >>> print(sent)
      10.0
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            "federated.export_clients: expected a plan, but got "
            f"{type(plan).__name__}. Make one of the program and its arguments: "
            "drjax.make_plan(fn)(*args)."
        )
    found: Rounds = {}
    _follow(plan, [{("argument", leaf)} for leaf in range(len(plan.inputs))], "", found)
    if not found:
        raise ValueError(
            "federated.export_clients: the plan has no round, so there is nothing for "
            "clients to do. Usually the function uses no operator on what they have."
        )
    names = _argument_names(plan)
    rounds, files, written_for = [], {}, ()
    for path, (stage, origins) in found.items():
        with jax.set_mesh(Mesh(np.empty((), object), ())):  # Not the server's, if any.
            exported = jax.export.deserialize(bytearray(stage.export(platforms)))
        code = bytes(_without_locations(exported).serialize())
        files[path + SUFFIX], written_for = code, exported.platforms
        rounds.append(
            {
                "path": path,
                "placement": stage.placement,
                "n": stage.n,
                **_interface(stage, [_described(each, names) for each in origins]),
                "sha256": hashlib.sha256(code).hexdigest(),
                "size": len(code),
                "calling_convention": exported.calling_convention_version,
            }
        )
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.hash,
        "jax": jax.__version__,
        "platforms": [*written_for],
        "rounds": rounds,
    }
    return packed(manifest, files)


def _follow(
    plan: Plan, given: list[Origins], path: str, found: Rounds
) -> list[Origins]:
    """The origins of a plan's results, for those of its inputs.

    Adds each round to `found`, with the origins of its placed inputs. Those of server
    values do not matter.
    """
    origins = dict(zip(plan.inputs, given, strict=True))

    def read(numbers: Sequence[int]) -> list[Origins]:
        server = {("server",)}
        return [
            server if i in plan.scattered else origins.get(i, server) for i in numbers
        ]

    def write(numbers: Sequence[int], values: Sequence[Origins]) -> None:
        origins.update(zip(numbers, values, strict=True))

    def loop(stage: Scan | While, here: str) -> list[Origins]:
        """The carry, from before the loop or from any time of it, and the rest."""
        is_scan = isinstance(stage, Scan)
        constants = read(stage.constants if is_scan else stage.body_constants)
        xs = read(stage.xs if is_scan else ())
        carry, outs, before = read(stage.init), [], None
        while carry != before:
            if not is_scan:
                known = read(stage.predicate_constants)
                _follow(stage.predicate, [*known, *carry], f"{here}/predicate/", found)
            outs = _follow(
                stage.body, [*constants, *carry, *xs], f"{here}/body/", found
            )
            now = zip(carry, outs[: len(carry)], strict=True)
            before, carry = carry, [a | b for a, b in now]
        return [*carry, *outs[len(carry) :]]

    for k, stage in enumerate(plan.stages):
        here = f"{path}{k}"
        match stage:
            case Server():
                pass
            case MapReduce():
                own = read(stage.placed_inputs)
                _, known = found.setdefault(here, (stage, [set() for _ in own]))
                for at_any_time, now in zip(known, own, strict=True):
                    at_any_time |= now
                kept = range(len(stage.placed_outputs))
                write(stage.placed_outputs, [{("round", here, j)} for j in kept])
            case Scan():
                write((*stage.carry, *stage.ys), loop(stage, here))
            case While():
                write(stage.carry, loop(stage, here))
            case Branch():
                operands = read(stage.operands)
                outs = [
                    _follow(branch, operands, f"{here}/branches/{j}/", found)
                    for j, branch in enumerate(stage.branches)
                ]
                write(stage.results, [*map(set.union, *outs)])
    return read(plan.outputs)


def _argument_names(plan: Plan) -> list[str]:
    """What the arguments' leaves are called, by number."""
    tree = jax.tree.unflatten(plan.in_tree, range(len(plan.inputs)))
    names = [""] * len(plan.inputs)
    for kind, arguments in zip(("args", "kwargs"), tree, strict=True):
        for path, leaf in jax.tree.leaves_with_path(arguments):
            names[leaf] = kind + jax.tree_util.keystr(path)
    return names


def _described(origins: Origins, names: list[str]) -> list[dict[str, Any]]:
    """Origins, as in the manifest."""
    described: list[dict[str, Any]] = []
    for origin in sorted(origins):
        match origin:
            case ("argument", leaf):
                described.append({"argument": names[leaf], "leaf": leaf})
            case ("round", path, number):
                described.append({"round": path, "kept": number})
            case _:
                described.append({"server": "part"})
    return described


def _interface(stage: MapReduce, origins: list[Any]) -> dict[str, Any]:
    """What goes into a round and comes out of it, as in the manifest."""
    _, *inputs = map(type_of, stage.body.in_avals)
    outputs = [*map(type_of, stage.body.out_avals)]
    n_server, n_sent = len(stage.server_inputs), len(stage.reductions)
    own = zip(inputs[n_server:], origins, strict=True)
    sends = zip(outputs[:n_sent], stage.reductions, strict=True)
    return {
        "server": inputs[:n_server],
        "own": [{"type": value, "from": sources} for value, sources in own],
        "sends": [{"type": value, "operation": name} for value, (name, _) in sends],
        "keeps": outputs[n_sent:],
    }


def _without_locations(exported: Exported) -> Exported:
    """The same without the paths and lines of its source.

    They tell clients what they need not know, and change with the place of the program
    on the server's disk.
    """
    with make_ir_context():
        module = ir.Module.parse(exported.mlir_module())
        text = module.operation.get_asm(enable_debug_info=False)
    weeks = stablehlo.StablehloCompatibilityRequirement.WEEK_4  # As in jax.export.
    version = stablehlo.get_version_from_compatibility_requirement(weeks)
    code = mlir.serialize_portable_artifact(text, version, False)
    return dataclasses.replace(exported, mlir_module_serialized=code)
