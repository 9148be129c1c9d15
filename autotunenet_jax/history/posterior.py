"""What the surrogate made of a round, computed again from a history's forks and scores."""

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..bayesopt import kernels, surrogate, trials
from ..controller import fork_surrogate, loss_monitor
from ..controller.roles import roles_of
from ..controller.state import OUTCOME_ROUND_SKIPPED, OUTCOMES
from ..space.search_space import Choice, SearchSpace
from ..space.search_space import Float as FloatParameter
from ..space.search_space import Int as IntParameter

if TYPE_CHECKING:
    from .history import History

# As many forks as a tuner remembers by default.
_CAPACITY = 64

# Points that are asked for at a time.
_PIECE = 160


class RoundPosterior(NamedTuple):
    """The posterior at the end of a round.

    Shortfalls are in the unit that the tuner decides by: 0 is the best fork of the round, 1 one that gained nothing.

    Attributes:
      space: What is tuned.
      x: The round's forks, unit cube.
      shortfall: Theirs; NaN where a fork failed.
      best: The fork that won; -1 for none.
      config: Of the surrogate.
      posterior: The surrogate.
      time: When the round was.
    """

    space: SearchSpace
    x: Float[np.ndarray, "forks d"]
    shortfall: Float[np.ndarray, "forks"]
    best: int
    config: kernels.SurrogateConfig
    posterior: surrogate.Posterior
    time: float

    def at(self, points: Float[np.ndarray, "m d"]) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Mean and standard deviation of the shortfall at points of the unit cube.

        Only differences within a round are known, so both are those of the difference to the mean of the round's
        forks, put at the height of their scores.
        """
        is_scored = np.isfinite(self.shortfall)
        anchors = self.x[is_scored] if is_scored.any() else self.x
        level = self.shortfall[is_scored].mean() if is_scored.any() else 0.0
        # Pieces of one size, so that one program does for all.
        size = _PIECE - len(anchors)
        pieces = [points[first : first + size] for first in range(0, len(points), size)]
        found = [self._relative(piece, anchors) for piece in pieces]
        mean, deviation = (np.concatenate(part) for part in zip(*found, strict=True))
        return level + mean, deviation

    def _relative(self, points: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the difference to the mean of some anchors."""
        size, count = len(points), len(anchors)
        padding = np.repeat(anchors[:1], _PIECE - size - count, axis=0)
        everything = np.concatenate([points, anchors, padding]).astype(np.float32)
        found = _predict(self.config, self.posterior, everything, np.float32(self.time))
        mean, covariance = (np.asarray(part, np.float64)[: size + count] for part in found)
        covariance = covariance[:, : size + count]
        to_anchors = covariance[:size, size:].mean(axis=1)
        variance = np.diagonal(covariance)[:size] - 2.0 * to_anchors + covariance[size:, size:].mean()
        return mean[:size] - mean[size:].mean(), np.sqrt(np.maximum(variance, 0.0))


def space_of(history: "History") -> SearchSpace:
    """The search space that a history describes.

    Raises:
      ValueError: It describes none.
    """
    if not history.space:
        raise ValueError("this history does not know its search space: ask the history of a run, or one read from one.")

    def parameter(held: Mapping[str, Any]) -> Any:
        if "options" in held:
            return Choice([_hashable(option) for option in held["options"]], role=held["role"])
        kind = IntParameter if isinstance(held["lo"], int) else FloatParameter
        return kind(held["lo"], held["hi"], log=held["log"], role=held["role"])

    return SearchSpace({name: parameter(held) for name, held in history.space.items()})


def _hashable(option: Any) -> Any:
    """An option as it was before a way through JSON, which knows no tuples."""
    return tuple(map(_hashable, option)) if isinstance(option, list) else option


def encoded(space: SearchSpace, hyperparams: Mapping[str, Any]) -> Float[np.ndarray, "d"]:
    """A point of the unit cube."""
    values = {name: _hashable(value) for name, value in hyperparams.items()}
    return np.asarray(space.encode(values), np.float32)


