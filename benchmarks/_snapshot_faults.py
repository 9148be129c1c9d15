"""Snapshots under kills and damage, and what they cost: the measurements behind ``faults.py snapshots``."""

import collections
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import statistics
import tempfile
import time
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn
from autotunenet_jax import faults

_KILL_WITHIN_S = 0.6
_BYTES_PER_FLOAT = 4


def state_at(step, *, floats=250_000):
    """A state that is a function of its step, so that a restored one can be told right from wrong."""
    values = np.random.default_rng(step).normal(size=floats).astype(np.float32)
    return {"w": values, "b": np.full(7, step, np.int64), "step": step}


def is_right(step, state):
    expected = state_at(step, floats=state["w"].size)
    return all(np.asarray(state[k]).tobytes() == np.asarray(expected[k]).tobytes() for k in expected)


# Kills.


@dataclasses.dataclass
class KillCounts:
    trials: int = 0
    saves_killed: int = 0
    committed_lost: int = 0
    wrong: int = 0
    warned: int = 0


def kill_trials(trials, *, seed=0):
    """Kills a process that saves without pause, at random moments; looks at what the next one finds.

    Every trial continues in the folder that the one before left. Processes are forked from this one, which must not
    have used JAX yet.
    """
    counts = KillCounts()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        acknowledged = pathlib.Path(folder, "acknowledged")
        acknowledged.write_text("0")
        store = pathlib.Path(folder, "snapshots")
        for _ in range(trials):
            delay_s = rng.uniform(0.0, _KILL_WITHIN_S)
            status = _in_fork(lambda delay_s=delay_s: _save_until_killed(store, acknowledged, delay_s))
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"saver ended with {status}"
            counts.trials += 1
            counts.saves_killed += any(store.glob(".tmp-*"))
            result = pathlib.Path(folder, "result")
            status = _in_fork(lambda result=result: result.write_text(_look(store, int(acknowledged.read_text()))))
            assert status == 0, f"reader ended with {status}"
            lost, wrong, warned = map(int, result.read_text().split())
            counts.committed_lost += lost
            counts.wrong += wrong
            counts.warned += warned
    return counts


def _in_fork(work):
    with warnings.catch_warnings():
        # JAX warns of forks because its threads do not survive them; it has not started any yet.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def _save_until_killed(folder, acknowledged, delay_s):
    import orbax.checkpoint  # noqa: F401  # not to be killed while importing

    with atn.Snapshots(folder) as store:
        step = store.latest() or 0
        faults.kill_after(delay_s)
        while True:
            step += 1
            store.save(step, state_at(step))
            if step % 3 == 0:
                store.wait()
                assert not store.is_degraded, store.failure
                partial = acknowledged.with_suffix(".new")
                partial.write_text(str(step))
                os.replace(partial, acknowledged)


def _look(folder, acknowledged):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with atn.Snapshots(folder) as store:
            step = store.latest() or 0
            wrong = bool(step) and not is_right(*store.restore(state_at(0)))
            # Opening deletes nothing; the next save does.
            store.save(step, state_at(step), wait=True)
            litter = any(folder.glob(".tmp-*")) or any(folder.glob(".old-*"))
    return f"{int(step < acknowledged)} {int(wrong)} {len(caught) + litter}"


# Damage.


def corruption_matrix(*, seeds=3):
    """Every file of the newest of three snapshots, damaged in every way.

    Returns:
      For each way, a Counter of ``files``, ``previous`` (the one before restored, with a warning naming the bad one)
      and ``wrong`` (everything else).
    """
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        sound = pathlib.Path(folder, "sound")
        with atn.Snapshots(sound) as store:
            for step in (1, 2, 3):
                store.save(step, state_at(step, floats=1000))
        names = [p.relative_to(sound) for p in faults.snapshot_files(sound / "00000003")]
        for how in faults.CORRUPTIONS:
            counts = table[how] = collections.Counter()
            for name in names:
                for seed in range(seeds if how == "flip" else 1):
                    damaged = pathlib.Path(folder, "damaged")
                    shutil.copytree(sound, damaged)
                    faults.corrupt(damaged / name, how, seed=seed)
                    is_previous = _restores_previous(damaged)
                    counts["files"] += 1
                    counts["previous" if is_previous else "wrong"] += 1
                    shutil.rmtree(damaged)
    return table


def _restores_previous(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with atn.Snapshots(folder) as store:
            step, state = store.restore(state_at(0, floats=1000))
    is_named = any("Snapshot 3 " in str(w.message) for w in caught)
    return step == 2 and is_right(step, state) and is_named


# Cost.


@dataclasses.dataclass
class Cost:
    run_s: float
    steps: int
    step_ms: float
    step_while_writing_ms: float
    saves: int
    blocked_first_ms: float
    blocked_ms: float
    blocked_share: float
    write_s: float
    restore_s: float


def cost(*, run_s, size_mb):
    """Blocking of the loop by saves at the default cadence, in one run of steps of about 10 ms, and a restore."""
    size = int(size_mb * 1e6 / _BYTES_PER_FLOAT)
    step = jax.jit(_step_of_ten_ms(size), donate_argnums=0)
    state = jax.block_until_ready(step({"w": jax.random.normal(jax.random.key(0), (size,)), "h": jnp.eye(256)}))
    times, blocked, writing, write_s = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, atn.Snapshots(folder) as store:
        store.prepare(state)
        start = time.monotonic()
        saved_at = None
        while time.monotonic() - start < run_s:
            before = time.monotonic()
            state = jax.block_until_ready(step(state))
            times.append(time.monotonic() - before)
            is_writing = store.is_saving
            writing.append(is_writing)
            if saved_at is not None and not is_writing:
                write_s.append(time.monotonic() - saved_at)
                saved_at = None
            if store.is_due():
                before = time.monotonic()
                store.save(len(times), state)
                saved_at = time.monotonic()
                blocked.append(saved_at - before)
        run = time.monotonic() - start
        store.wait()
        before = time.monotonic()
        _, restored = store.restore(state)
        jax.block_until_ready(restored)
        restore_s = time.monotonic() - before
    quiet = [t for t, w in zip(times, writing, strict=True) if not w]
    busy = [t for t, w in zip(times, writing, strict=True) if w]
    return Cost(
        run_s=run,
        steps=len(times),
        step_ms=1e3 * statistics.median(quiet),
        step_while_writing_ms=1e3 * statistics.median(busy),
        saves=len(blocked),
        blocked_first_ms=1e3 * blocked[0],
        blocked_ms=1e3 * statistics.median(blocked),
        blocked_share=sum(blocked) / run,
        write_s=statistics.median(write_s),
        restore_s=restore_s,
    )


def _step_of_ten_ms(size):
    # The state is read and written once, as an optimizer does, and small products bring the step to its length.
    pause_ms = 10.0

    @jax.jit
    def product(h):
        return jnp.tanh(h @ h)

    touched = jax.jit(lambda w: w * 0.999, donate_argnums=0)
    w, h = jax.block_until_ready((jnp.ones(size), product(jnp.eye(256))))
    w = jax.block_until_ready(touched(w))
    touch_ms = 1e3 * min(_time(lambda: touched(w + 0)) for _ in range(5))
    product_ms = 1e3 * min(_time(lambda: product(h)) for _ in range(20))
    products = max(0, round((pause_ms - touch_ms) / product_ms))

    def step(state):
        h = jax.lax.fori_loop(0, products, lambda _, h: product(h), state["h"])
        return {"w": state["w"] * 0.999, "h": h}

    return step


def _time(work):
    before = time.monotonic()
    jax.block_until_ready(work())
    return time.monotonic() - before
