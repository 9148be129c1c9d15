"""Random faults of a run that resumes: signals, errors, memory that runs out. Does it end as if nothing had happened?

    python -m benchmarks.injections [--count 200] [--seed 0]

Each run is broken off by one fault at a random place: two signals at a random moment or in the user's own code, one
signal, an error in a batch, in a callback or in the validation, memory that runs out in a step, in a copy or in a
decision. What is resumed from its folder is compared, bit for bit, with a run that nothing
befell: training state, tuner, records, rounds, metrics, best state.
"""

import argparse
import collections
import contextlib
import functools
import os
import signal
import sys
import tempfile
import threading
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from autotunenet_jax import faults
from autotunenet_jax.loop import device_controller, run

TOTAL, EVERY = 160, 8
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
TRUTH = np.random.default_rng(0).normal(size=6).astype(np.float32)


def plain_step(state, batch, hp):
    x, y = batch

    def loss_of(w):
        return jnp.mean((x @ w - y) ** 2)

    key, noise = jax.random.split(state["key"])
    loss, grad = jax.value_and_grad(loss_of)(state["w"])
    grad = grad + 0.01 * jax.random.normal(noise, grad.shape)
    updates, opt = OPTIMIZER.update(grad, atn.set_hyperparams(state["opt"], hp), state["w"])
    return {"w": optax.apply_updates(state["w"], updates), "opt": opt, "key": key}, loss


# A step that can run out of memory, compiled once for all runs; batches tell it when.
STEP, _ = faults.inject(plain_step, lambda step, hp: None, {0: "oom"})
OOM = np.int32(faults.STEP_FAULTS.index("oom"))


@functools.cache
def rows(position):
    rng = np.random.default_rng(position + 1)
    x = rng.normal(size=(16, 6)).astype(np.float32)
    return x, (x @ TRUTH + 0.1 * rng.normal(size=16)).astype(np.float32)


class Hooks:
    """What happens in the user's code, by name and number of the call; nothing by default."""

    def __init__(self):
        self.plan, self.calls = {}, collections.Counter()

    def reset(self, plan=None):
        self.plan, self.calls = plan or {}, collections.Counter()

    def visit(self, place):
        self.calls[place] += 1
        act = self.plan.get((place, self.calls[place]))
        if act is not None:
            act()


HOOKS = Hooks()


def metric_of(state):
    def look(value):
        HOOKS.visit("eval")
        return value

    x, y = rows(-1)
    value = jnp.mean((x @ state["w"] - y) ** 2)
    return jax.pure_callback(look, jax.ShapeDtypeStruct((), jnp.float32), value)


def new_state():
    w = jnp.zeros(6)
    return {"w": w, "opt": OPTIMIZER.init(w), "key": jax.random.key(3)}


def train(folder=None):
    """One attempt, resuming where there is a folder."""

    def batches(position, hp):
        HOOKS.visit("batch")
        runs_out = HOOKS.plan.get("oom") == HOOKS.calls["batch"]
        return rows(position), OOM if runs_out else np.int32(-1)

    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1.0)}, TOTAL, initial={"learning_rate": 1e-5})
    options = {"tuner": tuner, "eval_step": metric_of, "eval_every": EVERY, "progress": False}
    options["callbacks"] = [lambda row: HOOKS.visit("callback")]
    with contextlib.ExitStack() as stack:
        if folder is not None:
            store = atn.Snapshots(folder, space=tuner.space, interval_s=0.02, overhead=0.9)
            options |= {"snapshots": stack.enter_context(store), "resume": True}
        return atn.fit(STEP, new_state(), batches, **options)


def account(result):
    """Everything that has to be the same, as bits and plain data."""
    leaves = jax.tree.leaves((result.state, result.tuner_state, result.best_state))
    raw = [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    history = result.history
    evals = [(row["step"], row["value"], row["is_settled"]) for row in history.evals]
    plain = repr((history.records, history.rounds, evals, history.discarded, result.eval, result.best_eval))
    return [np.asarray(leaf).tobytes() for leaf in raw], plain


# Faults.


def interrupt():
    """Ctrl-C, twice."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise OSError("injected")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def interrupted_after(seconds):
    timer = threading.Timer(seconds, interrupt)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextlib.contextmanager
def out_of_memory(owner, name, number):
    """A function of the library fails at one of its calls."""
    calls, function = iter(range(1, 10**9)), getattr(owner, name)

    def failing(*args, **kwargs):
        if next(calls) == number:
            raise MemoryError("injected")
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, failing):
        yield


def faults_of(rng, seconds):
    """All kinds of fault, each at a random place: what happens in the user's code, and around the run."""
    place = {"batch": int(rng.integers(1, TOTAL)), "eval": int(rng.integers(1, TOTAL // EVERY)), "callback": 1}
    found = {f"error in {name}": ({(name, number): fail}, None) for name, number in place.items()}
    found |= {f"two signals in {name}": ({(name, number): interrupt}, None) for name, number in place.items()}
    found["one signal"] = {("batch", place["batch"]): terminate}, None
    found["two signals at any moment"] = {}, interrupted_after(float(rng.uniform(0.0, seconds)))
    found["out of memory in a step"] = {"oom": place["batch"]}, None
    copies = {"copy_tree": 12, "copy_tree_to_host": 10, "_eval_jit": 20}
    for name, most in copies.items():
        found[f"out of memory in {name}"] = {}, out_of_memory(run, name, int(rng.integers(1, most)))
    for name, most in {"decide_jit": 6, "_observe_jit": 20, "copy_tree": 6}.items():
        around = out_of_memory(device_controller, name, int(rng.integers(1, most)))
        found[f"out of memory in the controller's {name}"] = {}, around
    return found


def broken_and_resumed(plan, around):
    """How a run ends that is broken off by a fault and resumed; also whether the fault hit."""
    has_hit = False
    with tempfile.TemporaryDirectory() as folder:
        HOOKS.reset(plan)
        try:
            with around or contextlib.nullcontext():
                has_hit = train(folder).is_interrupted
        except (KeyboardInterrupt, OSError, MemoryError, ValueError, jax.errors.JaxRuntimeError):
            # XLA gives an error in a callback another type.
            has_hit = True
        HOOKS.reset()
        return train(folder), has_hit


def campaign(count, seed=0):
    """Injects faults in turn; returns, for each kind, how often, how many hit, and how many runs ended otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A process that was started in the background ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    HOOKS.reset()
    train()
    start = time.monotonic()
    expected = account(train())
    seconds = time.monotonic() - start
    rng, table = np.random.default_rng(seed), collections.defaultdict(lambda: [0, 0, 0])
    while sum(row[0] for row in table.values()) < count:
        found = faults_of(rng, seconds)
        for name in map(str, rng.permutation(list(found))):
            plan, around = found[name]
            if sum(row[0] for row in table.values()) == count:
                break
            result, has_hit = broken_and_resumed(plan, around)
            row = table[name]
            row[0], row[1], row[2] = row[0] + 1, row[1] + has_hit, row[2] + (account(result) != expected)
    return dict(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    table = campaign(given.count, given.seed)
    print("| fault at a random place of a run that resumes | injected | hit | not as without it |\n|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(map(str, row))} |")
    total = np.sum(list(table.values()), axis=0)
    print(f"| all | {' | '.join(map(str, total))} |")
    sys.exit(1 if total[2] else 0)


if __name__ == "__main__":
    main()
