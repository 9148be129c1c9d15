"""What the trials say about the objective: a Gaussian process with a fixed number of slots.

Notation, as in the literature: ``d`` dimensions, ``n`` slots, ``m`` query points; ``K`` the covariance of the scores,
``L`` its Cholesky factor, the whitener ``L^-1``, ``alpha = K^-1 r`` for residuals ``r``; hyperparameters are kept as
logarithms.

    K = a^2 Matern52(x, x') exp(-|t - t'| / l_t) + b^2 [same group] + diag(s^2 + noise_i)

The first term is the shape ``f`` that `predict` returns. ``b`` is the intercept of a group about the group's mean
score; without groups there is one group, and its intercept is the mean level of ``f``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..compiler.sequential_vmap import sequential_vmap
from ..compiler.single_kernel import single_kernel
from .bfgs import minimise
from .kernels import (
    INTERCEPT,
    Hyper,
    SurrogateConfig,
    flatten,
    hyperprior,
    shape_kernel,
    shape_slope,
    square,
    unflatten,
)
from .marginal_likelihood import Data, evidence_of, prepare
from .quasi_random import spread_table, turned, uniforms
from .residuals import Residuals, residuals_of
from .trials import Observations
from .trials import mask as used_slots

# Places each search of a fit looks at before it descends from the best of them.
_DRAWS = 3
# Reach of the fit about the prior's location, in the prior's scales.
_REACH = 4.0


class PriorMean(NamedTuple):
    """A bowl in the unit of the score: quadratic near its centre, growing with the distance only beyond about 1."""

    center: Float[Array, "d"]
    curvature: Float[Array, "d"]
    """Second derivative at the centre, per squared unit of the cube; 0 is flat."""


class Posterior(NamedTuple):
    """A fitted surrogate. Opaque except for ``hyper``, which warm-starts the next fit, and ``evidence``."""

    hyper: Hyper
    x: Float[Array, "n d"]
    time: Float[Array, "n"]
    used: Bool[Array, "n"]
    whitener: Float[Array, "n n"]
    white: Float[Array, "n"]
    location: Float[Array, ""]
    scale: Float[Array, ""]
    prior_mean: PriorMean | None
    evidence: Float[Array, ""]
    """Log evidence plus the log prior of the hyperparameters, in nats, up to a constant."""


def bowl(mean: PriorMean, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """The prior mean at some points."""
    quadratic = 0.5 * jnp.square(x - mean.center) @ mean.curvature
    return 2.0 * quadratic / (1.0 + jnp.sqrt(1.0 + quadratic))


def _seeds(
    config: SurrogateConfig, start: Float[Array, "p"], key: PRNGKeyArray, low: np.ndarray, high: np.ndarray
) -> Float[Array, "draws starts p"]:
    """Where the fit looks first: the warm start, a safe place, and draws around the prior's location."""
    loc, scale = hyperprior(config)
    starts, draws, size = config.fit_starts, _DRAWS, loc.size
    table = spread_table(starts * draws, size).reshape(starts, draws, size).swapaxes(0, 1)
    table = turned(table, uniforms(key, size))
    # Triangular, up to two scales to either side.
    offset = 2.0 * jnp.sign(table - 0.5) * (1.0 - jnp.sqrt(1.0 - jnp.abs(2.0 * table - 1.0)))
    warm = jnp.where(jnp.isfinite(start), jnp.clip(start, low, high), loc)
    # With noise as large as the search allows a factor always exists, so that every fit has a result.
    safe = loc.copy()
    safe[-2] = high[-2]
    is_warm, is_safe, is_loc = np.zeros((3, draws, starts, 1), bool)
    is_warm[0, 0], is_safe[0, -1], is_loc[-1, -1] = True, True, True
    seeds = jnp.where(is_warm, warm, jnp.clip(loc + scale * offset, low, high))
    return jnp.where(is_loc, loc, jnp.where(is_safe, safe, seeds))


class _Prepared(NamedTuple):
    """What the trials are to the surrogate: points, which of them count, targets, and what the evidence needs."""

    x: Float[Array, "n d"]
    used: Bool[Array, "n"]
    target: Residuals
    data: Data


