"""The file of what clients run: its form, and how it is read.

A client needs this file of the library, and JAX: neither drjax nor the program.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FORMAT, VERSION = "federated.clients", 1
MANIFEST, SUFFIX = "manifest.json", ".stablehlo"


class Clients(NamedTuple):
    """What clients run, as `load_clients` returns it.

    Args:
      manifest: what the file says of itself, see `export_clients`.
      rounds: for each of `manifest["rounds"]`, by its path, a jitted function
        `(index, *server, *own) -> [*sends, *keeps]` of one client. `index` is its int32
        position in the cohort.
    """

    manifest: dict[str, Any]
    rounds: Mapping[str, Callable[..., list[Any]]]


#
# The form of the file.
#
_DATA = {"shape": [int], "dtype": str, "impl": str}
_TYPE = {"shape": [int], "dtype": str, "key_data?": _DATA}
_ORIGIN = {"argument?": str, "leaf?": int, "round?": str, "kept?": int, "server?": str}
_ROUND = {
    "path": str,
    "placement": str,
    "n": int,
    "server": [_TYPE],
    "own": [{"type": _TYPE, "from": [_ORIGIN]}],
    "sends": [{"type": _TYPE, "operation": str}],
    "keeps": [_TYPE],
    "sha256": str,
    "size": int,
    "calling_convention": int,
}
_SCHEMA = {  # A key that ends in '?' may be missing.
    "format": str,
    "version": int,
    "plan": str,
    "jax": str,
    "platforms": [str],
    "rounds": [_ROUND],
}
_PATH = re.compile(r"\d+(/(body|predicate|branches/\d+)/\d+)*")


def packed(manifest: dict[str, Any], files: dict[str, bytes]) -> bytes:
    """The archive, of which every byte is given by what is in it.

    It is not compressed: how that is done depends on the version of zlib.
    """
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {MANIFEST: text.encode(), **files}.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, data)
    return out.getvalue()


def type_of(aval: Any) -> dict[str, Any]:
    """A type, as in the manifest."""
    described = {"shape": list(aval.shape), "dtype": str(aval.dtype)}
    if not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return described
    impls: list[str] = []

    def data_of(key):
        impls.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    data = jax.eval_shape(data_of, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return {**described, "key_data": {**type_of(data), "impl": impls[0]}}


#
# Reading it.
#
def load_clients(data: bytes) -> Clients:
    """Reads what `export_clients` wrote, and checks all of it first.

    It needs neither the program nor its plan. What it gives is code: load a file that
    comes from a server which you trust. Nothing of it is run before it is called.

    Args:
      data: the file's bytes.

    Returns:
      `Clients`: the manifest, and a function for each round.

    Raises:
      ValueError: if a byte is not as it was written; if the file is of another version,
        or for other platforms than this process's; or if a function does not have the
        types that the manifest says.
      TypeError: if `data` is not bytes.

    Example:
      >>> import federated
      >>> federated.load_clients(b"GIF89a")
      Traceback (most recent call last):
        ...
      ValueError: federated.load_clients: the file is damaged: it is no zip archive ...
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            "federated.load_clients: data is the bytes of a file, but got "
            f"{type(data).__name__}. Usually it is a path: read the file first."
        )
    files = _unpacked(bytes(data))
    manifest = _read(files.pop(MANIFEST, b""))
    names = [of_round["path"] + SUFFIX for of_round in manifest["rounds"]]
    if len({*names}) != len(names) or {*names} != {*files}:
        raise _damaged(f"its manifest is of the files {names}, but it has {[*files]}")
    for of_round, name in zip(manifest["rounds"], names, strict=True):
        says = of_round["sha256"], of_round["size"]
        if says != (hashlib.sha256(files[name]).hexdigest(), len(files[name])):
            raise _damaged(f"{name} is not of the size and SHA-256 in its manifest")
    if packed(manifest, {name: files[name] for name in names}) != data:
        raise _damaged("it has bytes that export_clients does not write")
    _check_runs_here(manifest)
    rounds = {
        of_round["path"]: _function(manifest, of_round, files[name])
        for of_round, name in zip(manifest["rounds"], names, strict=True)
    }
    return Clients(manifest, rounds)


def _damaged(what: str) -> ValueError:
    return ValueError(
        f"federated.load_clients: the file is damaged: {what}. Usually it was cut or "
        "changed on its way here. Get it again."
    )


