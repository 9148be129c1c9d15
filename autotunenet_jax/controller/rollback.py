"""Ordinary training: snapshots, rollbacks after an unhealthy loss, what becomes of the rates, and when to validate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from . import validation_monitor
from .loss_monitor import DIVERGED, HEALTHY, NON_FINITE, SPIKE, STALLED, Guard, Heard
from .plan import NEVER
from .roles import Roles
from .state import (
    OUTCOME_ACCEPTED,
    OUTCOME_NONE,
    OUTCOME_ROLLBACK,
    TRAIN,
    Directive,
    Slots,
    TunerState,
    no_validation,
    nothing_to_do,
)

# A snapshot younger than this may already hold damage that the monitor has not noticed yet; more than `BAD_RUN`.
_MIN_SNAPSHOT_AGE = 10

# How far rates fall, in decades, at a rollback that is not the first within so many steps; the last figure is for
# values that are not finite out of the blue, which are rather the data's fault.
_RETREAT_DECADES, _RETREAT_WITHIN, _BLUE_RETREAT_WITHIN = 0.3, 250, 30


class _Answer(NamedTuple):
    """What is done about a loss: at most one of these.

    Attributes:
      rolls_back: Training goes back to a snapshot.
      gives_up: The rollbacks are used up: what is in force is held from here on.
      accepts: The loss is high on healthy snapshots: it is the new level.
    """

    rolls_back: Bool[Array, ""]
    gives_up: Bool[Array, ""]
    accepts: Bool[Array, ""]


def _answer(guard: Guard, ts: TunerState, heard: Heard) -> _Answer:
    """What an unhealthy loss is answered with.

    One that has been bad ever since the last rollback, without a good loss between, is not the state's fault: that
    state was healthy, so the data changed.
    """
    health = ts.health
    bad_since = jnp.where(heard.is_finite, heard.after.strikes, heard.bad_run)
    is_at_once = heard.unhealthy & (bad_since > health.since_rollback)
    # A high loss is then taken as it is; one that is not finite is waited out.
    accepts = is_at_once & heard.is_finite
    may_retry = (heard.verdict == NON_FINITE) | (ts.rollbacks < guard.max_rollbacks)
    asks = heard.unhealthy & ~is_at_once
    return _Answer(asks & may_retry, asks & ~may_retry, accepts)


def _restored(ts: TunerState, answer: _Answer) -> tuple[Array, Slots]:
    """Whether the saved snapshot is restored rather than the kept one, and the books."""
    slots, age = ts.slots, ts.step - 1
    saved_age, kept_age = age - slots.saved_step, age - slots.kept_step
    saved_is_newer = saved_age < kept_age
    newer_is_safe = jnp.minimum(saved_age, kept_age) >= _MIN_SNAPSHOT_AGE
    # A snapshot passed over may hold the damage: it becomes the older one, which is overwritten next.
    distrusts = answer.rolls_back & ~newer_is_safe
    slots = slots._replace(
        saved_step=jnp.where(distrusts & saved_is_newer, slots.kept_step - 1, slots.saved_step),
        kept_step=jnp.where(distrusts & ~saved_is_newer, slots.saved_step - 1, slots.kept_step),
    )
    return jnp.where(newer_is_safe, saved_is_newer, ~saved_is_newer), slots


def _lowered_rates(roles: Roles, ts: TunerState, heard: Heard, answer: _Answer) -> tuple[Array, Array]:
    """Rates fall where they are to blame: training diverged, or broke again soon after the last rollback.

    Where the data turns out to be, they go back up.

    Returns:
      The hyperparameters in force, and the decades by which the last rollback lowered them.
    """
    lowered = ts.health.lowered
    within = jnp.where(heard.is_blue, _BLUE_RETREAT_WITHIN, _RETREAT_WITHIN)
    repeated = ts.health.since_rollback < within
    falls = answer.rolls_back & (repeated | (heard.verdict == DIVERGED))
    shift = jnp.where(answer.accepts, lowered, jnp.where(falls, -_RETREAT_DECADES, 0.0))
    fell = jnp.where(falls, _RETREAT_DECADES, 0.0)
    lowered = jnp.where(answer.rolls_back, fell, jnp.where(answer.accepts, 0.0, lowered))
    return jnp.where(shift != 0.0, roles.shifted(ts.incumbent, shift), ts.incumbent), lowered


def _statistics(ts: TunerState, heard: Heard, answer: _Answer) -> TunerState:
    """After a rollback, and where a new level is accepted, the spikes seen so far mean nothing."""
    monitor, health = heard.after, ts.health
    zero, none = jnp.zeros_like(monitor.peak), jnp.zeros_like(monitor.strikes)
    # A level learned on hard data must not condemn the next loss, however good.
    fresh = monitor._replace(strikes=none, short=jnp.fmin(monitor.level, health.initial_loss), peak=zero)
    accepting = monitor._replace(
        level=heard.value, short=heard.value, count=none, strikes=none, peak=zero, lowest=heard.value, since_lowest=none
    )
    renews = answer.gives_up | answer.accepts
    monitor = select(renews, accepting, select(answer.rolls_back, fresh, monitor))
    health = health._replace(
        monitor=monitor,
        initial_loss=jnp.where(renews, jnp.fmax(health.initial_loss, heard.value), health.initial_loss),
        known_level=jnp.where(renews, jnp.fmax(health.known_level, heard.value), health.known_level),
        bad_run=jnp.where(answer.rolls_back, 0, health.bad_run),
        # Counted up once for every step, whatever its phase.
        since_rollback=jnp.where(answer.rolls_back, -1, health.since_rollback),
    )
    # Metrics from before the data changed are no measure any more.
    return ts._replace(health=health, validation=select(answer.accepts, no_validation(), ts.validation))


def select(condition: Array, new, old):
    """``jnp.where`` over trees; what is the same array on both sides is left alone."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)


