"""A surrogate of a few lines in the place of the Gaussian process, which is tested elsewhere, and runs with it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.bayesopt import quasi_random, surrogate, trials
from autotunenet_jax.controller import fork_round
from tests.reference.algorithm import Algorithm

SPACES = {
    "rate": {"learning_rate": (1e-5, 1.0)},
    "both": {"learning_rate": (1e-5, 1.0), "dropout": (0.0, 0.5)},
    "fast": {"learning_rate": (1e-5, 1.0), "bias_lr": (1e-6, 1e-2), "momentum": (0.0, 0.99)},
}
CHUNK = 100
"""Steps of one call of a compiled run."""

_BEST = -2.0
"""Decades of the rate at which a run's loss is lowest."""


def fit_among(config, observations, candidates, *, prior_mean):
    return observations


def predict(config, obs, x, *, time):
    """A local average of the scores, and a covariance that falls with the distance."""
    usable = trials.mask(obs) & ~obs.failed
    return _average(jnp, x, obs.x, obs.y, jnp.abs(time - obs.time), usable)


def twin_surrogate(observations, points, time):
    """The same for the plain twin."""
    known = [o for o in observations if o.y is not None]
    x = np.reshape([o.x for o in known], (-1, points.shape[1]))
    lag = np.array([abs(time - o.time) for o in known])
    return _average(np, points.astype(np.float64), x, np.array([o.y for o in known]), lag, np.ones(len(known)))


def _average(xp, points, x, y, lag, usable):
    # No two points are exactly alike, so that neither version has to break a tie.
    tilt = 0.5 + points @ xp.asarray(0.2 / np.arange(3, 3 + points.shape[1]), points.dtype)
    near = xp.exp(-20.0 * _square(points, x) - lag[None, :]) * usable[None, :]
    mean = (near @ y + 0.02 * tilt) / (near.sum(1) + 0.02)
    return mean, 0.02 * xp.exp(-20.0 * _square(points, points)) + 0.003 * xp.eye(len(points), dtype=points.dtype)


