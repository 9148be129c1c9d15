"""From scores to what the surrogate is fitted to."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._observations import Observations
from ._observations import mask as used_slots


def _masked_median(values: Float[Array, "n"], member: Bool[Array, "n"]) -> Float[Array, ""]:
    """Lower median of the members, 0 if there are none, by counting: a sort costs more to compile."""
    order = jnp.arange(values.shape[0])
    before = (values[None, :] < values[:, None]) | (
        (values[None, :] == values[:, None]) & (order[None] < order[:, None])
    )
    rank = jnp.sum(before & member[None, :], axis=1)
    middle = (jnp.sum(member) - 1) // 2
    return jnp.sum(jnp.where(member & (rank == middle), values, 0.0))


def _compress(t: Float[Array, "n"], limit: float) -> Float[Array, "n"]:
    """The identity within +-limit, logarithmic beyond."""
    excess = jnp.maximum(jnp.abs(t) - limit, 0.0)
    return jnp.clip(t, -limit, limit) + jnp.sign(t) * jnp.log1p(excess)


class Targets(NamedTuple):
    """Residuals for the surrogate, in its own unit, and the way back: ``score = location + scale * value``."""

    residual: Float[Array, "n"]
    noise: Float[Array, "n"]
    location: Float[Array, ""]
    scale: Float[Array, ""]


def targets(
    obs: Observations,
    *,
    group: Int[Array, "n"],
    level: Float[Array, "n"],
    standardise: bool,
    is_centred_apart: bool,
    outlier: float,
    failure_margin: float,
) -> Targets:
    """Centres the scores, compresses outliers, and places failures a margin above the worst score of their group.

    Neither a failure nor an explosion can bend a fit to the result.

    Args:
      obs: The trials.
      group: Trials that share an intercept.
      level: Prior mean at the trials, in the unit of the score.
      standardise: Whether to scale the residuals to unit variance.
      is_centred_apart: Whether each group is centred by its own mean, which leaves ``location`` at 0.
      outlier: Distance from the median, in robust standard deviations (from 0, in the unit of the score, unless
        ``standardise``), beyond which scores are compressed logarithmically.
      failure_margin: How much worse than the worst a failure counts, in the surrogate's unit.

    Cost:
      O(n^2) comparisons.
    """
    used = used_slots(obs)
    good = used & ~obs.failed
    count = jnp.maximum(jnp.sum(good), 1).astype(jnp.float32)
    location, scale = jnp.float32(0.0), jnp.float32(1.0)
    if standardise:
        location = _masked_median(obs.y, good)
        deviation = jnp.abs(obs.y - location)
        spread = 1.4826 * _masked_median(deviation, good)
        spread = jnp.where(spread > 0.0, spread, jnp.sum(jnp.where(good, deviation / count, 0.0)))
        scale = jnp.where(spread > 1e-6 * jnp.abs(location), spread, 1.0)
    centred = _compress((obs.y - location) / scale, outlier) - level / scale
    same = (group[:, None] == group[None, :]) & good[None, :]
    members = jnp.maximum(jnp.sum(same, axis=1), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(same, centred[None, :], 0.0), axis=1) / members
    centred = jnp.where(good, centred - mean, 0.0)
    if not is_centred_apart:
        location += scale * mean[0]
    if standardise:
        unit = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
        unit = jnp.where(unit > 1e-6, unit, 1.0)
        centred, scale = centred / unit, scale * unit
    worst = jnp.max(jnp.where(same, centred[None, :], 0.0), axis=1)
    residual = jnp.where(obs.failed, worst + failure_margin, centred)
    # Beyond this a trial weighs nothing, and larger numbers would cost digits.
    noise = jnp.minimum(obs.noise / jnp.square(scale), 1e4)
    return Targets(jnp.where(used, residual, 0.0), jnp.where(used, noise, 0.0), location, scale)
