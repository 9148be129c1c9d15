"""One training run that tunes its learning rate, weight decay and dropout, next to what people do otherwise.

A small Flax NNX network learns mnist1d, 4,000 noisy curves that it can learn by heart. The tuned run starts from a
learning rate of 1e-5 and no dropout. It is compared on test data with AdamW as it comes, with a cosine schedule, with a
sweep of nine learning rates, and with a random search over the same three hyperparameters.

    python examples/quickstart.py [--seeds 3] [--steps 2000] [--out quickstart.png]
"""

import argparse
import collections
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.box
import rich.console
import rich.table
from flax import nnx
from mnist1d.data import get_dataset_args, make_dataset

import autotunenet_jax as atn

BATCH_SIZE = 64
START = {"learning_rate": 1e-5, "weight_decay": 1e-3, "dropout": 0.0}
SPACE = {"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-3, 10.0), "dropout": (0.0, 0.6)}


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(40, 128, rngs=rngs), nnx.Linear(128, 128, rngs=rngs)])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x, rate=0.0, key=None):
        for number, layer in enumerate(self.layers):
            x = nnx.relu(layer(x))
            if key is not None:
                x = atn.traced_dropout(jax.random.fold_in(key, number), x, rate)
        return self.head(x)


GRAPH, _ = nnx.split(Network(nnx.Rngs(0)))
OPTIMIZER = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=1e-4)


def new_state(seed):
    params = nnx.state(Network(nnx.Rngs(seed)))
    return {"params": params, "opt": OPTIMIZER.init(params), "key": jax.random.key(seed)}


def loss_fn(params, data, rate=0.0, key=None):
    logits = nnx.merge(GRAPH, params)(data[0], rate, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()


def train_step(state, batch, hp):
    """An ordinary optax step; the values in ``hp`` are the tuner's."""
    key, dropout_key = jax.random.split(state["key"])
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch, hp["dropout"], dropout_key)
    updates, opt = OPTIMIZER.update(grads, atn.set_hyperparams(state["opt"], hp), state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key}, loss


def eval_step(state):
    return loss_fn(state["params"], VALIDATION)


def tune(seed, steps):
    tuner = atn.AutoTuneNet(SPACE, total_steps=steps, initial=START)
    rows = batch_rows(seed, steps)

    def batches(step, hp):
        return TRAIN[0][rows[step]], TRAIN[1][rows[step]]

    return atn.fit(train_step, new_state(seed), batches, tuner=tuner, eval_step=eval_step, key=jax.random.key(seed))


# All that a run of your own needs is above. Below: the data, what the run is compared with, the table, the picture.


def load():
    """Training, validation and test rows of mnist1d: 3,200, 800 and 1,000, 40 numbers each."""
    raw = make_dataset(get_dataset_args())
    order = np.random.default_rng(0).permutation(len(raw["x"]))
    x, y = raw["x"][order].astype(np.float32), raw["y"][order].astype(np.int32)
    mean, spread = x[:3200].mean(), x[:3200].std()
    x, test = (x - mean) / spread, (raw["x_test"].astype(np.float32) - mean) / spread
    return (x[:3200], y[:3200]), (x[3200:], y[3200:]), (test, raw["y_test"].astype(np.int32))


TRAIN, VALIDATION, TEST = load()

OURS, SWEEP = "tuned inside the run", "sweep of 9 rates, cosine"
# Told apart by the colour-blind too (Okabe and Ito), and by their dashes.
STYLES = [("#d55e00", ":"), ("#cc79a7", "-."), ("#009e73", "--"), ("#e69f00", (0, (5, 1))), ("#0072b2", "-")]
# In which a run is read on validation data.
STRETCHES = 20


