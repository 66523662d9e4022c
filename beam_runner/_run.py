"""Runs a program as Beam pipelines."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from beam_runner._interpret import Bad, Session


class Details(NamedTuple):
    """What a run gives.

    Args:
      result: what the program returns.
      bad: the elements that were left out.
      metrics: of all pipelines, by name.
      pipelines: how many there were.
    """

    result: Any
    bad: tuple[Bad, ...]
    metrics: dict[str, int]
    pipelines: int


def run(
    program: Callable[..., Any],
    *args: Any,
    runner: Any = "embedded",
    options: Any = None,
    chunk_size: int | None = None,
    temp_location: str | os.PathLike[str] | None = None,
    on_bad: str = "raise",
    progress: bool = False,
) -> Any:
    """Runs a program, or a derivative of one, as Apache Beam pipelines.

    Its plan is run, see `drjax.make_plan`: each round is a step in which workers read
    chunks of elements, map them and reduce them in one compiled program, so that
    nothing of a single element leaves a worker unless the program returns it. The steps
    up to a loop or a condition with communication in it are one pipeline; the loop
    itself runs here. Rounds make residuals again rather than keep them.

    Chunks are fixed by index, and what they give is folded in that order, in 64 bits: a
    result has the same bits however the runner bundles, orders and repeats the work,
    and with any number of workers, in one numeric environment: version of JAX,
    processor, devices and threads. Workers are set up alike; where they cannot be, a
    warning says so, and results may differ by rounding, as two versions of XLA do.

    Args:
      program: a program, a derivative of one, or any function that calls some.
      *args: its arguments: trees of arrays, in which a `Source` may be in place of a
        placed tree. A numpy.memmap is read where it is, by all workers; other arrays
        are sent, or, if they have 256 KiB or more, written to `temp_location`.
      runner: "embedded", which is Beam's in-process runner; or a runner of Beam or its
        name. For several processes on this machine, give the embedded one `options`.
      options: of the pipelines: `PipelineOptions`, a dict of them, or a list of flags.
      chunk_size: elements of a placement that are mapped at a time; by default it is
        found from shapes.
      temp_location: a folder that all workers reach, by Beam's FileSystems; needed
        unless the runner is the embedded one. A run removes what it has written.
      on_bad: what becomes of an element that cannot be read, or that gives to a
        reduction or a placed result what is not finite. "raise" ends the run and says
        its index. "collect" leaves it out of all rounds, as if it had not been there:
        the run starts again without it, `drjax.placement_size` counts the others, and
        its part of placed results is NaN, or 0 of integers; see `run_with_details`.
        "keep" computes with what is not finite, as `jax.jit` does. Minus infinity in a
        maximum, and infinity in a minimum, are not bad.
      progress: whether pipelines show a progress bar; it needs the package `rich`.

    Returns:
      What the program returns, in arrays of JAX; up to rounding as `jax.jit(program)`
      does.

    Raises:
      BadElementError: if an element is bad; on a runner out of this process, the
        runner's own error, which has its text.
      PlanError: as `drjax.make_plan`.
      TypeError, ValueError: if arguments or options do not fit; before work starts.
      NotImplementedError: if a stage calls back to Python.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> import beam_runner
      >>> import drjax
      >>> @drjax.program(examples=10_000)
      ... def loss(w, x):
      ...     return drjax.reduce_mean(drjax.map_fn(lambda x: (x - w) ** 2, x))
      >>> x = np.linspace(0, 1, 10_000, dtype=np.float32)
      >>> print(beam_runner.run(jax.grad(loss), 2.0, x))
      3.0
    """
    session = Session(runner, options, chunk_size, temp_location, on_bad, progress)
    return session.run(program, args)[0]


def run_with_details(
    program: Callable[..., Any],
    *args: Any,
    runner: Any = "embedded",
    options: Any = None,
    chunk_size: int | None = None,
    temp_location: str | os.PathLike[str] | None = None,
    on_bad: str = "raise",
    progress: bool = False,
) -> Details:
    """As `run`; also returns the elements that were left out, and metrics.

    The metrics are those that Beam has under the namespace "drjax": `elements`,
    counted once for each round, and again when a run starts again; `bad_elements`;
    `bytes_down`, to workers, and `bytes_up`, from them, once for each range of chunks;
    and the milliseconds of `compile_ms` and `range_ms`, summed over workers.

    Returns:
      `Details(result, bad, metrics, pipelines)`.

    Example:
      >>> import numpy as np
      >>> import beam_runner
      >>> import drjax
      >>> mean = drjax.program(rows=4)(drjax.reduce_mean)
      >>> x = np.array([1, 2, np.nan, 6], np.float32)
      >>> details = beam_runner.run_with_details(mean, x, on_bad="collect")
      >>> print(details.result)
      3.0
      >>> print(details.bad[0].index, details.bad[0].why)
      2 it gives values that are not finite
    """
    session = Session(runner, options, chunk_size, temp_location, on_bad, progress)
    result, run = session.run(program, args)
    return Details(result, run.bad, run.metrics, run.pipelines)
