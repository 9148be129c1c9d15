"""When to hold rounds of forks, how many forks, how long, and for which hyperparameters.

A plan is made once, on the host, from the budget and the search space. It is data, not code: the compiled controller
reads it from arrays, so two budgets share one compilation.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._space import SearchSpace

FAST, SLOW, RAISE = 0, 1, 2

MAX_FORKS = 8
"""Most forks a round can hold; sizes the controller's arrays."""

MAX_ROUNDS = 32
"""Most rounds a plan can hold."""

MAX_SWEEP = 120
"""Most steps of a range sweep."""

LEAST_EXPLORING = 3
"""Fewest forks of a round of which all are given away: fewer do not tell enough for that."""

NEVER = 2**30
"""A step count no run reaches."""

# Below this many steps a round has no room to show anything (FINDINGS: forks of at least ten steps).
MIN_TOTAL_STEPS = 64

# Rounds are sized for runs of about a thousand steps; longer runs need less than proportionally longer forks.
_REFERENCE_STEPS = 1000
_LENGTH_EXPONENT = 0.75

# Steps of the shortest fork that can be scored, of the shortest that means something, of the shortest sweep that shows
# a minimum, and of the shortest fork worth holding in a run whose rate is known already.
_LEAST_FORK, _SHORT_FORK, _LEAST_SWEEP, _LEAST_RAISED = 2, 5, 6, 10


class Plan(NamedTuple):
    """Rounds in order of their start; arrays over rounds, then scalars.

    Attributes:
      start: Budget step at which the round may begin; `NEVER` pads.
      kind: `FAST` (rates and other hyperparameters that show within a few steps), `SLOW`, or `RAISE` (whether higher
        rates are better by now).
      forks: Most forks of the round.
      early: Steps after which a fork is scored for the first time; weak ones are dropped there.
      late: Steps of a fork that runs to its end; equal to ``early`` when there is one score only.
      sweep: Steps of the range sweep held first; 0 for none.
      total: Steps of the whole run; 0 when it is not known.
      share: Share of the budget that may be spent on discarded fork steps.
      save_every: Steps between the snapshots taken outside rounds.
    """

    start: Int[Array | np.ndarray, "rounds"]
    kind: Int[Array | np.ndarray, "rounds"]
    forks: Int[Array | np.ndarray, "rounds"]
    early: Int[Array | np.ndarray, "rounds"]
    late: Int[Array | np.ndarray, "rounds"]
    sweep: Int[Array | np.ndarray, "rounds"]
    total: Array | np.int32
    share: Array | np.float32
    save_every: Array | np.int32


