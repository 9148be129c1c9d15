"""The tuner's state and the directives it gives: immutable pytrees of arrays, nothing else."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from . import _guard, _kernels, _observations, _surrogate
from ._plan import MAX_FORKS, Plan

TRAIN, SWEEP, FORK = range(3)
PHASES = ("train", "sweep", "fork")

(
    OUTCOME_NONE,
    OUTCOME_ROUND_STARTED,
    OUTCOME_FORK_STARTED,
    OUTCOME_FORK_CONTINUES,
    OUTCOME_ROUND_MOVED,
    OUTCOME_ROUND_STAYED,
    OUTCOME_ROUND_FAILED,
    OUTCOME_ROUND_SKIPPED,
    OUTCOME_ROLLBACK,
    OUTCOME_RETRIED,
    OUTCOME_ACCEPTED,
) = range(11)

OUTCOMES = {
    OUTCOME_NONE: "Training goes on.",
    OUTCOME_ROUND_STARTED: "A round of forks began; the state was saved.",
    OUTCOME_FORK_STARTED: "The next fork began from the saved state.",
    OUTCOME_FORK_CONTINUES: "The fork did well enough to run on.",
    OUTCOME_ROUND_MOVED: "A round ended with other hyperparameters in force.",
    OUTCOME_ROUND_STAYED: "A round ended and the incumbent hyperparameters stay in force.",
    OUTCOME_ROUND_FAILED: "Every fork of a round failed; the saved state was restored and safer hyperparameters tried.",
    OUTCOME_ROUND_SKIPPED: "A round was skipped: nothing to learn from, or its price exceeds its expected gain.",
    OUTCOME_ROLLBACK: "Training became unhealthy; a healthy snapshot was restored.",
    OUTCOME_RETRIED: "The loss was not finite out of the blue; the sweep or fork began again on the data after it.",
    OUTCOME_ACCEPTED: "The loss is as high on healthy snapshots: the data changed. Training goes on.",
}

FORK_UNUSED, FORK_RUNNING, FORK_DROPPED, FORK_FAILED, FORK_FINISHED = range(5)
FORK_STATUSES = ("unused", "running", "dropped", "failed", "finished")


class Directive(NamedTuple):
    """What the training loop must do before its next step.

    A loop owns the training state and two copies of it, made by real copying before the first step: the *saved* and the
    *kept* state. It carries a directive out in this order:

    1. ``save``: copy the current state over the saved one.
    2. ``keep``: copy the current state over the kept one.
    3. ``restore``: copy the saved state back; ``adopt``: copy the kept state back. Never both.

    and then takes the next batch at ``data_step``. All fields are scalars.

    Attributes:
      save: bool.
      restore: bool.
      keep: bool.
      adopt: bool.
      evaluate: bool; the tuner would like a validation metric now, through `AutoTuneNet.observe_eval`, before the next
        `AutoTuneNet.update`. Ignoring it is allowed: training losses are compared then.
      data_step: int32; index of the next batch. It goes back at the start of each fork, so that all forks of a round
        see the same data, and never goes back after a rollback. A loop that cannot rewind its data ignores it.
      outcome: int32; a key of ``OUTCOMES``.
      verdict: int32; what the guard made of the loss.
    """

    save: Bool[Array, ""]
    restore: Bool[Array, ""]
    keep: Bool[Array, ""]
    adopt: Bool[Array, ""]
    evaluate: Bool[Array, ""]
    data_step: Int[Array, ""]
    outcome: Int[Array, ""]
    verdict: Int[Array, ""]


class Window(NamedTuple):
    """Sums over the scored part of the running fork, and over its first steps."""

    loss_sum: Float[Array, ""]
    loss_count: Float[Array, ""]
    eval_sum: Float[Array, ""]
    eval_count: Float[Array, ""]


class Sweep(NamedTuple):
    """The range sweep: its smoothed and lowest smoothed loss, and all of its losses.

    Attributes:
      smooth: Running mean.
      lowest: The lowest running mean.
      losses: One per step; 0 where there is none yet.
      count: How many there are.
    """

    smooth: Float[Array, ""]
    lowest: Float[Array, ""]
    losses: Float[Array, "steps"]
    count: Int[Array, ""]


class Validation(NamedTuple):
    """Validation metrics outside rounds, to be minimised; scalars.

    Attributes:
      first: The first one; NaN before it.
      best: The lowest one; infinite before the first.
      level: Running level of the training loss at the lowest one.
      last: The last one; NaN before the first.
      change: What it changed by; NaN before the second.
      noise: Running mean of how much that change differs from the one before, which a trend does not and noise does.
      at: Budget step of the lowest one.
      mark: One of a while ago, which the next one has to better for the decay to wait on; NaN before the first.
      marked: Budget step of that one.
      later: How many came after it, since the last round.
      away: How far those lie above what half of the training loss's fall would have made of it, added up.
      bends: How much their changes differ from the ones before, added up.
      rises: How often in a row the metric has been above the lowest one while the training loss was below its level.
      retreats: How often training went on from the best state for that.
      keeps: Whether the next step's state, one step past the best one, is still to be kept.
      returns: Whether the kept state is still to be returned to.
      is_kept: Whether the kept state is that of the lowest metric.
    """

    first: Float[Array, ""]
    best: Float[Array, ""]
    level: Float[Array, ""]
    last: Float[Array, ""]
    change: Float[Array, ""]
    noise: Float[Array, ""]
    at: Int[Array, ""]
    mark: Float[Array, ""]
    marked: Int[Array, ""]
    later: Float[Array, ""]
    away: Float[Array, ""]
    bends: Float[Array, ""]
    rises: Int[Array, ""]
    retreats: Int[Array, ""]
    keeps: Bool[Array, ""]
    returns: Bool[Array, ""]
    is_kept: Bool[Array, ""]


class Round(NamedTuple):
    """The round being held, or the next one.

    Attributes:
      index: Row of the plan.
      fork: Fork now running.
      rung: 0 until the early score, 1 after it.
      kept: Fork whose state is kept; -1 for none.
      group: Id of the round's early scores among the observations; its late scores have the next one.
      has_eval: Whether the round is scored by validation metrics.
      reference: Score of the state all forks start from.
      lowest: Lowest training loss that a fork ended with; infinite before the first.
      x: Hyperparameters of the forks, unit cube.
      score: Early and late score of each fork, NaN where there is none.
      steps: Steps each fork ran.
      status: One of the ``FORK_*`` codes.
      p_better: Probability, when it was last compared, that the fork beats the one kept then.
    """

    index: Int[Array, ""]
    fork: Int[Array, ""]
    rung: Int[Array, ""]
    kept: Int[Array, ""]
    group: Int[Array, ""]
    has_eval: Bool[Array, ""]
    reference: Float[Array, ""]
    lowest: Float[Array, ""]
    x: Float[Array, "forks d"]
    score: Float[Array, "forks 2"]
    steps: Int[Array, "forks"]
    status: Int[Array, "forks"]
    p_better: Float[Array, "forks"]


class Slots(NamedTuple):
    """Where in the data the saved and the kept state stand, and when they were taken (budget steps)."""

    saved_data: Int[Array, ""]
    saved_step: Int[Array, ""]
    kept_data: Int[Array, ""]
    kept_step: Int[Array, ""]


class TunerState(NamedTuple):
    """Everything the tuner knows; arrays of fixed size, however long the run.

    Attributes:
      key: Typed PRNG key; split once per decision.
      step: Training steps done, forks included: the budget spent.
      data_step: Index of the next batch.
      phase: ``TRAIN``, ``SWEEP`` or ``FORK``.
      segment_left: Steps until the next decision.
      segment_length: Steps of the whole segment.
      incumbent: Hyperparameters in force outside forks, unit cube.
      trial: Hyperparameters of the running fork, unit cube.
      has_failed: The running segment ended early because training became unhealthy.
      has_faulted: It ended on a non-finite loss that nothing led up to: the data's fault rather than the
        hyperparameters'.
      retries: Sweeps and forks of this round begun again for that reason.
      initial_loss: Mean of the first finite losses; NaN before there is one.
      best_level: Lowest running level of the loss so far.
      eval_level: Last validation metric seen, to be minimised; NaN before the first.
      validation: What validation metrics outside rounds have shown so far.
      discarded: Steps spent on forks that were not kept, and on sweeps.
      rollbacks: Rollbacks so far.
      relapses: Rollbacks in a row for a loss that was high on the restored snapshot itself.
      since_rollback: Steps since the last one.
      since_restart: Steps since that, since the first round ended, or since a lowered rate was taken back, whichever
        came last: rates warm up from there.
      probation: Steps of training until it has to have got as far as the forks it began again for; 0 for none.
      promised: Training loss that the best of them ended with.
      unmet: Losses above what was promised and what may be missing of it, net of twice those that are not.
      reached: Training loss by then of the attempt before; infinite before the first.
      last_rates: Hyperparameters of that attempt, unit cube.
      hold: Share of the budget left when the decay began to wait; 0 where it does not.
      rounds_held: Rounds ended so far.
      anneal_start: Budget step at which the decay begins, with ``anneal_steps`` its length; -1 for the plan's own.
      outcome: Outcome of the last decision.
    """

    key: PRNGKeyArray
    step: Int[Array, ""]
    data_step: Int[Array, ""]
    phase: Int[Array, ""]
    segment_left: Int[Array, ""]
    segment_length: Int[Array, ""]
    incumbent: Float[Array, "d"]
    trial: Float[Array, "d"]
    has_failed: Bool[Array, ""]
    has_faulted: Bool[Array, ""]
    retries: Int[Array, ""]
    initial_loss: Float[Array, ""]
    best_level: Float[Array, ""]
    eval_level: Float[Array, ""]
    validation: Validation
    discarded: Int[Array, ""]
    rollbacks: Int[Array, ""]
    relapses: Int[Array, ""]
    since_rollback: Int[Array, ""]
    since_restart: Int[Array, ""]
    probation: Int[Array, ""]
    promised: Float[Array, ""]
    unmet: Int[Array, ""]
    reached: Float[Array, ""]
    last_rates: Float[Array, "d"]
    hold: Float[Array, ""]
    rounds_held: Int[Array, ""]
    anneal_start: Int[Array, ""]
    anneal_steps: Int[Array, ""]
    outcome: Int[Array, ""]
    window: Window
    sweep: Sweep
    round: Round
    slots: Slots
    guard: _guard.GuardState
    observations: _observations.Observations
    prior: _surrogate.PriorMean
    hyper: _kernels.Hyper
    plan: Plan


def empty_window() -> Window:
    """Sums over nothing."""
    zero = jnp.zeros((), jnp.float32)
    return Window(zero, zero, zero, zero)


def no_validation() -> Validation:
    """Before the first metric."""
    nan, inf = jnp.full((), jnp.nan, jnp.float32), jnp.full((), jnp.inf, jnp.float32)
    zeros, counts, no = jnp.zeros(4, jnp.float32), jnp.zeros(4, jnp.int32), jnp.zeros((), bool)
    return Validation(
        first=nan,
        best=inf,
        level=inf,
        last=nan,
        change=nan,
        noise=zeros[0],
        at=counts[0],
        mark=nan,
        marked=counts[3],
        later=zeros[1],
        away=zeros[2],
        bends=zeros[3],
        rises=counts[1],
        retreats=counts[2],
        keeps=no,
        returns=no,
        is_kept=no,
    )


def empty_round(dims: int, *, index: Array | int, group: Array | int) -> Round:
    """A round of which nothing has run yet."""
    nan = jnp.full((), jnp.nan, jnp.float32)
    return Round(
        index=jnp.asarray(index, jnp.int32),
        fork=jnp.zeros((), jnp.int32),
        rung=jnp.zeros((), jnp.int32),
        kept=jnp.full((), -1, jnp.int32),
        group=jnp.asarray(group, jnp.int32),
        has_eval=jnp.zeros((), bool),
        reference=nan,
        lowest=jnp.full((), jnp.inf, jnp.float32),
        x=jnp.zeros((MAX_FORKS, dims), jnp.float32),
        score=jnp.full((MAX_FORKS, 2), jnp.nan, jnp.float32),
        steps=jnp.zeros((MAX_FORKS,), jnp.int32),
        status=jnp.zeros((MAX_FORKS,), jnp.int32),
        p_better=jnp.full((MAX_FORKS,), jnp.nan, jnp.float32),
    )
