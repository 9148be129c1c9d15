"""Draws the pictures of concepts.md, from trainings of a small network on the digits of scikit-learn.

python docs/figures.py [name ...]
"""

import contextlib
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import optax
from sklearn.datasets import load_digits

import autotunenet_jax as atn
from autotunenet_jax import faults

matplotlib.use("agg")

FOLDER = pathlib.Path(__file__).parent / "concepts"
# Okabe and Ito's colours, which most kinds of colour blindness keep apart.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SIZE = (6.8, 2.7)
SPACE = {"learning_rate": (1e-5, 1e-1)}

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
train, valid = (x[:1200], y[:1200]), (x[1200:], y[1200:])
adam = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


def loss_fn(params, batch):
    logits = jax.nn.relu(batch[0] @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def first_state(seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    params = {"w1": jax.random.normal(first, (64, 48)) / 8, "w2": jax.random.normal(second, (48, 10)) / 7}
    return params, adam.init(params)


@jax.jit
def train_step(state, batch, hp):
    loss, grads = jax.value_and_grad(loss_fn)(state[0], batch)
    updates, opt_state = adam.update(grads, atn.set_hyperparams(state[1], hp), state[0])
    return (optax.apply_updates(state[0], updates), opt_state), loss


@jax.jit
def eval_step(state):
    return loss_fn(state[0], valid)


def batches(step, hp=None):
    rows = np.random.default_rng(step).integers(1200, size=32)
    return train[0][rows], train[1][rows]


def train_for(state, rate, steps, *, seed=0, cooled=0):
    """Losses of some steps at a rate, the last of them with the rate falling to almost zero."""
    losses = []
    for step in range(steps):
        left = steps - step
        factor = min(1.0, left / (cooled + 1))
        state, loss = train_step(state, batches(1000 * seed + step), {"learning_rate": jnp.float32(rate * factor)})
        losses.append(float(loss))
    return state, np.array(losses)


def smooth(losses, window):
    weights = np.ones(window)
    return np.convolve(losses, weights, "same") / np.convolve(np.ones(len(losses)), weights, "same")


def panels(count=1, **options):
    figure, axes = plt.subplots(1, count, figsize=SIZE, layout="constrained", squeeze=False, **options)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", lw=0.6)
        axis.set_axisbelow(True)
    return figure, axes[0]


def tuned(train_step=train_step, batches=batches, **options):
    tuner = atn.AutoTuneNet(SPACE, total_steps=400, initial={"learning_rate": 1e-5})
    return atn.fit(
        train_step, first_state(), batches, tuner=tuner, eval_step=eval_step, progress=False, **options
    ).history


def forks():
    """A round close up: losses of its forks, and the rate of the run with what was thrown away."""
    history = tuned()
    held = history.rounds[0]
    figure, (close, whole) = panels(2)
    for number, fork in enumerate(held["forks"]):
        rows = [row for row in history.records if row["phase"] == "fork" and row["round"] == held.get("round", 0)]
        rows = [row for row in rows if row["fork"] == number]
        steps = np.arange(1, len(rows) + 1)
        is_kept = fork["status"] == "kept"
        label = f"{fork['hyperparams']['learning_rate']:.2g}" + (" (kept)" if is_kept else "")
        losses = smooth([row["loss"] for row in rows], 3)
        close.plot(steps, losses, color=[BLUE, ORANGE, GREEN, RED][number % 4], lw=2.2 if is_kept else 1.2, label=label)
    close.set(xlabel="step of the fork", ylabel="training loss", title="forks of one round")
    close.legend(title="learning rate", frameon=False, fontsize=8, title_fontsize=8)
    for is_kept, color, label in ((False, ORANGE, "thrown away"), (True, BLUE, "kept")):
        rates = [row["learning_rate"] if row["is_kept"] == is_kept else np.nan for row in history.records]
        whole.plot([row["step"] for row in history.records], rates, ".", ms=2.5, color=color, label=label)
    whole.set(yscale="log", xlabel="budget, steps", title="learning rate of the run")
    whole.legend(frameon=False, fontsize=8, markerscale=3)
    return figure


def paired():
    """How well a difference between two rates shows, on the same batches and on different ones."""
    state, _ = train_for(first_state(), 1e-3, 100)
    low, high, other = [], [], []
    for seed in range(1, 41):
        low.append(np.mean(train_for(state, 1e-3, 20, seed=seed)[1][-5:]))
        high.append(np.mean(train_for(state, 1.25e-3, 20, seed=seed)[1][-5:]))
        other.append(np.mean(train_for(state, 1.25e-3, 20, seed=100 + seed)[1][-5:]))
    low, high, other = map(np.array, (low, high, other))
    figure, (left, right) = panels(2, sharey=True)
    for axis, values, color, title in (
        (left, other - low, ORANGE, "different batches"),
        (right, high - low, BLUE, "the same batches"),
    ):
        bins = np.linspace(-0.16, 0.16, 33)
        axis.hist(np.clip(values, -0.16, 0.16), bins=bins, color=color)
        axis.axvline(0.0, color="0.3", lw=0.8)
        axis.set(title=f"{title}: {np.mean(values < 0):.0%} say .00125", xlabel="loss at .00125 less loss at .001")
    left.set_ylabel("pairs of forks, of 40")
    return figure


def horizons():
    """Which rate looks best, by the length of the fork, scored hot and after a cool-down."""
    rates = np.logspace(-4, -0.75, 14)
    figure, axes = panels(2, sharey=True)
    for axis, share, title in ((axes[0], 0.0, "scored hot"), (axes[1], 0.25, "scored after a cool-down")):
        for place, (steps, color) in enumerate(((20, ORANGE), (80, GREEN), (640, BLUE))):
            scores = []
            for rate in rates:
                runs = [train_for(first_state(s), rate, steps, seed=s, cooled=int(share * steps))[0] for s in range(2)]
                scores.append(np.mean([float(eval_step(state)) for state in runs]))
            scores = np.log(scores) - np.min(np.log(scores))
            axis.plot(rates, scores, color=color, lw=1.5, label=f"{steps} steps")
            axis.plot(rates[np.argmin(scores)], 0.06 + 0.1 * place, "v", color=color, ms=8, zorder=5)
        axis.set(xscale="log", ylim=(0.0, 1.5), xlabel="learning rate", title=title)
    axes[0].set_ylabel("log of the loss over the best")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left", title="fork of", title_fontsize=8)
    return figure


def posterior():
    """What a Gaussian process with an intercept for each round makes of the forks of three rounds."""
    figure, (raw, joint) = panels(2)
    state, points, values, rounds = first_state(), [], [], []
    marks = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))
    for number, (before, places) in enumerate(
        ((0, (-2.75, -2.25, -1.75, -1.25)), (80, (-2.0, -1.5)), (160, (-2.5, -1)))
    ):
        state, _ = train_for(state, 1e-2, before, seed=number)
        forks = [train_for(state, 10**place, 40, seed=10 + number, cooled=10)[0] for place in places]
        scores = [float(eval_step(fork)) for fork in forks]
        raw.plot(
            10.0 ** np.array(places), scores, marks[number][1], color=marks[number][0], label=f"round {number + 1}"
        )
        points += places
        values += list(np.log(scores))
        rounds += [number] * len(places)
    raw.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss", title="scores of the forks")
    raw.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    raw.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    raw.legend(frameon=False, fontsize=8)
    points, values, rounds = map(np.array, (points, values, rounds))
    grid = np.linspace(-3.25, -0.75, 200)
    mean, deviation, offsets = _regression(points, values, rounds, grid)
    joint.fill_between(10**grid, mean - deviation, mean + deviation, color=BLUE, alpha=0.2, lw=0)
    joint.plot(10**grid, mean, color=BLUE, lw=1.5)
    for number, (color, marker) in enumerate(marks):
        mine = rounds == number
        joint.plot(10 ** points[mine], values[mine] - offsets[mine], marker, color=color)
    joint.set(xscale="log", xlabel="learning rate", ylabel="log of the loss, less\nthe level of its round")
    joint.set_title("one curve through all of them")
    return figure


