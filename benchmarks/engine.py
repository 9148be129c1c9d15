"""How good and how fast is the optimiser on its own, beside random search and other libraries.

    python -m benchmarks.engine regret     # every problem and method, `--seeds` each
    python -m benchmarks.engine latency    # processor time of a suggestion; first suggestions; many problems at once
    python -m benchmarks.engine sweep      # ten thousand random histories in float32
    python -m benchmarks.engine report     # docs/engine.png and the tables, from the figures stored so far

Figures are stored cell by cell in ``--store`` (docs/engine.json); what is stored already is not run again, so that a
long run may be cut anywhere. ``--problems``, ``--methods`` and ``--seeds`` make a small one. Peers run where they are
installed: ``pip install autotunenet-jax[peers]``. Everything runs on one thread in one process; times are processor
time, which another program on the machine still lengthens through shared caches and memory.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ONE_THREAD = {
    "XLA_FLAGS": (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 "
        # Large batches of problems would hang now and then (jaxlib 0.10.2).
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    ),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
for _name, _value in ONE_THREAD.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import autotunenet_jax as atn  # noqa: E402
from benchmarks import _engine_peers, _engine_report, _engine_sweep  # noqa: E402
from benchmarks._engine_problems import PROBLEMS, Problem  # noqa: E402

CHECKPOINTS = (25, 50, 100)
# Smaller regrets are rounding errors of the problems in float32.
REGRET_FLOOR = 1e-6
DIMS, SIZES = (1, 2, 6, 12), (10, 32, 64, 100, 128, 256)
TIMED_METHODS = ("ours", "BoTorch", "Optuna GP", "Optuna TPE")


class Store:
    """Figures by section and cell, on disk after every one."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.data = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, section, *cell):
        return self.data.get(section, {}).get("|".join(map(str, cell)))

    def put(self, value, section, *cell):
        self.data.setdefault(section, {})["|".join(map(str, cell))] = value
        partial = self.path.with_suffix(".partial")
        sections = [
            f" {json.dumps(name)}: {{\n"
            + ",\n".join(f"  {json.dumps(key)}: {json.dumps(cells[key])}" for key in sorted(cells))
            + "\n }"
            for name, cells in sorted(self.data.items())
        ]
        partial.write_text("{\n" + ",\n".join(sections) + "\n}\n")
        partial.replace(self.path)


@functools.cache
def simulation(name, budget):
    """A whole optimisation of a problem by our engine: from a key to the values it met."""
    problem = PROBLEMS[name]
    optimizer = atn.BayesianOptimizer(problem.space, capacity=budget, has_drift=problem.is_drifting)

    def step(state, inputs):
        t, key = inputs
        point, state = optimizer.suggest(state)
        value = problem.function(problem.unit(point), t)
        return optimizer.observe(state, point, value + problem.noise * jax.random.normal(key)), value

    def one(key):
        first, second = jax.random.split(key)
        inputs = (jnp.arange(budget, dtype=jnp.float32), jax.random.split(second, budget))
        return jax.lax.scan(step, optimizer.init(first), inputs)[1]

    return jax.jit(jax.vmap(one))


def run_ours(name, seeds, budget):
    """All seeds in one compiled call."""
    return np.asarray(simulation(name, budget)(jnp.stack([jax.random.key(seed) for seed in seeds])))


def run_asked(name, seeds, budget, make):
    """A peer that is asked and told point by point."""
    problem, values = PROBLEMS[name], np.zeros((len(seeds), budget))
    function = problem.compiled()
    for row, seed in enumerate(seeds):
        ask, tell = make(problem, seed)
        generator = np.random.default_rng(1000 + seed)
        for t in range(budget):
            values[row, t] = function(jnp.asarray(ask(), jnp.float32), float(t))
            tell(values[row, t] + problem.noise * generator.normal())
    return values


def summary(name, values):
    """Per run: log10 regret, or the sum of all scores where the optimum moves, at the checkpoints."""
    if PROBLEMS[name].is_drifting:
        at = np.cumsum(values, axis=1)
    else:
        at = np.log10(np.maximum(np.fmin.accumulate(values, axis=1), REGRET_FLOOR))
    steps = [k for k in CHECKPOINTS if k <= values.shape[1]]
    return [[round(float(run[k - 1]), 4) for k in steps] for run in at]


def regret(args, store):
    makes = _engine_peers.methods()
    names = args.problems.split(",") if args.problems else list(PROBLEMS)
    chosen = args.methods.split(",") if args.methods else list(makes)
    for method in chosen:
        # Seeds outermost: a run that is cut has seen every problem as often.
        blocks = [range(args.seeds)] if method == "ours" else [[seed] for seed in range(args.seeds)]
        for block in blocks:
            for name in names:
                if all(store.get("regret", name, method, seed) for seed in block):
                    continue
                start = time.process_time()
                if method == "ours":
                    values = run_ours(name, block, args.budget)
                else:
                    values = run_asked(name, block, args.budget, makes[method])
                for seed, row in zip(block, summary(name, values), strict=True):
                    store.put(row, "regret", name, method, seed)
                print(
                    f"{name:16s} {method:12s} {summary(name, values)[0]} {time.process_time() - start:.0f} s",
                    flush=True,
                )


