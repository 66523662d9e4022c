"""Many rounds with a stop that depends on the data, which can be interrupted."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from apache_beam.internal import cloudpickle
from apache_beam.io.filesystems import FileSystems

from beam_runner import _files
from beam_runner._graph import Placed
from beam_runner._interpret import Bad, Session, plan_of, result_of
from drjax._numpy import as_sent, to_numpy
from drjax.plan import Plan

# By placement and its number of elements: which are bad, and why.
Why = dict[tuple[str, int], dict[int, str]]


class Iterations(NamedTuple):
    """What `iterate` gives.

    Args:
      state: after the last round.
      rounds: how many there were, those before an interruption among them.
      is_done: whether `until` was true in the end.
      bad: the elements that were left out.
      metrics: of the pipelines of this process, by name.
    """

    state: Any
    rounds: int
    is_done: bool
    bad: tuple[Bad, ...]
    metrics: dict[str, int]


def iterate(
    step: Callable[..., Any],
    state: Any,
    *args: Any,
    until: Callable[[Any], Any],
    max_rounds: int,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    runner: Any = "embedded",
    options: Any = None,
    chunk_size: int | None = None,
    temp_location: str | os.PathLike[str] | None = None,
    on_bad: str = "raise",
    progress: bool = False,
) -> Iterations:
    """Runs `state = step(state, *args)` as Beam pipelines, until a condition holds.

    The step is planned and exported once. With a `checkpoint_dir`, each round's state
    is written there before the next one begins, first to a temporary file that is then
    renamed, and the last two are kept: called again after an interruption, it goes on
    after the last round that was finished, with the same result bit for bit.

    Args:
      step: `(state, *args) -> state`, a program or a function that calls some.
      state: a tree of arrays, to begin with.
      *args: further arguments of each step, as in `run`.
      until: `state -> bool`, called here before each round.
      max_rounds: after how many rounds it ends in any case.
      checkpoint_dir: a folder, by Beam's FileSystems; made if it is not there.
      runner, options, chunk_size, temp_location, on_bad, progress: as in `run`. With
        on_bad="collect" an element is left out of the round in which it is found to be
        bad, and of all later ones.

    Returns:
      `Iterations(state, rounds, is_done, bad, metrics)`.

    Raises:
      TypeError: if the step gives a state of another structure or other types.
      ValueError: if `checkpoint_dir` has the rounds of another program or of other
        arguments, or a damaged file. Sources count by what is pickled of them, memory-
        mapped files by their name and size, Parquet files also by when they were
        written.

    Example:
      >>> import numpy as np
      >>> import beam_runner
      >>> import drjax
      >>> @drjax.program(points=1000)
      ... def newton(root, squares):  # Of the mean of the squares.
      ...     return (root + drjax.reduce_mean(squares) / root) / 2
      >>> def is_close(root):
      ...     return abs(root**2 - 4) < 1e-3
      >>> four = np.full(1000, 4, np.float32)
      >>> done = beam_runner.iterate(newton, 1.0, four, until=is_close, max_rounds=9)
      >>> print(f"{done.state:.4f} after {done.rounds} rounds")
      2.0000 after 4 rounds
    """
    session = Session(runner, options, chunk_size, temp_location, on_bad, progress)
    plan, leaves = plan_of(step, (state, *args))
    count = len(jax.tree.leaves(state))
    _check_step(plan, count, state)
    if max_rounds < 0:
        raise ValueError(f"beam_runner.iterate: max_rounds is {max_rounds}, below 0.")
    initial = leaves[:count]
    state = _state(plan, count, state, initial)
    checkpoints = None
    if checkpoint_dir is not None:
        about = {
            "plan": plan.hash,
            "arguments": _digest(leaves),
            "chunk_size": session.chunk_size,
            "on_bad": on_bad,
            "version of JAX": jax.__version__,
        }
        checkpoints = _Checkpoints(os.fspath(checkpoint_dir), plan, count, about)
    with session.open() as run:
        leaves = run.staged(plan, leaves)  # The state's anew each round.
        rounds = 0
        if checkpoints is not None and (found := checkpoints.latest()) is not None:
            rounds, initial, run.why = found
            state = _state(plan, count, state, initial)
        run.bars.start_rounds(max_rounds, rounds)
        while not (is_done := bool(until(state))) and rounds < max_rounds:
            values = [*initial, *leaves[count:]]
            state, rounds = run.results(plan, values), rounds + 1
            initial = [to_numpy(x) for x in jax.tree.leaves(state)]
            if checkpoints is not None:
                checkpoints.write(rounds, initial, run.why)
            run.bars.end_round()
    return Iterations(state, rounds, is_done, run.bad, run.metrics)


def _state(plan: Plan, count: int, like: Any, leaves: Sequence[Any]) -> Any:
    avals = [plan.avals[i] for i in plan.inputs[:count]]
    values = [result_of(aval, x) for aval, x in zip(avals, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _check_step(plan: Plan, count: int, state: Any) -> None:
    """Checks that a step gives a state of the structure and types that it takes."""
    given = [plan.avals[i] for i in plan.inputs[:count]]
    made = [plan.avals[i] for i in plan.outputs]
    want, got = jax.tree.structure(state), plan.out_tree
    types = [[f"{x.dtype}{list(x.shape)}" for x in avals] for avals in (given, made)]
    if want != got or types[0] != types[1]:
        raise TypeError(
            "beam_runner.iterate: the step is to give a state like the one that it "
            f"takes, {jax.tree.unflatten(want, types[0])}, but gives "
            f"{jax.tree.unflatten(got, types[1])}."
        )


def _digest(leaves: Sequence[Any]) -> str:
    """Tells arguments apart: arrays by content, files and sources by what they say."""
    digest = hashlib.sha256()
    for x in leaves:
        if isinstance(x, Placed):
            source: Any = getattr(x.reader, "source", None)
            digest.update(f"{source.num_elements} {x.leaf}".encode())
            digest.update(cloudpickle.dumps(source))
        elif isinstance(x, np.memmap):
            digest.update(f"{x.filename} {x.dtype} {x.shape}".encode())
        else:
            digest.update(f"{x.dtype} {x.shape}".encode())
            digest.update(_files.plain(x).tobytes())
    return digest.hexdigest()


class _Checkpoints:
    """The last two rounds, each a file in NumPy's npz format, which has checksums."""

    def __init__(self, folder: str, plan: Plan, count: int, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self.dtypes = [as_sent(plan.avals[i]).dtype for i in plan.inputs[:count]]
        if not FileSystems.exists(folder):
            _files.make_folder(folder)

    def path(self, number: int) -> str:
        return _files.join(self.folder, f"round-{number:08d}.npz")

    def write(self, number: int, leaves: Sequence[Any], bad: Why) -> None:
        left_out = [(*key, [*why.items()]) for key, why in sorted(bad.items())]
        about = {**self.about, "round": number, "bad": left_out}
        arrays = {f"leaf_{k}": _files.plain(x) for k, x in enumerate(leaves)}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)

        def write_to(file: Any) -> None:
            data = io.BytesIO()  # An npz is not written from front to back.
            np.savez(data, allow_pickle=False, **arrays)
            file.write(data.getbuffer())

        _files.write(self.path(number), write_to)
        old = self.path(number - 2)
        if number > 2 and FileSystems.exists(old):
            FileSystems.delete([old])

    def latest(self) -> tuple[int, list[Any], Why] | None:
        """The last round that was finished, its state, and what was left out."""
        (found,) = FileSystems.match([_files.join(self.folder, "round-*.npz")])
        paths = sorted(metadata.path for metadata in found.metadata_list)
        if not paths:
            return None
        try:
            with FileSystems.open(paths[-1]) as file:
                data = io.BytesIO(file.read())
            with np.load(data, allow_pickle=False) as arrays:
                about = json.loads(bytes(arrays["about"]))
                leaves = [
                    arrays[f"leaf_{k}"].view(dtype)
                    for k, dtype in enumerate(self.dtypes)
                ]
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError, OSError) as e:
            raise ValueError(
                f"beam_runner.iterate: {paths[-1]} is damaged, or no checkpoint. "
                "Remove it, to go on from the one before."
            ) from e
        other = [name for name, value in self.about.items() if about[name] != value]
        if other:
            raise ValueError(
                f"beam_runner.iterate: {self.folder} has the rounds of another run: it "
                f"differs in {', '.join(other)}. Name another checkpoint_dir, or "
                "remove this one to begin anew."
            )
        bad = {(name, n): dict(map(tuple, why)) for name, n, why in about["bad"]}
        return about["round"], leaves, bad
