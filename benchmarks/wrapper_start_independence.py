"""Does the starting learning rate matter to the tuned optimizer? Digits, Adam, T = 1000, learning rate only.

The task, starts and yardstick of `benchmarks.start_independence`, through `autotunenet_jax.autotune` alone: data cannot
be rewound, so each fork sees fresh batches, and all the tuner is told is ``value=loss``. With ``--validation`` it is
also told the validation loss, whenever `autotunenet_jax.wants_eval` asks and twenty times besides, as `fit` does. A run
is one compiled scan.

    python -m benchmarks.wrapper_start_independence [--seeds 24] [--validation] [--memory rewind] [--json out.json]
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from benchmarks.quality import workloads
from benchmarks.start_independence import RATES, STARTS, sweep


def make_run(task, *, memory, has_validation):
    """A compiled ``(seed, start, rows) -> figures`` of one run; one compilation for all seeds and starts."""
    arrays = task.train_arrays

    def run(seed, start, rows):
        state = task.init(seed)
        inner = optax.inject_hyperparams(task.optimizer, hyperparam_dtype=jnp.float32)
        optimizer = atn.autotune(
            inner(learning_rate=start, weight_decay=0.0),
            task.rate_space,
            task.total_steps,
            memory=memory,
            key=jax.random.key(seed),
        )

        def step(carry, inputs):
            params, opt_state = carry
            batch = task.gather(arrays, *inputs)
            loss, grads = jax.value_and_grad(task.loss_fn)(params, batch, None, 0.0)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
            params = optax.apply_updates(params, updates)
            if has_validation:
                is_due = atn.wants_eval(opt_state) | ((inputs[1] + 1) % (task.total_steps // 20) == 0)
                metric = jax.lax.cond(is_due, lambda: task.eval_params(params), lambda: jnp.float32(jnp.nan))
                opt_state = atn.observe_eval(opt_state, metric)
            return (params, opt_state), loss

        carry = (state.params, optimizer.init(state.params))
        (params, opt_state), losses = jax.lax.scan(step, carry, (rows, jnp.arange(task.total_steps)))
        tuner = opt_state.tuner
        return {
            "loss": task.eval_params(params),
            "rate": task_rate(task, tuner),
            "discarded_steps": tuner.discarded,
            "rounds": tuner.round.index,
            "rollbacks": tuner.rollbacks,
            "last_training_loss": losses[-50:].mean(),
        }

    return jax.jit(run)


def task_rate(task, tuner):
    return atn.SearchSpace(task.rate_space).decode(tuner.incumbent)["learning_rate"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--memory", default="keep-winner", choices=["keep-winner", "rewind", "drift"])
    parser.add_argument("--validation", action="store_true", help="report the validation loss when the tuner asks")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    task = workloads.get("W0")
    seeds = range(args.seeds)

    swept = np.stack([sweep(task, seed) for seed in seeds])
    # A diverged rate is out of the contest, not an error.
    means = np.exp(np.mean(np.log(np.nan_to_num(swept, nan=np.inf)), axis=0))
    best = int(np.argmin(means))
    print(f"best of the sweep: rate {RATES[best]:.1e}, validation loss {means[best]:.4f} ({len(RATES)} runs a seed)")
    print(f"memory {args.memory}, {'with' if args.validation else 'no'} validation metric")
    print(f"{'start':>8} {'loss':>8} {'ratio':>7} {'of own seed':>11}  per seed | tuned rates | discarded steps")

    run = make_run(task, memory=args.memory, has_validation=args.validation)
    rows, ratios, own = [], [], []
    begin = time.perf_counter()
    for start in STARTS:
        each = []
        for seed in seeds:
            out = run(seed, jnp.float32(start), jnp.asarray(task.table(seed)))
            out = {"start": start, "seed": seed, **{name: float(value) for name, value in out.items()}}
            assert np.isfinite(out["loss"]), f"start {start}, seed {seed} ended non-finite"
            each.append(out)
        rows += each
        relative = np.array([out["loss"] for out in each]) / swept[:, best]
        ratios.append(float(np.exp(np.mean(np.log(relative)))))
        own.append(float(np.exp(np.mean(np.log([out["loss"] for out in each] / np.nanmin(swept, axis=1))))))
        shown = " ".join(f"{value:.2f}" for value in relative)
        rates = " ".join(f"{out['rate']:.1e}" for out in each)
        lost = " ".join(f"{out['discarded_steps']:.0f}" for out in each)
        mean = np.mean([out["loss"] for out in each])
        print(f"{start:8.0e} {mean:8.4f} {ratios[-1]:7.3f} {own[-1]:11.3f}  {shown} | {rates} | {lost}", flush=True)
    overall, overall_own = (float(np.exp(np.mean(np.log(values)))) for values in (ratios, own))
    print(
        f"geometric mean {overall:.3f} (target 1.10), worst start {max(ratios):.3f} (target 1.25); "
        f"to the best rate of each seed {overall_own:.3f}; {time.perf_counter() - begin:.0f} s"
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {
                    "memory": args.memory,
                    "validation": args.validation,
                    "summary": {
                        "geometric_mean": overall,
                        "worst_start": max(ratios),
                        "to_best_of_each_seed": overall_own,
                    },
                    "sweep": swept.tolist(),
                    "runs": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
