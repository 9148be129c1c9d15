"""From the scores of trials to the residuals that the surrogate is fitted to: centred, scaled, outliers tamed."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .trials import Observations
from .trials import mask as used_slots

# Distance from the median of the group, in the surrogate's unit, beyond which scores that are not tamed are compressed
# logarithmically; and how much worse than the worst of its group a failed trial counts.
_OUTLIER, _FAILURE_MARGIN = 4.0, 0.5
# How far above the median scores keep their values, in standard deviations of the noise.
_NOISE_KEPT = 4.0


class Residuals(NamedTuple):
    """What the surrogate is fitted to, in its own unit, and the way back: ``score = location + scale * value``."""

    residual: Float[Array, "n"]
    noise: Float[Array, "n"]
    location: Float[Array, ""]
    scale: Float[Array, ""]


def _compress(t: Float[Array, "n"], limit: float) -> Float[Array, "n"]:
    """The identity within +-limit, logarithmic beyond."""
    excess = jnp.maximum(jnp.abs(t) - limit, 0.0)
    return jnp.clip(t, -limit, limit) + jnp.sign(t) * jnp.log1p(excess)


def tamed(
    y: Float[Array, "n"], good: Bool[Array, "n"], *, least: float, noise: Float[Array, ""]
) -> tuple[Float[Array, "n"], Float[Array, ""], Float[Array, ""]]:
    """Keeps the better half of the scores and what noise may have carried above it; worse ones count logarithmically.

    Where the minimum lies depends on the better half; how bad the bad points are matters less, and on the raw scale
    they would rule the fit. But a better half whose members differ by noise alone says nothing of the shape, which
    then must be read from the scores above it.

    Args:
      y: Scores.
      good: Which of them count.
      least: How far above the median scores keep their values at least, in standard deviations of the better half.
      noise: Standard deviation of the scores' noise as far as it is known, in their unit; four of them are kept.

    Returns:
      Scores about the median in standard deviations of the better half, with the location and scale that lead back
      there: ``y = location + scale * value`` holds as far as scores keep their values.

    Source:
      The half-rank warping of Google Vizier's Gaussian process bandit (Song et al., 2024). Theirs replaces the worse
      half by its ranks, however noisy the scores are.
    """
    ones = np.ones(y.size, np.float32)
    members = good.astype(jnp.float32)
    count = jnp.maximum(members @ ones, 1.0)
    below = jnp.where(y[None, :] < y[:, None], 1.0, jnp.where(y[None, :] == y[:, None], 0.5, 0.0))
    is_better_half = good & ((below @ members) / count <= 0.5)
    # The largest score of the better half stands for the median; with all scores equal that is the score itself.
    median = jnp.max(jnp.where(is_better_half, y, -jnp.inf))
    median = jnp.where(median > -jnp.inf, median, 0.0)
    spread = jnp.where(is_better_half, jnp.stack([jnp.square(y - median), ones]), 0.0) @ ones
    scale = jnp.sqrt(spread[0] / jnp.maximum(spread[1], 1.0))
    # A better half without spread has no unit of its own; then the logarithms set it.
    scale = jnp.where(scale > 1e-6 * jnp.abs(median), scale, jnp.maximum(1e-6 * jnp.abs(median), 1e-12))
    value = jnp.minimum((y - median) / scale, 1e30)
    limit = jnp.clip(_NOISE_KEPT * noise / scale, least, 1e6)
    return jnp.minimum(value, limit) + limit * jnp.log(jnp.maximum(value / limit, 1.0)), median, scale


def group_median(y: Float[Array, "n"], same: Bool[Array, "m n"]) -> Float[Array, "m"]:
    """Lower median of the members of each trial's group, 0 where there are none; ``same[i, j]``: j counts for i."""
    order = np.arange(y.size)
    before = (y[None, :] < y[:, None]) | ((y[None, :] == y[:, None]) & (order[None, :] < order[:, None]))
    ones = np.ones(y.size, np.float32)
    rank = jnp.where(before & same, 1.0, 0.0) @ ones
    middle = jnp.floor(0.5 * (same.astype(jnp.float32) @ ones - 1.0))
    return jnp.where(same & (rank[None, :] == middle[:, None]), y[None, :], 0.0) @ ones


