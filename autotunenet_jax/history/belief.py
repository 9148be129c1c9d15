"""What the surrogate believed of a fork when it was compared, in the unit of the scores."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..bayesopt import trials
from ..controller import fork_surrogate
from ..controller.plan import MAX_FORKS
from .posterior import relative, unit_of_scores

DEVIATIONS = 2.0
"""Standard deviations to either side that `believed` tells."""


def rival_of(row: Mapping[str, Any], place: int) -> int:
    """The fork of a round that was kept when another ended; -1 for none."""
    rival = -1
    for number, fork in enumerate(row["forks"][:place]):
        if fork["scores"] and (rival < 0 or fork["p_better"] > 0.5):
            rival = number
    return rival


def believed(row: Mapping[str, Any], place: int) -> tuple[float, float] | None:
    """The least and the largest score that a fork was believed to have, two deviations to either side.

    The surrogate knows differences alone, so they are put at the score of the fork that was kept till then. None
    where there was none, where a fork failed, and where it lost by more than the surrogate tells apart.

    Args:
      row: Record of the round.
      place: Of the fork, from 0.
    """
    fork, rival = row["forks"][place], rival_of(row, place)
    lead, deviation = fork.get("lead"), fork.get("deviation")
    is_scored = fork["scores"] and fork["status"] != "failed" and row.get("reference") is not None
    if rival < 0 or not is_scored or lead is None or deviation is None:
        return None
    seen = row["forks"][: place + 1]
    scores = np.full(MAX_FORKS, np.nan, np.float32)
    scores[: len(seen)] = [relative(row, fork) for fork in seen]
    excess, unit = (np.asarray(part, np.float64) for part in _excess(scores))
    share, unit = excess / unit, unit[place] * unit_of_scores(row)
    if share[place] >= fork_surrogate.WORST:
        return None
    resolution = float(fork_surrogate.resolution_of(jnp.asarray(row["kind"] == "slow")))
    scale = math.log1p(1.0 / resolution)
    middle = math.log1p(min(share[rival], fork_surrogate.WORST) / resolution) / scale - lead
    ends = np.array([middle - DEVIATIONS * deviation, middle + DEVIATIONS * deviation])
    best = fork["scores"][0] - share[place] * unit
    low, high = best + unit * resolution * np.sign(ends) * np.expm1(np.abs(ends) * scale)
    return float(low), float(high)


@jax.jit
def _excess(scores: Float[Array, "forks"]) -> tuple[Array, Array]:
    obs = trials.empty(scores.size, 1)
    failed = ~jnp.isfinite(scores)
    obs = obs._replace(y=jnp.where(failed, 0.0, scores), failed=failed, count=jnp.int32(scores.size))
    return fork_surrogate.excess_of(obs)