def processor_seconds(call, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return seconds


def milliseconds(seconds):
    """Of the first call, the median and the 95th percentile of the others."""
    first, *rest = seconds
    ordered = sorted(rest)
    tail = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [round(1e3 * part, 2) for part in (first, statistics.median(ordered), tail)]


def history(n, d):
    points = np.random.default_rng(0).uniform(size=(n, d)).astype(np.float32)
    return points, np.sum((points - 0.3) ** 2, axis=1)


def turn_of(method, n, d):
    """One suggestion and one observation after ``n`` others; told again and again at the same ``n``."""
    problem, (points, scores) = Problem(None, d), history(n, d)
    if method == "ours":
        optimizer = atn.BayesianOptimizer(problem.space, capacity=n)
        state = optimizer.init(jax.random.key(0))
        state = jax.jit(optimizer.observe)(state, {f"x{i}": points[:, i] for i in range(d)}, scores)

        @jax.jit
        def turn(state):
            point, state = optimizer.suggest(state)
            return optimizer.observe(state, point, 0.1)

        def call():
            nonlocal state
            state = jax.block_until_ready(turn(state))

        return call
    # The design that comes before the surrogate is not what is timed.
    options = {"initial": 2} if method == "BoTorch" else {}
    ask, tell = _engine_peers.methods()[method](problem, 0, **options)
    if method == "BoTorch":
        import torch

        ask.points.extend(torch.tensor(points).double())
        ask.scores.extend(map(float, scores))
    else:
        import optuna

        unit = optuna.distributions.FloatDistribution(0.0, 1.0)
        for point, score in zip(points, scores, strict=True):
            values = {f"x{i}": float(point[i]) for i in range(d)}
            ask.study.add_trial(
                optuna.create_trial(params=values, distributions=dict.fromkeys(values, unit), value=float(score))
            )

    def call():
        ask()
        tell(0.1)
        if method == "BoTorch":
            ask.points.pop()
            ask.scores.pop()

    return call


def many(args, store):
    """Milliseconds per suggestion, one problem alone and 256 in one call."""
    if store.get("vmap", "256 problems, n=64, d=4"):
        return
    points, scores = history(64, 4)
    optimizer = atn.BayesianOptimizer(Problem(None, 4).space, capacity=64)

    def start(key):
        state = optimizer.init(key)
        return optimizer.observe(state, {f"x{i}": points[:, i] for i in range(4)}, scores)

    found = {}
    for count in (1, 256):
        states = jax.jit(jax.vmap(start))(jax.random.split(jax.random.key(0), count))
        states = states if count > 1 else jax.tree.map(lambda leaf: leaf[0], states)
        suggest = jax.jit(jax.vmap(optimizer.suggest) if count > 1 else optimizer.suggest)
        seconds = processor_seconds(
            lambda suggest=suggest, states=states: jax.block_until_ready(suggest(states)), 4 if count > 1 else 30
        )
        found[str(count)] = round(milliseconds(seconds)[1] / count, 3)
    print(found, flush=True)
    store.put(found, "vmap", "256 problems, n=64, d=4")


FIRST = """
import time, jax
start = time.process_time()
import autotunenet_jax as atn
space = {f"x{i}": atn.Float(0.0, 1.0) for i in range(6)}
optimizer = atn.BayesianOptimizer(space, capacity=64)
state = optimizer.init(jax.random.key(0))
imported = time.process_time()
jax.block_until_ready(jax.jit(optimizer.suggest)(state))
print(imported - start, time.process_time() - imported)
"""


def first(args, store):
    """Seconds until the first suggestion of a new process, d = 6: imports, then compilation and the call."""
    if store.get("first", "cold"):
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for name in ("cold", "with the persistent cache"):
            environment = {**os.environ, **cache}
            done = subprocess.run(
                [sys.executable, "-c", FIRST], env=environment, check=True, capture_output=True, text=True
            )
            imports, call = (round(float(part), 2) for part in done.stdout.split())
            print(f"first suggestion, {name}: {imports} s of imports, then {call} s", flush=True)
            store.put([imports, call], "first", name)


def latency(args, store):
    makes = _engine_peers.methods()
    chosen = args.methods.split(",") if args.methods else [name for name in TIMED_METHODS if name in makes]
    first(args, store)
    many(args, store)
    for d in DIMS:
        for n in SIZES:
            # Side by side, so that a busy moment of the machine meets every method.
            for method in chosen:
                if store.get("latency", method, d, n):
                    continue
                repeats = args.repeats if method == "ours" else args.peer_repeats
                row = milliseconds(processor_seconds(turn_of(method, n, d), 1 + repeats))
                store.put(row, "latency", method, d, n)
                print(f"d={d} n={n} {method}: first {row[0]}, median {row[1]}, p95 {row[2]} ms", flush=True)


def sweep(args, store):
    store.put(_engine_sweep.run(args.histories), "sweep", "all")
    print(store.get("sweep", "all"))


def report(args, store):
    print(_engine_report.tables(store.data))
    _engine_report.plot(store.data, store.path.with_suffix(".png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("regret", "latency", "sweep", "report"))
    parser.add_argument("--problems", help="comma-separated; all by default")
    parser.add_argument("--methods", help="comma-separated; all that are installed by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=100, help="evaluations of a run")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peer-repeats", type=int, default=5)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--store", default="docs/engine.json", help="where the figures are kept")
    args = parser.parse_args()
    {"regret": regret, "latency": latency, "sweep": sweep, "report": report}[args.what](args, Store(args.store))


if __name__ == "__main__":
    main()
