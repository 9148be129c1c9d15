"""Points that fill the unit cube, from tables made once and turned at random.

Everything here costs the compiler next to nothing: the engine lives inside other people's training steps, where a call
of JAX's counter-based generator takes as long to compile as a matrix factorisation.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


@functools.cache
def spread_table(count: int, dims: int) -> np.ndarray:
    """The additive recurrence of the generalised golden ratio: low discrepancy in every dimension, no tables.

    Source:
      M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018).
    """
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (dims + 1))
    steps = root ** -np.arange(1.0, dims + 1)
    return np.mod(0.5 + np.arange(1, count + 1)[:, None] * steps[None, :], 1.0).astype(np.float32)


@functools.cache
def normal_table(count: int, dims: int) -> np.ndarray:
    """Standard normal points of low discrepancy."""
    inverse = statistics.NormalDist().inv_cdf
    flat = [inverse(min(max(float(u), 1e-4), 1.0 - 1e-4)) for u in spread_table(count, dims).ravel()]
    return np.asarray(flat, np.float32).reshape(count, dims)


def uniforms(key: PRNGKeyArray, count: int) -> Float[Array, "count"]:
    """A few numbers in [0, 1) from the words of a key, by the finaliser of MurmurHash3.

    Good for turning a table, not for statistics. Keys from ``jax.random.split`` are well mixed already.
    """
    words = jax.random.key_data(key).reshape(-1)
    mixed = jnp.arange(1, count + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for position in range(words.size):
        mixed ^= words[position]
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        mixed ^= mixed >> 16
    return (mixed >> 8).astype(jnp.float32) * (1.0 / 2**24)


def turned(table: np.ndarray, shift: Float[Array, "d"]) -> Float[Array, "n d"]:
    """A table of the unit cube shifted around the torus, which keeps its discrepancy."""
    return jnp.mod(jnp.asarray(table) + shift, 1.0)
