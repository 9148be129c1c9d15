"""The networks of the benchmark, in plain JAX: ``init(key) -> params`` and ``apply(params, x, key, rate) -> outputs``.

``key`` and ``rate`` drive dropout; ``key=None`` switches it off. The rate may be traced, so it can be tuned online.
"""

import itertools
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


def _rms(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


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


def tanh_mlp(*sizes: int) -> Model:
    """Layers of tanh of the given widths, without dropout."""
    pairs = list(itertools.pairwise(sizes))

    def init(key):
        return [
            _dense_init(k, a, b, gain=1.0) for k, (a, b) in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
        ]

    def apply(params, x, key, rate):
        for layer in params[:-1]:
            x = jnp.tanh(_dense(layer, x))
        return _dense(params[-1], x)

    return Model(init, apply)


def cnn(side: int, channels: tuple[int, int], n_classes: int) -> Model:
    """Two strided 3 x 3 convolutions and a dense layer, on flat ``[n, side * side]`` images."""
    c1, c2 = channels
    out_side = math.ceil(math.ceil(side / 2) / 2)

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "conv1": _dense_init(k1, 9, c1),
            "conv2": _dense_init(k2, 9 * c1, c2),
            "head": _dense_init(k3, out_side * out_side * c2, n_classes, gain=1.0),
        }

    def conv(layer, x):
        # Nine shifted views and one matrix product: several times faster on a CPU than the convolution primitive.
        n = math.ceil(x.shape[1] / 2)
        x = jnp.pad(x, ((0, 0), (0, 2), (0, 2), (0, 0)))
        views = [x[:, i : i + 2 * n : 2, j : j + 2 * n : 2] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(views, axis=-1)
        return jax.nn.relu(patches @ layer["w"] + layer["b"])

    def apply(params, x, key, rate):
        x = x.reshape(-1, side, side, 1)
        x = conv(params["conv2"], conv(params["conv1"], x))
        return _dense(params["head"], dropout(x.reshape(x.shape[0], -1), key, rate))

    return Model(init, apply)


def transformer(vocabulary: int, context: int, width: int, depth: int, heads: int) -> Model:
    """A causal pre-norm transformer over int32 ``[n, context]`` tokens; dropout on both residual branches."""

    def init(key):
        keys = iter(jax.random.split(key, 3 + 4 * depth))
        small = 1.0 / (2 * depth)
        return {
            "embed": jax.random.normal(next(keys), (vocabulary, width)) * 0.02,
            "place": jax.random.normal(next(keys), (context, width)) * 0.02,
            "blocks": [
                {
                    "norm1": jnp.ones(width),
                    "qkv": _dense_init(next(keys), width, 3 * width, gain=1.0),
                    "out": _dense_init(next(keys), width, width, gain=small),
                    "norm2": jnp.ones(width),
                    "up": _dense_init(next(keys), width, 4 * width),
                    "down": _dense_init(next(keys), 4 * width, width, gain=small),
                }
                for _ in range(depth)
            ],
            "norm": jnp.ones(width),
            "head": _dense_init(next(keys), width, vocabulary, gain=1.0),
        }

    def attend(block, x):
        n, length, _ = x.shape
        qkv = _dense(block["qkv"], x).reshape(n, length, 3, heads, width // heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        score = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(width // heads)
        score = jnp.where(jnp.tril(jnp.ones((length, length), bool)), score, -1e9)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(score), v)
        return _dense(block["out"], mixed.reshape(n, length, width))

    def apply(params, x, key, rate):
        keys = [None] * (2 * depth) if key is None else jax.random.split(key, 2 * depth)
        h = params["embed"][x] + params["place"][: x.shape[1]]
        for i, block in enumerate(params["blocks"]):
            h = h + dropout(attend(block, _rms(block["norm1"], h)), keys[2 * i], rate)
            up = jax.nn.relu(_dense(block["up"], _rms(block["norm2"], h)))
            h = h + dropout(_dense(block["down"], up), keys[2 * i + 1], rate)
        return _dense(params["head"], _rms(params["norm"], h))

    return Model(init, apply)


def residual(n_in: int, width: int, depth: int, n_classes: int) -> Model:
    """Pre-norm residual blocks of two dense layers each, on flat rows; dropout on the residual branches."""

    def init(key):
        first, *blocks, last = jax.random.split(key, depth + 2)
        pairs = [jax.random.split(k) for k in blocks]
        return {
            "in": _dense_init(first, n_in, width),
            "blocks": [
                {
                    "norm": jnp.ones(width),
                    "up": _dense_init(k1, width, width),
                    "down": _dense_init(k2, width, width, gain=1.0 / depth),
                }
                for k1, k2 in pairs
            ],
            "out": _dense_init(last, width, n_classes, gain=1.0),
        }

    def apply(params, x, key, rate):
        keys = [None] * depth if key is None else jax.random.split(key, depth)
        h = _dense(params["in"], x)
        for block, k in zip(params["blocks"], keys, strict=True):
            up = jax.nn.relu(_dense(block["up"], _rms(block["norm"], h)))
            h = h + dropout(_dense(block["down"], up), k, rate)
        return _dense(params["out"], jax.nn.relu(h))

    return Model(init, apply)


def gru(vocabulary: int, width: int) -> Model:
    """A gated recurrent unit over int32 ``[n, context]`` tokens; dropout on its outputs."""

    def init(key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        return {
            "embed": jax.random.normal(k1, (vocabulary, width)) * 0.1,
            "in": _dense_init(k2, width, 3 * width, gain=1.0),
            "state": _dense_init(k3, width, 3 * width, gain=1.0),
            "head": _dense_init(k4, width, vocabulary, gain=1.0),
        }

    def apply(params, x, key, rate):
        def step(h, a):
            b = _dense(params["state"], h)
            (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
            z = jax.nn.sigmoid(az + bz)
            h = (1.0 - z) * jnp.tanh(an + jax.nn.sigmoid(ar + br) * bn) + z * h
            return h, h

        a = jnp.swapaxes(_dense(params["in"], params["embed"][x]), 0, 1)
        _, outputs = jax.lax.scan(step, jnp.zeros((x.shape[0], width)), a)
        return _dense(params["head"], dropout(jnp.swapaxes(outputs, 0, 1), key, rate))

    return Model(init, apply)


def conv1d(channels: tuple[int, int], length: int, n_classes: int) -> Model:
    """Two strided convolutions of width five and a dense layer, on ``[n, length]`` signals."""
    c1, c2 = channels
    out_length = math.ceil(math.ceil(length / 2) / 2)

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "conv1": _dense_init(k1, 5, c1),
            "conv2": _dense_init(k2, 5 * c1, c2),
            "head": _dense_init(k3, out_length * c2, n_classes, gain=1.0),
        }

    def conv(layer, x):
        n = math.ceil(x.shape[1] / 2)
        x = jnp.pad(x, ((0, 0), (2, 4), (0, 0)))
        return jax.nn.relu(_dense(layer, jnp.concatenate([x[:, i : i + 2 * n : 2] for i in range(5)], axis=-1)))

    def apply(params, x, key, rate):
        x = conv(params["conv2"], conv(params["conv1"], x[:, :, None]))
        return _dense(params["head"], dropout(x.reshape(x.shape[0], -1), key, rate))

    return Model(init, apply)
