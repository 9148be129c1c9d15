"""Readings overrule: where the held-out metric does not improve, training goes back to its best state, slower.

Early stopping, decay on a plateau and rewind in one. Where every reading improves, rates climb on trial. Only the order
of readings counts, so any metric will do. Where there is none the training loss takes its place: it cannot say which
state is the better one, so that nothing is undone, and it may rise for reasons of its own: rates fall by it once.

Source: Prechelt, "Early stopping, but when?" (1998); the decay is ReduceLROnPlateau's of Keras and PyTorch.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from . import window
from .loss_monitor import Heard
from .plan import NEVER
from .roles import Roles
from .schedule import HOLD_SHARE
from .state import FORK, TRAIN, TunerState

PATIENCE = 2
"""Readings in a row above the lowest, a twentieth of the budget apart, after which the rates cool down for one more."""

BACK_DECADES = 0.5
"""How far the rates fall where training goes back."""

CLIMB_DECADES = 0.25
"""How far the rates climb where two readings in a row are the lowest of all; the next one says whether it was right."""

FAR_DECADES = 1.0
"""Rates that are further below where the run's first fork began climb half of the way there: they are lower than any
horizon explains, as when the metric was not yet one of what is trained."""

ENDING_SHARE = 0.1
"""Last part of the budget, in which there is no time to better a state that is gone back to: only the last reading
counts there, and it takes the run to its best state as it is."""

# Readings closer than this share of the planned distance count as one.
_SPACING = 0.8


def is_due(ts: TunerState) -> Bool[Array, ""]:
    """Whether a reading is due in training: at regular steps, before a round, and before the last step."""
    is_regular = ts.step % ts.plan.check_every == 0
    has_next_round = ts.plan.start[ts.round.index] < NEVER
    return is_regular | (has_next_round & (ts.segment_left == 1)) | (ts.plan.total - ts.step == 1)


def steps_to_reading(ts: TunerState) -> Int[Array, ""]:
    """Losses in training before one after which a reading is due, be it of a metric or of the losses since the last."""
    to_regular = ts.plan.check_every - 1 - ts.step % ts.plan.check_every
    to_end = jnp.where(ts.plan.total > 0, ts.plan.total - ts.step - 2, NEVER)
    return jnp.minimum(jnp.minimum(to_regular, ts.segment_left - 2), to_end)


def wants_metric(ts: TunerState) -> Bool[Array, ""]:
    """Whether the tuner would use a metric reported now."""
    return jnp.where(ts.phase == FORK, ts.segment_left == 1, (ts.phase == TRAIN) & is_due(ts))


def is_heard(ts: TunerState, metric: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a metric says anything: one that is not finite, and was not asked for, stands for none."""
    return jnp.isfinite(metric) | wants_metric(ts)


def observe(roles: Roles, ts: TunerState, metric: Float[Array, ""]) -> TunerState:
    """Takes a validation metric in; in a fork's last step it is its score."""
    is_score = (ts.phase == FORK) & (ts.segment_left == 1)
    # One that is not finite makes the fork a failure; of a round's first it stands for none.
    window = ts.window._replace(
        eval_sum=jnp.where(is_score, ts.window.eval_sum + metric, ts.window.eval_sum),
        eval_count=jnp.where(is_score, ts.window.eval_count + 1.0, ts.window.eval_count),
    )
    is_settled = (ts.phase == TRAIN) | (ts.step == 0)
    seen = ts.validation
    is_known = is_settled & jnp.isfinite(metric)
    # From the first metric on, training losses are no readings any more.
    is_first = is_known & jnp.isnan(seen.level)
    seen = seen._replace(
        level=jnp.where(is_known, metric, seen.level),
        hot=jnp.where(is_first, jnp.inf, seen.hot),
        worse=jnp.where(is_first, 0, seen.worse),
    )
    return _read(roles, ts._replace(window=window, validation=seen), metric, ts.phase == TRAIN)


