"""What the first round tries and settles on, for losses that depend on the rate in known ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _state

LO, HI, TOTAL = 1e-5, 1e-1, 1000
TUNER = atn.AutoTuneNet({"learning_rate": (LO, HI)}, TOTAL)
UPDATE, RATE = jax.jit(TUNER.update), jax.jit(lambda ts: TUNER.hyperparams(ts)["learning_rate"])


@functools.cache
def first_round(best, misleads=False, is_flat=False):
    """log10 of the rates tried, and of the one chosen, where a step gains most at log10 rate ``best``.

    ``misleads`` makes the sweep see its one good batch at the lowest rate; with ``is_flat`` forks gain the same at
    every rate.
    """
    rng = np.random.default_rng(0)
    ts, tried, level = TUNER.init(jax.random.key(0)), [], 2.0
    while int(ts.rounds_held) == 0:
        is_fork = int(ts.phase) == _state.FORK
        if is_fork and int(ts.segment_left) == int(ts.segment_length):
            tried.append(np.log10(float(TUNER.space.decode(ts.trial)["learning_rate"])))
            level = 2.0
        distance = 0.0 if is_fork and is_flat else np.log10(float(RATE(ts))) - best
        gain = 0.05 * np.exp(-0.5 * distance**2)
        level *= 1.0 - (gain if is_fork or not misleads else 0.0)
        loss = 1.0 if misleads and not is_fork and int(ts.step) == 0 else level
        ts, directive = UPDATE(ts, jnp.float32(loss + 0.002 * rng.normal()))
    chosen = np.log10(float(TUNER.space.decode(ts.incumbent)["learning_rate"]))
    return tried, chosen, int(ts.discarded), bool(directive.restore), int(directive.data_step)


@pytest.mark.parametrize("best", [-4.0, -2.5])
def test_the_best_rate_ends_up_between_worse_ones(best):
    tried, chosen, *_ = first_round(best)
    assert min(tried) < best < max(tried)
    assert chosen == pytest.approx(best, abs=0.6)


def test_a_best_rate_at_the_upper_bound_is_tried_there():
    tried, chosen, *_ = first_round(-0.5)
    assert max(tried) == pytest.approx(-1.0, abs=1e-3)
    assert chosen > -1.6


def test_a_sweep_that_misleads_does_not_confine_the_forks():
    """The first fork is far from the best rate, and the round walks there."""
    tried, chosen, *_ = first_round(-3.0, misleads=True)
    assert max(abs(rate + 3.0) for rate in tried[:1]) > 0.5
    assert min(abs(rate + 3.0) for rate in tried) < 0.5
    assert chosen == pytest.approx(-3.0, abs=0.8)


def test_where_forks_cannot_tell_it_stays_where_the_sweep_points():
    tried, chosen, *_ = first_round(-2.0, is_flat=True)
    assert tried[0] == pytest.approx(-2.0, abs=0.7)
    assert abs(chosen - tried[0]) < 1.0


def test_all_of_it_is_given_away_within_the_share():
    tried, _, discarded, restores, data_step = first_round(-2.5)
    sweep, late = int(TUNER.plan.sweep[0]), int(TUNER.plan.late[0])
    assert restores and data_step == 0
    assert discarded == sweep + late * len(tried) <= 0.15 * TOTAL
