"""How long a round of forks takes, one after the other and together, in runs of `fit` that alternate in one process.

A round is timed from the decision that begins its first fork to the one that ends it. Devices are forced CPU devices,
which share the cores there are.

    python -m benchmarks.parallel_forks [--widths 8 64 512] [--devices 1] [--pairs 5] [--steps 400]
"""

import argparse
import os
import time

import numpy as np

_FLAG = "--xla_force_host_platform_device_count"


def _problem(width):
    """A training step of two layers, its state and batches."""
    import jax
    import jax.numpy as jnp
    import optax

    import autotunenet_jax as atn

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    truth = np.random.default_rng(0).normal(size=(width, 1)).astype(np.float32)

    def batches(step, hp):
        draw = np.random.default_rng(step)
        x = draw.normal(size=(32, width)).astype(np.float32)
        return x, np.tanh(x @ truth / np.sqrt(width)) + 0.1 * draw.normal(size=(32, 1)).astype(np.float32)

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params[0]) @ params[1] - y) ** 2)

    def train_step(state, batch, hp):
        params, inner = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, inner = optimizer.update(grads, atn.set_hyperparams(inner, hp), params)
        return (optax.apply_updates(params, updates), inner), loss

    keys = jax.random.split(jax.random.key(0), 2)
    shapes = ((width, width), (width, 1))
    params = [jax.random.normal(key, shape) / np.sqrt(width) for key, shape in zip(keys, shapes, strict=True)]
    return train_step, (params, optimizer.init(params)), batches


def width_rows(width, steps, pairs, at_once):
    """Seconds of the rounds of some runs: a row per run, of one after the other and of together."""
    import jax

    import autotunenet_jax as atn
    from autotunenet_jax.controller.state import FORK, TRAIN
    from autotunenet_jax.session.session import Session

    train_step, state, batches = _problem(width)
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=steps, initial={"learning_rate": 1e-3})
    decide, times = Session.decide, []

    def timed(session):
        before = session.controller.phase
        decision = decide(session)
        jax.block_until_ready(session.host.state)
        now, after = time.perf_counter(), session.controller.phase
        if before != FORK and after == FORK:
            times.append([now, now])
        elif before == FORK and after == TRAIN:
            times[-1][1] = now
        return decision

    def run(parallel_forks):
        times.clear()
        result = atn.fit(train_step, state, batches, tuner=tuner, progress=False, parallel_forks=parallel_forks)
        if result.is_interrupted:
            # A part of a run says nothing of its time.
            raise SystemExit(f"Not measured: {result.stop_reason}")
        return sum(end - start for start, end in times), result.history

    Session.decide = timed
    try:
        for parallel_forks in (None, at_once):
            _, history = run(parallel_forks)  # compiles
        seconds = [[run(None)[0], run(at_once)[0]] for _ in range(pairs)]
    finally:
        Session.decide = decide
    return np.array(seconds), history


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--forks", type=int, default=3, help="forks at once")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}={arguments.devices}"
    print("| width | devices | forks of the run | one after the other, s | together, s | ratio | steps not asked for |")
    print("|---|---|---|---|---|---|---|")
    for width in arguments.widths:
        seconds, history = width_rows(width, arguments.steps, arguments.pairs, arguments.forks)
        alone, together = np.median(seconds, axis=0)
        ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
        forks = sum(len(row["forks"]) for row in history.rounds)
        unused = history.summary["unused_steps"]
        print(f"| {width} | {arguments.devices} | {forks} | {alone:.3f} | {together:.3f} | {ratio:.2f} | {unused} |")


if __name__ == "__main__":
    main()
