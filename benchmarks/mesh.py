"""Whether steps on several CPU devices come to an end, queued without waiting for any of them, plain beside tuned.

Every kind of program runs again and again in one process; XLA ends a process whose reductions wait for each other for
ten seconds, and the rest of the runs goes to another one. Prints how many runs finished and how many hung, with the
threads that XLA takes by itself and with two for each device, and in how many the replicas ended with other bits.

    python benchmarks/mesh.py [--runs 20] [--devices 8] [--steps 200] [--threads 0 16] [--kinds pmap fit]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings

KINDS = ("pmap", "shard_map", "sharding", "fit")
ROWS, INPUTS, WIDTH = 256, 16, 256
LIMIT_SECONDS = 900
HUNG = "Termination timeout"


def problem(count):
    """Parameters, and a batch for so many devices."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (ROWS * count, INPUTS))
    y = jnp.tanh(x @ jnp.linspace(-1.0, 1.0, INPUTS))
    hidden = 0.2 * jax.random.normal(jax.random.key(1), (INPUTS, WIDTH))
    return {"hidden": hidden, "out": jnp.zeros(WIDTH)}, x, y


def loss_fn(params, x, y):
    import jax.numpy as jnp

    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)


def stepper(kind, way, steps):
    """A function that queues a whole run and returns what it ends with."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import autotunenet_jax as atn

    count, axis = jax.device_count(), None if kind == "sharding" else "data"
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    tuned = atn.autotune(inner, {"learning_rate": (1e-4, 1.0)}, steps, axis_name=axis)
    optimizer = tuned if way == "tuned" else optax.with_extra_args_support(inner)
    params, x, y = problem(count)

    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        grads = grads if axis is None else jax.lax.pmean(grads, axis)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    if kind == "pmap":
        train = jax.pmap(step, "data")
        params, state = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), (params, optimizer.init(params)))
        x, y = x.reshape(count, ROWS, INPUTS), y.reshape(count, ROWS)
    else:
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
        (x, y), params = jax.device_put((x, y), rows), jax.device_put(params, everywhere)
        state = jax.device_put(optimizer.init(params), everywhere)
        if kind == "shard_map":
            whole, part = PartitionSpec(), PartitionSpec("data")
            step = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, part, part), out_specs=whole, check_vma=False)
        train = jax.jit(step)

    def run():
        now = (params, state)
        for _ in range(steps):
            now = train(*now, x, y)
        return now[0], atn.hyperparams(now[1])

    return run


def fitter(way, steps):
    """The same by `fit`; plain is the loop that `fit` would be without waiting for any step."""
    import jax
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import autotunenet_jax as atn

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    params, x, y = problem(count)
    batch, state = jax.device_put((x, y), rows), jax.device_put((params, optimizer.init(params)), everywhere)

    def train_step(state, batch, hp):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, atn.set_hyperparams(opt_state, hp), params)
        return (optax.apply_updates(params, updates), opt_state), loss

    space, train = {"learning_rate": (1e-4, 1.0)}, jax.jit(train_step)

    def run():
        if way == "tuned":
            tuner = atn.AutoTuneNet(space, total_steps=steps, initial={"learning_rate": 1e-3})
            result = atn.fit(train_step, state, lambda step, hp: batch, tuner=tuner, progress=False)
            return result.state[0], {}
        now = state
        for _ in range(steps):
            now, _ = train(now, batch, {"learning_rate": 1e-3})
        return now[0], {}

    return run


def child(kind, way, steps, runs):
    """So many runs in this process; a line for each, with the number of replicas that differ."""
    import jax
    import numpy as np

    run = fitter(way, steps) if kind == "fit" else stepper(kind, way, steps)
    for _ in range(runs):
        ended, found = jax.tree.leaves(jax.block_until_ready(run())), set()
        for number in range(jax.device_count()):
            digest = hashlib.sha256()
            for leaf in ended:
                # What lies on one device is the same for all.
                shards = leaf.addressable_shards
                digest.update(np.asarray(shards[number % len(shards)].data).tobytes())
            found.add(digest.hexdigest())
        print(json.dumps(len(found)), flush=True)


def measured(command, runs, env):
    """Runs that finished, hung, failed, and finished with replicas that differ."""
    told = {"finished": 0, "hung": 0, "failed": 0, "differed": 0}
    while (left := runs - told["finished"] - told["hung"] - told["failed"]) > 0:
        done = subprocess.run(
            [*command, str(left)], env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
        replicas = [json.loads(line) for line in done.stdout.splitlines()]
        told["finished"] += len(replicas)
        told["differed"] += sum(number > 1 for number in replicas)
        if done.returncode:
            told["hung" if HUNG in done.stderr else "failed"] += 1
            if HUNG not in done.stderr:
                print(done.stderr[-800:], file=sys.stderr)
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--ways", nargs="*", default=("plain", "tuned"))
    parser.add_argument("--threads", nargs="*", type=int, help="0: as many as XLA takes; by default 0 and 2 a device")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, way, runs = arguments.child
        # Whoever runs this knows.
        warnings.filterwarnings("ignore", "autotune: steps queued")
        return child(kind, way, arguments.steps, int(runs))
    flags = f"--xla_force_host_platform_device_count={arguments.devices}"
    flags += " --xla_cpu_collective_call_warn_stuck_timeout_seconds=5"
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=10"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    with tempfile.TemporaryDirectory() as cache:
        for threads in arguments.threads or (0, 2 * arguments.devices):
            env = {**os.environ, **own, "JAX_COMPILATION_CACHE_DIR": cache}
            env.pop("PJRT_NPROC", None)
            env |= {"PJRT_NPROC": str(threads)} if threads else {}
            for kind in arguments.kinds:
                for way in arguments.ways:
                    command = [sys.executable, __file__, "--steps", str(arguments.steps), "--child", kind, way]
                    told = measured(command, arguments.runs, env)
                    row = ", ".join(f"{name} {count}" for name, count in told.items())
                    print(f"threads {threads or 'as XLA takes them'}, {kind}, {way}: {row}", flush=True)


if __name__ == "__main__":
    main()
