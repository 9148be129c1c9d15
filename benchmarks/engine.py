"""How good and how fast is the optimiser on its own, beside random search and other libraries.

    python benchmarks/engine.py regret  --out docs/engine_regret.json     # 10 seeds, every function; about an hour
    python benchmarks/engine.py latency --out docs/engine_latency.json
    python benchmarks/engine.py regret --functions branin --seeds 2 --methods ours,random     # a small run

Peers (Optuna's samplers, BoTorch) run where they are installed and are left out where they are not: ``pip install
optuna botorch``. For timings that mean something run on an idle machine with one thread: the script sets XLA, OpenMP
and OpenBLAS to one before JAX is imported, and reports processor time.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import time

ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
for _name, _value in ONE_THREAD.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import autotunenet_jax as atn  # noqa: E402

CHECKPOINTS = (25, 50, 100)
HARTMANN_WEIGHTS = np.array([1.0, 1.2, 3.0, 3.2])
HARTMANN_3 = (
    np.array([[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]]),
    1e-4 * np.array([[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]]),
)
HARTMANN_6 = (
    np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14],
              [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]),
    1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                     [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]),
)  # fmt: skip


def branin(u, t):
    x, y = 15.0 * u[0] - 5.0, 15.0 * u[1]
    bowl = y - 5.1 / (4.0 * np.pi**2) * x**2 + 5.0 / np.pi * x - 6.0
    return bowl**2 + 10.0 * (1.0 - 1.0 / (8.0 * np.pi)) * jnp.cos(x) + 10.0 - 0.39788735772973816


def hartmann(u, t):
    a, p = HARTMANN_3 if u.size == 3 else HARTMANN_6
    top = 3.86277978 if u.size == 3 else 3.32236801
    return top - jnp.sum(
        jnp.asarray(HARTMANN_WEIGHTS) * jnp.exp(-jnp.sum(jnp.asarray(a) * (u - jnp.asarray(p)) ** 2, 1))
    )


def rosenbrock(u, t):
    x = 15.0 * u - 5.0
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def levy(u, t):
    w = 1.0 + (20.0 * u - 11.0) / 4.0
    middle = jnp.sum((w[:-1] - 1.0) ** 2 * (1.0 + 10.0 * jnp.sin(np.pi * w[:-1] + 1.0) ** 2))
    return jnp.sin(np.pi * w[0]) ** 2 + middle + (w[-1] - 1.0) ** 2 * (1.0 + jnp.sin(2.0 * np.pi * w[-1]) ** 2)


def ackley(u, t):
    x = 40.0 * u - 15.0
    return -20.0 * jnp.exp(-0.2 * jnp.sqrt(jnp.mean(x**2))) - jnp.exp(jnp.mean(jnp.cos(2.0 * np.pi * x))) + 20.0 + np.e


def camel(u, t):
    x, y = 6.0 * u[0] - 3.0, 4.0 * u[1] - 2.0
    return (4.0 - 2.1 * x**2 + x**4 / 3.0) * x**2 + x * y + (4.0 * y**2 - 4.0) * y**2 + 1.031628453


def styblinski(u, t):
    x = 10.0 * u - 5.0
    return jnp.sum(x**4 - 16.0 * x**2 + 5.0 * x) / 2.0 + 39.16616570377142 * u.size


def valley(u, t):
    """Gentle on one side, exponential on the other, as a loss over the logarithm of a learning rate is."""
    x = 8.0 * (u - 0.37)
    return jnp.sum(jnp.where(x < 0.0, 0.3 * x**2, jnp.expm1(x) - x))


def cliff(u, t):
    """A bowl beside a region where every trial fails."""
    x = u - jnp.array([0.6, 0.35])
    score = 20.0 * jnp.sum(x**2) + 0.3 * jnp.sin(12.0 * x[0]) ** 2
    return jnp.where(u[0] + 0.3 * u[1] > 0.85, jnp.nan, score)


def moving(u, t):
    """A bowl whose minimum circles once in a hundred evaluations."""
    phase = 2.0 * np.pi * t / 100.0
    return 10.0 * jnp.sum((u - 0.5 - 0.3 * jnp.stack([jnp.cos(phase), jnp.sin(phase)])) ** 2)


def mixed(u, t):
    """One log-scaled rate, one integer, one option without order; large rates fail."""
    rate, layers, kind = 4.0 * u[0] - 5.0, jnp.floor(8.0 * u[1]) + 1.0, jnp.floor(3.0 * u[2])
    score = (rate + 3.0) ** 2 + 0.2 * jnp.abs(layers - 5.0) + kind
    return jnp.where(rate > -1.5, jnp.nan, score)


# Function, dimensions, standard deviation of the noise. Regret is measured without the noise.
FUNCTIONS = {
    "branin": (branin, 2, 0.0),
    "hartmann3": (hartmann, 3, 0.0),
    "hartmann6": (hartmann, 6, 0.0),
    "rosenbrock2": (rosenbrock, 2, 0.0),
    "rosenbrock4": (rosenbrock, 4, 0.0),
    "levy4": (levy, 4, 0.0),
    "ackley4": (ackley, 4, 0.0),
    "camel": (camel, 2, 0.0),
    "styblinski3": (styblinski, 3, 0.0),
    "valley": (valley, 2, 0.0),
    "cliff": (cliff, 2, 0.0),
    "mixed": (mixed, 3, 0.0),
    "branin noisy": (branin, 2, 5.0),
    "hartmann6 noisy": (hartmann, 6, 0.1),
    "moving": (moving, 2, 0.0),
}


def space_of(name, dims):
    if name == "mixed":
        return {"x0": atn.Float(0.0, 1.0), "x1": atn.Int(0, 7), "x2": atn.Choice(["a", "b", "c"])}
    return {f"x{i}": atn.Float(0.0, 1.0) for i in range(dims)}


def unit_of(name, point, dims):
    """Unit-cube coordinates of a point of `space_of`, on which the functions are defined."""
    values = [jnp.asarray(point[f"x{i}"], jnp.float32) for i in range(dims)]
    if name == "mixed":
        values = [values[0], (values[1] + 0.5) / 8.0, (values[2] + 0.5) / 3.0]
    return jnp.stack(values)


def run_ours(name, seeds, budget):
    """All seeds in one compiled call."""
    function, dims, noise = FUNCTIONS[name]
    optimizer = atn.BayesianOptimizer(space_of(name, dims), capacity=budget, has_drift=name == "moving")

    def step(state, inputs):
        t, key = inputs
        point, state = optimizer.suggest(state)
        value = function(unit_of(name, point, dims), t)
        return optimizer.observe(state, point, value + noise * jax.random.normal(key)), value

    def one(key):
        first, second = jax.random.split(key)
        inputs = (jnp.arange(budget, dtype=jnp.float32), jax.random.split(second, budget))
        return jax.lax.scan(step, optimizer.init(first), inputs)[1]

    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def run_asked(name, seeds, budget, make):
    """A peer that is asked and told point by point: ``make(seed)`` gives ``ask() -> unit point`` and ``tell(y)``."""
    function, _, noise = FUNCTIONS[name]
    compiled = jax.jit(function)
    values = np.zeros((seeds, budget))
    for seed in range(seeds):
        ask, tell = make(seed)
        generator = np.random.default_rng(1000 + seed)
        for t in range(budget):
            values[seed, t] = compiled(jnp.asarray(ask(), jnp.float32), float(t))
            tell(values[seed, t] + noise * generator.normal())
    return values


def random_search(name, seed):
    generator = np.random.default_rng(seed)
    return (lambda: generator.uniform(size=FUNCTIONS[name][1])), lambda y: None


def optuna_search(name, seed, sampler):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=seed))
    current = []

    def ask():
        trial = study.ask()
        current[:] = [trial]
        if name == "mixed":
            return [trial.suggest_float("x0", 0.0, 1.0), (trial.suggest_int("x1", 0, 7) + 0.5) / 8.0,
                    (trial.suggest_categorical("x2", [0, 1, 2]) + 0.5) / 3.0]  # fmt: skip
        return [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(FUNCTIONS[name][1])]

    def tell(y):
        if np.isfinite(y):
            study.tell(current[0], y)
        else:
            study.tell(current[0], state=optuna.trial.TrialState.FAIL)

    return ask, tell


def botorch_search(name, seed):
    import torch
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    dims = FUNCTIONS[name][1]
    design = torch.quasirandom.SobolEngine(dims, scramble=True, seed=seed).draw(2 * (dims + 1)).double()
    xs, ys = [], []

    def ask():
        if len(xs) < len(design) or len(set(ys)) < 2:
            xs.append(design[len(xs) % len(design)])
            return xs[-1].numpy()
        worst = max(y for y in ys if np.isfinite(y))
        y = torch.tensor([y if np.isfinite(y) else worst for y in ys]).double()
        model = SingleTaskGP(torch.stack(xs), -y[:, None], outcome_transform=Standardize(1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        acquisition = LogExpectedImprovement(model, best_f=(-y).max())
        bounds = torch.tensor([[0.0] * dims, [1.0] * dims]).double()
        point, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=8, raw_samples=256)
        xs.append(point[0])
        return point[0].numpy()

    return ask, ys.append


def methods():
    """Name to runner, of those whose libraries are here."""
    found = {"ours": run_ours}

    def peer(make, **options):
        return lambda name, seeds, budget: run_asked(
            name, seeds, budget, functools.partial(make, name, **options)
        )  # fmt: skip

    found["random"] = peer(random_search)
    has = importlib.util.find_spec
    if has("optuna"):
        found["Optuna TPE"] = peer(optuna_search, sampler="TPESampler")
        if has("torch"):
            found["Optuna GP"] = peer(optuna_search, sampler="GPSampler")
    if has("botorch"):
        found["BoTorch"] = peer(botorch_search)
    return found


def regret(args):
    found, table = methods(), {}
    for name in args.functions.split(",") if args.functions else FUNCTIONS:
        for method in args.methods.split(",") if args.methods else found:
            start = time.process_time()
            values = found[method](name, args.seeds, args.budget)
            seconds = time.process_time() - start
            if name == "moving":
                row = {"cumulative": round(float(np.mean(np.sum(values, axis=1))), 3)}
            else:
                best = np.log10(np.maximum(np.fmin.accumulate(values, axis=1), 1e-7))
                at = [k for k in CHECKPOINTS if k <= args.budget]
                row = {str(k): round(float(np.nanmean(best[:, k - 1])), 3) for k in at}
                row["standard error"] = round(float(np.nanstd(best[:, -1]) / np.sqrt(args.seeds)), 3)
            table.setdefault(name, {})[method] = row
            print(f"{name:16s} {method:12s} {row}  {seconds:.0f} s", flush=True)
    return table


def timed(call, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    ordered = sorted(seconds)
    return round(1e3 * statistics.median(seconds), 2), round(1e3 * ordered[int(0.95 * (repeats - 1))], 2)


def latency(args):
    """Milliseconds of processor time per suggestion and observation: first, median, 95th percentile."""
    table = {}
    for d in (1, 2, 6, 12):
        for n in (10, 32, 64, 128, 256):
            optimizer = atn.BayesianOptimizer(space_of("", d), capacity=n)
            generator = np.random.default_rng(0)
            points = {f"x{i}": jnp.asarray(generator.uniform(size=n), jnp.float32) for i in range(d)}
            scores = jnp.asarray(sum((np.asarray(v) - 0.3) ** 2 for v in points.values()), jnp.float32)
            state = jax.block_until_ready(jax.jit(optimizer.observe)(optimizer.init(jax.random.key(0)), points, scores))

            @jax.jit
            def turn(state, optimizer=optimizer):
                point, state = optimizer.suggest(state)
                return optimizer.observe(state, point, 0.1)

            start = time.process_time()
            state = jax.block_until_ready(turn(state))
            first = round(time.process_time() - start, 2)
            median, tail = timed(lambda turn=turn, state=state: jax.block_until_ready(turn(state)), args.repeats)
            table[f"d={d} n={n}"] = {"first call, s": first, "median, ms": median, "p95, ms": tail}
            print(f"d={d} n={n}: first {first} s, median {median} ms, p95 {tail} ms", flush=True)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("regret", "latency"))
    parser.add_argument("--functions", help="comma-separated; all by default")
    parser.add_argument("--methods", help="comma-separated; all that are installed by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", help="where the table goes as JSON")
    args = parser.parse_args()
    table = {"regret": regret, "latency": latency}[args.what](args)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
