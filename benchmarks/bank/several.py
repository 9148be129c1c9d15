"""Several hyperparameters at once: the surrogate's proposals against random ones, on tasks of the bank.

A rate with its own momentum (b1), and a rate with weight decay, dropout of the inputs, both within one run of `fit`.

python -m benchmarks.bank.several run 0/1 gp     # or random
python -m benchmarks.bank.several report
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from autotunenet_jax.controller import fork_surrogate
from autotunenet_jax.controller.plan import MAX_FORKS
from benchmarks.bank import split
from benchmarks.bank.lab import Lab
from benchmarks.bank.tasks import Task, make

RESULTS = {kind: Path(__file__).with_name(f"several_{kind}.json") for kind in ("gp", "random")}
SPACES: dict[str, dict[str, Any]] = {
    "rate, b1": {"learning_rate": (1e-6, 1.0), "b1": atn.Float(0.0, 0.99, role="fast")},
    "rate, b1, b2": {
        "learning_rate": (1e-6, 1.0),
        "b1": atn.Float(0.0, 0.99, role="fast"),
        "b2": atn.Float(0.5, 0.9999, role="fast"),
    },
    "rate, decay, noise": {"learning_rate": (1e-6, 1.0), "weight_decay": (1e-5, 10.0), "input_noise": (0.0, 1.0)},
}
OPTIMIZERS = ("adam", "adamw", "adam_clipped", "adam_grouped")
FAMILIES = ("digits", "teacher", "moons", "friedman", "imbalanced", "shifted", "autoencoder", "convolution")


def _propose_at_random() -> None:
    """Of all proposals any is as good as another; the line search over the rates stays as it is. Before any tracing."""
    original = fork_surrogate.expected_improvement

    def shuffled(judged: Any, best: Any) -> Any:
        gain = original(judged, best)
        proposals = np.arange(gain.shape[0]) >= MAX_FORKS + 2
        draw = jax.random.uniform(jax.random.key(jax.lax.bitcast_convert_type(judged.mean[-1], jnp.uint32)), gain.shape)
        return jnp.where(proposals, jnp.max(jnp.where(proposals, gain, -jnp.inf)) * (0.5 + 0.5 * draw), gain)

    fork_surrogate.expected_improvement = shuffled


def _optimizer(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, weight_decay: Any = 0.0) -> Any:
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2), optax.add_decayed_weights(weight_decay), optax.scale(-1.0 * learning_rate)
    )


def run_one(task: Task, space: dict[str, Any], seed: int) -> dict[str, Any]:
    problem, root = task.problem, jax.random.key(1000 + seed)
    opt = optax.inject_hyperparams(_optimizer, hyperparam_dtype=jnp.float32)(
        learning_rate=1e-3, b1=0.9, b2=0.999, weight_decay=0.0
    )

    def train_step(state: Any, step: jax.Array, hp: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        params, inner = state
        rows, noise = jax.random.split(jax.random.fold_in(root, step))
        drawn = jax.random.randint(rows, (task.batch,), 0, len(problem.train[0]))
        x, *rest = (a[drawn] for a in problem.train)
        if "input_noise" in hp:
            x = x + hp["input_noise"] * jax.random.normal(noise, x.shape)
        loss, gradient = jax.value_and_grad(problem.loss)(params, (x, *rest), noise)
        updates, inner = opt.update(gradient, atn.set_hyperparams(inner, hp), params)
        return (optax.apply_updates(params, updates), inner), loss

    tuner = atn.AutoTuneNet(space, total_steps=task.steps, initial={"b1": 0.9} if "b1" in space else None)
    params = problem.init(jax.random.key(seed))
    began = time.perf_counter()
    result = atn.fit(
        train_step,
        (params, opt.init(params)),
        lambda step, hp: np.int32(step),
        tuner=tuner,
        eval_step=lambda state: problem.loss(state[0], problem.val, None),
        key=jax.random.key(seed),
        progress=False,
    )
    losses = Lab(task, seed).evaluate(jax.tree.map(lambda a: jnp.asarray(a)[None], result.state))[0]
    return {
        "val": float(losses[0]),
        "test": float(losses[1]),
        "values": {name: float(value) for name, value in result.hyperparams.items()},
        **proposals(result.history.rounds),
        "seconds": time.perf_counter() - began,
    }


def proposals(rounds: list[dict[str, Any]]) -> dict[str, int]:
    """Forks with values of their own, the rate aside, after the first of a round; and how many were the best so far."""
    tried = best = 0
    for row in rounds:
        seen, scores = [], []
        for fork in row["forks"]:
            others = {name: value for name, value in fork["hyperparams"].items() if name != "learning_rate"}
            score = fork["scores"][0] if fork["scores"] and fork["status"] != "failed" else np.inf
            if seen and others not in seen:
                tried, best = tried + 1, best + (score < min(scores))
            seen.append(others)
            scores.append(score)
    return {"proposals": tried, "best_so_far": best}


def _load(kind: str) -> dict[str, Any]:
    return json.loads(RESULTS[kind].read_text()) if RESULTS[kind].exists() else {}


def run(part: str, kind: str, seeds: int = 2) -> None:
    if kind == "random":
        _propose_at_random()
    number, count = map(int, part.split("/"))
    ids = [i for i in split.open_tasks() if make(i).family in FAMILIES and make(i).optimizer in OPTIMIZERS]
    for i in ids[number::count]:
        for name, space in SPACES.items():
            for seed in range(seeds):
                cell = f"{i} | {name} | {seed}"
                if cell not in _load(kind):
                    found = run_one(make(i), space, seed)
                    RESULTS[kind].write_text(json.dumps({**_load(kind), cell: found}, indent=0))
                    print(cell, found, flush=True)


def report() -> None:
    found, others = _load("gp"), _load("random")
    for name in (*SPACES, ""):
        gaps = []
        for cell, row in found.items():
            other = others.get(cell)
            if other and (not name or f"| {name} |" in cell):
                pairs = [np.log(max(row[part], 1e-9) / max(other[part], 1e-9)) for part in ("val", "test")]
                gaps.append(float(np.clip(np.mean(pairs), -0.7, 0.7)))
        if gaps:
            mean, error = np.mean(gaps), np.std(gaps) / len(gaps) ** 0.5
            print(f"{name or 'all':20s} {len(gaps)} pairs, surrogate / random {np.exp(mean):.3f} +- {error:.3f}")
        for kind, rows in (("surrogate", found), ("random", others)):
            held = [row for cell, row in rows.items() if (not name or f"| {name} |" in cell) and "proposals" in row]
            tried, best = (sum(row[part] for row in held) for part in ("proposals", "best_so_far"))
            if tried:
                error = (best / tried * (1.0 - best / tried) / tried) ** 0.5
                print(f"  {kind}: {best} of {tried} proposals the best fork so far, {best / tried:.2f} +- {error:.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3])
    else:
        report()
