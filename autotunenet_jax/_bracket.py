"""Where a round may look: the first one goes outward until its best fork lies between clearly worse ones."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._plan import LEAST_EXPLORING, MAX_FORKS, RAISE, SLOW
from ._policy import Directions, Policy
from ._state import FORK_FAILED, Round, TunerState


class Bracket(NamedTuple):
    """How the forks of a round lie about their best one; several rates are taken together.

    Attributes:
      is_open_below: No fork at lower rates is clearly worse than the best one, none lies farther below it than a rate
        may be chosen and a step beyond, and there is room below.
      is_open_above: The best one has the highest rates, the others are clearly worse or only one of them has run, and
        there is room above. Where a higher rate gains little, one still higher is not looked for.
      has_room: Whether there is room above the highest rates.
      best: The best fork.
      lowest: The one with the lowest rates, unit cube.
      highest: The one with the highest.
    """

    is_open_below: Bool[Array, ""]
    is_open_above: Bool[Array, ""]
    has_room: Bool[Array, ""]
    best: Int[Array, ""]
    lowest: Float[Array, "d"]
    highest: Float[Array, "d"]


def explores(ts: TunerState) -> Bool[Array, ""]:
    """Whether the round has to find the right decade: those do that open with a range sweep."""
    return ts.plan.sweep[ts.round.index] > 0


def gives_away(policy: Policy, ts: TunerState) -> Bool[Array, ""]:
    """Whether training begins again where the round began, so that its best fork is lost as well."""
    return explores(ts) & (ts.plan.forks[ts.round.index] >= LEAST_EXPLORING) & policy.starts_afresh


def is_run(held: Round) -> Bool[Array, "forks"]:
    """Which forks of the round have run."""
    return (jnp.arange(MAX_FORKS) <= held.fork) & (held.steps > 0)


def bracket(policy: Policy, space_of: Directions, held: Round) -> Bracket:
    """Which fork is the best, and which sides of it are open. Failed forks are worse than any other."""
    has_run = is_run(held)
    score = held.score[:, held.rung]
    is_good = has_run & jnp.isfinite(score) & (held.status != FORK_FAILED)
    score = jnp.where(is_good, score, jnp.inf)
    # Where nothing was gained, what the worst fork lost is the unit.
    lowest_score, worst = jnp.min(score), jnp.max(jnp.where(is_good, score, -jnp.inf))
    gain = jnp.maximum(held.reference - lowest_score, 0.5 * (worst - lowest_score))
    # Of forks that hardly differ, the one nearest to where the round began.
    rate = jnp.where(space_of.is_rate, held.x * space_of.decades, 0.0).sum(axis=1)
    score += jnp.where(is_good, policy.stay * gain * jnp.abs(rate - rate[0]), 0.0)
    best = jnp.argmin(score)
    is_worse = has_run & (score - score[best] > policy.clearly_worse * gain)
    is_other = has_run & (jnp.arange(MAX_FORKS) != best)
    lowest = held.x[jnp.argmin(jnp.where(has_run, rate, jnp.inf))]
    highest = held.x[jnp.argmax(jnp.where(has_run, rate, -jnp.inf))]
    room = 0.5 * policy.spread_decades / jnp.asarray(space_of.decades)
    is_highest = ~jnp.any(is_other & (rate > rate[best]))
    # Whatever is found there, it would not be chosen.
    is_far = (rate[best] - rate) > (policy.reach_decades + policy.spread_decades - 0.01) * jnp.sum(space_of.is_rate)
    leads = jnp.all(is_worse | ~is_other) | (jnp.sum(has_run) <= 2)
    has_room = jnp.any(space_of.is_rate & (highest <= 1.0 - room))
    return Bracket(
        is_open_below=~jnp.any((is_worse & (rate < rate[best])) | (has_run & is_far))
        & jnp.any(space_of.is_rate & (lowest >= room)),
        is_open_above=is_highest & leads & has_room,
        has_room=has_room,
        best=best,
        lowest=lowest,
        highest=highest,
    )


def box(
    policy: Policy, space_of: Directions, ts: TunerState, kind: Array, known: Bracket
) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
    """The corners of where the next fork may be.

    A round moves its own kind's dimensions; the others stay where its first fork has them. The first round steps
    outward on the open side, the lower one first, and between its forks once both are closed. Later ones stay about
    the incumbent.
    """
    active = jnp.where(kind == SLOW, space_of.is_slow, ~space_of.is_slow)
    knows_rate = space_of.is_rate & (ts.prior.curvature > 0)
    reach = jnp.where(knows_rate, policy.later_reach, 1.0)
    fixed = ts.round.x[0]
    lower, upper = jnp.maximum(ts.incumbent - reach, 0.0), jnp.minimum(ts.incumbent + reach, 1.0)

    step = policy.spread_decades / jnp.asarray(space_of.decades)
    # The second fork goes below the first and the third above, whatever they scored.
    goes_below = known.is_open_below & ((ts.round.fork != 1) | ~known.is_open_above)
    outward = jnp.where(goes_below, known.lowest - step, known.highest + step)
    # What is left beyond is not worth another step: the bound itself is tried.
    outward = jnp.where(outward < 0.5 * step, 0.0, jnp.where(outward > 1.0 - 0.5 * step, 1.0, outward))
    is_open = known.is_open_below | known.is_open_above
    first_lower = jnp.where(is_open, outward, known.lowest)
    first_upper = jnp.where(is_open, outward, known.highest)
    is_first = explores(ts) & knows_rate
    lower, upper = jnp.where(is_first, first_lower, lower), jnp.where(is_first, first_upper, upper)
    # A round that raises rates moves nothing else.
    above = known.highest + step
    above = jnp.where(above > 1.0 - 0.5 * step, 1.0, above)
    raised = jnp.where(space_of.is_rate, above, fixed)
    raises = kind == RAISE
    lower, upper = jnp.where(raises, raised, lower), jnp.where(raises, raised, upper)
    return jnp.where(active, lower, fixed), jnp.where(active, upper, fixed)
