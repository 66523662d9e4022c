"""Federated algorithms as slow, obvious loops over clients, steps and examples.

They are written from the papers, in numpy's float64, for parameters that are one vector
`x`. A client's examples are the rows of an array. A cohort is a list of pairs: which
client it is, and its rows. Each algorithm is a generator over rounds, pairs of a cohort
and a key, that yields `x` and the metrics after each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Problem(NamedTuple):
    """What is minimised."""

    losses: Callable[..., Any]  # (x, rows) -> one loss for each row
    gradient: Callable[..., Any]  # (x, rows) -> the gradient of their mean


#
# Optimizers: `(x, gradient, state) -> (x, state)`; the state is None at first.
#
def sgd(rate, momentum=0.0, nesterov=False):
    def step(x, gradient, trace):
        trace = gradient + (0 if trace is None else momentum * trace)
        ahead = gradient + momentum * trace
        return x - rate * (ahead if nesterov else trace), trace

    return step


def adam(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    def step(x, gradient, state):
        m, v, t = (0.0, 0.0, 0) if state is None else state
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        t += 1
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        return x - rate * (direction + weight_decay * x), (m, v, t)

    return step


def adaptive(kind, rate, *, b1, b2=0.0, tau):
    """The server of FedAdam, FedYogi and FedAdagrad: arXiv:2003.00295, algorithm 2.

    The paper's Delta is the clients' mean step, which is less the gradient given here.
    """

    def step(x, gradient, state):
        delta = -gradient
        m, v = (0.0, np.full_like(x, tau**2)) if state is None else state
        m = b1 * m + (1 - b1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        elif kind == "adam":
            v = b2 * v + (1 - b2) * delta**2
        return x + rate * m / (np.sqrt(v) + tau), (m, v)

    return step


#
# Parts of a round.
#
def shuffled(key, count):
    """The order of examples: each has a number of its own, and they ascend."""
    u = [float(jax.random.uniform(jax.random.fold_in(key, j))) for j in range(count)]
    return np.argsort(u)


def minibatches(key, client, count, epochs, batch_size):
    """The examples of each local step."""
    client_key = jax.random.fold_in(key, client)
    for epoch in range(epochs):
        order = shuffled(jax.random.fold_in(client_key, epoch), count)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def local_steps(problem, x, rows, steps, optimizer, state=None, mu=0.0, shift=0.0):
    """Trains from x, with mu (y - x) + shift added to the gradient at y."""
    y, met = x, []
    for picked in steps:
        met += [*problem.losses(y, rows[picked])]
        gradient = problem.gradient(y, rows[picked]) + mu * (y - x) + shift
        y, state = optimizer(y, gradient, state)
    return y, state, met


def mean_over_clients(values, counts, weighting):
    """A client without examples has no weight in either."""
    of_each = {"examples": counts, "clients": [count > 0 for count in counts]}
    weights = of_each[weighting]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def metrics_of(losses, update):
    return {"loss": np.mean(losses), "update_norm": np.sqrt(np.sum(update**2))}


#
# Algorithms.
#
def fedsgd(problem, x, rounds, server, weighting="examples"):
    """One gradient of each client: arXiv:1602.05629."""
    server_state = None
    for cohort, _ in rounds:
        gradients, losses = [], []
        for _, rows in cohort:
            empty = len(rows) == 0
            gradients.append(0 * x if empty else problem.gradient(x, rows))
            losses += [*problem.losses(x, rows)]
        counts = [len(rows) for _, rows in cohort]
        gradient = mean_over_clients(gradients, counts, weighting)
        x, server_state = server(x, gradient, server_state)
        yield x, metrics_of(losses, gradient)


def fedavg(
    problem,
    x,
    rounds,
    client_optimizer,
    server,
    *,
    epochs,
    batch_size,
    weighting="examples",
    mu=0.0,
):
    """arXiv:1602.05629, with optimizers as in arXiv:2003.00295, algorithm 1.

    With mu, clients minimise their loss + mu / 2 |y - x|^2: FedProx, arXiv:1812.06127.
    """
    server_state = None
    for cohort, key in rounds:
        updates, losses = [], []
        for client, rows in cohort:
            steps = minibatches(key, client, len(rows), epochs, batch_size)
            y, _, met = local_steps(problem, x, rows, steps, client_optimizer, mu=mu)
            updates.append(x - y)
            losses += met
        counts = [len(rows) for _, rows in cohort]
        update = mean_over_clients(updates, counts, weighting)
        x, server_state = server(x, update, server_state)
        yield x, metrics_of(losses, update)


def scaffold(
    problem, x, rounds, client_rate, server_rate, *, population, epochs, batch_size
):
    """arXiv:1910.06378, algorithm 1 with option II."""
    c, c_of = np.zeros_like(x), {}
    for cohort, key in rounds:
        updates, changes, losses = [], [], []
        for client, rows in cohort:
            c_i = c_of.get(client, np.zeros_like(x))
            steps = [*minibatches(key, client, len(rows), epochs, batch_size)]
            y, _, met = local_steps(
                problem, x, rows, steps, sgd(client_rate), shift=c - c_i
            )
            c_new = c_i
            if steps:
                c_new = c_i - c + (x - y) / (len(steps) * client_rate)
            changes.append(c_new - c_i)
            c_of[client] = c_new
            updates.append(x - y)
            losses += met
        counts = [len(rows) for _, rows in cohort]
        update = mean_over_clients(updates, counts, "clients")
        x = x - server_rate * update
        c = c + sum(changes) / population
        yield x, metrics_of(losses, update)


def diloco(problem, x, rounds, inner, outer, *, steps, batch_size):
    """arXiv:2311.08105, algorithm 1. Minibatches are drawn with replacement."""
    outer_state, inner_states = None, {}
    for cohort, key in rounds:
        updates, losses = [], []
        for client, rows in cohort:
            drawn = []
            if len(rows):
                own_key = jax.random.fold_in(key, client)
                shape = (steps, batch_size)
                drawn = jax.random.randint(own_key, shape, 0, len(rows))
            y, inner_states[client], met = local_steps(
                problem, x, rows, drawn, inner, inner_states.get(client)
            )
            updates.append(x - y)
            losses += met
        counts = [len(rows) for _, rows in cohort]
        update = mean_over_clients(updates, counts, "clients")
        x, outer_state = outer(x, update, outer_state)
        yield x, metrics_of(losses, update)


def self_tuning(
    problem,
    x,
    rounds,
    client_rate,
    server_rate,
    momentum,
    *,
    learned,
    hyper_optimizer,
    epochs,
    batch_size,
):
    """Steps along the gradient of a cohort's loss by what made the round before.

    That is by theta: the logarithms of the rates and the logit of the momentum, which
    are learned if their numbers are in `learned`. The derivative of the parameters x'
    of a round by theta is Im x'(theta + i h e_k) / h, without rounding if h is small:
    Squire and Trapp, Using Complex Variables to Estimate Derivatives of Real Functions.
    """
    theta = np.log([client_rate, server_rate, momentum / (1 - momentum)])
    velocity, by_theta, hyper_state = 0 * x, np.zeros((3, len(x))), None
    for cohort, key in rounds:
        counts = [len(rows) for _, rows in cohort]

        def mean_update(log_rate, x=x, cohort=cohort, counts=counts, key=key):
            updates, losses = [], []
            for client, rows in cohort:
                steps = minibatches(key, client, len(rows), epochs, batch_size)
                optimizer = sgd(np.exp(log_rate))
                y, _, met = local_steps(problem, x, rows, steps, optimizer)
                updates.append(x - y)
                losses += met
            return mean_over_clients(updates, counts, "examples"), losses

        def after(theta, x=x, mean_update=mean_update, velocity=velocity):
            momentum = 1 / (1 + np.exp(-theta[2]))
            v = mean_update(theta[0])[0] + momentum * velocity
            return x - np.exp(theta[1]) * v, v

        update, losses = mean_update(theta[0])
        gradient = update
        if 0 in learned:
            gradients = [
                problem.gradient(x, rows) if len(rows) else 0 * x for _, rows in cohort
            ]
            gradient = mean_over_clients(gradients, counts, "examples")
        stepped, hyper_state = hyper_optimizer(theta, by_theta @ gradient, hyper_state)
        used = theta.copy()
        # The gradient came with the updates, which were made with the rate of before.
        used[1:] = stepped[1:]
        h = 1e-30
        by_theta = np.array([after(used + 1j * h * e)[0].imag / h for e in np.eye(3)])
        x, velocity = after(used)
        theta = np.where(np.isin(range(3), learned), stepped, theta)
        rates = np.exp(used[:2])
        yield (
            x,
            metrics_of(losses, update)
            | {
                "client_learning_rate": rates[0],
                "server_learning_rate": rates[1],
                "momentum": 1 / (1 + np.exp(-used[2])),
            },
        )
