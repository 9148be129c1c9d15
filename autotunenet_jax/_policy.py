"""The constants of the decisions, and what they need to know of a search space."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from ._space import Choice, SearchSpace
from ._space import Float as FloatParameter
from ._space import Int as IntParameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Constants of the decisions; scores are in units of the progress that the best fork of a round made.

    Args:
      fast_resolution: Shortfall, as a share of the gain of a round's best fork, below which scores of fast rounds count
        in proportion.
      slow_resolution: The same in slow rounds, where small differences say little of what the rest of the run brings.
      drop_below: A fork is dropped at its early score when its probability of beating the kept one is below this.
      move: Probability of being better that a fork needs to replace the kept one.
      price: Least expected improvement worth another fast fork.
      slow_price: The same for a slow fork.
      sweep_offset: How far above the middle of the sweep's fall the best rate is expected, in decades.
      end_offset: How far below the end of the sweep, where its fall cannot be told from noise.
      sweep_curvature: Expected loss of score at one decade from there, doubled.
      center_decades: Standard deviation of the best rate about where the sweep says it is.
      center_noise: Standard deviation of a score about the prior mean's shape.
      spread_decades: How far beyond its outermost forks the first round looks for worse ones.
      clearly_worse: Shortfall, as a share of the gain of the best fork, from which a fork is worse beyond doubt.
      stay: What a decade of rate away from the first fork counts where the best one is looked for, as a share of the
        gain of the best fork: forks that hardly differ say nothing.
      tilt: What a decade of rate counts where one is chosen: one too high costs the rest of a run more than one too low
        does, and shows later.
      reach_decades: How far from those of the best fork rates are chosen.
      starts_afresh: Whether training begins again, at the chosen rate, from where the first round began. Otherwise it
        goes on from the best fork, whose first steps may have done lasting harm.
      slow_center: Where, in the unit cube, slow hyperparameters are expected to be best before anything is known.
      slow_curvature: Expected loss of score at distance one from there, doubled.
      plausible_decades: A starting rate this close to the expected best is tried first.
      blur_decades: How far the best rate of the whole run may lie from that of a fork, to either side: a rate is chosen
        for the scores around it, so that it keeps its distance from where training breaks.
      later_reach: Half-width, in the unit cube, of the trust region of later rounds.
      raise_gain: How much better the fork of a higher rate has to be for that rate to be raised, as a share of what it
        gained.
      lost_share: A fork of the round that raises rates has failed, even as the best one, if it loses this share of all
        that training has gained.
      held_share: Share of the budget after which the decay would begin if it were as steep as it is after a wait.
    """

    fast_resolution: float = 0.05
    slow_resolution: float = 1.0
    drop_below: float = 0.4
    move: float = 0.5
    price: float = 0.03
    slow_price: float = 0.01
    sweep_offset: float = 0.3
    end_offset: float = 0.8
    sweep_curvature: float = 2.4
    center_decades: float = 0.6
    center_noise: float = 0.2
    spread_decades: float = 0.5
    clearly_worse: float = 0.05
    stay: float = 0.02
    tilt: float = 0.15
    reach_decades: float = 0.5
    starts_afresh: bool = True
    slow_center: float = 0.5
    slow_curvature: float = 0.6
    plausible_decades: float = 0.3
    blur_decades: float = 0.3
    later_reach: float = 0.3
    raise_gain: float = 0.1
    lost_share: float = 0.2
    held_share: float = 0.6


class Directions(NamedTuple):
    """Constants of a search space, as arrays over its dimensions."""

    is_rate: np.ndarray
    is_slow: np.ndarray
    decades: np.ndarray


def directions(space: SearchSpace) -> Directions:
    """Which dimensions are rates or slow, and how many decades each spans (its whole range, when linear, counts 4)."""

    def span(p: FloatParameter | IntParameter | Choice) -> float:
        return math.log10(p.hi / p.lo) if not isinstance(p, Choice) and p.log else 4.0

    roles = space.roles
    return Directions(
        is_rate=np.array([role == "rate" for role in roles]),
        is_slow=np.array([role == "slow" for role in roles]),
        decades=np.array([span(p) for _, p in space.params], np.float32),
    )