def _unpacked(data: bytes) -> dict[str, bytes]:
    """The archive's files by name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            is_stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
            # Entries may overlap: each is smaller than the file, their sum is not.
            if is_stored and sum(e.file_size for e in entries) <= len(data):
                files = {entry.filename: archive.read(entry) for entry in entries}
            else:
                files = None
    except Exception as error:  # zipfile raises errors of many kinds.
        raise _damaged(f"it is no zip archive that can be read ({error})") from error
    if files is None:
        raise _damaged("it is compressed, or says that more is in it than it holds")
    if len(files) != len(entries):
        raise _damaged("it has two files of one name")
    return files


def _read(text: bytes) -> dict[str, Any]:
    """The manifest, checked."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its {MANIFEST} cannot be read ({error})") from error
    given = manifest if isinstance(manifest, dict) else {}
    if given.get("format") != FORMAT:
        raise _damaged(f"its {MANIFEST} is not that of {FORMAT}")
    if given.get("version") != VERSION:
        raise ValueError(
            f"federated.load_clients: the file is of version {given.get('version')!r}, "
            f"and this library reads version {VERSION}. Usually another version of the "
            "library wrote it: use the same on both sides."
        )
    _check(manifest, _SCHEMA, MANIFEST)
    for of_round in manifest["rounds"]:
        if not _PATH.fullmatch(of_round["path"]):
            raise _damaged(f"a round in it has the path {of_round['path']!r}")
    return manifest


def _check(value: Any, schema: Any, where: str) -> None:
    """Checks the structure of a value of JSON."""
    if isinstance(schema, dict):
        known = {key.removesuffix("?"): of_key for key, of_key in schema.items()}
        needed = {key for key in schema if not key.endswith("?")}
        if not isinstance(value, dict) or not needed <= {*value} <= {*known}:
            raise _damaged(f"{where} does not have the keys {sorted(known)}")
        for key, item in value.items():
            _check(item, known[key], f"{where}: {key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise _damaged(f"{where} is not a list")
        for item in value:
            _check(item, schema[0], where)
    elif type(value) is not schema:
        raise _damaged(f"{where} is not of type {schema.__name__}")


def _check_runs_here(manifest: dict[str, Any]) -> None:
    """Checks that JAX can run what was written, in this process."""
    platform = jax.export.default_export_platform()
    if platform not in manifest["platforms"]:
        both = (*manifest["platforms"], platform)
        raise ValueError(
            "federated.load_clients: the file is for the platforms "
            f"{manifest['platforms']}, but this process runs on {platform!r}. Export "
            f"it for both: federated.export_clients(plan, platforms={both})."
        )
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    for of_round in manifest["rounds"]:
        if not oldest <= of_round["calling_convention"] <= newest:
            raise _of_another_jax(manifest, of_round)


def _of_another_jax(manifest: dict[str, Any], of_round: dict[str, Any]) -> ValueError:
    return ValueError(
        f"federated.load_clients: JAX {jax.__version__} does not read round "
        f"{of_round['path']}, which JAX {manifest['jax']} wrote. Usually one of them "
        "is months older than the other: use versions that are closer."
    )


def _function(manifest: Any, of_round: Any, code: bytes) -> Callable[..., list[Any]]:
    """A round's function, if it is what the manifest says."""
    try:  # It has the SHA-256 of what was written.
        exported = jax.export.deserialize(bytearray(code))
        has = {
            "inputs": [*map(type_of, exported.in_avals)],
            "outputs": [*map(type_of, exported.out_avals)],
            "trees": (exported.in_tree, exported.out_tree),
            "platforms": [*exported.platforms],
            "calling convention": exported.calling_convention_version,
            "devices": exported.nr_devices,
            "effects": [*exported.ordered_effects, *exported.unordered_effects],
            "disabled checks": [*exported.disabled_safety_checks],
        }
        exported.mlir_module()
    except Exception as error:  # JAX raises errors of many kinds.
        raise _of_another_jax(manifest, of_round) from error
    own = [value["type"] for value in of_round["own"]]
    sends = [value["type"] for value in of_round["sends"]]
    inputs = [{"shape": [], "dtype": "int32"}, *of_round["server"], *own]
    outputs = [*sends, *of_round["keeps"]]
    in_tree = jax.tree.structure((tuple(0 for _ in inputs), {}))
    says = {
        "inputs": inputs,
        "outputs": outputs,
        "trees": (in_tree, jax.tree.structure([0 for _ in outputs])),
        "platforms": manifest["platforms"],
        "calling convention": of_round["calling_convention"],
        "devices": 1,
        "effects": [],
        "disabled checks": [],
    }
    for what, expected in says.items():
        if has[what] != expected:
            raise _damaged(
                f"the code of round {of_round['path']} has {what} {has[what]}, but the "
                f"manifest says {expected}"
            )
    return jax.jit(exported.call)
