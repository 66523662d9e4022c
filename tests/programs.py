"""The shared table of programs, which every transformation and every engine runs.

Each program stands beside the same function written with plain `jax.vmap` and `jnp`.
The placement's size `N` is unlike every other size, so that a test can tell its axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import drjax

N, M = 5, 6  # clients, and pods
program = drjax.program(clients=N)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, the same in plain JAX, and arguments for both."""

    name: str
    run: Callable[..., Any]
    plain: Callable[..., Any]
    args: tuple[Any, ...]
    forward: bool = True  # It has a forward-mode derivative,
    reverse: bool = True  # a reverse-mode one,
    second: bool = True  # and a second one in mixed modes.
    communication: tuple[str, ...] | None = None  # Its operators, where it is short.

    def __str__(self) -> str:
        return self.name


PROGRAMS: list[Program] = []


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


W, XS, YS = _normal(0, 3, 2), _normal(1, N, 4, 3), _normal(2, N, 4)


def _row(plain: Callable[..., Any], *args: Any, **facts: Any) -> Any:
    """Adds the decorated program to the table, called like its function."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        run = program(fn)
        PROGRAMS.append(Program(fn.__name__, run, plain, args, **facts))
        return run

    return add


#
# The operators by themselves.
#
@_row(lambda w: N * w, W, communication=("broadcast", "reduce_sum"))
def sum_of_broadcast(w):
    return drjax.reduce_sum(drjax.broadcast(w))


@_row(lambda x: (jnp.max(x, 0), jnp.min(x, 0)), XS)
def extremes(x):
    return drjax.reduce_max(x), drjax.reduce_min(x)


@_row(lambda x: jnp.mean(x, 0), XS, communication=("reduce_sum", "placement_size"))
def mean(x):
    return drjax.reduce_mean(x)


@_row(
    lambda x, w: {
        "a": jnp.average(x, axis=0, weights=w**2),
        "b": jnp.average(x[:, 0, 0], axis=0, weights=w**2),
    },
    XS,
    _normal(3, N),
)
def weighted_mean(x, w):
    return drjax.reduce_weighted_mean({"a": x, "b": x[:, 0, 0]}, w**2, default=0.0)


@_row(lambda x: jnp.sum(x * jnp.arange(N)[:, None, None], 0) / N, XS)
def own_index_and_size(x):
    scaled = drjax.map_fn(lambda x, i: x * i, (x, drjax.placement_index()))
    return drjax.reduce_sum(scaled) / drjax.placement_size()


#
# One mapped body each: what it may hold.
#
def _plain_body(w, x):
    return jnp.sum(jnp.tanh(x @ w))


@jax.custom_jvp
def _with_jvp(x):
    return jnp.sin(x)


_with_jvp.defjvp(lambda p, t: (jnp.sin(p[0]), 2 * jnp.cos(p[0]) * t[0]))


@jax.custom_vjp
def _with_vjp(x):
    return jnp.sin(x)


# Not linear in the cotangent, on purpose.
_with_vjp.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, ct: (jnp.clip(ct * jnp.cos(x), -0.1, 0.1),)
)


def _scanned(w, x):
    def step(w, row):
        loss, grad = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(row @ w) ** 2))(w)
        return w - 0.1 * grad, loss

    w, losses = lax.scan(step, w, x)
    return jnp.sum(w**2) + jnp.sum(losses)


def _scan_over_shared(w, x):
    return lax.scan(lambda c, row: (c + jnp.tanh(row @ w), None), jnp.zeros(2), x)[0]


def _while(w, x):
    shrunk = lax.while_loop(lambda c: jnp.sum(c**2) > 0.5, lambda c: 0.5 * c, w)
    return jnp.sum(shrunk) + jnp.sum(x)


BODIES = {
    "plain": (_plain_body, {}),
    "relu": (lambda w, x: jnp.sum(jax.nn.relu(x @ w) ** 2), {}),
    "jit": (jax.jit(_plain_body), {}),
    "checkpoint": (jax.checkpoint(_plain_body), {}),
    "checkpoint_dots": (
        jax.checkpoint(_plain_body, policy=jax.checkpoint_policies.dots_saveable),
        {},
    ),
    "custom_jvp": (lambda w, x: jnp.sum(_with_jvp(x @ w)), {}),
    "custom_vjp": (
        lambda w, x: jnp.sum(_with_vjp(x @ w)),
        dict(forward=False, second=False),
    ),
    "scan": (_scanned, {}),
    "scan_over_shared": (_scan_over_shared, {}),
    "fori": (
        lambda w, x: jnp.sum(lax.fori_loop(0, 3, lambda _, c: jnp.sin(c) + x[0, 0], w)),
        {},
    ),
    "while": (_while, dict(reverse=False, second=False)),
    "cond": (
        lambda w, x: lax.cond(
            x[0, 0] > 0, lambda: jnp.sum(jnp.sin(w)), lambda: jnp.sum((x @ w) ** 2)
        ),
        {},
    ),
    "switch": (
        lambda w, x: lax.switch(
            jnp.int32(jnp.abs(3 * x[0, 0])) % 3,
            [lambda: jnp.sum(w**2), lambda: jnp.sum(jnp.cos(w) * x[0, 1]), lambda: 0.0],
        ),
        {},
    ),
    "convolution": (
        lambda w, x: jnp.sum(
            lax.conv(x[None, None], jnp.tanh(w @ w.T)[None, None], (1, 1), "SAME") ** 2
        ),
        {},
    ),
    "gather": (lambda w, x: jnp.sum(w[jnp.int32(x[:, 0]) % 3] ** 3), {}),
    "shared_only": (lambda w, x: jnp.sum(jnp.tanh(w) @ w.T), {}),
    "constant": (lambda w, x: 2.0, {}),
}


def _add_body(name: str, body: Callable[..., Any], **facts: Any) -> None:
    def closed_over(w, xs):
        return drjax.reduce_mean(drjax.map_fn(lambda x: body(w, x), xs))

    def sent(w, xs):
        return drjax.reduce_mean(drjax.map_fn(body, (drjax.broadcast(w), xs)))

    def plain(w, xs):
        return jnp.mean(jax.vmap(lambda x: body(w, x))(xs), axis=0)

    for fn, how in ((closed_over, "closed_over"), (sent, "sent")):
        PROGRAMS.append(Program(f"{name}_{how}", program(fn), plain, (W, XS), **facts))


for _name, (_body, _facts) in BODIES.items():
    _add_body(_name, _body, **_facts)


#
# Algorithms, with control flow around the operators.
#
def _local_sgd(w, x, y):
    def step(w, row):
        x, y = row
        grad = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
        return w - 0.1 * grad, None

    return lax.scan(step, w, (x, y))[0]


def _fedavg_plain(w, lr, xs, ys):
    deltas = jax.vmap(lambda x, y: w - _local_sgd(w, x, y))(xs, ys)
    return w - lr * jnp.mean(deltas, 0)


V = W[:, 0]


@_row(
    _fedavg_plain,
    V,
    1.5,
    XS,
    YS,
    communication=("broadcast", "map", "reduce_sum", "placement_size"),
)
def fedavg(w, lr, xs, ys):
    on_clients = drjax.broadcast(w)
    trained = drjax.map_fn(_local_sgd, (on_clients, xs, ys))
    return w - lr * drjax.reduce_mean(on_clients - trained)


def _rounds_plain(w, lr, xs, ys):
    return lax.scan(lambda w, _: (_fedavg_plain(w, lr, xs, ys), w), w, None, length=3)


@_row(_rounds_plain, V, 1.5, XS, YS)
def scan_over_rounds(w, lr, xs, ys):
    return lax.scan(lambda w, _: (fedavg(w, lr, xs, ys), w), w, None, length=3)


def _cond_plain(w, xs):
    return lax.cond(
        w[0] > -9, lambda: jnp.sum(jnp.sin(xs @ w)), lambda: jnp.sum(xs) * w[0]
    )


@_row(_cond_plain, V, XS)
def cond_around(w, xs):
    def used():
        return jnp.sum(drjax.reduce_sum(drjax.map_fn(lambda x: jnp.sin(x @ w), xs)))

    return lax.cond(w[0] > -9, used, lambda: jnp.sum(drjax.reduce_sum(xs)) * w[0])


def _power_iteration(matvec, v):
    def step(state):
        v, i = state
        v = matvec(v)
        return v / jnp.linalg.norm(v), i + 1

    return lax.while_loop(lambda state: state[1] < 4, step, (v, 0))[0]


@_row(
    lambda v, xs: _power_iteration(lambda v: jnp.einsum("nij,nik,k->j", xs, xs, v), v),
    V,
    XS,
    reverse=False,
    second=False,
)
def while_around(v, xs):
    def matvec(v):
        return drjax.reduce_sum(drjax.map_fn(lambda x: x.T @ (x @ v), xs))

    return _power_iteration(matvec, v)


@_row(lambda s: jax.nn.softmax(s, axis=0), _normal(4, N, 2))
def softmax_across(s):
    weights = jnp.exp(s - drjax.broadcast(drjax.reduce_max(s)))
    return weights / drjax.broadcast(drjax.reduce_sum(weights))


def _newton_plain(w, xs, ys):
    def loss(w):
        return jnp.sum((jnp.tanh(xs @ w) - ys) ** 2)

    return w - jnp.linalg.solve(
        jax.hessian(loss)(w) + 30 * jnp.eye(3), jax.grad(loss)(w)
    )


@_row(_newton_plain, V, XS, YS, second=False)
def newton(w, xs, ys):
    def loss(w, x, y):
        return jnp.sum((jnp.tanh(x @ w) - y) ** 2)

    def grad_and_hessian(x, y):
        return jax.grad(loss)(w, x, y), jax.hessian(loss)(w, x, y)

    grad, hessian = drjax.reduce_sum(drjax.map_fn(grad_and_hessian, (xs, ys)))
    return w - jnp.linalg.solve(hessian + 30 * jnp.eye(3), grad)


@_row(
    lambda w, key: jnp.mean(
        jax.vmap(lambda k: w * jax.random.normal(k, w.shape))(jax.random.split(key, N)),
        0,
    ),
    W,
    jax.random.key(7),
)
def key_for_each_client(w, key):
    keys = jax.random.split(key, N)
    noisy = drjax.map_fn(lambda k: w * jax.random.normal(k, w.shape), keys)
    return drjax.reduce_mean(noisy)


@_row(
    lambda x, i: (jnp.sum(x * i, 0), jnp.sum(i), jnp.sum(i > 2), jnp.sum(i > 2)),
    _normal(5, N),
    jnp.arange(N),
)
def integers_and_bools(x, i):
    scaled, counts, large = drjax.map_fn(lambda x, i: (x * i, i, i > 2), (x, i))
    return (*drjax.reduce_sum((scaled, counts, large)), jnp.sum(large))


@_row(
    lambda z: jnp.sum(jnp.abs(jnp.sum(z * jnp.exp(z), 0)) ** 2),
    _normal(6, N, 2) + 1j * _normal(7, N, 2),
)
def complex_numbers(z):
    total = drjax.reduce_sum(drjax.map_fn(lambda z: z * jnp.exp(z), z))
    return jnp.sum(jnp.abs(total) ** 2)


@_row(
    lambda tree: {"a": jnp.sum(tree["a"], 0), "b": None, "c": jnp.zeros((0,))},
    {"a": XS, "b": None, "c": jnp.zeros((N, 0))},
)
def trees_with_gaps(tree):
    return drjax.reduce_sum(drjax.map_fn(lambda tree: tree, tree))


#
# Two placements: pods of clients.
#
PODS = _normal(8, M, N, 3)


def _nested_plain(w, x):
    per_pod = jax.vmap(
        lambda pod: jnp.mean(jax.vmap(lambda x: jnp.tanh(x * w))(pod), 0)
    )
    return jnp.max(per_pod(x) ** 2, axis=0)


def _nested(w, x):
    def of_pod(pod):
        values = drjax.map_fn(lambda x: jnp.tanh(x * w), pod, placement="clients")
        return drjax.reduce_mean(values, placement="clients") ** 2

    return drjax.reduce_max(drjax.map_fn(of_pod, x, placement="pods"), placement="pods")


PROGRAMS.append(
    Program(
        "two_placements",
        drjax.program(placements={"pods": M, "clients": N})(_nested),
        _nested_plain,
        (V, PODS),
    )
)


@drjax.program(pods=M)
def _program_in_program(w, x):
    @drjax.program(clients=N)
    def of_pod(pod):
        values = drjax.map_fn(lambda x: jnp.tanh(x * w), pod)
        return drjax.reduce_mean(values) ** 2

    return drjax.reduce_max(drjax.map_fn(of_pod, x))


PROGRAMS.append(
    Program("program_in_program", _program_in_program, _nested_plain, (V, PODS))
)
