"""Runs pieces of a task's training, from any state and at any rates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bank.problems import Batch
from benchmarks.bank.tasks import Task

States = Any  # parameters and the optimizer's state, stacked along a leading axis of forks
CHUNK = 10
PROBE = 512  # training examples, at most, that the training loss is measured on
WORST = 1e9  # stands for a loss that is not finite


def finite(losses: jax.Array) -> np.ndarray:
    return np.minimum(np.nan_to_num(np.asarray(losses, float), nan=WORST, posinf=WORST, neginf=WORST), WORST)


class Lab:
    """A task under one seed. Forks see the same batches and the same noise at the same step.

    Programs are compiled once per number of forks, whatever the number of steps.
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task = task
        self._root = jax.random.key(1000 + seed)
        self._chunk = jax.jit(jax.vmap(self._steps, (0, None, 0, None)))
        self._losses = jax.jit(jax.vmap(self._loss, (0, None)))
        self._probe = tuple(a[:PROBE] for a in task.problem.train)
        params = task.problem.init(jax.random.key(seed))
        self.start: States = jax.tree.map(lambda a: jnp.asarray(a)[None], (params, task.opt.init(params)))

    def _loss(self, state: States, batch: Batch) -> jax.Array:
        return self.task.problem.loss(state[0], batch, None)

    def _steps(self, state: States, t0: jax.Array, rates: jax.Array, count: jax.Array) -> tuple[States, jax.Array]:
        """CHUNK steps from step ``t0``, of which the first ``count`` are taken."""
        train, opt = self.task.problem.train, self.task.opt

        def step(state: States, j: jax.Array) -> tuple[States, jax.Array]:
            params, inner = state
            rows, noise = jax.random.split(jax.random.fold_in(self._root, t0 + j))
            drawn = jax.random.randint(rows, (self.task.batch,), 0, len(train[0]))
            batch = tuple(a[drawn] for a in train)
            loss, gradient = jax.value_and_grad(self.task.problem.loss)(params, batch, noise)
            inner = inner._replace(hyperparams={**inner.hyperparams, "learning_rate": rates[j]})
            updates, inner = opt.update(gradient, inner, params)
            after = optax.apply_updates(params, updates), inner
            kept = jax.tree.map(lambda new, old: jnp.where(j < count, new.astype(old.dtype), old), after, state)
            return kept, jnp.where(j < count, loss, jnp.nan)

        return jax.lax.scan(step, state, jnp.arange(CHUNK))

    def _warmup(self, t0: int, steps: int) -> np.ndarray:
        """What the user's own warm-up multiplies the rates by."""
        length = self.task.warmup * self.task.steps
        return np.minimum(1.0, (t0 + np.arange(steps) + 1) / length) if length else np.ones(steps)

    def run(self, states: States, t0: int, rates: np.ndarray, *, warms_up: bool = True) -> tuple[States, np.ndarray]:
        """States after, and losses of shape (forks, steps), from rates of that shape, the first being step ``t0``'s.

        The user's warm-up multiplies the rates unless ``warms_up`` is off.
        """
        rates, losses = np.asarray(rates), []
        rates = rates * (self._warmup(t0, rates.shape[1]) if warms_up else 1.0)
        for j in range(0, rates.shape[1], CHUNK):
            piece = rates[:, j : j + CHUNK]
            count = piece.shape[1]
            padded = jnp.asarray(np.pad(piece, ((0, 0), (0, CHUNK - count))), jnp.float32)
            states, found = self._chunk(states, t0 + j, padded, count)
            losses.append(found[:, :count])
        return states, np.concatenate(losses, 1) if losses else np.zeros((len(rates), 0))

    def evaluate(self, states: States) -> np.ndarray:
        """Validation and test loss, of shape (forks, 2)."""
        problem = self.task.problem
        return np.stack([finite(self._losses(states, part)) for part in (problem.val, problem.test)], 1)

    def train_loss(self, states: States, t0: int = 0, n: int = PROBE) -> np.ndarray:
        """Mean loss of each fork on a fixed set of training examples, or on ``n`` of them from the ``t0``-th on."""
        return finite(self._losses(states, tuple(a[t0 : t0 + n] for a in self._probe)))

    def repeat(self, states: States, count: int) -> States:
        """Each fork ``count`` times."""
        return jax.tree.map(lambda a: jnp.repeat(a, count, 0), states)
