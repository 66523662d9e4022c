"""Runs drjax programs as Apache Beam pipelines."""

from beam_runner._run import Bad, Details, run, run_with_details
from beam_runner._sources import Source
from beam_runner._work import BadElementError

__all__ = [
    "Bad",
    "BadElementError",
    "Details",
    "Source",
    "run",
    "run_with_details",
]
