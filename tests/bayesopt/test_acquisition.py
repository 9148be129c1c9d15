import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from autotunenet_jax.bayesopt import acquisition, kernels, quasi_random, surrogate, trials
from autotunenet_jax.bayesopt.residuals import residuals_of
from tests.reference import gaussian_process as twin

CAPACITY, DIMS = 16, 2
POINTS = 41**2 + 1
# A unit in which the noise is large enough for float32 to know the posterior to three digits.
CONFIG = kernels.SurrogateConfig(dims=DIMS, has_time=True, has_groups=True, standardise=False, noise_loc=-2.0)
LOWER, UPPER = jnp.zeros(DIMS), jnp.ones(DIMS)


def identity(x):
    return x


@jax.jit
def fit(obs):
    return surrogate.fit(CONFIG, obs, start=kernels.initial_hyper(CONFIG), key=jax.random.key(0))


@jax.jit
def propose(post, key, lower, upper, reference, reference_mask):
    return acquisition.propose(
        CONFIG, post, key, lower=lower, upper=upper, snap=identity, reference=reference, reference_mask=reference_mask
    )


@jax.jit
def improvement(post, x, reference, reference_mask):
    of, live, is_live = acquisition.log_improvement(
        CONFIG, post, reference=reference, reference_mask=reference_mask, samples=8, compared=5
    )
    return of(x)[0], live, is_live


@jax.jit
def at(post, x, reference, reference_mask):
    """Value and gradient, of as many points in every test: compiled once."""
    return acquisition.log_improvement(CONFIG, post, reference=reference, reference_mask=reference_mask)[0](x)


@jax.jit
def build(x, y):
    def step(obs, trial):
        return trials.add(obs, trial[0], trial[1]), None

    return jax.lax.scan(step, trials.empty(CAPACITY, DIMS), (x, y))[0]


def bowl_history(size=12):
    x = np.random.default_rng(0).uniform(size=(size, DIMS)).astype(np.float32)
    return build(jnp.asarray(x), jnp.asarray(3.0 * np.sum((x - 0.4) ** 2, axis=1), jnp.float32))


def test_log_h_agrees_with_float64_over_hundreds_of_orders_of_magnitude():
    z = np.concatenate([-np.geomspace(1e-4, 1e6, 4000), np.geomspace(1e-4, 1e4, 500), [0.0]])
    expected = twin.log_expected_positive_part(np.float32(z).astype(np.float64))
    assert expected.min() < -60 * np.log(10.0)
    got, _ = jax.jit(acquisition.log_h_and_slope)(jnp.asarray(z, jnp.float32))
    assert np.all(np.abs(got - expected) <= 2e-6 * np.maximum(np.abs(expected), 1.0))


def log_h(z):
    return acquisition.log_h_and_slope(z)[0]


def test_the_gradient_of_log_h_is_right_and_finite_everywhere():
    z = np.concatenate([-np.geomspace(1e-3, 1e3, 500), np.geomspace(1e-3, 1e3, 200), [0.0]])
    told = jnp.asarray(np.concatenate([z, [-1e18, -1e9, 1e9, 1e30]]), jnp.float32)
    value, gradient = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(log_h)))(told))
    same, slope = map(np.asarray, jax.jit(acquisition.log_h_and_slope)(told))
    assert all(np.all(np.isfinite(part)) for part in (value, gradient, same, slope))
    z = np.float32(z).astype(np.float64)
    expected = np.exp(special.log_ndtr(z) - twin.log_expected_positive_part(z))
    np.testing.assert_allclose(gradient[: len(z)], expected, rtol=5e-5)
    np.testing.assert_allclose(slope[: len(z)], expected, rtol=5e-5)


