"""A quasi-Newton minimiser for many small problems in one compiled loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The first step is this share of the gradient, in squared units of the scale; the largest is this many scales.
_FIRST = 0.1
_LARGEST = 1.5


def minimise(
    objective: Callable[
        [Float[Array, "s p"]], tuple[Float[Array, "s"], Float[Array, "s p"], Float[Array, "s *extra"] | None]
    ],
    seeds: Float[Array, "c s p"],
    *,
    low: Float[Array, "p"],
    high: Float[Array, "p"],
    scale: Float[Array, "p"],
    steps: int,
) -> tuple[Float[Array, "s p"], Float[Array, "s"], Float[Array, "s *extra"] | None]:
    """BFGS in a box, several searches side by side, with one evaluation of the objective per search and iteration.

    Each search begins at the best of its seeds. The first iterations look at the seeds, the rest descend. A step that
    does not improve, or meets a non-finite value, is tried again at a quarter of its length. Without an inner line
    search the searches move in lockstep at no waste, and the objective appears once in the compiled program. What
    belongs to a point travels in one array, since every array that a loop carries costs the compiler a kernel.

    Args:
      objective: Value and gradient at one point of each search, and an array of by-products or None.
      seeds: Where each of the s searches looks first, inside the box.
      low: Lower corner of the box.
      high: Upper corner.
      scale: Typical length of each coordinate; one with scale 0 keeps its seed's value.
      steps: Static number of iterations after the seeds.

    Returns:
      For each search the best point met, its value and its by-products; the first seed, infinity and zeros if the
      objective was finite nowhere.

    Cost:
      ``s * (c + steps)`` evaluations.
    """
    count, searches, p = seeds.shape
    start = jnp.diag(_FIRST * jnp.square(scale))
    per_scale = jnp.where(scale > 0.0, 1.0 / jnp.maximum(scale, 1e-20), 0.0)

    def step(carry, iteration):
        best, extra, inverse = carry
        theta, gradient, value, length = best[:, :p], best[:, p : 2 * p], best[:, 2 * p], best[:, 2 * p + 1]
        is_seed = iteration < count
        # A coordinate pressed against the box stays there and must not turn the others.
        is_free = jnp.where(gradient > 0.0, theta > low, theta < high)
        uphill = jnp.einsum("spq,sq->sp", inverse, jnp.where(is_free, gradient, 0.0))
        direction = jnp.where(is_free, -uphill, 0.0)
        reach = jnp.max(jnp.abs(direction) * per_scale, axis=1)
        pace = length * jnp.minimum(1.0, _LARGEST / jnp.maximum(reach, 1e-20))
        trial = jnp.clip(theta + pace[:, None] * direction, low, high)
        trial = jnp.where(is_seed, seeds[jnp.minimum(iteration, count - 1)], trial)
        trial_value, trial_gradient, trial_extra = objective(trial)

        # All the inner products at once: move, change of the gradient, gradient before and after.
        parts = jnp.stack([trial - theta, trial_gradient - gradient, gradient, trial_gradient], axis=1)
        inner = jnp.einsum("sip,sjp->sij", parts, parts)
        turned = jnp.einsum("siq,spq->sip", parts, inverse)
        square, curvature, slope, steepness = inner[:, 0, 0], inner[:, 0, 1], inner[:, 0, 2], inner[:, 3, 3]
        enough = jnp.where(is_seed, 0.0, 1e-4 * jnp.minimum(slope, 0.0))
        is_better = (trial_value < value + enough) & (jnp.abs(trial_value) < jnp.inf) & (steepness < jnp.inf)
        can_learn = is_better & ~is_seed & (curvature > 1e-6 * square)
        # (I - rho s y') H (I - rho y s') + rho s s', as two outer products: u s' + s u'.
        rho = jnp.where(can_learn, 1.0 / curvature, 0.0)
        bent = jnp.einsum("sp,sp->s", parts[:, 1], turned[:, 1])
        update = (0.5 * rho * (1.0 + rho * bent))[:, None] * parts[:, 0] - rho[:, None] * turned[:, 1]
        update = update[:, :, None] * parts[:, 0, None, :]
        inverse = jnp.where(can_learn[:, None, None], inverse + update + update.mT, inverse)
        length = jnp.where(is_better | is_seed, 1.0, 0.25 * length)
        found = jnp.concatenate([trial, trial_gradient, trial_value[:, None]], axis=1)
        best = jnp.concatenate([jnp.where(is_better[:, None], found, best[:, :-1]), length[:, None]], axis=1)
        if extra is not None and trial_extra is not None:
            extra = jnp.where(is_better.reshape((searches,) + (1,) * (extra.ndim - 1)), trial_extra, extra)
        return (best, extra, inverse), None

    blank = jax.eval_shape(objective, seeds[0])[2]
    rest = np.zeros((searches, p + 2), np.float32)
    rest[:, p:] = np.inf, 1.0
    carry = (
        jnp.concatenate([seeds[0], rest], axis=1),
        None if blank is None else jnp.zeros(blank.shape, blank.dtype),
        jnp.broadcast_to(start, (searches, p, p)),
    )
    (best, extra, _), _ = jax.lax.scan(step, carry, np.arange(count + steps))
    return best[:, :p], best[:, 2 * p], extra
