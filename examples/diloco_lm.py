"""A language model of Shakespeare's plays, trained with local steps.

A small transformer learns to predict the next character. Each of four replicas has the
lines of other speakers, trains on them for some steps by itself, and then averages what
it changed with the others: DiLoCo. `--mode` says how: streaming, by fragments whose
reduction overlaps local steps; nested, in pods; or data-parallel, synchronous, for
comparison. It is tested on speakers that no replica has met, and writes some lines.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import drjax
from examples import diloco, plays_text, transformer

PROMPT, WRITTEN, TEMPERATURE = "My lord, ", 300, 0.7
SAVE_EVERY = 5  # Rounds.
MODES = "diloco", "streaming", "nested", "data-parallel"
ENCODINGS = {"none": None, "bfloat16": drjax.BFloat16(), "int8": drjax.Int8()}


def _option(default: Any, help: str, **more: Any) -> Any:
    help = f"{help} (default: {default})"
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a run, and so what it may go on from."""

    mode: str = _option("diloco", "how to train", choices=MODES)
    model: str = _option("tiny", "size of the model", choices=[*transformer.CONFIGS])
    replicas: int = _option(4, "number of replicas, in all pods together")
    rounds: int = _option(20, "number of rounds")
    steps: int = _option(30, "local steps of a replica in a round")
    batch: int = _option(16, "examples in a step of one replica")
    rate: float = _option(6e-3, "peak learning rate of the inner AdamW")
    outer_rate: float = _option(0.7, "learning rate of the outer SGD")
    momentum: float = _option(0.5, "Nesterov momentum of the outer SGD")
    fragments: int = _option(3, "streaming: fragments that the layers are dealt out to")
    delay: int = _option(5, "streaming: steps from sending to getting new values")
    mixing: float = _option(0.5, "streaming: weight of a replica's own values")
    pods: int = _option(2, "nested: number of pods")
    pod_steps: int = _option(10, "nested: steps from one average in a pod to the next")
    encoding: str = _option("none", "encoding of what is sent", choices=[*ENCODINGS])
    model_devices: int = _option(1, "devices that share a model")
    seed: int = _option(0, "seed of the parameters and of the examples")


