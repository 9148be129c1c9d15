"""A quasi-Newton minimiser for many small problems in one compiled loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The first step is this share of the gradient, in squared units of the scale; the largest is this many scales.
_FIRST = 0.1
_LARGEST = 1.5


def minimise(
    objective: Callable[[Float[Array, "p"]], tuple[Float[Array, ""], Float[Array, "p"], Any]],
    seeds: Float[Array, "c p"],
    *,
    low: Float[Array, "p"],
    high: Float[Array, "p"],
    scale: Float[Array, "p"],
    steps: int,
) -> tuple[Float[Array, "p"], Float[Array, ""], Any]:
    """BFGS in a box from the best of several seeds, with one evaluation of the objective per iteration.

    The first iterations look at the seeds, the rest descend. A step that does not improve, or meets a non-finite value,
    is tried again at a quarter of its length. Without an inner line search the problems of a ``vmap`` move in lockstep
    at no waste, and the objective appears once in the compiled program.

    Args:
      objective: Value, gradient, and a pytree of by-products.
      seeds: Where to look first, inside the box.
      low: Lower corner of the box.
      high: Upper corner.
      scale: Typical length of each coordinate; one with scale 0 keeps its seed's value.
      steps: Static number of iterations after the seeds.

    Returns:
      The best point met, its value and its by-products; the first seed, infinity and zeros if the objective was finite
      nowhere.

    Cost:
      ``c + steps`` evaluations.
    """
    count = seeds.shape[0]
    start = jnp.diag(_FIRST * jnp.square(scale))

    def step(carry, iteration):
        theta, value, gradient, extra, inverse, length = carry
        is_seed = iteration < count
        # A coordinate pressed against the box stays there and must not turn the others.
        is_free = jnp.where(gradient > 0.0, theta > low, theta < high)
        direction = jnp.where(is_free, -inverse @ jnp.where(is_free, gradient, 0.0), 0.0)
        reach = jnp.max(jnp.where(scale > 0.0, jnp.abs(direction) / jnp.maximum(scale, 1e-20), 0.0))
        direction *= length * jnp.minimum(1.0, _LARGEST / jnp.maximum(reach, 1e-20))
        trial = jnp.clip(theta + direction, low, high)
        trial = jnp.where(is_seed, seeds[jnp.minimum(iteration, count - 1)], trial)
        move = trial - theta
        trial_value, trial_gradient, trial_extra = objective(trial)
        is_sane = jnp.isfinite(trial_value + jnp.sum(trial_gradient))
        enough = jnp.where(is_seed, 0.0, 1e-4 * jnp.minimum(jnp.sum(gradient * move), 0.0))
        is_better = is_sane & (trial_value < value + enough)
        bend = trial_gradient - gradient
        curvature = jnp.sum(move * bend)
        can_learn = is_better & ~is_seed & (curvature > 1e-6 * jnp.sum(jnp.square(move)))
        rho = jnp.where(can_learn, 1.0 / curvature, 0.0)
        bend = jnp.where(can_learn, bend, 0.0)
        # (I - rho s y') H (I - rho y s') + rho s s', expanded to a single matrix-vector product.
        turned = inverse @ bend
        cross = move[:, None] * turned[None, :]
        gain = rho * (1.0 + rho * jnp.sum(bend * turned))
        inverse = inverse - rho * (cross + cross.T) + gain * move[:, None] * move[None, :]
        length = jnp.where(is_better | is_seed, 1.0, 0.25 * length)
        keep = functools.partial(jnp.where, is_better)
        found = jax.tree.map(
            keep, (trial, trial_value, trial_gradient, trial_extra), (theta, value, gradient, extra)
        )  # fmt: skip
        return (*found, inverse, length), None

    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(objective, seeds[0])[2])
    carry = (seeds[0], jnp.float32(jnp.inf), jnp.zeros_like(seeds[0]), blank, start, jnp.float32(1.0))
    (theta, value, _, extra, *_), _ = jax.lax.scan(step, carry, jnp.arange(count + steps))
    return theta, value, extra
