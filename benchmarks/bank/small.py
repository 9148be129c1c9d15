"""The small workloads of `benchmarks.quality` as tasks: real and made data, such as a library is first tried on.

python -m benchmarks.bank.small      # the oracles that are missing
"""

import math
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from benchmarks.bank import oracle
from benchmarks.bank.lab import Lab
from benchmarks.bank.problems import Batch, Params, Problem
from benchmarks.bank.tasks import Task
from benchmarks.quality import workloads

FILE = Path(__file__).with_name("small_oracles.json")
NAMES = (*(f"S{number}" for number in range(1, 17)), "W0", "X1")
SEEDS = range(6)
KEYS = [f"{name}.{seed}" for name in NAMES for seed in SEEDS]


@lru_cache
def make(name: str) -> Task:
    """The workload; what it says of rates lies half a decade inside the bounds, as in the bank."""
    given = workloads.get(name)
    low, high = (math.log10(bound) for bound in given.space["learning_rate"])

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        return given.loss_fn(params, {"x": batch[0], "y": batch[1]}, None, 0.0)

    def built(learning_rate: jax.Array) -> optax.GradientTransformation:
        return given.optimizer(learning_rate, given.defaults["weight_decay"])

    train, val, test = (tuple(jnp.asarray(part) for part in split) for split in given.data)
    return Task(
        name=f"{given.title} steps {given.total_steps}",
        family=name,
        optimizer=given.optimizer.__name__,
        steps=given.total_steps,
        batch=given.batch_size,
        warmup=0.0,
        problem=Problem(given.model.init, loss, train, val, test),
        opt=optax.inject_hyperparams(built, hyperparam_dtype=jnp.float32)(learning_rate=1.0),
        decades=(low + 0.5, high - 0.5),
    )


@lru_cache
def load() -> dict[str, oracle.Record]:
    """The oracles in the file, by key; each seed has its own."""
    return oracle.read(FILE)


def _lab(key: str) -> Lab:
    name, seed = key.split(".")
    return Lab(make(name), int(seed))


if __name__ == "__main__":
    oracle.fill_file(FILE, KEYS, _lab)
