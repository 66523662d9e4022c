"""A file of what clients run is loaded as it was written, or not at all."""

import dataclasses
import hashlib
import json
import pickle
import re
import zipfile
from io import BytesIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program

import drjax
from federated._artefact import load_clients, packed
from federated._export_clients import export_clients


@pytest.fixture(scope="module")
def small():
    """A small file: one round, with one value of each kind."""

    @program
    def fn(w, x):
        own = drjax.map_fn(lambda x: w * x, x)
        return drjax.reduce_sum(own), own

    return export_clients(drjax.make_plan(fn)(2.0, jnp.arange(5.0)))


def test_a_byte_that_is_changed_anywhere_is_an_error(small):
    rng = np.random.default_rng(0)
    for i, change in enumerate(rng.integers(1, 256, len(small))):
        changed = bytearray(small)
        changed[i] ^= change
        with pytest.raises(ValueError, match=r"^federated\.load_clients: "):
            load_clients(bytes(changed))


def test_what_is_cut_or_added_is_an_error(small):
    rng = np.random.default_rng(0)
    for i in (1, len(small) - 1, *rng.integers(2, len(small) - 1, 40)):
        cut, twice = small[:i], small[:i] + small[i // 2 :]
        for data in (cut, small[i + 1 :], twice, small[:i] + b"\0" + small[i:]):
            with pytest.raises(ValueError, match="the file is damaged"):
                load_clients(data)


def test_no_pickle_is_read(small, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle is read")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert len(load_clients(small).rounds) == 1


def parts_of(data):
    """The manifest and the other files."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return json.loads(files.pop("manifest.json")), files


def zipped(entries, **options):
    """An archive of such entries, as others write it."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def with_manifest(**changes):
    def change(data):
        manifest, files = parts_of(data)
        return packed({**manifest, **changes}, files)

    return change


def with_round(**changes):
    def change(data):
        manifest, files = parts_of(data)
        manifest["rounds"][0] |= changes
        return packed(manifest, files)

    return change


def without_key(data):
    manifest, files = parts_of(data)
    del manifest["rounds"][0]["sends"]
    return packed(manifest, files)


def renamed(path):
    def change(data):
        manifest, files = parts_of(data)
        manifest["rounds"][0]["path"] = path
        return packed(manifest, {f"{path}.stablehlo": x for x in files.values()})

    return change


def with_file(data):
    manifest, files = parts_of(data)
    return packed(manifest, {**files, "evil.py": b"import os"})


def with_code(change):
    """With other code, of which the manifest has the SHA-256."""

    def changed(data):
        manifest, files = parts_of(data)
        ((name, code),) = files.items()
        code = change(code)
        digest = {"sha256": hashlib.sha256(code).hexdigest(), "size": len(code)}
        manifest["rounds"][0] |= digest
        return packed(manifest, {name: code})

    return changed


def of_another_round(_):
    plan = drjax.make_plan(program(drjax.reduce_sum))(jnp.arange(5.0))
    ((_, code),) = parts_of(export_clients(plan))[1].items()
    return code


def of_another_jax(code):
    """StableHLO with an operation that is not known here."""
    exported = jax.export.deserialize(bytearray(code))
    module = exported.mlir_module_serialized.replace(b"multiply_v1", b"multiply_v9")
    assert module != exported.mlir_module_serialized
    return bytes(
        dataclasses.replace(exported, mlir_module_serialized=module).serialize()
    )


def larger_than_it_is(data):
    """The archive says of a file that it has four billion bytes."""
    _, files = parts_of(data)
    (code,) = files.values()
    size = len(code).to_bytes(4, "little") * 2
    assert data.count(size) == 2  # Before the file, and in the list at the end.
    return data.replace(size, (2**32 - 2).to_bytes(4, "little") * 2)


HOSTILE = {
    "nothing": (lambda data: b"", "it is no zip archive that can be read"),
    "compressed": (
        lambda data: zipped([("a", bytes(9**6))], compression=zipfile.ZIP_DEFLATED),
        "it is compressed, or says that more is in it than it holds",
    ),
    "larger than it is": (larger_than_it_is, "says that more is in it than it holds"),
    "a path outside": (renamed("../../etc/0"), "a round in it has the path '../../etc"),
    "an absolute path": (renamed("/0"), "a round in it has the path '/0'"),
    "a file more": (with_file, "its manifest is of the files ['0.stablehlo'], but it"),
    "no manifest": (lambda data: zipped([("0.stablehlo", b"x")]), "cannot be read"),
    "a deep manifest": (
        lambda data: zipped([("manifest.json", b"[" * 99_999)]),
        "its manifest.json cannot be read",
    ),
    "another archive": (
        lambda data: zipped([("manifest.json", b'{"name": "x"}')]),
        "its manifest.json is not that of federated.clients",
    ),
    "another version": (
        with_manifest(version=2),
        "the file is of version 2, and this library reads version 1. Usually another",
    ),
    "a key more": (with_manifest(run="x"), "manifest.json does not have the keys"),
    "a key less": (without_key, "manifest.json: rounds does not have the keys"),
    "rounds of another type": (with_manifest(rounds={}), "rounds is not a list"),
    "a size of another type": (with_round(n=True), "n is not of type int"),
    "another hash": (
        with_round(sha256="0" * 64),
        "0.stablehlo is not of the size and SHA-256 in its manifest",
    ),
    "other types": (
        with_round(keeps=[{"shape": [2], "dtype": "float32"}]),
        "the code of round 0 has outputs",
    ),
    "the code of another round": (with_code(of_another_round), "round 0 has inputs"),
    "no code": (
        with_code(lambda _: b"no StableHLO" * 9),
        "does not read round 0",
    ),
    "other platforms": (
        with_manifest(platforms=["tpu"]),
        "the file is for the platforms ['tpu'], but this process runs on 'cpu'. Export "
        "it for both: federated.export_clients(plan, platforms=('tpu', 'cpu')).",
    ),
    "more platforms": (
        with_manifest(platforms=["cpu", "tpu"]),
        "the code of round 0 has platforms ['cpu'], but the manifest says",
    ),
    "an old calling convention": (
        with_round(calling_convention=1),
        f"JAX {jax.__version__} does not read round 0, which JAX",
    ),
    "StableHLO of another JAX": (
        with_code(of_another_jax),
        "wrote. Usually one of them is months older than the other: use versions that",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_as_it_should_be_is_not_loaded(name, small):
    change, text = HOSTILE[name]
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        load_clients(change(small))
    assert str(error.value).startswith("federated.load_clients: ")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_an_error(small):
    manifest, files = parts_of(small)
    entries = [("manifest.json", json.dumps(manifest)), *files.items(), *files.items()]
    with pytest.raises(ValueError, match="it has two files of one name"):
        load_clients(zipped(entries))
