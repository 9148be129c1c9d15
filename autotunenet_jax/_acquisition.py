"""What to try next: noisy expected improvement, in logarithms, inside a box of the unit cube."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._surrogate import Posterior, SurrogateConfig, covariance, prior_variance, whiten

# Below this argument log h is computed from the scaled complementary error function, above it directly.
_DIRECT = -1.0
# Beyond this the asymptotic series is exact in float32 and everything else has lost its digits.
_TAIL = -8.0


def log_h(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log(phi(z) + z Phi(z))``: the logarithm of the expected positive part of a unit normal with mean z.

    Finite with its gradient for every z whose square is. Three regimes, each evaluated only at arguments it can bear,
    so that no branch poisons the gradient of another.

    Source:
      Ament et al., "Unexpected improvements to expected improvement" (NeurIPS 2023), appendix A; the middle regime uses
      the normal distribution's log-CDF instead of erfcx, and the tail a series in 1/z^2.
    """
    half_log_2pi = 0.5 * math.log(2.0 * math.pi)
    direct = jnp.maximum(z, _DIRECT)
    pdf = jnp.exp(-0.5 * jnp.square(direct) - half_log_2pi)
    upper = jnp.log(pdf + direct * jax.scipy.stats.norm.cdf(direct))

    middle = jnp.clip(z, _TAIL, _DIRECT)
    log_pdf = -0.5 * jnp.square(middle) - half_log_2pi
    ratio = -middle * jnp.exp(jax.scipy.stats.norm.logcdf(middle) - log_pdf)
    central = log_pdf + jnp.log1p(-jnp.minimum(ratio, 1.0 - 1e-6))

    tail = jnp.minimum(z, _TAIL)
    inverse = 1.0 / jnp.square(tail)
    series = inverse * (1.0 - inverse * (3.0 - inverse * (15.0 - 105.0 * inverse)))
    lower = -0.5 * jnp.square(tail) - half_log_2pi + jnp.log(series)
    return jnp.where(z > _DIRECT, upper, jnp.where(z > _TAIL, central, lower))


@functools.cache
def _quasi_random(count: int, dims: int) -> np.ndarray:
    """The additive recurrence of the generalised golden ratio: low discrepancy in any dimension, no tables."""
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (dims + 1))
    steps = root ** -np.arange(1.0, dims + 1)
    return np.mod(0.5 + np.arange(1, count + 1)[:, None] * steps[None, :], 1.0).astype(np.float32)


def spread_points(key: PRNGKeyArray, count: int, dims: int) -> Float[Array, "count dims"]:
    """Points that fill the unit cube evenly, shifted at random."""
    return jnp.mod(jnp.asarray(_quasi_random(count, dims)) + jax.random.uniform(key, (dims,)), 1.0)


