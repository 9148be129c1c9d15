"""What a round's scores say about the rates: scores in a unit of their own, and the surrogate's prior mean."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _observations, _surrogate, _sweep
from ._policy import Directions, Policy
from ._state import TunerState
from ._targets import group_median

# The posterior of the centre is computed on a grid of offsets, in decades, under Student's t of few degrees of freedom.
_CENTER_REACH, _CENTER_GRID, _CENTER_DEGREES = 1.5, 61, 3.0

# A fork that lost more than this many times what the best one gained is as bad as any.
_WORST_SHARE = 4.0


def normalised(obs: _observations.Observations, *, resolution: Float[Array, "n"] | float) -> _observations.Observations:
    """Scores as logarithms of how far they are from the best of their group, in shares of what the best one gained.

    Raw scores are differences to the group's reference, so the best one, negated, is the gain over the state they all
    started from. Where there was none, the spread of the group stands in. Shortfalls well below ``resolution`` of the
    gain count in proportion, larger ones by their logarithm: 0 is the best fork, 1 one that gained nothing. Adding a
    constant to the loss changes nothing, nor does scaling it.
    """
    usable = _observations.mask(obs) & ~obs.failed
    same = (obs.group[:, None] == obs.group[None, :]) & usable[None, :]
    best = jnp.argmin(jnp.where(same, obs.y[None, :], jnp.inf), axis=1)
    lowest = jnp.where(same.any(axis=1), obs.y[best], 0.0)
    excess = obs.y - lowest
    members, ones = same.astype(jnp.float32), np.ones(excess.size, np.float32)
    mean_excess = members @ jnp.where(usable, excess, 0.0) / jnp.maximum(members @ ones, 1.0)
    scale = jnp.maximum(jnp.maximum(-lowest, 2.0 * mean_excess), 1e-12)
    share = jnp.clip(excess / scale, 0.0, _WORST_SHARE)
    return obs._replace(y=jnp.where(usable, jnp.log1p(share / resolution) / jnp.log1p(1.0 / resolution), 0.0))


def prior_after_sweep(policy: Policy, space_of: Directions, ts: TunerState) -> _surrogate.PriorMean:
    """The rates' bowl about where the sweep that just ended says the best is; the others' as before."""
    middle, end, trust = _sweep.read(ts.sweep, ts.segment_length)
    decades = jnp.asarray(space_of.decades)
    above, below = policy.sweep_offset / decades, policy.end_offset / decades
    center = jnp.clip(trust * (middle + above) + (1.0 - trust) * (end - below), 0.0, 1.0)
    # So near the upper bound that the first round would not look between, the bound itself is tried.
    center = jnp.where(center > 1.0 - 0.5 * policy.spread_decades / decades, 1.0, center)
    curvature = policy.sweep_curvature * jnp.asarray(space_of.decades) ** 2
    return _surrogate.PriorMean(
        center=jnp.where(space_of.is_rate, center, ts.prior.center),
        curvature=jnp.where(space_of.is_rate, curvature, ts.prior.curvature),
    )


def recentred(
    policy: Policy, space_of: Directions, obs: _observations.Observations, prior: _surrogate.PriorMean
) -> _surrogate.PriorMean:
    """Moves the centre of the prior mean to where the scores say it is, one rate at a time.

    Scores rise on both sides of the best rate much alike whatever is trained, so forks far from it tell where it is,
    and better than those near it, which noise ranks. Taken is the mean of the centre's posterior under a heavy-tailed
    error, about what the sweep said.

    Cost: O(dims * grid * capacity).
    """
    usable = _observations.mask(obs) & ~obs.failed
    same = (obs.group[:, None] == obs.group[None, :]) & usable[None, :]
    ones = np.ones(obs.y.size, np.float32)
    offsets = jnp.linspace(-_CENTER_REACH, _CENTER_REACH, _CENTER_GRID)

    def error(residual: Array) -> Array:
        return jnp.square(residual / policy.center_noise) / _CENTER_DEGREES

    def centre(axis: Array, decades: Array) -> Array:
        def log_posterior(offset: Array) -> Array:
            mean = prior._replace(center=prior.center + axis * offset / decades)
            residual = obs.y - jnp.minimum(_surrogate.bowl(mean, obs.x), 1.0)
            # The group's intercept: a mean of which scores far from the median are no part.
            trust = same / (1.0 + error(residual - group_median(residual, same))[None, :])
            residual -= trust @ residual / jnp.maximum(trust @ ones, 1e-6)
            likelihood = -0.5 * (_CENTER_DEGREES + 1.0) * (jnp.where(usable, jnp.log1p(error(residual)), 0.0) @ ones)
            return likelihood - 0.5 * jnp.square(offset / policy.center_decades)

        weight = jax.nn.softmax(jax.vmap(log_posterior)(offsets))
        return jnp.sum(weight * offsets) / decades

    shift = jax.vmap(centre)(jnp.eye(len(space_of.decades)), jnp.asarray(space_of.decades))
    is_known = space_of.is_rate & (prior.curvature > 0)
    return prior._replace(center=jnp.where(is_known, jnp.clip(prior.center + shift, 0.0, 1.0), prior.center))


def first_prior(policy: Policy, space_of: Directions, incumbent: Float[Array, "d"]) -> _surrogate.PriorMean:
    """What is believed before the run: nothing of the fast hyperparameters, moderate values of the slow ones."""
    return _surrogate.PriorMean(
        center=jnp.where(space_of.is_slow, policy.slow_center, incumbent),
        curvature=jnp.where(space_of.is_slow, policy.slow_curvature, 0.0).astype(jnp.float32),
    )
