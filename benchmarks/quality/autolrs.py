"""AutoLRS: stages of constant rates, each found by Bayesian optimisation of a forecast of the loss."""

import math
import warnings
from typing import Any

import numpy as np
import scipy.interpolate
import scipy.optimize

from benchmarks.quality.searches import Found, clock, train
from benchmarks.quality.task import Workload

CANDIDATES = 10
STAGES = 3

# Of the lower confidence bound; the public implementation's, with which a round of candidates spreads over the range.
_KAPPA = 1e6

# Of the iterated spline: passes, the share of points that one takes away, and the part of the series it may take from.
_PASSES = 10
_OUTLIERS = 0.03
_EARLY = 0.5

# Steps whose mean is the loss at the end of a series; the public implementation's.
_LATE = 10


def autolrs(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """AutoLRS at equal budget: half of each stage explores, half trains at the rate found.

    Per stage a fresh Gaussian process over the log rate picks ten rates in turn by its lower confidence bound. Each
    trains for a tenth of the stage from the stage's first state; the loss at the stage's end is forecast by fitting
    ``a exp(-b t) + c`` to the training loss, cleaned by splines. The rate with the lowest forecast trains the stage.
    Each stage is twice as long as the one before.

    Source: Jin et al., "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly" (2021), section
      3, and its public implementation, which forecasts training loss while stages are as short as here. Two things
      differ. There, stages begin at 1,000 steps and double up to 8,000; here three of them are scaled to the budget.
      There, the forecast is free; here ``b`` keeps to what a series of that length can show, the loss stays above zero,
      and what rises is not extrapolated (there, only in stages scored on validation data).
    """
    low, high = (math.log10(bound) for bound in task.space["learning_rate"])
    state, losses, rates, at = task.init(seed), [], [], 0
    rng = np.random.default_rng(seed)
    lengths = _stages(task.total_steps)
    times = clock(task, sum(lengths))
    first = begin = math.inf
    for length in lengths:
        tried, forecasts = [], []
        for _ in range(CANDIDATES):
            x = rng.uniform(low, high) if not tried else _next_rate(np.linspace(low, high, 201), tried, forecasts)
            short = length // CANDIDATES
            _, loss, _ = train(task, state, seed, at, np.full(short, 10**x), hp, times[at : at + short])
            losses.append(np.asarray(loss))
            if at == 0:
                first = begin = losses[0][0]
            tried.append(x)
            forecasts.append(forecast(losses[-1], length, first=first, begin=begin))
        best = 10 ** tried[int(np.argmin(forecasts))]
        state, loss, _ = train(task, state, seed, at, np.full(length, best), hp, times[at : at + length])
        losses.append(np.asarray(loss))
        begin = float(np.nanmean(losses[-1][-_LATE:]))
        rates.append(best)
        at += length
    return state, np.concatenate(losses), {"rates": rates, "useful": at}


def forecast(losses: np.ndarray, horizon: int, *, first: float, begin: float) -> float:
    """Loss after ``horizon`` steps; infinite when the candidate diverged. A faulty batch in between is left out.

    A series that rises above the run's first loss, or ends above its stage's, is no decaying exponential; its late mean
    counts instead.

    Args:
      losses: float ``[n]``: training losses of a candidate.
      horizon: Steps counted from the candidate's first.
      first: Loss that the run began with.
      begin: Loss that the stage began with.
    """
    if not np.isfinite(losses[-1]):
        return math.inf
    t = np.flatnonzero(np.isfinite(losses)).astype(float)
    losses = losses[np.isfinite(losses)]
    end = float(losses[-_LATE:].mean())
    if losses.max() > first or end > begin:
        return end
    smooth = _without_outliers(t, losses)
    direction = 1.0 if smooth[0] >= smooth[-1] else -1.0

    def fit(log_b):
        # The weights of the exponential and of 1, the limit, which is kept from falling below zero.
        basis = np.column_stack([direction * np.exp(-math.exp(log_b) * t), np.ones(len(t))])
        return scipy.optimize.nnls(basis, smooth)

    ends = (math.log(1.0 / horizon), 0.0)
    found = scipy.optimize.minimize_scalar(lambda log_b: fit(log_b)[1], bounds=ends, method="bounded")
    (a, c), _ = fit(found.x)
    return float(direction * a * math.exp(-math.exp(found.x) * horizon) + c)


def _without_outliers(t: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The series smoothed by a quadratic spline that leaves out what lies farthest from it in the first half."""
    kept = np.ones(len(t), bool)
    count = max(round(_OUTLIERS * len(t)), 1) if len(t) >= 2 * _PASSES else 0
    for _ in range(_PASSES if count else 0):
        away = np.abs(losses - _spline(t[kept], losses[kept])(t))
        away[~kept | (t >= _EARLY * t[-1])] = -1.0
        kept[np.argsort(away)[-count:]] = False
    return _spline(t[kept], losses[kept])(t)


def _spline(t: np.ndarray, losses: np.ndarray) -> Any:
    return scipy.interpolate.UnivariateSpline(t, losses, k=min(2, len(t) - 1))


def _stages(total_steps: int) -> list[int]:
    """Doubling lengths that fill half the budget."""
    shortest = total_steps // (2 * (2**STAGES - 1))
    return [shortest * 2**i for i in range(STAGES)]


def _next_rate(grid: np.ndarray, tried: list[float], values: list[float]) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    # Diverged candidates count as the worst finite one and a little more, so that they do not flatten the rest.
    y = np.array(values)
    finite = y[np.isfinite(y)]
    worst = finite.max() + finite.std() if len(finite) else 1.0
    kernel = ConstantKernel(1.0) * Matern(1.0, nu=2.5) + WhiteKernel(1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        model.fit(np.array(tried)[:, None], np.where(np.isfinite(y), y, worst))
    mean, deviation = model.predict(grid[:, None], return_std=True)
    return float(grid[np.argmin(mean - _KAPPA * deviation)])
