"""Baselines that run several candidates at once or in turn: three-stream, PBT, PB2, Optuna.

All of them tune the learning rate alone. The budget counts the steps of every candidate, and each look at the 512 probe
rows at its price.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.quality import bandit, baselines
from benchmarks.quality.autolrs import autolrs
from benchmarks.quality.searches import Found, clock, probe, train
from benchmarks.quality.task import RunState, Workload

STREAM_STEPS = 20
MEMBERS = 4
EXPLOITS = 10
TRIALS = 8
RANDOM_TRIALS = 3

# What PBT multiplies a copied rate by.
_PERTURBATIONS = (0.8, 1.2)


def three_stream(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """Every 20 steps, three copies go on at half, the same and twice the rate; the best by probe loss is kept."""
    state, rate = task.init(seed), hp.get("learning_rate", task.defaults["learning_rate"])
    low, high = task.space["learning_rate"]
    rounds = int(task.total_steps / (3 * (STREAM_STEPS + task.probe_price)))
    times = clock(task, rounds * STREAM_STEPS)
    losses = []
    for at in range(0, rounds * STREAM_STEPS, STREAM_STEPS):
        tried = []
        for factor in (0.5, 1.0, 2.0):
            candidate = float(np.clip(rate * factor, low, high))
            rates = np.full(STREAM_STEPS, candidate)
            new, loss, _ = train(task, state, seed, at, rates, hp, times[at : at + STREAM_STEPS])
            losses.append(np.asarray(loss))
            tried.append((_finite(float(probe(task)(new))), candidate, new))
        _, rate, state = min(tried, key=lambda item: item[0])
    return state, np.concatenate(losses), {"rate": rate, "useful": rounds * STREAM_STEPS}


def population(task: Workload, seed: int, hp: dict[str, float], *, budget: int, is_bandit: bool) -> Found:
    """Population-based training of four members, or PB2 when new rates come from a bandit.

    Ten times in a run the worst member takes over the state of the best: truncation selection, of which a fifth and a
    quarter are one of four. PBT then multiplies the best rate by 0.8 or 1.2; PB2 maximises the confidence bound of a
    time-varying Gaussian process fitted to the improvements seen so far (`bandit`).

    Args:
      task: The workload.
      seed: Seeds parameters, data and the choices.
      hp: Other hyperparameters.
      budget: Budget in multiples of T; at 4, each member trains as long as a run of its own.
      is_bandit: PB2 rather than PBT.

    Source: Jaderberg et al., "Population Based Training of Neural Networks" (2017); Parker-Holder et al., "Provably
      Efficient Online Hyperparameter Optimization with Population-Based Bandits" (2020). Populations there have 4 to 80
      members, each with a full run; here they share the budget. Three changes make both stronger: first rates come one
      from each quarter of the log range, rates follow warm-up and linear decay, and the bandit sees the rate's log.
    """
    bounds = np.log(task.space["learning_rate"])
    rng = np.random.default_rng((seed, 11))
    length = budget * task.total_steps // MEMBERS - math.ceil((EXPLOITS + 1) * task.probe_price)
    length = min(length, task.total_steps)
    shape, times = _decay(length), clock(task, length)
    rates = np.exp(bounds[0] + np.ptp(bounds) * (rng.permutation(MEMBERS) + rng.uniform(size=MEMBERS)) / MEMBERS)
    states: list[RunState] = [task.init(seed * 100 + member) for member in range(MEMBERS)]
    score = np.array([_finite(float(probe(task)(state))) for state in states])
    losses, seen = [], []
    for index, part in enumerate(np.array_split(np.arange(length), EXPLOITS)):
        before = score.copy()
        for member in range(MEMBERS):
            now = rates[member] * shape[part]
            states[member], loss, _ = train(task, states[member], seed, part[0], now, hp, times[part])
            losses.append(np.asarray(loss))
            score[member] = _finite(float(probe(task)(states[member])))
            seen.append((index, before[member], rates[member], score[member]))
        best, worst = int(np.argmin(score)), int(np.argmax(score))
        if index == EXPLOITS - 1:
            break
        states[worst], score[worst] = states[best], score[best]
        new = _bandit_rate(seen, bounds, score[best]) if is_bandit else rates[best] * rng.choice(_PERTURBATIONS)
        rates[worst] = np.clip(new, *task.space["learning_rate"])
    extra = {"rate": float(rates[best]), "useful": length, "spent": budget * task.total_steps}
    return states[best], np.concatenate(losses), extra


def optuna_trials(task: Workload, seed: int, hp: dict[str, float], *, share: float) -> Found:
    """Optuna's default sampler, TPE, with eight trials of equal length under linear decay; three of them are random.

    By default its first ten trials are random, which here would be all of them.

    Args:
      task: The workload.
      seed: Seeds parameters, data and the sampler.
      hp: Other hyperparameters.
      share: Share of the budget that trials get. At 1 the best trial is kept; otherwise the rest of the budget goes to
        a fresh run at the best rate.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    length = int(share * task.total_steps / TRIALS - task.probe_price)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    study = optuna.create_study(sampler=sampler)
    losses, best = [], (math.inf, math.nan, None)
    for _ in range(TRIALS):
        trial = study.ask()
        rate = trial.suggest_float("learning_rate", *task.space["learning_rate"], log=True)
        state, loss = _decayed(task, seed, hp, rate, length)
        score = _finite(float(probe(task)(state)))
        study.tell(trial, score)
        losses.append(loss)
        best = min(best, (score, rate, state), key=lambda item: item[0])
    _, rate, state = best
    if share < 1.0:
        length = task.total_steps - round(TRIALS * (length + task.probe_price))
        state, loss = _decayed(task, seed, hp, rate, length)
        losses.append(loss)
    return state, np.concatenate(losses), {"rate": rate, "useful": length}


