"""Stages as StableHLO, each exported once: the rounds of a loop share them."""

import weakref
from collections.abc import Callable
from typing import Any

from drjax._export import export_full_chunk, export_round
from drjax.plan import MapReduce, Server

_exports: weakref.WeakKeyDictionary[Any, dict[Any, bytes]]
_exports = weakref.WeakKeyDictionary()


def _once(stage: Any, key: Any, export: Callable[[], bytes]) -> bytes:
    known = _exports.setdefault(stage, {})
    if key not in known:
        known[key] = export()
    return known[key]


def exported_server(stage: Server) -> bytes:
    return _once(stage, None, stage.export)


def exported_round(stage: MapReduce, chunk: int) -> bytes:
    return _once(stage, chunk, lambda: export_round(stage, None, chunk, wide_sums=True))


def exported_full(stage: MapReduce, chunk: int) -> bytes:
    return _once(stage, ("full", chunk), lambda: export_full_chunk(stage, chunk))
