"""What the trials say about the objective: a Gaussian process with a fixed number of slots.

Notation, as in the literature: ``d`` dimensions, ``n`` slots, ``m`` query points; ``K`` the covariance of the scores,
``L`` its Cholesky factor, the whitener ``L^-1``, ``alpha = K^-1 r`` for residuals ``r``; hyperparameters are kept as
logarithms.

    K = a^2 Matern52(x, x') exp(-|t - t'| / l_t) + b^2 [same group] + diag(s^2 + noise_i)

The first term is the shape ``f`` that `predict` returns. ``b`` is the intercept of a group about the group's mean
score; without groups there is one group, and its intercept is the mean level of ``f``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._bfgs import minimise
from ._observations import Observations
from ._observations import mask as used_slots
from ._sampling import spread_table, turned, uniforms
from ._single_kernel import single_kernel
from ._targets import Targets, targets

# Two snapped options of an unordered choice differ by far more than float32 rounding.
_SAME_OPTION = 1e-4
# Squared distance, in lengthscales, below which two points are one; a square root at zero has no gradient.
_SAME_PLACE = 1e-12
# Triangles up to this size are inverted by substitution.
_SMALL_TRIANGLE = 32
# Reach of the fit about the prior's location, in the prior's scales.
_REACH = 4.0


def _kernels() -> Any:
    """GPJax's kernels; the import initialises JAX's backend and must not happen inside a trace."""
    with jax.ensure_compile_time_eval():
        import gpjax.kernels

    return gpjax.kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """What the Gaussian process models, and its priors.

    Args:
      dims: Dimensions of the unit cube.
      is_categorical: Per dimension, whether its options have no order; those differ by 0 or 1 (Hamming distance).
      has_time: Whether the objective drifts with the observations' ``time``.
      has_groups: Whether the observations of one ``group`` share an unknown intercept, which `predict` leaves out.
      standardise: Whether scores come in an arbitrary unit and are shifted and scaled; otherwise only differences
        matter, in a unit that means something, such as log-ratios of losses.
      lengthscale_loc: Location of the log-normal prior of each lengthscale, in the unit of the cube. By default
        ``sqrt(2) + log(d) / 2``, so that the typical distance of two points means the same in every dimension.
      lengthscale_scale: Scale of that prior.
      signal_loc: Location of the log-normal prior of ``a``, in the (standardised) unit of the score.
      signal_scale: Scale of that prior.
      noise_loc: Location of the log-normal prior of ``s``, same unit.
      noise_scale: Scale of that prior.
      noise_floor: Smallest ``s`` as a share of the unit. What keeps ``K`` invertible in float32.
      time_loc: Location of the log-normal prior of ``l_t``, in the unit of ``time``.
      time_scale: Scale of that prior.
      intercept_scale: ``b``, same unit as the score.
      failure_margin: How much worse than the worst score of its group a failed trial counts, same unit.
      outlier: Without ``standardise``, scores further than this from the median of their group are compressed
        logarithmically, same unit. With it, the worse half of the scores is replaced by its ranks.
      fit_steps: Iterations of the fit; each evaluates the evidence once.
      fit_starts: Searches of the fit that run side by side; the first knows the warm start.
      fit_draws: Places each search looks at before it descends from the best of them.

    Raises:
      ValueError: A size, scale or tuple length that makes no sense.
    """

    dims: int
    is_categorical: tuple[bool, ...] = ()
    has_time: bool = False
    has_groups: bool = False
    standardise: bool = True
    lengthscale_loc: tuple[float, ...] = ()
    lengthscale_scale: float = 1.0
    signal_loc: float = 0.0
    signal_scale: float = 1.0
    noise_loc: float = -4.0
    noise_scale: float = 1.0
    noise_floor: float = 3e-3
    time_loc: float = 0.0
    time_scale: float = 1.0
    intercept_scale: float = 1.0
    failure_margin: float = 0.5
    outlier: float = 4.0
    fit_steps: int = 16
    fit_starts: int = 3
    fit_draws: int = 3

    def __post_init__(self):
        if self.dims < 1:
            raise ValueError(f"dims must be at least 1; got {self.dims!r}.")
        defaults = {
            "is_categorical": (False,) * self.dims,
            "lengthscale_loc": (math.sqrt(2.0) + math.log(self.dims) / 2.0,) * self.dims,
        }
        for name, default in defaults.items():
            given = tuple(getattr(self, name)) or default
            if len(given) != self.dims:
                raise ValueError(f"{name} needs one entry per dimension, {self.dims}; got {len(given)}.")
            object.__setattr__(self, name, tuple(type(default[0])(entry) for entry in given))
        positive = ("lengthscale_scale", "signal_scale", "noise_scale", "noise_floor", "time_scale", "intercept_scale",
                    "outlier", "fit_steps", "fit_starts",
                    "fit_draws")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above zero; got {getattr(self, name)!r}.")
        if self.failure_margin < 0:
            raise ValueError(f"failure_margin must be at least 0; got {self.failure_margin!r}.")
        _kernels()


class Hyper(NamedTuple):
    """Logarithms of the fitted hyperparameters; without time the last keeps its prior's location."""

    lengthscale: Float[Array, "d"]
    signal: Float[Array, ""]
    noise: Float[Array, ""]
    time_lengthscale: Float[Array, ""]


