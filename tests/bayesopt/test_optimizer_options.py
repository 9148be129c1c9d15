import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax import BayesianOptimizer
from autotunenet_jax.bayesopt import surrogate
from benchmarks import _engine_sweep

LINE = {"x": (0.0, 1.0)}


def told(optimizer, x, y, **options):
    state = optimizer.init(jax.random.key(0))
    return jax.jit(optimizer.observe)(state, {"x": jnp.asarray(x, jnp.float32)}, jnp.asarray(y, jnp.float32), **options)


@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.soak)])
def test_unpleasant_histories_lead_to_finite_suggestions_inside_the_bounds(count):
    counts = _engine_sweep.run(count, capacity=8)
    assert counts.pop("histories") == count
    assert len(counts) == 5 and not any(counts.values()), counts


def test_a_score_with_a_large_known_variance_counts_less():
    optimizer = BayesianOptimizer(LINE, 16)
    x = np.tile(np.linspace(0.0, 1.0, 8), 2)
    is_other = np.arange(16) >= 8
    y = x + 0.5 * is_other

    @jax.jit
    def low_end(state):
        config = optimizer.config
        posterior = surrogate.fit(config, state.observations, start=state.hyper, key=state.key)
        return state.unit * surrogate.predict(config, posterior, jnp.array([[0.15]]))[0][0]

    # Two answers to every question: as good as each other, or one of them doubtful.
    assert 0.3 < float(low_end(told(optimizer, x, y))) < 0.5
    assert float(low_end(told(optimizer, x, y, noise=np.where(is_other, 25.0, 0.0)))) < 0.2
    assert float(low_end(told(optimizer, x, y, noise=np.where(is_other, 0.0, 25.0)))) > 0.6


def test_groups_share_an_offset_that_does_not_count():
    optimizer = BayesianOptimizer(LINE, 16, has_groups=True)
    group = np.arange(12) % 2
    x = np.where(group == 0, np.linspace(0.0, 0.6, 12), np.linspace(0.4, 1.0, 12))
    # The second group's level hides that the minimum, at 0.8, is among its points.
    y = (x - 0.8) ** 2 + 5.0 * group
    best = jax.jit(optimizer.best)
    assert abs(float(best(told(optimizer, x, y, group=group))["x"]) - 0.8) < 0.1
    # Without groups the level decides.
    assert float(best(told(optimizer, x, y))["x"]) < 0.61


def test_the_minimum_is_sought_at_the_time_of_the_suggestion():
    optimizer = BayesianOptimizer(LINE, 32, has_drift=True, drift_time=10.0)
    x = np.tile(np.linspace(0.0, 1.0, 11), 2)
    time = np.repeat([0.0, 60.0], 11)
    y = np.where(time == 0.0, (x - 0.2) ** 2, 0.5 + (x - 0.8) ** 2)
    state = told(optimizer, x, y, time=time)
    suggest, best = jax.jit(lambda s, t: optimizer.suggest(s, time=t)[0]["x"]), jax.jit(optimizer.best)
    # Old scores are lower, and another place is best by now.
    assert abs(float(suggest(state, 0.5)) - 0.2) < 0.1
    assert abs(float(suggest(state, 60.5)) - 0.8) < 0.1
    assert abs(float(best(state)["x"]) - 0.8) < 0.05


@pytest.mark.soak
def test_where_every_trial_counts_the_middle_comes_first():
    optimizer = BayesianOptimizer({"x": (0.0, 2.0), "y": (0.0, 1.0)}, 8, has_drift=True)
    point, _ = optimizer.suggest(optimizer.init(jax.random.key(3)))
    assert (float(point["x"]), float(point["y"])) == (1.0, 0.5)


def test_times_go_on_by_themselves():
    optimizer = BayesianOptimizer(LINE, 8, has_drift=True)
    observe = jax.jit(optimizer.observe)
    state = told(optimizer, [0.1, 0.2], [1.0, 2.0])
    state = observe(state, {"x": 0.3}, 1.0, time=10.0)
    state = observe(state, {"x": 0.4}, 1.0)
    np.testing.assert_allclose(state.observations.time[:4], [0.0, 1.0, 10.0, 11.0])


