"""Which runners are tested, which are refused, and where their files may be."""

import os
import tempfile
import warnings
from typing import Any

TESTED = {"FnApiRunner", "PortableRunner"}
# Their workers are on this machine.
LOCAL = {"FnApiRunner", "DirectRunner", "SwitchingDirectRunner", "PrismRunner"}
REFUSED = {
    "DaskRunner": (
        "it loses tagged outputs, what is given at the end of a bundle, and all sinks "
        "but one, without an error"
    ),
}


def refuse(name: str) -> None:
    """Refuses runners that are known to give wrong results."""
    if name in REFUSED:
        raise ValueError(
            f"beam_runner: {name} gives wrong results: in Beam 2.77 {REFUSED[name]}. "
            "Use Beam's FnApiRunner, which is beam_runner.run's 'embedded' one, or "
            "Flink."
        )


def check(runner: Any) -> None:
    """Refuses runners that are wrong; warns of those that are untested."""
    name = type(runner).__name__
    refuse(name)
    if name not in TESTED:
        warnings.warn(
            f"beam_runner is not tested on {name}. Compare a small run with that of "
            "beam.Pipeline(runner='FnApiRunner'), which is beam_runner.run's "
            "'embedded' one, before you rely on it.",
            UserWarning,
            stacklevel=4,
        )


def temp_location(said: Any, runner: Any) -> str:
    """The folder for files: the one that is said, or the machine's, if that does."""
    if said is not None:
        return os.fspath(said)
    name = type(runner).__name__
    if LOCAL.isdisjoint(kind.__name__ for kind in type(runner).mro()):
        raise ValueError(
            f"beam_runner: a run on {name} needs a temp_location, here or in the "
            "pipeline's options, which is a folder that all its workers reach."
        )
    return tempfile.gettempdir()
