"""Can a run be lost? Training under hot starts and injected faults, and false alarms on pure noise.

    python -m benchmarks.adversarial [--workload W1] [--runs 200] [--steps 600] [--windows 10000] [--json out.json]

Each run draws its start (up to 1,000 times too hot), its faults and their moments at random. It is compared with plain
training under linear decay at a good rate, without any fault but the flipped labels, at the same budget and seed. The
workloads are those of `benchmarks.quality`: W1 is Fashion-MNIST, W0 digits, where 360 test rows make any two runs of
one seed differ by tens of per cent.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn
from autotunenet_jax import faults
from benchmarks.quality import workloads

GOOD_RATES = {"W0": 1e-2, "W1": 3e-3}
KINDS = ("hot", "nan", "inf", "huge", "spike", "poison", "nan_batch", "flip_labels")


class Setting(NamedTuple):
    """What is trained. One step serves all runs: the batch carries the fault, so nothing is compiled twice."""

    task: workloads.Workload
    rate: float
    step: Callable[..., Any]


def setting_of(name):
    task = workloads.get(name)
    return Setting(task, GOOD_RATES[name], faults.inject(task.train_step, lambda step, hp: None, {})[0])


def draw(rng, steps, rate):
    """A start and a fault for each of some steps."""
    kind = KINDS[rng.integers(len(KINDS))]
    start = min(rate * 10.0 ** rng.uniform(0.0, 3.0), 9.9) if kind == "hot" else 10.0 ** rng.uniform(-5.0, -1.0)
    if kind == "hot":
        plan = {}
    elif kind == "flip_labels":
        begin = int(rng.integers(steps // 10, steps * 3 // 4))
        plan = dict.fromkeys(range(begin, begin + int(rng.integers(5, 30))), kind)
    else:
        plan = dict.fromkeys((int(step) for step in rng.integers(0, steps, rng.integers(1, 6))), kind)
    return kind, float(start), plan


def stream(task, seed, plan, *, only=None):
    """Batches with their fault codes; a step that is asked for again is sound."""
    clean, left = task.stream(seed), dict(plan)

    def batches(step, hp):
        fault = left.pop(step, None)
        batch = clean(step, hp)
        if fault == "flip_labels":
            batch = {**batch, "y": jnp.flip(batch["y"])}
        if only is not None:
            return batch
        if fault == "nan_batch":
            batch = {**batch, "x": jnp.full_like(batch["x"], jnp.nan)}
        is_code = fault is not None and fault not in ("nan_batch", "flip_labels")
        return batch, np.int32(faults.STEP_FAULTS.index(fault) if is_code else -1)

    return batches


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _plain_run(task, rate, steps, state, stacked):
    def body(state, step):
        batch = jax.tree.map(lambda leaf: leaf[step], stacked)
        return task.train_step(state, batch, {"learning_rate": rate * (1.0 - step / steps)})[0], None

    return jax.lax.scan(body, state, jnp.arange(steps))[0]


def plain(setting, seed, steps, plan):
    flips = {step: kind for step, kind in plan.items() if kind == "flip_labels"}
    batches = stream(setting.task, seed, flips, only="flip_labels")
    rows = [batches(step, None) for step in range(steps)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *rows)
    return _plain_run(setting.task, setting.rate, steps, setting.task.init(seed), stacked)


def tuned(setting, seed, steps, start, plan):
    task = setting.task
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 10.0)}, total_steps=steps, initial={"learning_rate": start})
    return atn.fit(
        setting.step, task.init(seed), stream(task, seed, plan), tuner=tuner, eval_step=task.probe_step,
        eval_every=steps // 10, progress=False, key=jax.random.key(seed),
    )  # fmt: skip


def false_alarms(windows, window=100):
    """Rollbacks on losses that are noise around a level, per window of steps."""
    guard = atn.Guard()
    count = 0
    draws = {
        "normal": lambda key: jax.random.normal(key, (windows, window)),
        "exponential": lambda key: jax.random.exponential(key, (windows, window)),
        "student t, 4 degrees": lambda key: jax.random.t(key, 4.0, (windows, window)),
    }
    from autotunenet_jax.controller import loss_monitor  # the watch by itself is not public

    @jax.jit
    def alarms(losses):
        def body(state, loss):
            state, verdict = loss_monitor.watch(guard, state, loss)
            failed = loss_monitor.is_failure(verdict)
            return state._replace(strikes=jnp.where(failed, 0, state.strikes)), failed

        def one(losses):
            return jax.lax.scan(body, loss_monitor.init(), losses)[1].sum()

        # Long streams, so that most windows are watched by a guard that knows its loss.
        return jax.vmap(one)(losses.reshape(max(windows // 50, 1), -1)).sum()

    out = {}
    for number, (name, make) in enumerate(draws.items()):
        count = int(alarms(make(jax.random.key(number))))
        out[name] = 100.0 * count / windows
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="W1", choices=sorted(GOOD_RATES))
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--json")
    args = parser.parse_args()
    alarms = false_alarms(args.windows)
    for name, rate in alarms.items():
        print(f"false rollbacks on {name} noise: {rate:.3f} per 100 windows of 100 steps", flush=True)
    rng, setting = np.random.default_rng(0), setting_of(args.workload)
    rows = []
    for number in range(args.runs):
        kind, start, plan = draw(rng, args.steps, setting.rate)
        seed = number % 10
        result = tuned(setting, seed, args.steps, start, plan)
        other_state = plain(setting, seed, args.steps, plan)
        mine, other = (float(setting.task.test_step(state)["loss"]) for state in (result.state, other_state))
        is_finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(result.state.params))
        rows.append({"kind": kind, "start": start, "faults": len(plan), "ratio": mine / other, "is_finite": is_finite,
                     "seed": seed, "mine": mine, "other": other, "rate": result.hyperparams["learning_rate"],
                     "rollbacks": result.history.summary["rollbacks"]})  # fmt: skip
        print(f"{number:4} {kind:>12} from {start:.1e}: {mine / other:.3f} of the plain run's loss", flush=True)
    print(f"{'fault':>12} {'runs':>5} {'non-finite':>10} {'median':>7} {'90 %':>7} {'worst':>7} {'rollbacks':>9}")
    for kind in (*KINDS, "all"):
        these = [row for row in rows if kind in (row["kind"], "all")]
        if these:
            ratios = np.array([row["ratio"] for row in these])
            lost = sum(not row["is_finite"] for row in these)
            back = np.mean([row["rollbacks"] for row in these])
            print(f"{kind:>12} {len(these):5} {lost:10} {np.median(ratios):7.3f} {np.quantile(ratios, 0.9):7.3f} "
                  f"{ratios.max():7.3f} {back:9.1f}")  # fmt: skip
    ratios = np.array([row["ratio"] for row in rows])
    print(f"geometric mean {np.exp(np.mean(np.log(ratios))):.3f}; above 1.1: {np.sum(ratios > 1.1)} of {len(rows)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"false_alarms": alarms, "runs": rows}, file, indent=1)
    sys.exit(0 if all(row["is_finite"] for row in rows) else 1)


if __name__ == "__main__":
    main()
