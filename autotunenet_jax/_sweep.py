"""The range sweep: the rate climbs from bound to bound, and where the loss falls tells where the best rate is."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._plan import MAX_SWEEP
from ._state import Sweep

_MEMORY = 0.75

# First part of the sweep, whose rates are too low to do anything: what the loss is before it falls.
_START_SHARE, _START_LEAST = 0.2, 2

# Width of the moving average, as a share of the sweep and at the least.
_WINDOW_SHARE, _WINDOW_LEAST = 0.1, 3

# The fall is located by where half of it and nine tenths of it are done.
_MARKS = (0.5, 0.9)

# A fall of this many times the noise of one loss is trusted as much as what is known without it.
_DOUBT = 4.0


def begun() -> Sweep:
    """Before the first step."""
    zero = jnp.zeros((), jnp.float32)
    return Sweep(zero, zero, jnp.zeros(MAX_SWEEP, jnp.float32), jnp.zeros((), jnp.int32))


def update(sweep: Sweep, pos: Array, loss: Array, spread: Array) -> Sweep:
    """Takes one loss in."""
    # One wild value is no trend: it enters the running mean clipped, and only several of them end the sweep.
    reach = sweep.smooth + jnp.maximum(sweep.losses[0] - sweep.lowest, 0.0) + 4.0 * spread
    clipped = jnp.where(pos >= 2, jnp.minimum(loss, reach), loss)
    weight = _MEMORY * (1.0 - _MEMORY**pos) / (1.0 - _MEMORY ** (pos + 1.0))
    smooth = jnp.where(pos == 0, loss, weight * sweep.smooth + (1.0 - weight) * clipped)
    is_lowest = (pos == 0) | (smooth < sweep.lowest)
    return Sweep(
        smooth=smooth,
        lowest=jnp.where(is_lowest, smooth, sweep.lowest),
        losses=jnp.where(jnp.arange(sweep.losses.size) == pos, loss, sweep.losses),
        count=(pos + 1).astype(jnp.int32),
    )


def is_blown(sweep: Sweep, spread: Array, pos: Array) -> Bool[Array, ""]:
    """Whether the sweep has gone past the rates worth trying; its remaining steps would teach nothing."""
    return (pos >= 6) & (sweep.smooth > sweep.lowest + 0.5 * (sweep.losses[0] - sweep.lowest) + 4.0 * spread)


def read(sweep: Sweep, length: Array) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Where the loss fell.

    Returns:
      Three scalars: the middle of the fall and the end of the sweep, as shares of the range, and how far the middle is
      to be trusted, in [0, 1).
    """
    at = np.arange(sweep.losses.size)
    count = jnp.maximum(sweep.count, 1)
    n = count.astype(jnp.float32)
    is_used = at < count
    ones = np.ones(at.size, np.float32)

    # Medians of three: one lucky or wild batch is no trend.
    centre = jnp.clip(at, 1, jnp.maximum(count - 2, 1))
    a, b, c = (sweep.losses[centre + shift] for shift in (-1, 0, 1))
    losses = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    losses = jnp.where(count >= 3, losses, sweep.losses)

    def mean(which):
        weight = (which & is_used).astype(jnp.float32)
        return (weight @ losses) / jnp.maximum(weight @ ones, 1.0)

    # Sums over a window, clipped at either end: the share of the ones is its width.
    half = jnp.maximum(jnp.round(_WINDOW_SHARE * n), _WINDOW_LEAST) / 2.0
    near = ((jnp.abs(at[:, None] - at[None, :]) <= half) & is_used[None, :]).astype(jnp.float32)
    smooth = (near @ losses) / jnp.maximum(near @ ones, 1.0)
    start = mean(at < jnp.maximum(jnp.round(_START_SHARE * n), _START_LEAST))
    lowest = jnp.min(jnp.where(is_used, smooth, jnp.inf))
    fall = jnp.maximum(start - lowest, 0.0)

    # A loss is measured before its step is taken: it shows what the rate of the step before did.
    def crossing(share):
        return jnp.maximum(jnp.argmax(is_used & (smooth <= start - share * fall)) - 1, 0)

    unit = jnp.maximum(length - 1, 1).astype(jnp.float32)
    middle = sum(crossing(share) for share in _MARKS) / len(_MARKS) / unit
    change = jnp.square(jnp.diff(sweep.losses))
    is_early = (at[1:] < jnp.maximum(0.5 * n, 3)).astype(jnp.float32)
    noise = jnp.sqrt(0.5 * (is_early @ change) / jnp.maximum(is_early @ ones[1:], 1.0))
    signal = jnp.square(fall)
    trust = signal / jnp.maximum(signal + jnp.square(_DOUBT * noise), 1e-30)
    return middle, (count - 1) / unit, trust
