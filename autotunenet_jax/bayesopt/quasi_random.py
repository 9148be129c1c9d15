"""Points that fill the unit cube, from tables made once and turned at random.

Everything here costs the compiler next to nothing: decisions live inside other people's training steps, where a call of
JAX's counter-based generator takes as long to compile as a matrix factorisation.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32


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


def _mixed(key: PRNGKeyArray, count: int, first: int) -> UInt32[Array, "count"]:
    """Words of a counter and a key, mixed by the finaliser of MurmurHash3."""
    words = jax.random.key_data(key).reshape(-1)
    mixed = jnp.asarray(np.arange(first, first + count, dtype=np.uint32) * np.uint32(0x9E3779B9))
    for position in range(words.size):
        mixed ^= words[position]
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        mixed ^= mixed >> 16
    return mixed


def uniforms(key: PRNGKeyArray, count: int) -> Float[Array, "count"]:
    """A few numbers in [0, 1) from the words of a key.

    Good for turning a table, not for statistics. Keys from ``jax.random.split`` are well mixed already.
    """
    return (_mixed(key, count, 1) >> 8).astype(jnp.float32) * np.float32(1.0 / 2**24)


def branches(key: PRNGKeyArray, count: int) -> PRNGKeyArray:
    """As ``jax.random.split``, for keys that turn tables."""
    words = jax.random.key_data(key).size
    mixed = _mixed(key, count * words, 1 << 20).reshape(count, words)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return mixed
    return jax.random.wrap_key_data(mixed, impl=jax.random.key_impl(key))


def turned(table: np.ndarray, shift: Float[Array, "d"]) -> Float[Array, "n d"]:
    """A table of the unit cube shifted around the torus, which keeps its discrepancy."""
    moved = jnp.asarray(table) + shift
    return moved - jnp.floor(moved)
