"""From scores to what the surrogate is fitted to."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

from ._observations import Observations
from ._observations import mask as used_slots


class Targets(NamedTuple):
    """Residuals for the surrogate, in its own unit, and the way back: ``score = location + scale * value``."""

    residual: Float[Array, "n"]
    noise: Float[Array, "n"]
    location: Float[Array, ""]
    scale: Float[Array, ""]


def _compress(t: Float[Array, "n"], limit: float) -> Float[Array, "n"]:
    """The identity within +-limit, logarithmic beyond."""
    excess = jnp.maximum(jnp.abs(t) - limit, 0.0)
    return jnp.clip(t, -limit, limit) + jnp.sign(t) * jnp.log1p(excess)


def half_rank(
    y: Float[Array, "n"], good: Bool[Array, "n"]
) -> tuple[Float[Array, "n"], Float[Array, ""], Float[Array, ""]]:
    """Keeps the better half of the scores and replaces the worse half by normal scores of their ranks.

    Where the minimum lies depends on the better half; how bad the bad points are does not matter, and on the raw scale
    they would rule the fit. Equal scores stay equal.

    Returns:
      Scores about the median in standard deviations of the better half, with the location and scale that lead back
      there: ``y = location + scale * value`` holds for the better half.

    Source:
      The half-rank warping of Google Vizier's Gaussian process bandit (Song et al., 2024), with mid-ranks for ties.
    """
    below = (y[None, :] < y[:, None]) & good[None, :]
    ties = (y[None, :] == y[:, None]) & good[None, :]
    count = jnp.maximum(jnp.sum(good, dtype=jnp.float32), 1.0)
    rank = jnp.sum(below, axis=1, dtype=jnp.float32) + 0.5 * jnp.sum(ties, axis=1, dtype=jnp.float32)
    quantile = rank / count
    is_better_half = good & (quantile <= 0.5)
    # The largest score of the better half stands for the median; with all scores equal that is the score itself.
    median = jnp.max(jnp.where(is_better_half, y, -jnp.inf))
    median = jnp.where(jnp.any(good), median, 0.0)
    members = jnp.maximum(jnp.sum(is_better_half, dtype=jnp.float32), 1.0)
    scale = jnp.sqrt(jnp.sum(jnp.where(is_better_half, jnp.square(y - median), 0.0)) / members)
    # A better half without spread has no unit of its own; then the ranks set it.
    scale = jnp.where(scale > 1e-6 * jnp.abs(median), scale, jnp.maximum(1e-6 * jnp.abs(median), 1e-12))
    normal = ndtri(jnp.clip(quantile, 0.5, 1.0 - 0.25 / count))
    return jnp.where(is_better_half, (y - median) / scale, normal), median, scale


def group_median(y: Float[Array, "n"], same: Bool[Array, "n n"]) -> Float[Array, "n"]:
    """Lower median of the members of each trial's group, 0 where there are none; ``same[i, j]``: j counts for i."""
    order = jnp.arange(y.size)
    before = (y[None, :] < y[:, None]) | ((y[None, :] == y[:, None]) & (order[None, :] < order[:, None]))
    rank = jnp.sum(before & same, axis=1)
    middle = (jnp.sum(same, axis=1) - 1) // 2
    return jnp.sum(jnp.where(same & (rank[None, :] == middle[:, None]), y[None, :], 0.0), axis=1)


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
      standardise: Whether scores come in an arbitrary unit: then residuals are scaled to unit variance, and `half_rank`
        tames the scores unless groups are centred apart; ranks across groups would compare their intercepts.
      is_centred_apart: Whether each group is centred by its own mean, which leaves ``location`` at 0.
      outlier: Distance from the median of the group, in the unit of the score, beyond which scores are compressed
        logarithmically unless ``standardise``.
      failure_margin: How much worse than the worst a failure counts, in the surrogate's unit.

    Cost:
      O(n^2) comparisons.
    """
    used = used_slots(obs)
    good = used & ~obs.failed
    same = (group[:, None] == group[None, :]) & good[None, :]
    count = jnp.maximum(jnp.sum(good), 1).astype(jnp.float32)
    location, scale = jnp.float32(0.0), jnp.float32(1.0)
    if standardise and not is_centred_apart:
        centred, location, scale = half_rank(obs.y, good)
    elif standardise:
        centred = jnp.where(good, obs.y - group_median(obs.y, same), 0.0)
        # The better half sets the unit, however bad the worst is.
        is_better_half = good & (centred < 0.0)
        members = jnp.maximum(jnp.sum(is_better_half, dtype=jnp.float32), 1.0)
        scale = jnp.sqrt(jnp.sum(jnp.where(is_better_half, jnp.square(centred), 0.0)) / members)
        # Without a better half the others set it; without any difference any unit does.
        scale = jnp.where(scale > 0.0, scale, jnp.max(centred))
        scale = jnp.where(scale > 1e-6 * jnp.max(jnp.abs(jnp.where(good, obs.y, 0.0))), scale, 1.0)
        centred = _compress(centred / scale, outlier)
    else:
        median = group_median(obs.y, same)
        centred = _compress(obs.y - median, outlier)
        if not is_centred_apart:
            location = median[0]
    centred -= level / scale
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