@single_kernel(static_argnums=(0,))
def _prepared(
    config: SurrogateConfig, obs: Observations, prior_mean: PriorMean | None, noise: Float[Array, ""] | None
) -> _Prepared:
    used = used_slots(obs)
    x = jnp.where(used[:, None], obs.x, 0.5)
    group = obs.group if config.has_groups else jnp.zeros_like(obs.group)
    target = residuals_of(
        obs,
        group=group,
        level=None if prior_mean is None else bowl(prior_mean, x),
        standardise=config.standardise,
        is_centred_apart=config.has_groups,
        kept=config.kept,
        noise=0.0 if noise is None else noise,
    )
    data = prepare(config, x=x, time=obs.time, group=group, used=used, noise=target.noise, residual=target.residual)
    return _Prepared(x, used, target, data)


def fit_among(
    config: SurrogateConfig,
    obs: Observations,
    candidates: Float[np.ndarray, "s p"],
    *,
    prior_mean: PriorMean | None = None,
) -> Posterior:
    """Conditions on the trials at those of some hyperparameters that explain them best, a posteriori.

    For few trials, of which a search would learn no more. Any number of them is fine, none included: then the
    posterior is the prior.

    Args:
      config: What is modelled; static.
      obs: The trials.
      candidates: The hyperparameters to choose from, as `kernels.flatten` gives them.
      prior_mean: What is believed before the first trial; flat by default.

    Cost:
      A factorisation for each of s candidates, O(s n^3) and O(s n^2) of memory, for n slots however many are used.
    """
    held = _prepared(config, obs, prior_mean, None)
    data, d, size = held.data, config.dims, held.used.size
    natural = jnp.exp(candidates * np.asarray([-2.0] * d + [2.0, 2.0, -1.0], np.float32))
    total = natural[:, :d] @ data.square[:d]
    shape = shape_kernel(config, total, data.lag, variance=natural[:, d], time_rate=natural[:, d + 2])
    joint = data.pair * shape.reshape(-1, size, size) + data.fixed
    joint += natural[:, d + 1, None, None] * data.used.reshape(size, size)
    factor, whiteners = jax.vmap(_factorised)(joint)
    white, (loc, scale) = whiteners @ data.residual, hyperprior(config)
    squares = jnp.sum(jnp.square(white), axis=1) + np.sum(np.square((candidates - loc) / scale), axis=1)
    values = 0.5 * squares + jnp.sum(jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)), axis=1)
    # Without a factor in float32 there is no value.
    best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    theta, value, whitener = (
        jax.lax.dynamic_index_in_dim(part, best, keepdims=False)
        for part in (jnp.asarray(candidates), values, whiteners)
    )
    return _posterior(obs, held, unflatten(config, theta), prior_mean, value, whitener)


