"""Baselines that keep the workload's optimizer: a learning rate, a schedule, one compiled scan per run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.task import RunState, Workload

WARMUP = 0.02
_STABLE = 0.8


def constant(t: Any) -> Any:
    """1 throughout."""
    return jnp.ones_like(t)


def linear(t: Any) -> Any:
    """Warm-up over 2 % of the run, then linear to zero. ``t`` is the share of the budget spent."""
    return jnp.minimum(t / WARMUP, (1.0 - t) / (1.0 - WARMUP))


def cosine(t: Any) -> Any:
    """Warm-up over 2 % of the run, then half a cosine to zero."""
    return jnp.minimum(t / WARMUP, 0.5 * (1.0 + jnp.cos(jnp.pi * (t - WARMUP) / (1.0 - WARMUP))))


def wsd(t: Any) -> Any:
    """Warm-up, stable, and a linear decay over the last fifth."""
    return jnp.minimum(jnp.minimum(t / WARMUP, 1.0), (1.0 - t) / (1.0 - _STABLE))


SCHEDULES: dict[str, Callable[[Any], Any]] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


@functools.cache
def _compiled(task: Workload, schedule: str, skip: bool) -> Callable[..., tuple[RunState, jax.Array]]:
    shape = SCHEDULES[schedule]

    def run(state, table, arrays, hp):
        def step(state, at):
            t, rows = at
            share = (t + 1.0) / (task.total_steps + 1.0)
            now = {**hp, "learning_rate": hp["learning_rate"] * shape(share)}
            new, loss = task.train_step(state, task.gather(arrays, rows, t), now)
            if skip:
                new = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss), a, b), new, state)
            return new, loss

        steps = jnp.arange(task.total_steps)
        state, losses = jax.lax.scan(step, state, (steps, table))
        return state, losses

    return jax.jit(run, donate_argnums=0)


def scheduled(
    task: Workload, seed: int, *, schedule: str, hp: dict[str, float], skip: bool = False
) -> tuple[RunState, np.ndarray]:
    """Train under one schedule at given hyperparameters.

    Args:
      task: The workload.
      seed: Seeds parameters, dropout and the order of the batches.
      schedule: A name in `SCHEDULES`.
      hp: Peak ``learning_rate``, and any other hyperparameter, held fixed; the rest take their defaults.
      skip: Whether a step with a non-finite loss leaves the state as it was.

    Returns:
      The final state and the float32 ``[T]`` training losses.
    """
    values = {name: jnp.float32(value) for name, value in {**task.defaults, **hp}.items()}
    state, losses = _compiled(task, schedule, skip)(
        task.init(seed), jnp.asarray(task.table(seed)), task.train_arrays, values
    )
    return state, np.asarray(losses)
