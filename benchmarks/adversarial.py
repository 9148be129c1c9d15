"""Can a run be lost? Digits under hot starts and injected faults, and false alarms on pure noise.

    python -m benchmarks.adversarial [--runs 200] [--steps 600] [--windows 10000] [--json out.json]

Each run draws its start (up to 1,000 times too hot), its faults and their moments at random. It is compared with plain
training under linear decay at a good rate, without any fault but the flipped labels, at the same budget and seed.
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn
from autotunenet_jax import faults
from benchmarks.quality import workloads

GOOD_RATE = 1e-2
KINDS = ("hot", "nan", "inf", "huge", "spike", "poison", "nan_batch", "flip_labels")

TASK = workloads.get("W0")
# One step serves all runs: the batch carries the fault, so nothing is compiled twice.
STEP, _ = faults.inject(TASK.train_step, lambda step, hp: None, {})


def draw(rng, steps):
    """A start and a fault for each of some steps."""
    kind = KINDS[rng.integers(len(KINDS))]
    start = min(GOOD_RATE * 10.0 ** rng.uniform(0.0, 3.0), 9.9) if kind == "hot" else 10.0 ** rng.uniform(-5.0, -1.0)
    if kind == "hot":
        plan = {}
    elif kind == "flip_labels":
        begin = int(rng.integers(steps // 10, steps * 3 // 4))
        plan = dict.fromkeys(range(begin, begin + int(rng.integers(5, 30))), kind)
    else:
        plan = dict.fromkeys((int(step) for step in rng.integers(0, steps, rng.integers(1, 6))), kind)
    return kind, float(start), plan


def stream(seed, plan, *, only=None):
    """Batches with their fault codes; a step that is asked for again is sound."""
    clean, left = TASK.stream(seed), dict(plan)

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


@functools.partial(jax.jit, static_argnums=0)
def _plain_run(steps, state, stacked):
    def body(state, step):
        batch = jax.tree.map(lambda leaf: leaf[step], stacked)
        return TASK.train_step(state, batch, {"learning_rate": GOOD_RATE * (1.0 - step / steps)})[0], None

    return jax.lax.scan(body, state, jnp.arange(steps))[0]


def plain(seed, steps, plan):
    flips = {step: kind for step, kind in plan.items() if kind == "flip_labels"}
    batches = stream(seed, flips, only="flip_labels")
    rows = [batches(step, None) for step in range(steps)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *rows)
    return _plain_run(steps, TASK.init(seed), stacked)


def tuned(seed, steps, start, plan):
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 10.0)}, total_steps=steps, initial={"learning_rate": start})
    return atn.fit(
        STEP, TASK.init(seed), stream(seed, plan), tuner=tuner, eval_step=TASK.eval_step, progress=False,
        key=jax.random.key(seed),
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
    from autotunenet_jax import _guard  # the watch by itself is not public

    @jax.jit
    def alarms(losses):
        def body(state, loss):
            state, verdict = _guard.watch(guard, state, loss)
            failed = _guard.is_failure(verdict)
            return state._replace(strikes=jnp.where(failed, 0, state.strikes)), failed

        def one(losses):
            return jax.lax.scan(body, _guard.init(), losses)[1].sum()

        # Long streams, so that most windows are watched by a guard that knows its loss.
        return jax.vmap(one)(losses.reshape(max(windows // 50, 1), -1)).sum()

    out = {}
    for number, (name, make) in enumerate(draws.items()):
        count = int(alarms(make(jax.random.key(number))))
        out[name] = 100.0 * count / windows
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--json")
    args = parser.parse_args()
    alarms = false_alarms(args.windows)
    for name, rate in alarms.items():
        print(f"false rollbacks on {name} noise: {rate:.3f} per 100 windows of 100 steps", flush=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(args.runs):
        kind, start, plan = draw(rng, args.steps)
        seed = number % 10
        result = tuned(seed, args.steps, start, plan)
        mine, other = (float(TASK.test_step(state)["loss"]) for state in (result.state, plain(seed, args.steps, plan)))
        is_finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(result.state.params))
        rows.append({"kind": kind, "start": start, "faults": len(plan), "ratio": mine / other, "is_finite": is_finite,
                     "seed": seed, "mine": mine, "other": other, "rate": result.hyperparams["learning_rate"],
                     "rollbacks": result.history.summary["rollbacks"]})  # fmt: skip
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