def trials_of(history: "History", number: int) -> trials.Observations:
    """The forks of some rounds, from the first on, as the tuner had taken them in by the end of the last."""
    space = space_of(history)
    obs = trials.empty(_CAPACITY, space.dims)
    for place, row in enumerate(history.rounds[:number]):
        if row["outcome"] == OUTCOMES[OUTCOME_ROUND_SKIPPED]:
            continue
        for fork in row["forks"]:
            time = fork_surrogate.time_of(jnp.float32(_data_step(history, row, fork)))
            obs = _add(obs, encoded(space, fork["hyperparams"]), relative(row, fork), time, place)
    return obs


def posterior_of(history: "History", number: int) -> RoundPosterior:
    """What the surrogate said at the end of a round, from that round and those before it.

    Args:
      history: Of any run.
      number: Of the round, from 1.

    Cost: one fit; compiled once for each search space.
    """
    space, rounds = space_of(history), history.rounds[:number]
    x = np.stack([encoded(space, fork["hyperparams"]) for fork in rounds[-1]["forks"]])
    obs = trials_of(history, number)
    group, used = np.asarray(obs.group), np.asarray(trials.mask(obs))
    is_slow = np.array([row["kind"] == "slow" for row in rounds])[np.minimum(group, len(rounds) - 1)]
    evidence, posterior = _fit(space, obs, is_slow, x[0])
    shortfall = np.full(len(x), np.nan)
    mine = np.flatnonzero(used & (group == number - 1))
    # A run of very many trials may have forgotten some of a round.
    if len(mine) == len(x):
        shortfall = np.where(np.asarray(evidence.failed), np.nan, np.asarray(evidence.y))[mine]
    time = float(np.asarray(obs.time)[mine].max(initial=0.0))
    return RoundPosterior(space, x, shortfall, rounds[-1]["best"], fork_surrogate.config_of(space), posterior, time)


def relative(row: Mapping[str, Any], fork: Mapping[str, Any]) -> float:
    """A fork's score as the tuner takes it in: about where the round started, in `unit_of_scores`; NaN if it failed."""
    if not fork["scores"] or fork["status"] == "failed":
        return math.nan
    if row.get("reference") is None:
        return 0.0
    return float((np.float32(fork["scores"][0]) - np.float32(row["reference"])) / np.float32(unit_of_scores(row)))


def unit_of_scores(row: Mapping[str, Any]) -> float:
    """What the scores of a round are divided by; it divides exactly."""
    return float(loss_monitor.magnitude(jnp.float32(row["reference"])))


def _data_step(history: "History", row: Mapping[str, Any], fork: Mapping[str, Any]) -> int:
    """Where in the data a fork ended; where data went on instead of back, how many steps had been kept by then."""
    index = history.index_at(fork["end"])
    if history.is_paired and index >= 0 and "data_step" in history.records[index]:
        found = history.records[index]
        return found["data_step"] + fork["end"] - found["step"]
    start = row["start"]
    return start - sum(min(end, start) - begin for begin, end in history.discarded if begin < start) + fork["steps"]


@jax.jit
def _add(
    obs: trials.Observations, x: Float[Array, "d"], y: Array | float, time: Array | float, group: Array | int
) -> trials.Observations:
    return trials.add(obs, x, jnp.asarray(y, jnp.float32), time=time, group=group)


@functools.partial(jax.jit, static_argnums=0)
def _fit(
    space: SearchSpace, obs: trials.Observations, is_slow: Bool[Array, "n"], start: Float[Array, "d"]
) -> tuple[trials.Observations, surrogate.Posterior]:
    evidence = fork_surrogate.shortfalls(obs, resolution=fork_surrogate.resolution_of(is_slow))
    config, prior = fork_surrogate.config_of(space), fork_surrogate.prior_about(roles_of(space), start)
    return evidence, fork_surrogate.fitted(config, evidence, prior)


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    config: kernels.SurrogateConfig, posterior: surrogate.Posterior, points: Float[Array, "m d"], time: Array | float
) -> tuple[Float[Array, "m"], Float[Array, "m m"]]:
    return surrogate.predict(config, posterior, points, time=time)
