"""Readings overrule: where the held-out metric does not improve, training goes back to its best state, slower.

Early stopping, decay on a plateau and rewind in one. Only the order of readings counts, so any metric will do. Where
there is none the training loss takes its place: it cannot say which state is the better one, so that nothing is
undone, and it may rise for reasons of its own, so that rates fall by it once.

Source: Prechelt, "Early stopping, but when?" (1998); the decay is ReduceLROnPlateau's of Keras and PyTorch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .loss_monitor import Heard
from .plan import NEVER
from .roles import Roles
from .state import FORK, TRAIN, TunerState

PATIENCE = 2
"""Readings in a row above the lowest, a twentieth of the budget apart, after which the rates cool down for one more."""

BACK_DECADES = 0.5
"""How far the rates fall where training goes back."""

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
    # A metric that is not finite makes the fork's score NaN, and so the fork a failure.
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


def hear(roles: Roles, ts: TunerState, heard: Heard) -> TunerState:
    """Takes a training loss in: where there is no metric, the mean between two readings is one."""
    seen, plan, window = ts.validation, ts.plan, ts.window
    total = window.loss_sum + jnp.where(heard.is_finite, heard.value, 0.0)
    count = window.loss_count + heard.is_finite
    is_over = ts.step % plan.check_every == 0
    counts = is_over & jnp.isnan(seen.level) & (plan.total > 0) & (count >= _SPACING * plan.check_every)
    value = total / count
    worse = jnp.where(value < seen.hot, 0, seen.worse + 1)
    is_ending = plan.total - ts.step < ENDING_SHARE * plan.total
    falls = counts & (worse >= PATIENCE) & ~is_ending & ~seen.has_fallen
    hot = jnp.where(falls, jnp.inf, jnp.minimum(value, seen.hot))
    # What an unhealthy stretch held is answered by the rollback.
    begins = is_over | heard.unhealthy
    return ts._replace(
        incumbent=jnp.where(falls, roles.shifted(ts.incumbent, -BACK_DECADES), ts.incumbent),
        window=window._replace(loss_sum=jnp.where(begins, 0.0, total), loss_count=jnp.where(begins, 0.0, count)),
        validation=seen._replace(
            hot=jnp.where(counts, hot, seen.hot),
            worse=jnp.where(counts, jnp.where(falls, 0, worse), seen.worse),
            has_fallen=seen.has_fallen | falls,
        ),
    )


def _read(roles: Roles, ts: TunerState, metric: Array, in_train: Bool[Array, ""]) -> TunerState:
    seen, total = ts.validation, ts.plan.total
    is_last = (total > 0) & (total - ts.step <= 1)
    is_ending = (total > 0) & (total - ts.step < ENDING_SHARE * total)
    # Whatever is not finite is worse than anything.
    value = jnp.where(jnp.isfinite(metric), metric, jnp.inf)
    counts = in_train & (is_last | (ts.step - seen.read_at >= _SPACING * ts.plan.check_every))
    # However close two readings are, the better state is kept.
    is_best = in_train & (value < seen.best) & (counts | ~seen.returns)
    # A rate that is only too hot to hold shows in a state that cools to a better one: then it was worth its height.
    is_cooled = counts & (seen.cools_from < NEVER)
    retreats = is_cooled & ~is_best & seen.is_kept
    returns = retreats | (counts & ~is_best & is_last & seen.is_kept)
    worse = jnp.where(counts, jnp.where(value < seen.hot, 0, seen.worse + 1), seen.worse)
    cools = counts & ~is_cooled & (worse >= PATIENCE) & ~is_ending & jnp.isfinite(seen.best)
    hot = jnp.where(counts & ~is_cooled, jnp.minimum(value, seen.hot), seen.hot)
    # Back there, what was reached before is to be bettered; from a cooled state hot readings begin anew.
    hot = jnp.where(is_cooled, jnp.where(is_best, jnp.inf, seen.best), hot)
    return ts._replace(
        incumbent=jnp.where(retreats, roles.shifted(ts.incumbent, -BACK_DECADES), ts.incumbent),
        validation=seen._replace(
            best=jnp.where(is_best, value, seen.best),
            hot=hot,
            read_at=jnp.where(counts, ts.step, seen.read_at),
            worse=jnp.where(is_cooled | cools, 0, worse),
            cools_from=jnp.where(cools, ts.step, jnp.where(is_cooled, NEVER, seen.cools_from)),
            retreats=seen.retreats + returns,
            keeps=(seen.keeps | is_best) & ~returns,
            returns=jnp.where(counts, returns, seen.returns),
            is_kept=seen.is_kept & ~is_best,
        ),
    )


def kept_at_once(ts: TunerState) -> tuple[TunerState, Bool[Array, ""]]:
    """The state after a metric, if a host that has the measured state at hand copies it over the kept one now.

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
