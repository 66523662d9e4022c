"""Draws `images/round_on_mesh.png`: where the values of a round are, on 4 x 2 devices.

The layouts are read from the arrays that a compiled round returns.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.patches import Rectangle

import drjax

N = 8
# Of every value, the axes that the picture shows: downwards and to the right.
SHOWN = {
    "w": (None, 1),
    "x": (0, None),
    "broadcast(w)": (0, 2),
    "map_fn(update, ...)": (0, 2),
    "reduce_mean(updates)": (None, 1),
}


@drjax.program(clients=N)
def values_of_round(w, x):
    def update(w, x):
        return jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)

    sent = drjax.broadcast(w)
    updates = drjax.map_fn(update, (sent, x))
    return w, x, sent, updates, drjax.reduce_mean(updates)


def draw(axes, title, value, down, right):
    rows = value.shape[down] if down is not None else 1
    columns = value.shape[right] if right is not None else 1
    owners = {}
    for device, index in value.sharding.devices_indices_map(value.shape).items():
        top, bottom = (0, 1) if down is None else index[down].indices(rows)[:2]
        left, end = (0, 1) if right is None else index[right].indices(columns)[:2]
        owners.setdefault((top, bottom, left, end), []).append(device.id)
    for (top, bottom, left, end), devices in owners.items():
        x, y = left / columns, top / N
        width, height = (end - left) / columns, (bottom - top) / N
        color = plt.cm.tab20(devices[0] / 20 if len(devices) == 1 else 0.75)
        axes.add_patch(
            Rectangle((x, y), width, height, facecolor=color, edgecolor="white", lw=2)
        )
        label = " ".join(map(str, devices))
        axes.text(
            x + width / 2,
            y + height / 2,
            label,
            ha="center",
            va="center",
            color="white" if sum(color[:3]) < 1.6 else "black",
        )
    shape = ", ".join(map(str, value.shape))
    spec = ", ".join(str(axis) for axis in value.sharding.spec)
    axes.set_title(f"{title}\n[{shape}]", fontsize=10)
    axes.text(0.5, 1.04, f"P({spec})", ha="center", va="top", fontsize=8, color="0.4")
    axes.set(xlim=(-0.02, 1.02), ylim=(1.02, -0.02))
    axes.axis("off")


def main():
    mesh = jax.make_mesh((4, 2), ("clients", "model"), axis_types=(AxisType.Auto,) * 2)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        columns, clients = (
            NamedSharding(mesh, spec) for spec in (P(None, "model"), P("clients"))
        )
        w = jax.device_put(jax.random.normal(key, (64, 32)), columns)
        x = jax.device_put(jax.random.normal(key, (N, 16, 64)), clients)
        values = jax.jit(values_of_round)(w, x)
    figure, panels = plt.subplots(1, 5, figsize=(11, 3.6), layout="constrained")
    for axes, (title, shown), value in zip(panels, SHOWN.items(), values, strict=True):
        draw(axes, title, value, *shown)
    panels[-1].text(0.5, 0.3, "by one all-reduce\nover the clients", ha="center")
    figure.suptitle("Devices 0 to 7 as 4 clients x 2 model; rows are clients", y=1.06)
    path = Path(__file__).parent / "images" / "round_on_mesh.png"
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
