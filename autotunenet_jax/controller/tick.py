"""The cheap half of the controller, once per training step: hear the loss, and let the phase's handler answer it.

Everything here is O(1) in the length of the run and free of linear algebra; the costly half is in ``decision``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..compiler.single_kernel import single_kernel
from ..space.search_space import SearchSpace
from . import fork_score, loss_monitor, range_test, rollback
from .plan import FAST, NEVER
from .roles import roles_of
from .rollback import select
from .state import FORK, SWEEP, TRAIN, Directive, Health, TunerState, position

FIRST_LOSSES = 4
"""Good losses whose mean is where the run began."""

# Values from which the spread of a loss is known.
_SPREAD_VALUES = 20.0


def above_start(health: Health, *, spread: Array, count: Array) -> Float[Array, ""]:
    """A loss well over where the run began, by a spread that was seen in so many losses."""
    progress = jnp.maximum(health.initial_loss - health.best_level, 0.0)
    # A few values may lie close together by chance.
    doubt = jnp.maximum(1.0, _SPREAD_VALUES / jnp.maximum(count, 1))
    return health.initial_loss + 0.5 * progress + 6.0 * doubt * spread


def half_way_back(health: Health, held: Array) -> Float[Array, ""]:
    """A loss that has lost half of what was gained from the start to a level that was held."""
    return held + 0.5 * jnp.maximum(health.initial_loss - held, 0.0)


def ceiling(ts: TunerState) -> Float[Array, ""]:
    """A loss that training which is still healthy does not stay above.

    Other regularisation may be a part of the loss, so that it stands elsewhere: slow forks are judged by the metric.
    """
    health = ts.health
    limit = above_start(health, spread=health.monitor.spread, count=health.monitor.count)
    is_slow_fork = (ts.phase == FORK) & (ts.plan.kind[ts.round.index] != FAST)
    return jnp.where((ts.step - health.bad_steps >= FIRST_LOSSES) & ~is_slow_fork, limit, jnp.inf)


def _limit(guard: loss_monitor.Guard, ts: TunerState) -> Float[Array, ""]:
    """A loss above this is no noise, has lost half of what was gained, and is more than data was seen to cost."""
    health = ts.health
    reach = guard.sigmas / loss_monitor.MEAN_ABS_DEVIATION
    half_way = half_way_back(health, health.held_level)
    known = health.known_level + reach * jnp.maximum(health.held_spread, health.monitor.spread)
    limit = jnp.maximum(jnp.maximum(half_way, health.held_level + reach * health.held_spread), known)
    return jnp.where((ts.phase == TRAIN) & (health.held_level < jnp.inf), limit, jnp.inf)


def is_wrecked(guard: loss_monitor.Guard, ts: TunerState, loss: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the loss of a state, in ordinary training, says that the state is not worth keeping.

    It is not finite, or no noise above the best level that was held and half way back to where training began.
    """
    _, loss = _scaled(ts, jnp.asarray(loss, jnp.float32))
    return ~jnp.isfinite(loss) | (loss > _limit(guard, ts))


def _scaled(ts: TunerState, loss: Array) -> tuple[TunerState, Array]:
    """The loss in units of the first one, rounded to a power of two: whatever the unit, nothing overflows."""
    scale = ts.health.scale
    is_first = (scale == 0.0) & jnp.isfinite(loss) & (loss != 0.0)
    scale = jnp.where(is_first, loss_monitor.magnitude(loss), scale)
    return ts._replace(health=ts.health._replace(scale=scale)), loss / jnp.where(scale == 0.0, 1.0, scale)


def _advanced(ts: TunerState, heard: loss_monitor.Heard) -> TunerState:
    """The state one step later, with what every phase takes from a loss."""
    health = ts.health
    is_unknown = jnp.isnan(health.initial_loss)
    good_steps = ts.step - health.bad_steps
    is_first = ((good_steps < FIRST_LOSSES) | is_unknown) & heard.is_finite
    mean = health.initial_loss + (heard.value - health.initial_loss) / (good_steps + 1.0)
    mean = jnp.where(is_unknown, heard.value, mean)
    has_level = heard.is_finite & (heard.after.count >= FIRST_LOSSES)
    is_usual = has_level & (ts.phase == TRAIN) & (heard.verdict == loss_monitor.HEALTHY)
    is_held = is_usual & (heard.after.short < health.held_level)
    health = health._replace(
        monitor=heard.after,
        initial_loss=jnp.where(is_first, mean, health.initial_loss),
        best_level=jnp.where(has_level, jnp.minimum(health.best_level, heard.after.short), health.best_level),
        held_level=jnp.where(is_held, heard.after.short, health.held_level),
        held_spread=jnp.where(is_held, heard.after.spread, health.held_spread),
        bad_run=heard.bad_run,
        bad_steps=health.bad_steps + ~heard.is_finite,
    )
    # A range test or fork begins with a batch that is good.
    waits = (ts.phase != TRAIN) & (position(ts) == 0) & ~heard.is_finite
    is_opening = (ts.phase == SWEEP) | (ts.round.fork == 0)
    data_step = ts.data_step + 1
    return ts._replace(
        step=ts.step + 1,
        data_step=data_step,
        segment_left=ts.segment_left - ~waits,
        slots=ts.slots._replace(saved_data=jnp.where(waits & is_opening, data_step, ts.slots.saved_data)),
        health=health,
    )


def _tick(
    guard: loss_monitor.Guard, space: SearchSpace, ts: TunerState, loss: Array
) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes the loss of one step in.

    Returns:
      The state, what the loop must do, and whether a decision is due.
    """
    ts, loss = _scaled(ts, loss)
    heard = loss_monitor.hear(
        guard,
        ts.health.monitor,
        loss,
        bad_run=ts.health.bad_run,
        in_train=ts.phase == TRAIN,
        initial_loss=ts.health.initial_loss,
        ceiling=ceiling(ts),
        limit=_limit(guard, ts),
        known=ts.health.known_level,
    )
    after = _advanced(ts, heard)
    result = rollback.step(guard, roles_of(space), after, heard)
    result = select(ts.phase == SWEEP, range_test.step(after, heard), result)
    new, directive, due = select(ts.phase == FORK, fork_score.step(after, heard), result)
    since = jnp.minimum(new.health.since_rollback + 1, NEVER)
    return new._replace(health=new.health._replace(since_rollback=since)), directive, due


tick = single_kernel(static_argnums=(0, 1))(_tick)
