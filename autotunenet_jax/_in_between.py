"""Where the choice of a round may fall besides its forks, and what it is judged by: its surroundings."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._policy import Directions, Policy, directions
from ._space import SearchSpace

# Between the best fork and each other one, the points where the choice may fall; 0 is the fork itself.
BETWEEN = (0.0, 0.25, 0.5, 0.75)

# What a rate lowered, kept and raised weighs where a choice is judged by its surroundings.
WEIGHTS = (0.25, 0.5, 0.25)


def between(
    policy: Policy, space: SearchSpace, x: Float[Array, "forks d"], best: Array, is_scored: Array
) -> tuple[Float[Array, "p d"], Array]:
    """Points on the way from the best fork to the other ones, snapped, and which of them exist.

    Rates stay near those of that fork: where the scores of distant ones are no worse, forks are too short to tell.
    """
    space_of = directions(space)
    pivot = x[best]
    # Between two options without order there is nothing.
    step = jnp.where(jnp.asarray(space.is_categorical), 0.0, x - pivot)
    step *= jnp.asarray(BETWEEN, jnp.float32)[:, None, None]
    reach = jnp.where(space_of.is_rate, policy.reach_decades / space_of.decades, jnp.inf)
    points = pivot + step / jnp.maximum(jnp.max(jnp.abs(step) / reach, axis=-1, keepdims=True), 1.0)
    return space.snap(points.reshape(-1, x.shape[1])), jnp.tile(is_scored, len(BETWEEN))


def around(policy: Policy, space_of: Directions, x: Float[Array, "p d"]) -> Float[Array, "q d"]:
    """The points with their rates lowered, kept and raised: one after the other, in the order of the weights."""
    step = jnp.where(jnp.asarray(space_of.is_rate), policy.blur_decades / jnp.asarray(space_of.decades), 0.0)
    return jnp.concatenate([jnp.clip(x + sign * step, 0.0, 1.0) for sign in (-1.0, 0.0, 1.0)])