POPULATIONS: dict[str, tuple[Callable[..., Found], dict[str, Any]]] = {
    "three_stream": (three_stream, {}),
    "autolrs": (autolrs, {}),
    "pbt4": (population, {"budget": 1, "is_bandit": False}),
    "pbt4_4x": (population, {"budget": 4, "is_bandit": False}),
    "pb2_4": (population, {"budget": 1, "is_bandit": True}),
    "pb2_4_4x": (population, {"budget": 4, "is_bandit": True}),
    "optuna8": (optuna_trials, {"share": 1.0}),
    "optuna8_half": (optuna_trials, {"share": 0.5}),
}


def _decay(length: int) -> np.ndarray:
    return np.asarray(baselines.linear(jnp.arange(1, length + 1) / (length + 1.0)))


def _decayed(task: Workload, seed: int, hp: dict[str, float], rate: float, length: int) -> tuple[RunState, np.ndarray]:
    """A fresh run of ``length`` steps under linear decay."""
    state, loss, _ = train(task, task.init(seed), seed, 0, rate * _decay(length), hp, clock(task, length))
    return state, np.asarray(loss)


def _finite(score: float) -> float:
    return score if math.isfinite(score) else 1e6


def _bandit_rate(seen: list[tuple[int, float, float, float]], bounds: np.ndarray, loss: float) -> float:
    """A new rate for a copy of the member with probe loss ``loss``, from (round, loss before, rate, loss after)."""
    index, before, rates, after = np.array(seen).T
    # What diverged counts as twice the highest loss that a fresh member had, or it would hide the other differences.
    level, after = (np.minimum(losses, 2.0 * before[index == 0].max()) for losses in (before, after))
    low, span = level.min(), max(float(np.ptp(level)), 1e-6)
    x = np.column_stack([index, (level - low) / span, (np.log(rates) - bounds[0]) / np.ptp(bounds)])
    at = (index[-1] + 1.0, (loss - low) / span)
    return float(np.exp(bounds[0] + np.ptp(bounds) * bandit.suggest(x, level - after, at=at)))
