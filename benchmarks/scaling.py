"""The cost model of docs/scaling.md beside what is measured: time of a run, memory of a device, bytes on the network.

What the model takes (a plain step, a copy of the state, a decision) is measured by itself; what it says of a whole run
of `fit` is then compared with one. Devices are forced CPU devices, which share the cores there are: their memory and
their network are real, a speed-up there is none.

    python -m benchmarks.scaling [--widths 256 1024] [--devices 1 4] [--steps 400]
"""

import argparse
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import autotunenet_jax as atn
from autotunenet_jax.checkpoint.memory_copies import copy_tree
from autotunenet_jax.controller import decide_jit, hyperparams_jit
from autotunenet_jax.loop.device_copies import Copies
from autotunenet_jax.loop.run import _step_jit
from benchmarks.gpu import timed

_MOST_DEVICES = 8
BATCH = 256
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
_COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"(f32|s32|u32|pred)\[([\d,]*)\]")


def loss_fn(params, batch):
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer)
    return jnp.mean((x @ params[-1] - y) ** 2)


def train_step(state, batch, hp):
    params, inner = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, inner = OPTIMIZER.update(grads, atn.set_hyperparams(inner, hp), params)
    return (optax.apply_updates(params, updates), inner), loss


def new_run(width, devices):
    """State and batch: parameters and moments are spread over the devices by rows, as is the batch."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def place(array):
        names = ("data",) if array.ndim else ()
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))

    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(key, (width, width)) / np.sqrt(width) for key in keys]
    batch = (jax.random.normal(jax.random.key(1), (BATCH, width)), jnp.ones((BATCH, width)))
    return jax.tree.map(place, (params, OPTIMIZER.init(params))), jax.tree.map(place, batch)


def on_device(arrays):
    """Bytes of some arrays that lie on the first device."""
    first = jax.devices()[0]
    shards = (shard for array in arrays for shard in array.addressable_shards if shard.device == first)
    return sum(shard.data.nbytes for shard in shards)


def live():
    """Bytes of all arrays there are, typed keys aside."""
    return on_device(
        a for a in jax.live_arrays() if not a.is_deleted() and not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    )


def whole(result):
    """The result of a run that nobody has cut short: a part of one says nothing of its time."""
    if result.is_interrupted:
        raise SystemExit(f"Not measured: {result.stop_reason}")
    return result


def sent(compiled):
    """Bytes that the collectives of a program give each device."""
    total = 0
    for shapes, _ in _COLLECTIVE.findall(compiled.as_text()):
        for _, dims in _SHAPE.findall(shapes):
            total += 4 * int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
    return total


def parts(state, batch, tuner):
    """What the model takes: seconds of a plain step, of a copy, of a decision; and both compiled steps."""
    ts = tuner.init(jax.random.key(0))
    hp = hyperparams_jit(tuner.core, ts)
    plain = jax.jit(train_step, donate_argnums=0).lower(state, batch, hp).compile()
    copies = Copies(state, copy_tree(state), copy_tree(state))
    tuned = _step_jit.lower(tuner.core, train_step, False, copies, ts, hp, batch).compile()
    del copies
    carry = [copy_tree(state)]

    def step():
        carry[0], loss = plain(carry[0], batch, hp)
        return loss, carry[0]

    step_s, copy_s = timed(step, 40), timed(lambda: copy_tree(state), 20)
    decide_jit(tuner.core, copy_tree(ts))
    return step_s, copy_s, timed(lambda: decide_jit(tuner.core, copy_tree(ts)), 10), plain, tuned


def modelled_s(step_s, copy_s, decision_s, history, steps, tick_s):
    """Seconds of a run of `fit`, from its parts.

    A step checks the state in one pass and copies it, one and a half copies in all. A round copies its state once, and
    for each fork at most twice: back, and into the place of the best.
    """
    rounds, forks = len(history.rounds), sum(len(row["forks"]) for row in history.rounds)
    decisions, copies = forks + 2 * rounds, rounds + 2 * forks
    return steps * (step_s + 1.5 * copy_s + tick_s) + copies * copy_s + decisions * decision_s


def row(width, devices, steps, tick_s):
    """One configuration: what the model says, and what is measured."""
    state, batch = new_run(width, devices)
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=steps, initial={"learning_rate": 1e-3})
    step_s, copy_s, decision_s, plain, tuned = parts(state, batch, tuner)
    size, held = on_device(jax.tree.leaves(state)), []
    before = live()

    def run(callbacks=()):
        return whole(
            atn.fit(train_step, state, lambda step, hp: batch, tuner=tuner, progress=False, callbacks=callbacks)
        )

    run([lambda _: held.append(live() - before)])
    start = time.perf_counter()
    history = run().history
    took = time.perf_counter() - start
    extra = [program.memory_analysis().temp_size_in_bytes for program in (plain, tuned)]
    return {
        "width": width,
        "devices": devices,
        "state MiB": size / 2**20,
        "step ms": 1e3 * step_s,
        "copy ms": 1e3 * copy_s,
        "decision ms": 1e3 * decision_s,
        "run s, model": modelled_s(step_s, copy_s, decision_s, history, steps, tick_s),
        "run s": took,
        "held, model": 3.0,
        "held": max(held, default=0) / size,
        "temporary, model": 1.0,
        "temporary": (extra[1] - extra[0]) / size,
        "sent KiB, model": sent(plain) / 1024,
        "sent KiB": sent(tuned) / 1024,
    }


def tick_seconds(steps):
    """What a step of `fit` takes where there is nothing to train: the controller, and the host's part."""
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=steps)

    def nothing(state, batch, hp):
        return state - 0.01 * state * (1.0 + hp["learning_rate"]), jnp.sum(state)

    def run():
        whole(atn.fit(nothing, jnp.ones(1), lambda step, hp: 0.0, tuner=tuner, progress=False))

    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    # Before the first array. Queued steps of several devices need threads; see autotunenet_jax/compiler/cpu_queue.py.
    os.environ["PJRT_NPROC"] = str(2 * _MOST_DEVICES)
    jax.config.update("jax_num_cpu_devices", _MOST_DEVICES)
    tick_s = tick_seconds(arguments.steps)
    print(f"the controller and the host, for each step: {1e3 * tick_s:.2f} ms\n")
    rows = [row(w, d, arguments.steps, tick_s) for w in arguments.widths for d in arguments.devices]
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for found in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in found.values()) + " |")


if __name__ == "__main__":
    main()
