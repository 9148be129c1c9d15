"""Functions to be fitted by small nets, with and without noise: what is tried first, and steep where the noise is low.

python -m benchmarks.bank.curves     # the oracles that are missing
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.bank import oracle
from benchmarks.bank.lab import Lab
from benchmarks.bank.optimizers import OPTIMIZERS, build
from benchmarks.bank.problems import Problem, divide, network, regressor, standardised
from benchmarks.bank.tasks import Task

FILE = Path(__file__).with_name("curve_oracles.json")
COUNT = 120
KEYS = [f"C{number}" for number in range(COUNT)]
KINDS = ("waves", "products", "friedman", "linear", "peaks", "sums")
FOLDS = 96  # from here on all are folds: a plateau at the mean that low rates do not leave
NAMES = ("adam", "adam", "adamw", "adam", "sgdm", "sgd", "rmsprop", "lion", "muon", "nadam")


def _function(kind: str, rng: np.random.Generator, n: int = 1600) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of shape (n, inputs) and outputs of shape (n,)."""
    if kind == "waves":
        x = rng.uniform(-3, 3, (n, 1))
        return x, np.sin(rng.uniform(1, 3) * x[:, 0]) + rng.uniform(0, 0.5) * x[:, 0]
    if kind == "products":
        x = rng.normal(size=(n, 4))
        return x, x[:, 0] * x[:, 1] + x[:, 2] ** 2 + 0.5 * x[:, 3]
    if kind == "friedman":
        x = rng.uniform(size=(n, 8))
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        return x, y
    if kind == "linear":
        x = rng.normal(size=(n, 20)) * np.exp(rng.uniform(-1.5, 0, 20))
        return x, x @ rng.normal(size=20)
    if kind == "peaks":
        x = rng.uniform(-2, 2, (n, 2))
        centres = rng.uniform(-1.5, 1.5, (4, 2))
        near = np.exp(-2 * ((x[:, None] - centres) ** 2).sum(-1))
        return x, near @ rng.normal(size=4)
    x = rng.normal(size=(n, 10))
    if kind == "folds":
        return x, np.sin(rng.uniform(1.0, 2.0) * (x @ rng.normal(size=10)) / np.sqrt(5.0))
    return x, np.tanh(x @ rng.normal(size=(10, 5)) / 2) @ rng.normal(size=5)


@lru_cache
def make(key: str) -> Task:
    number = int(key[1:])
    rng = np.random.default_rng([7, number])
    kind = KINDS[number % len(KINDS)] if number < FOLDS else "folds"
    optimizer = str(rng.choice(NAMES))
    lengths = [300, 500, 500, 800, 1200] if number < FOLDS else [500, 800, 1200, 2000]
    steps, batch = int(rng.choice(lengths)), int(rng.choice([16, 32, 64]))
    noise = float(rng.choice([0.0, 0.1, 0.4]))
    b2 = float(rng.choice([0.999, 0.95]))
    x, y = _function(kind, rng)
    y = standardised(y) + noise * rng.normal(size=len(y))
    net = network(rng, x.shape[1], 1, gains=(0.7, 1.0), norms=(False,))
    problem = Problem(net.init, regressor(net), *divide(rng, standardised(x), y[:, None]))
    return Task(
        name=f"{kind}/{optimizer} batch {batch} steps {steps} noise {noise:g} b2 {b2:g}",
        family=kind,
        optimizer=optimizer,
        steps=steps,
        batch=batch,
        warmup=0.0,
        problem=problem,
        opt=build(optimizer, b2),
        decades=OPTIMIZERS[optimizer].decades,
    )


@lru_cache
def load() -> dict[str, oracle.Record]:
    """The oracles in the file, by key."""
    return oracle.read(FILE)


if __name__ == "__main__":
    oracle.fill_file(FILE, KEYS, lambda key: Lab(make(key)))
