"""Where the forks of a round that run together are trained, and how one of them is."""

import abc
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .sound_steps import train


class StepLog(NamedTuple):
    """What is to be heard of the steps of a fork, a row for each.

    Attributes:
      told: What the controller hears.
      loss: What the history hears.
      metrics: Beside the loss.
    """

    told: Any
    loss: Any
    metrics: Mapping[str, Any]


class TrainedFork(NamedTuple):
    """What became of a fork.

    Attributes:
      heard: Of its steps, NumPy arrays.
      state: The training state after them.
    """

    heard: StepLog
    state: Any


class ForkExecutor(abc.ABC):
    """Trains forks that start from one state and see the same batches; ``parallel_forks`` of `fit` takes one.

    Attributes:
      count: How many forks it trains together at most.
    """

    count: int

    @property
    def description(self) -> str:
        """Where forks run, in a few words for the log."""
        return f"by {type(self).__name__}"

    @abc.abstractmethod
    def start(self, train_step: Callable[..., Any], state: Any, *, has_aux: bool) -> None:
        """Makes ready, once for each run.

        Args:
          train_step: The user's.
          state: A training state, for its structure, size and place.
          has_aux: Whether ``train_step`` returns metrics too.
        """

    @abc.abstractmethod
    def train(
        self,
        state: Any,
        hyperparams: Mapping[str, np.ndarray],
        batch: Callable[[int], Any],
        *,
        steps: int,
        count: int,
    ) -> list[TrainedFork | None]:
        """Trains forks by some steps, and leaves ``state`` as it is.

        Args:
          state: Where they begin.
          hyperparams: Values in force, arrays of shape (at least ``steps``, ``self.count``) by name.
          batch: The batch of a step, counted from the forks' first.
          steps: How many steps, at least one.
          count: How many forks, those of the first columns of ``hyperparams``.

        Returns:
          An entry for each fork; None where it could not be trained: it is run again, alone, when it is asked for.
        """

    def forks_paid(self, count: int) -> int:
        """How many forks are trained where ``count`` are asked for."""
        return count

    def home(self, tree: Any) -> Any:
        """The tree where this run's own steps are to find it."""
        return tree


def fork_step(
    train_step: Callable[..., Any], has_aux: bool, state: Any, hyperparams: Mapping[str, Any], batch: Any
) -> tuple[Any, StepLog]:
    """One step of a fork; one that breaks the state does not happen."""
    new, loss, told, metrics = train(train_step, state, batch, hyperparams, has_aux=has_aux)
    return new, StepLog(jnp.asarray(told, jnp.float32), jnp.asarray(loss, jnp.float32), metrics)


_fork_step_jit = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)(fork_step)


def rows_of(steps: list[Any]) -> Any:
    """What was heard at each step, as one NumPy array for each number."""
    return jax.tree.map(lambda *row: np.stack(row, axis=-1), *jax.device_get(steps))


def train_fork(
    train_step: Callable[..., Any],
    state: Any,
    hyperparams: Mapping[str, np.ndarray],
    batches: Iterable[Any],
    *,
    has_aux: bool,
) -> TrainedFork:
    """Trains one fork, a step for each batch.

    Args:
      train_step: The user's; compiled once for each such function.
      state: Where it begins; donated.
      hyperparams: Values in force, a vector with an entry for each batch by name.
      batches: At least one.
      has_aux: Whether ``train_step`` returns metrics too.
    """
    heard = []
    for pos, batch in enumerate(batches):
        in_force = {name: values[pos] for name, values in hyperparams.items()}
        state, row = _fork_step_jit(train_step, has_aux, state, in_force, batch)
        heard.append(row)
    return TrainedFork(rows_of(heard), state)
