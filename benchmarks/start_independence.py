"""Does the starting learning rate matter? Digits, Adam, T = 1000, learning rate only.

Five starts from 1e-5 to 1e-1 are tuned in one run each, forks and sweep counted in the budget, and compared with the
best of nine constant rates under linear decay at the same budget.

    python -m benchmarks.start_independence [--seeds 3] [--json out.json]
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn
from benchmarks.quality import workloads

STARTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RATES = 10.0 ** np.linspace(-4.0, 0.0, 9)


def sweep(task, seed):
    """Final validation loss of each rate."""
    total = task.total_steps
    rows = [task.stream(seed)(step, {}) for step in range(total)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *rows)

    def run(rate):
        def body(state, step):
            batch = jax.tree.map(lambda leaf: leaf[step], stacked)
            return task.train_step(state, batch, {"learning_rate": rate * (1.0 - step / total)})[0], None

        return task.eval_step(jax.lax.scan(body, task.init(seed), jnp.arange(total))[0])

    return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(RATES, jnp.float32)))


def tuned(task, seed, start):
    """Validation loss, tuned rate and discarded steps of one run."""
    tuner = atn.AutoTuneNet(task.rate_space, total_steps=task.total_steps, initial={"learning_rate": start})
    result = atn.fit(
        task.train_step,
        task.init(seed),
        task.stream(seed),
        tuner=tuner,
        eval_step=task.eval_step,
        key=jax.random.key(seed),
        progress=False,
    )
    return result.eval, result.hyperparams["learning_rate"], result.history.summary["discarded_steps"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    task = workloads.get("W0")
    seeds = range(args.seeds)

    swept = np.stack([sweep(task, seed) for seed in seeds])
    # A diverged rate is out of the contest, not an error.
    means = np.exp(np.mean(np.log(np.nan_to_num(swept, nan=np.inf)), axis=0))
    best = int(np.argmin(means))
    print(f"best of the sweep: rate {RATES[best]:.1e}, validation loss {means[best]:.4f} ({len(RATES)} runs a seed)")
    head = f"{'start':>8} {'loss':>8} {'ratio':>7} {'per seed, to the rate best on average':>40}"
    print(f"{head} {'to the best of its seed':>26}")

    ratios, own = [], []
    rows = []
    for start in STARTS:
        losses = []
        for seed in seeds:
            loss, rate, discarded = tuned(task, seed, start)
            assert np.isfinite(loss), f"start {start}, seed {seed} ended non-finite"
            losses.append(loss)
            rows.append({"start": start, "seed": seed, "loss": loss, "rate": rate, "discarded_steps": discarded})
        each = np.array(losses) / swept[:, best]
        each_own = np.array(losses) / np.nanmin(swept, axis=1)
        ratios.append(np.exp(np.mean(np.log(each))))
        own.append(np.exp(np.mean(np.log(each_own))))
        shown = " ".join(f"{value:.3f}" for value in each)
        print(f"{start:8.0e} {np.mean(losses):8.4f} {ratios[-1]:7.3f} {shown:>40} {own[-1]:26.3f}", flush=True)
    overall, overall_own = np.exp(np.mean(np.log(ratios))), np.exp(np.mean(np.log(own)))
    print(f"geometric mean {overall:.3f}, worst start {max(ratios):.3f} (to the best of each seed {overall_own:.3f})")
    if args.json:
        summary = {"geometric_mean": overall, "worst_start": max(ratios), "to_best_of_each_seed": overall_own}
        with open(args.json, "w") as file:
            json.dump({"summary": summary, "sweep": swept.tolist(), "runs": rows}, file, indent=1)


if __name__ == "__main__":
    main()
