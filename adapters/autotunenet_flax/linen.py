"""Dropout for Flax linen whose rate is an argument of the call."""

from typing import Any

from flax import linen
from jaxtyping import Array, Float

from autotunenet_jax import traced_dropout


class TracedDropout(linen.Module):
    """Dropout whose rate may change from step to step of one compiled program; ``linen.Dropout`` refuses such a rate.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> dropout = jax.jit(lambda key, x, rate: TracedDropout().apply({}, x, rate, rngs={"dropout": key}))
        >>> y = dropout(jax.random.key(0), jnp.ones(1000), jnp.float32(0.25))
        >>> sorted({round(float(value), 3) for value in y})
        [0.0, 1.333]

    Attributes:
      deterministic: Whether to pass the input on unchanged.
      rng_collection: Name of the stream of random numbers.
    """

    deterministic: bool = False
    rng_collection: str = "dropout"

    def __call__(
        self, x: Float[Array, "*shape"], rate: Any, *, deterministic: bool | None = None
    ) -> Float[Array, "*shape"]:
        """Sets entries to zero with probability ``rate``, which may be traced; see `autotunenet_jax.traced_dropout`."""
        if self.deterministic if deterministic is None else deterministic:
            return x
        return traced_dropout(self.make_rng(self.rng_collection), x, rate)
