"""The score of a fork: its losses, heard one by one, or its validation metric, summed up when it ends."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import loss_monitor, window
from .loss_monitor import Heard
from .plan import FAST
from .schedule import COOL_SHARE
from .state import Directive, TunerState, nothing_to_do, position


def scored_from(length: Array) -> Array:
    """First step of a fork whose training loss counts in its score, where there is no metric: its cool-down's."""
    return length - jnp.maximum(jnp.round(COOL_SHARE * length).astype(jnp.int32), 2)


def step(ts: TunerState, heard: Heard) -> tuple[TunerState, Directive, Bool[Array, ""]]:
    """Takes in one loss of a fork.

    Returns:
      The state, what the loop must do, and whether the fork has ended.
    """
    pos = position(ts) - 1
    is_scored = heard.is_finite & (pos >= scored_from(ts.segment_length))
    value = heard.value * ts.health.scale
    scored = window.with_loss(ts.window, heard.value, is_scored)
    # The first two losses of a round's first fork come before any fork could differ: where all of them start.
    counts = (ts.round.fork == 0) & heard.is_finite & ~ts.round.has_eval
    reference = jnp.where(counts & (pos == 0), value, ts.round.reference)
    reference = jnp.where(counts & (pos == 1), 0.5 * (reference + value), reference)
    faulted = heard.is_blue & _may_retry(ts)
    health = ts.health._replace(has_failed=heard.unhealthy, has_faulted=ts.health.has_faulted | faulted)
    ts = ts._replace(
        window=scored,
        round=ts.round._replace(reference=reference),
        health=health,
    )
    directive = nothing_to_do(ts, heard.verdict)._replace(evaluate=ts.segment_left == 1)
    return ts, directive, (ts.segment_left <= 0) | heard.unhealthy


def score(ts: TunerState, *, is_opening: Array) -> tuple[Bool[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The score of the fork that ended, to be minimised.

    Returns:
      Whether the round is scored by the validation metric, the score, and that of the state all forks start from.
    """
    sums, held = ts.window, ts.round
    # A metric that is not finite, where the training loss is, is no more than no metric.
    has_eval = jnp.where(is_opening, (sums.eval_count > 0) & jnp.isfinite(sums.eval_sum), held.has_eval)
    # A slow hyperparameter is never judged by the training loss.
    by_loss = jnp.where(ts.plan.kind[held.index] == FAST, window.robust_mean(sums) * ts.health.scale, jnp.nan)
    value = jnp.where(has_eval, sums.eval_sum / sums.eval_count, by_loss)
    reference = jnp.where(is_opening & has_eval, ts.validation.level, held.reference)
    return has_eval, value, jnp.where(jnp.isfinite(reference), reference, value)


def _may_retry(ts: TunerState) -> Bool[Array, ""]:
    return ts.health.retries < loss_monitor.MAX_RETRIES


def spoiled(ts: TunerState) -> TunerState:
    """The state with a running fork that led to a training that is not whole: it begins again, or cannot win."""
    nan = jnp.full_like(ts.window.loss_sum, jnp.nan)
    sums = ts.window._replace(loss_sum=nan, eval_sum=nan)
    return ts._replace(window=sums, health=ts.health._replace(has_faulted=_may_retry(ts)))
