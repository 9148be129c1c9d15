"""Forks of a round that run together: beside the one that the line search asks for, those that it may ask for next.

The controller asks for one fork after the other, and stays as it is. Where it asks for one that has run already, its
losses are told instead of trained for. Its last step is trained as any other, after the state before it was measured.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..controller import AutoTuneNet
from ..controller.core import Core
from ..controller.fork_round import foreseen
from ..controller.plan import FAST, MAX_FORKS
from ..controller.state import TunerState, later
from .device_forks import MOST_AT_ONCE, DeviceForks
from .fork_executor import ForkExecutor, StepLog

_log = logging.getLogger("autotunenet")

# Longer forks run alone.
_MOST_STEPS = 2**14
# Rates that a fork was trained with are those that the controller asks for, up to rounding.
_ROUNDING = 1e-5


class WaitingFork(NamedTuple):
    """A fork that has been trained up to its last step.

    Attributes:
      x: Hyperparameters, unit cube.
      first: Those in force at its first step, by name.
      steps: How many it has been trained for.
      heard: What is to be heard of them, filled up to the longest fork.
      state: The training state before the last step.
    """

    x: np.ndarray
    first: dict[str, np.ndarray]
    steps: int
    heard: StepLog
    state: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _foreseen_jit(core: Core, count: int, ts: TunerState) -> Any:
    return foreseen(core.space, ts, count)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_force_jit(core: Core, steps: int, ts: TunerState, x: Float[Array, "k d"], lag: Array) -> dict[str, Array]:
    """Values in force at the steps of forks at some points, ``lag`` steps of budget from here: steps, then points."""
    since = ts.health._replace(since_rollback=ts.health.since_rollback + lag)
    begun = ts._replace(step=ts.step + lag, health=since)

    def at(pos: Array, point: Array) -> dict[str, Array]:
        return core.hyperparams(later(begun, pos)._replace(trial=point))

    return jax.vmap(jax.vmap(at, (None, 0)), (0, None))(jnp.arange(steps), x)


def check_parallel_forks(wanted: int | Literal["auto"] | ForkExecutor | None) -> int | Literal["auto"] | ForkExecutor:
    """How many forks may run together, or who trains them; 1 where nothing is asked for.

    Raises:
      ValueError: It is no number of forks.
    """
    if wanted is None or wanted == "auto" or isinstance(wanted, ForkExecutor):
        return wanted or 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= MAX_FORKS:
        raise ValueError(
            f'parallel_forks must be "auto", None, an integer from 1 to {MAX_FORKS}, or a ForkExecutor as a Population '
            f"is; got {wanted!r}. {MOST_AT_ONCE} is the most that is often of use."
        )
    return wanted


class ParallelForks:
    """The forks of the round that is held which have run already.

    Args:
      train_step: The user's.
      tuner: Asks for forks.
      has_aux: Whether ``train_step`` returns metrics too.
      wanted: How many forks run together at most, or who trains them; ``"auto"`` takes what devices and memory allow.
      state: A training state, for its size and place.

    Attributes:
      executor: Who trains them.
      unused_steps: Training steps of forks that were never asked for.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        tuner: AutoTuneNet,
        *,
        has_aux: bool,
        wanted: int | Literal["auto"] | ForkExecutor,
        state: Any,
    ):
        self._core = tuner.core
        # Of the longest fork that can be foreseen; an open-ended plan has forks that are longer than any run.
        longest = int(np.max(tuner.plan.length, where=tuner.plan.kind == FAST, initial=1))
        self._most_steps = min(longest, _MOST_STEPS)
        self._round: tuple[int, int] = (-1, -1)
        self._waiting: list[WaitingFork] = []
        self.unused_steps = 0
        self.executor = wanted if isinstance(wanted, ForkExecutor) else DeviceForks(wanted, state)
        if wanted != 1:
            self.executor.start(train_step, state, has_aux=has_aux)
            _log.info("up to %d forks of a round run together: %s", self.executor.count, self.executor.description)

    @property
    def is_on(self) -> bool:
        """Whether forks run together at all."""
        return self.executor.count > 1

    @property
    def waiting_steps(self) -> int:
        """Training steps of forks that have run and may still be asked for."""
        return sum(fork.steps for fork in self._waiting)

    def find(self, ts: TunerState, host: Any) -> WaitingFork | None:
        """The fork that begins, where it has run or can be run beside others; else None, and it is trained as usual.

        Args:
          ts: The controller's state at its beginning.
          host: The training, copies of whose state are trained.
        """
        held = (int(ts.round.index), int(ts.slots.saved_data))
        if held != self._round:
            self.release()
            self._round = held
        fork = self._pop(ts)
        # A run that goes on to another budget may hold longer forks than its tuner's plan has.
        if fork is None and int(ts.segment_length) <= self._most_steps:
            points = self._points(ts)
            if len(points) > 1:
                self._waiting += self._run(ts, host.state, points, host.batch)
                fork = self._pop(ts)
        if fork is not None and not _is_close(fork.first, jax.device_get(dict(host.hyperparams))):
            # It was trained with other values than those that are asked for.
            self.unused_steps += fork.steps
            return None
        return fork

    def release(self) -> None:
        """Forgets all forks: the round is over. Their steps are counted."""
        self.unused_steps += self.waiting_steps
        self._waiting = []

    def _pop(self, ts: TunerState) -> WaitingFork | None:
        trial, length = np.asarray(ts.trial), int(ts.segment_length)
        for number, fork in enumerate(self._waiting):
            if np.allclose(fork.x, trial, atol=_ROUNDING) and fork.steps == length - 1:
                return self._waiting.pop(number)
        return None

    def _points(self, ts: TunerState) -> np.ndarray:
        """The fork that begins and those that may follow, as far as they have not run."""
        found = jax.device_get(_foreseen_jit(self._core, self.executor.count, ts))
        known = [fork.x for fork in self._waiting]
        points = [
            x
            for x, is_allowed in zip(found.x, found.is_allowed, strict=True)
            if is_allowed and not any(np.allclose(x, other, atol=_ROUNDING) for other in known)
        ]
        return np.stack(points)

    def _run(self, ts: TunerState, state: Any, points: np.ndarray, batch: Callable[[int], Any]) -> list[WaitingFork]:
        """Trains forks at some points up to their last step; those that met nothing unusual are of use."""
        steps, start, count = int(ts.segment_length) - 1, int(ts.data_step), len(points)
        # Filled up, so that one program does for all.
        x = jnp.asarray(np.concatenate([points, np.repeat(points[:1], self.executor.count - count, axis=0)]))
        in_force = functools.partial(_in_force_jit, self._core, self._most_steps, ts, x)
        values, later = in_force(np.int32(0)), in_force(np.int32(MAX_FORKS * (steps + 1)))
        first, later = jax.device_get([{name: rows[0] for name, rows in tree.items()} for tree in (values, later)])
        if not _is_close(first, later):
            # The rates depend on how much of the budget is spent, and so on the order of the forks.
            return []
        self.unused_steps += steps * (self.executor.forks_paid(count) - count)
        trained = self.executor.train(state, values, lambda pos: batch(start + pos), steps=steps, count=count)
        waiting = []
        for number, fork in enumerate(trained):
            if fork is not None and np.isfinite(fork.heard.told).all():
                at_first = {name: value[number] for name, value in first.items()}
                heard = jax.tree.map(self._filled, fork.heard)
                waiting.append(WaitingFork(points[number], at_first, steps, heard, fork.state))
            else:
                self.unused_steps += steps
        return waiting

    def _filled(self, row: np.ndarray) -> np.ndarray:
        """A row with a value for each step of the longest fork."""
        return np.concatenate([row, np.zeros(self._most_steps - len(row), row.dtype)])


def _is_close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.allclose(a[name], b[name], rtol=_ROUNDING, atol=0.0) for name in a)
