"""What to try next: noisy expected improvement, in logarithms, inside a box of the unit cube."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..compiler.single_kernel import single_kernel
from .bfgs import minimise
from .kernels import SurrogateConfig
from .quasi_random import normal_table, spread_table, turned, uniforms
from .surrogate import Posterior, covariance, prior_variance

# Coefficients, in rising powers of v = (2 - t) / (2 + t), of the logarithm of
# (1 + t / 2)^2 (1 - t sqrt(pi / 2) erfcx(t / sqrt 2)): a Chebyshev interpolant with error below 6e-7 for all t >= 0.
_LOG_H = (-0.4635503, 0.7176665, -0.28121886, -0.007953152, 0.058977075, -0.026736684, -0.0045081433, 0.012509169,
          -0.004373102, -0.0023387746, 0.0015264739)  # fmt: skip
# Posterior variances below this share of the prior's are rounding errors of float32.
_VARIANCE_FLOOR = 1e-6
# Keeps the covariance of the references invertible in float32; a share of the prior's variance.
_REFERENCE_JITTER = 1e-5
# Candidates of a proposal, searches that share them, each climbing from its best, and gradient steps of each.
_CANDIDATES, _SEARCHES, _STEPS = 256, 16, 12
# How far the searches look at first, and the candidates around the references: shares of the box.
_LOCAL_SCALE = 0.05
_RADII = (0.003, 0.3)


def log_h_and_slope(z: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """``log h(z)`` and its slope; ``h(z) = phi(z) + z Phi(z)`` is the expected positive part of a unit normal, mean z.

    Accurate to 1e-6 of ``max(1, |result|)`` and finite, with its gradient, for every z down to -1e18. One smooth
    formula for negative arguments, ``h(z) = z + h(-z)`` for positive ones, so no branch can poison a gradient. The
    slope in closed form compiles to half the kernels of what JAX derives.

    Source:
      Ament et al., "Unexpected improvements to expected improvement" (NeurIPS 2023), eq. 9; theirs has three regimes.
    """
    below, fall = _log_h_below(z)
    # Where z is negative any positive number does: a logarithm of zero would make the gradient NaN there.
    small = jnp.exp(below)
    high = jnp.where(z > 0.0, z, 1.0) + small
    return jnp.where(z > 0.0, jnp.log(high), below), jnp.where(z > 0.0, (1.0 - small * fall) / high, fall)


def _log_h_below(z: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """``log h(-|z|)`` and how fast it falls with ``|z|``."""
    t = jnp.minimum(jnp.where(z > 0.0, z, -z), 1e18)
    u = 2.0 / (2.0 + t)
    v = 2.0 * u - 1.0
    series, rise = _LOG_H[-1], 0.0
    for coefficient in _LOG_H[-2::-1]:
        rise = rise * v + series
        series = series * v + coefficient
    below = -0.5 * jnp.square(t) - 0.5 * math.log(2.0 * math.pi) + 2.0 * jnp.log(u) + series
    return below, t + u + jnp.square(u) * rise


def expected_excess(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """``phi(z) + z Phi(z)``: the expected positive part of a unit normal with mean z, to 1e-5 of itself.

    It ends in an exponential, as `normal_cdf` does: XLA works those out once, and erfc anew for all that depends on it.
    """
    below, _ = _log_h_below(z)
    return jnp.maximum(z, 0.0) + jnp.exp(below)


def normal_cdf(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """``Phi(z)``, the slope of `expected_excess`, to 5e-5 of itself."""
    below, fall = _log_h_below(z)
    tail = jnp.exp(below + jnp.log(fall))
    return jnp.where(z > 0.0, 1.0 - tail, tail)


class _References(NamedTuple):
    """The references that are compared, pending ones and then the best first."""

    x: Float[Array, "c d"]
    is_live: Bool[Array, "c"]
    """Which of them count."""
    is_given: Bool[Array, "c"]
    """Which of them are conditioned on."""
    mean: Float[Array, "c"]
    white: Float[Array, "c n"]
    """Their prior covariances with the observations, whitened."""
    prior: Float[Array, "c c"]


def _compare(
    config: SurrogateConfig,
    posterior: Posterior,
    reference: Float[Array, "r d"],
    mask: Bool[Array, "r"],
    pending: Bool[Array, "r"] | None,
    *,
    lags: Float[Array, "m"],
    compared: int,
    confidence: float | None,
) -> _References:
    """The references with the lowest mean; masked ones sort last."""
    n, known = posterior.used.size, posterior.used.astype(jnp.float32)
    places = jnp.concatenate([posterior.x, reference])
    prior, _ = covariance(config, posterior, reference, places, lag=lags[None, :])
    white = (prior[:, :n] * known) @ posterior.whitener.T
    mean = white @ posterior.white
    order = jnp.where(mask, -mean, -jnp.inf)
    order = order if pending is None else jnp.where(pending & mask, jnp.inf, order)
    order, index = jax.lax.top_k(order, compared)
    is_live = order > -jnp.inf
    # Products with rows of the identity, which cost the compiler less than gathering.
    chosen = (index[:, None] == np.arange(reference.shape[0])).astype(jnp.float32)
    is_given = is_live
    if confidence is not None:
        is_given &= False if pending is None else pending[index]
    live, prior = chosen @ reference, chosen @ prior[:, n:] @ chosen.T
    # What is not given must not be conditioned on.
    white, mean = jnp.where(is_given[:, None], chosen @ white, 0.0), jnp.where(is_live, chosen @ mean, 0.0)
    return _References(live, is_live, is_given, mean, white, prior)


def _factorise(held: _References, unit: Float[Array, ""]) -> tuple[Float[Array, "c c"], Float[Array, "c c"]]:
    """Factor and whitening of the references' covariance, given the observations; masked ones are rows of the identity.

    Conditioning on the function at the references extends the observations' whitening by this block.
    """
    is_given, identity = held.is_given, np.eye(held.is_given.size, dtype=np.float32)
    joint = held.prior - held.white @ held.white.T
    joint = jnp.where(is_given[:, None] & is_given[None, :], joint, 0.0)
    joint += identity * jnp.where(is_given, _REFERENCE_JITTER * unit, 1.0)
    factor = jax.lax.linalg.cholesky(joint, symmetrize_input=False)
    # Without a factor in float32 the references are known to rounding, and each is taken on its own.
    apart = jnp.sqrt(jnp.maximum(joint, _REFERENCE_JITTER * unit)) * identity
    factor = jnp.where(jnp.all(jnp.isfinite(factor)), factor, apart)
    return factor, jax.lax.linalg.triangular_solve(factor, jnp.asarray(identity), left_side=True, lower=True)


def _extended(
    whitener: Float[Array, "n n"], white: Float[Array, "c n"], extension: Float[Array, "c c"]
) -> Float[Array, "n+c n+c"]:
    """The whitening of the observations and the references together."""
    rows = jnp.concatenate([-(extension @ white) @ whitener, extension], axis=1)
    return jnp.concatenate([jnp.pad(whitener, ((0, 0), (0, extension.shape[0]))), rows])


def log_improvement(
    config: SurrogateConfig,
    posterior: Posterior,
    *,
    reference: Float[Array, "r d"],
    reference_mask: Bool[Array, "r"],
    pending: Bool[Array, "r"] | None = None,
    time: Float[Array, ""] | float = 0.0,
    samples: int = 8,
    compared: int = 16,
    confidence: float | None = None,
) -> tuple[
    Callable[[Float[Array, "m d"]], tuple[Float[Array, "m"], Float[Array, "m d"]]],
    Float[Array, "c d"],
    Bool[Array, "c"],
]:
    """The logarithm of the expected improvement on the unknown minimum over some reference points.

    Args:
      config: As given to `fit`; static.
      posterior: What `fit` returned.
      reference: Snapped points already run, or about to be.
      reference_mask: Which of them count.
      pending: Which of them have no score yet. They are compared before any other, since nothing but the comparison
        tells the function that they are taken.
      time: When ``f`` is meant.
      samples: Static number of joint samples of ``f`` at the references that the improvement is averaged over.
      compared: Static number of references, best in the mean, whose minimum is to be improved upon.
      confidence: Static. With a number, not the improvement but minus the lower confidence bound: the posterior mean
        less so many standard deviations, given the scores that the pending references will have. For objectives that
        move, where each trial counts.

    Returns:
      The function of snapped points, with its gradient, in the surrogate's unit (without references: minus the
      posterior mean); the references compared, pending ones and then the best first; and which of those count.

    Cost:
      O(r n^2) once, then O((n + c)^2) per point for c compared references.

    Source:
      Letham et al., "Constrained Bayesian optimization with noisy experiments" (2019), with the logarithm of Ament et
      al. (2023) inside the average and common random numbers across points.
    """
    compared = min(compared, reference.shape[0])
    n, known = posterior.used.size, posterior.used.astype(jnp.float32)
    time = jnp.asarray(time, jnp.float32)
    lags = jnp.concatenate([time - posterior.time, np.zeros(reference.shape[0], np.float32)])
    held = _compare(
        config, posterior, reference, reference_mask, pending, lags=lags, compared=compared, confidence=confidence
    )
    live, is_live, is_given = held.x, held.is_live, held.is_given
    unit = prior_variance(config, posterior)
    factor, extension = _factorise(held, unit)
    normal = normal_table(samples, compared).T
    best = jnp.min(jnp.where(is_live[:, None], held.mean[:, None] + factor @ normal, jnp.inf), axis=0)
    best = jnp.where(is_live[0], best, 0.0)

    everything = jnp.concatenate([posterior.x, live])
    is_known = jnp.concatenate([known, is_given.astype(jnp.float32)])
    lags = lags[: n + compared]
    whitener = _extended(posterior.whitener, held.white, extension)
    # From the whitened prior covariances to one joint sample of f per column, or to the mean alone.
    columns = 1 if confidence is not None else samples
    readout = jnp.concatenate(
        [
            jnp.broadcast_to(posterior.white[:, None], (n, columns)),
            normal if confidence is None else np.zeros((compared, 1), np.float32),
        ]
    )
    inverse_square = jnp.where(np.asarray(config.is_categorical), 0.0, jnp.exp(-2.0 * posterior.hyper.lengthscale))
    corner = jnp.concatenate([everything - 0.5, np.ones((n + compared, 1), np.float32)], axis=1)

    def of(x: Float[Array, "m d"]) -> tuple[Float[Array, "m"], Float[Array, "m d"]]:
        prior, slope = covariance(config, posterior, x, everything, lag=lags[None, :])
        seen = (prior * is_known) @ whitener.T
        variance = unit - jnp.square(seen) @ np.ones(n + compared, np.float32)
        value, per_variance, of_sample = _improvement(
            samples, confidence, variance, seen @ readout, best, unit, is_live[0]
        )
        # Back through the whitening to the prior covariances, and through them to the point.
        of_prior = (of_sample @ readout.T + per_variance[:, None] * seen) @ whitener
        pull = (of_prior * is_known * slope) @ corner
        return value, inverse_square * ((x - 0.5) * pull[:, -1:] - pull[:, :-1])

    return of, live, is_live


@single_kernel(static_argnums=(0, 1))
def _improvement(
    samples: int,
    confidence: float | None,
    variance: Float[Array, "m"],
    sample: Float[Array, "m c"],
    best: Float[Array, "s"],
    unit: Float[Array, ""],
    has_reference: Bool[Array, ""],
) -> tuple[Float[Array, "m"], Float[Array, "m"], Float[Array, "m c"]]:
    """The value, and what a unit of the variance and of each sample adds to it."""
    deviation = jnp.sqrt(jnp.maximum(variance, _VARIANCE_FLOOR * unit))
    if confidence is not None:
        value, of_deviation = confidence * deviation - sample[:, 0], confidence * deviation
        of_sample = -jnp.ones_like(sample)
    else:
        standard = (best - sample) / deviation[:, None]
        each, rise = log_h_and_slope(standard)
        most = jnp.max(each, axis=1)
        share = jnp.exp(each - most[:, None])
        total = share @ np.ones(samples, np.float32)
        value = most + jnp.log(deviation * total) - math.log(samples)
        rise = share * rise / total[:, None]
        of_deviation = 1.0 - (rise * standard) @ np.ones(samples, np.float32)
        of_sample = -rise / deviation[:, None]
        # Without references: minus the mean, which every sample is.
        value = jnp.where(has_reference, value, -sample[:, 0])
        of_deviation = jnp.where(has_reference, of_deviation, 0.0)
        of_sample = jnp.where(has_reference, of_sample, -1.0 / samples)
    per_variance = jnp.where(variance > _VARIANCE_FLOOR * unit, -of_deviation / jnp.square(deviation), 0.0)
    return value, per_variance, of_sample


def _seeds(
    key: PRNGKeyArray,
    live: Float[Array, "c d"],
    is_live: Bool[Array, "c"],
    lower: Float[Array, "d"],
    upper: Float[Array, "d"],
) -> Float[Array, "share searches d"]:
    """Candidates: three quarters spread over the box, the rest around the best references.

    Half of those leap along one coordinate, half move a little in all of them, at radii from near to far.
    """
    dims, width = live.shape[1], upper - lower
    turn = uniforms(key, 2 * dims)
    near = _CANDIDATES // 4
    everywhere = lower + width * turned(spread_table(_CANDIDATES - near, dims), turn[:dims])
    order = np.arange(near)
    # The references take turns.
    among = jnp.maximum(is_live.astype(jnp.float32) @ np.ones(is_live.size, np.float32), 1.0)
    index = order - among * jnp.floor((order + 0.5) / among)
    centre = jnp.where(
        is_live[0], live.at[index.astype(jnp.int32)].get(mode="promise_in_bounds"), 0.5 * (lower + upper)
    )
    radius = np.geomspace(*_RADII, near, dtype=np.float32)[:, None]
    offset = radius * normal_table(near, dims) * jnp.where(turn[dims:] < 0.5, -1.0, 1.0)
    leap = lower + width * turned(spread_table(near, dims), turn[dims:])
    is_leap = (order // 2 % 2 == 0)[:, None]
    is_moved = order[:, None] // 4 % dims == np.arange(dims)[None, :]
    around = jnp.where(is_leap, jnp.where(is_moved, leap, centre), centre + width * offset)
    seeds = jnp.concatenate([everywhere, jnp.clip(around, lower, upper)])
    return seeds.reshape(_CANDIDATES // _SEARCHES, _SEARCHES, dims)


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
    pending: Bool[Array, "r"] | None = None,
    time: Float[Array, ""] | float = 0.0,
    compared: int = 16,
    confidence: float | None = None,
) -> Float[Array, "d"]:
    """The point of the box with the largest expected improvement on the best of the reference points.

    The improvement is that of the shape ``f`` at ``time``; noise and group intercepts play no part. Candidates spread
    over the box and around the references compete, and the best of them climb. Without references the posterior mean
    decides, and where that is flat, chance.

    Args:
      config: As given to `fit`; static.
      posterior: What `fit` returned.
      key: Random key.
      lower: Lower corner of the box, in the unit cube. Where it equals ``upper`` the coordinate is held.
      upper: Upper corner. A discrete coordinate is snapped after it is put into the box.
      snap: Moves points to allowed ones, as `SearchSpace.snap`; static.
      reference: Snapped points already run, or about to be: each is improved upon, none is worth repeating.
      reference_mask: Which of them count.
      pending: As for `log_improvement`.
      time: When the proposal will run.
      compared: As for `log_improvement`.
      confidence: As for `log_improvement`.

    Returns:
      A snapped point.

    Cost:
      That of `log_improvement` with its gradient at ``_CANDIDATES + _SEARCHES * _STEPS`` points.
    """
    width = upper - lower
    improvement, live, is_live = log_improvement(
        config,
        posterior,
        reference=reference,
        reference_mask=reference_mask,
        pending=pending,
        time=time,
        compared=compared,
        confidence=confidence,
    )

    def place(u: Float[Array, "d"]) -> Float[Array, "d"]:
        """Snapped into the box; a coordinate that is held stays exactly where it is."""
        return jnp.where(width > 0.0, snap(jnp.clip(u, lower, upper)), lower)

    # Coordinates that snapping moves in steps, if at all, have no slope.
    middle = jnp.full(lower.shape, 0.5, jnp.float32)
    _, slope = jax.jvp(snap, (middle,), (jnp.ones_like(middle),))
    slope = jnp.where(width > 0.0, slope, 0.0)

    def objective(u: Float[Array, "searches d"]):
        value, gradient = improvement(place(u))
        return -value, -slope * gradient, None

    seeds = _seeds(key, live, is_live, lower, upper)
    points, losses, _ = minimise(objective, seeds, low=lower, high=upper, scale=_LOCAL_SCALE * width, steps=_STEPS)
    return place(points[jnp.argmin(losses)])
