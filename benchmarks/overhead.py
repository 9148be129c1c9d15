"""What the tuner inside an optimizer costs: time of a step and of a decision, compilation, memory.

Plain and wrapped AdamW train the same networks in one process, step by step in turn, donated. Ratios are taken within
the run, so a slow machine slows both.

    python benchmarks/overhead.py [--sizes 1 20 3] [--steps 40] [--json out.json]
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from autotunenet_jax.controller import decide_jit

BATCH = 256
# Millions of parameters: few large arrays, and a hundred smaller ones.
WIDTHS = {1: (256, 800, 800, 200), 20: (1024, 3200, 4096, 1024), 3: (256,) * 51}
SPACE_4D = {
    "learning_rate": (1e-5, 1e-1),
    "weight_decay": (1e-6, 1e-1),
    "b1": (0.8, 0.99),
    "b2": (0.9, 0.999),
}
# Rounds are over after this many steps of so short a run; the program is the same for any length.
SHORT_RUN, ROUND_OVER = 100, 60
DECISION_CAPACITY = 64
KINDS = ("plain", "wrapped", "decision")
"""What is compiled."""


def make_params(widths, key):
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def loss_fn(params, batch):
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2)


def make_step(optimizer, *, passes_loss):
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        told = {"value": loss} if passes_loss else {}
        updates, opt_state = optimizer.update(grads, opt_state, params, **told)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def optimizers(memory):
    inner = functools.partial(optax.inject_hyperparams(optax.adamw), learning_rate=1e-3, weight_decay=1e-4)
    tuned = atn.autotune(inner(), {"learning_rate": (1e-5, 1e-1)}, SHORT_RUN, memory=memory)
    return (inner(), False), (tuned, True)


def time_steps(size, steps, memory="keep-winner"):
    """Median seconds of a plain and of a wrapped step outside rounds, taken in turn; and what each compiles to."""
    widths = WIDTHS[size]
    runs = []
    batch = (jnp.ones((BATCH, widths[0])), jnp.zeros((BATCH, widths[-1])))
    for optimizer, passes_loss in optimizers(memory):
        params = make_params(widths, jax.random.key(0))
        carry = (params, optimizer.init(params))
        jitted = make_step(optimizer, passes_loss=passes_loss)
        temp = temp_bytes(jitted.lower(*carry, batch).compile())
        runs.append({"step": jitted, "carry": carry, "times": [], "processor": [], "temp": temp})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    plain, wrapped = runs
    for _ in range(ROUND_OVER):
        advance(wrapped, batch)
    advance(plain, batch)
    assert int(wrapped["carry"][1].tuner.phase) == 0, "a round is still being held"
    before = int(wrapped["carry"][1].tuner.round.index)
    for _ in range(steps):
        for run in runs:
            start, processor = time.perf_counter(), time.process_time()
            advance(run, batch)
            run["times"].append(time.perf_counter() - start)
            run["processor"].append(time.process_time() - processor)
    assert int(wrapped["carry"][1].tuner.round.index) == before
    return {
        "parameters": parameters,
        "arrays": len(jax.tree.leaves(plain["carry"][0])),
        "memory": memory,
        "plain_ms": 1e3 * float(np.median(plain["times"])),
        "wrapped_ms": 1e3 * float(np.median(wrapped["times"])),
        # Neighbouring steps share the machine's mood; the median of their ratios is steadier than that of the medians.
        "ratio": float(np.median(np.array(wrapped["times"]) / np.array(plain["times"]))),
        # On a machine with other work on it, processor time is the steadier measure.
        "processor_ratio": float(np.median(np.array(wrapped["processor"]) / np.array(plain["processor"]))),
        "plain_temp_mb": plain["temp"] / 1e6,
        "wrapped_temp_mb": wrapped["temp"] / 1e6,
        "parameter_mb": 4 * parameters / 1e6,
        "state_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(wrapped["carry"][1])) / 1e6,
    }


def advance(run, batch):
    params, opt_state, loss = run["step"](*run["carry"], batch)
    loss.block_until_ready()
    jax.block_until_ready(params)
    run["carry"] = (params, opt_state)


def temp_bytes(compiled):
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis is not None else 0


def time_decision(repeats=30):
    """Seconds of a decision with the observations full, in 4 dimensions, on one core, and how many a run takes."""
    tuner = atn.AutoTuneNet(SPACE_4D, 10_000, capacity=DECISION_CAPACITY)
    ts = tuner.init(jax.random.key(0))
    u = tuner.space.sample(jax.random.key(1), (DECISION_CAPACITY,))
    filled = {
        "x": u,
        "y": jnp.sum((u - 0.4) ** 2, -1) - 0.3,
        "time": jnp.linspace(0.0, 4.0, DECISION_CAPACITY),
        "group": jnp.arange(DECISION_CAPACITY) // 4,
    }
    obs = ts.knowledge.observations
    filled = {name: value.astype(getattr(obs, name).dtype) for name, value in filled.items() if hasattr(obs, name)}
    obs = obs._replace(**filled, count=jnp.full_like(obs.count, DECISION_CAPACITY))
    held = ts.round._replace(
        index=jnp.int32(DECISION_CAPACITY // 4),
        fork=jnp.int32(1),
        kept=jnp.int32(0),
        steps=ts.round.steps.at[0].set(10),
    )
    knowledge = ts.knowledge._replace(observations=obs)
    ts = ts._replace(knowledge=knowledge, round=held, phase=jnp.int32(2), segment_left=jnp.int32(1))
    # One training step that ends a fork, with and without the decision due.
    update = jax.jit(tuner.update)
    quiet = ts._replace(segment_left=jnp.int32(5), segment_length=jnp.int32(10))
    loss = jnp.float32(0.5)
    times = {"due": [], "quiet": []}
    for _ in range(repeats + 2):
        for name, state in (("due", ts), ("quiet", quiet)):
            start = time.perf_counter()
            jax.block_until_ready(update(state, loss))
            times[name].append(time.perf_counter() - start)
    seconds = float(np.median(times["due"][2:]) - np.median(times["quiet"][2:]))
    plan = tuner.plan
    # One for each fork and range test that ends, and for each round that begins, but for the one the run begins with.
    is_round = plan.start < 2**30
    decisions = int(np.sum(is_round * ((plan.start > 0) + plan.forks + (plan.range_test > 0))))
    return {
        "decision_ms": 1e3 * seconds,
        "decisions_per_run": decisions,
        "share_of_10ms_steps": decisions * seconds / (10_000 * 0.010),
    }


def time_compile(which):
    """Seconds to compile a small step of one kind, or the decision of a loop on the host, in this process."""
    importlib.import_module("gpjax.kernels")  # the decision needs it; loading it is no compilation
    if which == "decision":
        return _timed(_first_decision())
    plain, wrapped = optimizers("keep-winner")
    optimizer, passes_loss = wrapped if which == "wrapped" else plain
    params = make_params((64, 64, 10), jax.random.key(0))
    step = make_step(optimizer, passes_loss=passes_loss)
    args = (params, optimizer.init(params), (jnp.ones((BATCH, 64)), jnp.zeros((BATCH, 10))))
    return _timed(lambda: step.lower(*args).compile())


def _first_decision():
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, 1000)
    ts = tuner.init(jax.random.key(0))
    return lambda: jax.block_until_ready(decide_jit(tuner.core, ts))


def _timed(work):
    start, processor = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}


def compile_times():
    """Cold and cached compilation of both steps and of a decision, each in a process of its own."""
    out = {}
    with tempfile.TemporaryDirectory() as cache:
        for which in KINDS:
            for visit in ("cold", "cached"):
                env = {
                    **os.environ,
                    "JAX_COMPILATION_CACHE_DIR": cache,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                }
                done = subprocess.run(
                    [sys.executable, __file__, "--compile", which], env=env, check=True, capture_output=True, text=True
                )
                out[f"{which}_{visit}"] = json.loads(done.stdout.splitlines()[-1])
    return out


def on_one_core():
    """Runs the decision in a process that has one core."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, __file__, "--decision"]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 20, 3], choices=sorted(WIDTHS), help="millions")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json")
    parser.add_argument("--compile", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--decision", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        print(json.dumps(time_compile(arguments.compile)))
        return
    if arguments.decision:
        print(json.dumps(time_decision()))
        return

    report = {"steps": [], "decision": on_one_core(), "compile": compile_times()}
    decision = report["decision"]
    print(
        f"decision {decision['decision_ms']:.1f} ms on one core, at most {decision['decisions_per_run']} in a run: "
        f"{100 * decision['share_of_10ms_steps']:.2f} % of 10,000 steps of 10 ms"
    )
    for visit in ("cold", "cached"):
        plain, wrapped = (report["compile"][f"{which}_{visit}"]["seconds"] for which in ("plain", "wrapped"))
        busy = [report["compile"][f"{which}_{visit}"]["processor_seconds"] for which in ("plain", "wrapped")]
        print(
            f"compilation, {visit}: plain {plain:.1f} s, wrapped {wrapped:.1f} s, + {wrapped - plain:.1f} s "
            f"(+ {busy[1] - busy[0]:.1f} s of processor time)"
        )
        apart = report["compile"][f"decision_{visit}"]
        seconds, busy = apart["seconds"], apart["processor_seconds"]
        print(f"the decision of fit, {visit}: {seconds:.1f} s ({busy:.1f} s of processor time)")
    for size in arguments.sizes:
        row = time_steps(size, arguments.steps)
        report["steps"].append(row)
        print(
            f"{row['parameters'] / 1e6:.1f}M parameters in {row['arrays']} arrays: plain {row['plain_ms']:.2f} ms, "
            f"wrapped {row['wrapped_ms']:.2f} ms, median ratio {row['ratio']:.3f} "
            f"({row['processor_ratio']:.3f} of processor time); "
            f"temporary memory {row['plain_temp_mb']:.0f} and {row['wrapped_temp_mb']:.0f} MB, "
            f"optimizer state {row['state_mb']:.0f} MB"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
