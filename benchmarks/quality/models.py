"""The networks of the benchmark, in plain JAX: ``init(key) -> params`` and ``apply(params, x, key, rate) -> outputs``.

``key`` and ``rate`` drive dropout; ``key=None`` switches it off. The rate may be traced, so it can be tuned online.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any


class Model(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]


def dropout(x: jax.Array, key: jax.Array | None, rate: jax.Array) -> jax.Array:
    """Inverted dropout whose rate may be a traced scalar in ``[0, 1)``."""
    if key is None:
        return x
    keep = 1.0 - rate
    return jnp.where(jax.random.uniform(key, x.shape) < keep, x / keep, 0.0).astype(x.dtype)


def _dense_init(key: jax.Array, n_in: int, n_out: int, *, gain: float = 2.0) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(key, (n_in, n_out)) * math.sqrt(gain / n_in), "b": jnp.zeros(n_out)}


def _dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def mlp(*sizes: int) -> Model:
    """ReLU layers of the given widths; dropout after each hidden layer."""
    depth = len(sizes) - 1

    def init(key):
        keys = jax.random.split(key, depth)
        gains = [2.0] * (depth - 1) + [1.0]
        return [_dense_init(k, a, b, gain=g) for k, a, b, g in zip(keys, sizes[:-1], sizes[1:], gains, strict=True)]

    def apply(params, x, key, rate):
        keys = [None] * depth if key is None else jax.random.split(key, depth)
        for layer, k in zip(params[:-1], keys[:-1], strict=True):
            x = dropout(jax.nn.relu(_dense(layer, x)), k, rate)
        return _dense(params[-1], x)

    return Model(init, apply)


def cnn(side: int, channels: tuple[int, int], n_classes: int) -> Model:
    """Two strided 3 x 3 convolutions and a dense layer, on flat ``[n, side * side]`` images."""
    c1, c2 = channels
    out_side = math.ceil(math.ceil(side / 2) / 2)

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "conv1": {"w": jax.random.normal(k1, (3, 3, 1, c1)) * math.sqrt(2 / 9), "b": jnp.zeros(c1)},
            "conv2": {"w": jax.random.normal(k2, (3, 3, c1, c2)) * math.sqrt(2 / (9 * c1)), "b": jnp.zeros(c2)},
            "head": _dense_init(k3, out_side * out_side * c2, n_classes, gain=1.0),
        }

    def conv(layer, x):
        y = jax.lax.conv_general_dilated(x, layer["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(y + layer["b"])

    def apply(params, x, key, rate):
        x = x.reshape(-1, side, side, 1)
        x = conv(params["conv2"], conv(params["conv1"], x))
        return _dense(params["head"], dropout(x.reshape(x.shape[0], -1), key, rate))

    return Model(init, apply)
