"""The hyperparameters in force: the base schedule of the rates, warm-ups, and a fork's cool-down."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..space.search_space import SearchSpace
from .roles import roles_of
from .state import FORK, SWEEP, TunerState, position

Decay = Literal["hold", "linear", "cosine", "none"]
DECAYS = ("hold", "linear", "cosine", "none")

HOLD_SHARE = 0.6
"""Share of the budget over which ``"hold"`` keeps the rate; from there it falls linearly to zero."""

COOL_SHARE = 0.25
"""Last part of a fork over which its rates fall to almost zero, so that a hot fork is not scored on its noise."""

COOL_FLOOR = 0.02
"""Least factor of a cool-down, so that its last steps still move."""

FORK_WARMUP_SHARE = 0.25
"""A fork reaches the rate that it claims in this part of its steps, however long the user's warm-up is."""

# Places at which a user's schedule is looked at for its peak.
_SAMPLES = 257
# Places by whose values one is told from another.
_DESCRIBED = 17

REWARM_STEPS = 20
"""Steps over which rates climb to their value after a rollback."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The base schedule: a factor on the rates, as a function of the share of the budget that is spent.

    Attributes:
      form: One of `DECAYS`, a function of the share, or a schedule over steps.
      steps: Steps of the whole run, for a schedule over them; 0 otherwise.
      peak: Highest value of the schedule; 1 otherwise.
      peak_share: Share of the budget after which it is reached; what lies before is warm-up.
    """

    form: Any
    steps: int = 0
    peak: float = 1.0
    peak_share: float = 0.0

    def __call__(self, spent: Float[Array, ""]) -> Float[Array, ""]:
        """The factor."""
        if self.form == "none":
            return jnp.ones_like(spent)
        if self.form == "cosine":
            return 0.5 * (1.0 + jnp.cos(math.pi * spent))
        if self.form in ("hold", "linear"):
            hold = HOLD_SHARE if self.form == "hold" else 0.0
            return jnp.minimum(1.0, (1.0 - spent) / (1.0 - hold))
        value = self.form(spent * self.steps) / self.peak if self.steps else self.form(spent)
        return jnp.asarray(value, jnp.float32)


def shape_of(decay: Any, schedule: Any, total_steps: int | None) -> Shape:
    """The shape that a user asks for.

    Raises:
      ValueError: An unknown decay, both a decay and a schedule, a schedule without a budget, or one without a peak.
      TypeError: A schedule that is no function.
    """
    if not callable(decay) and decay not in DECAYS:
        raise ValueError(
            f"decay must be one of {', '.join(DECAYS)}, or a function of the share of the budget; got {decay!r}."
        )
    if schedule is None:
        return Shape(decay)
    if not callable(schedule):
        raise TypeError(f"schedule must be an optax schedule, a function of the step; got {schedule!r}.")
    if decay != "hold":
        raise ValueError("decay and schedule both shape the rates: give one of them.")
    if total_steps is None:
        raise ValueError("a schedule needs total_steps: give the steps that it was made for.")
    with jax.ensure_compile_time_eval():
        values = np.array([schedule(int(step)) for step in np.linspace(0, total_steps, _SAMPLES)], np.float64)
    at = int(values.argmax())
    if not np.isfinite(values).all() or values[at] <= 0.0:
        raise ValueError("the schedule must be finite, and positive somewhere within total_steps: its peak is tuned.")
    return Shape(schedule, total_steps, float(values[at]), at / (_SAMPLES - 1))


def described(shape: Shape) -> tuple[Any, ...]:
    """What tells one shape from another, the same in every process: a function is known by its values."""
    form = shape.form
    if callable(form):
        places = np.linspace(0.0, shape.steps or 1.0, _DESCRIBED, dtype=np.float32)
        with jax.ensure_compile_time_eval():
            form = tuple(f"{np.asarray(form(place)).item():.6e}" for place in places)
    return form, shape.steps


def factor(shape: Shape, warmup_steps: int, ts: TunerState) -> Float[Array, ""]:
    """The factor on the rates: a function of the budget spent, forks included; in forks without any warm-up."""
    total, in_fork = ts.plan.total, ts.phase == FORK
    is_asked = ts.anneal_start >= 0
    begin, steps = jnp.where(is_asked, ts.anneal_start, 0), jnp.where(is_asked, ts.anneal_steps, total)
    spent = jnp.clip((ts.step - begin) / jnp.maximum(steps, 1), 0.0, 1.0)
    planned = shape(jnp.where(in_fork, jnp.maximum(spent, shape.peak_share), spent))
    # A decay that is asked for sets in at once.
    asked = Shape("linear" if shape.form in ("hold", "none") else shape.form)(spent) if not shape.steps else 1.0 - spent
    base = jnp.where(steps > 0, jnp.where(is_asked, asked, planned), 1.0)
    warm = jnp.where(in_fork, 1.0, (ts.data_step + 1.0) / max(warmup_steps, 1))
    rewarm = (ts.health.since_rollback + 1.0) / REWARM_STEPS
    cooled = (ts.step - ts.validation.cools_from) / jnp.maximum(ts.plan.check_every, 1)
    cool = jnp.where(in_fork, 1.0, jnp.clip(1.0 - cooled, COOL_FLOOR, 1.0))
    return base * cool * jnp.minimum(jnp.minimum(warm, rewarm), 1.0)


def fork_factor(warmup_steps: int, ts: TunerState) -> Float[Array, ""]:
    """What a fork multiplies its rates with: up to what it claims, and down to almost zero at its end."""
    length, pos = ts.segment_length, position(ts)
    # The last step has the smallest factor; forks of one or two steps are not cooled.
    cool = (length - pos) / jnp.maximum(jnp.round(COOL_SHARE * length), 1.0)
    rise = jnp.clip(jnp.round(FORK_WARMUP_SHARE * length), 1.0, max(warmup_steps, 1))
    warm = jnp.where(ts.slots.saved_data < warmup_steps, (pos + 1.0) / rise, 1.0)
    return jnp.minimum(jnp.clip(cool, COOL_FLOOR, 1.0), warm)


def in_force(space: SearchSpace, shape: Shape, warmup_steps: int, ts: TunerState) -> dict[str, Array]:
    """Values for the next step, by name."""
    roles = roles_of(space)
    in_test, in_fork = ts.phase == SWEEP, ts.phase == FORK
    climbed = jnp.clip(position(ts) / jnp.maximum(ts.segment_length - 1, 1), 0.0, 1.0)
    tested = jnp.where(roles.is_rate, climbed, ts.incumbent)
    values = space.decode(jnp.where(in_test, tested, jnp.where(in_fork, ts.trial, ts.incumbent)))
    in_fork_only = jnp.where(in_fork, fork_factor(warmup_steps, ts), 1.0)
    rate = jnp.where(in_test, 1.0, factor(shape, warmup_steps, ts) * in_fork_only)
    return {
        name: value * rate if role == "rate" else value
        for (name, value), role in zip(values.items(), space.roles, strict=True)
    }
