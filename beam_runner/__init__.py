"""Runs drjax programs as Apache Beam pipelines."""

from beam_runner._arguments import Chunks
from beam_runner._interpret import Bad
from beam_runner._iterate import Iterations, iterate
from beam_runner._parquet import from_parquet
from beam_runner._run import Details, run, run_with_details
from beam_runner._sources import Source
from beam_runner._transform import MapReduce, Result
from beam_runner._work import BadElementError

__all__ = [
    "Bad",
    "BadElementError",
    "Chunks",
    "Details",
    "Iterations",
    "MapReduce",
    "Result",
    "Source",
    "from_parquet",
    "iterate",
    "run",
    "run_with_details",
]
