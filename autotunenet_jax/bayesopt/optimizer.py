"""A black-box optimiser on its own: ask for a point, tell its score."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..compiler.precision import in_float32
from ..compiler.sequential_vmap import sequential_vmap
from ..space.search_space import SearchSpace
from .acquisition import propose
from .kernels import Hyper, SurrogateConfig, initial_hyper
from .quasi_random import branches, spread_table, turned, uniforms
from .surrogate import Posterior, fit, noise_deviation, predict
from .trials import Observations, add, empty, mask

# References compared by the acquisition, besides those of a batch.
_COMPARED = 16
# With room for so many observations the fit is what costs, and most of the time there are so many that one more hardly
# moves the hyperparameters: the warm start needs fewer rivals.
_LONG = 128
# Standard deviations of the lower confidence bound that is minimised where the objective moves.
_CONFIDENCE = 1.0
# Typical lengthscale over sqrt(d). The sqrt(2) of the usual dimension-scaled prior, in logarithms, suits hundreds of
# dimensions and costs regret in two to six. Where the objective moves a shape that was seen in part, and long ago, must
# not be taken for known everywhere.
_LENGTHSCALE, _LENGTHSCALE_DRIFT = 1.0, 0.25
# How far above the median scores keep their values, in standard deviations of the better half: where every trial
# counts it matters how bad the worse half is.
_KEPT, _KEPT_DRIFT = 0.2, 1.5
# Side of the trust region: at first, at least, at most; doubled after three improvements in a row.
_SIDE, _SIDE_MIN, _SIDE_MAX = 0.8, 2.0**-7, 1.6
_WINS = 3


class Region(NamedTuple):
    """A trust region: a box around the best point, which grows with success and shrinks without."""

    side: Float[Array, ""]
    """Share of the cube's side."""
    streak: Int[Array, ""]
    """Improvements in a row, or trials without one, negative."""


class OptimizerState(NamedTuple):
    """Everything `BayesianOptimizer` knows: a pytree of arrays."""

    observations: Observations
    hyper: Hyper
    noise: Float[Array, ""]
    """Standard deviation of the scores' noise as fitted last, in their unit; 0 before the first fit."""
    region: Region
    unit: Float[Array, ""]
    """What scores are divided by: a power of two near the first that is not zero; 0 before there is one."""
    key: PRNGKeyArray
    asked: Int[Array, ""]
    """How many points were ever suggested."""
    design: Float[Array, "initial d"]
    """The space-filling points that come before the surrogate decides."""


def _unit(state: OptimizerState) -> Float[Array, ""]:
    return jnp.where(state.unit == 0.0, 1.0, state.unit)


