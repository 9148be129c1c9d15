"""One training run that tunes itself, next to what it saves you: a sweep.

A Flax NNX classifier learns scikit-learn's handwritten digits. It starts from an absurd learning rate, 1e-5, and is
trained once; learning rate, weight decay and dropout are tuned while it trains. For comparison the same budget is spent
without the tuner, and nine more times on a sweep of learning rates with linear decay.

    python examples/quickstart.py [--out quickstart.png]
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import autotunenet_jax as atn

TOTAL_STEPS = 1000
BATCH_SIZE = 64
START = {"learning_rate": 1e-5, "weight_decay": 1e-4, "dropout": 0.0}
SWEEP = 10.0 ** np.linspace(-4.0, 0.0, 9)


class Classifier(nnx.Module):
    """Two layers with dropout between them. The dropout rate is an array, so it can change without recompiling."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, *, dropout=None, key=None):
        x = nnx.relu(self.hidden(x))
        if dropout is not None:
            x = x * jax.random.bernoulli(key, 1.0 - dropout, x.shape) / (1.0 - dropout)
        return self.out(x)


def load(seed=0):
    """Training, validation and test rows: 1,200, 297 and 300."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16.0).astype(np.float32), y[order].astype(np.int32)
    return (x[:1200], y[:1200]), (x[1200:1497], y[1200:1497]), (x[1497:], y[1497:])


TRAIN, VALIDATION, TEST = load()
GRAPH, _ = nnx.split(Classifier(nnx.Rngs(0)))
OPTIMIZER = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.0)


def new_state(seed):
    params = nnx.state(Classifier(nnx.Rngs(seed)))
    return {"params": params, "opt": OPTIMIZER.init(params), "key": jax.random.key(seed)}


def loss_fn(params, x, y, **dropout):
    logits = nnx.merge(GRAPH, params)(x, **dropout)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train_step(state, batch, hp):
    """An ordinary optax step; the values in ``hp`` are the tuner's."""
    key, dropout_key = jax.random.split(state["key"])
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], *batch, dropout=hp["dropout"], key=dropout_key)
    opt_state = atn.set_hyperparams(state["opt"], hp)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt_state, "key": key}, loss


def eval_step(state):
    return loss_fn(state["params"], *VALIDATION)


@jax.jit
def test_scores(state):
    logits = nnx.merge(GRAPH, state["params"])(TEST[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, TEST[1]).mean()
    return loss, jnp.mean(jnp.argmax(logits, -1) == TEST[1])


@functools.cache
def epoch_order(epoch):
    return np.random.default_rng(epoch).permutation(len(TRAIN[0]))


def batches(step, hp):
    """The batch at a step: a fork that goes back sees the same rows again."""
    per_epoch = len(TRAIN[0]) // BATCH_SIZE
    start = step % per_epoch * BATCH_SIZE
    rows = epoch_order(step // per_epoch)[start : start + BATCH_SIZE]
    return TRAIN[0][rows], TRAIN[1][rows]


def untuned(seed, rates):
    """Plain training with linear decay, once for each rate; compiled together, they run at the same time."""
    rows = [batches(step, None) for step in range(TOTAL_STEPS)]
    xs, ys = jnp.stack([x for x, _ in rows]), jnp.stack([y for _, y in rows])

    def run(rate):
        def body(state, step):
            hp = {**START, "learning_rate": rate * (1.0 - step / TOTAL_STEPS)}
            return train_step(state, (xs[step], ys[step]), hp)[0], None

        return jax.lax.scan(body, new_state(seed), jnp.arange(TOTAL_STEPS))[0]

    states = jax.jit(jax.vmap(run))(jnp.asarray(rates, jnp.float32))
    return [jax.tree.map(lambda leaf: leaf[i], states) for i in range(len(rates))]  # noqa: B023


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="quickstart.png", help="where to write the picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()

    space = {"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.5)}
    tuner = atn.AutoTuneNet(space, total_steps=TOTAL_STEPS, initial=START)
    began = time.perf_counter()
    result = atn.fit(train_step, new_state(args.seed), batches, tuner=tuner, eval_step=eval_step)
    seconds = time.perf_counter() - began

    *sweep, same_start = untuned(args.seed, [*SWEEP, START["learning_rate"]])
    best = min(range(len(SWEEP)), key=lambda i: float(eval_step(sweep[i])))

    table = Table(title=f"Digits, {TOTAL_STEPS:,} steps a run", box=rich.box.SIMPLE_HEAD)
    for column in ("run", "rate", "steps", "val. loss", "test loss", "test acc."):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)

    def add(name, rate, steps, state, style=None):
        loss, accuracy = map(float, test_scores(state))
        values = (f"{float(eval_step(state)):.4f}", f"{loss:.4f}", f"{100 * accuracy:.1f} %")
        table.add_row(name, rate, f"{steps:,}", *values, style=style)

    rate = START["learning_rate"]
    add("untuned", f"{rate:.0e}", TOTAL_STEPS, same_start)
    found = f"{rate:.0e} → {result.hyperparams['learning_rate']:.1e}"
    add("tuned, one run", found, TOTAL_STEPS, result.state, style="bold green")
    add(f"best of {len(SWEEP)} runs", f"{SWEEP[best]:.1e}", TOTAL_STEPS * len(SWEEP), sweep[best])
    console.print(table)

    summary = result.history.summary
    console.print(
        f"Tuned in {seconds:.0f} s, compilation included: {summary['rounds']} rounds, "
        f"{100 * summary['share_discarded']:.0f} % of the steps on discarded forks. "
        f"Found: {', '.join(f'{name} {value:.3g}' for name, value in result.hyperparams.items())}."
    )
    result.history.plot(args.out)
    console.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
