"""Validation outside rounds: when training fits what does not generalise, back to the best state, at a lower rate."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._plan import only_raises
from ._state import TRAIN, TunerState, Validation

# What the last bend weighs in the running mean of them: two or three that happen to be small say little, and one large
# one, of a loss that jumped and came back, is forgotten.
_NEWS = 0.3
# A metric this share of its whole improvement above its best, and as much as its noise explains, so many times in a
# row, has risen for good. Of independent noise a bend is two standard deviations on average, and the best of a hundred
# metrics lies two and a half below them.
_RISE_SHARE = 0.005
_RISE_BENDS = 2.0
_RISES = 2
_RISE_RETREAT_DECADES = 1.0
# In the last part of the budget one such rise is enough, and what counts as noise is what there is of late.
_ENDING_SHARE = 0.125
# Metrics after the best one, so many and over this share of the budget, have failed to follow the training loss if
# together they lie further than noise explains above what half of its fall would have made of them. The best of many
# is lower than it should be by about so many bends.
_LATER, _LATER_SHARE = 3, 0.15
_FOLLOWING, _LARGEST_UNIT = 0.5, 10.0
_LUCK, _LATER_BENDS = 1.5, 2.0
# The decay waits while metrics fall from one to the next, this share of the budget apart: about a tenth.
_WAIT_SHARE = 0.09


def is_worse(ts: TunerState) -> Bool[Array, ""]:
    """Whether the last metric has risen above the best one, or training had to go back for such a one before."""
    seen = ts.validation
    margin = _RISE_SHARE * jnp.maximum(seen.first - seen.best, 0.0) + _RISE_BENDS * seen.noise
    return (ts.eval_level > seen.best + margin) | (seen.retreats > 0)


def measured_from(
    ts: TunerState, metric: Float[Array, ""], level: Float[Array, ""], *, is_kept: Bool[Array, ""]
) -> Validation:
    """Later metrics are to better this one, whatever came before it.

    Args:
      ts: State now.
      metric: float32 scalar.
      level: Level of the training loss that goes with it.
      is_kept: Whether the kept state is the one it was measured on.
    """
    zero, no = jnp.zeros((), jnp.float32), jnp.zeros((), bool)
    return ts.validation._replace(
        best=metric,
        level=level,
        at=ts.step,
        later=zero,
        away=zero,
        bends=zero,
        rises=jnp.zeros_like(ts.validation.rises),
        keeps=no,
        is_kept=is_kept,
    )


def validate(
    retreat: Callable[[Array, Array], Array], ts: TunerState, metric: Float[Array, ""], is_settled: Bool[Array, ""]
) -> TunerState:
    """Takes a validation metric in.

    Training fits what does not generalise where the metric rises above its best, or all in all does not follow, while
    the training loss keeps falling. It then goes on from the best state at a lower rate, which near the end the
    schedule sees to. While a round is still to come, that round has the better remedies. A decay that waits waits no
    longer once the metric has stopped falling.

    Args:
      retreat: ``(u, decades) -> u``; lowers the rates among the hyperparameters ``u`` (unit cube).
      ts: State before.
      metric: float32 scalar, to be minimised.
      is_settled: Whether it is a finite metric of ordinary training.

    Returns:
      The state; the way back is asked for by the next step.
    """
    seen, level = ts.validation, ts.guard.short
    first = jnp.where(is_settled & jnp.isnan(seen.first), metric, seen.first)
    is_best = is_settled & (metric < seen.best)
    change = metric - seen.last
    bend = jnp.abs(change - seen.change)
    noise = jnp.where(seen.noise > 0.0, seen.noise + _NEWS * (bend - seen.noise), bend)
    noise = jnp.where(is_settled & jnp.isfinite(bend), noise, seen.noise)
    # While there is time to wait, all bends since the best metric count.
    typical = jnp.maximum(noise, seen.bends / jnp.maximum(seen.later, 1.0))
    limit = seen.best + _RISE_SHARE * jnp.maximum(first - seen.best, 0.0)
    # Nothing has risen beyond a noise that is not known yet.
    is_above = is_settled & (metric > limit) & (level < seen.level) & (noise > 0.0)
    has_risen = is_above & (metric > limit + _RISE_BENDS * typical)
    rises = jnp.where(has_risen, seen.rises + 1, jnp.where(is_settled, 0, seen.rises))
    is_last = only_raises(ts.plan, ts.round.index) & (ts.phase == TRAIN)
    counts = is_settled & is_last & ~is_best & jnp.isfinite(seen.best)
    later = seen.later + counts
    # What the metric fell by while the training loss fell by one.
    unit = jnp.clip((first - seen.best) / jnp.maximum(ts.initial_loss - seen.level, 1e-12), 0.0, _LARGEST_UNIT)
    away = seen.away + jnp.where(counts, metric - seen.best + _FOLLOWING * unit * (seen.level - level), 0.0)
    bends = seen.bends + jnp.where(counts & jnp.isfinite(bend), bend, 0.0)
    explained = bends * (_LUCK + _LATER_BENDS / jnp.sqrt(jnp.maximum(later, 1.0)))
    budget = jnp.where(ts.plan.total > 0, ts.plan.total, ts.step)
    is_long = (later >= _LATER) & (ts.step - seen.at >= _LATER_SHARE * budget)
    fails = counts & is_long & (level < seen.level) & (away > explained)
    retreats = ((rises >= _RISES) | fails) & is_last
    starts_anew = is_best | retreats
    # Towards the end the schedule has lowered the rates already, and no time is left to wait and see.
    is_ending = (ts.plan.total > 0) & (ts.plan.total - ts.step <= _ENDING_SHARE * ts.plan.total)
    ends = is_above & (metric > limit + _RISE_BENDS * noise) & is_last & is_ending & ~retreats
    goes_back = (retreats | ends) & seen.is_kept
    marks = is_settled & (jnp.isnan(seen.mark) | (ts.step - seen.marked >= _WAIT_SHARE * budget))
    waits = ~(retreats | goes_back) & (~marks | ~(metric >= seen.mark))
    return ts._replace(
        hold=jnp.where(waits, ts.hold, 0.0),
        incumbent=jnp.where(retreats, retreat(ts.incumbent, jnp.float32(_RISE_RETREAT_DECADES)), ts.incumbent),
        validation=Validation(
            first=first,
            best=jnp.where(is_best, metric, seen.best),
            level=jnp.where(is_best, level, seen.level),
            # Neither the fall from the untrained state nor that on the way back is noise.
            last=jnp.where(goes_back, jnp.nan, jnp.where(is_settled & (ts.step > 0), metric, seen.last)),
            change=jnp.where(goes_back, jnp.nan, jnp.where(is_settled, change, seen.change)),
            noise=jnp.where(goes_back, 0.0, noise),
            at=jnp.where(starts_anew, ts.step, seen.at),
            mark=jnp.where(marks, metric, seen.mark),
            marked=jnp.where(marks, ts.step, seen.marked),
            later=jnp.where(starts_anew, 0.0, later),
            away=jnp.where(starts_anew, 0.0, away),
            bends=jnp.where(starts_anew, 0.0, bends),
            rises=jnp.where(retreats, 0, rises),
            retreats=seen.retreats + (retreats | goes_back),
            keeps=seen.keeps | (is_best & is_last),
            returns=goes_back,
            is_kept=seen.is_kept & ~is_best,
        ),
    )