class BayesianOptimizer:
    """Minimises a function of a few hyperparameters that is expensive or noisy, in pure functions.

    All methods are pure and work under ``jax.jit`` and ``jax.vmap``; nothing recompiles as observations arrive. Scores
    may have any scale and offset, as far as float32 still tells them apart.

    Example:
        >>> optimizer = BayesianOptimizer({"x": (0.0, 1.0)}, capacity=16)
        >>> suggest, observe = jax.jit(optimizer.suggest), jax.jit(optimizer.observe)
        >>> state = optimizer.init(jax.random.key(0))
        >>> for _ in range(12):
        ...     point, state = suggest(state)
        ...     state = observe(state, point, (point["x"] - 0.3) ** 2)
        >>> bool(abs(optimizer.best(state)["x"] - 0.3) < 0.02)
        True

    Args:
      space: A `SearchSpace` or anything it accepts.
      capacity: Most observations remembered at a time. Cost grows with its cube, whatever the number of observations.
        Beyond it each new observation takes the place of the oldest that is not among the best quarter, failures
        counting as worst; with `has_drift`, of the oldest.
      initial: Points of a space-filling design before the surrogate decides; ``2 (d + 1)`` at most 16 by default,
        ``d + 2`` at most 16 with `has_drift`.
      has_drift: Whether the objective moves with time. Old observations then count the less the older they are, and
        what is sought is the minimum at the time of the suggestion. Every trial counts, not only the best: suggestions
        minimise a lower confidence bound of one standard deviation instead of maximising the expected improvement.
      drift_time: In how much time the objective becomes another one, roughly; the fit corrects it. By default the unit
        is one observation.
      has_groups: Whether scores carry an unknown offset that all observations with the same ``group`` share: the level
        of a round, a machine or a batch of data. Only differences within a group then say where the minimum lies.
      has_trust_region: Whether suggestions stay in a box around the best point, whose side halves after ``max(4, d)``
        trials without improvement and doubles after three improvements in a row. For many dimensions.

    Raises:
      ValueError: A size or time that makes no sense.
    """

    def __init__(
        self,
        space: Any,
        capacity: int = 64,
        *,
        initial: int | None = None,
        has_drift: bool = False,
        drift_time: float = 20.0,
        has_groups: bool = False,
        has_trust_region: bool = False,
    ):
        self.space = SearchSpace(space)
        dims = self.space.dims
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 observations; got {capacity!r}.")
        if initial is not None and initial < 1:
            raise ValueError(f"initial must be at least 1 point; got {initial!r}. Leave it out for the default.")
        if not 0.0 < drift_time < math.inf:
            raise ValueError(f"drift_time must be above zero and finite; got {drift_time!r}.")
        self.capacity = capacity
        self.initial = min(dims + 2 if has_drift else 2 * (dims + 1), 16) if initial is None else initial
        self.has_drift = has_drift
        self.has_groups = has_groups
        self.has_trust_region = has_trust_region
        self.config = SurrogateConfig(
            dims=dims,
            is_categorical=tuple(bool(flag) for flag in self.space.is_categorical),
            has_time=has_drift,
            has_groups=has_groups,
            lengthscale_loc=(math.log((_LENGTHSCALE_DRIFT if has_drift else _LENGTHSCALE) * dims**0.5),) * dims,
            time_loc=math.log(drift_time),
            kept=_KEPT_DRIFT if has_drift else _KEPT,
            fit_starts=2 if capacity >= _LONG else 3,
            fit_steps=12 if capacity >= _LONG else 16,
        )

    @in_float32
    def init(self, key: PRNGKeyArray) -> OptimizerState:
        """An optimiser that has seen nothing."""
        dims = self.space.dims
        key, design_key = jax.random.split(key)
        design = turned(spread_table(self.initial, dims), uniforms(design_key, dims))
        if self.has_drift:
            # Where the worst that can be met is least bad, as Google Vizier starts.
            design = jnp.concatenate([jnp.full((1, dims), 0.5, jnp.float32), design[1:]])
        return OptimizerState(
            observations=empty(self.capacity, dims),
            hyper=initial_hyper(self.config),
            noise=jnp.float32(0.0),
            region=Region(jnp.float32(_SIDE), jnp.int32(0)),
            unit=jnp.float32(0.0),
            key=key,
            asked=jnp.zeros((), jnp.int32),
            design=self.space.snap(design),
        )

    @in_float32
    def suggest(
        self, state: OptimizerState, count: int | None = None, *, time: Any = None
    ) -> tuple[dict[str, Array], OptimizerState]:
        """The next point to evaluate, or the next ``count`` to evaluate at once.

        Args:
          state: What the optimiser knows.
          count: Static. With a number, arrays have a leading axis of that length: each point of the batch improves on
            the joint posterior of the observed points and of those before it in the batch.
          time: When the points will run, with `has_drift`; one unit after the last observation by default.

        Returns:
          Physical values by name, and the new state.

        Cost:
          One fit, O(capacity^3), and ``count`` acquisitions, whatever the number of observations.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1; got {count!r}.")
        return self._suggest(count, state, time)

    @sequential_vmap(static_argnums=(0, 1))
    def _suggest(self, count: int | None, state: OptimizerState, time: Any) -> tuple[dict[str, Array], OptimizerState]:
        size = 1 if count is None else count
        obs, dims = state.observations, self.space.dims
        key, fit_key, propose_key = branches(state.key, 3)
        used = mask(obs)
        now = self._time(obs, time)
        posterior = fit(self.config, obs, start=state.hyper, key=fit_key, noise=state.noise / _unit(state))
        lower, upper = self._box(state, posterior, now)

        reference = jnp.where(used[:, None], obs.x, 0.5)
        is_reference = used & ~obs.failed
        if size > 1:
            reference = jnp.concatenate([reference, np.full((size, dims), 0.5, np.float32)])
            is_reference = jnp.concatenate([is_reference, np.zeros(size, bool)])
        pending = jnp.arange(used.size + size) >= used.size if size > 1 else None

        def one(carry, inputs):
            reference, is_reference = carry
            slot, sub = inputs
            point = propose(
                self.config,
                posterior,
                sub,
                lower=lower,
                upper=upper,
                snap=self.space.snap,
                reference=reference,
                reference_mask=is_reference,
                pending=pending,
                time=now,
                compared=_COMPARED + size - 1,
                confidence=_CONFIDENCE if self.has_drift else None,
            )
            is_design = obs.count + slot < self.initial
            point = jnp.where(is_design, state.design[(state.asked + slot) % self.initial], point)
            if size == 1:
                return carry, point
            index = used.size + slot
            return (reference.at[index].set(point), is_reference.at[index].set(True)), point

        if count is None:
            _, points = one((reference, is_reference), (0, propose_key))
        else:
            inputs = (np.arange(size), branches(propose_key, size))
            _, points = jax.lax.scan(one, (reference, is_reference), inputs)
        noise = noise_deviation(posterior) * _unit(state)
        state = state._replace(key=key, hyper=posterior.hyper, noise=noise, asked=state.asked + size)
        return self.space.decode(points), state

    @in_float32
    def observe(
        self, state: OptimizerState, x: Mapping[str, Any], y: Any, *, noise: Any = 0.0, time: Any = None, group: Any = 0
    ) -> OptimizerState:
        """Records the score of a point, suggested or not.

        Args:
          state: What the optimiser knows.
          x: Physical values by name; clipped to the space.
          y: Score, minimised. Non-finite marks a failure. With a leading axis of k, k points at once.
          noise: Known variance of the score, as for `y`, on top of the noise that is learnt; 0 if unknown.
          time: When the points ran, with `has_drift`, as for `y`; by default each one unit after the one before.
          group: Integer; points with the same one share an offset, with `has_groups`. As for `y`.

        Returns:
          The new state.
        """
        point = self.space.snap(self.space.encode(x)).reshape(-1, self.space.dims)
        y = jnp.asarray(y, jnp.float32)

        def column(value, dtype):
            return jnp.broadcast_to(jnp.asarray(value, dtype), y.shape).reshape(-1)

        times = column(jnp.nan if time is None else time, jnp.float32)

        def record(carry, trial):
            obs, region, unit = carry
            where, score, variance, when, which = trial
            is_first = (unit == 0.0) & jnp.isfinite(score) & (score != 0.0)
            exponent = jnp.clip(jnp.frexp(jnp.where(is_first, score, 1.0))[1], -100, 100)
            unit = jnp.where(is_first, jnp.ldexp(jnp.float32(1.0), exponent), unit)
            scale = jnp.where(unit == 0.0, 1.0, unit)
            # All scores before were zero, their variances perhaps not.
            obs = obs._replace(noise=jnp.where(is_first, obs.noise / scale / scale, obs.noise))
            score, variance = score / scale, variance / scale / scale
            when = jnp.where(jnp.isfinite(when), when, self._time(obs, None))
            region = self._resized(region, obs, score)
            obs = add(
                obs,
                where,
                score,
                noise=variance,
                time=when,
                group=which,
                # The best of an objective that moved away is no better than the rest.
                keep_best=0.0 if self.has_drift else 0.25,
            )
            return (obs, region, unit), None

        trials = (point, y.reshape(-1), column(noise, jnp.float32), times, column(group, jnp.int32))
        (obs, region, unit), _ = jax.lax.scan(record, (state.observations, state.region, state.unit), trials)
        return state._replace(observations=obs, region=region, unit=unit)

    @in_float32
    def best(self, state: OptimizerState, *, time: Any = None) -> dict[str, Array]:
        """Physical values of the best observed point.

        That is the one with the lowest score; with `has_drift` or `has_groups`, where scores do not compare, the one
        with the lowest posterior mean at ``time``, at the cost of a fit.

        Args:
          state: What the optimiser knows.
          time: As for `suggest`.

        Raises:
          ValueError: No point has a score yet. Under jit, where that is not known, it is any point of the space.
        """
        obs = state.observations
        usable = mask(obs) & ~obs.failed
        if not isinstance(usable, Tracer) and not usable.any():
            raise ValueError("no point has a score yet, so none is the best. Tell observe a finite one first.")
        score = obs.y
        if self.has_drift or self.has_groups:
            posterior = fit(self.config, obs, start=state.hyper, key=state.key, noise=state.noise / _unit(state))
            score, _ = predict(self.config, posterior, obs.x, time=self._time(obs, time))
        return self.space.decode(obs.x[_lowest(obs, score)])

    def _time(self, obs: Observations, time: Any) -> Float[Array, ""]:
        if time is not None:
            return jnp.asarray(time, jnp.float32)
        # Used slots are a leading run in the order of arrival.
        last = obs.time[jnp.clip(obs.count - 1, 0, self.capacity - 1)]
        return jnp.where(obs.count > 0, last + 1.0, 0.0)

    def _box(self, state: OptimizerState, posterior: Posterior, now: Float[Array, ""]):
        """Where to look: everywhere, or in the trust region."""
        lower, upper = (jnp.asarray(np.full(self.space.dims, edge, np.float32)) for edge in (0.0, 1.0))
        if not self.has_trust_region:
            return lower, upper
        obs = state.observations
        mean, _ = predict(self.config, posterior, obs.x, time=now)
        centre = obs.x[_lowest(obs, mean)]
        # Nothing is near or far among options without order.
        is_bounded = ~jnp.asarray(self.space.is_categorical) & jnp.any(mask(obs) & ~obs.failed)
        half = 0.5 * state.region.side
        lower = jnp.where(is_bounded, jnp.maximum(centre - half, 0.0), lower)
        return lower, jnp.where(is_bounded, jnp.minimum(centre + half, 1.0), upper)

    def _resized(self, region: Region, obs: Observations, score: Float[Array, ""]) -> Region:
        """The trust region after one more trial; it starts anew when it has become too small."""
        usable = mask(obs) & ~obs.failed
        is_win = jnp.isfinite(score) & (score < jnp.min(jnp.where(usable, obs.y, jnp.inf)))
        streak = jnp.where(is_win, jnp.maximum(region.streak, 0) + 1, jnp.minimum(region.streak, 0) - 1)
        # The design belongs to no region.
        streak = jnp.where(obs.count < self.initial, 0, streak)
        grows, shrinks = streak >= _WINS, streak <= -max(4, self.space.dims)
        side = jnp.where(grows, jnp.minimum(2.0 * region.side, _SIDE_MAX), region.side)
        side = jnp.where(shrinks, 0.5 * side, side)
        return Region(jnp.where(side < _SIDE_MIN, _SIDE, side), jnp.where(grows | shrinks, 0, streak))


def _lowest(obs: Observations, score: Float[Array, "n"]) -> Int[Array, ""]:
    return jnp.argmin(jnp.where(mask(obs) & ~obs.failed, score, jnp.inf))
