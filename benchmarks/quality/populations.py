"""Baselines that run several candidates at once or in turn: three-stream, AutoLRS, PBT, PB2, Optuna.

All of them tune the learning rate alone. The budget counts the steps of every candidate, and each look at the 512 probe
rows at its price.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from benchmarks.quality import baselines
from benchmarks.quality.searches import Found, probe, train
from benchmarks.quality.task import RunState, Workload

STREAM_STEPS = 20
AUTOLRS_CANDIDATES = 10
AUTOLRS_STAGES = 6
MEMBERS = 4
EXPLOITS = 10
TRIALS = 8

# Exploration weight of the lower confidence bound, and of PB2's upper one.
_KAPPA = 2.0


def three_stream(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """Every 20 steps, three copies go on at half, the same and twice the rate; the best by probe loss is kept."""
    state, rate = task.init(seed), hp.get("learning_rate", task.defaults["learning_rate"])
    low, high = task.space["learning_rate"]
    price = 3 * (STREAM_STEPS + task.probe_price)
    losses, at = [], 0
    while (at / STREAM_STEPS + 1) * price <= task.total_steps:
        tried = []
        for factor in (0.5, 1.0, 2.0):
            candidate = float(np.clip(rate * factor, low, high))
            new, loss, _ = train(task, state, seed, at, np.full(STREAM_STEPS, candidate), hp)
            losses.append(np.asarray(loss))
            tried.append((_finite(float(probe(task)(new))), candidate, new))
        _, rate, state = min(tried, key=lambda item: item[0])
        at += STREAM_STEPS
    return state, np.concatenate(losses), {"rate": rate, "useful": at}


def autolrs(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """AutoLRS at equal budget: half of each stage explores, half trains at the rate found.

    Per stage a fresh Gaussian process over the log rate picks ten rates in turn by its lower confidence bound. Each
    trains for a tenth of the stage from the stage's first state; the loss at the stage's end is forecast by fitting
    ``a exp(-b t) + c`` to the smoothed training loss. The rate with the lowest forecast trains the stage.

    Source: Jin et al., "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly" (2021), section
      3. Stages are scaled to the budget (there, 1,000 steps and more); smoothing is a running mean, not a spline.
    """
    low, high = (math.log10(bound) for bound in task.space["learning_rate"])
    stage = task.total_steps // (2 * AUTOLRS_STAGES)
    short = stage // AUTOLRS_CANDIDATES
    grid = np.linspace(low, high, 201)
    state, losses, rates = task.init(seed), [], []
    rng = np.random.default_rng(seed)
    for index in range(AUTOLRS_STAGES):
        at, tried, forecasts = index * stage, [], []
        for _ in range(AUTOLRS_CANDIDATES):
            x = rng.uniform(low, high) if not tried else _next_rate(grid, tried, forecasts, _KAPPA)
            _, loss, _ = train(task, state, seed, at, np.full(short, 10**x), hp)
            losses.append(np.asarray(loss))
            tried.append(x)
            forecasts.append(_forecast(np.asarray(loss), stage))
        best = tried[int(np.argmin(forecasts))]
        state, loss, _ = train(task, state, seed, at, np.full(stage, 10**best), hp)
        losses.append(np.asarray(loss))
        rates.append(10**best)
    return state, np.concatenate(losses), {"rates": rates, "useful": stage * AUTOLRS_STAGES}


def population(task: Workload, seed: int, hp: dict[str, float], *, budget: int, is_bandit: bool) -> Found:
    """Population-based training of four members, or PB2 when new rates come from a bandit.

    Members start at rates drawn over the whole range and follow linear decay, which makes them stronger than at
    constant rates. Ten times in a run the worst member takes over the state of the best; PBT then multiplies the best
    rate by 0.8 or 1.2, PB2 maximises an upper confidence bound of a Gaussian process over (time, rate) fitted to the
    improvements seen so far.

    Args:
      task: The workload.
      seed: Seeds parameters, data and the choices.
      hp: Other hyperparameters.
      budget: Budget in multiples of T.
      is_bandit: PB2 rather than PBT.

    Source: Jaderberg et al. (2017); Parker-Holder et al. (2020).
    """
    low, high = task.space["learning_rate"]
    rng = np.random.default_rng((seed, 11))
    length = budget * task.total_steps // MEMBERS - round(EXPLOITS * task.probe_price)
    length = min(length, task.total_steps)
    shape = np.asarray(baselines.linear(jnp.arange(1, length + 1) / (length + 1.0)))
    rates = np.exp(rng.uniform(math.log(low), math.log(high), MEMBERS))
    states: list[RunState] = [task.init(seed * 100 + member) for member in range(MEMBERS)]
    score = np.array([_finite(float(probe(task)(state))) for state in states])
    losses, seen_x, seen_y = [], [], []
    for index, part in enumerate(np.array_split(np.arange(length), EXPLOITS)):
        before = score.copy()
        for member in range(MEMBERS):
            states[member], loss, _ = train(task, states[member], seed, part[0], rates[member] * shape[part], hp)
            losses.append(np.asarray(loss))
            score[member] = _finite(float(probe(task)(states[member])))
            seen_x.append((index / EXPLOITS, math.log10(rates[member])))
            seen_y.append(math.log(before[member]) - math.log(score[member]))
        if index == EXPLOITS - 1:
            break
        worst, best = int(np.argmax(score)), int(np.argmin(score))
        states[worst], score[worst] = states[best], score[best]
        if is_bandit:
            rates[worst] = _bandit(seen_x, seen_y, (index + 1) / EXPLOITS, low, high)
        else:
            rates[worst] = np.clip(rates[best] * rng.choice([0.8, 1.2]), low, high)
    best = int(np.argmin(score))
    extra = {
        "rate": float(rates[best]),
        "useful": length,
        "spent": budget * task.total_steps,
    }
    return states[best], np.concatenate(losses), extra


def optuna_trials(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """Optuna's default sampler with eight trials of an eighth of the budget under linear decay; the best is kept."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    length = task.total_steps // TRIALS - round(task.probe_price)
    shape = np.asarray(baselines.linear(jnp.arange(1, length + 1) / (length + 1.0)))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    losses, best = [], None
    for _ in range(TRIALS):
        trial = study.ask()
        rate = trial.suggest_float("learning_rate", *task.space["learning_rate"], log=True)
        state, loss, _ = train(task, task.init(seed), seed, 0, rate * shape, hp)
        score = _finite(float(probe(task)(state)))
        study.tell(trial, score)
        losses.append(np.asarray(loss))
        if best is None or score < best[0]:
            best = (score, rate, state)
    _, rate, state = best
    return state, np.concatenate(losses), {"rate": rate, "useful": length}


