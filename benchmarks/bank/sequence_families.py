"""Families of sequences: attention, recurrent networks, convolutions and embeddings of text."""

from collections import Counter
from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from mnist1d.data import get_dataset_args, make_dataset

from benchmarks.bank.problems import (
    Batch,
    Key,
    Network,
    Params,
    Problem,
    affine,
    classifier,
    cross_entropy,
    dense,
    divide,
    network,
    normalise,
    regressor,
    symbols,
    text,
)

Generator = np.random.Generator
SYMBOLS = 29
LENGTH = 8  # of a sequence


def _windows(rng: Generator, n: int, length: int) -> np.ndarray:
    starts = rng.integers(0, len(symbols()) - length, n)
    return symbols()[starts[:, None] + np.arange(length)]


def context(rng: Generator) -> Problem:
    """The next letter from the eight before it, by a dense network over their embeddings."""
    windows = _windows(rng, 6000, LENGTH + 1)
    net = network(rng, 12 * LENGTH, SYMBOLS)

    def init(key: jax.Array) -> Params:
        return {"embedding": jax.random.normal(key, (SYMBOLS, 12)), **net.init(jax.random.fold_in(key, 1))}

    def apply(params: Params, x: jax.Array, key: Key) -> jax.Array:
        return net.apply(params, params["embedding"][x].reshape(len(x), -1), key)

    return Problem(init, classifier(Network(init, apply)), *divide(rng, windows[:, :-1], windows[:, -1]))


def _sequences(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and what is to be said at each place (-1: nothing): the next letter of text, or a letter looked up."""
    if rng.integers(2):
        windows = _windows(rng, 4000, LENGTH + 1)
        return windows[:, :-1], windows[:, 1:]
    n, places = 4000, LENGTH - 1
    x = rng.integers(0, 10, (n, LENGTH))
    place = rng.integers(0, places, n)
    x[:, -1] = 10 + place
    y = np.full((n, LENGTH), -1)
    y[:, -1] = x[np.arange(n), place]
    return x, y


def _attend(block: Params, x: jax.Array, heads: int) -> jax.Array:
    """Causal self-attention."""
    rows, length, width = x.shape
    q, k, v = jnp.moveaxis(affine(block["qkv"], x).reshape(rows, length, 3, heads, width // heads), 2, 0)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(width // heads)
    shares = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9), axis=-1)
    return affine(block["out"], jnp.einsum("nhqk,nkhd->nqhd", shares, v).reshape(rows, length, width))


def _attention(rng: Generator, norm: Literal["pre", "post", "none"]) -> Problem:
    width, depth, heads = int(rng.choice([16, 24])), int(rng.choice([1, 2])), int(rng.choice([1, 2]))
    gain = float(rng.choice([0.5, 1.0]))
    x, y = _sequences(rng)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 4 * depth + 3)
        sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 2 * width), "down": (2 * width, width)}
        names = list(sizes)
        body = [{m: dense(keys[4 * j + i], *sizes[m], gain) for i, m in enumerate(names)} for j in range(depth)]
        symbol, place = jax.random.normal(keys[-3], (SYMBOLS, width)), jax.random.normal(keys[-2], (LENGTH, width))
        return {"symbol": symbol, "place": 0.5 * place, "body": body, "head": dense(keys[-1], width, SYMBOLS, gain)}

    def add(x: jax.Array, part: Params, block: Params) -> jax.Array:
        z = part(block, normalise(x) if norm == "pre" else x)
        return normalise(x + z) if norm == "post" else x + z

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        h = params["symbol"][batch[0]] + params["place"]
        for block in params["body"]:
            h = add(h, lambda b, z: _attend(b, z, heads), block)
            h = add(h, lambda b, z: affine(b["down"], jax.nn.gelu(affine(b["up"], z))), block)
        logs = jax.nn.log_softmax(affine(params["head"], normalise(h) if norm == "pre" else h))
        said = batch[1] >= 0
        chosen = jnp.take_along_axis(logs, jnp.where(said, batch[1], 0)[..., None], -1)[..., 0]
        return -jnp.where(said, chosen, 0).sum() / said.sum()

    return Problem(init, loss, *divide(rng, x, y))


def attention_prenorm(rng: Generator) -> Problem:
    return _attention(rng, "pre")


def attention_postnorm(rng: Generator) -> Problem:
    return _attention(rng, "post")


def attention_nonorm(rng: Generator) -> Problem:
    return _attention(rng, "none")


def _adding(rng: Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, two of which are marked: their sum is the target."""
    n = 4000
    values, marks = rng.uniform(-1, 1, (n, length)), np.zeros((n, length))
    places = np.argsort(rng.uniform(size=(n, length)), 1)[:, :2]
    np.put_along_axis(marks, places, 1.0, 1)
    return np.stack([values, marks], -1), (values * marks).sum(1, keepdims=True)


def recurrent(rng: Generator) -> Problem:
    """A vanilla or gated recurrent network that adds two marked numbers or foretells the next letter."""
    adding, gated, width = bool(rng.integers(2)), bool(rng.integers(2)), int(rng.choice([16, 24]))
    length, gain = (int(rng.choice([6, 10])), 1.0) if adding else (LENGTH, float(rng.choice([0.7, 1.0])))
    if adding:
        x, y = _adding(rng, length)
    else:
        windows = _windows(rng, 4000, length + 1)
        x, y = windows[:, :-1], windows[:, -1]
    inputs, outputs = (2, 1) if adding else (12, SYMBOLS)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 5)
        params = {"cell": dense(keys[0], inputs + width, width, gain), "head": dense(keys[1], width, outputs, gain)}
        if gated:
            params["gates"] = dense(keys[2], inputs + width, 2 * width, gain)
        if not adding:
            params["embedding"] = jax.random.normal(keys[3], (SYMBOLS, inputs))
        return params

    def step(params: Params, h: jax.Array, x: jax.Array) -> jax.Array:
        if not gated:
            return jnp.tanh(affine(params["cell"], jnp.concatenate([x, h], -1)))
        keep, reset = jnp.split(jax.nn.sigmoid(affine(params["gates"], jnp.concatenate([x, h], -1))), 2, -1)
        return keep * h + (1 - keep) * jnp.tanh(affine(params["cell"], jnp.concatenate([x, reset * h], -1)))

    def apply(params: Params, x: jax.Array, key: Key) -> jax.Array:
        z = x if adding else params["embedding"][x]
        h = jnp.zeros((len(x), width), jnp.float32)
        h, _ = jax.lax.scan(lambda h, z: (step(params, h, z).astype(h.dtype), None), h, jnp.swapaxes(z, 0, 1))
        return affine(params["head"], h)

    net = Network(init, apply)
    return Problem(init, regressor(net) if adding else classifier(net), *divide(rng, x, y))


