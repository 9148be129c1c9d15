"""One process of several that train one state together: how it ended, and where."""

import json
import os
import pathlib
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import autotunenet_jax as atn
from tests.contract import conftest as toy

# Two and three processes share them evenly.
FEATURES, ROWS = 12, 24
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
TRUTH = np.random.default_rng(0).normal(size=FEATURES).astype(np.float32)
VALID = np.random.default_rng(1).normal(size=(32, FEATURES)).astype(np.float32)
STOP_AT, DIES_AT = 50, 100


def rows(step):
    draw = np.random.default_rng(step + 1)
    x = draw.normal(size=(ROWS, FEATURES)).astype(np.float32)
    return x, (x @ TRUTH + 0.5 + 0.1 * draw.normal(size=ROWS)).astype(np.float32)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def train_step(state, batch, hp):
    key, noise = jax.random.split(state["key"])
    x, y = batch
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], x + 0.01 * jax.random.normal(noise, x.shape), y)
    updates, opt = OPTIMIZER.update(grads, atn.set_hyperparams(state["opt"], hp), state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key}, loss


def eval_step(state):
    return loss_fn(state["params"], VALID, VALID @ TRUTH + 0.5)


def new_state():
    params = {"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}
    return {"params": params, "opt": OPTIMIZER.init(params), "key": jax.random.key(0)}


def fit(state, batches, **options):
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1.0)}, total_steps=160, initial={"learning_rate": 1e-5})
    return atn.fit(train_step, state, batches, tuner=tuner, eval_step=eval_step, progress=False, **options)


def told(result):
    """What is to be the same everywhere: decisions, losses, and the parts of the state that this process holds."""
    leaves = [leaf for leaf in jax.tree.leaves(result.state) if leaf.dtype == jnp.float32]
    history = result.history
    return {
        "rounds": history.rounds,
        "losses": [row["loss"] for row in history.records],
        "rates": [row["learning_rate"] for row in history.records],
        "parts": [np.asarray(shard.data).tolist() for leaf in leaves for shard in leaf.addressable_shards],
        "eval": result.eval,
        "steps": history.summary["steps"],
        "is_interrupted": result.is_interrupted,
    }


def main(rank, world, port, folder, how="stopped"):
    toy.lighten()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # One that has failed waits no longer than this for the others as it ends.
    patience = {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
    jax.distributed.initialize(f"127.0.0.1:{port}", world, rank, **patience)
    mesh = jax.make_mesh((world,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array):
        # Parameters and their moments are spread, all else is everywhere.
        names = ("data",) if array.shape == (FEATURES,) else ()
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(*names)), lambda i: array[i])

    def batches(step, hp):
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        over = NamedSharding(mesh, PartitionSpec("data"))
        return tuple(jax.make_array_from_process_local_data(over, array[mine]) for array in rows(step))

    def stopped(step, hp):
        # The last process is asked to stop, and the first one is not.
        if step == STOP_AT and rank == world - 1 and not results[1:]:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step, hp)

    def killed(step, hp):
        if step == DIES_AT and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(step, hp)

    state, results = jax.tree.map(place, new_state()), []
    if how == "killed":
        atn.Snapshots.is_due = lambda store: True
        fit(state, killed, snapshots=folder / "run")
    if how == "again":
        results.append(fit(state, batches, snapshots=folder / "run", resume=True))
        results.append(fit(state, batches))
    if how == "stopped":
        results.append(fit(state, batches))
        results.append(fit(state, stopped, snapshots=folder / "run"))
        if rank == 0:
            shutil.copytree(folder / "run", folder / "copy")
        results.append(fit(state, batches, snapshots=folder / "run", resume=True))
    (folder / f"{rank}.json").write_text(json.dumps([told(result) for result in results]))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), sys.argv[3], pathlib.Path(sys.argv[4]), *sys.argv[5:])