def test_the_distribution_and_the_excess_of_a_unit_normal():
    z = np.linspace(-12.0, 12.0, 4801).astype(np.float32)
    exact = special.ndtr(z.astype(float))
    density = np.exp(-0.5 * z.astype(float) ** 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(jax.jit(acquisition.normal_cdf)(z), exact, rtol=5e-5)
    # Below six standard deviations the two terms of the formula cancel in float64.
    low = z > -6.0
    excess = jax.jit(acquisition.expected_excess)(z)
    np.testing.assert_allclose(excess[low], (density + z * exact)[low], rtol=1e-5)
    assert np.all(np.diff(excess) >= 0.0) and np.all(np.asarray(excess) >= 0.0)
    far = np.array([-1e30, -1e9, 1e9, 1e30], np.float32)
    np.testing.assert_array_equal(acquisition.normal_cdf(far), [0, 0, 1, 1])
    np.testing.assert_array_equal(acquisition.expected_excess(far), [0, 0, 1e9, far[-1]])


def test_the_gradient_of_the_improvement_is_finite_far_from_any_improvement():
    obs = bowl_history()
    post = fit(obs)
    others = np.random.default_rng(2).uniform(size=(POINTS - CAPACITY, DIMS)).astype(np.float32)
    value, gradient = at(post, np.concatenate([obs.x, others]), obs.x, trials.mask(obs))
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("confidence", [None, pytest.param(1.0, marks=pytest.mark.soak)])
def test_the_gradient_of_the_improvement_is_that_of_its_value(confidence):
    obs = bowl_history()
    post = fit(obs)
    x = np.random.default_rng(2).uniform(size=(60, DIMS)).astype(np.float32)

    @jax.jit
    def both_ways(post, x, reference, reference_mask):
        of, *_ = acquisition.log_improvement(
            CONFIG, post, reference=reference, reference_mask=reference_mask, time=0.5, confidence=confidence
        )
        return *of(x), jax.grad(lambda x: jnp.sum(of(x)[0]))(x)

    for reference_mask in (trials.mask(obs), np.zeros(CAPACITY, bool)):
        value, gradient, expected = map(np.asarray, both_ways(post, x, obs.x, reference_mask))
        likely = value > -8.0
        assert likely.sum() > 5
        np.testing.assert_allclose(gradient[likely], expected[likely], rtol=2e-3, atol=2e-3)


def test_log_improvement_agrees_with_the_twin():
    obs = bowl_history()
    post = fit(obs)
    x = jnp.asarray(np.random.default_rng(5).uniform(size=(20, DIMS)), jnp.float32)
    got, live, is_live = improvement(post, x, obs.x, trials.mask(obs))
    assert bool(jnp.all(is_live))

    target = jax.jit(functools.partial(residuals_of, standardise=False, is_centred_apart=True))(
        obs, group=obs.group, level=np.zeros(CAPACITY, np.float32)
    )
    used = int(obs.count)
    model = {
        "x": np.asarray(obs.x, np.float64)[:used],
        "categorical": np.zeros(DIMS, bool),
        "group": np.zeros(used),
        "intercept": kernels.INTERCEPT,
        "noise": np.zeros(used),
        "floor": CONFIG.noise_floor,
        "time": np.zeros(used),
    }
    theta = np.asarray(kernels.flatten(post.hyper), np.float64)
    residual = np.asarray(target.residual, np.float64)[:used]
    normal = quasi_random.normal_table(8, 5).astype(np.float64)
    jitter = acquisition._REFERENCE_JITTER * np.exp(2.0 * theta[DIMS])
    for point, value in zip(np.asarray(x, np.float64), np.asarray(got), strict=True):
        points = np.concatenate([np.asarray(live, np.float64), point[None]])
        mean, covariance = twin.posterior(theta, points, residual, time_new=np.zeros(6), **model)
        expected = twin.log_improvement(mean, covariance, normal, jitter=jitter)
        # A logarithm of -10 is never the largest; float32 knows the variance there to one digit.
        if expected > -10.0:
            np.testing.assert_allclose(value, expected, atol=0.05)
        else:
            assert value < -9.0


@jax.jit
def upper_bound(post, x, place, reference, reference_mask):
    """The bound where the last reference is a place that is being tried, and the posterior."""
    of, *_ = acquisition.log_improvement(
        CONFIG, post, reference=reference, reference_mask=reference_mask,
        pending=jnp.arange(CAPACITY + 1) == CAPACITY, time=0.5, confidence=2.0,
    )  # fmt: skip
    return of(x)[0], *surrogate.predict(CONFIG, post, jnp.concatenate([x, place]), time=0.5)


@pytest.mark.parametrize("is_pending", [False, True])
def test_the_confidence_bound_is_that_of_the_posterior(is_pending):
    obs = bowl_history()
    post = fit(obs)
    x = np.random.default_rng(5).uniform(size=(10, DIMS)).astype(np.float32)
    place = np.float32([[0.3, 0.9]])
    used = np.append(trials.mask(obs), is_pending)
    bound, mean, covariance = map(np.asarray, upper_bound(post, x, place, np.concatenate([obs.x, place]), used))
    variance = np.diagonal(covariance)[:-1]
    if is_pending:
        variance = variance - np.square(covariance[-1, :-1]) / covariance[-1, -1]
    expected = 2.0 * np.sqrt(variance) - (mean[:-1] - post.location)
    np.testing.assert_allclose(bound, expected / post.scale, rtol=1e-3, atol=1e-3)


def test_references_that_do_not_count_change_nothing():
    obs = bowl_history()
    post = fit(obs)
    x = jnp.asarray(np.random.default_rng(4).uniform(size=(10, DIMS)), jnp.float32)
    keep = jnp.arange(CAPACITY) < 3
    masked, _, is_live = improvement(post, x, obs.x, keep)
    assert int(is_live.sum()) == 3
    elsewhere, _, _ = improvement(post, x, jnp.where(keep[:, None], obs.x, 0.9), keep)
    np.testing.assert_allclose(masked, elsewhere, rtol=1e-5)
    # Three references that count, among five compared, are worth as much as three alone.
    alone = jax.jit(lambda post, x: acquisition.log_improvement(
        CONFIG, post, reference=obs.x[:3], reference_mask=keep[:3], samples=2048)[0](x)[0])(post, x)  # fmt: skip
    many = jax.jit(lambda post, x: acquisition.log_improvement(
        CONFIG, post, reference=obs.x, reference_mask=keep, samples=2048)[0](x)[0])(post, x)  # fmt: skip
    likely = np.asarray(alone) > -8.0
    np.testing.assert_allclose(np.asarray(many)[likely], np.asarray(alone)[likely], atol=0.15)


def test_the_proposal_is_no_worse_than_a_dense_grid():
    obs = bowl_history()
    post = fit(obs)
    mask = trials.mask(obs)
    best = propose(post, jax.random.key(1), LOWER, UPPER, obs.x, mask)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 41)] * 2), axis=-1).reshape(-1, DIMS)
    value, _ = at(post, np.float32([best, *grid]), obs.x, mask)
    assert value[0] > np.max(value[1:]) - 0.02


