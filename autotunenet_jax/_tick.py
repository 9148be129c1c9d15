"""The cheap half of the controller, once per training step: watch, count, sum, roll back.

Everything here is O(1) in the length of the run and free of linear algebra; the costly half is in ``_decide``.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import _guard, _sweep
from ._plan import NEVER, only_raises
from ._single_kernel import once, single_kernel
from ._state import (
    FORK,
    OUTCOME_ACCEPTED,
    OUTCOME_NONE,
    OUTCOME_ROLLBACK,
    SWEEP,
    TRAIN,
    Directive,
    Sweep,
    TunerState,
    no_validation,
)

COOL_SHARE = 0.3
"""Last part of a fork's stretch over which its rate falls to zero, so that a hot fork is not scored on its noise."""

_SCORED_SHARE = 0.15
"""Last part of a fork's stretch whose losses are its score."""

# Losses of sweeps and forks, and the first ones of training, beyond this magnitude count as not finite.
_LOSS_LIMIT = 1e15

_FIRST_LOSSES = 4

# Training that began again has to be as far as its forks were after so many times their length, if they had so many
# steps at least: what shorter ones end with is noise.
_PROBATION_FORKS, _LEAST_PROMISING = 4, 10

# Share of the best fork's gain that may be missing then, since it was cooled down and training is not; the least such
# gain, in spreads of the loss, that tells from noise; and decades by which rates fall where more is missing.
_MISSING_SHARE = 0.15
LEAST_GAIN = 2.0
_PROBATION_RETREAT_DECADES = 1.0
# Losses that have to be too high, each that is not taking two back: a single one beyond all measure tells nothing. No
# more than twice as many count, so that the first ones are forgotten in time.
_UNMET = 10
# Share of what was missing at the rate before, beyond which a lower one did not help.
_STILL_MISSING = 0.75

REWARM_STEPS = 20
"""Steps over which a rate climbs to its value after a rollback or a fresh start."""

# A snapshot younger than this may already hold the damage that the guard has not noticed yet.
_MIN_SNAPSHOT_AGE = 10

# How far, in spreads, the loss may have risen before a non-finite value that is still out of the blue.
_CALM_SIGMAS = 3.0

# Sweeps and forks of one round that may begin again after such a value.
_MAX_RETRIES = 3

# How far a rate falls, in decades, at a rollback that is not the first within this many steps.
_RATE_RETREAT_DECADES = 0.3
_RATE_RETREAT_WITHIN = 250
# The same for values that are not finite out of the blue, which are rather the data's fault.
_BLUE_RETREAT_DECADES = 0.15
_BLUE_RETREAT_WITHIN = 20


def position(ts: TunerState) -> Array:
    """Steps already taken in the running segment."""
    return ts.segment_length - ts.segment_left


def probation_steps(late: Array) -> Array:
    """Steps after which training that began again is held against forks of ``late`` steps; 0 for never."""
    return jnp.where(late >= _LEAST_PROMISING, _PROBATION_FORKS * late, 0)


def scored_from(length: Array) -> Array:
    """First step of a fork's stretch whose loss counts in its score."""
    return length - jnp.maximum(jnp.round(_SCORED_SHARE * length).astype(jnp.int32), 2)


def ceiling(ts: TunerState) -> Float[Array, ""]:
    """A loss that training which is still healthy does not stay above: well over where the run began."""
    progress = jnp.maximum(ts.initial_loss - ts.best_level, 0.0)
    limit = ts.initial_loss + 0.5 * progress + 6.0 * ts.guard.spread
    return jnp.where(ts.step >= _FIRST_LOSSES, limit, jnp.inf)