def observe_loss(roles: Roles, ts: TunerState, heard: Heard) -> TunerState:
    """Takes a training loss in: where there is no metric, the mean between two readings is one."""
    seen, plan, sums = ts.validation, ts.plan, window.with_loss(ts.window, heard.value, heard.is_finite)
    is_over = ts.step % plan.check_every == 0
    has_enough = sums.loss_count >= _SPACING * plan.check_every
    counts = is_over & jnp.isnan(seen.level) & (plan.total > 0) & has_enough
    value = window.mean(sums)
    worse = jnp.where(value < seen.hot, 0, seen.worse + 1)
    is_ending = plan.total - ts.step < ENDING_SHARE * plan.total
    falls = counts & (worse >= PATIENCE) & ~is_ending & ~seen.has_fallen
    hot = jnp.where(falls, jnp.inf, jnp.minimum(value, seen.hot))
    # What an unhealthy stretch held is answered by the rollback.
    begins = is_over | heard.unhealthy
    return ts._replace(
        incumbent=jnp.where(falls, roles.shifted(ts.incumbent, -BACK_DECADES), ts.incumbent),
        window=optax.tree.where(begins, window.without_losses(sums), sums),
        validation=seen._replace(
            hot=jnp.where(counts, hot, seen.hot),
            worse=jnp.where(counts, jnp.where(falls, 0, worse), seen.worse),
            has_fallen=seen.has_fallen | falls,
        ),
    )


class _Reading(NamedTuple):
    """What a metric is to the readings before it.

    Attributes:
      value: The metric; what is not finite is worse than anything.
      counts: Whether it is far enough from the last one.
      is_best: Whether it is the lowest.
      is_last: Whether the run ends.
      is_cooled: Whether it is of a state that has cooled down.
      is_tried: Whether it is the first since the rates climbed.
    """

    value: Float[Array, ""]
    counts: Bool[Array, ""]
    is_best: Bool[Array, ""]
    is_last: Bool[Array, ""]
    is_cooled: Bool[Array, ""]
    is_tried: Bool[Array, ""]


def _reading(ts: TunerState, metric: Array, in_train: Bool[Array, ""]) -> _Reading:
    seen, total = ts.validation, ts.plan.total
    is_last = (total > 0) & (total - ts.step <= 1)
    value = jnp.where(jnp.isfinite(metric), metric, jnp.inf)
    counts = in_train & (is_last | (ts.step - seen.read_at >= _SPACING * ts.plan.check_every))
    # However close two readings are, the better state is kept.
    is_best = in_train & (value < seen.best) & (counts | ~seen.returns)
    is_cooled = counts & (seen.cools_from < NEVER)
    return _Reading(value, counts, is_best, is_last, is_cooled, counts & (seen.climbed_at == seen.read_at))


def _climb(roles: Roles, ts: TunerState) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """How far the rates would climb, in decades, and whether that is since they are far below the first fork's."""
    obs = ts.knowledge.observations
    # The first of all forks, until many more than a plan has would have taken its place.
    gap = jnp.max(jnp.where(roles.is_rate, (obs.x[0] - ts.incumbent) * roles.decades, -jnp.inf))
    is_far = (obs.count > 0) & (ts.plan.range_test[0] > 0) & (gap > FAR_DECADES)
    return jnp.where(is_far, 0.5 * gap, CLIMB_DECADES), is_far


def _climbs(
    roles: Roles, ts: TunerState, better: Int[Array, ""], climb: Float[Array, ""], is_far: Bool[Array, ""]
) -> Bool[Array, ""]:
    """Whether the rates climb: reading after reading is the lowest, and training never had to go back.

    From far below they also do where it had, unless it was from a climb.
    """
    # Before a round, and before they fall by the schedule, the next reading is to say what came of it.
    until = jnp.where(is_far, 1.0 - ENDING_SHARE, HOLD_SHARE) * ts.plan.total
    has_time = (ts.step < until) & (ts.segment_left > ts.plan.check_every)
    has_room = (roles.is_rate & (ts.incumbent + climb / roles.decades <= 1.0)).any()
    is_unhurt = (ts.validation.retreats == 0) & (ts.rollbacks == 0)
    is_unhurt |= is_far & (ts.validation.climbed >= 0.0)
    return (better >= PATIENCE) & has_time & has_room & is_unhurt


