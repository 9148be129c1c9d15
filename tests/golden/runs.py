"""Twelve short runs, each from the same bits to the same bits, as plain data."""

import functools
import hashlib
import json
import os
import pathlib
import platform
import signal
import tempfile
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from autotunenet_jax import faults
from tests import problem

STEPS = 200
_LEFT_OUT = ("lead", "deviation")
SEVERAL = {"learning_rate": (1e-4, 1.0), "weight_decay": (1e-5, 1e-1), "dropout": (0.0, 0.5)}
STARTS = {"learning_rate": 1e-3, "weight_decay": 1e-3, "dropout": 0.1}
ADAMW = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=1e-3)


def machine():
    """What the bits depend on besides the code."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    software = {name: version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
    try:
        software["torch"] = version("torch")
    except ModuleNotFoundError:
        software["torch"] = "none"
    return {**software, "cpu": hashlib.sha256(flags.encode()).hexdigest()[:12]}


def bits(tree):
    """Digest of a tree of arrays: every bit of every leaf, in order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return digest.hexdigest()[:16]


def account(history, hyperparams, state):
    """A run as plain data: what was decided and when, every step and metric by their digest, and where the run ended.

    Which messages go with it is none of its business, and neither is whether one state's metric is noted twice.
    """
    rounds = [
        {name: row[name] for name in ("start", "end", "kind", "scored_by", "best", "outcome", "chosen")}
        for row in history.rounds
    ]
    evals = {row["step"]: row["value"] for row in history.evals}
    kinds = ("rollback", "retry", "shift", "rate", "resume")
    # What follows from the records, or from what the probabilities follow from, is left out.
    told = [{name: value for name, value in row.items() if name != "reference"} for row in history.rounds]
    for row in told:
        row["forks"] = [{name: fork[name] for name in fork if name not in _LEFT_OUT} for fork in row["forks"]]
    everything = json.dumps([history.records, told, sorted(evals.items())], sort_keys=True, default=str)
    return {
        "rounds": rounds,
        "events": sorted([row["step"], row["kind"]] for row in history.events if row["kind"] in kinds),
        "records": hashlib.sha256(everything.encode()).hexdigest()[:16],
        "hyperparams": hyperparams,
        "state": state,
    }


# fit.


def fitted(train_step=problem.train_step, state=None, batches=problem.batches, *, tuner=None, **options):
    options = {"eval_step": problem.eval_step, "progress": False, **options}
    state = problem.new_state() if state is None else state
    result = atn.fit(train_step, state, batches, tuner=tuner or problem.tuner(), **options)
    return account(result.history, result.hyperparams, [bits(result.state), bits(result.best_state)])


def fit_rate():
    return fitted()


def several_step(state, batch, hp):
    x, y, _ = batch
    key, noise = jax.random.split(state["key"])
    x = atn.traced_dropout(noise, x, hp["dropout"])
    loss, grads = jax.value_and_grad(problem.loss_fn)(state["params"], x, y)
    updates, opt_state = ADAMW.update(grads, atn.set_hyperparams(state["opt"], hp), state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt_state, "key": key}, loss


def fit_several():
    params = problem.new_state()["params"]
    state = {"params": params, "opt": ADAMW.init(params), "key": jax.random.key(1)}
    return fitted(several_step, state, tuner=atn.AutoTuneNet(SEVERAL, 2 * STEPS, initial=STARTS))


def fit_batch_size():
    def batches(step, hp):
        x, y, number = problem.batch(step)
        rows = np.arange(16) % int(hp["batch_size"])
        return x[rows], y[rows], number

    space = {**problem.SPACE, "batch_size": [4, 8, 16]}
    return fitted(batches=batches, tuner=atn.AutoTuneNet(space, STEPS, initial={"batch_size": 8}))


# One compiled step for both faults.
faulty_step, _ = faults.inject(problem.train_step, problem.batches, {})