@single_kernel(static_argnums=(0, 1))
def tick(
    guard: _guard.Guard,
    retreat: Callable[[Array, Array], Array],
    ts: TunerState,
    loss: Array,
) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes the loss of one step in.

    Args:
      guard: Thresholds of the watch.
      retreat: ``(u, decades) -> u``; lowers the rates among the hyperparameters ``u`` (unit cube).
      ts: State before.
      loss: Scalar, float32.

    Returns:
      The state, what the loop must do, and whether a decision is due.
    """
    pos = position(ts)
    in_train, in_fork, in_sweep = ts.phase == TRAIN, ts.phase == FORK, ts.phase == SWEEP
    # Where a few losses decide, one beyond all measure tells as little as one that is not finite.
    is_known = in_train & (ts.guard.count >= _FIRST_LOSSES)
    loss = jnp.where(is_known | (jnp.abs(loss) < _LOSS_LIMIT), loss, jnp.nan)

    guard_state, verdict = _guard.watch(guard, ts.guard, loss, ceiling=ceiling(ts))
    unhealthy = _guard.is_failure(verdict)
    is_finite = jnp.isfinite(loss)
    value = jnp.where(is_finite, loss, guard_state.level)
    guard_state, verdict, unhealthy, is_finite, value = once(guard_state, verdict, unhealthy, is_finite, value)

    is_unknown = jnp.isnan(ts.initial_loss)
    is_first = ((ts.step < _FIRST_LOSSES) | is_unknown) & is_finite
    mean = jnp.where(is_unknown, value, ts.initial_loss + (value - ts.initial_loss) / (ts.step + 1.0))
    initial_loss = jnp.where(is_first, mean, ts.initial_loss)
    settled = is_finite & (guard_state.count >= _FIRST_LOSSES)
    best_level = jnp.where(settled, jnp.minimum(ts.best_level, guard_state.short), ts.best_level)

    sweep = _sweep.update(ts.sweep, pos, value, guard_state.spread)
    sweep_ends = in_sweep & (unhealthy | _sweep.is_blown(sweep, guard_state.spread, pos))
    sweep = Sweep(*(jnp.where(in_sweep & is_finite, new, old) for new, old in zip(sweep, ts.sweep, strict=True)))

    is_scored = in_fork & is_finite & (pos >= scored_from(ts.segment_length))
    window = ts.window._replace(
        loss_sum=ts.window.loss_sum + jnp.where(is_scored, value, 0.0),
        loss_count=ts.window.loss_count + is_scored,
    )
    # The first two losses of a round's first fork come before any fork could differ: where all of them start.
    is_reference = in_fork & (ts.round.fork == 0) & (ts.round.rung == 0) & (pos < 2) & is_finite & ~ts.round.has_eval
    reference = jnp.where(is_reference & (pos == 0), value, ts.round.reference)
    reference = jnp.where(is_reference & (pos == 1), 0.5 * (reference + value), reference)

    # A rate that is too large announces itself: the loss climbs before it overflows. Out of the blue, it is the data.
    climbed = ts.guard.short > jnp.fmax(ts.guard.level, ts.initial_loss) + _CALM_SIGMAS * ts.guard.spread
    # High from the restored snapshot on, before any step from there: that is not the hyperparameters' doing. It is the
    # snapshot's, and where the other one is no better it is the data's.
    at_once = in_train & unhealthy & is_finite & (guard_state.strikes > ts.since_rollback)
    accepts = at_once & (ts.relapses > 0)
    # A rollback: training only; an unhealthy fork or sweep just ends.
    may_retry = (verdict == _guard.NON_FINITE) | (ts.rollbacks < guard.max_rollbacks)
    is_due = in_train & (ts.probation == 1)
    gain = initial_loss - ts.promised
    enough = ts.promised + _MISSING_SHARE * gain
    unmet = jnp.where(is_finite & (loss <= enough), jnp.maximum(ts.unmet - 2, 0), jnp.minimum(ts.unmet + 1, 2 * _UNMET))
    is_missing = (guard_state.short > enough) & (unmet >= _UNMET) & (gain > LEAST_GAIN * guard_state.spread)
    is_missing &= is_due & ~unhealthy & (ts.rollbacks < guard.max_rollbacks)
    # A lower rate that got no farther was no remedy: the one before is in force again, and training goes on.
    is_vain = is_missing & (guard_state.short - ts.promised > _STILL_MISSING * (ts.reached - ts.promised))
    is_behind = is_missing & ~is_vain
    verdict = jnp.where(is_behind, _guard.BEHIND, verdict)
    rolls_back = (in_train & unhealthy & may_retry & ~accepts) | is_behind
    gives_up = in_train & unhealthy & ~may_retry & ~accepts
    verdict, rolls_back, gives_up, accepts = once(verdict, rolls_back, gives_up, accepts)
    at_once, is_behind, is_vain = once(at_once, is_behind, is_vain)
    saved_age, kept_age = ts.step - ts.slots.saved_step, ts.step - ts.slots.kept_step
    saved_is_newer = saved_age < kept_age
    # Not finite or high at once after a rollback: that snapshot, the newer one since, may hold the damage itself.
    was_damaged = ((ts.since_rollback == 0) & ~is_finite) | at_once
    # Damage out of the blue shows at once: what a finite loss has been seen of is from before it.
    is_blue = ~is_finite & ~climbed
    least_age = jnp.where(is_blue, 1, _MIN_SNAPSHOT_AGE)
    newer_is_safe = (jnp.minimum(saved_age, kept_age) >= least_age) & ~was_damaged
    restores = jnp.where(newer_is_safe, saved_is_newer, ~saved_is_newer) | is_behind
    within = jnp.where(is_blue, _BLUE_RETREAT_WITHIN, _RATE_RETREAT_WITHIN)
    repeated = rolls_back & (ts.since_rollback < within) & ~was_damaged
    decades = jnp.where(is_blue, _BLUE_RETREAT_DECADES, _RATE_RETREAT_DECADES)
    incumbent = jnp.where(
        repeated | is_behind | (rolls_back & (verdict == _guard.DIVERGED) & ~at_once),
        retreat(ts.incumbent, jnp.where(is_behind, _PROBATION_RETREAT_DECADES, decades)),
        jnp.where(is_vain, ts.last_rates, ts.incumbent),
    )
    # What is lowered for another reason in between is not taken back.
    reached = jnp.where(is_behind, guard_state.short, jnp.where(rolls_back, jnp.inf, ts.reached))
    last_rates = jnp.where(is_behind, ts.incumbent, ts.last_rates)
    # At the lower bound there is nothing left to try.
    goes_on = (ts.probation > 0) & ~(is_behind & jnp.all(incumbent == ts.incumbent))
    on_probation = in_train & (ts.probation > 0)
    probation = jnp.where(in_train, jnp.maximum(ts.probation - 1, 0), ts.probation)
    probation = jnp.where(rolls_back, jnp.where(goes_on, probation_steps(ts.plan.late[0]), 0), probation)
    # After a rollback, and where a new level has to be accepted, the spikes seen so far mean nothing.
    zero = jnp.zeros_like(guard_state.peak)
    fresh = guard_state._replace(strikes=jnp.zeros_like(guard_state.strikes), short=guard_state.level, peak=zero)
    accepting = guard_state._replace(
        level=value,
        short=value,
        count=jnp.zeros_like(guard_state.count),
        strikes=jnp.zeros_like(guard_state.strikes),
        peak=zero,
        lowest=value,
        since_lowest=jnp.zeros_like(guard_state.since_lowest),
    )
    guard_state = _where(gives_up | accepts, accepting, _where(rolls_back, fresh, guard_state))
    # The budget of rollbacks is spent: what is in force, lowered by them, is held from here on.
    holds_for_good = gives_up & (guard.max_rollbacks > 0)
    plan = ts.plan._replace(start=jnp.where(holds_for_good, NEVER, ts.plan.start))
    initial_loss = jnp.where(gives_up | accepts, jnp.fmax(initial_loss, value), initial_loss)

    has_faulted = (in_fork | in_sweep) & is_blue & (ts.retries < _MAX_RETRIES)

    step = ts.step + 1
    segment_left = ts.segment_left - 1
    segment_left = jnp.where(rolls_back, jnp.maximum(segment_left, probation + 1), segment_left)
    segment_left = jnp.where(holds_for_good, NEVER, segment_left)
    has_failed = in_fork & unhealthy
    due = (segment_left <= 0) | has_failed | sweep_ends

    # Two snapshots taken in turn, so that one is always old enough to predate what the guard notices late.
    is_well = (verdict == _guard.HEALTHY) | (verdict == _guard.STALLED)
    calm = in_train & is_well & ~due & (guard_state.strikes == 0)
    takes = calm & (jnp.minimum(saved_age, kept_age) >= ts.plan.save_every)
    # On probation the saved state is the one that training began again from.
    save, keep = takes & ~saved_is_newer & ~on_probation, takes & (saved_is_newer | on_probation)
    # After the last round the kept copy is the state of the best validation metric: what to return to.
    # Metrics from before the data changed are no measure any more, nor are those of training that is given up.
    seen = _where(accepts | is_behind, no_validation(), ts.validation)
    owns_kept = in_train & only_raises(ts.plan, ts.round.index) & (seen.is_kept | seen.keeps)
    returns = calm & seen.returns & seen.is_kept
    save = jnp.where(owns_kept, calm & (saved_age >= ts.plan.save_every) & ~returns & ~on_probation, save)
    keep = jnp.where(owns_kept, calm & seen.keeps & ~returns, keep)
    due, calm, returns, save, keep = once(due, calm, returns, save, keep)
    validation = seen._replace(
        keeps=seen.keeps & ~keep, returns=seen.returns & ~calm, is_kept=seen.is_kept | (seen.keeps & keep)
    )
    # The training loss of another state: the guard learns it anew.
    learning = guard_state._replace(count=jnp.zeros_like(guard_state.count), peak=zero)
    guard_state = _where(returns | is_behind, learning, guard_state)
    data_step = ts.data_step + 1
    # A snapshot passed over may hold the damage: it becomes the older one, which is overwritten next.
    distrusts = rolls_back & ~newer_is_safe
    saved_step = jnp.where(distrusts & saved_is_newer, ts.slots.kept_step - 1, ts.slots.saved_step)
    distrusts_kept = (distrusts | is_behind) & (kept_age < saved_age)
    kept_step = jnp.where(distrusts_kept, ts.slots.saved_step - 1, ts.slots.kept_step)
    slots = ts.slots._replace(
        saved_data=jnp.where(save, data_step, ts.slots.saved_data),
        saved_step=jnp.where(save, step, saved_step),
        kept_data=jnp.where(keep, data_step, ts.slots.kept_data),
        kept_step=jnp.where(keep, step, kept_step),
    )
    has_next_round = plan.start[ts.round.index] < NEVER
    outcome = jnp.where(rolls_back, OUTCOME_ROLLBACK, jnp.where(accepts, OUTCOME_ACCEPTED, OUTCOME_NONE))
    new = ts._replace(
        step=step,
        data_step=data_step,
        segment_left=segment_left,
        incumbent=incumbent,
        has_failed=has_failed,
        has_faulted=has_faulted,
        initial_loss=initial_loss,
        best_level=best_level,
        rollbacks=ts.rollbacks + rolls_back,
        relapses=jnp.where(rolls_back, jnp.where(at_once, ts.relapses + 1, 0), jnp.where(accepts, 0, ts.relapses)),
        since_rollback=jnp.where(rolls_back, 0, jnp.minimum(ts.since_rollback + 1, NEVER)),
        since_restart=jnp.where(rolls_back | is_vain, 0, jnp.minimum(ts.since_restart + 1, NEVER)),
        probation=probation.astype(jnp.int32),
        unmet=unmet,
        reached=reached,
        last_rates=last_rates,
        hold=jnp.where((in_train & unhealthy & ~is_blue) | is_behind | returns, 0.0, ts.hold),
        outcome=jnp.where(rolls_back | accepts, outcome, ts.outcome).astype(jnp.int32),
        window=window,
        sweep=sweep,
        round=ts.round._replace(reference=reference),
        slots=slots,
        guard=guard_state,
        validation=validation,
        plan=plan,
    )
    directive = Directive(
        save=save,
        restore=rolls_back & restores,
        keep=keep,
        adopt=(rolls_back & ~restores) | returns,
        evaluate=(segment_left == 1) & (in_fork | (in_train & has_next_round)),
        data_step=data_step,
        outcome=outcome.astype(jnp.int32),
        verdict=verdict,
    )
    return new, directive, due


def _where(condition: Array, new, old):
    return type(new)(*(jnp.where(condition, a, b) for a, b in zip(new, old, strict=True)))
