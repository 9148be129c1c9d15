"""When rounds of forks are held, how many forks they have and how long those are.

A plan is made once, on the host, from the budget and the search space. It is data, not code: the compiled controller
reads it from arrays, so two budgets share one compilation.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from ..space.search_space import SearchSpace

FAST, SLOW = 0, 1
KINDS = ("fast", "slow")

MAX_FORKS = 8
"""Most forks a round can hold; sizes the controller's arrays."""

MAX_ROUNDS = 32
"""Most rounds a plan can hold."""

MAX_RANGE_TEST = 120
"""Most steps of a range test."""

NEVER = 2**30
"""A step count no run reaches."""

MIN_TOTAL_STEPS = 40
"""Fewest steps of a run: a range test takes most of what may be discarded of it."""

# Up to so many steps forks are shares of the run; beyond, they grow with this power of it, so that the discarded share
# falls: what a short comparison can tell does not need ten times the steps in a run ten times as long.
_REFERENCE_STEPS = 1000
_LENGTH_EXPONENT = 0.7

# Steps of the shortest range test and of the shortest fork that tell anything.
_LEAST_RANGE_TEST, _LEAST_FORK = 16, 20
# Fewest forks that tell both sides of a rate.
_LEAST_FORKS = 3

_FIRST_OPEN_ROUND = 500

# Most of a short run that may be discarded unless the user says otherwise.
_MOST_SHARE = 0.4