#
# What is trained, and where it is.
#
def make_algorithm(settings: Settings) -> diloco.Algorithm:
    s, total = settings, settings.rounds * settings.steps
    rate = optax.warmup_cosine_decay_schedule(
        0, s.rate, total // 10, total, s.rate / 10
    )
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))
    outer = optax.sgd(s.outer_rate, momentum=s.momentum, nesterov=True)
    loss = functools.partial(transformer.loss, transformer.CONFIGS[s.model])
    mean = mean_by(ENCODINGS[s.encoding], transformer.CONFIGS[s.model])
    match s.mode:
        case "diloco":
            return diloco.diloco(loss, inner, outer, replicas=s.replicas, mean=mean)
        case "streaming":
            parts: Any = dict(fragments=s.fragments, delay=s.delay, mixing=s.mixing)
            sizes: Any = dict(replicas=s.replicas, mean=mean)
            return diloco.streaming(loss, inner, outer, **sizes, **parts)
        case "nested":
            if s.replicas % s.pods:
                raise ValueError(f"{s.pods} pods do not divide {s.replicas} replicas.")
            sizes = dict(pods=s.pods, replicas=s.replicas // s.pods, mean=mean)
            return diloco.nested(loss, inner, outer, **sizes, pod_steps=s.pod_steps)
        case _:
            return diloco.data_parallel(loss, inner, replicas=s.replicas, mean=mean)


def mean_by(encoding: Any, config: transformer.Config) -> diloco.Mean:
    """The mean of changes of the parameters, or of some of them, as they are sent."""
    if encoding is None:
        return drjax.reduce_mean
    specs = transformer.specs(config)

    def mean(changes: Any, key: Any) -> Any:
        own = {name: specs[name] for name in changes}
        return drjax.reduce_mean(changes, encoding=encoding, key=key, out_sharding=own)

    return mean


def make_mesh(placements: dict[str, int], model_devices: int) -> jax.sharding.Mesh:
    """All devices, or as many as the placements' sizes can be split over."""
    left, sizes = jax.device_count() // model_devices, []
    for size in placements.values():
        sizes.append(math.gcd(size, left))
        left //= sizes[-1]
    used = math.prod(sizes) * model_devices
    idle = jax.device_count() - used
    if idle < 0 or (idle and jax.process_count() > 1):
        raise ValueError(
            f"{jax.device_count()} devices, {model_devices} of them for a model, do "
            f"not fit {placements}. Change --model-devices or --replicas, so that all "
            "devices are used."
        )
    names = *placements, "model"
    return jax.make_mesh(
        (*sizes, model_devices),
        names,
        axis_types=(AxisType.Auto,) * len(names),
        devices=jax.devices()[:used],
    )


def shardings(mesh: jax.sharding.Mesh, state: diloco.State) -> diloco.State:
    """What is placed is split over the placements' axes, each model over `model`."""
    *placements, _ = mesh.axis_names

    def sharding(path: Any, _: Any) -> NamedSharding:
        is_placed = path[0].name == "replicas"
        leading = placements if is_placed else ()
        return NamedSharding(mesh, P(*leading, *transformer.spec_of(path)))

    return jax.tree_util.tree_map_with_path(sharding, state)


def jitted_round(algorithm: diloco.Algorithm, split: diloco.State) -> Any:
    """A jitted round, of `(*state, examples, key)`, that keeps the state's shardings.

    It updates replicas in place. If it did so to the server too, XLA for TPUs would
    wait for a reduction before the local steps that are to overlap it.
    """

    def run(params: Any, outer: Any, replicas: Any, examples: Any, key: Any) -> Any:
        return algorithm.round(diloco.State(params, outer, replicas), examples, key)

    return jax.jit(run, donate_argnums=2, out_shardings=(split, None))


#
# A run.
#
class Checkpoints:
    """Those of a run in a folder: its state, its settings and the rows of its curve."""

    def __init__(self, folder: Path, settings: Settings):
        import orbax.checkpoint as ocp  # It takes most of a second.

        self._args: Any = ocp.args
        self._settings = dataclasses.asdict(settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self._manager: Any = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, round: int, state: Any, rows: list[dict[str, float]]) -> None:
        numbered = {str(i): x for i, x in enumerate(jax.tree.leaves(state))}
        run = {"settings": self._settings, "rows": rows}
        args = self._args.StandardSave(numbered), self._args.JsonSave(run)
        args = self._args.Composite(state=args[0], run=args[1])
        self._manager.save(round, args=args)

    def restore(self, like: Any, split: Any) -> Any:
        """The newest state, of such types and shardings, and rows; else none."""
        newest = self._manager.latest_step()
        if newest is None:
            return None, []
        args = self._args.Composite(run=self._args.JsonRestore())
        run = self._manager.restore(newest, args=args).run
        changed = [k for k, x in self._settings.items() if run["settings"].get(k) != x]
        if changed:
            raise ValueError(
                "The folder holds a run with other settings of "
                f"{', '.join(changed)}. Name another one by --folder, or go on with "
                "the same settings."
            )
        leaves, tree = jax.tree.flatten(like)
        types = {
            str(i): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            for i, (x, s) in enumerate(zip(leaves, jax.tree.leaves(split), strict=True))
        }
        args = self._args.Composite(state=self._args.StandardRestore(types))
        state = self._manager.restore(newest, args=args).state
        return jax.tree.unflatten(tree, [state[i] for i in types]), run["rows"]

    def close(self) -> None:
        self._manager.close()


def train(
    settings: Settings, folder: Path, until: int | None = None
) -> list[dict[str, float]]:
    """Trains, from the folder's last checkpoint on, and returns the rows of the curve.

    Args:
      settings: all that the curve depends on.
      folder: of checkpoints.
      until: the round after which to stop, to go on another time.
    """
    config = transformer.CONFIGS[settings.model]
    algorithm = make_algorithm(settings)
    mesh = make_mesh(algorithm.placements, settings.model_devices)
    whole, sizes = NamedSharding(mesh, P()), tuple(algorithm.placements.values())
    placed = NamedSharding(mesh, P(*algorithm.placements))
    shape = *sizes, settings.steps, settings.batch, config.length + 1
    texts, *held_out, vocabulary = plays_text.load(settings.replicas)
    validation, test = (plays_text.spread(x, config.length) for x in held_out)
    prompt = np.array([0, *map(vocabulary.index, PROMPT)], np.int32)
    show = jax.process_index() == 0
    key = jax.random.key(settings.seed)

    def init(key: Any) -> diloco.State:
        return algorithm.init(transformer.init(config, key))

    def examples(round: int) -> jax.Array:
        """Each process draws those of its own replicas."""

        def part(index: Any) -> np.ndarray:
            own = np.arange(settings.replicas).reshape(sizes)[index[: len(sizes)]]
            rows = [
                plays_text.drawn(texts[i], shape[len(sizes) :], settings.seed, round, i)
                for i in map(int, own.flat)
            ]
            return np.stack(rows).reshape(*own.shape, *shape[len(sizes) :])

        return jax.make_array_from_callback(shape, placed, part)

    like = jax.eval_shape(init, key)
    types = like, jax.ShapeDtypeStruct(shape, np.int32), key
    plan = drjax.make_plan(algorithm.round)(*types)
    # Of pods, where there are some.
    sent = int(sum(plan.communication(next(iter(algorithm.placements)))))
    tokens = settings.replicas * settings.steps * settings.batch * config.length
    split = shardings(mesh, like)
    if show:
        axes = " x ".join(f"{n} {name}" for name, n in mesh.shape.items())
        count = sum(x.size for x in jax.tree.leaves(like.params))
        print(
            f"{settings.mode}: {count:,} parameters on {axes} devices\n"
            f"{sent / 1e6:.3g} MB to and from each of the {mesh.axis_names[0]} in a "
            f"round of {tokens:,} characters\n"
            f"Single characters have an entropy of {plays_text.entropy(texts):.3f} nats"
        )

    with jax.set_mesh(mesh):
        run_round = jitted_round(algorithm, split)
        mean = jax.jit(jnp.mean, out_shardings=whole)
        loss = functools.partial(transformer.loss, config)
        evaluate = jax.jit(loss, out_shardings=whole)
        sample = functools.partial(transformer.sample, config, count=WRITTEN)
        sample = jax.jit(sample, out_shardings=whole)

        def written(params: Any) -> str:
            text = sample(params, prompt, key=key, temperature=TEMPERATURE)
            return "".join(vocabulary[i] for i in text[1:] if 0 < i < len(vocabulary))

        checkpoints = Checkpoints(folder / "checkpoints", settings)
        state, rows = checkpoints.restore(like, split)
        if not rows:
            state = jax.jit(init, out_shardings=split)(key)
        last = min(settings.rounds, until or settings.rounds)
        with progress_bar(show) as progress:
            task = progress.add_task(
                "Rounds", total=settings.rounds, completed=len(rows), values=""
            )
            for round in range(len(rows) + 1, last + 1):
                of_round = jax.random.fold_in(key, round)
                state, losses = run_round(*state, examples(round), of_round)
                row = {
                    "round": round,
                    "tokens": round * tokens,
                    "bytes": round * sent,
                    "training": float(mean(losses)),
                    "validation": float(evaluate(state.params, validation)),
                }
                rows.append(row)
                values = "loss {training:.3f}, held-out {validation:.3f}".format(**row)
                progress.update(task, completed=round, values=values)
                if round % SAVE_EVERY == 0 or round == last:
                    checkpoints.save(round, state, rows)
                    line = written(state.params).partition("\n")[0]
                    if show:
                        progress.console.out(f"{round:>4}: {line[:70]}")
        checkpoints.close()
        if len(rows) == settings.rounds:
            final, text = float(evaluate(state.params, test)), written(state.params)
            if show:
                print(
                    f"After {rows[-1]['tokens']:,} characters and "
                    f"{rows[-1]['bytes'] / 1e6:.3g} MB: {rows[-1]['validation']:.3f} "
                    f"nats a character on held-out text;\n{final:.3f} on that of the "
                    f"test speakers\n\n{text}\n"
                )
    return rows


def progress_bar(enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[values]}", markup=False),
        disable=not enabled,
    )