class PriorMean(NamedTuple):
    """A bowl in the unit of the score: quadratic near its centre, growing with the distance only beyond about 1."""

    center: Float[Array, "d"]
    curvature: Float[Array, "d"]
    """Second derivative at the centre, per squared unit of the cube; 0 is flat."""


class Posterior(NamedTuple):
    """A fitted surrogate. Opaque except for ``hyper``, which warm-starts the next fit, and ``evidence``."""

    hyper: Hyper
    x: Float[Array, "n d"]
    time: Float[Array, "n"]
    used: Bool[Array, "n"]
    whitener: Float[Array, "n n"]
    white: Float[Array, "n"]
    location: Float[Array, ""]
    scale: Float[Array, ""]
    prior_mean: PriorMean | None
    evidence: Float[Array, ""]
    """Log evidence plus log prior of the hyperparameters, in nats, up to a constant."""


class _Data(NamedTuple):
    """What the evidence needs and the hyperparameters do not change."""

    square: Float[Array, "rates pairs"]
    """Squared distances per dimension of all pairs; zeros for what is no lengthscale."""
    lag: Float[Array, "pairs"]
    """Time between the two of each pair."""
    pair: Float[Array, "n n"]
    """1 where both slots are used, 0 elsewhere."""
    fixed: Float[Array, "n n"]
    """Intercepts, known noise, and the identity where no slot is used: those drop out of every result exactly."""
    used: Float[Array, "pairs"]
    """1 on the diagonal of used slots, 0 elsewhere."""
    residual: Float[Array, "n"]


def _prior(config: SurrogateConfig) -> tuple[np.ndarray, np.ndarray]:
    """Location and scale of the normal priors of the log-hyperparameters, in the order of `Hyper`."""
    loc = [*config.lengthscale_loc, config.signal_loc, config.noise_loc, config.time_loc]
    scale = [config.lengthscale_scale] * config.dims + [config.signal_scale, config.noise_scale, config.time_scale]
    return np.asarray(loc, np.float32), np.asarray(scale, np.float32)


def initial_hyper(config: SurrogateConfig) -> Hyper:
    """Where the first fit starts: the prior's locations."""
    return _unflatten(config, jnp.asarray(_prior(config)[0]))


def flat_mean(config: SurrogateConfig) -> PriorMean:
    """The prior mean that knows nothing."""
    return PriorMean(jnp.full(config.dims, 0.5, jnp.float32), jnp.zeros(config.dims, jnp.float32))


