"""Small data sets, made by a formula or part of scikit-learn: what somebody tries a library on first."""

import functools
import math

import numpy as np

from benchmarks.quality.data import Data, cut, standardised


def _real(x: np.ndarray, y: np.ndarray, sizes: tuple[int, int, int]) -> Data:
    return cut(x.astype(np.float32), y.astype(np.float32), sizes)


def _classes(x: np.ndarray, y: np.ndarray, sizes: tuple[int, int, int]) -> Data:
    return cut(x.astype(np.float32), y.astype(np.int32), sizes)


@functools.lru_cache
def teacher() -> Data:
    """What a random network of one hidden layer makes of ten numbers, with 5 % of noise."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5_000, 10))
    first = rng.normal(size=(10, 32)) / math.sqrt(10)
    last = rng.normal(size=32) / math.sqrt(32)
    y = np.tanh(2.0 * x @ first) @ last
    y += 0.05 * y.std() * rng.normal(size=len(x))
    return _real(x, y / y.std(), (3_000, 1_000, 1_000))


@functools.lru_cache
def sine() -> Data:
    """Two and a half periods of a sine, with noise."""
    rng = np.random.default_rng(4)
    x = rng.uniform(-1.0, 1.0, (2_400, 1))
    return _real(x, np.sin(8.0 * x[:, 0]) + 0.1 * rng.normal(size=len(x)), (1_000, 400, 1_000))


@functools.lru_cache
def spirals() -> Data:
    """Two spirals of one and a half turns, to be told apart."""
    rng = np.random.default_rng(5)
    turn = 3.0 * math.pi * np.sqrt(rng.uniform(0.02, 1.0, 3_000))
    arm = rng.integers(0, 2, 3_000)
    angle = turn + math.pi * arm
    x = np.stack([turn * np.cos(angle), turn * np.sin(angle)], 1) / 5.0 + 0.05 * rng.normal(size=(3_000, 2))
    return _classes(x, arm, (1_500, 500, 1_000))


@functools.lru_cache
def linear() -> Data:
    """A linear function of fifty numbers whose scales differ a thirtyfold, with 10 % of noise."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(4_000, 50)) * np.geomspace(1.0, 0.03, 50)
    y = x @ (rng.normal(size=50) * np.geomspace(1.0, 10.0, 50))
    return _real(x, y / y.std() + 0.1 * rng.normal(size=len(x)), (2_000, 1_000, 1_000))


@functools.lru_cache
def moons() -> Data:
    """scikit-learn's two half moons."""
    from sklearn.datasets import make_moons

    return _classes(*make_moons(2_500, noise=0.2, random_state=0), (1_000, 500, 1_000))


@functools.lru_cache
def friedman() -> Data:
    """scikit-learn's first problem of Friedman, unscaled: targets about 14, noise of deviation 1."""
    from sklearn.datasets import make_friedman1

    return _real(*make_friedman1(5_000, noise=1.0, random_state=0), (3_000, 1_000, 1_000))


@functools.lru_cache
def clusters() -> Data:
    """scikit-learn's made classification: five classes, fifteen features of forty tell, 5 % of labels are random."""
    from sklearn.datasets import make_classification

    x, y = make_classification(6_000, 40, n_informative=15, n_classes=5, flip_y=0.05, random_state=0)
    return standardised(_classes(x, y, (3_000, 1_000, 2_000)), axis=0)


@functools.lru_cache
def cancer() -> Data:
    """scikit-learn's breast cancer: thirty features, two classes."""
    from sklearn.datasets import load_breast_cancer

    return standardised(_classes(*load_breast_cancer(return_X_y=True), (340, 110, 119)), axis=0)


@functools.lru_cache
def wine() -> Data:
    """scikit-learn's wine: thirteen features, three classes."""
    from sklearn.datasets import load_wine

    return standardised(_classes(*load_wine(return_X_y=True), (100, 38, 40)), axis=0)


@functools.lru_cache
def diabetes() -> Data:
    """scikit-learn's diabetes: ten features, a standardised target."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return standardised(_real(x, (y - y.mean()) / y.std(), (260, 90, 92)), axis=0)
