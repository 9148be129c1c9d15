"""A fixed-capacity record of what was tried and how it scored."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Scores beyond this magnitude carry no more information and their squares would overflow float32.
_SCORE_LIMIT = 1e15


class Observations(NamedTuple):
    """Trials in the order they arrived; slots beyond ``count`` hold zeros.

    Shapes never change, so nothing recompiles as observations arrive.
    """

    x: Float[Array, "n d"]
    """Points of the unit cube."""
    y: Float[Array, "n"]
    """Score, minimised; 0 where the trial failed."""
    noise: Float[Array, "n"]
    """Known variance of the score in squared units of it, on top of the noise the surrogate learns; 0 if unknown."""
    time: Float[Array, "n"]
    """When the trial ran, in the unit of the surrogate's time lengthscale."""
    group: Int[Array, "n"]
    """Round of the trial; trials of one round share an unknown intercept."""
    failed: Bool[Array, "n"]
    """Whether the trial failed: no usable score."""
    count: Int[Array, ""]
    """How many trials were ever added."""


def empty(capacity: int, dims: int) -> Observations:
    """A record of so many slots, for points of the unit cube, with no trial in it."""
    zeros = jnp.zeros(capacity, jnp.float32)
    return Observations(
        x=jnp.zeros((capacity, dims), jnp.float32),
        y=zeros,
        noise=zeros,
        time=zeros,
        group=jnp.zeros(capacity, jnp.int32),
        failed=jnp.zeros(capacity, bool),
        count=jnp.zeros((), jnp.int32),
    )


def mask(obs: Observations) -> Bool[Array, "n"]:
    """Which slots are in use: always a leading run."""
    return jnp.arange(obs.y.shape[0]) < obs.count


def add(
    obs: Observations,
    x: Float[Array, "d"],
    y: Float[Array, ""],
    *,
    noise: Float[Array, ""] | float = 0.0,
    time: Float[Array, ""] | float = 0.0,
    group: Int[Array, ""] | int = 0,
    failed: Bool[Array, ""] | bool = False,
    keep_best: float = 0.25,
) -> Observations:
    """Appends one trial; when the record is full, forgets another.

    The one forgotten is the oldest trial that is not among the best ``keep_best`` of the record: recent trials say most
    about an objective that moves, good ones about where its minimum lies, and old bad ones about neither. Failures
    count as worse than any score. At equal scores the older trial is the better one.

    Args:
      obs: The record.
      x: Point of the unit cube; coordinates are clipped to it.
      y: Score, minimised, any unit. A non-finite score makes the trial a failure; the magnitude is capped at 1e15.
      noise: Known variance of ``y``, at least 0; non-finite or negative values count as unknown.
      time: When the trial ran; non-finite values count as 0.
      group: Round of the trial.
      failed: Whether the trial failed whatever its score says.
      keep_best: Static share of the slots, in [0, 1), that protects the best trials from being forgotten. With 0 the
        record is a plain sliding window.

    Returns:
      The record with the trial in its last used slot.

    Cost:
      O(n^2) comparisons and O(n d) copies for a record of n slots.
    """
    capacity = obs.y.shape[0]
    y, noise, time = (jnp.asarray(value, jnp.float32) for value in (y, noise, time))
    failed = jnp.asarray(failed) | ~jnp.isfinite(y)
    new = {
        "x": jnp.clip(jnp.nan_to_num(jnp.asarray(x, jnp.float32), nan=0.5), 0.0, 1.0),
        "y": jnp.where(failed, 0.0, jnp.clip(jnp.nan_to_num(y), -_SCORE_LIMIT, _SCORE_LIMIT)),
        "noise": jnp.where(jnp.isfinite(noise) & (noise > 0.0), noise, 0.0),
        "time": jnp.where(jnp.isfinite(time), time, 0.0),
        "group": jnp.asarray(group, jnp.int32),
        "failed": failed,
    }

    slots = jnp.arange(capacity)
    # Rank 0 is the best; comparing all pairs compiles faster than a sort.
    score = jnp.where(obs.failed, jnp.inf, obs.y)
    is_better = (score[None, :] < score[:, None]) | (
        (score[None, :] == score[:, None]) & (slots[None, :] < slots[:, None])
    )
    rank = jnp.sum(is_better, axis=1, dtype=jnp.int32)
    victim = jnp.argmax(rank >= int(keep_best * capacity))
    is_full = obs.count >= capacity
    source = jnp.where(is_full & (slots >= victim), jnp.minimum(slots + 1, capacity - 1), slots)
    slot = jnp.minimum(obs.count, capacity - 1)
    is_new = slots == slot
    moved = {}
    for name, value in new.items():
        column = getattr(obs, name)[source]
        moved[name] = jnp.where(is_new.reshape(-1, *(1,) * value.ndim), value, column)
    return Observations(**moved, count=obs.count + 1)
