import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from autotunenet_jax.bayesopt import kernels, marginal_likelihood, residuals, surrogate, trials
from autotunenet_jax.bayesopt.residuals import residuals_of
from tests.reference import gaussian_process as twin

CAPACITY, USED, DIMS = 24, 15, 3
CONFIGS = {
    "plain": kernels.SurrogateConfig(dims=DIMS),
    "everything": kernels.SurrogateConfig(
        dims=DIMS,
        is_categorical=(False, False, True),
        has_time=True,
        has_groups=True,
        standardise=False,
        noise_loc=-2.0,
        noise_floor=0.02,
    ),
}
FIT = {name: jax.jit(lambda obs, start, config=c: surrogate.fit(config, obs, start=start, key=jax.random.key(0)))
       for name, c in CONFIGS.items()}  # fmt: skip
PREDICT = {name: jax.jit(lambda post, x, t, config=c: surrogate.predict(config, post, x, time=t))
           for name, c in CONFIGS.items()}  # fmt: skip


def record(rows, *, capacity=CAPACITY):
    """Observations from a list of (x, y, options)."""
    padded = rows + [rows[0]] * (capacity - len(rows))
    return trials.Observations(
        x=np.array([x for x, *_ in padded], np.float32).reshape(capacity, DIMS),
        y=np.array([y for _, y, *_ in padded], np.float32),
        noise=np.array([o.get("noise", 0.0) for *_, o in padded], np.float32),
        time=np.array([o.get("time", 0.0) for *_, o in padded], np.float32),
        group=np.array([o.get("group", 0) for *_, o in padded], np.int32),
        failed=np.array([o.get("failed", False) for *_, o in padded]),
        count=np.int32(len(rows)),
    )


def history(seed=0, used=USED, offset=2.0):
    """Trials of three groups, each ``offset`` worse than the one before."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(size=(used, DIMS))
    x[:, 2] = np.where(x[:, 2] > 0.5, 0.75, 0.25)
    y = np.sin(4 * x[:, 0]) + x[:, 1] ** 2 + 0.3 * (x[:, 2] > 0.5) + 0.05 * generator.normal(size=used)
    group = np.arange(used) // 5
    return [
        (xi, yi + offset * g, {"noise": 0.01 * (i % 3), "time": 0.3 * g, "group": int(g)})
        for i, (xi, yi, g) in enumerate(zip(x, y, group, strict=True))
    ]


def as_model(name, rows):
    """The twin's arguments for these observations."""
    config = CONFIGS[name]
    column = lambda key: np.array([options[key] for *_, options in rows], np.float64)  # noqa: E731
    return {
        "x": np.array([x for x, *_ in rows], np.float32).astype(np.float64),
        "categorical": np.array(config.is_categorical),
        "group": column("group") if config.has_groups else np.zeros(len(rows)),
        "intercept": kernels.INTERCEPT,
        "noise": column("noise"),
        "floor": config.noise_floor,
        "time": column("time") if config.has_time else None,
    }


def as_data(name, model, residual):
    """The same as padded arrays for the surrogate itself."""
    config, pad = CONFIGS[name], CAPACITY - residual.size
    x = np.concatenate([model["x"], np.full((pad, DIMS), 0.5)]).astype(np.float32)

    def fill(values):
        return np.concatenate([values, np.zeros(pad)]).astype(np.float32)

    time = fill(np.zeros(residual.size) if model["time"] is None else model["time"])
    group = fill(model["group"])
    return marginal_likelihood.prepare(
        config,
        x=x,
        time=time,
        group=group,
        used=np.arange(CAPACITY) < residual.size,
        noise=fill(model["noise"]),
        residual=fill(residual),
    )


target_of = jax.jit(residuals_of, static_argnames=("standardise", "is_centred_apart"))
tamed = jax.jit(residuals.tamed, static_argnames="least")


