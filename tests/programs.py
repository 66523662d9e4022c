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
    large: bool = False  # It takes long: some transformations of it are slow tests.
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


def _interpolated(x):
    i = jnp.searchsorted(jnp.linspace(-3.0, 3.0, 7), x)
    return jnp.sum(jnp.sin(x) * jnp.arange(8.0)[i])


@_row(lambda x: jnp.mean(jax.vmap(_interpolated)(x), 0), XS)
def searchsorted_in_a_body(x):
    return drjax.reduce_mean(drjax.map_fn(_interpolated, x))


def _as_sent(round, x):
    """What `round` makes of x, of which the derivative is one."""
    return x + lax.stop_gradient(round(x) - x)


def _bfloat16(x):
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


# Eighths, of which bfloat16 has sums too: so it does not matter where sums are rounded.
EIGHTHS = jnp.round(8 * XS) / 8


@_row(lambda x: jnp.sin(jnp.sum(_as_sent(_bfloat16, 2 * x), 0)), EIGHTHS)
def encoded_as_bfloat16(x):
    doubled = drjax.map_fn(lambda x: 2 * x, x)
    return jnp.sin(drjax.reduce_sum(doubled, encoding=drjax.BFloat16()))


# Integers of which the largest is 127 are multiples of the scale.
INTEGERS = jnp.round(30 * XS).clip(-127, 127).at[:, 0, 0].set(127)


@_row(lambda x: jnp.sin(jnp.mean(x / 100, 0)), INTEGERS)
def encoded_as_int8(x):
    scaled = drjax.map_fn(lambda x: x / 100, x)
    key = jax.random.key(0)
    return jnp.sin(drjax.reduce_mean(scaled, encoding=drjax.Int8(), key=key))


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
        old, _, i = state
        new = matvec(old) + 10 * old  # A multiple of the matrix stops elsewhere.
        new /= jnp.linalg.norm(new)
        return new, jnp.sum((new - old) ** 2), i + 1

    def moves(state):
        return (state[1] > 1.4e-3) & (state[2] < 9)

    return lax.while_loop(moves, step, (v, jnp.float32(1), 0))


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


#
# Algorithms that keep state from round to round.
#
def _adam_state(w):
    return jnp.zeros_like(w), jnp.zeros_like(w), 0


def _adam(state, grad):
    """The next state, and a step, which is smooth where the gradient is zero."""
    m, v, i = state
    m, v, i = 0.9 * m + 0.1 * grad, 0.9 * v + 0.1 * grad**2, i + 1
    return (m, v, i), m / (1 - 0.9**i) / jnp.sqrt(v / (1 - 0.9**i) + 0.1)


def _fedadam(mean_trained, w, lr):
    def step(carry, _):
        w, state = carry
        state, update = _adam(state, w - mean_trained(w))
        return (w - lr * update, state), w

    return lax.scan(step, (w, _adam_state(w)), None, length=3)


def _fedadam_plain(w, lr, xs, ys):
    def mean_trained(w):
        return jnp.mean(jax.vmap(_local_sgd, (None, 0, 0))(w, xs, ys), 0)

    return _fedadam(mean_trained, w, lr)


@_row(_fedadam_plain, V, 0.5, XS, YS, large=True)
def fedadam(w, lr, xs, ys):
    def mean_trained(w):
        trained = drjax.map_fn(_local_sgd, (drjax.broadcast(w), xs, ys))
        return drjax.reduce_mean(trained)

    return _fedadam(mean_trained, w, lr)


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def _corrected_sgd(w, correction, x):
    return lax.fori_loop(
        0, 2, lambda _, w: w - 0.1 * (jax.grad(loss)(w, x) + correction), w
    )


def _scaffold_plain(w, xs):
    def step(carry, _):
        w, own = carry
        corrections = jnp.mean(own, 0) - own
        trained = jax.vmap(_corrected_sgd, (None, 0, 0))(w, corrections, xs)
        return (jnp.mean(trained, 0), (w - trained) / 0.2 - corrections), jnp.sum(w)

    return lax.scan(step, (w, jnp.zeros((N, *w.shape))), None, length=3)


@_row(_scaffold_plain, W, XS, large=True)
def scaffold(w, xs):
    """Placed state, the clients' control variates, is kept from round to round."""

    def step(carry, _):
        w, own = carry
        on_clients = drjax.broadcast(w)
        corrections = drjax.broadcast(drjax.reduce_mean(own)) - own
        trained = drjax.map_fn(_corrected_sgd, (on_clients, corrections, xs))
        own = (on_clients - trained) / 0.2 - corrections
        return (drjax.reduce_mean(trained), own), jnp.sum(w)

    zeros = drjax.broadcast(jnp.zeros_like(w))
    return lax.scan(step, (w, zeros), None, length=3)


def _local_adamw(w, state, x, y):
    def step(carry, row):
        w, state = carry
        x, y = row
        grad = jax.grad(lambda w: (jnp.tanh(x @ w) - y) ** 2)(w)
        state, update = _adam(state, grad)
        return (w - 0.1 * (update + 0.1 * w), state), None

    return lax.scan(step, (w, state), (x, y))[0]


def _nesterov(w, momentum, delta):
    momentum = 0.9 * momentum + delta
    return w - 0.7 * (delta + 0.9 * momentum), momentum