def only_raises(plan: Plan, index: Array) -> Bool[Array, ""]:
    """Whether no round is to come from row ``index`` on but the one that raises rates."""
    start, kind = jnp.asarray(plan.start), jnp.asarray(plan.kind)
    return (start[index] >= NEVER) | ((kind[index] == RAISE) & (start[index + 1] >= NEVER))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The proportions a plan is made with, as shares of the run.

    Args:
      sweep: Length of the range sweep.
      early: First score of a fast fork.
      late: Full length of a fast fork.
      fast_forks: Forks of the first fast round for one hyperparameter; one more for each further one.
      raised: Length of a fork of the round that raises rates.
      raise_start: When that round begins.
      raise_forks: Most forks of it, so that steps are left for slow rounds.
      slow: Length of a slow fork.
      slow_forks: Forks of a slow round.
      slow_starts: When slow rounds begin.
      slow_least: Steps of a slow fork below which a run holds one slow round of two forks only: what shows slowly
        hardly shows in them, and a short run has few steps to give away.
      first_share: Most of the budget that the first round may take.
      fast_share: Most of the budget that all discarded steps may take.
      slow_share: The same when slow hyperparameters are tuned too.
    """

    sweep: float = 0.03
    early: float = 0.02
    late: float = 0.02
    fast_forks: int = 6
    raised: float = 0.04
    raise_start: float = 0.2
    raise_forks: int = 4
    slow: float = 0.08
    slow_forks: int = 4
    slow_starts: tuple[float, ...] = (0.4, 0.65)
    slow_least: int = 60
    first_share: float = 0.15
    fast_share: float = 0.2
    slow_share: float = 0.45


def _scaled(share: float, total_steps: int) -> float:
    """Steps that ``share`` of a run stands for: proportional up to the reference length, then sublinear."""
    excess = max(total_steps / _REFERENCE_STEPS, 1.0)
    return share * total_steps * excess ** (_LENGTH_EXPONENT - 1.0)


def _fast_round(recipe: Recipe, space: SearchSpace, total_steps: int, cap: float) -> dict[str, int]:
    has_rate = "rate" in space.roles
    dims = sum(role != "slow" for role in space.roles)
    forks = min(recipe.fast_forks + dims - 1, MAX_FORKS)
    # The cap comes first: a sweep leaves half of it to the forks, or at least one fork, or is not held.
    sweep = min(
        max(round(_scaled(recipe.sweep, total_steps)), 8), MAX_SWEEP, max(int(cap / 2), 8), int(cap) - _LEAST_FORK
    )
    sweep = sweep if has_rate and sweep >= _LEAST_SWEEP else 0
    wanted = max(_scaled(recipe.late, total_steps), _SHORT_FORK)
    # Forks too short to be told apart are no use: where the cap is tight there are fewer of them.
    affordable = max(int((cap - sweep) / min(wanted, _SHORT_FORK)), 1)
    if sweep and min(forks, affordable) >= LEAST_EXPLORING:
        forks = lost = min(forks, affordable)
    else:
        # Steps are too few to give the winner's away.
        lost = 1 if sweep else min(forks - 1, affordable)
        forks = lost + 1
    late = int(min(wanted, (cap - sweep) / lost))
    if late < _LEAST_FORK:
        raise ValueError(
            f"discarded fork steps may take {cap:.1f} of {total_steps} steps, and a round of forks needs at least "
            f"{_LEAST_FORK}. Raise max_share or total_steps."
        )
    early = min(max(round(late * recipe.early / recipe.late), 6), late)
    # A stretch of one step has no step before its last: the tuner could not ask for a validation metric in it.
    early = early if late - early > 1 else late
    return {"kind": FAST, "forks": forks, "early": early, "late": late, "sweep": sweep}


def make(space: SearchSpace, total_steps: int | None, *, recipe: Recipe, share: float | None = None) -> Plan:
    """The plan for a budget and a space.

    Args:
      space: What may be tuned.
      total_steps: Steps of the whole run, forks included, or None when open-ended: rounds then come at doubling
        intervals.
      recipe: Proportions.
      share: Most of the budget that discarded fork steps may take, in (0, 1); None takes the recipe's.

    Returns:
      A `Plan` of NumPy arrays.

    Raises:
      ValueError: ``total_steps`` or ``share`` leaves no room for a round.
    """
    has_fast = any(role != "slow" for role in space.roles)
    has_slow = "slow" in space.roles
    share = (recipe.slow_share if has_slow else recipe.fast_share) if share is None else share
    if total_steps is not None and total_steps < MIN_TOTAL_STEPS:
        raise ValueError(
            f"total_steps must be at least {MIN_TOTAL_STEPS} to hold one round of forks; got {total_steps}. "
            "Train longer, or train without the tuner."
        )
    rounds = []
    if total_steps is None:
        first = _fast_round(recipe, space, _REFERENCE_STEPS, min(share, recipe.first_share) * _REFERENCE_STEPS)
        slow = {"kind": SLOW, "forks": recipe.slow_forks, "sweep": 0}
        if has_fast:
            rounds.append({"start": 0, **first})
        start = 500
        while len(rounds) + 1 < MAX_ROUNDS and start < NEVER // 2:
            length = max(round(0.04 * start), 10)
            if has_fast:
                rounds.append({"start": start, **first, "early": length, "late": length, "sweep": 0})
            if has_slow:
                rounds.append({"start": start, **slow, "early": 2 * length, "late": 2 * length})
            start *= 2
    else:
        if has_fast:
            cap = min(share, recipe.first_share) * total_steps
            rounds.append({"start": 0, **_fast_round(recipe, space, total_steps, cap)})
        length = round(_scaled(recipe.raised, total_steps))
        if "rate" in space.roles and length >= _LEAST_RAISED:
            rounds.append({"start": math.ceil(recipe.raise_start * total_steps), "kind": RAISE,
                           "forks": recipe.raise_forks, "early": length, "late": length, "sweep": 0})  # fmt: skip
        if has_slow:
            length = max(round(recipe.slow * total_steps), 8)
            is_short = has_fast and length < recipe.slow_least
            forks = min(recipe.slow_forks, 2) if is_short else recipe.slow_forks
            for start in recipe.slow_starts[: 1 if is_short else None]:
                rounds.append({"start": math.ceil(start * total_steps), "kind": SLOW, "forks": forks,
                               "early": length, "late": length, "sweep": 0})  # fmt: skip
    # The last row stays empty: a run that has held every round waits there.
    rounds = rounds[: MAX_ROUNDS - 1]
    padding = [{"start": NEVER, "kind": FAST, "forks": 0, "early": 1, "late": 1, "sweep": 0}]
    rounds += padding * (MAX_ROUNDS - len(rounds))
    columns = {name: np.array([row[name] for row in rounds], np.int32) for name in Plan._fields[:6]}
    return Plan(
        **columns,
        total=np.int32(total_steps or 0),
        share=np.float32(share),
        save_every=np.int32(min(max((total_steps or 5000) // 50, 20), 500)),
    )
