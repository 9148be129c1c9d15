"""A black-box optimiser on its own: ask for a point, tell its score."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._acquisition import propose
from ._observations import Observations, add, empty, mask
from ._sampling import spread_table, turned, uniforms
from ._space import SearchSpace
from ._surrogate import Hyper, SurrogateConfig, fit, initial_hyper


class EngineState(NamedTuple):
    """Everything `BayesianOptimizer` knows: a pytree of arrays."""

    observations: Observations
    hyper: Hyper
    key: PRNGKeyArray
    asked: Int[Array, ""]
    """How many points were ever suggested."""
    design: Float[Array, "initial d"]
    """The space-filling points that come before the surrogate decides."""


class BayesianOptimizer:
    """Minimises a function of a few hyperparameters that is expensive or noisy, in pure functions.

    All three methods are pure and work under ``jax.jit`` and ``jax.vmap``; nothing recompiles as observations arrive.

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
      capacity: Most observations remembered at a time. Cost grows with its cube, whatever the number of observations;
        beyond it `observations.add` says which are forgotten.
      initial: Points of a space-filling design before the surrogate decides; ``2 (d + 1)`` at most 16 by default.
      has_drift: Whether the objective moves with time; then one observation is one unit of time.
    """

    def __init__(self, space: Any, capacity: int = 64, *, initial: int | None = None, has_drift: bool = False):
        self.space = SearchSpace(space)
        dims = self.space.dims
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 observations; got {capacity!r}.")
        if initial is not None and initial < 1:
            raise ValueError(f"initial must be at least 1 point; got {initial!r}. Leave it out for the default.")
        self.capacity = capacity
        self.initial = min(2 * (dims + 1), 16) if initial is None else initial
        self.has_drift = has_drift
        self.config = SurrogateConfig(
            dims=dims,
            is_categorical=tuple(bool(flag) for flag in self.space.is_categorical),
            has_time=has_drift,
            # Without the sqrt(2) of the usual dimension-scaled prior, which suits hundreds of dimensions and costs
            # regret in two to six.
            lengthscale_loc=(0.5 * math.log(dims),) * dims,
            time_loc=3.0,
        )

    def init(self, key: PRNGKeyArray) -> EngineState:
        """An optimiser that has seen nothing."""
        dims = self.space.dims
        key, design_key = jax.random.split(key)
        return EngineState(
            observations=empty(self.capacity, dims),
            hyper=initial_hyper(self.config),
            key=key,
            asked=jnp.zeros((), jnp.int32),
            design=self.space.snap(
                turned(spread_table(self.initial, self.space.dims), uniforms(design_key, self.space.dims))
            ),
        )

    def suggest(self, state: EngineState, count: int | None = None) -> tuple[dict[str, Array], EngineState]:
        """The next point to evaluate, or the next ``count`` to evaluate at once.

        Args:
          state: What the optimiser knows.
          count: Static. With a number, arrays have a leading axis of that length: each point of the batch improves on
            the joint posterior of the observed points and of those before it in the batch.

        Returns:
          Physical values by name, and the new state.
        """
        size = 1 if count is None else count
        if size < 1:
            raise ValueError(f"count must be at least 1; got {count!r}.")
        obs, config, dims = state.observations, self.config, self.space.dims
        key, fit_key, propose_key = jax.random.split(state.key, 3)
        used = mask(obs)
        now = obs.count.astype(jnp.float32)
        posterior = fit(config, obs, start=state.hyper, key=fit_key)

        def one(carry, inputs):
            reference, is_reference = carry
            slot, sub = inputs
            point = propose(
                config,
                posterior,
                sub,
                lower=jnp.zeros(dims, jnp.float32),
                upper=jnp.ones(dims, jnp.float32),
                snap=self.space.snap,
                reference=reference,
                reference_mask=is_reference,
                time=now,
            )
            is_design = obs.count + slot < self.initial
            point = jnp.where(is_design, state.design[(state.asked + slot) % self.initial], point)
            index = used.size + slot
            return (reference.at[index].set(point), is_reference.at[index].set(True)), point

        reference = jnp.concatenate([jnp.where(used[:, None], obs.x, 0.5), jnp.full((size, dims), 0.5)])
        is_reference = jnp.concatenate([used & ~obs.failed, jnp.zeros(size, bool)])
        inputs = (jnp.arange(size), jax.random.split(propose_key, size))
        _, points = jax.lax.scan(one, (reference, is_reference), inputs)
        points = points[0] if count is None else points
        state = state._replace(key=key, hyper=posterior.hyper, asked=state.asked + size)
        return self.space.decode(points), state

    def observe(self, state: EngineState, x: Mapping[str, Any], y: Any, *, noise: Any = 0.0) -> EngineState:
        """Records the score of a point, suggested or not.

        Args:
          state: What the optimiser knows.
          x: Physical values by name; clipped to the space.
          y: Score, minimised. Non-finite marks a failure. With a leading axis of k, k points at once.
          noise: Known variance of the score, as for `y`.

        Returns:
          The new state.
        """
        point = self.space.snap(self.space.encode(x))
        y = jnp.asarray(y, jnp.float32)
        noise = jnp.broadcast_to(jnp.asarray(noise, jnp.float32), y.shape)
        point = point.reshape(-1, self.space.dims)

        def record(obs, trial):
            where, score, variance = trial
            time = obs.count.astype(jnp.float32)
            return add(obs, where, score, noise=variance, time=time), None

        obs, _ = jax.lax.scan(record, state.observations, (point, y.reshape(-1), noise.reshape(-1)))
        return state._replace(observations=obs)

    def best(self, state: EngineState) -> dict[str, Array]:
        """Physical values of the observed point with the lowest score."""
        obs = state.observations
        usable = mask(obs) & ~obs.failed
        return self.space.decode(obs.x[jnp.argmin(jnp.where(usable, obs.y, jnp.inf))])
