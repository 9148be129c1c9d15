"""Dropout whose rate is an array, so that it can change from step to step of one compiled program."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def traced_dropout(
    key: PRNGKeyArray,
    x: Float[Array, "*shape"],
    rate: Any,
    *,
    deterministic: Any = False,
) -> Float[Array, "*shape"]:
    """Sets entries to zero with probability ``rate`` and scales the others up, so that the mean stays.

    The rate of Flax's own dropout modules is fixed when the program is compiled. In a linen module use
    ``traced_dropout(self.make_rng("dropout"), x, rate)``, in an NNX one
    ``traced_dropout(self.rngs.dropout(), x, rate)``.

    Example:
        >>> x = jnp.ones((1000,))
        >>> y = jax.jit(traced_dropout)(jax.random.key(0), x, jnp.float32(0.25))
        >>> sorted({round(float(value), 3) for value in y})
        [0.0, 1.333]

    Args:
      key: PRNG key.
      x: Real array, any shape and dtype.
      rate: Probability of being set to zero, scalar in [0, 1), may be traced; moved there when outside.
      deterministic: Whether to pass ``x`` on unchanged; may be traced.

    Returns:
      An array like ``x``. At rate 0 it equals ``x`` exactly.

    Cost: one uniform number per entry, also at rate 0.
    """
    largest = 1.0 - float(jnp.finfo(jnp.float32).eps)
    rate = jnp.where(jnp.asarray(deterministic), 0.0, jnp.clip(jnp.asarray(rate, jnp.float32), 0.0, largest))
    is_kept = jax.random.uniform(key, x.shape, jnp.float32) >= rate
    return jnp.where(is_kept, x.astype(jnp.float32) / (1.0 - rate), 0.0).astype(x.dtype)
