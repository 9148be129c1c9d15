"""What the surrogate models: its configuration, its hyperparameters and the kernel of its shape.

Squared distances come per dimension with the pairs last: compilers vectorise over pairs and not over dimensions.

Gradients are written in closed form, not derived by JAX, so a change of kernel changes these together:

- Another kernel of the same hyperparameters: `shape_kernel`, its slope `shape_slope` (over hyperparameters) or
  `time_slope` (over time), and the twin in ``tests/reference/gaussian_process.py``. The gradients of the evidence
  (`marginal_likelihood.evidence_of`) and of the posterior (`surrogate.covariance`) are made of the slopes.
- One with a hyperparameter more: besides, `Hyper`, `flatten`, `unflatten`, the prior in `SurrogateConfig` and
  `hyperprior`; the exponents that give its natural parameters and its slope in `marginal_likelihood.evidence_of`, the
  padding in `marginal_likelihood.prepare`, the same exponents in `surrogate.fit_among`, `surrogate.covariance`, and the
  place of the noise in `surrogate._seeds`. `controller.fork_surrogate.config_of` sets the priors of fork rounds.
- One whose variance is not `variance` at every point: besides, `surrogate.prior_variance`.
- One that is no function of the scaled distance and of time: `shape_kernel` cannot express it.

``tests/bayesopt/test_surrogate.py`` compares values and gradients with the twin.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Two snapped options of an unordered choice differ by far more than float32 rounding.
_SAME_OPTION = 1e-4
# Squared distance, in lengthscales, below which two points are one; a square root at zero has no gradient.
_SAME_PLACE = 1e-12


def _gpjax_kernels() -> Any:
    """GPJax's kernels; the import initialises JAX's backend and must not happen inside a trace."""
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        # In a notebook it misses widgets for progress bars that are never shown.
        warnings.filterwarnings("ignore", message="IProgress not found")
        import gpjax.kernels

    return gpjax.kernels


INTERCEPT = 1.0
"""``b``, in the (standardised) unit of the score."""


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
      kept: With ``standardise`` and without groups, scores count logarithmically beyond so far above the median, in
        standard deviations of the better half, and beyond what noise can have carried there.
      fit_steps: Iterations of the fit; each evaluates the evidence once.
      fit_starts: Searches of the fit that run side by side; the first knows the warm start.
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
    kept: float = 0.2
    fit_steps: int = 16
    fit_starts: int = 3

    def __post_init__(self):
        defaults = {
            "is_categorical": (False,) * self.dims,
            "lengthscale_loc": (math.sqrt(2.0) + math.log(self.dims) / 2.0,) * self.dims,
        }
        for name, default in defaults.items():
            given = tuple(getattr(self, name)) or default
            object.__setattr__(self, name, tuple(type(default[0])(entry) for entry in given))
        # Tracing needs it.
        _gpjax_kernels()


class Hyper(NamedTuple):
    """Logarithms of the fitted hyperparameters; without time the last keeps its prior's location."""

    lengthscale: Float[Array, "d"]
    signal: Float[Array, ""]
    noise: Float[Array, ""]
    time_lengthscale: Float[Array, ""]


def hyperprior(config: SurrogateConfig) -> tuple[np.ndarray, np.ndarray]:
    """Location and scale of the normal priors of the log-hyperparameters, in the order of `Hyper`."""
    loc = [*config.lengthscale_loc, config.signal_loc, config.noise_loc, config.time_loc]
    scale = [config.lengthscale_scale] * config.dims + [config.signal_scale, config.noise_scale, config.time_scale]
    return np.asarray(loc, np.float32), np.asarray(scale, np.float32)


def initial_hyper(config: SurrogateConfig) -> Hyper:
    """Where the first fit starts: the prior's locations."""
    return unflatten(config, jnp.asarray(hyperprior(config)[0]))


def flatten(hyper: Hyper) -> Float[Array, "p"]:
    """The log-hyperparameters as one vector, in the order of `Hyper`."""
    return jnp.concatenate([hyper.lengthscale, jnp.stack([hyper.signal, hyper.noise, hyper.time_lengthscale])])


def unflatten(config: SurrogateConfig, theta: Float[Array, "*many p"]) -> Hyper:
    """What `flatten` made a vector of."""
    d = config.dims
    return Hyper(theta[..., :d], theta[..., d], theta[..., d + 1], theta[..., d + 2])


def square(config: SurrogateConfig, x: Float[Array, "m d"], z: Float[Array, "n d"]) -> Float[Array, "d m n"]:
    """Squared distance per dimension. The pairs come last, so that compilers vectorise over them and not over d."""
    delta = x.T[:, :, None] - z.T[:, None, :]
    if not any(config.is_categorical):
        return jnp.square(delta)
    is_other = jnp.where(jnp.abs(delta) > _SAME_OPTION, 1.0, 0.0)
    return jnp.where(jnp.array(config.is_categorical)[:, None, None], is_other, jnp.square(delta))


@functools.cache
def _profile(name: str) -> Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """A kernel of unit variance and lengthscale as a function of the distance; its own code is traced only once."""
    from jax.extend.core import jaxpr_as_fun

    kernel = getattr(_gpjax_kernels(), name)
    # Made outside a trace, its parameters would be computed one operation, and one compilation, at a time.
    program = jax.make_jaxpr(lambda r: kernel(n_dims=1)(r[None], jnp.zeros_like(r[None])))(
        jax.ShapeDtypeStruct((), jnp.float32)
    )
    return jax.jit(lambda r: jax.vmap(jaxpr_as_fun(program))(r.reshape(-1))[0].reshape(r.shape))


def shape_kernel(
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


def time_slope(
    weight: Float[Array, "s pairs"], lag: Float[Array, "pairs"], *, time_rate: Float[Array, "s"]
) -> Float[Array, "s"]:
    """Slope of the logarithm of the Matern-1/2 kernel over that of its lengthscale, a weighted sum over the pairs."""
    return time_rate * (weight @ lag)


def shape_slope(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Slope of the logarithm of the Matern-5/2 kernel over the squared scaled distance."""
    square = jnp.maximum(total, _SAME_PLACE)
    near = 1.0 + jnp.sqrt(5.0 * square)
    return -0.5 * near / (0.6 * near + square)
