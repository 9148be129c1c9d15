"""The range test: the rates climb from bound to bound, and where the loss falls tells where to begin.

Source: Smith, "Cyclical learning rates for training neural networks" (WACV 2017), section 3.3; read by its fall instead
of its steepest or lowest place, which noise and plateaus move by decades.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from . import loss_monitor
from .loss_monitor import Heard
from .roles import Roles
from .state import Directive, RangeTest, TunerState, nothing_to_do, position

ABOVE_FALL = 0.3
"""So many decades above the middle of the fall a line search begins."""

# Or so many below where the loss blows up, where no fall stands out from noise.
_BELOW_END = 0.8
# The middle of the fall is half way between where these shares of it are done.
_MARKS = (0.5, 0.9)
# Standard deviations of one loss by which a fall, or a rise, stands out from noise.
_FALL_SIGMAS, _RISE_SIGMAS = 3.0, 4.0
# Losses of equal value have no noise; a fall within this share of them is rounding.
_ROUNDING = 1e-6
# First losses, at rates too low to do anything: what the loss is before it falls, and what its noise is.
_FIRST = 6


def _median(a: Array, b: Array, c: Array) -> Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _median_of_five(a: Array, b: Array, c: Array, d: Array, e: Array) -> Array:
    lower = jnp.maximum(jnp.minimum(a, b), jnp.minimum(c, d))
    return _median(lower, jnp.minimum(jnp.maximum(a, b), jnp.maximum(c, d)), e)


def _limit(test: RangeTest, lowest: Array) -> tuple[Array, Array, Array]:
    """What the loss was to begin with, its noise, and above what it has blown up."""
    first = test.losses[: _FIRST + 2]
    start = jnp.mean(_median(first[:-2], first[1:-1], first[2:]))
    noise = jnp.sqrt(0.5 * jnp.mean(jnp.square(jnp.diff(first))))
    return start, noise, start + jnp.maximum(_RISE_SIGMAS * noise, 0.5 * jnp.maximum(start - lowest, 0.0))


def is_blown(test: RangeTest) -> Bool[Array, ""]:
    """Whether the rates have gone past those worth trying; the remaining steps would teach nothing."""
    at = np.arange(test.losses.size)
    lowest = jnp.min(jnp.where(at < test.count, test.losses, jnp.inf))
    last = [test.losses[jnp.maximum(test.count - k, 0)] for k in range(1, 6)]
    return (test.count > _FIRST + 2) & (_median_of_five(*last) > _limit(test, lowest)[2])


def read(test: RangeTest, length: Array, decades: float) -> Float[Array, ""]:
    """Where to begin, as a share of the range."""
    at = np.arange(test.losses.size)
    count = jnp.maximum(test.count, 3)
    # Medians of three, then means of three: one lucky or wild batch is no trend.
    middle = jnp.clip(at, 1, count - 2)
    calm = _median(*(test.losses[middle + k] for k in (-1, 0, 1)))
    smooth = sum(calm[jnp.clip(at + k, 0, count - 1)] for k in (-1, 0, 1)) / 3.0
    used = jnp.where(at < count, smooth, jnp.inf)
    start, noise, limit = _limit(test, jnp.min(used))
    # From where it does not come back.
    end = jnp.minimum(jnp.max(jnp.where((at < count) & (smooth <= limit), at + 1, 0)), count - 1)
    lowest = jnp.min(jnp.where(at < jnp.maximum(end, 1), used, jnp.inf))
    fall = start - lowest
    done = [jnp.argmax((at < count) & (smooth <= start - share * fall)) for share in _MARKS]
    unit = jnp.maximum(length - 1, 1).astype(jnp.float32)
    by_fall = 0.5 * (done[0] + done[1]) / unit + ABOVE_FALL / decades
    by_end = end / unit - _BELOW_END / decades
    stands_out = fall > _FALL_SIGMAS * noise + _ROUNDING * jnp.abs(start)
    return jnp.clip(jnp.where(stands_out, by_fall, by_end), 0.0, 1.0)


def begin_at(roles: Roles, ts: TunerState) -> Float[Array, "d"]:
    """The hyperparameters in force, with the rates where the test that just ended says."""
    widths = roles.decades[roles.is_rate]
    width = float(widths.mean()) if widths.size else 1.0
    share = read(ts.range_test, ts.segment_length, width)
    return jnp.where(roles.is_rate, share, ts.incumbent)


def step(ts: TunerState, heard: Heard) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes in one loss of a range test.

    Returns:
      The state, what the loop must do, and whether the test has ended.
    """
    pos = position(ts) - 1
    # A bad batch says what the one before it said.
    before = ts.range_test
    loss = jnp.where(heard.is_finite, heard.value, before.losses[jnp.maximum(before.count - 1, 0)])
    losses = jnp.where(np.arange(before.losses.size) == pos, loss, before.losses)
    test = RangeTest(losses, (pos + 1).astype(jnp.int32))
    faulted = heard.is_blue & (ts.health.retries < loss_monitor.MAX_RETRIES)
    ends = (ts.segment_left <= 0) | heard.unhealthy | is_blown(test)
    ts = ts._replace(range_test=test, health=ts.health._replace(has_faulted=faulted))
    return ts, nothing_to_do(ts, heard.verdict), ends
