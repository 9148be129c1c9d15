"""Baselines that search for the rate inside the budget: a range test, one wide fork round, ours."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import baselines
from benchmarks.quality.task import RunState, Workload

SWEEP_STEPS = 100
FORKS = 7
FORK_STEPS = 20

Found = tuple[RunState, np.ndarray, dict[str, Any]]

# Smoothing of the range test's loss, and how far below its minimum the rate is set.
_SMOOTHING = 0.9
_BELOW_MINIMUM = 10.0


@functools.cache
def stretch(task: Workload) -> Callable[..., tuple[RunState, jax.Array, Any]]:
    """A compiled run of ``len(table)`` steps at given rates; also returns the mean weights of its second half."""

    def run(state, table, steps, rates, arrays, hp):
        tail = jnp.arange(len(table)) >= len(table) // 2

        def step(carry, at):
            state, total = carry
            rows, t, rate, is_tail = at
            new, loss = task.train_step(state, task.gather(arrays, rows, t), {**hp, "learning_rate": rate})
            # The faulty batch of W8 is skipped, as for the other baselines.
            is_good = jnp.isfinite(loss) | (task.nan_at is None)
            state = jax.tree.map(lambda a, b: jnp.where(is_good, a, b), new, state)
            return (state, jax.tree.map(lambda a, p: a + jnp.where(is_tail, p, 0.0), total, state.params)), loss

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (state, total), losses = jax.lax.scan(step, (state, zeros), (table, steps, rates, tail))
        return state, losses, jax.tree.map(lambda a: a / jnp.sum(tail), total)

    return jax.jit(run)


def clock(task: Workload, length: int) -> np.ndarray:
    """int32 ``[length]``: the time of each step on the clock of drifting and faulty data, which runs over the budget.

    Candidates that train side by side take fewer steps than the budget has; without this they would end before the data
    shifts.
    """
    return ((np.arange(length) + 0.5) * task.total_steps / length).astype(np.int32)


def train(
    task: Workload,
    state: RunState,
    seed: int,
    first: int,
    rates: np.ndarray,
    hp: dict[str, float],
    times: np.ndarray | None = None,
) -> tuple[RunState, jax.Array, Any]:
    """Go on from ``state`` on the batches from ``first`` on, one step per rate: state, losses, mean late weights.

    ``times`` tells the time of each step on the clock of the data; without it, each step is its own.
    """
    values = {name: jnp.float32(value) for name, value in {**task.defaults, **hp}.items()}
    table = jnp.asarray(task.table(seed)[first : first + len(rates)])
    steps = jnp.arange(first, first + len(rates)) if times is None else jnp.asarray(times)
    return stretch(task)(state, table, steps, jnp.asarray(rates, jnp.float32), task.train_arrays, values)


def range_test(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """An exponential sweep of the rate over its bounds, then a fresh run under linear decay with what is left.

    The rate is a tenth of the one at the minimum of the smoothed loss. A sweep longer than a quarter of the budget is
    shortened.
    """
    low, high = task.space["learning_rate"]
    n = min(SWEEP_STEPS, task.total_steps // 4)
    rates = np.geomspace(low, high, n)
    _, swept, _ = train(task, task.init(seed), seed, 0, rates, hp)
    smooth = _smoothed(np.asarray(swept))
    peak = float(np.clip(rates[int(np.argmin(smooth))] / _BELOW_MINIMUM, low, high))
    left = task.total_steps - n
    share = jnp.arange(1, left + 1) / (left + 1.0)
    state, losses, _ = train(task, task.init(seed), seed, 0, peak * np.asarray(baselines.linear(share)), hp)
    return state, np.concatenate([swept, losses]), {"rate": peak, "useful": left}


def wide_fork(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """One round of seven forks over the whole range of rates at step 0, the winner kept; then linear decay.

    Forks take the same batches and are scored by the probe loss of their mean weights over the last ten steps. The
    decay runs on budget spent.
    """
    low, high = task.space["learning_rate"]
    begin, best, losses = task.init(seed), None, []
    for rate in np.geomspace(low, high, FORKS):
        state, loss, mean = train(task, begin, seed, 0, np.full(FORK_STEPS, rate), hp)
        score = float(probe(task)(state._replace(params=mean)))
        losses.append(np.asarray(loss))
        if np.isfinite(score) and (best is None or score < best[0]):
            best = (score, rate, state)
    if best is None:
        raise FloatingPointError(f"every fork diverged on {task.name}.")
    _, rate, state = best
    spent = FORKS * FORK_STEPS + round(FORKS * task.probe_price)
    left = task.total_steps - spent
    share = (spent + 1.0 + jnp.arange(left)) / (task.total_steps + 1.0)
    state, loss, _ = train(task, state, seed, FORK_STEPS, rate * np.asarray(baselines.linear(share)), hp)
    return state, np.concatenate([*losses, loss]), {"rate": float(rate), "useful": left + FORK_STEPS}


def ours(
    task: Workload, seed: int, hp: dict[str, float], *, all_tuned: bool, has_eval: bool = True, **options: Any
) -> Found:
    """The library, with its defaults: `fit` on the workload.

    Args:
      task: The workload.
      seed: Seeds the run, its data and the tuner.
      hp: Start values.
      all_tuned: Whether everything in the workload's space is tuned, or the learning rate alone.
      has_eval: Whether forks are compared on validation rows (the 512 probe rows; each use is charged).
      **options: Passed on to `AutoTuneNet`, for ablations.

    Returns:
      The final state, the training losses in the order of the budget, and what the tuner did. With ``has_eval`` the
      number of training steps is the budget less the price of the evaluations a first run of the same seed made.
    """
    total = task.total_steps
    for _ in range(2 if has_eval else 1):
        result = _fit(task, seed, hp, total, all_tuned=all_tuned, has_eval=has_eval, options=options)
        charge = _evaluations(result.history) * task.probe_price if has_eval else 0.0
        spent = total + charge
        total = task.total_steps - round(charge)
    history = result.history
    extra = {
        "spent": spent,
        "useful": round(history.summary["steps"] - history.summary["discarded_steps"]),
        "share": history.summary["share_discarded"],
        "chosen": {name: float(value) for name, value in result.hyperparams.items()},
        "rounds": [{"start": r["start"], "kind": r["kind"], "outcome": r["outcome"]} for r in history.rounds],
        "events": len(history.events),
        "library": _library(),
    }
    return result.state, np.array([row["loss"] for row in history.records]), extra


def _fit(task, seed, hp, total, *, all_tuned, has_eval, options):
    import autotunenet_jax as atn

    space = dict(task.space) if all_tuned else task.rate_space
    fixed = {name: value for name, value in hp.items() if name not in space}
    tuner = atn.AutoTuneNet(
        space, total_steps=total, initial={name: value for name, value in hp.items() if name in space}, **options
    )
    return atn.fit(
        _with_fixed(task, tuple(sorted(fixed.items()))),
        task.init(seed),
        task.stream(seed),
        tuner=tuner,
        eval_step=task.probe_step if has_eval else None,
        key=jax.random.key(seed),
        # Half as often as by default: each one is charged.
        eval_every=total // 10,
        progress=False,
    )


@functools.cache
def _library() -> str:
    """A digest of the library's sources, so that a stored result tells which state of it made it."""
    import autotunenet_jax as atn

    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(atn.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _with_fixed(task: Workload, fixed: tuple[tuple[str, float], ...]) -> Callable[..., Any]:
    if not fixed:
        return task.train_step
    return lambda state, batch, hp: task.train_step(state, batch, {**dict(fixed), **hp})


def _evaluations(history: Any) -> int:
    """Validations of the run: those outside rounds and one per score of a fork."""
    scores = [score for row in history.rounds for fork in row["forks"] for score in fork["scores"]]
    return len(history.evals) + sum(score is not None and np.isfinite(score) for score in scores)


@functools.cache
def probe(task: Workload) -> Callable[[RunState], jax.Array]:
    """The compiled `Workload.probe_step`."""
    return jax.jit(task.probe_step)


def _smoothed(losses: np.ndarray) -> np.ndarray:
    out, mean = np.empty(len(losses)), 0.0
    for i, loss in enumerate(losses):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * (loss if np.isfinite(loss) else 1e9)
        out[i] = mean / (1 - _SMOOTHING ** (i + 1))
    return out
