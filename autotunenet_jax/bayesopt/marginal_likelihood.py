"""How well hyperparameters explain the trials: the evidence and its gradient, for several at once.

Notation as in `surrogate`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .kernels import INTERCEPT, SurrogateConfig, hyperprior, shape_kernel, shape_slope, square, time_slope

# Triangles up to this size are inverted by substitution.
_SMALL_TRIANGLE = 32


class Data(NamedTuple):
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


def prepare(
    config: SurrogateConfig,
    *,
    x: Float[Array, "n d"],
    time: Float[Array, "n"],
    group: Int[Array, "n"],
    used: Bool[Array, "n"],
    noise: Float[Array, "n"],
    residual: Float[Array, "n"],
) -> Data:
    """What every evaluation of the marginal likelihood has in common, worked out once."""
    n = used.size
    pair = (used[:, None] & used[None, :]).astype(jnp.float32)
    identity = np.eye(n, dtype=np.float32)
    level = INTERCEPT**2 * pair
    if config.has_groups:
        level = jnp.where(group[:, None] == group[None, :], level, 0.0)
    return Data(
        square=jnp.pad(square(config, x, x).reshape(config.dims, -1), ((0, 4), (0, 0))),
        lag=jnp.abs(time[:, None] - time[None, :]).reshape(-1),
        pair=pair,
        fixed=level + identity * jnp.where(used, noise + config.noise_floor**2, 1.0),
        used=(jnp.asarray(identity) * pair).reshape(-1),
        residual=residual,
    )


def evidence_of(
    config: SurrogateConfig, data: Data, theta: Float[Array, "s p"]
) -> tuple[Float[Array, "s"], Float[Array, "s p"], Float[Array, "s n n"]]:
    """Negative log posterior of the hyperparameters, its gradient, and the whitener, for several at once.

    With ``G = (K^-1 - alpha alpha') / 2`` the gradient is ``sum(G * dK)``: neither the factorisation nor the kernel is
    differentiated by JAX. Sums are matrix products where they can be, since those cost the compiler nothing.
    """
    (count, p), n, d = theta.shape, data.residual.size, config.dims
    # Inverse squared lengthscales, variances of signal and noise, inverse time lengthscale, noise over signal.
    rates = np.diag([-2.0] * d + [2.0, 2.0, -1.0, 0.0])[:p].astype(np.float32)
    rates[d : d + 2, p] = -2.0, 2.0
    natural = jnp.exp(theta @ rates)
    # A product, not a sum: XLA fuses a sum into what follows, which then is not vectorised.
    total = natural @ data.square
    shape = shape_kernel(config, total, data.lag, variance=natural[:, d], time_rate=natural[:, d + 2])
    shape = data.pair * shape.reshape(count, n, n)
    joint = shape + data.fixed + natural[:, d + 1, None, None] * data.used.reshape(n, n)
    whitener = _inverse(jax.lax.linalg.cholesky(joint, symmetrize_input=False))
    white = whitener @ data.residual
    alpha = jnp.einsum("sij,si->sj", whitener, white)
    weight = (_self_product(whitener) - alpha[:, :, None] * alpha[:, None, :]) * shape
    weight = weight.reshape(count, n * n)

    loc, scale = hyperprior(config)
    standard = (theta - loc) / scale
    one_hot = np.eye(p, dtype=np.float32)
    slopes = standard / scale - natural[:, :p] * ((weight * shape_slope(total)) @ data.square.T)[:, :p]
    slopes += one_hot[d] * jnp.sum(weight, axis=1)[:, None]
    slopes += one_hot[d + 1] * (natural[:, p] * (weight @ data.used))[:, None]
    if config.has_time:
        slopes += one_hot[d + 2] * (0.5 * time_slope(weight, data.lag, time_rate=natural[:, d + 2]))[:, None]
    diagonal = whitener.reshape(count, n * n)[:, :: n + 1]
    terms = jnp.concatenate([jnp.square(white), jnp.square(standard), jnp.log(diagonal)], axis=1)
    return terms @ np.repeat(np.array([0.5, -1.0], np.float32), [n + p, n]), slopes, whitener


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
