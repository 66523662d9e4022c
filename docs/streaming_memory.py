"""Draws `images/streaming_memory.png`: memory of a round against its number of clients.

For a round of federated averaging of a model with 160,000 parameters. Under jit these
are the temporaries that XLA has planned; for the streaming engine, temporaries and
totals of what it has compiled, in all lanes. The clients' data come on top in both.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import drjax

CLIENTS = (10, 30, 100, 300, 1000, 3000)
WIDTHS = 784, 200, 10


def loss(params, x, y):
    hidden, out = params
    log_p = jax.nn.log_softmax(jnp.tanh(x @ hidden) @ out)
    return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], -1))


def program(n):
    @drjax.program(clients=n)
    def run(params, x, y):
        def update(x, y):
            def step(params, batch):
                grads = jax.grad(loss)(params, *batch)
                return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

            return jax.lax.scan(step, params, (x, y))[0]

        return drjax.reduce_mean(drjax.map_fn(update, (x, y)))

    return run


def temporaries(n):
    """Bytes under jit, and of the streaming engine."""
    wide, hidden, classes = WIDTHS
    params = jnp.zeros((wide, hidden)), jnp.zeros((hidden, classes))
    types = (
        jax.ShapeDtypeStruct((n, 5, 10, wide), "float32"),
        jax.ShapeDtypeStruct((n, 5, 10), "int32"),
    )
    compiled = jax.jit(program(n)).lower(params, *types).compile()
    run = drjax.streaming(program(n))
    run(params, *(jnp.zeros(t.shape, t.dtype) for t in types))
    (engine,) = run._engines.values()
    (round_,) = engine._rounds.values()
    chunks = [
        memory.temp_size_in_bytes + memory.output_size_in_bytes
        for key, step in round_._compiled.items()
        if isinstance(key[0], int)
        for memory in [step.memory_analysis()]
    ]
    return compiled.memory_analysis().temp_size_in_bytes, (
        round_.chunks.lanes * max(chunks)
    )


def main():
    jit, streaming = zip(*map(temporaries, CLIENTS), strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, values, color in (
        ("jax.jit", jit, "tab:orange"),
        ("drjax.streaming", streaming, "tab:blue"),
    ):
        megabytes = [value / 1e6 for value in values]
        axes.loglog(CLIENTS, megabytes, "o-", color=color)
        axes.annotate(
            f"{name}, {megabytes[-1]:,.0f} MB",
            (CLIENTS[-1], megabytes[-1]),
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axes.set(title="Temporaries of a round, MB", xlabel="clients", ylim=(1, 3e4))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(__file__).parent / "images" / "streaming_memory.png"
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
