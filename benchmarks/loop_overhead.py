"""What progress, history and logging cost a run of `fit`, in runs that alternate with plain ones in one process.

The plain run has no progress line, no callbacks and no loggers. The other one has a progress line on a terminal of 120
columns, a JSONL file with a row every 100 steps, and a callback that hears of every step. Both tune alike, on a step of
some 2 ms; ratios are taken between neighbours, so that a slow machine slows both.

    python -m benchmarks.loop_overhead [--pairs 8] [--steps 1500]
"""

import argparse
import io
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import autotunenet_jax as atn
from autotunenet_jax.loop import fit as fit_module

WIDTH, BATCH = 384, 64
STEP_S = 2e-3
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


def loss_fn(params, batch):
    for layer in params[:-1]:
        batch = jax.nn.relu(batch @ layer)
    return jnp.mean((batch @ params[-1] - 1.0) ** 2)


def train_step(state, batch, hp):
    params, inner = state
    loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
    updates, inner = OPTIMIZER.update(gradient, atn.set_hyperparams(inner, hp), params)
    return (optax.apply_updates(params, updates), inner), loss, {"double": 2 * loss}


def new_state(layers):
    keys = jax.random.split(jax.random.key(0), layers)
    params = [jax.random.normal(key, (WIDTH, WIDTH)) / np.sqrt(WIDTH) for key in keys]
    return params, OPTIMIZER.init(params)


class Counts(atn.Callback):
    def __init__(self):
        self.steps = 0

    def on_step(self, step):
        self.steps += 1


def seconds(layers, steps, *, is_watched, folder):
    """Seconds on the clock and of the processor that a run takes from its first to its last step."""
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-2)}, total_steps=steps, initial={"learning_rate": 1e-3})
    batch = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    counts = Counts()
    log = atn.JSONLLogger(pathlib.Path(folder) / "log.jsonl")
    listening = {"callbacks": [counts], "loggers": [log], "log_every": 100} if is_watched else {}
    start, processor = time.perf_counter(), time.process_time()
    atn.fit(
        train_step,
        new_state(layers),
        lambda step, hp: batch,
        tuner=tuner,
        has_aux=True,
        progress=is_watched,
        **listening,
    )
    took = time.perf_counter() - start, time.process_time() - processor
    assert not is_watched or 0 < counts.steps <= steps
    return took


def layers_for(step_s):
    """How many layers make a step of so many seconds, alone."""
    batch = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    for layers in range(2, 24):
        step = jax.jit(lambda state: train_step(state, batch, {"learning_rate": jnp.float32(1e-4)})[0])
        state = step(new_state(layers))
        times = []
        for _ in range(30):
            start = time.perf_counter()
            state = jax.block_until_ready(step(state))
            times.append(time.perf_counter() - start)
        if np.median(times) >= step_s:
            break
    return layers


def on_terminal(progress):
    """A progress line on a terminal that nobody sees."""

    def make(total, *, is_on):
        console = Console(file=io.StringIO(), width=120, force_terminal=True)
        return progress(total, is_on=is_on, console=console)

    return make


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    fit_module.Progress = on_terminal(fit_module.Progress)
    layers = layers_for(STEP_S)
    with tempfile.TemporaryDirectory() as folder:
        for is_watched in (False, True):
            seconds(layers, arguments.steps, is_watched=is_watched, folder=folder)  # compiles
        pairs = []
        for number in range(arguments.pairs):
            order = (False, True) if number % 2 == 0 else (True, False)
            took = {side: seconds(layers, arguments.steps, is_watched=side, folder=folder) for side in order}
            pairs.append((took[False], took[True]))
            (plain, _), (watched, _) = pairs[-1]
            per_step = 1e3 * plain / arguments.steps
            print(f"plain {plain:.2f} s ({per_step:.2f} ms a step), watched {watched:.2f} s: {watched / plain:.4f}")
    times = np.array(pairs)
    for name, column in (("clock", 0), ("processor", 1)):
        ratios = times[:, 1, column] / times[:, 0, column]
        middle = np.median(ratios)
        spread = np.median(np.abs(ratios - middle))
        pooled = np.median(times[:, 1, column]) / np.median(times[:, 0, column])
        print(f"{name}: median ratio {middle:.4f} (median deviation {spread:.4f}), ratio of medians {pooled:.4f}")


if __name__ == "__main__":
    main()
