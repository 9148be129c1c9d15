"""What a user should be told of a run, each thing once, with what to do about it."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..controller.core import Core
from ..controller.decision import UNSEEN_DECADES
from ..controller.roles import roles_of
from ..controller.state import TunerState
from ..space.search_space import Choice, SearchSpace
from ..user_warning import warn
from .recorder import LOGGER, Recorder

MANY_ROLLBACKS = 5
"""From so many rollbacks on, something is wrong that going back does not mend."""

_BAD_STEPS, BAD_SHARE = 10, 0.01
"""So many bad steps are told of where they are such a share of all, and ten times as many in any case."""

# So many metrics that are not finite are told of where they are such a share of all.
_UNUSABLE, _UNUSABLE_SHARE = 2, 0.2

# So many metrics worse than the first, and none better, are told of.
_WORSE = 8

# A value this close to a bound, in decades (of which a linear range counts four), lies at it.
_AT_BOUND_DECADES = 0.05

MISSED_SHARE = 0.3
"""Share of the budget after which a metric that has not come yet is missed, and a bound that rates lie at told of."""

HOW = "Report a validation metric whenever the tuner asks for one (eval_step, validate or observe_eval)"
"""How a metric is reported."""


class Tuned(Protocol):
    """What is looked at of an `AutoTuneNet`."""

    @property
    def space(self) -> SearchSpace:
        """What is tuned."""
        ...

    @property
    def mode(self) -> str:
        """Whether the metric is minimised or maximised."""
        ...

    @property
    def total_steps(self) -> int | None:
        """The budget, if there is one."""
        ...


class Notice(NamedTuple):
    """One thing to be told.

    Attributes:
      kind: Of which one is told in a run.
      message: What is the matter, and what to do.
    """

    kind: str
    message: str


def notices(
    tuner: Tuned,
    ts: TunerState,
    *,
    rounds: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]] = (),
    outside: Mapping[str, Any] | None = None,
    is_over: bool = False,
    how: str = HOW,
) -> list[Notice]:
    """Everything that a user should be told of a run now; whoever tells it tells each kind once (see `Notices`).

    Pure, on the host; meant to be asked after decisions and validations and at the end, not after every step.

    Args:
      tuner: The tuner.
      ts: Its state.
      rounds: `History.rounds`.
      evals: `History.evals`.
      outside: Values that the user's objects had and that lie outside the ranges, by name: the run starts elsewhere.
      is_over: Whether the run has ended.
      how: How a metric is reported in the user's framework.

    Cost: reads a dozen numbers of ``ts``, which waits for the steps under way.
    """
    total, step = tuner.total_steps, int(ts.step)
    is_late = is_over or (total is not None and step >= MISSED_SHARE * total)
    found = [_moved(tuner, name, value) for name, value in (outside or {}).items()]
    found += _bad_steps(int(ts.health.bad_steps), step)
    found += _rollbacks(int(ts.rollbacks), step) + _unusable(evals)
    if is_late and step:
        found += _no_metric(tuner, ts, rounds, evals, how) + _backwards(tuner, evals)
    # Early on, later rounds and metrics may lead away from there.
    return found + (_bounds(tuner.space, ts, rounds) if is_late or total is None else [])


@functools.lru_cache(maxsize=64)
def announce_compilation(core: Core) -> None:
    """Logs that the tuner is to be compiled, once for each core: later runs of the process find it compiled."""
    LOGGER.info("compiling the tuner, once, about 8 s; where JAX_COMPILATION_CACHE_DIR is set later processes need not")


def _moved(tuner: Tuned, name: str, value: Any) -> Notice:
    return Notice(
        f"outside {name}",
        f"{name} stands at {value:g}, which lies outside its range {tuner.space[name]!r}: the run starts inside. "
        f"Widen the range, or give initial={{{name!r}: ...}}.",
    )


def are_many(bad: int, step: int) -> bool:
    """Whether so many bad steps of a run are to be told of."""
    return bad >= _BAD_STEPS and (bad >= BAD_SHARE * step or bad >= 10 * _BAD_STEPS)


def _bad_steps(bad: int, step: int) -> list[Notice]:
    if not are_many(bad, step):
        return []
    message = (
        f"{bad} of {step} steps ({100 * bad / step:.3g} %) were skipped, since their loss, gradients or state were not "
        "finite. They move no hyperparameter, but cost what they are of the budget. Look for empty or corrupt batches, "
        "logarithms of zero, or overflow in half precision."
    )
    return [Notice("bad steps", message)]


def _rollbacks(rollbacks: int, step: int) -> list[Notice]:
    if rollbacks < MANY_ROLLBACKS:
        return []
    message = (
        f"Training went back to an earlier state {rollbacks} times in {step} steps, which costs what had been trained "
        "since. The history's events say when and why. Look at the data of those steps, clip gradients, or lower the "
        "upper bound of the learning rate where it had been high."
    )
    return [Notice("many rollbacks", message)]


def _unusable(evals: Sequence[Mapping[str, Any]]) -> list[Notice]:
    unusable = sum(not math.isfinite(row["value"]) for row in evals)
    if unusable < max(_UNUSABLE, _UNUSABLE_SHARE * len(evals)):
        return []
    message = (
        f"{unusable} of {len(evals)} validation metrics were not finite. A round that begins with such a one compares "
        "its forks by their training loss; elsewhere the state counts as worse than any. Look for corrupt rows in the "
        "validation data, or a metric that divides by zero."
    )
    return [Notice("unusable metrics", message)]


def _backwards(tuner: Tuned, evals: Sequence[Mapping[str, Any]]) -> list[Notice]:
    sign = 1.0 if tuner.mode == "min" else -1.0
    first, *later = [row["value"] for row in evals if math.isfinite(row["value"])] or [0.0]
    worse = sum(sign * value > sign * first for value in later)
    if worse < _WORSE or any(sign * value < sign * first for value in later):
        return []
    than, better, other = ("above", "larger", "max") if tuner.mode == "min" else ("below", "smaller", "min")
    message = (
        f"None of {len(later)} validation metrics was better than the first, {first:.4g}, and {worse} lay {than} it. "
        f'If {better} ones are better, give mode="{other}": as it is, training is taken back from what it learns. If '
        "not, the model had been trained before as far as this data takes it."
    )
    return [Notice("backwards", message)]


def of_slow(space: SearchSpace, how: str, *, came: str = "there is none") -> list[Notice]:
    """That slow hyperparameters stay put for want of a metric, if there are any; ``how`` one is reported."""
    slow = [name for name, role in zip(space.names, space.roles, strict=True) if role == "slow"]
    stay, they, them = (
        ("stays as it starts", "it does", "it") if len(slow) == 1 else ("stay as they start", "they do", "them")
    )
    message = (
        f"{', '.join(slow)} {stay}: only a validation metric shows what {they}, and {came}. "
        f"{how}, or leave {them} out of the search space."
    )
    return [Notice("no metric", message)] if slow else []


def _no_metric(
    tuner: Tuned, ts: TunerState, rounds: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], how: str
) -> list[Notice]:
    missed = of_slow(tuner.space, how, came="none came when it was asked for")
    if math.isfinite(ts.validation.level):
        judged = [row["scored_by"] for row in rounds if row["kind"] == "slow"]
        return missed if judged and "validation" not in judged else []
    found = missed if evals else of_slow(tuner.space, how)
    if tuner.mode == "max":
        message = 'mode="max" is about a validation metric, and no finite one came; the training loss is minimised. '
        found.append(Notice("nothing to maximise", f"{message}{how}, or leave mode out."))
    return found


def bound_at(space: SearchSpace, name: str, u: float, *, is_seen: bool, has_gone_back: bool) -> str | None:
    """Which bound of its range a value lies at, if that can be moved.

    Args:
      space: The search space.
      name: Of the hyperparameter.
      u: Place in the unit cube that training goes on at.
      is_seen: Whether there is a metric; without one rates stand a little below what won.
      has_gone_back: Whether training has: that lowers rates, and no fork has asked for it.
    """
    param, index = space[name], space.names.index(name)
    if isinstance(param, Choice):
        return None
    decades = float(roles_of(space).decades[index])
    is_rate = space.roles[index] == "rate"
    if is_rate and not is_seen:
        u = min(u + UNSEEN_DECADES / decades, 1.0)
    if (1.0 - u) * decades <= _AT_BOUND_DECADES:
        return "upper"
    # Nothing lies below zero, or below one layer.
    is_natural = param.lo == 0 or (isinstance(param.lo, int) and param.lo <= 1)
    is_led_there = is_rate and has_gone_back
    return "lower" if u * decades <= _AT_BOUND_DECADES and not is_natural and not is_led_there else None


def _decided(space: SearchSpace, rounds: Sequence[Mapping[str, Any]]) -> set[str]:
    """What forks differed in where one of them won and what was tried made a difference."""
    found: set[str] = set()
    for row in rounds:
        forks = [fork["hyperparams"] for fork in row["forks"]]
        if row["best"] >= 0 and len({tuple(fork["scores"]) for fork in row["forks"]}) > 1:
            found |= {name for name in space.names if len({fork[name] for fork in forks}) > 1}
    return found


def _bounds(space: SearchSpace, ts: TunerState, rounds: Sequence[Mapping[str, Any]]) -> list[Notice]:
    decided, is_seen = _decided(space, rounds), math.isfinite(ts.validation.level)
    places = zip(space.names, np.asarray(ts.incumbent), strict=True)
    has_gone_back = int(ts.rollbacks) > 0 or int(ts.validation.retreats) > 0
    found = [
        (name, bound_at(space, name, float(u), is_seen=is_seen, has_gone_back=has_gone_back))
        for name, u in places
        if name in decided
    ]
    return [_bound(space, name, side) for name, side in found if side]


def _bound(space: SearchSpace, name: str, side: str) -> Notice:
    message = (
        f"The best {name} lies at the {side} bound of its range {space[name]!r}: better values may lie beyond. "
        f"{'Raise' if side == 'upper' else 'Lower'} that bound."
    )
    return Notice(f"bound of {name}", message)


class Notices:
    """Tells each kind of notice once a run, also of a run that is resumed: what was told is in its history.

    Args:
      recorder: Of the run.
      through: Where notices go; a framework's own logger, perhaps.
    """

    def __init__(self, recorder: Recorder, *, through: Callable[[str], None] = warn):
        self._recorder, self._through = recorder, through
        self._told: set[str] = set()

    def tell(self, step: int, found: Iterable[Notice]) -> None:
        """Tells those that have not been told."""
        self._told |= {event["kind"] for event in self._recorder.history.events}
        for notice in found:
            if notice.kind not in self._told:
                self._told.add(notice.kind)
                self._recorder.record(step, notice.kind, notice.message)
                self._through(notice.message)