@lru_cache
def _mnist1d() -> tuple[np.ndarray, np.ndarray]:
    arguments = get_dataset_args()
    arguments.num_samples = 4000
    before = np.random.get_state()
    data = make_dataset(arguments)
    np.random.set_state(before)
    return np.concatenate([data["x"], data["x_test"]]), np.concatenate([data["y"], data["y_test"]])


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Windows along the middle axis, flattened: a convolution is then a product, which is quick for many forks."""
    places = (x.shape[1] - size) // stride + 1
    return jnp.concatenate([x[:, j : j + stride * places : stride][:, :places] for j in range(size)], -1)


def convolution(rng: Generator) -> Problem:
    """Digits drawn as curves of 40 points (MNIST-1D)."""
    channels, depth, size = int(rng.choice([8, 12])), int(rng.choice([2, 3])), int(rng.choice([3, 5]))
    norm, gain = bool(rng.integers(2)), float(rng.choice([0.7, 1.4]))
    depth = min(depth, 2 if size == 5 else 3)
    places = [40]
    for _ in range(depth):
        places.append((places[-1] - size) // 2 + 1)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, depth + 1)
        body = [dense(keys[j], size * (channels if j else 1), channels, gain) for j in range(depth)]
        return {"body": body, "head": dense(keys[-1], places[-1] * channels, 10)}

    def apply(params: Params, x: jax.Array, key: Key) -> jax.Array:
        h = x[..., None]
        for layer in params["body"]:
            h = affine(layer, _patches(h, size, 2))
            h = jax.nn.relu(normalise(h) if norm else h)
        return affine(params["head"], h.reshape(len(x), -1))

    return Problem(init, classifier(Network(init, apply)), *divide(rng, *_mnist1d()))


def embedding(rng: Generator) -> Problem:
    """A word from the four around it, by their embeddings' mean, among the most frequent words of a text."""
    known, width, scale = int(rng.choice([100, 200])), int(rng.choice([8, 16])), float(rng.choice([0.1, 1.0]))
    words = "".join(c if c.isalpha() else " " for c in text().lower()).split()
    index = {word: j for j, (word, _) in enumerate(Counter(words).most_common(known))}
    ids = np.array([index.get(word, known) for word in words])
    centres = np.flatnonzero(ids[2:-2] < known) + 2
    centres = rng.choice(centres, min(5000, len(centres)), replace=False)
    around = ids[centres[:, None] + np.array([-2, -1, 1, 2])]

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        return {
            "body": scale * jax.random.normal(first, (known + 1, width)),
            "head": dense(second, width, known, scale),
        }

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        return cross_entropy(affine(params["head"], params["body"][batch[0]].mean(1)), batch[1])

    return Problem(init, loss, *divide(rng, around, ids[centres]))