def _square(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def patch():
    """Puts the light surrogate in the place of the Gaussian process, for as long as the context lasts."""
    context = pytest.MonkeyPatch()
    context.setattr(surrogate, "fit_among", fit_among)
    context.setattr(surrogate, "predict", predict)
    return context


@functools.cache
def tuner(space="rate", total_steps: int | None = 400, start=1e-4, **options):
    """A tuner; those of one space share their compilations."""
    initial = {"learning_rate": start} if "learning_rate" in SPACES[space] else None
    return atn.AutoTuneNet(SPACES[space], total_steps, initial=initial, **options)


class Told(NamedTuple):
    """What a run hears at each step.

    ``bowl`` makes the loss and the metric depend on the rate in force; metrics are reported when they are asked for and
    where ``reports`` says.
    """

    loss: Any
    metric: Any
    reports: Any
    has_metric: Any
    bowl: Any


def told(losses, metrics=None, *, reports=False, bowl=0.0):
    count = len(losses)
    columns = (losses, losses if metrics is None else metrics, reports, metrics is not None, bowl)
    kinds = (np.float32, np.float32, bool, bool, np.float32)
    return Told(*(np.broadcast_to(np.asarray(c, k), (count,)) for c, k in zip(columns, kinds, strict=True)))


def losses_like_training(kind, seed, count):
    """Losses of a run, and metrics that turn upwards in the middle of some."""
    rng = np.random.default_rng(seed)
    at = np.arange(count)
    losses = 2.0 * np.exp(-at / (0.3 * count)) + (0.3 if kind == "noisy" else 0.03) * rng.normal(size=count)
    turn = rng.integers(count // 3, 2 * count)
    metrics = losses + 0.05 * rng.normal(size=count) + 0.01 * np.maximum(at - turn, 0)
    if kind == "constant":
        losses = np.full(count, rng.choice([0.0, 2.5, -3.0, 1e-20]))
    for position in rng.integers(0, count, size=6):
        fault = rng.choice(["not finite", "bursts", "spikes", "divergence", "huge"]) if kind == "everything" else kind
        if fault == "not finite":
            losses[position] = rng.choice([np.nan, np.inf, -np.inf])
            metrics[rng.integers(count)] = np.nan
        elif fault == "bursts":
            losses[position : position + rng.choice([1, 4, 7, 8, 9, 20])] = np.nan
        elif fault == "spikes":
            losses[position : position + rng.integers(1, 60)] += 5.0
        elif fault == "divergence":
            losses[position:] += 0.3 * np.arange(count - position)
        elif fault == "huge":
            losses[position] = 1e30
    return losses.astype(np.float32), metrics.astype(np.float32)


def bits(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf, np.float64)


def _step(core, carry, given):
    ts, asked = carry
    away = jnp.clip(jnp.log10(core.hyperparams(ts)["learning_rate"] + 1e-9), -5.0, 0.0) - _BEST
    loss, metric = given.loss + given.bowl * away**2, given.metric + given.bowl * away**2
    reports = given.has_metric & (asked | given.reports)
    seen = core.observe_eval(ts, metric)
    ts = jax.tree.map(lambda a, b: jnp.where(reports, a, b), seen, ts)
    ts, directive = core.update(ts, loss)
    row = {
        "loss": loss,
        "metric": metric,
        "reports": reports,
        "directive": directive,
        "hp": core.hyperparams(ts),
        **{name: getattr(ts, name) for name in ("step", "phase", "segment_left", "incumbent", "trial", "discarded")},
        **{name: getattr(ts, name) for name in ("rollbacks", "slots", "validation", "health", "round")},
    }
    return (ts, directive.evaluate), row


@functools.cache
def compiled(core):
    """A chunk of a run, compiled once per core."""
    return jax.jit(lambda carry, given: jax.lax.scan(functools.partial(_step, core), carry, given))


def run(tuned, given, *, key=0):
    """A whole run: what every step came to, as arrays over steps, and the state at its end."""
    carry, chunks = (tuned.init(jax.random.key(key)), jnp.bool_(False)), []
    for begin in range(0, len(given.loss), CHUNK):
        carry, rows = compiled(tuned.core)(carry, Told(*(column[begin : begin + CHUNK] for column in given)))
        chunks.append(jax.device_get(rows))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks), carry[0]


class Training(NamedTuple):
    """What happens to a simulated training at each step.

    ``bad`` steps report NaN and do not happen; ``collapses`` undo all that was learnt; ``hard`` is added to the loss.
    Losses are reported in a ``unit``.
    """

    bad: Any
    collapses: Any
    hard: Any
    unit: Any


def training(count, *, bad=(), collapses=(), hard=0.0, unit=1.0):
    """Of so many steps; ``bad`` and ``collapses`` are indices or masks."""
    flags = [np.zeros(count, bool), np.zeros(count, bool)]
    for column, at in zip(flags, (bad, collapses), strict=True):
        column[np.asarray(at, int if np.size(at) == 0 else None)] = True
    return Training(*flags, *(np.broadcast_to(np.float32(value), (count,)) for value in (hard, unit)))


def _lived(core, carry, given):
    ts, learnt, saved, kept = carry
    rate = core.hyperparams(ts)["learning_rate"]
    learnt = jnp.where(given.collapses, 0.0, learnt)
    # Batches differ, and each is the same whenever it is shown.
    loss = 0.1 + 2.0 * jnp.exp(-0.03 * learnt) + 0.02 * jnp.sin(12.9 * ts.data_step) + given.hard
    gain = jnp.exp(-0.5 * jnp.square(jnp.log10(rate + 1e-9) - _BEST))
    learnt = jnp.where(given.bad, learnt, learnt + gain)
    ts, directive = core.update(ts, jnp.where(given.bad, jnp.nan, loss * given.unit))
    saved, kept = jnp.where(directive.save, learnt, saved), jnp.where(directive.keep, learnt, kept)
    learnt = jnp.where(directive.restore, saved, jnp.where(directive.adopt, kept, learnt))
    row = {
        "directive": directive,
        "learnt": learnt,
        **{name: getattr(ts, name) for name in ("phase", "incumbent", "rollbacks", "discarded")},
    }
    return (ts, learnt, saved, kept), row


@functools.cache
def _compiled_life(core):
    return jax.jit(lambda carry, given: jax.lax.scan(functools.partial(_lived, core), carry, given))


def live(tuned, given):
    """A training that does what it is told: how every step ended, as arrays over steps, in chunks of `CHUNK`."""
    zero = jnp.float32(0.0)
    carry, chunks = (tuned.init(jax.random.key(0)), zero, zero, zero), []
    for begin in range(0, len(given.bad), CHUNK):
        carry, rows = _compiled_life(tuned.core)(carry, Training(*(column[begin : begin + CHUNK] for column in given)))
        chunks.append(jax.device_get(rows))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def twin_of(tuned, *, key=0):
    """The plain twin of a tuner, with its points."""
    table = quasi_random.spread_table(fork_round.PROPOSALS, tuned.space.dims)
    current = [jax.random.key(key)]

    def spread():
        current[0], shift = _split(current[0], tuned.space.dims)
        return (table + np.asarray(shift)) % np.float32(1)

    return Algorithm(
        tuned.space,
        tuned.plan,
        guard=tuned.core.guard,
        start=np.asarray(tuned.init(jax.random.key(key)).incumbent),
        surrogate=twin_surrogate,
        spread=spread,
        warmup_steps=tuned.core.warmup_steps,
    )


@functools.partial(jax.jit, static_argnums=1)
def _split(key, dims):
    key, turn = jax.random.split(key)
    return key, jax.random.uniform(turn, (dims,))