def test_without_any_knowledge_chance_decides():
    post = fit(trials.empty(CAPACITY, DIMS))
    nothing = jnp.zeros(CAPACITY, bool)
    points = {
        tuple(propose(post, jax.random.key(seed), LOWER, UPPER, jnp.zeros((CAPACITY, DIMS)), nothing).tolist())
        for seed in range(4)
    }
    assert len(points) == 4


@pytest.mark.parametrize("seed", range(5))
def test_proposals_stay_in_the_box_and_held_coordinates_stay_put(seed):
    obs = bowl_history()
    post = fit(obs)
    lower = jnp.asarray(np.random.default_rng(seed).uniform(0, 0.9, DIMS), jnp.float32)
    upper = jnp.array([lower[0], lower[1] + 0.1])
    got = propose(post, jax.random.key(seed), lower, upper, obs.x, trials.mask(obs))
    assert float(got[0]) == float(lower[0])
    assert float(lower[1]) <= float(got[1]) <= float(upper[1])


def test_a_held_point_is_not_proposed_again():
    obs = bowl_history()
    post = fit(obs)
    first = propose(post, jax.random.key(1), LOWER, UPPER, obs.x, trials.mask(obs))
    reference = obs.x.at[-1].set(first)
    second = propose(post, jax.random.key(1), LOWER, UPPER, reference, trials.mask(obs).at[-1].set(True))
    assert float(jnp.abs(first - second).max()) > 0.02


def test_turned_tables_fill_the_cube_evenly():
    points = np.asarray(
        quasi_random.turned(quasi_random.spread_table(256, 2), quasi_random.uniforms(jax.random.key(3), 2))
    )
    assert points.min() >= 0.0 and points.max() < 1.0
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=4, range=[[0, 1], [0, 1]])
    assert counts.min() >= 12 and counts.max() <= 20
    draws = np.asarray(jax.jit(jax.vmap(lambda seed: quasi_random.uniforms(jax.random.key(seed), 8)))(np.arange(200)))
    assert abs(draws.mean() - 0.5) < 0.03 and abs(draws.std() - 12**-0.5) < 0.02
