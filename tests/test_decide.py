"""What a round of forks says about the best rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _belief, _in_between, _observations, _policy, _surrogate

SPACE = atn.SearchSpace({"learning_rate": (1e-5, 1e-1), "momentum": (0.5, 0.99)})
POLICY = _policy.Policy()
SPACE_OF = _policy.directions(SPACE)


def observed(positions, scores, *, failed=()):
    obs = _observations.empty(16, 2)
    for i, (x, y) in enumerate(zip(positions, scores, strict=True)):
        obs = _observations.add(obs, jnp.array([x, 0.5]), y, group=0, failed=i in failed)
    return obs


def prior(center):
    decades = jnp.asarray(SPACE_OF.decades)
    is_rate = jnp.asarray(SPACE_OF.is_rate)
    return _surrogate.PriorMean(
        center=jnp.where(is_rate, center, 0.5),
        curvature=jnp.where(is_rate, POLICY.sweep_curvature * decades**2, 0.0),
    )


@jax.jit
def recentred(obs, center):
    return _belief.recentred(POLICY, SPACE_OF, obs, prior(center)).center


def scores_about(best, positions, noise=0.0):
    rng = np.random.default_rng(3)
    bowl = _surrogate.bowl(prior(best), jnp.stack([jnp.asarray(positions), jnp.full(len(positions), 0.5)], 1))
    return np.asarray(bowl) + noise * rng.normal(size=len(positions))


@pytest.mark.parametrize("best", [0.45, 0.6, 0.7])
def test_the_centre_moves_to_where_forks_on_either_side_place_the_best_rate(best):
    positions = [0.6, 0.475, 0.725]
    found = recentred(observed(positions, scores_about(best, positions, noise=0.02)), 0.6)
    # A tenth of the cube is 0.4 decades.
    assert abs(float(found[0]) - best) < 0.03
    assert float(found[1]) == 0.5, "only rates have a centre that scores can move"


def test_one_wild_score_moves_the_centre_little():
    positions = [0.6, 0.475, 0.725, 0.55, 0.65]
    scores = scores_about(0.6, positions)
    scores[4] += 1.0
    found = recentred(observed(positions, scores), 0.6)
    assert abs(float(found[0]) - 0.6) < 0.02


def test_without_scores_or_with_failed_ones_only_the_sweep_is_believed():
    np.testing.assert_allclose(recentred(_observations.empty(16, 2), 0.6)[0], 0.6, atol=1e-5)
    failed = observed([0.6, 0.7], [0.0, 0.0], failed=(0, 1))
    np.testing.assert_allclose(recentred(failed, 0.6)[0], 0.6, atol=1e-5)


def test_a_rate_is_chosen_for_its_surroundings_between_the_forks():
    x = jnp.zeros((8, 2)).at[:3].set(jnp.array([[0.6, 0.5], [0.4, 0.5], [0.8, 0.9]]))
    score = jnp.full(8, jnp.nan).at[:3].set(jnp.array([0.2, 0.3, 0.25]))
    is_scored = (jnp.arange(8) < 3) & jnp.isfinite(score)
    points, exist = _in_between.between(POLICY, SPACE, x, jnp.argmin(jnp.where(is_scored, score, jnp.inf)), is_scored)
    points = np.asarray(points)[np.asarray(exist)]
    assert points[:, 0].min() >= 0.4 - 1e-6 and points[:, 0].max() <= 0.8
    far = x.at[1, 0].set(0.05)
    near, _ = _in_between.between(POLICY, SPACE, far, jnp.int32(0), is_scored)
    assert float(near[:, 0].min()) == pytest.approx(0.6 - POLICY.reach_decades / SPACE_OF.decades[0], abs=1e-5)
    # Never beyond a fork that ran, and all of them pass through the best one.
    np.testing.assert_allclose(points[0], [0.6, 0.5], atol=1e-6)
    around = np.asarray(_in_between.around(POLICY, SPACE_OF, jnp.asarray(points)))
    assert around.shape == (3 * len(points), 2)
    np.testing.assert_allclose(around[: len(points), 1], points[:, 1], atol=1e-6)
    assert np.all(around[: len(points), 0] < points[:, 0])


def test_scores_are_shares_of_what_the_best_fork_gained_whatever_the_unit():
    raw = [-2.0, -1.9, -1.0, 0.0]
    plain = _belief.normalised(observed([0.1, 0.2, 0.3, 0.4], raw), resolution=0.05).y[:4]
    assert float(plain[0]) == 0.0
    np.testing.assert_allclose(plain[3], 1.0, atol=1e-5)
    assert np.all(np.diff(plain) > 0)
    scaled = _belief.normalised(observed([0.1, 0.2, 0.3, 0.4], [1e-4 * y for y in raw]), resolution=0.05).y[:4]
    np.testing.assert_allclose(plain, scaled, rtol=1e-4)


def test_hyperparameters_move_together_on_the_way_to_another_fork():
    """Where the rate may go no farther, nothing else does: what lies off the way has not been looked at."""
    x = jnp.array([[0.2, 0.1], [0.8, 0.9]], jnp.float32)
    points, _ = _in_between.between(POLICY, SPACE, x, jnp.int32(0), jnp.ones(2, bool))
    way = np.asarray(points) - np.asarray(x[0])
    np.testing.assert_allclose(way[:, 0] * 0.8, way[:, 1] * 0.6, atol=1e-5)
    assert way[:, 0].max() == pytest.approx(POLICY.reach_decades / 4.0, abs=1e-5)
