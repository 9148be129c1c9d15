"""Is training healthy: a pure watch over the loss that answers with a verdict code."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HEALTHY, WATCHING, NON_FINITE, SPIKE, DIVERGED, STALLED, SKIPPED = range(7)

MESSAGES = {
    HEALTHY: "The loss is healthy.",
    WATCHING: "The loss is unusually high; nothing is done unless it stays there.",
    NON_FINITE: "The loss stays non-finite; the last healthy snapshot was restored.",
    SPIKE: "The loss jumped and did not come back; the last healthy snapshot was restored.",
    DIVERGED: "The loss rose above where it started; the last healthy snapshot was restored.",
    STALLED: "The loss has not fallen for a long time; training goes on, nothing is undone.",
    SKIPPED: "The loss is not finite: the step counts for nothing.",
}

BAD_RUN = 8
"""Non-finite losses in a row that are more than bad batches."""

MAX_RETRIES = 3
"""Range tests and forks of one round that may begin again after a bad batch."""

# Losses of range tests and forks, and the first ones of training, that are so many times the first one count as not
# finite.
_LOSS_LIMIT = 1e15

# How far, in spreads, the loss may have risen before a non-finite value that is still out of the blue.
_CALM_SIGMAS = 3.0

# Mean absolute deviation of a normal variable, in standard deviations.
MEAN_ABS_DEVIATION = math.sqrt(2.0 / math.pi)

FIRST_VALUES = 4
"""Values before which the statistics say nothing yet."""

# Counters stop here instead of wrapping round.
_MANY = 2**30

# A value below this share of the last peak's height is on its way back; the peak is forgotten at this rate per step.
_RETURNING_SHARE = 0.3
_PEAK_MEMORY = 0.92

# How far above the level, in standard deviations, a value still counts for what it is.
_REACH_SIGMAS = 20.0

# A level this far below the lowest one, in standard deviations, is progress: more than noise moves an average by.
_PROGRESS_SIGMAS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Thresholds of the watch over the training loss.

    A value is unusual when it lies more than ``sigmas`` of the loss's own recent spread above its recent level, or so
    far above the best level that was held and more than half way back from there to where the run began.
    Unusual and non-finite values never enter the running statistics. One unusual value does nothing; ``patience`` of
    them, with healthy values taking one back each, are a spike. While the loss comes back from a peak, values well
    below that peak do not count: a single bad batch is not answered with a rollback, a loss that stays up is. A loss
    that has stopped falling is only told of. Only differences of losses are used, so adding a constant to the loss
    changes no verdict.

    A loss that is not finite counts for nothing: `fit`, `autotune` and the adapters skip such a step. Where eight come
    in a row, they are more than bad batches. The loss is all that the guard sees: a loop of your own passes NaN for a
    step that it skips because of its gradient or update.

    Args:
      sigmas: Height of an unusual value, in robust standard deviations.
      patience: Unusual values, net of healthy ones, that make a spike.
      window: Memory of the running statistics, in steps.
      warmup: Values seen before the first spike can be called.
      max_rollbacks: Rollbacks for spikes and divergence in one run; those for non-finite losses come besides. When the
        next one is due after the last, the loss is taken as it is, and the hyperparameters in force are held from then
        on: no more rounds. With 0 nothing is rolled back for these reasons and rounds go on.
      stall_steps: Steps without progress after which the loss has stalled.

    Raises:
      TypeError: A threshold is not a number.
      ValueError: A threshold is below 1 (``max_rollbacks``: below 0) or not finite.

    Source:
      The mean plus six sigma rule over a window of about a hundred values is OLMo-core's; levels and spreads are
      exponential moving averages here, so that the state has a fixed size.
    """

    sigmas: float = 6.0
    patience: int = 5
    window: int = 100
    warmup: int = 48
    max_rollbacks: int = 8
    stall_steps: int = 1000

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Guard.{field.name} must be a number; got {value!r}.")
            least = 0 if field.name == "max_rollbacks" else 1
            if not math.isfinite(value) or value < least:
                raise ValueError(f"Guard.{field.name} must be finite and at least {least}; got {value!r}.")