def test_beyond_capacity_the_old_go_and_only_where_nothing_moves_the_best_stay():
    y = np.array([0.0, 9.0, 1.0, 8.0, 5.0, 7.0])
    still, moving = BayesianOptimizer(LINE, 4), BayesianOptimizer(LINE, 4, has_drift=True)
    for optimizer, kept in ((still, [0.0, 8.0, 5.0, 7.0]), (moving, [1.0, 8.0, 5.0, 7.0])):
        state = told(optimizer, y / 10.0, y)
        # Kept in a power of two near the first that is not zero.
        assert (state.observations.y * state.unit).tolist() == kept


@pytest.mark.parametrize("options", [{}, pytest.param({"has_groups": True}, marks=pytest.mark.soak)], ids=str)
def test_neither_the_scale_nor_the_offset_of_scores_matters(options):
    optimizer = BayesianOptimizer({"x": (0.0, 1.0), "y": (1e-4, 1.0)}, 16, **options)
    suggest, observe = jax.jit(optimizer.suggest), jax.jit(optimizer.observe)

    def points(scale, offset=0.0):
        state, out = optimizer.init(jax.random.key(4)), []
        for _ in range(11):
            point, state = suggest(state)
            x, y = (np.float64(point[name]) for name in "xy")
            value = round(4096.0 * ((x - 0.7) ** 2 + 0.2 * (np.log10(y) + 1.0) ** 2))
            # A failure in between changes nothing.
            state = observe(state, point, np.float32(scale * value + offset if len(out) != 2 else np.inf))
            out.append((x, np.log10(y)))
        return np.array(out)

    usual = points(1.0)
    for scale in (2.0**67, 2.0**-60):
        np.testing.assert_array_equal(points(scale), usual)
    # Other numbers are rounded otherwise.
    for scale, offset in ((1e20, 0.0), (1e-18, 0.0), (1.0, 1e6)):
        np.testing.assert_allclose(points(scale, offset), usual, atol=0.05)


def test_no_two_points_of_a_large_batch_are_the_same():
    # More points than the acquisition compares of those observed: each must still know of all the others.
    optimizer = BayesianOptimizer({"x": (0.0, 1.0), "y": (0.0, 1.0)}, 24, initial=4)
    x = np.random.default_rng(0).uniform(size=(6, 2)).astype(np.float32)
    state = optimizer.init(jax.random.key(0))
    state = jax.jit(optimizer.observe)(state, {"x": x[:, 0], "y": x[:, 1]}, np.sin(9.0 * x[:, 0]) + x[:, 1])
    points = jax.jit(lambda s: optimizer.suggest(s, count=32))(state)[0]
    pairs = np.stack([points["x"], points["y"]], axis=1)
    distance = np.linalg.norm(pairs[:, None] - pairs[None, :], axis=-1)[np.triu_indices(32, 1)]
    assert distance.min() > 5e-3


def test_the_trust_region_holds_suggestions_and_follows_success():
    optimizer = BayesianOptimizer(LINE, 16, initial=2, has_trust_region=True)
    # The far end promises more than the small box around the best point.
    x = np.array([0.0, 0.1, 0.2, 0.3])
    state = told(optimizer, x, -x)
    suggest = jax.jit(lambda s, side: optimizer.suggest(s._replace(region=s.region._replace(side=side)))[0]["x"])
    assert float(suggest(state, 0.1)) <= 0.3501
    assert float(suggest(state, 1.6)) > 0.4

    observe = jax.jit(optimizer.observe)
    for score in (-1.0, -2.0):
        state = observe(state, {"x": 0.5}, score)
    grown = float(state.region.side)
    assert grown == pytest.approx(1.6)
    for _ in range(4):
        state = observe(state, {"x": 0.5}, jnp.nan)
    assert float(state.region.side) == pytest.approx(grown / 2.0)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_drift_time_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match="drift_time must be above zero and finite"):
        BayesianOptimizer(LINE, drift_time=value)
