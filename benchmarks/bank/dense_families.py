"""Families of vectors in, a class or a number out: dense networks on cross-entropy or squared error."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    make_classification,
    make_friedman1,
    make_moons,
)

from benchmarks.bank.problems import (
    Batch,
    Key,
    Params,
    Problem,
    affine,
    classifier,
    cross_entropy,
    dense,
    divide,
    network,
    noisy_labels,
    regressor,
    standardised,
)

Generator = np.random.Generator


def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data / 16, data.target


def _label_noise(rng: Generator, labels: np.ndarray, classes: int) -> np.ndarray:
    """None, or a tenth of the labels."""
    return noisy_labels(rng, labels, classes, float(rng.choice([0.0, 0.1])))


def digits(rng: Generator) -> Problem:
    pixels, labels = _digits()
    dropout = float(rng.choice([0.0, 0.0, 0.2]))
    net = network(rng, 64, 10, dropout=dropout)
    return Problem(net.init, classifier(net), *divide(rng, pixels, _label_noise(rng, labels, 10)), noisy=dropout > 0)


def residual(rng: Generator) -> Problem:
    pixels, labels = _digits()
    net = network(rng, 64, 10, widths=(24, 48, 64), depths=(2, 3, 4), residual=True)
    return Problem(net.init, classifier(net), *divide(rng, pixels, _label_noise(rng, labels, 10)))


def autoencoder(rng: Generator) -> Problem:
    pixels, _ = _digits()
    net = network(rng, 64, 64, widths=(12, 24, 48))
    return Problem(net.init, regressor(net), *divide(rng, pixels, pixels))


def teacher(rng: Generator) -> Problem:
    """Regression on a random network of one layer, with noise."""
    inputs, n = int(rng.choice([8, 20])), 4000
    x, weights, out = rng.normal(size=(n, inputs)), rng.normal(size=(inputs, 16)) / np.sqrt(inputs), rng.normal(size=16)
    y = standardised(np.tanh(2 * x @ weights) @ out + 0.2 * rng.normal(size=n))[:, None]
    net = network(rng, inputs, 1)
    return Problem(net.init, regressor(net), *divide(rng, x, y))


def spiral(rng: Generator) -> Problem:
    n = 3000
    arm, radius = rng.integers(0, 3, n), rng.uniform(0.1, 1, n)
    angle = 5 * radius + 2.09 * arm + 0.15 * rng.normal(size=n)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    net = network(rng, 2, 3)
    return Problem(net.init, classifier(net), *divide(rng, x, _label_noise(rng, arm, 3)))


def tabular(rng: Generator) -> Problem:
    """Few rows of a real table: tumours (two classes) or the course of diabetes (a number)."""
    if rng.integers(2):
        data = load_breast_cancer()
        net = network(rng, data.data.shape[1], 2)
        parts = divide(rng, standardised(data.data), _label_noise(rng, data.target, 2))
        return Problem(net.init, classifier(net), *parts)
    data = load_diabetes()
    net = network(rng, data.data.shape[1], 1)
    return Problem(net.init, regressor(net), *divide(rng, standardised(data.data), standardised(data.target)[:, None]))


def shifted(rng: Generator) -> Problem:
    """Random curves, one to a class, seen shifted, scaled and with noise."""
    n = 4000
    label, shift = rng.integers(0, 10, n), rng.integers(-6, 7, n)
    curves = standardised(np.cumsum(rng.normal(size=(10, 40)), 1).T).T
    x = np.stack([np.roll(curves[k], s) for k, s in zip(label, shift, strict=True)])
    x = x * (1 + 0.3 * rng.normal(size=(n, 1))) + 0.4 * rng.normal(size=(n, 40))
    net = network(rng, 40, 10)
    return Problem(net.init, classifier(net), *divide(rng, x, _label_noise(rng, label, 10)))


def moons(rng: Generator) -> Problem:
    """Few points under much noise: long training overfits."""
    x, y = make_moons(900, noise=float(rng.choice([0.25, 0.35])), random_state=int(rng.integers(2**31)))
    net = network(rng, 2, 2, widths=(48, 96), depths=(2, 3))
    return Problem(net.init, classifier(net), *divide(rng, x, y, train=int(rng.choice([60, 120]))))


def friedman(rng: Generator) -> Problem:
    noise = float(rng.choice([0.3, 1.0]))
    x, y = make_friedman1(1800, n_features=10, noise=noise, random_state=int(rng.integers(2**31)))
    net = network(rng, 10, 1)
    return Problem(net.init, regressor(net), *divide(rng, standardised(x), standardised(y)[:, None]))


def imbalanced(rng: Generator) -> Problem:
    """Three classes of 88, 8 and 4 %."""
    x, y = make_classification(
        3000,
        n_features=20,
        n_informative=8,
        n_classes=3,
        weights=[0.88, 0.08, 0.04],
        flip_y=0.01,
        class_sep=1.5,
        random_state=int(rng.integers(2**31)),
    )
    net = network(rng, 20, 3)
    return Problem(net.init, classifier(net), *divide(rng, standardised(x), y))


def sparse(rng: Generator) -> Problem:
    """Linear or logistic regression with more features than rows, few of which matter: long training overfits."""
    features, logistic, n = int(rng.choice([200, 400])), bool(rng.integers(2)), 900
    x, weights = rng.normal(size=(n, features)), np.zeros(features)
    weights[:10] = rng.normal(size=10)
    score = standardised(x @ weights)
    y = (score + 0.5 * rng.normal(size=n) > 0).astype(int) if logistic else (score + 0.5 * rng.normal(size=n))[:, None]

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        outputs = affine(params["head"], batch[0])
        return cross_entropy(outputs, batch[1]) if logistic else jnp.mean((outputs - batch[1]) ** 2)

    def init(key: jax.Array) -> Params:
        return {"head": dense(key, features, 2 if logistic else 1, 0.3)}

    return Problem(init, loss, *divide(rng, x, y, train=int(rng.choice([150, 300]))))


def mislabelled(rng: Generator) -> Problem:
    """Digits, few and many of them mislabelled, in training only: it overfits. Plain, with mixup or with dropout."""
    pixels, labels = _digits()
    way = str(rng.choice(["plain", "mixup", "dropout"]))
    net = network(rng, 64, 10, widths=(64, 96), depths=(1, 2), dropout=0.3 if way == "dropout" else 0.0)
    (x, y), val, test = divide(rng, pixels, labels, train=600)
    y = jnp.asarray(noisy_labels(rng, np.asarray(y), 10, float(rng.choice([0.3, 0.5]))), jnp.int32)
    plain = classifier(net)

    def mixed(params: Params, batch: Batch, key: Key) -> jax.Array:
        if key is None:
            return plain(params, batch, None)
        x, share = batch[0], jax.random.uniform(key)
        logits = net.apply(params, share * x + (1 - share) * x[::-1], None)
        return share * cross_entropy(logits, batch[1]) + (1 - share) * cross_entropy(logits, batch[1][::-1])

    return Problem(net.init, mixed if way == "mixup" else plain, (x, y), val, test, noisy=way != "plain")