def _snapshots(ts: TunerState, is_calm: Array) -> tuple[TunerState, Directive]:
    """Takes snapshots and, where validation asks for it, goes back to the kept one.

    Without validation two are taken in turn, so that one is always old enough to predate what the monitor notices late.
    With it the kept one is the state of the best reading.
    """
    slots, seen = ts.slots, ts.validation
    saved_age, kept_age = ts.step - 1 - slots.saved_step, ts.step - 1 - slots.kept_step
    returns = is_calm & seen.returns & seen.is_kept
    owns_kept = seen.is_kept | seen.keeps
    is_due = (
        is_calm & ~returns & (jnp.where(owns_kept, saved_age, jnp.minimum(saved_age, kept_age)) >= ts.plan.save_every)
    )
    save = is_due & (owns_kept | (saved_age >= kept_age))
    keep = jnp.where(owns_kept, is_calm & seen.keeps & ~returns, is_due & ~save)
    slots = slots._replace(
        saved_data=jnp.where(save, ts.data_step, slots.saved_data),
        saved_step=jnp.where(save, ts.step, slots.saved_step),
        kept_data=jnp.where(keep, ts.data_step, slots.kept_data),
        kept_step=jnp.where(keep, ts.step, slots.kept_step),
    )
    seen = seen._replace(
        keeps=seen.keeps & ~keep, returns=seen.returns & ~is_calm, is_kept=seen.is_kept | (seen.keeps & keep)
    )
    # The training loss of another state: the monitor learns it anew.
    monitor = ts.health.monitor
    learning = monitor._replace(count=jnp.zeros_like(monitor.count), peak=jnp.zeros_like(monitor.peak))
    health = ts.health._replace(monitor=select(returns, learning, monitor))
    directive = nothing_to_do(ts)._replace(save=save, keep=keep, adopt=returns)
    return ts._replace(slots=slots, validation=seen, health=health), directive