def label_of(settings: dict[str, Any]) -> str:
    mode, encoding = settings["mode"], settings["encoding"]
    return mode if encoding == "none" else f"{mode}, {encoding}"


def plot(path: Path, runs: dict[str, Any], ceiling: float) -> None:
    """Held-out loss of runs, against characters and against bytes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for k, (label, rows) in enumerate(runs.items()):
        # Lower ones are wider: curves that are on each other are both seen.
        width = 1.2 + 0.8 * (len(runs) - 1 - k)
        for axes, name in (left, "tokens"), (right, "bytes"):
            x, y = ([row[key] for row in rows] for key in (name, "validation"))
            axes.plot(x, y, lw=width, label=f"{label}: {y[-1]:.3f} in the end")
    left.set(xlabel="characters, of all replicas", ylabel="held-out nats a character")
    right.set(xlabel="to and from each replica, or pod", xscale="log")
    right.xaxis.set_major_formatter(EngFormatter("B"))
    left.xaxis.set_major_formatter(EngFormatter())
    for axes in (left, right):
        axes.axhline(
            ceiling, color="tab:gray", ls="--", lw=1, label="single characters"
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            **field.metadata,
        )
    parser.add_argument("--until", type=int, help="round to stop after, for now")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("diloco_lm"),
        help="folder of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="folders of runs to draw too"
    )
    parser.add_argument("--coordinator", help="host:port of the first process")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="number of this process, from 0")
    args = vars(parser.parse_args(argv))
    address = [args.pop(name) for name in ("coordinator", "processes", "process")]
    if address[0]:
        jax.distributed.initialize(*address)
    folder, beside, until = (args.pop(x) for x in ("folder", "beside", "until"))
    settings = Settings(**args)
    rows = train(settings, folder, until)
    if jax.process_index() == 0:
        curve = {"settings": dataclasses.asdict(settings), "rows": rows}
        (folder / "curve.json").write_text(json.dumps(curve, indent=1))
        curves = [json.loads((x / "curve.json").read_text()) for x in (folder, *beside)]
        runs = {label_of(x["settings"]): x["rows"] for x in curves}
        plot(folder / "curve.png", runs, plays_text.entropy(plays_text.load(1)[0]))
        print(f"Curve in {folder / 'curve.png'}")


if __name__ == "__main__":
    main()
