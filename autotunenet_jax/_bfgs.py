"""A quasi-Newton minimiser for a batch of small problems in one compiled loop."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Largest change of one coordinate in one iteration; coordinates are logarithms here.
_MAX_STEP = 1.5


def minimise(
    objective: Callable[[Float[Array, "p"]], tuple[Float[Array, ""], Float[Array, "p"]]],
    start: Float[Array, "p"],
    low: Float[Array, "p"],
    high: Float[Array, "p"],
    *,
    steps: int,
) -> tuple[Float[Array, "p"], Float[Array, ""]]:
    """BFGS in a box that evaluates the objective once per iteration.

    A step that does not improve, or meets a non-finite value, is tried again at a quarter of its length. Without an
    inner line search the problems of a ``vmap`` move in lockstep at no waste.

    Args:
      objective: Value and gradient.
      start: Where to begin, inside the box.
      low: Lower corner of the box.
      high: Upper corner.
      steps: Static number of iterations.

    Returns:
      The best point met and its value; infinite if the objective was finite nowhere.

    Cost:
      ``steps + 1`` evaluations.
    """
    size = start.shape[0]
    identity = jnp.eye(size, dtype=jnp.float32)

    def step(carry, _):
        theta, value, gradient, inverse, length = carry
        direction = -inverse @ gradient
        direction *= jnp.minimum(1.0, _MAX_STEP / jnp.maximum(jnp.max(jnp.abs(direction)), 1e-20))
        trial = jnp.clip(theta + length * direction, low, high)
        move = trial - theta
        trial_value, trial_gradient = objective(trial)
        is_sane = jnp.isfinite(trial_value) & jnp.all(jnp.isfinite(trial_gradient))
        is_better = is_sane & (trial_value <= value + 1e-4 * jnp.sum(gradient * move))
        bend = jnp.where(is_sane, trial_gradient - gradient, 0.0)
        curvature = jnp.sum(move * bend)
        can_learn = is_better & (curvature > 1e-6 * jnp.sum(jnp.square(move)))
        rho = jnp.where(can_learn, 1.0 / jnp.where(can_learn, curvature, 1.0), 0.0)
        left = identity - rho * move[:, None] * bend[None, :]
        updated = left @ inverse @ left.T + rho * move[:, None] * move[None, :]
        inverse = jnp.where(can_learn, updated, inverse)
        length = jnp.where(is_better, 1.0, 0.25 * length)
        keep = functools.partial(jnp.where, is_better)
        return (keep(trial, theta), keep(trial_value, value), keep(trial_gradient, gradient), inverse, length), None

    # The first iteration evaluates the start itself, so that the objective appears once in the compiled program.
    carry = (start, jnp.float32(jnp.inf), jnp.zeros_like(start), 0.1 * identity, jnp.float32(1.0))
    (theta, value, *_), _ = jax.lax.scan(step, carry, length=steps + 1)
    return theta, value