def bowl(mean: PriorMean, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """The prior mean at some points."""
    quadratic = 0.5 * jnp.square(x - mean.center) @ mean.curvature
    return 2.0 * quadratic / (1.0 + jnp.sqrt(1.0 + quadratic))


def _square(config: SurrogateConfig, x: Float[Array, "m d"], z: Float[Array, "n d"]) -> Float[Array, "d m n"]:
    """Squared distance per dimension. The pairs come last, so that compilers vectorise over them and not over d."""
    delta = x.T[:, :, None] - z.T[:, None, :]
    if not any(config.is_categorical):
        return jnp.square(delta)
    is_other = jnp.where(jnp.abs(delta) > _SAME_OPTION, 1.0, 0.0)
    return jnp.where(jnp.array(config.is_categorical)[:, None, None], is_other, jnp.square(delta))


@functools.cache
def _profile(name: str) -> Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """A kernel of unit variance and lengthscale as a function of the distance, traced once per shape."""
    kernels = _kernels()
    with jax.ensure_compile_time_eval():
        kernel, origin = getattr(kernels, name)(n_dims=1), jnp.zeros(1, jnp.float32)
    return jax.jit(lambda r: jax.vmap(lambda one: kernel(one[None], origin))(r.reshape(-1)).reshape(r.shape))


def _shape_kernel(
    config: SurrogateConfig,
    total: Float[Array, "*many pairs"],
    lag: Float[Array, "pairs"],
    *,
    variance: Float[Array, "*many"],
    time_rate: Float[Array, "*many"],
) -> Float[Array, "*many pairs"]:
    """Covariance of ``f``. A stationary kernel sees only the scaled distance, so that is what it is given."""
    covariance = variance[..., None] * _profile("Matern52")(jnp.sqrt(jnp.maximum(total, _SAME_PLACE)))
    if config.has_time:
        covariance *= _profile("Matern12")(lag * time_rate[..., None])
    return covariance


def _shape_slope(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Slope of the logarithm of the Matern-5/2 kernel over the squared scaled distance."""
    square = jnp.maximum(total, _SAME_PLACE)
    near = 1.0 + jnp.sqrt(5.0 * square)
    return -0.5 * near / (0.6 * near + square)


def _inverse(lower: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Inverse of a lower triangle, by halves: matrix products run several times faster than substitution."""
    n = lower.shape[-1]
    if n <= _SMALL_TRIANGLE or n % 2:
        identity = jnp.broadcast_to(np.eye(n, dtype=np.float32), lower.shape)
        # Transposed, because LAPACK's results are stored by columns.
        return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True, transpose_a=True).mT
    half = n // 2
    first, corner, second = lower[..., :half, :half], lower[..., half:, :half], lower[..., half:, half:]
    if half <= _SMALL_TRIANGLE or half % 2:
        first, second = _inverse(first), _inverse(second)
    else:
        first, second = _inverse(jnp.stack([first, second]))
    corner = second @ (corner @ first)
    # A sum of padded parts is one kernel, nested concatenations are three.
    edge = [(0, 0, 0)] * (lower.ndim - 2)

    def place(part: Array, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> Array:
        return jax.lax.pad(part, jnp.float32(0.0), [*edge, rows, columns])

    before, after = (0, half, 0), (half, 0, 0)
    return place(first, before, before) + place(second, after, after) - place(corner, after, before)


def _self_product(lower: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """``L' L`` of lower triangles, by halves: a third of the work of the dense product."""
    n = lower.shape[-1]
    if n <= 2 * _SMALL_TRIANGLE or n % 2:
        return lower.mT @ lower
    half = n // 2
    first, corner, second = lower[..., :half, :half], lower[..., half:, :half], lower[..., half:, half:]
    top, low = _self_product(first) + corner.mT @ corner, second.mT @ corner
    return jnp.concatenate([jnp.concatenate([top, low.mT], -1), jnp.concatenate([low, _self_product(second)], -1)], -2)


def _prepare(
    config: SurrogateConfig,
    *,
    x: Float[Array, "n d"],
    time: Float[Array, "n"],
    group: Int[Array, "n"],
    used: Bool[Array, "n"],
    noise: Float[Array, "n"],
    residual: Float[Array, "n"],
) -> _Data:
    n = used.size
    pair = (used[:, None] & used[None, :]).astype(jnp.float32)
    identity = np.eye(n, dtype=np.float32)
    level = config.intercept_scale**2 * pair
    if config.has_groups:
        level = jnp.where(group[:, None] == group[None, :], level, 0.0)
    return _Data(
        square=jnp.pad(_square(config, x, x).reshape(config.dims, -1), ((0, 4), (0, 0))),
        lag=jnp.abs(time[:, None] - time[None, :]).reshape(-1),
        pair=pair,
        fixed=level + identity * jnp.where(used, noise + config.noise_floor**2, 1.0),
        used=(jnp.asarray(identity) * pair).reshape(-1),
        residual=residual,
    )


def _evidence(
    config: SurrogateConfig, data: _Data, theta: Float[Array, "s p"]
) -> tuple[Float[Array, "s"], Float[Array, "s p"], Float[Array, "s n n"]]:
    """Negative log posterior of the hyperparameters, its gradient, and the whitener, for several at once.

    With ``G = (K^-1 - alpha alpha') / 2`` the gradient is ``sum(G * dK)``: neither the factorisation nor the kernel is
    differentiated by JAX. Sums are matrix products where they can be, since those cost the compiler nothing.
    """
    (count, p), n, d = theta.shape, data.residual.size, config.dims
    # Inverse squared lengthscales, variances of signal and noise, inverse time lengthscale, noise over signal.
    rates = np.diag([-2.0] * d + [2.0, 2.0, -1.0, 0.0])[:p].astype(np.float32)
    rates[d : d + 2, p] = -2.0, 2.0
    natural = jnp.exp(jnp.dot(theta, rates, precision=jax.lax.Precision.HIGHEST))
    # A product, not a sum: XLA fuses a sum into what follows, which then is not vectorised.
    total = jnp.dot(natural, data.square, precision=jax.lax.Precision.HIGHEST)
    shape = _shape_kernel(config, total, data.lag, variance=natural[:, d], time_rate=natural[:, d + 2])
    shape = data.pair * shape.reshape(count, n, n)
    joint = shape + data.fixed + natural[:, d + 1, None, None] * data.used.reshape(n, n)
    whitener = _inverse(jax.lax.linalg.cholesky(joint, symmetrize_input=False))
    white = whitener @ data.residual
    alpha = jnp.einsum("sij,si->sj", whitener, white)
    weight = (_self_product(whitener) - alpha[:, :, None] * alpha[:, None, :]) * shape
    weight = weight.reshape(count, n * n)

    loc, scale = _prior(config)
    standard = (theta - loc) / scale
    one_hot = np.eye(p, dtype=np.float32)
    slopes = standard / scale - natural[:, :p] * ((weight * _shape_slope(total)) @ data.square.T)[:, :p]
    slopes += one_hot[d] * jnp.sum(weight, axis=1)[:, None]
    slopes += one_hot[d + 1] * (natural[:, p] * (weight @ data.used))[:, None]
    if config.has_time:
        slopes += one_hot[d + 2] * (0.5 * natural[:, d + 2] * (weight @ data.lag))[:, None]
    diagonal = whitener.reshape(count, n * n)[:, :: n + 1]
    terms = jnp.concatenate([jnp.square(white), jnp.square(standard), jnp.log(diagonal)], axis=1)
    return terms @ np.repeat(np.array([0.5, -1.0], np.float32), [n + p, n]), slopes, whitener


def _flatten(hyper: Hyper) -> Float[Array, "p"]:
    return jnp.concatenate([hyper.lengthscale, jnp.stack([hyper.signal, hyper.noise, hyper.time_lengthscale])])


def _unflatten(config: SurrogateConfig, theta: Float[Array, "*many p"]) -> Hyper:
    d = config.dims
    return Hyper(theta[..., :d], theta[..., d], theta[..., d + 1], theta[..., d + 2])


def _seeds(
    config: SurrogateConfig, start: Float[Array, "p"], key: PRNGKeyArray, low: np.ndarray, high: np.ndarray
) -> Float[Array, "draws starts p"]:
    """Where the fit looks first: the warm start, a safe place, and draws around the prior's location."""
    loc, scale = _prior(config)
    starts, draws, size = config.fit_starts, config.fit_draws, loc.size
    table = spread_table(starts * draws, size).reshape(starts, draws, size).swapaxes(0, 1)
    table = turned(table, uniforms(key, size))
    # Triangular, up to two scales to either side.
    offset = 2.0 * jnp.sign(table - 0.5) * (1.0 - jnp.sqrt(1.0 - jnp.abs(2.0 * table - 1.0)))
    warm = jnp.where(jnp.isfinite(start), jnp.clip(start, low, high), loc)
    # With noise as large as the search allows a factor always exists, so that every fit has a result.
    safe = loc.copy()
    safe[-2] = high[-2]
    is_warm, is_safe, is_loc = np.zeros((3, draws, starts, 1), bool)
    is_warm[0, 0], is_safe[0, -1], is_loc[-1, -1] = True, True, True
    seeds = jnp.where(is_warm, warm, jnp.clip(loc + scale * offset, low, high))
    return jnp.where(is_loc, loc, jnp.where(is_safe, safe, seeds))


@single_kernel(static_argnums=(0,))
def _prepared(
    config: SurrogateConfig, obs: Observations, start: Hyper, key: PRNGKeyArray, prior_mean: PriorMean | None
) -> tuple[Float[Array, "n d"], Bool[Array, "n"], Targets, _Data, Float[Array, "draws starts p"]]:
    """What a fit begins with: points, which of them count, targets, what the evidence needs, and where to look."""
    used = used_slots(obs)
    x = jnp.where(used[:, None], obs.x, 0.5)
    group = obs.group if config.has_groups else jnp.zeros_like(obs.group)
    target = targets(
        obs,
        group=group,
        level=None if prior_mean is None else bowl(prior_mean, x),
        standardise=config.standardise,
        is_centred_apart=config.has_groups,
        outlier=config.outlier,
        failure_margin=config.failure_margin,
    )
    data = _prepare(config, x=x, time=obs.time, group=group, used=used, noise=target.noise, residual=target.residual)

    loc, scale = _prior(config)
    low, high = loc - _REACH * scale, loc + _REACH * scale
    return x, used, target, data, _seeds(config, _flatten(start), key, low, high)


def fit(
    config: SurrogateConfig,
    obs: Observations,
    *,
    start: Hyper,
    key: PRNGKeyArray,
    prior_mean: PriorMean | None = None,
) -> Posterior:
    """Fits the hyperparameters to the trials by maximum a posteriori and conditions on the trials.

    Any number of observations is fine, none included: then the posterior is the prior.

    Args:
      config: What is modelled; static.
      obs: The trials.
      start: Warm start, usually the last posterior's ``hyper``.
      key: For the starting points drawn from the prior.
      prior_mean: What is believed before the first trial; flat by default.

    Returns:
      The posterior at the best hyperparameters found.

    Cost:
      ``fit_starts * (fit_draws + fit_steps)`` factorisations, O(n^3) each, for n slots however many are used.
    """
    x, used, target, data, seeds = _prepared(config, obs, start, key, prior_mean)
    loc, scale = _prior(config)
    low, high = loc - _REACH * scale, loc + _REACH * scale
    search = {"low": low, "high": high, "scale": scale, "steps": config.fit_steps}
    shape = (config.fit_starts, used.size, used.size)
    thetas, values, whiteners = minimise(lambda theta: _evidence(config, data, theta), seeds, extra=shape, **search)
    best = jnp.argmin(values)
    theta, value, whitener = (
        jax.lax.dynamic_index_in_dim(part, best, keepdims=False) for part in (thetas, values, whiteners)
    )
    return Posterior(
        hyper=_unflatten(config, theta),
        x=x,
        time=obs.time,
        used=used,
        whitener=whitener,
        white=whitener @ target.residual,
        location=target.location,
        scale=target.scale,
        prior_mean=prior_mean,
        evidence=-value,
    )


def covariance(
    config: SurrogateConfig,
    posterior: Posterior,
    x: Float[Array, "m d"],
    z: Float[Array, "k d"],
    *,
    lag: Float[Array, "m k"] | float = 0.0,
) -> tuple[Float[Array, "m k"], Float[Array, "m k"]]:
    """Prior covariance of ``f`` between two sets of points ``lag`` apart in time, in the surrogate's unit.

    Returns:
      The covariance, and what times ``(x - z) / lengthscale^2`` is its slope over each ``x`` with an order.
    """
    shape = (x.shape[0], z.shape[0])
    lag = jnp.broadcast_to(jnp.abs(jnp.asarray(lag, jnp.float32)), shape).reshape(-1)
    hyper = posterior.hyper
    total = jnp.dot(
        jnp.exp(-2.0 * hyper.lengthscale),
        _square(config, x, z).reshape(config.dims, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    variance, time_rate = jnp.exp(2.0 * hyper.signal), jnp.exp(-hyper.time_lengthscale)
    prior = _shape_kernel(config, total, lag, variance=variance, time_rate=time_rate)
    slope = 2.0 * prior * _shape_slope(total)
    level = 0.0 if config.has_groups else config.intercept_scale**2
    return prior.reshape(shape) + level, slope.reshape(shape)


def prior_variance(config: SurrogateConfig, posterior: Posterior) -> Float[Array, ""]:
    """Prior variance of ``f`` at any point, in the surrogate's unit."""
    level = 0.0 if config.has_groups else config.intercept_scale**2
    return jnp.exp(2.0 * posterior.hyper.signal) + level


def level(posterior: Posterior, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """Prior mean of ``f``, in the surrogate's unit."""
    if posterior.prior_mean is None:
        return jnp.zeros(x.shape[:-1], jnp.float32)
    return bowl(posterior.prior_mean, x) / posterior.scale


def level_slope(posterior: Posterior, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Slope of `level` over each coordinate."""
    if posterior.prior_mean is None:
        return jnp.zeros_like(x)
    curvature, away = posterior.prior_mean.curvature, x - posterior.prior_mean.center
    root = jnp.sqrt(1.0 + 0.5 * jnp.sum(curvature * jnp.square(away), axis=-1, keepdims=True))
    return curvature * away / (root * posterior.scale)


def predict(
    config: SurrogateConfig,
    posterior: Posterior,
    x: Float[Array, "m d"],
    *,
    time: Float[Array, "..."] | float = 0.0,
) -> tuple[Float[Array, "m"], Float[Array, "m m"]]:
    """Joint posterior of the shape ``f`` (with the prior mean) at several points, without noise.

    With groups, the intercept of the group is left out: only differences between points mean something.

    Args:
      config: As given to `fit`.
      posterior: What `fit` returned.
      x: Snapped points of the unit cube.
      time: When, for all or for each of the points.

    Returns:
      Mean, in the unit of the scores, and covariance, in its square. With ``standardise`` that unit is true of the
      better half of the scores; above their median predictions are compressed as the scores were.

    Cost:
      O(n^2 m + n m^2).
    """
    size = x.shape[0]
    time = jnp.broadcast_to(jnp.asarray(time, jnp.float32), (size,))
    everything, times = jnp.concatenate([posterior.x, x]), jnp.concatenate([posterior.time, time])
    prior, _ = covariance(config, posterior, x, everything, lag=time[:, None] - times[None, :])
    cross = jnp.where(posterior.used[None, :], prior[:, :-size], 0.0)
    white = cross @ posterior.whitener.T
    joint = prior[:, -size:] - white @ white.T
    floor = 1e-7 * prior_variance(config, posterior)
    joint += jnp.diag(jnp.maximum(floor - jnp.diagonal(joint), 0.0))
    mean = level(posterior, x) + white @ posterior.white
    return posterior.location + posterior.scale * mean, jnp.square(posterior.scale) * joint
