import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from autotunenet_jax.bayesopt import trials

add = jax.jit(trials.add, static_argnames="keep_best")


@functools.partial(jax.jit, static_argnames=("capacity", "keep_best"))
def _filled(scores, length, *, capacity, keep_best):
    def step(obs, trial):
        index, score = trial
        more = trials.add(obs, jnp.array([0.5]), score, time=index, keep_best=keep_best)
        return jax.tree.map(lambda new, old: jnp.where(index < length, new, old), more, obs), None

    return jax.lax.scan(step, trials.empty(capacity, 1), (jnp.arange(40), scores))[0]


def filled(scores, *, capacity, keep_best=0.25):
    padded = np.array([*scores, *[0.0] * (40 - len(scores))], np.float32)
    return _filled(padded, len(scores), capacity=capacity, keep_best=keep_best)


def test_trials_fill_the_slots_in_order():
    obs = add(trials.empty(4, 2), jnp.array([0.1, 0.9]), 3.0, noise=0.5, time=2.0, group=7)
    assert trials.mask(obs).tolist() == [True, False, False, False]
    np.testing.assert_allclose(obs.x[0], [0.1, 0.9])
    assert (float(obs.y[0]), float(obs.noise[0]), float(obs.time[0]), int(obs.group[0])) == (3.0, 0.5, 2.0, 7)
    assert not obs.failed[0]


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_a_failure_and_is_never_stored(score):
    obs = filled([score], capacity=2)
    assert bool(obs.failed[0]) and float(obs.y[0]) == 0.0


def test_bad_inputs_are_made_harmless():
    obs = add(trials.empty(2, 3), jnp.array([np.nan, -1.0, 2.0]), 1e38, noise=-1.0, time=np.nan)
    assert obs.x[0].tolist() == [0.5, 0.0, 1.0]
    assert float(obs.noise[0]) == 0.0 and float(obs.time[0]) == 0.0
    assert np.isfinite(np.square(np.float32(obs.y[0])))


def test_a_full_record_forgets_the_oldest_trial_that_is_not_among_the_best():
    # Of 0, 9, 1, 8 a quarter is one trial: 0 is protected, so 9 goes first, then 1, and 0 stays.
    obs = filled([0.0, 9.0, 1.0, 8.0, 5.0], capacity=4)
    assert obs.y.tolist() == [0.0, 1.0, 8.0, 5.0]
    obs = add(obs, jnp.array([0.5]), 6.0)
    assert obs.y.tolist() == [0.0, 8.0, 5.0, 6.0]
    assert int(obs.count) == 6


def test_without_protection_the_record_is_a_window():
    assert filled([0.0, 9.0, 1.0, 8.0, 5.0], capacity=4, keep_best=0.0).y.tolist() == [9.0, 1.0, 8.0, 5.0]


def test_failures_are_forgotten_before_good_trials():
    obs = filled([np.nan, 1.0, np.nan, 2.0, 3.0], capacity=4, keep_best=0.5)
    assert obs.y.tolist() == [1.0, 0.0, 2.0, 3.0]


# XLA takes numbers this small for zeros.
@given(st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_the_best_trial_and_the_newest_are_never_forgotten(scores):
    obs = filled(scores, capacity=8)
    is_used, obs = np.asarray(trials.mask(obs)), jax.tree.map(np.asarray, obs)
    kept = obs.y[is_used]
    assert len(kept) == min(len(scores), 8)
    assert float(kept.min()) == min(scores)
    assert float(kept[-1]) == np.float32(scores[-1])
    assert np.all(np.diff(obs.time[: len(kept)]) > 0)
