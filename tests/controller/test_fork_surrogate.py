"""Forks judged: which is better, what another may gain, and what does not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.bayesopt import trials
from autotunenet_jax.controller import fork_surrogate
from tests.reference.algorithm import shortfall

SPACE = atn.SearchSpace({"learning_rate": (1e-5, 1.0)})
CAPACITY = 32


def record(scores, *, group=0, failed=(), x=None, into=None):
    """What is known of some forks, in the order of their scores."""
    obs = trials.empty(CAPACITY, 1) if into is None else into
    for number, score in enumerate(scores):
        where = 0.2 + 0.1 * number if x is None else x[number]
        obs = _add(obs, jnp.float32([where]), jnp.float32(score), jnp.int32(group), jnp.bool_(number in failed))
    return obs


@jax.jit
def _add(obs, x, y, group, failed):
    return trials.add(obs, x, y, time=1.0, group=group, failed=failed)


def told(obs, **options):
    resolution = options.get("resolution", fork_surrogate._RESOLUTION)
    return np.asarray(fork_surrogate.shortfalls(obs, resolution=resolution).y)[: int(obs.count)]


def test_the_best_fork_of_a_round_is_zero_and_one_that_gained_nothing_is_one():
    np.testing.assert_allclose(told(record([-0.8, 0.0, -0.79])), [0.0, 1.0, told(record([-0.8, 0.0, -0.79]))[2]])
    assert 0.0 < told(record([-0.8, 0.0, -0.79]))[2] < 0.1
    # A fork that blew up is as bad as any.
    assert told(record([-0.8, 1e12, -0.1]))[1] == told(record([-0.8, 1e3, -0.1]))[1] < 2.0


@pytest.mark.parametrize("scores", [[-0.5, -0.2, 0.1], [0.3, 0.1, 0.6], [-1.0], [2.0, 2.0], [-1e-3, 1e15]])
def test_it_says_what_the_plain_twin_says(scores):
    for is_fast, resolution in ((True, fork_surrogate._RESOLUTION), (False, fork_surrogate._SLOW_RESOLUTION)):
        expected = [shortfall(score, scores, is_fast=is_fast) for score in scores]
        np.testing.assert_allclose(told(record(scores), resolution=resolution), expected, rtol=1e-5)


def test_the_unit_of_the_loss_does_not_matter_nor_do_other_rounds():
    scores = [-0.5, -0.2, 0.1, -0.45]
    expected = told(record(scores))
    for scale in (1e-3, 1e6):
        np.testing.assert_allclose(told(record(scale * np.array(scores))), expected, rtol=1e-5)
    both = record([-100.0, 3.0], group=1, into=record(scores))
    np.testing.assert_allclose(told(both)[:4], expected, rtol=1e-6)
    # Nor does where a round without a gain has its reference.
    worse = np.array([0.25, 0.5, 1.0])
    np.testing.assert_allclose(told(record(worse + 4.0)), told(record(worse)), rtol=1e-5)


def test_failed_forks_have_no_part_in_the_unit():
    np.testing.assert_allclose(told(record([-0.5, 0.0, -0.4], failed=[1]))[[0, 2]], told(record([-0.5, -0.4])))


@functools.cache
def compiled():
    tuned = atn.AutoTuneNet(SPACE, 400, initial={"learning_rate": 1e-3}, capacity=CAPACITY)
    ts = tuned.init(jax.random.key(0))

    @jax.jit
    def judged(obs, x):
        known = ts.knowledge._replace(observations=obs)
        result = fork_surrogate.judge(SPACE, ts._replace(knowledge=known, data_step=jnp.int32(20)), x)
        return result, fork_surrogate.probability_better(result, 0, 1), fork_surrogate.expected_improvement(result, 0)

    return judged


def test_it_prefers_the_better_fork_and_looks_beside_it():
    where = np.float32([0.5, 0.6, 0.7, 0.4, 0.8])[:, None]
    result, p_better, gain = compiled()(record([-1.0, -0.7, -0.4], x=where[:3, 0]), where)
    assert p_better > 0.9
    assert np.argmin(result.mean[:3]) == 0
    # Beyond a worse fork less is to be gained than on the other side of the best one.
    assert gain[3] > 2.0 * gain[4]
    swapped, p_better, _ = compiled()(record([-0.7, -1.0, -0.4], x=where[:3, 0]), where)
    assert p_better < 0.1 and np.argmin(swapped.mean[:3]) == 1


def test_a_failed_fork_is_worse_than_any():
    where = np.float32([0.5, 0.6, 0.7, 0.8, 0.9])[:, None]
    result, p_better, _ = compiled()(record([-1.0, 0.0], failed=[1], x=where[:2, 0]), where)
    assert p_better > 0.9
    assert result.mean[1] > result.mean[0]


def test_the_expected_improvement_is_that_of_the_joint_posterior():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    mean, covariance = rng.normal(size=4), factor @ factor.T
    judged = fork_surrogate.Judgement(jnp.float32(mean), jnp.float32(covariance))
    draws = rng.multivariate_normal(mean, covariance, size=400_000)
    for best in range(4):
        expected = np.mean(np.maximum(draws[:, best, None] - draws, 0.0), axis=0)
        actual = np.asarray(fork_surrogate.expected_improvement(judged, jnp.int32(best)))
        np.testing.assert_allclose(actual, expected, atol=0.01)
        assert np.all(actual >= 0.0)
        for other in set(range(4)) - {best}:
            share = np.mean(draws[:, other] < draws[:, best])
            assert float(fork_surrogate.probability_better(judged, other, best)) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("gap", [-1e6, -40.0, 0.0, 40.0, 1e6])
def test_the_expected_improvement_is_never_negative(gap):
    judged = fork_surrogate.Judgement(jnp.float32([0.0, gap]), jnp.float32(1e-4 * np.eye(2)))
    assert float(fork_surrogate.expected_improvement(judged, 0)[1]) == pytest.approx(max(-gap, 0.0), abs=0.01)
