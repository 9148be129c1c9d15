"""What users try first: a dense net on scikit-learn's digits under five optimizers, with and without validation.

python -m benchmarks.bank.digits [--seeds 3]

A ratio is the geometric mean of validation and test loss over the best of a sweep, which is smoothed over three rates a
quarter decade apart and both schedules, since a single one is lucky where losses are near zero.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from benchmarks.bank import compare, oracle, policy
from benchmarks.bank.lab import Lab
from benchmarks.bank.problems import Batch, Key, Params, Problem, affine, cross_entropy, dense
from benchmarks.bank.tasks import Task

OPTIMIZERS = {
    "adam": optax.adam,
    "lion": lambda rate: optax.lion(rate, weight_decay=0.0),
    "muon": optax.contrib.muon,
    "nesterov .9": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "nesterov .95": lambda rate: optax.sgd(rate, momentum=0.95, nesterov=True),
}
# Pairs differ in whether rates fall by the training loss alone.
POLICIES = {name: compare.POLICIES[name] for name in ("base", "no validation", "new batches")}
POLICIES |= {f"{name} unlowered": dataclasses.replace(POLICIES[name], falls=0) for name in POLICIES if name != "base"}
DECADES = (-5.5, -0.5)
SIZES = (64, 96, 96, 10)


def problem() -> Problem:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = (images[order] / 16.0).astype(np.float32), labels[order].astype(np.int32)
    train, val, test = (tuple(jnp.asarray(a[part]) for a in (x, y)) for part in np.s_[:1200, 1200:1500, 1500:])

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(SIZES) - 1)
        return [dense(k, a, b, np.sqrt(2)) for k, a, b in zip(keys, SIZES[:-1], SIZES[1:], strict=True)]

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        hidden = batch[0]
        for layer in params[:-1]:
            hidden = jax.nn.relu(affine(layer, hidden))
        return cross_entropy(affine(params[-1], hidden), batch[1])

    return Problem(init, loss, train, val, test)


def task(optimizer: str, steps: int) -> Task:
    inject = optax.inject_hyperparams(lambda learning_rate: OPTIMIZERS[optimizer](learning_rate))
    return Task(
        f"digits {optimizer} {steps}",
        "digits",
        optimizer,
        steps,
        64,
        0.0,
        problem(),
        inject(learning_rate=1e-3),
        DECADES,
    )


def best_of_sweep(lab: Lab) -> float:
    record = oracle.sweep(lab)
    losses = np.log(np.mean([record[schedule] for schedule in oracle.SCHEDULES], axis=0)).mean(axis=1)
    return float(np.exp(np.convolve(losses, np.ones(3) / 3, "valid").min()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for optimizer in OPTIMIZERS:
        for steps in (400, 800):
            its_task = task(optimizer, steps)
            best = best_of_sweep(Lab(its_task))
            for name in POLICIES:
                for seed in range(seeds):
                    losses = policy.tune(Lab(its_task, seed), POLICIES[name]).losses
                    found[name].append(float(np.sqrt(max(losses[0] * losses[1], 1e-12)) / best))
            line = "  ".join(f"{name} {np.exp(np.mean(np.log(found[name][-seeds:]))):.2f}" for name in POLICIES)
            print(f"{its_task.name:22s} {line}", flush=True)
    for name, ratios in found.items():
        print(f"{name:24s} geometric mean {np.exp(np.mean(np.log(ratios))):.2f}, worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()
