"""A round of forks: how long each runs, and where the next one may go."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..bayesopt.quasi_random import spread_table, turned
from ..space.search_space import SearchSpace
from .plan import MAX_FORKS, SLOW
from .roles import Roles, roles_of
from .state import FORK_FINISHED, Round, TunerState

PROPOSALS = 128
"""Points that compete for the next fork where more than the rates are searched."""

# Forks at small and at large batches have so many times more and fewer steps at most; and the fewest of all.
_MOST_STRETCH, _LEAST_STEPS = 4.0, 8.0

# Half-width of the trust region around the incumbent, in the unit cube and for rates in decades.
_REACH, _REACH_DECADES = 0.3, 0.75


def length_at(space: SearchSpace, ts: TunerState, x: Float[Array, "d"]) -> Int[Array, ""]:
    """Steps of a fork of the round at ``x``. Batch sizes are compared at equal samples, as far as steps allow."""
    planned, batch_size = ts.plan.length[ts.round.index], roles_of(space).batch_size
    if batch_size is None:
        return planned
    name, middle = batch_size
    ratio = jnp.clip(middle / space.decode(x)[name], 1.0 / _MOST_STRETCH, _MOST_STRETCH)
    return jnp.maximum(jnp.round(planned * ratio), _LEAST_STEPS).astype(jnp.int32)


def finished(held: Round) -> Bool[Array, "forks"]:
    """Which forks of the round have a usable score."""
    return (held.status == FORK_FINISHED) & jnp.isfinite(held.score)


def is_spoilt(held: Round) -> Bool[Array, ""]:
    """Whether a metric says that the state before the forks is better than what any of them has made of it.

    They lie further above it than apart from each other: none of the rates that were tried is the answer.
    """
    ended = finished(held)
    lowest = jnp.min(held.score, where=ended, initial=jnp.inf)
    highest = jnp.max(held.score, where=ended, initial=-jnp.inf)
    return held.has_eval & (ended.sum() > 1) & (lowest - held.reference > highest - lowest)


def has_run(held: Round) -> Bool[Array, "forks"]:
    """Which forks of the round have run."""
    return (jnp.arange(MAX_FORKS) <= held.fork) & (held.steps > 0)


class Candidates(NamedTuple):
    """Where the next fork may go.

    Attributes:
      x: A step below the forks that have run and a step above them, then proposals; unit cube.
      is_allowed: Which of them count.
    """

    x: Float[Array, "c d"]
    is_allowed: Bool[Array, "c"]


def candidates(space: SearchSpace, ts: TunerState, shift: Float[Array, "d"]) -> Candidates:
    """Where the next fork of the round may go.

    In a round of fast hyperparameters the rates move together, outward by half a decade. Where there is more to search
    than one rate, points spread over a trust region around the best fork compete with them; in slow rounds these alone.
    """
    roles, held = roles_of(space), ts.round
    is_slow = ts.plan.kind[held.index] == SLOW
    ran = has_run(held)
    line = _line(space, held, ran)
    allowed = line.is_allowed & ~is_slow
    if space.dims == 1 and roles.is_rate.all():
        return Candidates(line.x, allowed)
    centre = held.x[jnp.argmin(jnp.where(finished(held), held.score, jnp.inf))]
    active = jnp.where(is_slow, roles.is_slow, ~roles.is_slow)
    reach = jnp.where(roles.is_rate, _REACH_DECADES / roles.decades, jnp.where(is_slow, 1.0, _REACH))
    lower, upper = jnp.maximum(centre - reach, 0.0), jnp.minimum(centre + reach, 1.0)
    spread = lower + (upper - lower) * turned(spread_table(PROPOSALS, space.dims), shift)
    spread = jnp.where(active, space.snap(spread), centre)
    # Proposals wait until the rates lie between worse ones: what else is searched shows at the right rates only.
    searches = jnp.where(is_slow | ~np.any(roles.is_rate), held.fork >= 0, _is_bracketed(space, held))
    return Candidates(
        jnp.concatenate([line.x, spread]), jnp.concatenate([allowed, jnp.broadcast_to(searches, PROPOSALS)])
    )


def _height(roles: Roles, x: Float[Array, "m d"]) -> Float[Array, "m"]:
    """The rates of some points, added up in decades."""
    return x @ jnp.asarray(roles.is_rate * roles.decades, jnp.float32)


def _line(space: SearchSpace, held: Round, ran: Array) -> Candidates:
    """A step below the lowest fork, and one above the highest."""
    roles = roles_of(space)
    height, step = _height(roles, held.x), roles.step
    lowest = held.x[jnp.argmin(jnp.where(ran, height, jnp.inf))]
    highest = held.x[jnp.argmax(jnp.where(ran, height, -jnp.inf))]
    here = jnp.stack([lowest, highest])
    there = space.snap(here + jnp.asarray([-step, step]))
    # What is left beyond the last full step is tried as a whole; less than a fifth of a step is nothing new.
    room = jnp.max(jnp.where(roles.is_rate, jnp.abs(there - space.snap(here)), 0.0), axis=1)
    x = jnp.where(roles.is_rate, there, here)
    return Candidates(x, room > 0.2 * float(np.min(step[roles.is_rate], initial=1.0)))


def foreseen(space: SearchSpace, ts: TunerState, count: int) -> Candidates:
    """The fork that runs, and those that the line search may ask for after it whatever comes of them, nearest first.

    Args:
      space: What is tuned.
      ts: State at the beginning of a fork.
      count: How many, the one that runs included.
    """
    roles, held = roles_of(space), ts.round

    def ran(held: Round, x: Array) -> Round:
        return held._replace(x=held.x.at[held.fork].set(x), steps=held.steps.at[held.fork].set(1))

    held = ran(held, ts.trial)
    is_line = (ts.plan.kind[held.index] != SLOW) & bool(roles.is_rate.any())
    x, allowed = [ts.trial], [jnp.ones((), bool)]
    while len(x) < count:
        line = _line(space, held, has_run(held))
        for point, is_new in zip(line.x, line.is_allowed & is_line, strict=True):
            held = ran(held._replace(fork=held.fork + 1), point)
            x.append(point)
            allowed.append(is_new & (held.fork < ts.plan.forks[held.index]))
    return Candidates(jnp.stack(x[:count]), jnp.stack(allowed[:count]))


def _is_bracketed(space: SearchSpace, held: Round) -> Bool[Array, ""]:
    """Whether the best fork has worse ones at lower and at higher rates, or nothing is left beyond."""
    roles = roles_of(space)
    height, ran = _height(roles, held.x), has_run(held)
    best = height[jnp.argmin(jnp.where(finished(held), held.score, jnp.inf))]
    below, above = _line(space, held, ran).is_allowed
    return (jnp.any(ran & (height < best - 0.01)) | ~below) & (jnp.any(ran & (height > best + 0.01)) | ~above)