class MonitorState(NamedTuple):
    """Running statistics of the healthy losses; scalars.

    Attributes:
      level: Running mean.
      spread: Running mean absolute deviation from it.
      short: Running mean of a few steps, of all finite losses.
      count: Losses in ``level`` since it last started afresh.
      strikes: Unusual losses, net of healthy ones.
      peak: Height of the last peak above the level.
      lowest: Lowest level so far.
      since_lowest: Finite losses since it was reached.
    """

    level: Float[Array, ""]
    spread: Float[Array, ""]
    short: Float[Array, ""]
    count: Int[Array, ""]
    strikes: Int[Array, ""]
    peak: Float[Array, ""]
    lowest: Float[Array, ""]
    since_lowest: Int[Array, ""]


def magnitude(value: Array) -> Float[Array, ""]:
    """A power of two near a value, which divides exactly; 1 for zero and what is not finite."""
    is_usable = jnp.isfinite(value) & (value != 0.0)
    exponent = jnp.clip(jnp.frexp(jnp.where(is_usable, value, 0.5))[1], -100, 100)
    return jnp.ldexp(jnp.float32(1.0), exponent)


def init() -> MonitorState:
    """Statistics of no value yet."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return MonitorState(
        level=zero,
        spread=zero,
        short=zero,
        count=none,
        strikes=none,
        peak=zero,
        lowest=jnp.full((), jnp.finfo(jnp.float32).max),
        since_lowest=none,
    )


def watch(
    guard: Guard,
    state: MonitorState,
    loss: Float[Array, ""],
    *,
    ceiling: Float[Array, ""] | float = jnp.inf,
    limit: Float[Array, ""] | float = jnp.inf,
    known: Float[Array, ""] | float = -jnp.inf,
) -> tuple[MonitorState, Int[Array, ""]]:
    """Takes one loss in and says whether training is healthy.

    Args:
      guard: Thresholds.
      state: Statistics so far.
      loss: float scalar, any unit, any sign.
      ceiling: A short moving average above this is divergence.
      limit: A loss above this is unusual, however few are known.
      known: Level up to which the data itself has been seen to take the loss.

    Returns:
      The new statistics, unchanged where the loss is not finite, and an int32 verdict.
    """
    loss = jnp.asarray(loss, jnp.float32)
    is_finite = jnp.isfinite(loss)
    value = jnp.where(is_finite, loss, state.level)

    sigma = state.spread / MEAN_ABS_DEVIATION
    # Losses of equal value have no spread; rounding must not look like a spike then.
    slack = 1e-5 * jnp.abs(state.level) + 1e-12
    is_warm = state.count >= guard.warmup
    # A single 1e30 must not drag the averages for good: it enters clipped, divergence shows by repetition.
    reach = jnp.where(state.count >= FIRST_VALUES, _REACH_SIGMAS * sigma + slack, jnp.inf)
    clipped = jnp.clip(value, state.level - reach, state.level + reach)
    reach = state.level + reach
    is_unusual = is_warm & (value > jnp.maximum(state.level, known) + guard.sigmas * sigma + slack)
    is_unusual |= value > jnp.minimum(limit, ceiling)
    height = jnp.minimum(value, jnp.where(jnp.isfinite(ceiling), ceiling, reach)) - state.level
    is_returning = is_unusual & (height < _RETURNING_SHARE * state.peak)
    peak = jnp.where(is_warm, jnp.maximum(_PEAK_MEMORY * state.peak, height), 0.0)
    strikes = jnp.where(is_unusual, state.strikes + ~is_returning, jnp.maximum(state.strikes - 1, 0))

    accepted = ~is_unusual
    level, spread, short = _averages(guard, state, clipped)

    # A level of few values is too uncertain to be a record.
    progresses = accepted & is_warm & (level < state.lowest - _PROGRESS_SIGMAS * sigma - slack)
    since_lowest = jnp.where(progresses, 0, jnp.minimum(state.since_lowest + is_warm, _MANY))

    is_diverged = (state.count >= FIRST_VALUES) & (short > ceiling)
    verdict = jnp.select(
        [~is_finite, is_diverged, strikes >= guard.patience, is_unusual, since_lowest >= guard.stall_steps],
        [SKIPPED, DIVERGED, SPIKE, WATCHING, STALLED],
        HEALTHY,
    ).astype(jnp.int32)
    after = MonitorState(
        level=jnp.where(accepted, level, state.level),
        spread=jnp.where(accepted, spread, state.spread),
        short=short,
        count=jnp.where(accepted, state.count + 1, state.count),
        strikes=strikes,
        peak=peak,
        lowest=jnp.where(progresses, level, state.lowest),
        since_lowest=since_lowest.astype(jnp.int32),
    )
    return MonitorState(*(jnp.where(is_finite, new, old) for new, old in zip(after, state, strict=True))), verdict


def _averages(guard: Guard, state: MonitorState, value: Array) -> tuple[Array, Array, Array]:
    """Level, spread and short average with one more value: the first ones average plainly, later ones exponentially."""
    rate = jnp.maximum(1.0 / guard.window, 1.0 / (state.count + 1.0))
    level = state.level + rate * (value - state.level)
    # The first value after a fresh start says nothing of the spread: the last one known stands in, or every threshold
    # would be next to nothing while it is learned again.
    spread = jnp.where(state.count > 0, state.spread + rate * (jnp.abs(value - level) - state.spread), state.spread)
    short_rate = jnp.maximum(0.2, 1.0 / (state.count + 1.0))
    return level, spread, state.short + short_rate * (value - state.short)


def is_failure(verdict: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a verdict asks for a rollback."""
    return (verdict >= NON_FINITE) & (verdict <= DIVERGED)