POPULATIONS: dict[str, tuple[Callable[..., Found], dict[str, Any]]] = {
    "three_stream": (three_stream, {}),
    "autolrs": (autolrs, {}),
    "pbt4": (population, {"budget": 1, "is_bandit": False}),
    "pbt4_4x": (population, {"budget": 4, "is_bandit": False}),
    "pb2_4": (population, {"budget": 1, "is_bandit": True}),
    "pb2_4_4x": (population, {"budget": 4, "is_bandit": True}),
    "optuna8": (optuna_trials, {}),
}


def _finite(score: float) -> float:
    return score if math.isfinite(score) else 1e6


def _process(x: np.ndarray, y: np.ndarray) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0) * Matern([1.0] * x.shape[1], nu=2.5) + WhiteKernel(1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(x, y)


def _next_rate(grid: np.ndarray, tried: list[float], values: list[float], kappa: float) -> float:
    # Diverged candidates count as the worst finite one and a little more, so that they do not flatten the rest.
    y = np.array(values)
    finite = y[np.isfinite(y)]
    worst = finite.max() + finite.std() if len(finite) else 1.0
    model = _process(np.array(tried)[:, None], np.where(np.isfinite(y), y, worst))
    mean, deviation = model.predict(grid[:, None], return_std=True)
    return float(grid[np.argmin(mean - kappa * deviation)])


def _bandit(x: list[tuple[float, float]], y: list[float], now: float, low: float, high: float) -> float:
    grid = np.linspace(math.log10(low), math.log10(high), 201)
    model = _process(np.array(x), np.clip(y, -3.0, 3.0))
    mean, deviation = model.predict(np.column_stack([np.full(len(grid), now), grid]), return_std=True)
    return float(10 ** grid[np.argmax(mean + _KAPPA * deviation)])


def _forecast(losses: np.ndarray, horizon: int) -> float:
    """Loss after ``horizon`` steps; infinite when the candidate diverged."""
    if not np.isfinite(losses).all() or losses[-1] > 10 * losses[0]:
        return math.inf
    window = max(len(losses) // 5, 1)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    t = np.arange(len(smooth), dtype=float)

    def curve(t, a, b, c):
        return a * np.exp(-b * t) + c

    try:
        guess = (max(smooth[0] - smooth[-1], 1e-3), 1.0 / len(t), smooth[-1])
        fitted, _ = scipy.optimize.curve_fit(curve, t, smooth, guess, bounds=([-10, 1e-6, 0], [100, 1, 100]))
        return float(curve(horizon, *fitted))
    except (RuntimeError, ValueError):
        return float(smooth[-1])
