"""The optimisers that `benchmarks.engine` measures, as ``make(problem, seed) -> (ask, tell)``.

``ask()`` gives a point of the unit cube, ``tell(y)`` its score, NaN where the trial failed. Libraries are imported when
first used, and each runs on one thread. Google Vizier needs an interpreter of its own, which the environment variable
``VIZIER_PYTHON`` names; how to make one is in `benchmarks/_engine_vizier.py`.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import weakref

import jax
import numpy as np

import autotunenet_jax as atn


def ours(problem, seed, *, capacity=100):
    optimizer = atn.BayesianOptimizer(problem.space, capacity=capacity, has_drift=problem.is_drifting)
    suggest, observe = jax.jit(optimizer.suggest), jax.jit(optimizer.observe)
    state, current = optimizer.init(jax.random.key(seed)), []

    def ask():
        nonlocal state
        point, state = suggest(state)
        current[:] = [point]
        return np.asarray(problem.unit(point))

    def tell(y):
        nonlocal state
        state = jax.block_until_ready(observe(state, current[0], y))

    return ask, tell


def random_search(problem, seed):
    generator = np.random.default_rng(seed)
    return (lambda: generator.uniform(size=problem.dims)), lambda y: None


def optuna_search(problem, seed, *, sampler):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=seed))
    current = []

    def ask():
        trial = study.ask()
        current[:] = [trial]
        if problem.is_mixed:
            return [trial.suggest_float("x0", 0.0, 1.0), (trial.suggest_int("x1", 0, 7) + 0.5) / 8.0,
                    (trial.suggest_categorical("x2", [0, 1, 2]) + 0.5) / 3.0]  # fmt: skip
        return [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(problem.dims)]

    def tell(y):
        if np.isfinite(y):
            study.tell(current[0], float(y))
        else:
            study.tell(current[0], state=optuna.trial.TrialState.FAIL)

    ask.study = study
    return ask, tell


def botorch_search(problem, seed, *, initial=None):
    """The library's defaults; a failure counts as the worst score, a discrete coordinate is relaxed."""
    import torch
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    dims = problem.dims
    initial = 2 * (dims + 1) if initial is None else initial
    design = torch.quasirandom.SobolEngine(dims, scramble=True, seed=seed).draw(128).double()
    xs, ys = [], []

    def ask():
        # Scores without any difference cannot be standardised.
        if len(xs) < initial or len({y for y in ys if np.isfinite(y)}) < 2:
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

    ask.points, ask.scores = xs, ys
    return ask, ys.append


def vizier_search(problem, seed):
    """A process of another interpreter, asked and told in lines of JSON; it ends with the run."""
    script = pathlib.Path(__file__).with_name("_engine_vizier.py")
    process = subprocess.Popen(
        [os.environ["VIZIER_PYTHON"], str(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip

    def say(what):
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()

    def ask():
        say("ask")
        return json.loads(process.stdout.readline())

    def tell(y):
        say(float(y) if np.isfinite(y) else None)

    say({"dims": problem.dims, "is_mixed": problem.is_mixed, "seed": seed})
    weakref.finalize(ask, process.kill)
    return ask, tell


def methods():
    """Name to ``make``, of those whose libraries are here."""
    has = importlib.util.find_spec
    found = {"ours": ours, "random": random_search}
    if has("optuna"):
        found["Optuna TPE"] = functools.partial(optuna_search, sampler="TPESampler")
    if has("optuna") and has("torch"):
        found["Optuna GP"] = functools.partial(optuna_search, sampler="GPSampler")
    if has("botorch"):
        found["BoTorch"] = botorch_search
    if "VIZIER_PYTHON" in os.environ:
        found["Vizier"] = vizier_search
    return found
