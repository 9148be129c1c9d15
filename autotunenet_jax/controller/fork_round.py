"""A round of forks: the score of a fork, and where the next one goes."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..bayesopt.quasi_random import spread_table, turned
from ..space.search_space import SearchSpace
from . import loss_monitor
from .loss_monitor import Heard
from .plan import FAST, MAX_FORKS, SLOW
from .roles import Roles, roles_of
from .schedule import COOL_SHARE
from .state import FORK_FINISHED, Directive, Round, TunerState, nothing_to_do, position

LINE_STEP_DECADES = 0.5
"""Step of the line search over the rates."""

DRIFT_DECADES = 0.25
"""How far below the winner of the first round the rates are set: what the first steps of a run reward is hotter than
what the next ones do. Chosen on the bank."""

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


def scored_from(length: Array) -> Array:
    """First step of a fork whose training loss counts in its score, where there is no metric: its cool-down's."""
    return length - jnp.maximum(jnp.round(COOL_SHARE * length).astype(jnp.int32), 2)


def step(ts: TunerState, heard: Heard) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes in one loss of a fork.

    Returns:
      The state, what the loop must do, and whether the fork has ended.
    """
    pos = position(ts) - 1
    is_scored = heard.is_finite & (pos >= scored_from(ts.segment_length))
    value = heard.value * ts.health.scale
    window = ts.window._replace(
        loss_sum=ts.window.loss_sum + jnp.where(is_scored, value, 0.0),
        loss_count=ts.window.loss_count + is_scored,
    )
    # The first two losses of a round's first fork come before any fork could differ: where all of them start.
    counts = (ts.round.fork == 0) & heard.is_finite & ~ts.round.has_eval
    reference = jnp.where(counts & (pos == 0), value, ts.round.reference)
    reference = jnp.where(counts & (pos == 1), 0.5 * (reference + value), reference)
    faulted = heard.is_blue & (ts.health.retries < loss_monitor.MAX_RETRIES)
    ts = ts._replace(
        window=window,
        round=ts.round._replace(reference=reference),
        health=ts.health._replace(has_failed=heard.unhealthy, has_faulted=faulted),
    )
    directive = nothing_to_do(ts, heard.verdict)._replace(evaluate=ts.segment_left == 1)
    return ts, directive, (ts.segment_left <= 0) | heard.unhealthy


def score(ts: TunerState, *, is_opening: Array) -> tuple[Bool[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The score of the fork that ended, to be minimised.

    Args:
      ts: State; `step` and `validation_monitor.observe` have summed up what the fork reported.
      is_opening: Whether it is the first fork of its round.

    Returns:
      Whether the round is scored by the validation metric, the score, and that of the state all forks start from.
    """
    window, held = ts.window, ts.round
    has_eval = jnp.where(is_opening, window.eval_count > 0, held.has_eval)
    # A slow hyperparameter is never judged by the training loss.
    by_loss = jnp.where(ts.plan.kind[held.index] == FAST, window.loss_sum / window.loss_count, jnp.nan)
    value = jnp.where(has_eval, window.eval_sum / window.eval_count, by_loss)
    reference = jnp.where(is_opening & has_eval, ts.validation.level, held.reference)
    return has_eval, value, jnp.where(jnp.isfinite(reference), reference, value)


def spoiled(ts: TunerState) -> TunerState:
    """The state with a running fork that cannot win: the training that it led to is not whole."""
    nan = jnp.full_like(ts.window.loss_sum, jnp.nan)
    return ts._replace(window=ts.window._replace(loss_sum=nan, eval_sum=nan))


def finished(held: Round) -> Bool[Array, "forks"]:
    """Which forks of the round have a usable score."""
    return (held.status == FORK_FINISHED) & jnp.isfinite(held.score)


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

    Args:
      space: What is tuned.
      ts: State; the round's forks include the one that just ended.
      shift: Random turn of the spread points.
    """
    roles, held = roles_of(space), ts.round
    is_slow = ts.plan.kind[held.index] == SLOW
    ran = has_run(held)
    line = _line(roles, held, ran)
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
    searches = jnp.where(is_slow | ~np.any(roles.is_rate), held.fork >= 0, _is_bracketed(roles, held))
    return Candidates(
        jnp.concatenate([line.x, spread]), jnp.concatenate([allowed, jnp.broadcast_to(searches, PROPOSALS)])
    )


def _height(roles: Roles, x: Float[Array, "m d"]) -> Float[Array, "m"]:
    """The rates of some points, added up in decades."""
    return x @ jnp.asarray(roles.is_rate * roles.decades, jnp.float32)


def _line(roles: Roles, held: Round, ran: Array) -> Candidates:
    """A step below the lowest fork, and one above the highest."""
    height = _height(roles, held.x)
    lowest = held.x[jnp.argmin(jnp.where(ran, height, jnp.inf))]
    highest = held.x[jnp.argmax(jnp.where(ran, height, -jnp.inf))]
    step = LINE_STEP_DECADES / roles.decades
    below, above = jnp.maximum(lowest - step, 0.0), jnp.minimum(highest + step, 1.0)
    # What is left beyond the last full step is tried as a whole; less than a fifth of a step is nothing new.
    room = jnp.stack([jnp.max(jnp.where(roles.is_rate, near, 0.0)) for near in (lowest - below, above - highest)])
    x = jnp.stack([jnp.where(roles.is_rate, below, lowest), jnp.where(roles.is_rate, above, highest)])
    return Candidates(x, room > 0.2 * float(np.min(step[roles.is_rate], initial=1.0)))


def _is_bracketed(roles: Roles, held: Round) -> Bool[Array, ""]:
    """Whether the best fork has worse ones at lower and at higher rates, or nothing is left beyond."""
    height, ran = _height(roles, held.x), has_run(held)
    best = height[jnp.argmin(jnp.where(finished(held), held.score, jnp.inf))]
    below, above = _line(roles, held, ran).is_allowed
    return (jnp.any(ran & (height < best - 0.01)) | ~below) & (jnp.any(ran & (height > best + 0.01)) | ~above)