class Plan(NamedTuple):
    """Rounds in order of their start; arrays over rounds, then scalars.

    Attributes:
      start: Budget step at which the round may begin; `NEVER` pads.
      kind: `FAST` (rates and other hyperparameters that show within a few steps) or `SLOW`.
      forks: Most forks of the round.
      length: Steps of a fork.
      range_test: Steps of the range test held before the round; 0 for none.
      total: Steps of the whole run; 0 when it is not known.
      share: Share of the budget that may be discarded.
      fast_share: Share that may have been by the end of a fast round; less where slow rounds are to come.
      save_every: Steps between the snapshots taken outside rounds: a fiftieth of the run, but 20 to 500.
      check_every: Steps between two readings of the validation metric that count.
    """

    start: Int[Array | np.ndarray, "rounds"]
    kind: Int[Array | np.ndarray, "rounds"]
    forks: Int[Array | np.ndarray, "rounds"]
    length: Int[Array | np.ndarray, "rounds"]
    range_test: Int[Array | np.ndarray, "rounds"]
    total: Array | np.int32
    share: Array | np.float32
    fast_share: Array | np.float32
    save_every: Array | np.int32
    check_every: Array | np.int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The proportions a plan is made with, as shares of the run.

    Args:
      range_test: Length of the range test.
      first: Length of a fork of the first round.
      first_forks: Most forks of it for one fast hyperparameter; one more for each further one.
      second: Length of a fork of the second round.
      second_start: When that begins.
      second_forks: Most forks of it, likewise.
      slow: Length of a slow fork.
      slow_forks: Forks of a slow round.
      slow_starts: When slow rounds begin.
      slow_least: Steps of a slow fork below which a run holds one slow round of two forks only: what shows slowly
        hardly shows in them, and a short run has few steps to give away.
      fast_share: Most of the budget that may be discarded in a run of a thousand steps; more in shorter runs and less
        in longer ones, as forks go.
      slow_share: The same when slow hyperparameters are tuned too.
      check: How far apart readings of the validation metric are.
    """

    range_test: float = 0.03
    first: float = 0.03
    first_forks: int = 6
    second: float = 0.04
    second_start: float = 0.12
    second_forks: int = 4
    slow: float = 0.08
    slow_forks: int = 4
    slow_starts: tuple[float, ...] = (0.4, 0.65)
    slow_least: int = 60
    fast_share: float = 0.25
    slow_share: float = 0.45
    check: float = 0.05


class _Row(NamedTuple):
    start: int = NEVER
    kind: int = FAST
    forks: int = 0
    length: int = 1
    range_test: int = 0


def _scaled(share: float, total_steps: int) -> float:
    """Steps that ``share`` of a run stands for: proportional up to the reference length, then sublinear."""
    excess = max(total_steps / _REFERENCE_STEPS, 1.0)
    return share * total_steps * excess ** (_LENGTH_EXPONENT - 1.0)


def _default_share(recipe: Recipe, total_steps: int | None) -> float:
    relative = (total_steps or _REFERENCE_STEPS) / _REFERENCE_STEPS
    return min(recipe.fast_share * relative ** (_LENGTH_EXPONENT - 1.0), _MOST_SHARE)


def _first_rounds(recipe: Recipe, space: SearchSpace, total_steps: int, cap: float) -> list[_Row]:
    """The range test with the first round, and the second round, as far as the cap leaves room for them."""
    has_rate = "rate" in space.roles
    extra = max(sum(role != "slow" for role in space.roles) - 1, 0)
    wanted = max(round(_scaled(recipe.range_test, total_steps)), _LEAST_RANGE_TEST)
    test = min(wanted, MAX_RANGE_TEST, int(cap)) if has_rate and cap >= _LEAST_RANGE_TEST else 0
    first = max(round(_scaled(recipe.first, total_steps)), _LEAST_FORK)
    if test + (_LEAST_FORKS - 1) * first > cap:
        # A run so short only takes what its range test says.
        return [_Row(0, FAST, 0, 1, test)] if test else []
    second = max(round(_scaled(recipe.second, total_steps)), _LEAST_FORK)
    start = math.ceil(recipe.second_start * total_steps)
    # Room is left for a fork of the second round: what short forks ask for is to be asked again.
    room = max(int((cap - test - second) // first) + 1, _LEAST_FORKS)
    forks = min(recipe.first_forks + extra, MAX_FORKS, room)
    return [
        _Row(0, FAST, forks, first, test),
        _Row(start, FAST, min(recipe.second_forks + extra, MAX_FORKS), second),
    ]


def _slow_rounds(recipe: Recipe, total_steps: int, *, has_fast: bool) -> list[_Row]:
    length = max(round(recipe.slow * total_steps), _LEAST_FORK)
    is_short = has_fast and length < recipe.slow_least
    forks = min(recipe.slow_forks, 2) if is_short else recipe.slow_forks
    starts = recipe.slow_starts[: 1 if is_short else None]
    return [_Row(math.ceil(start * total_steps), SLOW, forks, length) for start in starts]


def _open_rounds(recipe: Recipe, space: SearchSpace, share: float) -> list[_Row]:
    """Rounds at doubling intervals."""
    has_fast, has_slow = any(role != "slow" for role in space.roles), "slow" in space.roles
    rows = _first_rounds(recipe, space, _REFERENCE_STEPS, share * _REFERENCE_STEPS)[:1] if has_fast else []
    start = _FIRST_OPEN_ROUND
    while len(rows) + 2 < MAX_ROUNDS and start < NEVER // 2:
        length = max(round(recipe.second * start), 10)
        if has_fast:
            rows.append(_Row(start, FAST, recipe.second_forks, length))
        if has_slow:
            rows.append(_Row(start, SLOW, recipe.slow_forks, 2 * length))
        start *= 2
    return rows


def make(space: SearchSpace, total_steps: int | None, *, recipe: Recipe, share: float | None = None) -> Plan:
    """The plan for a budget and a space.

    Args:
      space: What may be tuned.
      total_steps: Steps of the whole run, forks included, or None when open-ended: rounds then come at doubling
        intervals.
      recipe: Proportions.
      share: Most of the budget that may be discarded, in (0, 1); None takes the recipe's.

    Returns:
      A `Plan` of NumPy arrays.

    Raises:
      ValueError: ``total_steps`` or ``share`` leaves no room for a range test or a fork.
    """
    has_fast, has_slow = any(role != "slow" for role in space.roles), "slow" in space.roles
    usual = _default_share(recipe, total_steps)
    if share is None:
        share = recipe.slow_share if has_slow else usual
    fast_share = share * min(usual / recipe.slow_share, 1.0) if has_slow else share
    if total_steps is None:
        rows = _open_rounds(recipe, space, fast_share)
    else:
        if total_steps < MIN_TOTAL_STEPS:
            raise ValueError(
                f"total_steps must be at least {MIN_TOTAL_STEPS} to tune anything; got {total_steps}. "
                "Train longer, or train without the tuner."
            )
        rows = _first_rounds(recipe, space, total_steps, fast_share * total_steps) if has_fast else []
        rows += _slow_rounds(recipe, total_steps, has_fast=has_fast) if has_slow else []
        if not rows:
            raise ValueError(
                f"discarded steps may take {share * total_steps:.1f} of {total_steps} steps, and a range test needs "
                f"{_LEAST_RANGE_TEST}, a fork {_LEAST_FORK}. Raise max_share or total_steps."
            )
    # The last row stays empty: a run that has held every round waits there.
    rows += [_Row()] * (MAX_ROUNDS - len(rows))
    columns = {name: np.array([getattr(row, name) for row in rows], np.int32) for name in _Row._fields}
    budget = total_steps or 5000
    return Plan(
        **columns,
        total=np.int32(total_steps or 0),
        share=np.float32(share),
        fast_share=np.float32(fast_share),
        save_every=np.int32(min(max(budget // 50, 20), 500)),
        check_every=np.int32(max(round(recipe.check * budget), 10)),
    )