def step(guard: Guard, roles: Roles, ts: TunerState, heard: Heard) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes in one loss of ordinary training.

    Returns:
      The state, what the loop must do, and whether the next round is due.
    """
    ts = validation_monitor.observe_loss(roles, ts, heard)
    is_last = (ts.plan.total > 0) & (ts.step >= ts.plan.total)
    # No later loss will tell whether it stays so high, and without a metric nothing else does.
    is_wreck = is_last & heard.is_far & ~heard.unhealthy & jnp.isnan(ts.validation.level)
    verdict = jnp.where(is_wreck, SPIKE, heard.verdict)
    heard = heard._replace(verdict=verdict, unhealthy=heard.unhealthy | is_wreck)
    answer = _answer(guard, ts, heard)
    restores, slots = _restored(ts, answer)
    incumbent, lowered = _lowered_rates(roles, ts, heard, answer)
    # The budget of rollbacks is spent: what is in force, lowered by them, is held from here on.
    holds = answer.gives_up & (guard.max_rollbacks > 0)
    plan = ts.plan._replace(start=jnp.where(holds, NEVER, ts.plan.start))
    ts = _statistics(ts._replace(incumbent=incumbent, slots=slots, plan=plan), heard, answer)
    ts = ts._replace(health=ts.health._replace(lowered=lowered))
    # No round begins before the way back has been taken, from a rollback's snapshot or to the best state, and none with
    # a state that a bad batch may have spoilt.
    waits = answer.rolls_back | (ts.validation.returns & ts.validation.is_kept) | ~heard.is_finite
    left = jnp.where(waits, jnp.maximum(ts.segment_left, 1), ts.segment_left)
    ts = ts._replace(segment_left=jnp.where(holds, NEVER, left), rollbacks=ts.rollbacks + answer.rolls_back)
    due = ts.segment_left <= 0

    is_well = (heard.verdict == HEALTHY) | (heard.verdict == STALLED)
    is_calm = is_well & ~due & (ts.health.monitor.strikes == 0)
    # After the last step there is no other occasion to go back to the best state.
    ts, directive = _snapshots(ts, is_calm | (is_last & ~heard.unhealthy))
    outcome = jnp.where(answer.rolls_back, OUTCOME_ROLLBACK, jnp.where(answer.accepts, OUTCOME_ACCEPTED, OUTCOME_NONE))
    outcome = outcome.astype(jnp.int32)
    directive = directive._replace(
        restore=answer.rolls_back & restores,
        adopt=directive.adopt | (answer.rolls_back & ~restores),
        outcome=outcome,
        verdict=heard.verdict,
        evaluate=validation_monitor.is_due(ts),
    )
    return ts._replace(outcome=jnp.where(outcome > 0, outcome, ts.outcome)), directive, due


def steps_to_copy(ts: TunerState) -> Int[Array, ""]:
    """Losses before one that may ask for a copy of the training state; below 1 where it is the next one.

    A decision follows the last step of a segment, and a run ends in a state that is kept.
    """
    slots, seen = ts.slots, ts.validation
    saved_age, kept_age = ts.step - slots.saved_step, ts.step - slots.kept_step
    owns_kept = seen.is_kept | seen.keeps
    age = jnp.where(owns_kept, saved_age, jnp.minimum(saved_age, kept_age))
    to_snapshot = jnp.where(seen.keeps, 0, ts.plan.save_every - age)
    to_end = jnp.where(ts.plan.total > 0, ts.plan.total - ts.step - 1, NEVER)
    in_train = jnp.where(ts.phase == TRAIN, jnp.minimum(to_snapshot, to_end), NEVER)
    return jnp.minimum(ts.segment_left - 1, in_train)


def may_copy(ts: TunerState) -> Bool[Array, ""]:
    """Whether the next loss may ask for a copy of the training: a host that has to look at it first does it then."""
    return steps_to_copy(ts) <= 0
