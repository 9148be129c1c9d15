"""Losses summed up over a stretch of steps."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .state import Window

# Standard deviations above the others up to which the highest loss counts.
_REACH = 4.0


def with_loss(window: Window, value: Float[Array, ""], counts: Bool[Array, ""]) -> Window:
    """The window with one more loss, if that counts."""
    lower = jnp.where(counts & (window.loss_count > 0), jnp.minimum(window.highest, value), 0.0)
    return window._replace(
        loss_sum=window.loss_sum + lower,
        squares=window.squares + jnp.square(lower),
        loss_count=window.loss_count + counts,
        highest=jnp.where(counts, jnp.maximum(window.highest, value), window.highest),
    )


def without_losses(window: Window) -> Window:
    """The window with no loss in it."""
    zero, lowest = jnp.zeros_like(window.loss_sum), jnp.full_like(window.highest, -jnp.inf)
    return window._replace(loss_sum=zero, squares=zero, loss_count=zero, highest=lowest)


def mean(window: Window) -> Float[Array, ""]:
    """Mean of the losses; NaN of none."""
    return _mean(window, window.highest)


def robust_mean(window: Window) -> Float[Array, ""]:
    """The same, the highest within reach of the others: one that stands far out may be a bad batch's."""
    count = window.loss_count
    others = window.loss_sum / jnp.maximum(count - 1.0, 1.0)
    spread = jnp.sqrt(jnp.maximum(window.squares / jnp.maximum(count - 1.0, 1.0) - jnp.square(others), 0.0))
    # Of two, either may be the one that stands out.
    limit = jnp.where(count > 2, others + _REACH * spread, jnp.inf)
    return _mean(window, jnp.minimum(window.highest, limit))


def _mean(window: Window, highest: Array) -> Array:
    count = window.loss_count
    return jnp.where(count > 0, (window.loss_sum + highest) / count, jnp.nan)