def _regression(points, values, rounds, grid, *, scale=0.8, height=0.8, noise=0.06):
    """Matern-5/2 regression with an unknown level for each round: mean, deviation, and the level of each point."""

    def kernel(a, b):
        r = np.sqrt(5.0) * np.abs(a[:, None] - b[None]) / scale
        return height**2 * (1 + r + r**2 / 3) * np.exp(-r)

    same = 1e2 * (rounds[:, None] == rounds[None])
    inverse = np.linalg.inv(kernel(points, points) + same + noise**2 * np.eye(len(points)))
    weights = inverse @ (values - values.mean())
    cross = kernel(grid, points)
    variance = height**2 - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    return cross @ weights, np.sqrt(np.maximum(variance, 0.0)), values.mean() + same @ weights


def guard():
    """A run that meets a loss of NaN, and whose last layer is negated later."""

    def wrecked_step(state, batch, hp):
        (params, opt_state), loss = train_step(state, batch[:2], hp)
        sign = jnp.where(batch[2] == 240, -1.0, 1.0)
        return ({**params, "w2": sign * params["w2"]}, opt_state), loss

    def numbered(step, hp):
        return (*batches(step), np.int32(step))

    history = tuned(*faults.inject(wrecked_step, numbered, {170: "nan"}))
    figure, (axis,) = panels()
    steps = [row["step"] for row in history.records]
    for is_kept, color, label in ((True, BLUE, "kept"), (False, ORANGE, "forks, and what was gone back over")):
        losses = [row["loss"] if row["is_kept"] == is_kept else np.nan for row in history.records]
        axis.plot(steps, losses, color=color, lw=1.2, label=label)
    axis.set(yscale="log", xlabel="budget, steps", ylabel="training loss")
    top = axis.get_ylim()[1]
    skipped = [row["step"] for row in history.records if not np.isfinite(row["loss"])]
    undone = [event["step"] for event in history.events if event.get("kind") == "rollback"]
    for places, color, side, text in (
        (skipped, "0.4", "right", "a loss of NaN:\nthe step does\nnot happen"),
        (undone, RED, "left", "weights negated:\nback to a\nhealthy copy"),
    ):
        for place in places:
            axis.axvline(place, color=color, lw=1.0, ls="--")
            beside = place + (4 if side == "left" else -4)
            axis.text(beside, top, text, ha=side, va="top", fontsize=8, color=color)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def snapshots():
    """A run that ends with an exception and is resumed, over one that is not."""
    whole = tuned()

    def failing(step, hp):
        if step == 230:
            raise OSError("the file server is gone")
        return batches(step)

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(OSError):
            tuned(batches=failing, snapshots=folder)
        with atn.Snapshots(folder, read_only=True) as store:
            saved = store.latest()
        resumed = tuned(snapshots=folder, resume=True)
    figure, (axis,) = panels()
    kept = {row["step"]: row["loss"] for row in whole.kept()}
    again = {row["step"]: row["loss"] for row in resumed.kept()}
    differing = sum(again[step] != kept.get(step) for step in again)
    steps = range(1, 401)
    for losses, color, width, label in (
        (kept, ORANGE, 3.0, "never interrupted"),
        (again, BLUE, 0.9, "interrupted and resumed"),
    ):
        axis.plot(steps, [losses.get(step, np.nan) for step in steps], color=color, lw=width, label=label)
    axis.axvline(saved, color=RED, lw=1.0, ls="--")
    axis.set(yscale="log", xlabel="budget, steps", ylabel="training loss")
    text = f"an exception; gone on with:\n{differing} of {len(again)} losses differ"
    axis.text(saved + 4, axis.get_ylim()[1] * 0.6, text, va="top", fontsize=8, color=RED)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


FIGURES = {call.__name__: call for call in (forks, paired, horizons, posterior, guard, snapshots)}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9})
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name]().savefig(FOLDER / f"{name}.png", dpi=110)
        plt.close("all")
        print(f"{FOLDER / name}.png")
