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
    others, spread = _others(window)
    # Of two, either may be the one that stands out.
    limit = jnp.where(window.loss_count > 2, others + _REACH * spread, jnp.inf)
    return _mean(window, jnp.minimum(window.highest, limit))


def lies_below(window: Window, level: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the losses lie below a level by more than their own spread."""
    return robust_mean(window) + _others(window)[1] < level


def _others(window: Window) -> tuple[Array, Array]:
    """Mean and standard deviation of all losses but the highest."""
    count = jnp.maximum(window.loss_count - 1.0, 1.0)
    mean = window.loss_sum / count
    return mean, jnp.sqrt(jnp.maximum(window.squares / count - jnp.square(mean), 0.0))


def _mean(window: Window, highest: Array) -> Array:
    count = window.loss_count
    return jnp.where(count > 0, (window.loss_sum + highest) / count, jnp.nan)
