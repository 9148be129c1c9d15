"""The round that asks, with training under way, whether higher rates are better by now."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _plan, _state

LO, HI, TOTAL = 1e-5, 1e-1, 1000
TUNER = atn.AutoTuneNet({"learning_rate": (LO, HI)}, TOTAL)
UPDATE, OBSERVE = jax.jit(TUNER.update), jax.jit(TUNER.observe_eval)
RATE = jax.jit(lambda ts: TUNER.hyperparams(ts)["learning_rate"])
ROW = int(np.argmax(TUNER.plan.kind == _plan.RAISE))
LENGTH = int(TUNER.plan.late[ROW])
FIRST, PEAK = -3.0, 0.05


def log(u):
    """log10 of the rate at ``u`` in the unit cube."""
    return np.log10(float(TUNER.space.decode(u)["learning_rate"]))


class Held(NamedTuple):
    """What the round did: log10 of the rates tried and of those in force before and after; the loss's level then."""

    tried: list[float]
    before: float
    after: float
    discarded: int
    level_before: float
    level_after: float
    ts: _state.TunerState


@functools.cache
def held(best, *, metric=None, breaks_at=None):
    """A run whose first round settles near log10 rate -3, and whose loss falls fastest at ``best`` from then on.

    ``metric`` maps the step and the level to what validation says; losses above ``breaks_at`` explode.
    The loop restores, keeps and adopts its one number, the level of the loss.
    """
    rng = np.random.default_rng(0)
    ts = TUNER.init(jax.random.key(0))
    level = saved = kept = began_at = 2.0
    tried, before, discarded, wants = [], np.nan, 0, False
    while int(ts.round.index) <= ROW:
        is_held = int(ts.round.index) == ROW and int(ts.phase) == _state.FORK
        if not is_held:
            before, discarded, began_at = log(ts.incumbent), int(ts.discarded), level
        elif int(ts.segment_left) == int(ts.segment_length):
            tried.append(log(ts.trial))
        rate = np.log10(max(float(RATE(ts)), 1e-12))
        peak = FIRST if int(ts.round.index) < ROW else best
        level *= 1.0 - PEAK * np.exp(-0.5 * (rate - peak) ** 2)
        is_broken = breaks_at is not None and is_held and log(ts.trial) > breaks_at
        loss = np.nan if is_broken else level + 0.002 * rng.normal()
        if metric is not None and (wants or int(ts.step) % 50 == 0):
            ts = OBSERVE(ts, jnp.float32(metric(int(ts.step), level)))
        if is_broken:
            # It led up to it: not a bad batch.
            for high in (50.0, 500.0):
                ts, _ = UPDATE(ts, jnp.float32(high))
        ts, directive = UPDATE(ts, jnp.float32(loss))
        wants = bool(directive.evaluate)
        saved = level if directive.save else saved
        kept = level if directive.keep else kept
        level = saved if directive.restore else kept if directive.adopt else level
    return Held(tried, before, log(ts.incumbent), int(ts.discarded) - discarded, began_at, level, ts)


def test_a_rate_that_is_too_low_by_now_is_raised():
    now = held(-1.5)
    assert now.before == pytest.approx(FIRST, abs=0.6)
    assert np.diff(now.tried) == pytest.approx(0.5, abs=0.01)
    assert now.after >= now.before + 0.49


def test_a_rate_that_is_right_stays_and_costs_one_fork():
    now = held(FIRST)
    assert now.after == now.before
    assert now.tried == pytest.approx([now.before, now.before + 0.5], abs=0.01)
    assert now.discarded == LENGTH


def test_a_lower_rate_is_never_taken():
    assert held(-4.5).after == held(-4.5).before


def test_training_goes_on_from_the_best_fork():
    """No training is lost but that of the others."""
    right, low = held(FIRST), held(-1.5)
    # Nearly the whole length at the best speed, less the cool-down.
    assert right.level_after < right.level_before * (1.0 - 0.9 * PEAK) ** (0.7 * LENGTH)
    assert low.level_after < low.level_before * (1.0 - PEAK * np.exp(-0.5 * (low.after + 1.5) ** 2)) ** (0.7 * LENGTH)


def test_a_fork_that_breaks_is_dropped_at_once():
    now = held(-1.5, breaks_at=-2.6)
    assert now.after == now.before
    assert now.discarded < LENGTH


def test_where_every_fork_breaks_the_rate_is_lowered():
    now = held(-1.5, breaks_at=-10.0)
    # It begins again on other data a few times, and no higher rate is tried.
    assert set(now.tried) == {now.before}
    assert now.after == pytest.approx(now.before - 0.5, abs=0.01)


def test_validation_decides_where_there_is_one():
    """Training losses ask for more, validation for what is in force."""
    now = held(-1.5, metric=lambda step, level: 1.0 + 0.5 / (level + 0.5) if step > 200 else 3.0 - step / 200)
    assert now.after == now.before


def test_it_is_not_held_where_validation_gets_worse_already():
    now = held(-1.5, metric=lambda step, level: 1.0 + step / 400 if step else 3.0)
    assert now.tried == [] and now.after == now.before


def test_it_is_not_held_where_there_is_no_room():
    tuner = atn.AutoTuneNet({"learning_rate": (LO, 10 ** (FIRST - 1.0))}, TOTAL)
    ts, update = tuner.init(jax.random.key(0)), jax.jit(tuner.update)
    for _ in range(TOTAL // 3):
        phase, row = int(ts.phase), int(ts.round.index)
        ts, _ = update(ts, jnp.float32(2.0 - 0.001 * np.log10(max(float(tuner.hyperparams(ts)["learning_rate"]), LO))))
        assert not (row == ROW and phase == _state.FORK)
    assert int(ts.round.index) == ROW + 1


def test_the_winner_is_the_best_state_that_metrics_have_to_better():
    now = held(-1.5, metric=lambda step, level: level)
    seen = now.ts.validation
    assert bool(seen.is_kept)
    assert float(seen.best) == pytest.approx(now.level_after, rel=0.05)