class Heard(NamedTuple):
    """One loss, as all handlers are told of it.

    Attributes:
      value: The loss, in units of the first one; the running level where it is not finite.
      is_finite: Whether it is.
      bad_run: Losses in a row, with it, that are not.
      verdict: What the monitor made of it.
      unhealthy: Whether that asks for a rollback.
      is_far: Whether it lies above ``limit``.
      is_blue: Whether a run of bad ones came although nothing led up to it: a rate that is too large announces itself.
      after: Statistics after it.
    """

    value: Float[Array, ""]
    is_finite: Bool[Array, ""]
    bad_run: Int[Array, ""]
    verdict: Int[Array, ""]
    unhealthy: Bool[Array, ""]
    is_far: Bool[Array, ""]
    is_blue: Bool[Array, ""]
    after: MonitorState


def hear(
    guard: Guard,
    state: MonitorState,
    loss: Array,
    *,
    bad_run: Array,
    in_train: Array,
    initial_loss: Array,
    ceiling: Array,
    limit: Array,
    known: Array,
) -> Heard:
    """Takes one loss in, for the handlers of the phases; see `watch`. ``bad_run`` counts those before it."""
    # Where a few losses decide, one beyond all measure tells as little as one that is not finite.
    is_known = in_train & (state.count >= FIRST_VALUES)
    loss = jnp.where(is_known | (jnp.abs(loss) < _LOSS_LIMIT), loss, jnp.nan)
    after, verdict = watch(guard, state, loss, ceiling=ceiling, limit=limit, known=known)
    is_finite = jnp.isfinite(loss)
    bad_run = jnp.where(is_finite, 0, bad_run + 1)
    # Before the first good loss there is nothing to go back to.
    verdict = jnp.where((bad_run >= BAD_RUN) & jnp.isfinite(initial_loss), NON_FINITE, verdict)
    climbed = state.short > jnp.fmax(state.level, initial_loss) + _CALM_SIGMAS * state.spread
    return Heard(
        value=jnp.where(is_finite, loss, after.level),
        is_finite=is_finite,
        bad_run=bad_run,
        verdict=verdict,
        unhealthy=is_failure(verdict),
        is_far=is_finite & (loss > limit),
        is_blue=(verdict == NON_FINITE) & ~climbed,
        after=after,
    )