def batch_rows(seed, steps):
    """The rows of each batch, an int ``[steps, BATCH_SIZE]``; every epoch has another order."""
    rng, per_epoch = np.random.default_rng(seed), len(TRAIN[0]) // BATCH_SIZE
    epochs = [rng.permutation(len(TRAIN[0])) for _ in range(-(-steps // per_epoch))]
    return np.concatenate([rows.reshape(per_epoch, BATCH_SIZE) for rows in epochs])[:steps]


@functools.partial(jax.jit, static_argnames=("has_dropout",))
def train(state, rows, rates, weight_decay, dropout, *, has_dropout):
    """A run without a tuner, in 20 stretches.

    Returns:
      The last state and the one of lowest validation loss, and float ``[20]``: the validation loss after each stretch.
    """
    x, y = jax.tree.map(jnp.asarray, TRAIN)

    def step(state, at):
        rows, rate = at
        key, dropout_key = jax.random.split(state["key"])
        grads = jax.grad(loss_fn)(state["params"], (x[rows], y[rows]), dropout, dropout_key if has_dropout else None)
        opt = atn.set_hyperparams(state["opt"], {"learning_rate": rate, "weight_decay": weight_decay})
        updates, opt = OPTIMIZER.update(grads, opt, state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key}, None

    def stretch(carry, at):
        state, best, lowest = carry
        state, _ = jax.lax.scan(step, state, at)
        loss = eval_step(state)
        best = jax.tree.map(lambda new, old: jnp.where(loss < lowest, new, old), state["params"], best)
        return (state, best, jnp.minimum(loss, lowest)), loss

    stretches = (rows.reshape(STRETCHES, -1, BATCH_SIZE), rates.reshape(STRETCHES, -1))
    (state, best, _), losses = jax.lax.scan(stretch, (state, state["params"], jnp.inf), stretches)
    return {"last": state["params"], "best": best}, losses


def side_by_side(seed, rates, decays, dropouts=None):
    """Runs that differ in their hyperparameters, compiled together; they see the same batches.

    Args:
      seed: Of the parameters and the batches.
      rates: Float ``[runs, steps]``, schedules included.
      decays: Float ``[runs]``.
      dropouts: Float ``[runs]``, or None for none.
    """
    rows, has_dropout = jnp.asarray(batch_rows(seed, rates.shape[1])), dropouts is not None
    dropouts = jnp.zeros(len(rates)) if dropouts is None else jnp.asarray(dropouts, jnp.float32)

    def run(rate, decay, dropout):
        return train(new_state(seed), rows, rate, decay, dropout, has_dropout=has_dropout)

    states, losses = jax.vmap(run)(jnp.asarray(rates, jnp.float32), jnp.asarray(decays, jnp.float32), dropouts)
    return [(jax.tree.map(lambda leaf: leaf[i], states), losses[i]) for i in range(len(rates))]  # noqa: B023


def others(seed, steps):
    """What the tuned run is compared with: lists of runs by name, each with its states and validation losses."""
    cosine = 0.5 + 0.5 * np.cos(np.pi * np.arange(steps) / steps)
    rates = np.stack([np.full(steps, 1e-3), *np.outer([1e-3, *np.logspace(-4, -1, 9)], cosine)])
    plain = side_by_side(seed, rates, np.full(len(rates), 1e-4))
    rng = np.random.default_rng(seed)
    drawn, decays, dropouts = 10 ** rng.uniform(-5, -1, 9), 10 ** rng.uniform(-3, 1, 9), rng.uniform(0, 0.6, 9)
    return {
        "AdamW, default rate": plain[:1],
        "the same, cosine": plain[1:2],
        SWEEP: plain[2:],
        "random search, 9 runs": side_by_side(seed, np.outer(drawn, cosine), decays, dropouts),
    }


@jax.jit
def test_scores(params):
    logits = nnx.merge(GRAPH, params)(TEST[0])
    return loss_fn(params, TEST), 100.0 * jnp.mean(jnp.argmax(logits, -1) == TEST[1])


def best_of(runs):
    """Of a sweep the runs that validation picks: by the last reading and by the lowest."""
    last = min(runs, key=lambda run: float(run[1][-1]))
    lowest = min(runs, key=lambda run: float(run[1].min()))
    return last[0]["last"], lowest[0]["best"], last[1]


def table(scores, steps, results):
    """The comparison, means over seeds; ``scores[name]`` is float ``[seeds, 2, 2]``: end or best, loss and accuracy."""
    shown = rich.table.Table(title=f"mnist1d, test data, mean of {len(results)} seeds", box=rich.box.SIMPLE_HEAD)
    shown.add_column("run")
    for column in ("steps\npaid", "thrown\naway", "loss at\nthe end", "stopped\nearly", "accuracy"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, values in scores.items():
        (end, _), (early, accuracy) = np.mean(values, axis=0)
        runs, is_ours = (9 if "9" in name else 1), name == OURS
        away = np.mean([r.history.summary["share_discarded"] for r in results]) if is_ours else 1 - 1 / runs
        cells = (f"{runs * steps:,}", f"{100 * away:.0f} %", f"{end:.2f}", f"{early:.2f}", f"{accuracy:.1f} %")
        shown.add_row(name, *cells, style="bold" if is_ours else None)
    return shown


def draw(path, result, curves, steps):
    """Validation losses of the first seed, and the path of the tuned hyperparameters with the forks beside it."""
    figure = matplotlib.figure.Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplot_mosaic([["loss", name] for name in SPACE], width_ratios=[1.55, 1.0])
    history = result.history
    kept, forks = ([row for row in history.records if row["is_kept"] is which] for which in (True, False))
    lost = {row["step"] for row in forks}
    ours = [row for row in history.evals if row["step"] not in lost]
    grid = np.arange(1, STRETCHES + 1) * steps / STRETCHES
    lines = {name: (grid, np.asarray(losses)) for name, losses in curves.items()}
    lines[OURS] = ([row["step"] for row in ours], [row["value"] for row in ours])
    for (name, (x, y)), (color, dash) in zip(lines.items(), STYLES, strict=True):
        axes["loss"].plot(x, y, color=color, ls=dash, lw=2.4 if name == OURS else 1.6, label=name)
    axes["loss"].set(ylim=(0.75, 3.0), yscale="log", ylabel="validation loss")
    axes["loss"].set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
    axes["loss"].minorticks_off()
    for name in SPACE:
        for rows, color, size, label in ((forks, "0.5", 1.5, "tried, thrown away"), (kept, STYLES[-1][0], 2.5, "kept")):
            axes[name].plot([r["step"] for r in rows], [r[name] for r in rows], ".", color=color, ms=size, label=label)
        axes[name].set_title(name.replace("_", " "), loc="left", fontsize=10, pad=3)
        axes[name].set_yscale("linear" if name == "dropout" else "log")
        axes[name].tick_params(labelbottom=name == "dropout")
    axes["weight_decay"].legend(frameon=False, loc="center left", fontsize=8.5, markerscale=4, handletextpad=0.2)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, steps * 1.01)
        for number, held in enumerate(history.rounds):
            label = None if number else "rounds of forks of the tuned run"
            axis.axvspan(held["start"], held["end"], color="0.92", lw=0, zorder=0, label=label)
    axes["loss"].legend(framealpha=1.0, edgecolor="none", loc="upper right", fontsize=9.5)
    axes["loss"].set_xlabel("training steps")
    axes["dropout"].set_xlabel("training steps")
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="of each run; a multiple of 20")
    parser.add_argument("--out", default="quickstart.png", help="where to write the picture")
    args = parser.parse_args()
    console, began = rich.console.Console(), time.perf_counter()
    results, curves, scores = [], {}, collections.defaultdict(list)
    for seed in range(args.seeds):
        for name, runs in others(seed, args.steps).items():
            *states, losses = best_of(runs)
            scores[name].append([test_scores(params) for params in states])
            curves.setdefault(name, losses)
        results.append(tune(seed, args.steps))
        scores[OURS].append([test_scores(results[-1].state["params"])] * 2)
    console.print(table(scores, args.steps, results))
    ratios = np.array(scores[OURS])[:, 1, 0] / np.array(scores[SWEEP])[:, :, 0].T
    end, early = np.exp(np.log(ratios).mean(axis=1))
    found = ", ".join(f"{name} {value:.3g}" for name, value in results[0].hyperparams.items())
    console.print(f"Found with the first seed: {found}.")
    console.print(f"Test loss over that of the sweep's best: {end:.2f}, and {early:.2f} when that is stopped early.")
    draw(args.out, results[0], curves, args.steps)
    console.print(f"{time.perf_counter() - began:.0f} s, compilation included. Picture: {args.out}")
    return {"scores": {name: np.array(values) for name, values in scores.items()}, "results": results}


if __name__ == "__main__":
    main()