def _read(roles: Roles, ts: TunerState, metric: Array, in_train: Bool[Array, ""]) -> TunerState:
    seen, new = ts.validation, _reading(ts, metric, in_train)
    counts, is_best = new.counts, new.is_best
    is_ending = (ts.plan.total > 0) & (ts.plan.total - ts.step < ENDING_SHARE * ts.plan.total)
    # A rate that is only too hot to hold shows in a state that cools to a better one: then it was worth its height.
    is_above = ~jnp.isfinite(new.value) | (new.value > seen.best)
    retreats = ((new.is_cooled & is_above) | (new.is_tried & ~is_best)) & seen.is_kept
    returns = retreats | (counts & is_above & new.is_last & seen.is_kept)
    is_usual = counts & ~new.is_cooled
    # A reading that equals the lowest, as of an accuracy that is full, says nothing against the state.
    is_worse = ~jnp.isfinite(new.value) | (new.value > seen.hot)
    worse = jnp.where(counts, jnp.where(is_worse, seen.worse + 1, 0), seen.worse)
    better = jnp.where(is_usual & is_best, seen.better + 1, jnp.where(counts, 0, seen.better))
    cools = is_usual & ~retreats & (worse >= PATIENCE) & ~is_ending & jnp.isfinite(seen.best)
    climb, is_far = _climb(roles, ts)
    climbs = is_usual & _climbs(roles, ts, better, climb, is_far)
    hot = jnp.where(is_usual, jnp.minimum(new.value, seen.hot), seen.hot)
    # Back there, what was reached before is to be bettered; from a cooled state hot readings begin anew.
    hot = jnp.where(new.is_cooled, jnp.where(is_above, seen.best, jnp.inf), jnp.where(retreats, jnp.inf, hot))
    back = jnp.where(new.is_tried, seen.climbed, BACK_DECADES)
    shift = jnp.where(retreats, -back, jnp.where(climbs, climb, 0.0))
    climbed = jnp.where(retreats & new.is_tried, -1.0, jnp.where(climbs, climb, seen.climbed))
    return ts._replace(
        incumbent=jnp.where(shift != 0.0, roles.shifted(ts.incumbent, shift), ts.incumbent),
        validation=seen._replace(
            best=jnp.where(is_best, new.value, seen.best),
            hot=hot,
            read_at=jnp.where(counts, ts.step, seen.read_at),
            worse=jnp.where(new.is_cooled | cools | retreats, 0, worse),
            better=jnp.where(climbs, 0, better),
            climbed=climbed,
            climbed_at=jnp.where(climbs, ts.step, seen.climbed_at),
            cools_from=jnp.where(cools, ts.step, jnp.where(new.is_cooled, NEVER, seen.cools_from)),
            retreats=seen.retreats + returns,
            keeps=(seen.keeps | is_best) & ~returns,
            returns=jnp.where(counts, returns, seen.returns),
            is_kept=seen.is_kept & ~is_best,
        ),
    )


def kept_at_once(ts: TunerState) -> tuple[TunerState, Bool[Array, ""]]:
    """The state after a metric or decision, if a host that has the best state at hand copies it over the kept one now.

    A step later it is another one.

    Returns:
      The state with that in its books, and whether the host has to.
    """
    slots, seen = ts.slots, ts.validation
    keeps = seen.keeps
    slots = slots._replace(
        kept_step=jnp.where(keeps, ts.step, slots.kept_step), kept_data=jnp.where(keeps, ts.data_step, slots.kept_data)
    )
    seen = seen._replace(keeps=jnp.zeros_like(keeps), is_kept=seen.is_kept | keeps)
    return ts._replace(slots=slots, validation=seen), keeps
