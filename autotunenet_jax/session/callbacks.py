"""What a user may hang on a run: hooks that hear of the training that is kept, and may end it."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..arguments import check_takes, whole_number
from ..history.history import History


class StopTraining(Exception):  # noqa: N818 - as StopIteration, it is no error
    """Raised in a callback, ends the run cleanly: in its best healthy state, as at the end of the budget.

    Args:
      reason: Why, for the result and the history.
    """


class Step(NamedTuple):
    """One training step that is kept; Python numbers.

    Attributes:
      step: Budget step, which counts the steps of forks too and only ever grows.
      kept_step: Number of the step in the training that lives on, from 1; a rewind takes it back.
      loss: Loss of the step.
      metrics: What else the train step returned.
      hyperparams: Values in force at the step.
    """

    step: int
    kept_step: int
    loss: float
    metrics: Mapping[str, float]
    hyperparams: Mapping[str, Any]


class Reading(NamedTuple):
    """One validation of the training that lives on.

    Attributes:
      step: Budget step.
      kept_step: Steps that the measured state has behind it.
      value: The metric, in the user's own direction.
      metrics: Everything that was measured with it, the metric itself included where it has a name.
    """

    step: int
    kept_step: int
    value: float
    metrics: Mapping[str, float]


class Rewind(NamedTuple):
    """Training has gone back to an earlier state: a rollback, or the way back to the best metric.

    Attributes:
      step: Budget step at which it did.
      back_to: Budget step of the state it went back to.
      kept_step: Steps that this state has behind it.
      is_rollback: Whether training was unhealthy; else its metric had stopped improving.
    """

    step: int
    back_to: int
    kept_step: int
    is_rollback: bool


class Callback:
    """Base class of callbacks; override what you need.

    Hooks hear of the training that is kept, never of a fork that lost. They come in the order of what they tell of and
    where nothing is half done: an exception raised in one ends the run as any error does, after a snapshot if there is
    a folder for them; `StopTraining` ends it cleanly. No step waits for the device, so that hooks come late: `on_step`
    by up to ``log_every`` steps and 31 more, the steps of a fork that won when its round ends.

    Example:
        >>> class Report(Callback):
        ...     def on_validation(self, reading):
        ...         if reading.value < 0.05:
        ...             raise StopTraining("good enough")
    """

    def on_begin(self, history: History) -> None:
        """The run begins, or goes on from a snapshot; ``history`` holds what was recorded till then."""

    def on_step(self, step: Step) -> None:
        """A training step that is kept; once for each, in order. Of forks above 4096 steps, evenly thinned."""

    def on_validation(self, reading: Reading) -> None:
        """The training that lives on was measured, outside of rounds."""

    def on_decision(self, decision: dict[str, Any]) -> None:
        """A round of forks ended; ``decision`` is its entry in `History.rounds`."""

    def on_rewind(self, rewind: Rewind) -> None:
        """Training went back; what was told of since then is not part of it any more."""

    def on_end(self, history: History) -> None:
        """The run is over, whole or not; ``history`` is that of the result."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run should know, as plain data that JSON can hold; it is part of every snapshot."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, after `on_begin`."""


HOOKS = ("on_begin", "on_step", "on_validation", "on_decision", "on_rewind", "on_end")
_METHODS = (*HOOKS, "state_dict", "load_state_dict")


class _OnDecision(Callback):
    """A plain function, called with each decision."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]):
        self._function = function

    def on_decision(self, decision: dict[str, Any]) -> None:
        """Calls it."""
        self._function(decision)


class _Partial(Callback):
    """An object that has some of the hooks."""

    def __init__(self, owner: Any):
        for name in _METHODS:
            if hasattr(owner, name):
                setattr(self, name, getattr(owner, name))


def as_callbacks(callbacks: Iterable[Any]) -> tuple[Callback, ...]:
    """Callbacks, objects with some of their hooks, and functions of a decision, all as callbacks.

    Raises:
      TypeError: Something else, a class in the place of an instance, or no sequence.
    """
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks must be a list or tuple of callbacks; got {callbacks!r}. Put it into a list.")
    return tuple(map(_as_callback, callbacks))


def _as_callback(given: Any) -> Callback:
    if isinstance(given, Callback):
        return given
    if inspect.isclass(given):
        raise TypeError(f"callbacks must hold instances; got the class {given.__name__}. Call it: {given.__name__}().")
    if any(hasattr(given, name) for name in HOOKS):
        return _Partial(given)
    if callable(given):
        check_takes(given, "a function among the callbacks is called with each decision", "callback(decision)")
        return _OnDecision(given)
    raise TypeError(
        f"a callback must be a Callback, have one of {', '.join(HOOKS)}, or be a function of a decision; got {given!r}."
    )


def hears_steps(callback: Callback) -> bool:
    """Whether a callback has something to do at each step."""
    return "on_step" in vars(callback) or type(callback).on_step is not Callback.on_step


class EarlyStopping(Callback):
    """Ends a run whose validation metric no longer improves; it ends in its best state.

    Readings of forks do not count, and neither do those that a rollback took back: a divergence is no lack of progress.
    Where the tuner itself goes back to the best state, to go on at a lower rate, patience runs on. It does so after
    three readings; with a patience of fewer the run ends before that could help.

    A run that ends in the middle of its plan goes without the decay that the rest of the budget would have brought,
    which often is worth more than the steps saved. So give patience of a fifth of the readings or more (`fit` takes 20
    in a run by default), or plan the shorter run from the start with a smaller ``total_steps``.

    Example:
        >>> stopping = EarlyStopping(patience=5)

    Args:
      patience: Readings without improvement after which the run ends, at least 1.
      min_delta: Least improvement that counts, in the metric's own unit, at least 0.

    Raises:
      ValueError: A value out of range.
    """

    def __init__(self, *, patience: int, min_delta: float = 0.0):
        if not 0.0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be a finite number of at least 0; got {min_delta!r}.")
        self.patience, self.min_delta = whole_number("patience", patience), float(min_delta)
        self._begin(1.0)

    def _begin(self, sign: float) -> None:
        self._sign, self._best, self._best_step = sign, math.inf, -1
        self._waiting: list[int] = []

    def on_begin(self, history: History) -> None:
        """Forgets an earlier run."""
        self._begin(-1.0 if history.mode == "max" else 1.0)

    def on_validation(self, reading: Reading) -> None:
        """Counts a reading."""
        value = self._sign * reading.value
        if value < self._best - self.min_delta:
            self._best, self._best_step, self._waiting = value, reading.step, []
        else:
            self._waiting.append(reading.step)
        self._judge()

    def on_rewind(self, rewind: Rewind) -> None:
        """Forgets the readings that a rollback took back."""
        if rewind.is_rollback:
            self._waiting = [step for step in self._waiting if step <= rewind.back_to]

    def _judge(self) -> None:
        if len(self._waiting) < self.patience:
            return
        since = f" since {self._sign * self._best:.4g} at step {self._best_step}" if self._best_step >= 0 else ""
        raise StopTraining(f"the validation metric did not improve in {len(self._waiting)} readings{since}")

    def state_dict(self) -> dict[str, Any]:
        """The best reading, and those since."""
        return {"best": [self._best, self._best_step], "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counts on; a run that had ended so ends again."""
        (self._best, self._best_step), self._waiting = state["best"], list(state["waiting"])
        self._judge()
