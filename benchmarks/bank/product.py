"""The library itself on tasks of the bank, through `fit`: what the policy's figures are checked against.

python -m benchmarks.bank.product run open 0/1 fit
"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from benchmarks.bank import compare, oracle
from benchmarks.bank.lab import Lab
from benchmarks.bank.tasks import Task

STARTS = {"fit": 0.0, "fit x.01": -2.0, "fit x100": 2.0}


def fit(task: Task, lab: Lab, *, start: float = 0.0, validates: bool = True, seed: int = 0, **options: Any) -> Any:
    """One run of `fit`: the same batches and noise as the lab's."""
    root = jax.random.key(1000 + seed)
    low, high = task.decades[0] - 0.5, task.decades[1] + 0.5
    problem, opt = task.problem, task.opt

    def train_step(state: Any, step: jax.Array, hp: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        params, inner = state
        rows, noise = jax.random.split(jax.random.fold_in(root, step))
        drawn = jax.random.randint(rows, (task.batch,), 0, len(problem.train[0]))
        loss, gradient = jax.value_and_grad(problem.loss)(params, tuple(a[drawn] for a in problem.train), noise)
        inner = inner._replace(hyperparams={**inner.hyperparams, "learning_rate": hp["learning_rate"]})
        updates, after = opt.update(gradient, inner, params)
        new = optax.apply_updates(params, updates), after
        return jax.tree.map(lambda a, b: a.astype(b.dtype), new, state), loss

    def eval_step(state: Any) -> jax.Array:
        return problem.loss(state[0], problem.val, None)

    middle = 10.0 ** float(np.clip(0.5 * (low + high) + start, low, high))
    tuner = atn.AutoTuneNet(
        {"learning_rate": atn.Float(10.0**low, 10.0**high, log=True)},
        total_steps=task.steps,
        initial={"learning_rate": float(np.clip(middle, 10.0**low, 10.0**high))},
        warmup_steps=round(task.warmup * task.steps),
        **options,
    )
    params = problem.init(jax.random.key(seed))
    return atn.fit(
        train_step,
        (params, opt.init(params)),
        lambda step, hp: np.int32(step),
        tuner=tuner,
        eval_step=eval_step if validates else None,
        progress=False,
    )


def run_one(entry: compare.Entry, name: str) -> dict[str, float]:
    began, record = time.perf_counter(), entry.record
    lab = Lab(entry.task, entry.seed)
    result = fit(entry.task, lab, start=STARTS.get(name, 0.0), validates=name != "fit unvalidated", seed=entry.seed)
    losses = lab.evaluate(jax.tree.map(lambda a: jnp.asarray(a)[None], result.state))[0]
    return {
        "test": oracle.ratio(losses[1], record),
        "val": oracle.ratio(losses[0], record, 0),
        "off": float(np.log10(result.hyperparams["learning_rate"])) - record["best"][2],
        "discarded": result.history.summary["share_discarded"],
        "back": int(result.tuner_state.validation.retreats),
        "forks": sum(len(row["forks"]) for row in result.history.rounds),
        "seconds": time.perf_counter() - began,
    }


def run(kinds: str, part: str, names: list[str]) -> None:
    number, count = map(int, part.split("/"))
    for entry in compare.entries(kinds)[number::count]:
        for name in names:
            if name not in entry.read():
                entry.add(name, run_one(entry, name))
        found = entry.read()
        print(entry.key, entry.record["name"], {name: round(found[name]["test"], 3) for name in names}, flush=True)


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3], sys.argv[4].split(","))
