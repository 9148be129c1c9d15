"""One integer gives one task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bank.families import FAMILIES, HEAVY
from benchmarks.bank.optimizers import OPTIMIZERS, build
from benchmarks.bank.problems import Params, Problem


class Task(NamedTuple):
    """``warmup`` is the share of the steps over which the user's own warm-up rises; ``decades`` are a sweep's."""

    name: str
    family: str
    optimizer: str
    steps: int
    batch: int
    warmup: float
    problem: Problem
    opt: optax.GradientTransformation
    decades: tuple[float, float]


def _cast(problem: Problem, dtype: jnp.dtype) -> Problem:
    """The problem with parameters of this precision."""

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem.init(key))

    def loss(params: Params, batch: tuple[jax.Array, ...], key: jax.Array | None) -> jax.Array:
        return problem.loss(params, batch, key).astype(jnp.float32)

    return problem._replace(init=init, loss=loss)


def make(i: int, base: int = 0) -> Task:
    """Task ``i``; another ``base`` is another bank of the same families."""
    rng = np.random.default_rng([base, i])
    family = list(FAMILIES)[i % len(FAMILIES)]
    names = [*OPTIMIZERS, "adam", "adamw"]
    optimizer = names[rng.integers(len(names))]
    heavy = family in HEAVY
    batch = int(rng.choice([16, 32] if heavy else [16, 32, 64]))
    steps = int(
        rng.choice([300, 500, 800, 1200, 2000], p=[0.3, 0.3, 0.25, 0.15, 0] if heavy else [0.25, 0.3, 0.25, 0.15, 0.05])
    )
    warmup = float(rng.choice([0, 0.05, 0.1], p=[0.85, 0.075, 0.075]))
    b2 = float(rng.choice([0.999, 0.95]))
    problem = _cast(FAMILIES[family](np.random.default_rng([base, i, 1])), OPTIMIZERS[optimizer].dtype)
    name = f"{family}/{optimizer} batch {batch} steps {steps} warm-up {warmup:g} b2 {b2:g}"
    opt = build(optimizer, b2)
    return Task(name, family, optimizer, steps, batch, warmup, problem, opt, OPTIMIZERS[optimizer].decades)
