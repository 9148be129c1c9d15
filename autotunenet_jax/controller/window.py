"""Losses summed up over a stretch of steps; the highest one counts for nothing, since it may be a bad batch's."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .state import Window


def with_loss(window: Window, value: Float[Array, ""], counts: Bool[Array, ""]) -> Window:
    """The window with one more loss, if that counts."""
    lower = jnp.where(window.loss_count > 0, jnp.minimum(window.highest, value), 0.0)
    return window._replace(
        loss_sum=window.loss_sum + jnp.where(counts, lower, 0.0),
        loss_count=window.loss_count + counts,
        highest=jnp.where(counts, jnp.maximum(window.highest, value), window.highest),
    )


def without_losses(window: Window) -> Window:
    """The window with no loss in it."""
    zero = jnp.zeros_like(window.loss_sum)
    return window._replace(loss_sum=zero, loss_count=zero, highest=jnp.full_like(window.highest, -jnp.inf))


def mean(window: Window) -> Float[Array, ""]:
    """Mean of all losses but the highest; of one or two of all of them, of none NaN."""
    count = window.loss_count
    return jnp.where(count > 2, window.loss_sum / (count - 1.0), (window.loss_sum + window.highest) / count)
