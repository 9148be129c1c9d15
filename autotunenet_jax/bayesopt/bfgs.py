"""A quasi-Newton minimiser for many small problems in one compiled loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..compiler.single_kernel import single_kernel

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
    extra: tuple[int, ...] | None = None,
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
      extra: Shape of the by-products, where there are any.

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
        best, kept, inverse = carry
        trial = _trial(best, inverse, seeds, iteration, low, high, per_scale)
        value, gradient, found = objective(trial)
        best, inverse, is_better = _learned(best, inverse, trial, value, gradient, iteration < count)
        if kept is not None and found is not None:
            kept = jnp.where(is_better.reshape((searches,) + (1,) * (kept.ndim - 1)), found, kept)
        return (best, kept, inverse), None

    rest = np.zeros((searches, p + 2), np.float32)
    rest[:, p:] = np.inf, 1.0
    carry = (
        jnp.concatenate([seeds[0], rest], axis=1),
        None if extra is None else jnp.zeros(extra, jnp.float32),
        jnp.broadcast_to(start, (searches, p, p)),
    )
    (best, kept, _), _ = jax.lax.scan(step, carry, np.arange(count + steps))
    return best[:, :p], best[:, 2 * p], kept


@single_kernel()
def _trial(
    best: Float[Array, "s q"],
    inverse: Float[Array, "s p p"],
    seeds: Float[Array, "c s p"],
    iteration: Int[Array, ""],
    low: Float[Array, "p"],
    high: Float[Array, "p"],
    per_scale: Float[Array, "p"],
) -> Float[Array, "s p"]:
    """Where each search looks next: at its next seed, or downhill."""
    count, _, p = seeds.shape
    theta, gradient, length = best[:, :p], best[:, p : 2 * p], best[:, 2 * p + 1]
    # A coordinate pressed against the box stays there and must not turn the others.
    is_free = jnp.where(gradient > 0.0, theta > low, theta < high)
    uphill = jnp.einsum("spq,sq->sp", inverse, jnp.where(is_free, gradient, 0.0))
    direction = jnp.where(is_free, -uphill, 0.0)
    reach = jnp.max(jnp.abs(direction) * per_scale, axis=1)
    pace = length * jnp.minimum(1.0, _LARGEST / jnp.maximum(reach, 1e-20))
    trial = jnp.clip(theta + pace[:, None] * direction, low, high)
    return jnp.where(iteration < count, seeds[jnp.minimum(iteration, count - 1)], trial)


@single_kernel()
def _learned(
    best: Float[Array, "s q"],
    inverse: Float[Array, "s p p"],
    trial: Float[Array, "s p"],
    value: Float[Array, "s"],
    gradient: Float[Array, "s p"],
    is_seed: Bool[Array, ""],
) -> tuple[Float[Array, "s q"], Float[Array, "s p p"], Bool[Array, "s"]]:
    """Takes in a value and gradient; also says which searches they improved."""
    p = trial.shape[1]
    move, change = trial - best[:, :p], gradient - best[:, p : 2 * p]
    square, curvature = _dots(move, move), _dots(move, change)
    enough = jnp.where(is_seed, 0.0, 1e-4 * jnp.minimum(_dots(move, best[:, p : 2 * p]), 0.0))
    is_better = value < best[:, 2 * p] + enough
    is_better &= (jnp.abs(value) < jnp.inf) & (_dots(gradient, gradient) < jnp.inf)
    can_learn = is_better & ~is_seed & (curvature > 1e-6 * square)
    # (I - rho s y') H (I - rho y s') + rho s s', as two outer products: u s' + s u'.
    rho = jnp.where(can_learn, 1.0 / curvature, 0.0)
    turned = jnp.einsum("spq,sq->sp", inverse, change)
    update = (0.5 * rho * (1.0 + rho * _dots(change, turned)))[:, None] * move - rho[:, None] * turned
    update = update[:, :, None] * move[:, None, :]
    inverse = jnp.where(can_learn[:, None, None], inverse + update + update.mT, inverse)
    length = jnp.where(is_better | is_seed, 1.0, 0.25 * best[:, 2 * p + 1])
    found = jnp.concatenate([trial, gradient, value[:, None]], axis=1)
    best = jnp.where(is_better[:, None], found, best[:, :-1])
    return jnp.concatenate([best, length[:, None]], axis=1), inverse, is_better


def _dots(a: Float[Array, "s p"], b: Float[Array, "s p"]) -> Float[Array, "s"]:
    return jnp.sum(a * b, axis=1)