def targets(config, obs):
    """What the surrogate is fitted to."""
    return target_of(
        obs,
        group=obs.group if config.has_groups else np.zeros_like(obs.group),
        level=np.zeros(CAPACITY, np.float32),
        standardise=config.standardise,
        is_centred_apart=config.has_groups,
    )


def assert_the_posterior_is_the_twins(name, post, target, model):
    """At some points and time .7, at the hyperparameters of a fit."""
    config, theta = CONFIGS[name], np.asarray(kernels.flatten(post.hyper), np.float64)
    x = np.random.default_rng(3).uniform(size=(6, DIMS))
    x[:, 2] = 0.25
    mean, covariance = PREDICT[name](post, jnp.asarray(x, jnp.float32), jnp.float32(0.7))
    time_new = np.full(len(x), 0.7) if config.has_time else None
    level = 0.0 if config.has_groups else kernels.INTERCEPT**2
    residual = np.asarray(target.residual, np.float64)[:USED]
    expected, spread = twin.posterior(theta, x, residual, time_new=time_new, level=level, **model)
    unit = float(post.scale)
    np.testing.assert_allclose((np.asarray(mean) - post.location) / unit, expected, atol=2e-3)
    np.testing.assert_allclose(np.asarray(covariance) / unit**2, spread, atol=2e-3 * max(spread.max(), 1.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_evidence_and_gradient_agree_with_the_twin(name):
    model = as_model(name, history())
    residual = np.random.default_rng(1).normal(size=USED)
    loc, scale = (part.astype(np.float64) for part in kernels.hyperprior(CONFIGS[name]))
    reference = lambda theta: twin.negative_log_posterior(theta, residual, loc=loc, scale=scale, **model)  # noqa: E731
    thetas = loc + scale * np.stack([np.random.default_rng(seed).uniform(-1, 1, loc.size) for seed in range(5)])
    evaluate = jax.jit(lambda data, theta: marginal_likelihood.evidence_of(CONFIGS[name], data, theta))
    values, gradients, _ = evaluate(as_data(name, model, residual), jnp.asarray(thetas, jnp.float32))
    for theta, value, gradient in zip(thetas, values, gradients, strict=True):
        np.testing.assert_allclose(value, reference(theta), rtol=1e-3)
        slope = twin.central_gradient(reference, theta)
        np.testing.assert_allclose(gradient, slope, rtol=2e-3, atol=2e-3 * np.abs(slope).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_posterior_agrees_with_the_twin_at_the_fitted_hyperparameters(name):
    config, rows = CONFIGS[name], history()
    obs = record(rows)
    post = FIT[name](obs, kernels.initial_hyper(config))
    model = as_model(name, rows)
    target = targets(config, obs)
    model["noise"] = np.asarray(target.noise, np.float64)[:USED]
    assert_the_posterior_is_the_twins(name, post, target, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fit_among_some_hyperparameters_takes_those_that_the_twin_finds_best(name):
    config, rows = CONFIGS[name], history()
    obs = record(rows)
    loc, scale = kernels.hyperprior(config)
    candidates = (loc + scale * np.random.default_rng(5).normal(size=(6, loc.size))).astype(np.float32)
    # All trials alike and without noise: no factor in float32, and so no candidate.
    candidates[4] = [30.0] * DIMS + [12.0, -40.0, 30.0]
    chosen = jax.jit(lambda obs: surrogate.fit_among(config, obs, candidates))(obs)
    target = targets(config, obs)
    model = as_model(name, rows) | {"noise": np.asarray(target.noise, np.float64)[:USED]}
    residual = np.asarray(target.residual, np.float64)[:USED]
    values = [
        twin.negative_log_posterior(theta.astype(np.float64), residual, loc=loc, scale=scale, **model)
        for theta in np.delete(candidates, 4, axis=0)
    ]
    np.testing.assert_allclose(-chosen.evidence, min(values), rtol=1e-3)
    np.testing.assert_array_equal(kernels.flatten(chosen.hyper), np.delete(candidates, 4, axis=0)[np.argmin(values)])
    assert_the_posterior_is_the_twins(name, chosen, target, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_fit_reaches_the_optimum_that_scipy_finds(name):
    config, rows = CONFIGS[name], history(3)
    obs = record(rows)
    start = kernels.initial_hyper(config)
    for _ in range(3):
        post = FIT[name](obs, start)
        start = post.hyper
    target = targets(config, obs)
    model = as_model(name, rows) | {"noise": np.asarray(target.noise, np.float64)[:USED]}
    loc, scale = (part.astype(np.float64) for part in kernels.hyperprior(config))
    residual = np.asarray(target.residual, np.float64)[:USED]

    def loss(theta):
        return twin.negative_log_posterior(theta, residual, loc=loc, scale=scale, **model)

    bounds = list(zip(loc - 4 * scale, loc + 4 * scale, strict=True))
    starts = [loc + scale * np.random.default_rng(seed).uniform(-1, 1, loc.size) for seed in range(6)]
    best = min(optimize.minimize(loss, s, bounds=bounds).fun for s in starts)
    assert float(-post.evidence) < best + 0.2


def test_without_observations_the_posterior_is_the_prior():
    config = CONFIGS["everything"]
    mean = surrogate.PriorMean(jnp.array([0.3, 0.5, 0.25]), jnp.array([4.0, 0.0, 0.0]))

    candidates = kernels.hyperprior(config)[0][None]
    fit = jax.jit(lambda obs, mean: surrogate.fit_among(config, obs, candidates, prior_mean=mean))
    fitted = fit(trials.empty(CAPACITY, DIMS), mean)
    x = jnp.array([[0.3, 0.9, 0.25], [0.4, 0.1, 0.25], [1.0, 0.5, 0.75]])
    level, covariance = PREDICT["everything"](fitted, x, jnp.float32(0.0))
    quadratic = 2.0 * (np.asarray(x)[:, 0] - 0.3) ** 2
    np.testing.assert_allclose(level, 2.0 * (np.sqrt(1.0 + quadratic) - 1.0), atol=1e-6)
    np.testing.assert_allclose(jnp.diagonal(covariance), np.exp(2.0 * float(fitted.hyper.signal)), rtol=1e-5)


def test_padding_changes_nothing():
    rows = history(used=8)
    predictions = []
    for capacity in (8, CAPACITY):
        obs = record(rows, capacity=capacity)
        post = FIT["plain"](obs, kernels.initial_hyper(CONFIGS["plain"]))
        predictions.append(PREDICT["plain"](post, jnp.full((3, DIMS), 0.4), jnp.float32(0.0)))
    np.testing.assert_allclose(predictions[0][0], predictions[1][0], atol=1e-3)
    np.testing.assert_allclose(predictions[0][1], predictions[1][1], atol=1e-3)


def test_an_intercept_per_group_cancels():
    rows = history()
    shifted = [(x, y + 3.0 * options["group"], options) for x, y, options in rows]
    x = jnp.asarray([[0.2, 0.4, 0.25], [0.7, 0.1, 0.75]], jnp.float32)
    means = []
    for data in (rows, shifted):
        post = FIT["everything"](record(data), kernels.initial_hyper(CONFIGS["everything"]))
        means.append(PREDICT["everything"](post, x, jnp.float32(0.6))[0])
    np.testing.assert_allclose(np.diff(means[0]), np.diff(means[1]), atol=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_failures_and_explosions_do_not_bend_the_fit(name):
    config = CONFIGS[name]
    rows = history(offset=2.0 if config.has_groups else 0.0)
    clean = FIT[name](record(rows), kernels.initial_hyper(config))
    corner = np.array([0.99, 0.99, 0.75])
    spoilt = [
        *rows,
        (corner, 0.0, {"time": 0.6, "group": 2, "noise": 0.0, "failed": True}),
        (np.array([0.95, 0.99, 0.75]), 1e12, {"time": 0.6, "group": 2, "noise": 0.0}),
    ]
    post = FIT[name](record(spoilt), kernels.initial_hyper(config))
    x = jnp.asarray([rows[i][0] for i in (0, 4, 9)], jnp.float32)
    before, after = (np.asarray(PREDICT[name](fitted, x, np.float32(0.6))[0]) for fitted in (clean, post))
    assert np.all(np.isfinite(after))
    assert np.abs((after - after[0]) - (before - before[0])).max() < 0.6
    bad, _ = PREDICT[name](post, jnp.asarray(corner[None], jnp.float32), jnp.float32(0.6))
    assert float(bad[0]) > float(after.max())


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_scores_are_tamed_as_by_the_twin(noise):
    y = np.exp(2.0 * np.random.default_rng(5).normal(size=USED))
    got = tamed(np.float32([*y, np.nan]), np.arange(USED + 1) < USED, least=0.2, noise=np.float32(noise))
    values, *expected = twin.tamed(y, least=0.2, noise=noise)
    np.testing.assert_allclose(got[0][:USED], values, rtol=1e-4)
    np.testing.assert_allclose(got[1:], expected, rtol=1e-4)


def test_noise_lets_the_worse_half_keep_its_values():
    y, good = np.arange(10.0, dtype=np.float32), np.ones(10, bool)
    quiet, median, scale = map(np.asarray, tamed(y, good, least=0.2, noise=np.float32(0.0)))
    noisy, *_ = map(np.asarray, tamed(y, good, least=0.2, noise=np.float32(2.0)))
    np.testing.assert_allclose(noisy, (y - median) / scale, rtol=1e-6)
    np.testing.assert_allclose(quiet[:5], noisy[:5], rtol=1e-6)
    assert float(quiet[-1]) < 0.5 * float(noisy[-1])


def test_one_trial_known_to_be_worthless_does_not_pass_for_all():
    rows = history(offset=0.0)
    rows[4] = (rows[4][0], 50.0, {})
    doubtful = [*rows[:7], (rows[7][0], rows[7][1], {"noise": 1e6}), *rows[8:]]
    options = {"level": None, "standardise": True, "is_centred_apart": False}
    group = np.zeros(CAPACITY, np.int32)
    values = [target_of(record(each), group=group, **options).residual for each in (rows, doubtful)]
    assert float(values[1][4]) == pytest.approx(float(values[0][4]), rel=0.05)


def test_vmap_is_a_loop():
    histories = [record(history(seed)) for seed in range(3)]
    start = kernels.initial_hyper(CONFIGS["plain"])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *histories)
    together = np.asarray(jax.jit(jax.vmap(lambda obs: FIT["plain"](obs, start)))(stacked).evidence)
    for evidence, obs in zip(together, histories, strict=True):
        np.testing.assert_allclose(evidence, FIT["plain"](obs, start).evidence, atol=0.05)


@pytest.mark.parametrize("n", [1, 24, 64, 65, 100, 256])
def test_triangles_are_inverted_and_multiplied_by_halves(n):
    a = np.random.default_rng(n).normal(size=(n, n))
    lower = np.linalg.cholesky(a @ a.T / n + 0.1 * np.eye(n)).astype(np.float32)
    inverse = np.asarray(jax.jit(marginal_likelihood._inverse)(lower))
    expected = np.linalg.inv(lower.astype(np.float64))
    np.testing.assert_allclose(inverse, expected, atol=1e-5 * np.abs(expected).max())
    assert not np.any(np.triu(inverse, 1))
    product = expected.T @ expected
    got = jax.jit(marginal_likelihood._self_product)(jnp.asarray(expected, jnp.float32))
    np.testing.assert_allclose(got, product, atol=1e-5 * np.abs(product).max())