def _diloco_plain(w, xs, ys):
    def step(carry, _):
        w, momentum, inner = carry
        train = jax.vmap(_local_adamw, (None, 0, 0, 0))
        trained, inner = train(w, inner, xs, ys)
        return (*_nesterov(w, momentum, w - jnp.mean(trained, 0)), inner), None

    inner = jnp.zeros((N, 3)), jnp.zeros((N, 3)), jnp.zeros(N, int)
    return lax.scan(step, (w, jnp.zeros(3), inner), None, length=2)[0]


@_row(_diloco_plain, V, XS, YS, large=True)
def diloco(w, xs, ys):
    """Each replica keeps the state of its own optimizer."""

    def step(carry, _):
        w, momentum, inner = carry
        args = drjax.broadcast(w), inner, xs, ys
        trained, inner = drjax.map_fn(_local_adamw, args)
        delta = w - drjax.reduce_mean(trained)
        return (*_nesterov(w, momentum, delta), inner), None

    inner = drjax.broadcast(_adam_state(w))
    return lax.scan(step, (w, jnp.zeros(3), inner), None, length=2)[0]


def _early_stopping(mean_loss, w):
    def step(w, _):
        mean, grad = jax.value_and_grad(mean_loss)(w)
        return lax.cond(mean > 0.6, lambda: w - 2 * grad, lambda: w), mean

    return lax.scan(step, w, None, length=4)


@_row(
    lambda w, xs: _early_stopping(
        lambda w: jnp.mean(jax.vmap(loss, (None, 0))(w, xs)), w
    ),
    W,
    XS,
    large=True,
)
def early_stopping(w, xs):
    def mean_loss(w):
        return drjax.reduce_mean(drjax.map_fn(loss, (drjax.broadcast(w), xs)))

    return _early_stopping(mean_loss, w)


#
# Other algorithms.
#
def _loss_after_adapting(w, x, y):
    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    adapted = w - 0.3 * jax.grad(loss)(w, x[:2], y[:2])
    return loss(adapted, x[2:], y[2:])


@_row(
    lambda w, xs, ys: (
        w
        - jnp.mean(jax.vmap(jax.grad(_loss_after_adapting), (None, 0, 0))(w, xs, ys), 0)
    ),
    V,
    XS,
    YS,
    large=True,
)
def maml(w, xs, ys):
    args = drjax.broadcast(w), xs, ys
    return w - drjax.reduce_mean(drjax.map_fn(jax.grad(_loss_after_adapting), args))


def _assign(centers, x):
    distances = jnp.sum((x[:, None] - centers) ** 2, -1)
    one_hot = jax.nn.one_hot(jnp.argmin(distances, -1), len(centers))
    return one_hot.T @ x, jnp.sum(one_hot, 0), jnp.sum(jnp.min(distances, -1))


def _k_means(sums, w):
    centers = jnp.stack([w[:, 0], w[:, 1], w[:, 0] + 100])  # The last one gets none.
    totals, counts, distance = sums(centers)
    means = totals / jnp.maximum(counts, 1)[:, None]
    return jnp.where(counts[:, None] > 0, means, centers), distance


def _k_means_plain(w, xs):
    def sums(centers):
        sums = jax.vmap(_assign, (None, 0))(centers, xs)
        return jax.tree.map(lambda x: jnp.sum(x, 0), sums)

    return _k_means(sums, w)


@_row(_k_means_plain, W, XS, large=True)
def k_means(w, xs):
    def sums(centers):
        return drjax.reduce_sum(drjax.map_fn(lambda x: _assign(centers, x), xs))

    return _k_means(sums, w)


#
# Keys, and other types.
#
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
    lambda w, key: jnp.mean(
        jax.vmap(lambda i: w * jax.random.normal(jax.random.fold_in(key, i), w.shape))(
            jnp.arange(N)
        ),
        0,
    ),
    W,
    jax.random.key(7),
    large=True,
)
def key_folded_by_each_client(w, key):
    def noisy(key, i):
        return w * jax.random.normal(jax.random.fold_in(key, i), w.shape)

    args = drjax.broadcast(key), drjax.placement_index()
    return drjax.reduce_mean(drjax.map_fn(noisy, args))


@_row(
    lambda x, i: (jnp.sum(x * i, 0), jnp.sum(i), jnp.sum(i > 2), jnp.sum(i > 2)),
    _normal(5, N),
    jnp.arange(N),
)
def integers_and_bools(x, i):
    scaled, counts, large = drjax.map_fn(lambda x, i: (x * i, i, i > 2), (x, i))
    return (*drjax.reduce_sum((scaled, counts, large)), jnp.sum(large))


def _count_large(x):
    large = x > 1
    count = jnp.sum(large)
    return jnp.sum(jnp.where(large, x, 0) ** 2), count, count > 2, jnp.all(x < 2)


def _counts_and_flags_plain(xs):
    x, count, any_large, all_small = jax.vmap(_count_large)(xs)
    mean = jnp.average(x, weights=count)
    return mean, jnp.max(count), jnp.min(count), jnp.any(any_large), jnp.all(all_small)


@_row(_counts_and_flags_plain, XS)
def counts_and_flags(xs):
    x, count, any_large, all_small = drjax.map_fn(_count_large, xs)
    most, any_large = drjax.reduce_max((count, any_large))
    least, all_small = drjax.reduce_min((count, all_small))
    mean = drjax.reduce_weighted_mean(x, count)
    return mean, most, least, any_large, all_small


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
