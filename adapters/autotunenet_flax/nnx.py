"""Dropout for Flax NNX whose rate is an argument of the call."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from autotunenet_jax import traced_dropout


class TracedDropout(nnx.Module):
    """Dropout whose rate may change from step to step of one compiled program.

    The rate of ``nnx.Dropout`` is part of the program: each new one compiles it again. ``model.eval()`` and
    ``model.train()`` work as usual.

    Example:
        >>> import jax.numpy as jnp
        >>> dropout = TracedDropout(rngs=nnx.Rngs(0))
        >>> y = nnx.jit(lambda module, x, rate: module(x, rate))(dropout, jnp.ones(1000), jnp.float32(0.25))
        >>> sorted({round(float(value), 3) for value in y})
        [0.0, 1.333]

    Args:
      deterministic: Whether to pass the input on unchanged.
      rng_collection: Name of the stream in ``rngs``.
      rngs: Where random numbers come from; a stream of its own is forked off.
    """

    def __init__(self, *, deterministic: bool = False, rng_collection: str = "dropout", rngs: nnx.Rngs):
        self.deterministic = deterministic
        self.rngs = rngs[rng_collection].fork()

    def __call__(
        self, x: Float[Array, "*shape"], rate: Any, *, deterministic: bool | None = None
    ) -> Float[Array, "*shape"]:
        """Sets entries to zero with probability ``rate``, which may be traced; see `autotunenet_jax.traced_dropout`."""
        if self.deterministic if deterministic is None else deterministic:
            return x
        return traced_dropout(self.rngs(), x, rate)