def faulty(plan):
    _, batches = faults.inject(problem.train_step, problem.batches, plan)
    return fitted(faulty_step, batches=batches)


def fit_nan():
    return faulty({70: "nan", 2: "nan"})


def fit_rollback():
    return faulty({**dict.fromkeys(range(88, 96), "nan"), 30: "spike"})


def fit_resume():
    calls = 0

    def stopped(step, hp):
        nonlocal calls
        calls += 1
        if calls == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return problem.batch(step)

    with tempfile.TemporaryDirectory() as folder:
        fitted(batches=stopped, snapshots=folder)
        return fitted(snapshots=folder, resume=True)


def fit_open_ended():
    return fitted(tuner=problem.tuner(start=1e-4, total_steps=None), steps=STEPS)


# autotune.


def wrapped(optimizer, *, spoiled=(), has_eval=False):
    """Trains by hand; what is in force at every step goes into the digest, bit by bit."""
    params = problem.new_state()["params"]
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, batch, is_spoiled):
        x, y, _ = batch
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, x, y)
        updates, state = optimizer.update(grads, state, params, value=jnp.where(is_spoiled, jnp.nan, loss))
        params = optax.apply_updates(params, updates)
        return params, state, atn.hyperparams(state), atn.wants_eval(state)

    observe_eval = jax.jit(atn.observe_eval, donate_argnums=0)
    trace = []
    for number in range(STEPS):
        params, state, values, wants = step(params, state, problem.batch(number), number in spoiled)
        if has_eval and bool(wants):
            state = observe_eval(state, problem.eval_step({"params": params}))
        trace.append({name: float(value) for name, value in values.items()})
    return {
        "every_tenth": [row["learning_rate"] for row in trace[::10]],
        "hyperparams": trace[-1],
        "trace": hashlib.sha256(json.dumps(trace, sort_keys=True).encode()).hexdigest()[:16],
        "state": bits(params),
    }


@functools.cache
def tuned_adam():
    return atn.autotune(problem.OPTIMIZER, problem.SPACE, STEPS, initial={"learning_rate": 1e-4})


def autotune_rate():
    return wrapped(tuned_adam())


def autotune_nan():
    return wrapped(tuned_adam(), spoiled=(50, 120, 121))


def autotune_several():
    space = {name: SEVERAL[name] for name in ("learning_rate", "weight_decay")}
    return wrapped(atn.autotune(ADAMW, space, STEPS), has_eval=True)


# The Trainer of PyTorch.


def trained(space, *, epochs=25, snapshots=None, fails_at=None, stops_at=None):
    import torch

    from autotunenet_torch import AutoTuneNet, Trainer

    torch.manual_seed(0)
    calls = 0

    def loss_fn(outputs, targets):
        nonlocal calls
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        if not model.training:
            return loss
        calls += 1
        if calls == stops_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss * torch.nan if calls == fails_at else loss

    x = torch.randn(64, 4)
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
    trainer = Trainer(loss_fn=loss_fn, epochs=epochs, progress=False, device="cpu")
    tuner = AutoTuneNet(space, initial={name: STARTS[name] for name in space})
    history = trainer.fit(model, loader, loader, tuner=tuner, snapshots=snapshots)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return account(history, tuner.best_hyperparams, [bits(state), trainer.best_value])


def torch_rate():
    return trained({"learning_rate": (1e-4, 1.0)}, fails_at=150)


def torch_several_resumed():
    with tempfile.TemporaryDirectory() as folder:
        trained(SEVERAL, epochs=50, snapshots=folder, stops_at=230)
        return trained(SEVERAL, epochs=50, snapshots=folder)


RUNS = {
    function.__name__: function
    for function in (
        fit_rate,
        fit_several,
        fit_batch_size,
        fit_nan,
        fit_rollback,
        fit_resume,
        fit_open_ended,
        autotune_rate,
        autotune_several,
        autotune_nan,
        torch_rate,
        torch_several_resumed,
    )
}