def _row_max(rows: Float[Array, "m n"]) -> Float[Array, "m"]:
    # A maximum by itself XLA may leave to a library.
    is_largest = jnp.argmax(rows, axis=1)[:, None] == np.arange(rows.shape[1])
    return jnp.where(is_largest, rows, 0.0) @ np.ones(rows.shape[1], np.float32)


def residuals_of(
    obs: Observations,
    *,
    group: Int[Array, "n"],
    level: Float[Array, "n"] | None,
    standardise: bool,
    is_centred_apart: bool,
    kept: float = 0.2,
    noise: Float[Array, ""] | float = 0.0,
) -> Residuals:
    """Centres the scores, compresses outliers, and places failures a margin above the worst score of their group.

    Neither a failure nor an explosion can bend a fit to the result.

    Args:
      obs: The trials.
      group: Trials that share an intercept.
      level: Prior mean at the trials, in the unit of the score; None is flat.
      standardise: Whether scores come in an arbitrary unit: then residuals are scaled to unit variance, and scores are
        `tamed` unless groups are centred apart: a median across groups would compare their intercepts.
      is_centred_apart: Whether each group is centred by its own mean, which leaves ``location`` at 0.
      kept: The ``least`` of `tamed`.
      noise: Standard deviation of the scores' noise as far as it is known, besides that of the trials, for `tamed`.

    Cost:
      O(n^2) comparisons.
    """
    used = used_slots(obs)
    good = used & ~obs.failed
    ones = np.ones(good.size, np.float32)
    count = jnp.maximum(good.astype(jnp.float32) @ ones, 1.0)
    # Without centring apart all trials are one group, and what is a row per trial below is a single number.
    same = (group[:, None] == group[None, :]) & good[None, :] if is_centred_apart else good[None, :]
    location, scale = jnp.float32(0.0), jnp.float32(1.0)
    if standardise and not is_centred_apart:
        # One trial that is known to be worthless must not pass for all.
        typical = group_median(obs.noise, good[None, :])[0]
        spread = jnp.sqrt(jnp.square(noise) + typical)
        centred, location, scale = tamed(obs.y, good, least=kept, noise=spread)
    elif standardise:
        centred = jnp.where(good, obs.y - group_median(obs.y, same), 0.0)
        # The better half sets the unit, however bad the worst is.
        is_better_half = good & (centred < 0.0)
        spread = jnp.where(is_better_half, jnp.stack([jnp.square(centred), ones]), 0.0) @ ones
        scale = jnp.sqrt(spread[0] / jnp.maximum(spread[1], 1.0))
        # Without a better half the others set it; without any difference any unit does.
        scale = jnp.where(scale > 0.0, scale, jnp.max(centred))
        scale = jnp.where(scale > 1e-6 * jnp.max(jnp.abs(jnp.where(good, obs.y, 0.0))), scale, 1.0)
        centred = _compress(centred / scale, _OUTLIER)
    else:
        median = group_median(obs.y, same)
        centred = _compress(obs.y - median, _OUTLIER)
        if not is_centred_apart:
            location = median[0]
    if level is not None:
        centred -= level / scale
    members = same.astype(jnp.float32)
    mean = (members @ jnp.where(good, centred, 0.0)) / jnp.maximum(members @ ones, 1.0)
    centred = jnp.where(good, centred - mean, 0.0)
    if not is_centred_apart:
        location += scale * mean[0]
    if standardise:
        unit = jnp.sqrt((jnp.square(centred) @ ones) / count)
        unit = jnp.where(unit > 1e-6, unit, 1.0)
        centred, scale = centred / unit, scale * unit
    worst = _row_max(jnp.where(same, centred[None, :], 0.0))
    residual = jnp.where(obs.failed, worst + _FAILURE_MARGIN, centred)
    # Beyond this a trial weighs nothing, and larger numbers would cost digits.
    known = jnp.minimum(obs.noise / jnp.square(scale), 1e4)
    return Residuals(jnp.where(used, residual, 0.0), jnp.where(used, known, 0.0), location, scale)
