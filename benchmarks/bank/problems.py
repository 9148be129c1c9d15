"""What a family returns, and the pieces that the families share."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn

Params = Any
Batch = tuple[jax.Array, ...]
Key = jax.Array | None
Init = Callable[[jax.Array], Params]
Loss = Callable[[Params, Batch, Key], jax.Array]

ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.gelu)


class Problem(NamedTuple):
    """A loss over examples; they lie along the leading axis of every array.

    ``loss`` is deterministic where the key is None, which is how it is evaluated. ``noisy`` says that the training loss
    is another one (dropout, sampled noise or actions), ``signed`` that the loss may be negative.
    """

    init: Init
    loss: Loss
    train: Batch
    val: Batch
    test: Batch
    noisy: bool = False
    signed: bool = False


class Network(NamedTuple):
    init: Init
    apply: Callable[[Params, jax.Array, Key], jax.Array]


def divide(rng: np.random.Generator, *arrays: np.ndarray, train: int | None = None) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test examples: 65, 17 and 18 %, or ``train`` examples and two halves of the others."""
    order, n = rng.permutation(len(arrays[0])), len(arrays[0])
    first = int(0.65 * n) if train is None else train
    second = int(0.82 * n) if train is None else (n + train) // 2
    parts = order[:first], order[first:second], order[second:]
    single = [a.astype(np.float32 if a.dtype.kind == "f" else np.int32) for a in arrays]
    train_part, val, test = (tuple(jnp.asarray(a[part]) for a in single) for part in parts)
    return train_part, val, test


def standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(0)) / (values.std(0) + 1e-8)


def noisy_labels(rng: np.random.Generator, labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    return np.where(rng.uniform(size=len(labels)) < share, rng.integers(0, classes, len(labels)), labels)


def dense(key: jax.Array, inputs: int, outputs: int, gain: float = 1.0) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(key, (inputs, outputs)) * gain / np.sqrt(inputs), "b": jnp.zeros(outputs)}


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def normalise(x: jax.Array) -> jax.Array:
    """Layer normalisation without parameters."""
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def drop(x: jax.Array, rate: float, key: Key) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def network(
    rng: np.random.Generator,
    inputs: int,
    outputs: int,
    widths: tuple[int, ...] = (24, 48, 96),
    depths: tuple[int, ...] = (1, 2, 3),
    activations: tuple[Callable[[jax.Array], jax.Array], ...] = ACTIVATIONS,
    gains: tuple[float, ...] = (0.5, 1.0, 1.5),
    norms: tuple[bool, ...] = (False, True),
    residual: bool = False,
    dropout: float = 0.0,
) -> Network:
    """A dense network whose width, depth, activation, normalisation and gain at the start are drawn."""
    width, depth = int(rng.choice(widths)), int(rng.choice(depths))
    activation, norm, gain = (
        activations[rng.integers(len(activations))],
        bool(rng.choice(norms)),
        float(rng.choice(gains)),
    )
    sizes = [inputs] + [width] * depth

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, depth + 1)
        body = [dense(keys[j], sizes[j], sizes[j + 1], gain * np.sqrt(2)) for j in range(depth)]
        return {"body": body, "head": dense(keys[-1], sizes[-1], outputs, gain)}

    def apply(params: Params, x: jax.Array, key: Key = None) -> jax.Array:
        for j, layer in enumerate(params["body"]):
            z = affine(layer, x)
            z = activation(normalise(z) if norm else z)
            z = drop(z, dropout, None if key is None else jax.random.fold_in(key, j))
            x = z + x if residual and z.shape == x.shape else z
        return affine(params["head"], x)

    return Network(init, apply)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def classifier(net: Network) -> Loss:
    return lambda params, batch, key: cross_entropy(net.apply(params, batch[0], key), batch[1])


def regressor(net: Network) -> Loss:
    """Mean squared error; the targets have the shape of the outputs."""
    return lambda params, batch, key: jnp.mean((net.apply(params, batch[0], key) - batch[1]) ** 2)


def huber(errors: jax.Array) -> jax.Array:
    size = jnp.abs(errors)
    return jnp.where(size < 1, 0.5 * size**2, size - 0.5).mean()


@lru_cache
def text() -> str:
    """English text: the descriptions of scikit-learn's data sets."""
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    return "".join(path.read_text(encoding="ascii", errors="ignore") for path in sorted(folder.glob("*.rst")))


@lru_cache
def symbols() -> np.ndarray:
    """The text in 29 symbols: letters, space, digit, anything else."""
    letters = [
        ord(c) - 97 if "a" <= c <= "z" else 26 if c.isspace() else 27 if c.isdigit() else 28 for c in text().lower()
    ]
    return np.array(letters, np.int32)