def propose(
    config: SurrogateConfig,
    posterior: Posterior,
    key: PRNGKeyArray,
    *,
    lower: Float[Array, "d"],
    upper: Float[Array, "d"],
    snap: Callable[[Float[Array, "m d"]], Float[Array, "m d"]],
    reference: Float[Array, "r d"],
    reference_mask: Bool[Array, "r"],
    time: Float[Array, ""] | float = 0.0,
    candidates: int = 256,
    samples: int = 8,
    refined: int = 4,
    steps: int = 20,
) -> Float[Array, "d"]:
    """The point of the box with the largest expected improvement on the best of the reference points.

    The improvement is that of the shape ``f`` at ``time`` over its unknown minimum at the reference points, averaged
    over joint posterior samples there; noise and group intercepts play no part. Candidates spread over the box and
    around the references compete, the best are refined by gradient ascent. Without references the posterior mean
    decides, and where that is flat, chance.

    Args:
      config: As given to `fit`; static.
      posterior: What `fit` returned.
      key: Random key.
      lower: Lower corner of the box, in the unit cube. Where it equals ``upper`` the coordinate is held.
      upper: Upper corner.
      snap: Moves points to allowed ones, as `SearchSpace.snap`; static.
      reference: Snapped points already run, or about to be: each is improved upon, none is worth repeating.
      reference_mask: Which of them count.
      time: When the proposal will run.
      candidates: Static number of candidates; one quarter of them lies near the references.
      samples: Static number of joint samples of ``f`` at the references.
      refined: Static number of candidates refined.
      steps: Static number of gradient steps.

    Returns:
      A snapped point.

    Cost:
      O(r^3) once, and O(n^2 + r^2 + n d) per candidate and per gradient step of each refined one.

    Source:
      Letham et al., "Constrained Bayesian optimization with noisy experiments" (2019), with the logarithm of Ament et
      al. (2023) inside the average and common random numbers across candidates.
    """
    sample_key, spread_key, pick_key, local_key = jax.random.split(key, 4)
    dims, count = config.dims, reference.shape[0]
    has_reference = jnp.any(reference_mask)

    # Joint samples of f at the references; the masked ones are rows of the identity and far above every minimum.
    unit = prior_variance(config, posterior)
    mean_r, white_r = whiten(config, posterior, reference, time=time)
    both = reference_mask[:, None] & reference_mask[None, :]
    joint = covariance(config, posterior, reference, reference, time=time, time_z=time) - white_r.T @ white_r
    joint = jnp.where(both, joint, 0.0) + jnp.diag(jnp.where(reference_mask, 1e-5 * unit, 1.0))
    factor = jnp.linalg.cholesky(joint)
    # A factor that does not exist in float32 means references known to rounding: then only their means count.
    factor = jnp.where(jnp.all(jnp.isfinite(factor)), factor, jnp.eye(count, dtype=jnp.float32) * jnp.sqrt(unit))
    normal = jax.random.normal(sample_key, (count, samples))
    normal = jnp.where(reference_mask[:, None], normal, 0.0)
    drawn = mean_r[:, None] + factor @ normal
    best = jnp.min(jnp.where(reference_mask[:, None], drawn, jnp.inf), axis=0)

    def log_ei(x: Float[Array, "m d"]) -> Float[Array, "m"]:
        mean, white = whiten(config, posterior, x, time=time)
        cross = covariance(config, posterior, x, reference, time=time, time_z=time) - white.T @ white_r
        cross = jnp.where(reference_mask[None, :], cross, 0.0)
        shared = solve_triangular(factor, cross.T, lower=True)
        variance = unit - jnp.sum(jnp.square(white), axis=0) - jnp.sum(jnp.square(shared), axis=0)
        deviation = jnp.sqrt(jnp.maximum(variance, 1e-6 * unit))[:, None]
        mean = mean[:, None] + shared.T @ normal
        target = jnp.where(has_reference, best, 0.0)
        value = log_h((target - mean) / deviation) + jnp.log(deviation)
        value = jax.nn.logsumexp(value, axis=1) - math.log(samples)
        return jnp.where(has_reference, value, -mean[:, 0])

    width = upper - lower

    def place(u: Float[Array, "m d"]) -> Float[Array, "m d"]:
        """Snapped into the box; a coordinate that is held stays exactly where it is."""
        point = jnp.where(width > 0.0, snap(jnp.clip(u, lower, upper)), lower)
        return jnp.clip(point, 0.0, 1.0)

    near = candidates // 4
    everywhere = lower + width * spread_points(spread_key, candidates - near, dims)
    logits = jnp.where(
        reference_mask, -(mean_r - jnp.min(jnp.where(reference_mask, mean_r, jnp.inf))) / (0.1 * jnp.sqrt(unit)), -1e9
    )
    chosen = jax.random.categorical(pick_key, logits, shape=(near,))
    radius = jnp.geomspace(0.003, 0.3, near)[:, None]
    local = reference[chosen] + width * radius * jax.random.normal(local_key, (near, dims))
    points = place(jnp.concatenate([everywhere, local]))
    scores = log_ei(points)

    top = jax.lax.top_k(scores, refined)[1]
    start = points[top]
    gradient_of = jax.grad(lambda x: jnp.sum(log_ei(x)))

    def ascend(carry, rate):
        x, momentum, square = carry
        gradient = jnp.nan_to_num(gradient_of(place(x)) * width)
        momentum = 0.8 * momentum + 0.2 * gradient
        square = 0.9 * square + 0.1 * jnp.square(gradient)
        x = jnp.clip(x + rate * width * momentum / (jnp.sqrt(square) + 1e-12), lower, upper)
        return (x, momentum, square), None

    rates = jnp.geomspace(0.05, 0.002, steps)
    (end, _, _), _ = jax.lax.scan(ascend, (start, jnp.zeros_like(start), jnp.zeros_like(start)), rates)
    finalists = jnp.concatenate([place(end), start])
    scores = jnp.nan_to_num(log_ei(finalists), nan=-jnp.inf)
    return finalists[jnp.argmax(scores)]
