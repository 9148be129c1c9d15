"""The cheap half of the controller, once per training step: hear the loss, and let the phase's handler answer it.

Everything here is O(1) in the length of the run and free of linear algebra; the costly half is in ``decision``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..compiler.single_kernel import single_kernel
from ..space.search_space import SearchSpace
from . import fork_round, loss_monitor, range_test, rollback
from .plan import NEVER
from .roles import roles_of
from .rollback import select
from .state import FORK, SWEEP, TRAIN, Directive, TunerState

_FIRST_LOSSES = 4


def ceiling(ts: TunerState) -> Float[Array, ""]:
    """A loss that training which is still healthy does not stay above: well over where the run began."""
    health = ts.health
    progress = jnp.maximum(health.initial_loss - health.best_level, 0.0)
    limit = health.initial_loss + 0.5 * progress + 6.0 * health.monitor.spread
    return jnp.where(ts.step >= _FIRST_LOSSES, limit, jnp.inf)


def _advanced(ts: TunerState, heard: loss_monitor.Heard) -> TunerState:
    """The state one step later, with what every phase takes from a loss."""
    health = ts.health
    is_unknown = jnp.isnan(health.initial_loss)
    is_first = ((ts.step < _FIRST_LOSSES) | is_unknown) & heard.is_finite
    mean = health.initial_loss + (heard.value - health.initial_loss) / (ts.step + 1.0)
    mean = jnp.where(is_unknown, heard.value, mean)
    is_settled = heard.is_finite & (heard.after.count >= _FIRST_LOSSES)
    health = health._replace(
        monitor=heard.after,
        initial_loss=jnp.where(is_first, mean, health.initial_loss),
        best_level=jnp.where(is_settled, jnp.minimum(health.best_level, heard.after.short), health.best_level),
    )
    return ts._replace(step=ts.step + 1, data_step=ts.data_step + 1, segment_left=ts.segment_left - 1, health=health)


def _tick(
    guard: loss_monitor.Guard, space: SearchSpace, ts: TunerState, loss: Array
) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes the loss of one step in.

    Args:
      guard: Thresholds of the monitor.
      space: What is tuned.
      ts: State before.
      loss: Scalar, float32.

    Returns:
      The state, what the loop must do, and whether a decision is due.
    """
    heard = loss_monitor.hear(
        guard,
        ts.health.monitor,
        loss,
        in_train=ts.phase == TRAIN,
        initial_loss=ts.health.initial_loss,
        ceiling=ceiling(ts),
    )
    after = _advanced(ts, heard)
    result = rollback.step(guard, roles_of(space), after, heard)
    result = select(ts.phase == SWEEP, range_test.step(after, heard), result)
    new, directive, due = select(ts.phase == FORK, fork_round.step(after, heard), result)
    since = jnp.minimum(new.health.since_rollback + 1, NEVER)
    return new._replace(health=new.health._replace(since_rollback=since)), directive, due


tick = single_kernel(static_argnums=(0, 1))(_tick)
