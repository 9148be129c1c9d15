"""The surrogate over the scores of all forks: which fork of a round is better, and what another is expected to gain.

Scores are compared within their round only, in units of what its best fork gained; rounds share the surrogate's shape,
which drifts with time.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..bayesopt import acquisition, kernels, surrogate, trials
from ..bayesopt.quasi_random import normal_table
from ..bayesopt.residuals import group_median
from ..compiler.single_kernel import single_kernel
from ..space.search_space import SearchSpace
from .plan import SLOW
from .roles import Roles, roles_of
from .state import Knowledge, TunerState

# Shortfall, as a share of the gain of a round's best fork, below which scores count in proportion and above which by
# their logarithm; in slow rounds small differences say little of what the rest of the run brings.
_RESOLUTION, _SLOW_RESOLUTION = 0.05, 1.0
# A fork that lost more than this many times what the best one gained is as bad as any.
WORST = 4.0

# Differences below this share of where a round started are rounding.
_ROUNDING = 1e-6

# Prior of the shape; the signal and the curvature of the rates were chosen on the bank.
_RATE_LENGTHSCALE_DECADES, _OTHER_LENGTHSCALE, _LENGTHSCALE_SCALE = 0.6, 0.7, 0.4
_SIGNAL, _NOISE, _PRIOR_SCALE = 0.25, 0.04, 0.6
_TIME_LENGTHSCALE, _TIME_SCALE = 1.5, 0.4
# Hyperparameters to choose from, spread over that prior.
_CANDIDATES = 32
# Prior mean: a bowl about the first fork of a round in the rates, and about the middle in slow hyperparameters.
_RATE_CURVATURE = 0.15
_SLOW_CENTRE, _SLOW_CURVATURE = 0.5, 0.6


def config_of(space: SearchSpace) -> kernels.SurrogateConfig:
    """What the surrogate models."""
    roles = roles_of(space)
    lengthscales = np.where(roles.is_rate, _RATE_LENGTHSCALE_DECADES / roles.decades, _OTHER_LENGTHSCALE)
    return kernels.SurrogateConfig(
        dims=space.dims,
        is_categorical=tuple(bool(flag) for flag in space.is_categorical),
        has_time=True,
        has_groups=True,
        standardise=False,
        lengthscale_loc=tuple(float(math.log(value)) for value in lengthscales),
        lengthscale_scale=_LENGTHSCALE_SCALE,
        signal_loc=math.log(_SIGNAL),
        signal_scale=_PRIOR_SCALE,
        noise_loc=math.log(_NOISE),
        noise_scale=_PRIOR_SCALE,
        time_loc=math.log(_TIME_LENGTHSCALE),
        time_scale=_TIME_SCALE,
    )


def prior_about(roles: Roles, u: Float[Array, "d"]) -> surrogate.PriorMean:
    """What is believed before a round that begins at ``u``."""
    curvature = np.where(roles.is_rate, _RATE_CURVATURE * roles.decades**2, 0.0)
    return surrogate.PriorMean(
        center=jnp.where(roles.is_slow, _SLOW_CENTRE, u),
        curvature=jnp.asarray(np.where(roles.is_slow, _SLOW_CURVATURE, curvature), jnp.float32),
    )


def no_knowledge(space: SearchSpace, capacity: int, u: Float[Array, "d"]) -> Knowledge:
    """Before the first fork of a run that starts at ``u``."""
    return Knowledge(
        observations=trials.empty(capacity, space.dims),
        prior=prior_about(roles_of(space), u),
    )


def time_of(data_step: Array) -> Float[Array, ""]:
    """Time along the branch that survives, in logarithms: early steps change the objective most."""
    return jnp.log1p(data_step / 10.0)


def shortfalls(obs: trials.Observations, *, resolution: Float[Array, "n"] | float) -> trials.Observations:
    """Scores as logarithms of how far they are from the best of their round, in shares of what the best one gained.

    Raw scores are differences to the round's reference in units of it, so the best one, negated, is the gain over the
    state they all started from, or the spread of the round where that is larger. 0 is the best fork, 1 one that gained
    nothing. Adding a constant to the loss changes nothing, nor does scaling it.
    """
    usable = trials.mask(obs) & ~obs.failed
    excess, unit = excess_of(obs)
    share = jnp.clip(excess / unit, 0.0, WORST)
    return obs._replace(y=jnp.where(usable, jnp.log1p(share / resolution) / jnp.log1p(1.0 / resolution), 0.0))


def excess_of(obs: trials.Observations) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """How far each score is from the best of its round, and what the best one gained, the unit of that."""
    usable = trials.mask(obs) & ~obs.failed
    same = (obs.group[:, None] == obs.group[None, :]) & usable[None, :]
    best = jnp.argmin(jnp.where(same, obs.y[None, :], jnp.inf), axis=1)
    lowest = jnp.where(same.any(axis=1), obs.y[best], 0.0)
    excess = obs.y - lowest
    members, ones = same.astype(jnp.float32), np.ones(excess.size, np.float32)
    mean_excess = members @ jnp.where(usable, excess, 0.0) / jnp.maximum(members @ ones, 1.0)
    # A fork that blew up says nothing of the unit: where something was gained, the median stands for the spread.
    gained = jnp.maximum(-lowest, group_median(excess, same))
    return excess, jnp.maximum(jnp.where(lowest < 0.0, gained, 2.0 * mean_excess), _ROUNDING)


class Judgement(NamedTuple):
    """The joint posterior of a round's forks, then of the candidates for the next one.

    Attributes:
      mean: Posterior mean of the shortfall.
      covariance: Its covariance.
    """

    mean: Float[Array, "m"]
    covariance: Float[Array, "m m"]


def resolution_of(is_slow: Bool[Array, "n"]) -> Float[Array, "n"]:
    """The resolution at which trials count, by whether their round was of slow hyperparameters."""
    return jnp.where(is_slow, _SLOW_RESOLUTION, _RESOLUTION)


@single_kernel()
def _evidence(ts: TunerState) -> trials.Observations:
    obs = ts.knowledge.observations
    is_slow = ts.plan.kind[jnp.clip(obs.group, 0, ts.plan.kind.size - 1)] == SLOW
    return shortfalls(obs, resolution=resolution_of(is_slow))


def judge(space: SearchSpace, ts: TunerState, x: Float[Array, "m d"]) -> Judgement:
    """What all rounds so far say about some points now.

    Cost: one fit and one posterior; O(capacity^3 + m capacity^2), whatever the length of the run.
    """
    config, knowledge = config_of(space), ts.knowledge
    posterior = fitted(config, _evidence(ts), knowledge.prior)
    return Judgement(*surrogate.predict(config, posterior, x, time=time_of(ts.data_step)))


def fitted(
    config: kernels.SurrogateConfig, evidence: trials.Observations, prior: surrogate.PriorMean
) -> surrogate.Posterior:
    """The surrogate of some shortfalls: a function of them alone, whatever was fitted before."""
    loc, scale = kernels.hyperprior(config)
    candidates = loc + scale * np.asarray(normal_table(_CANDIDATES, loc.size))
    candidates[0] = loc
    return surrogate.fit_among(config, evidence, candidates, prior_mean=prior)


def probability_better(judged: Judgement, challenger: Array, holder: Array) -> Float[Array, ""]:
    """Probability that one point is better than another."""
    gain, deviation = lead(judged, challenger, holder)
    return acquisition.normal_cdf(gain / deviation)


def expected_improvement(judged: Judgement, best: Array) -> Float[Array, "m"]:
    """Expected improvement of every point over point ``best``, from their joint posterior.

    Source: Jones, Schonlau and Welch (1998), eq. 15, with the best point's own uncertainty left in.
    """
    gain, deviation = lead(judged, slice(None), best)
    return deviation * acquisition.expected_excess(gain / deviation)


def lead(judged: Judgement, challenger: Array | slice, holder: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of how much better one point, or each of several, is than another."""
    mean, covariance = judged.mean, judged.covariance
    variance = jnp.diagonal(covariance)[challenger] + covariance[holder, holder] - 2.0 * covariance[holder, challenger]
    return mean[holder] - mean[challenger], jnp.sqrt(jnp.maximum(variance, 1e-12))
