"""What lies ahead in ordinary training: losses that need no answer, which a host may therefore report later, together.

A host pays for each call of a compiled program, and on an accelerator for each loss that it waits for. The bounds here
are those of `tick`, as low as they can get while losses stay within them: a loss inside is healthy, whatever the others
were, and the state after all of them is the one that it would be had each been reported at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..compiler.precision import in_float32
from ..compiler.single_kernel import single_kernel
from ..space.search_space import SearchSpace
from . import loss_monitor, rollback, schedule, validation_monitor
from .plan import NEVER
from .state import TRAIN, TunerState, later
from .tick import FIRST_LOSSES, above_start, half_way_back

MOST = 16
"""Most losses that are reported together; all but the last of them may wait."""

# How far below its level, in standard deviations, a loss is still nothing to remark on. Records lower what counts as
# unusual, and the lower they may be the sooner an ordinary loss has to be reported at once.
_LOW_SIGMAS = 3.0


class Outlook(NamedTuple):
    """Steps that nothing will come of.

    Attributes:
      steps: How many of the next losses ask for nothing where all lie within the bounds; from 0 to `MOST`.
      low: Least such loss, in the loss's own unit.
      high: Greatest.
      verdict: On each of them.
      values: Hyperparameters in force now, after one of them, after two, and so on, by name.
    """

    steps: Int[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    verdict: Int[Array, ""]
    values: dict[str, Float[Array, "most"]]


def _steps(guard: loss_monitor.Guard, ts: TunerState) -> Int[Array, ""]:
    """Losses that come before anything is due by the plan, if the monitor is at ease."""
    health, monitor = ts.health, ts.health.monitor
    to_stall = guard.stall_steps - 1 - monitor.since_lowest
    left = jnp.minimum(rollback.steps_to_copy(ts), validation_monitor.steps_to_reading(ts))
    left = jnp.minimum(left, jnp.where(to_stall < 0, NEVER, to_stall).astype(jnp.int32))
    is_known = (monitor.count >= loss_monitor.FIRST_VALUES) & (ts.step - health.bad_steps >= FIRST_LOSSES)
    is_at_ease = is_known & (monitor.strikes == 0) & (health.bad_run == 0) & ~ts.validation.returns
    return jnp.clip(jnp.where((ts.phase == TRAIN) & is_at_ease, left, 0), 0, MOST)


def _bounds(guard: loss_monitor.Guard, ts: TunerState) -> tuple[Array, Array]:
    """Losses between these are healthy for `MOST` steps, in units of the first one."""
    health, monitor = ts.health, ts.health.monitor
    rate = jnp.maximum(1.0 / guard.window, 1.0 / (monitor.count + 1.0))
    # The spread loses no more than this share of itself, and a level that falls widens it by as much or more.
    kept = (1.0 - rate) ** MOST
    reach = guard.sigmas / loss_monitor.MEAN_ABS_DEVIATION
    spread = kept * monitor.spread
    low = monitor.level - _LOW_SIGMAS * monitor.spread / loss_monitor.MEAN_ABS_DEVIATION
    unusual = monitor.level + reach * spread
    ceiling = above_start(health, spread=spread, count=monitor.count + MOST)
    # The best level that is held may fall to the lowest of the losses.
    held = jnp.minimum(jnp.minimum(health.held_level, monitor.short), jnp.minimum(low, monitor.level))
    limit = jnp.maximum(half_way_back(health, held), held + reach * jnp.minimum(health.held_spread, spread))
    limit = jnp.maximum(limit, health.known_level + reach * spread)
    high = jnp.minimum(jnp.minimum(unusual, ceiling), limit)
    is_sure = (reach * kept * (1.0 - rate) >= 1.0) & (jnp.maximum(monitor.short, monitor.level) <= ceiling)
    return low, jnp.where(is_sure, high, -jnp.inf)


@single_kernel(static_argnums=(0,))
def _calm(guard: loss_monitor.Guard, ts: TunerState) -> tuple[Array, Array, Array, Array]:
    """All of an outlook but the values."""
    low, high = _bounds(guard, ts)
    steps = jnp.where(low < high, _steps(guard, ts), 0).astype(jnp.int32)
    is_stalled = ts.health.monitor.since_lowest >= guard.stall_steps
    verdict = jnp.where(is_stalled, loss_monitor.STALLED, loss_monitor.HEALTHY).astype(jnp.int32)
    return steps, low * ts.health.scale, high * ts.health.scale, verdict


@in_float32
def outlook(
    guard: loss_monitor.Guard, space: SearchSpace, shape: schedule.Shape, warmup_steps: int, ts: TunerState
) -> Outlook:
    """What lies ahead of a state. Pure; O(1)."""

    def in_force(steps: Array) -> dict[str, Array]:
        values = schedule.in_force(space, shape, warmup_steps, later(ts, steps))
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    # One after the other: side by side they would be rounded otherwise than each by itself.
    values = jax.lax.map(in_force, jnp.arange(MOST, dtype=jnp.int32))
    steps, low, high, verdict = _calm(guard, ts)
    return Outlook(steps, low, high, verdict, values)