@sequential_vmap()
def _factorised(joint: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """The Cholesky factor of a covariance, and its inverse."""
    factor = jax.lax.linalg.cholesky(joint, symmetrize_input=False)
    identity = jnp.asarray(np.eye(joint.shape[0], dtype=np.float32))
    return factor, jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


def _posterior(
    obs: Observations,
    held: _Prepared,
    hyper: Hyper,
    prior_mean: PriorMean | None,
    value: Float[Array, ""],
    whitener: Float[Array, "n n"],
) -> Posterior:
    return Posterior(
        hyper=hyper,
        x=held.x,
        time=obs.time,
        used=held.used,
        whitener=whitener,
        white=whitener @ held.target.residual,
        location=held.target.location,
        scale=held.target.scale,
        prior_mean=prior_mean,
        evidence=-value,
    )


def fit(
    config: SurrogateConfig,
    obs: Observations,
    *,
    start: Hyper,
    key: PRNGKeyArray,
    noise: Float[Array, ""] | None = None,
) -> Posterior:
    """Fits the hyperparameters to the trials by maximum a posteriori and conditions on the trials.

    Any number of observations is fine, none included: then the posterior is the prior.

    Args:
      config: What is modelled; static.
      obs: The trials.
      start: Warm start, usually the last posterior's ``hyper``.
      key: For the starting points drawn from the prior.
      noise: With ``standardise``, the `noise_deviation` of the last posterior; by default scores carry none.

    Returns:
      The posterior at the best hyperparameters found.

    Cost:
      ``fit_starts * (3 + fit_steps)`` factorisations, O(n^3) each, for n slots however many are used.
    """
    held = _prepared(config, obs, None, noise)
    loc, scale = hyperprior(config)
    low, high = loc - _REACH * scale, loc + _REACH * scale
    seeds = _seeds(config, flatten(start), key, low, high)
    search = {"low": low, "high": high, "scale": scale, "steps": config.fit_steps}
    shape = (config.fit_starts, held.used.size, held.used.size)
    thetas, values, whiteners = minimise(
        lambda theta: evidence_of(config, held.data, theta), seeds, extra=shape, **search
    )
    best = jnp.argmin(values)
    theta, value, whitener = (
        jax.lax.dynamic_index_in_dim(part, best, keepdims=False) for part in (thetas, values, whiteners)
    )
    return _posterior(obs, held, unflatten(config, theta), None, value, whitener)


def noise_deviation(posterior: Posterior) -> Float[Array, ""]:
    """Standard deviation of the scores' noise that was learnt, in their unit."""
    return jnp.exp(posterior.hyper.noise) * posterior.scale


def covariance(
    config: SurrogateConfig,
    posterior: Posterior,
    x: Float[Array, "m d"],
    z: Float[Array, "k d"],
    *,
    lag: Float[Array, "m k"] | float = 0.0,
) -> tuple[Float[Array, "m k"], Float[Array, "m k"]]:
    """Prior covariance of ``f`` between two sets of points ``lag`` apart in time, in the surrogate's unit.

    Returns:
      The covariance, and what times ``(x - z) / lengthscale^2`` is its slope over each ``x`` with an order.
    """
    shape = (x.shape[0], z.shape[0])
    lag = jnp.broadcast_to(jnp.abs(jnp.asarray(lag, jnp.float32)), shape).reshape(-1)
    hyper = posterior.hyper
    total = jnp.exp(-2.0 * hyper.lengthscale) @ square(config, x, z).reshape(config.dims, -1)
    variance, time_rate = jnp.exp(2.0 * hyper.signal), jnp.exp(-hyper.time_lengthscale)
    prior = shape_kernel(config, total, lag, variance=variance, time_rate=time_rate)
    slope = 2.0 * prior * shape_slope(total)
    level = 0.0 if config.has_groups else INTERCEPT**2
    return prior.reshape(shape) + level, slope.reshape(shape)


def prior_variance(config: SurrogateConfig, posterior: Posterior) -> Float[Array, ""]:
    """Prior variance of ``f`` at any point, in the surrogate's unit."""
    level = 0.0 if config.has_groups else INTERCEPT**2
    return jnp.exp(2.0 * posterior.hyper.signal) + level


def predict(
    config: SurrogateConfig,
    posterior: Posterior,
    x: Float[Array, "m d"],
    *,
    time: Float[Array, "..."] | float = 0.0,
) -> tuple[Float[Array, "m"], Float[Array, "m m"]]:
    """Joint posterior of the shape ``f`` (with the prior mean) at several points, without noise.

    With groups, the intercept of the group is left out: only differences between points mean something.

    Args:
      config: As given to `fit`.
      posterior: What `fit` returned.
      x: Snapped points of the unit cube.
      time: When, for all or for each of the points.

    Returns:
      Mean, in the unit of the scores, and covariance, in its square. With ``standardise`` that unit is true of the
      better half of the scores; far above their median predictions are compressed as the scores were.

    Cost:
      O(n^2 m + n m^2).
    """
    size = x.shape[0]
    time = jnp.broadcast_to(jnp.asarray(time, jnp.float32), (size,))
    everything, times = jnp.concatenate([posterior.x, x]), jnp.concatenate([posterior.time, time])
    prior, _ = covariance(config, posterior, x, everything, lag=time[:, None] - times[None, :])
    cross = jnp.where(posterior.used[None, :], prior[:, :-size], 0.0)
    white = cross @ posterior.whitener.T
    joint = prior[:, -size:] - white @ white.T
    floor = 1e-7 * prior_variance(config, posterior)
    joint += jnp.diag(jnp.maximum(floor - jnp.diagonal(joint), 0.0))
    mean = white @ posterior.white
    if posterior.prior_mean is not None:
        mean += bowl(posterior.prior_mean, x) / posterior.scale
    return posterior.location + posterior.scale * mean, jnp.square(posterior.scale) * joint
