"""The tuner's state and the directives it gives: immutable pytrees of arrays, nothing else."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from ..bayesopt import surrogate, trials
from . import loss_monitor
from .plan import MAX_FORKS, MAX_RANGE_TEST, NEVER, Plan

FORMAT = 10
"""Version of the state's layout."""

KEY_IMPL = "threefry2x32"
"""Kind of the state's random key."""

TRAIN, SWEEP, FORK = range(3)
PHASES = ("train", "sweep", "fork")
"""Names of the phases: ordinary training, the range test (a sweep of the rates), a fork of a round."""

(
    OUTCOME_NONE,
    OUTCOME_ROUND_STARTED,
    OUTCOME_FORK_STARTED,
    OUTCOME_ROUND_MOVED,
    OUTCOME_ROUND_STAYED,
    OUTCOME_ROUND_FAILED,
    OUTCOME_ROUND_SKIPPED,
    OUTCOME_RATE_READ,
    OUTCOME_ROLLBACK,
    OUTCOME_RETRIED,
    OUTCOME_ACCEPTED,
) = range(11)

OUTCOMES = {
    OUTCOME_NONE: "Training goes on.",
    OUTCOME_ROUND_STARTED: "A round of forks began; the state was saved.",
    OUTCOME_FORK_STARTED: "The next fork began from the saved state.",
    OUTCOME_ROUND_MOVED: "A round ended with other hyperparameters in force.",
    OUTCOME_ROUND_STAYED: "A round ended and the incumbent hyperparameters stay in force.",
    OUTCOME_ROUND_FAILED: "Every fork of a round failed or lost ground; the saved state was restored, at lower rates.",
    OUTCOME_ROUND_SKIPPED: "A round was skipped: there is nothing to compare forks by, or no budget for them.",
    OUTCOME_RATE_READ: "The run is too short for forks: the rates are what the range test says.",
    OUTCOME_ROLLBACK: "Training became unhealthy; a healthy snapshot was restored.",
    OUTCOME_RETRIED: "Loss or state was not finite out of the blue; the range test or fork began again on later data.",
    OUTCOME_ACCEPTED: "The loss is as high on healthy snapshots: the data changed. Training goes on.",
}

FORK_UNUSED, FORK_RUNNING, FORK_FAILED, FORK_FINISHED = range(4)
FORK_STATUSES = ("unused", "running", "failed", "finished")


class Directive(NamedTuple):
    """What the training loop must do before its next step.

    A loop owns the training state and two copies of it, made by real copying before the first step: the *saved* and the
    *kept* state. In a round the saved one is what all forks start from, and the kept one the best fork so far. Outside
    rounds the kept one is the state of the best reading of the metric, and the saved one a recent state; without a
    metric they are two recent states, taken in turn. It carries a directive out in this order:

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


class Health(NamedTuple):
    """What the loss monitor knows, and what was done about it.

    Attributes:
      monitor: Running statistics of the loss.
      initial_loss: Mean of the first finite losses; NaN before there is one.
      best_level: Lowest running level of the loss so far.
      held_level: Lowest one in ordinary training, and at the end of forks whose state was kept; in a slow round that of
        the fork itself.
      held_spread: The spread of the loss then.
      known_level: Highest level that was found to be the data's doing; minus infinity before one.
      scale: What losses are divided by: a power of two near the first one; 0 before it.
      lowered: Decades by which the last rollback lowered the rates.
      bad_run: Losses in a row that are not finite.
      bad_steps: Those of the whole run.
      has_failed: The running fork ended early because training became unhealthy.
      has_faulted: The running range test or fork ended on a non-finite loss that nothing led up to, or in a state that
        is not whole: not its own fault.
      retries: Times it began again for that reason.
      since_rollback: Steps since the last rollback.
    """

    monitor: loss_monitor.MonitorState
    initial_loss: Float[Array, ""]
    best_level: Float[Array, ""]
    held_level: Float[Array, ""]
    held_spread: Float[Array, ""]
    known_level: Float[Array, ""]
    scale: Float[Array, ""]
    lowered: Float[Array, ""]
    bad_run: Int[Array, ""]
    bad_steps: Int[Array, ""]
    has_failed: Bool[Array, ""]
    has_faulted: Bool[Array, ""]
    retries: Int[Array, ""]
    since_rollback: Int[Array, ""]


class RangeTest(NamedTuple):
    """Losses of the range test, one per step, and how many there are."""

    losses: Float[Array, "steps"]
    count: Int[Array, ""]


class Window(NamedTuple):
    """Sums over the scored part of the running fork; of losses also over training since the last reading.

    ``highest`` is the highest of these losses, which is neither in their sum nor in that of their squares.
    """

    loss_sum: Float[Array, ""]
    squares: Float[Array, ""]
    highest: Float[Array, ""]
    loss_count: Float[Array, ""]
    eval_sum: Float[Array, ""]
    eval_count: Float[Array, ""]


class Validation(NamedTuple):
    """Readings of the validation metric outside rounds, to be minimised; scalars. Without one, of the training loss.

    Attributes:
      level: The last metric seen, counted or not; NaN before the first.
      best: The lowest reading; infinite before the first.
      hot: The lowest one at full rate since training last went back, or was found to have cooled to a better state.
      read_at: Budget step of the last reading.
      worse: Readings in a row that were above ``hot``.
      better: Readings in a row, at full rate, that were the lowest of all.
      climbed: Decades by which the rates last climbed; -1 once that was taken back.
      climbed_at: Budget step at which the rates last climbed, -1 before; if it is ``read_at``, they are on trial.
      cools_from: Budget step from which the rates fall, to see whether training is only too hot; `NEVER` otherwise.
      retreats: How often training went back to the state of the lowest.
      has_fallen: Whether the rates fell by the training loss.
      keeps: Whether the next step's state, one step past the best one, is still to be kept.
      returns: Whether the kept state is still to be returned to.
      is_kept: Whether the kept state is that of the lowest reading.
    """

    level: Float[Array, ""]
    best: Float[Array, ""]
    hot: Float[Array, ""]
    read_at: Int[Array, ""]
    worse: Int[Array, ""]
    better: Int[Array, ""]
    climbed: Float[Array, ""]
    climbed_at: Int[Array, ""]
    cools_from: Int[Array, ""]
    retreats: Int[Array, ""]
    has_fallen: Bool[Array, ""]
    keeps: Bool[Array, ""]
    returns: Bool[Array, ""]
    is_kept: Bool[Array, ""]


class Round(NamedTuple):
    """The round being held, or the next one.

    Attributes:
      index: Row of the plan.
      fork: Fork now running.
      kept: Fork whose state is kept; -1 for none.
      has_eval: Whether the round is scored by validation metrics.
      reference: Score of the state all forks start from.
      x: Hyperparameters of the forks, unit cube.
      score: Score of each fork, NaN where there is none.
      steps: Steps each fork ran.
      status: One of the ``FORK_*`` codes.
      p_better: Probability, when it was compared, that the fork beats the one kept then.
      lead: By how much, as the surrogate has it, and in its unit; NaN for the first.
      deviation: Standard deviation of that.
    """

    index: Int[Array, ""]
    fork: Int[Array, ""]
    kept: Int[Array, ""]
    has_eval: Bool[Array, ""]
    reference: Float[Array, ""]
    x: Float[Array, "forks d"]
    score: Float[Array, "forks"]
    steps: Int[Array, "forks"]
    status: Int[Array, "forks"]
    p_better: Float[Array, "forks"]
    lead: Float[Array, "forks"]
    deviation: Float[Array, "forks"]


class Slots(NamedTuple):
    """Where in the data the saved and the kept state stand, and when they were taken (budget steps)."""

    saved_data: Int[Array, ""]
    saved_step: Int[Array, ""]
    kept_data: Int[Array, ""]
    kept_step: Int[Array, ""]


class Knowledge(NamedTuple):
    """What the surrogate has learnt: every fork's score, and its prior mean."""

    observations: trials.Observations
    prior: surrogate.PriorMean


class TunerState(NamedTuple):
    """Everything the tuner knows; arrays of fixed size, however long the run.

    Attributes:
      format: Version of this layout.
      fingerprint: Digests of the space, the plan and the policy it was made with.
      key: Words of a random key of `KEY_IMPL`, as plain numbers: any serializer takes them. Split once per decision.
      step: Training steps done, forks included: the budget spent.
      data_step: Index of the next batch.
      phase: ``TRAIN``, ``SWEEP`` or ``FORK``.
      segment_left: Steps until the next decision.
      segment_length: Steps of the whole segment: the stretch of training between two decisions.
      incumbent: Hyperparameters in force outside forks, in the unit cube as every point of this package; its values are
        those of ``space.decode``, and rates move along it in decades (`roles.Roles.shifted`).
      trial: Hyperparameters of the running fork.
      discarded: Steps spent on range tests and on forks that were not kept.
      rollbacks: Rollbacks so far.
      anneal_start: Budget step at which a decay asked for begins, with ``anneal_steps`` its length; -1 for the plan's.
      outcome: Outcome of the last decision.
      health: Of the loss.
      range_test: The running one.
      window: Of the running fork.
      round: The one being held, or the next.
      slots: Of the two copies of the training state.
      validation: Outside rounds.
      knowledge: Of the surrogate.
      plan: Rounds to come.
    """

    format: Int[Array, ""]
    fingerprint: UInt32[Array, "3"]
    key: UInt32[Array, "2"]
    step: Int[Array, ""]
    data_step: Int[Array, ""]
    phase: Int[Array, ""]
    segment_left: Int[Array, ""]
    segment_length: Int[Array, ""]
    incumbent: Float[Array, "d"]
    trial: Float[Array, "d"]
    discarded: Int[Array, ""]
    rollbacks: Int[Array, ""]
    anneal_start: Int[Array, ""]
    anneal_steps: Int[Array, ""]
    outcome: Int[Array, ""]
    health: Health
    range_test: RangeTest
    window: Window
    round: Round
    slots: Slots
    validation: Validation
    knowledge: Knowledge
    plan: Plan


def no_health() -> Health:
    """Before the first loss."""
    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return Health(
        monitor=loss_monitor.init(),
        initial_loss=jnp.full((), jnp.nan, jnp.float32),
        best_level=jnp.full((), jnp.inf, jnp.float32),
        held_level=jnp.full((), jnp.inf, jnp.float32),
        held_spread=jnp.zeros((), jnp.float32),
        known_level=jnp.full((), -jnp.inf, jnp.float32),
        scale=jnp.zeros((), jnp.float32),
        lowered=jnp.zeros((), jnp.float32),
        bad_run=zero,
        bad_steps=zero,
        has_failed=no,
        has_faulted=no,
        retries=zero,
        since_rollback=jnp.full((), NEVER, jnp.int32),
    )


def empty_range_test() -> RangeTest:
    """Before its first step."""
    return RangeTest(jnp.zeros(MAX_RANGE_TEST, jnp.float32), jnp.zeros((), jnp.int32))


def empty_window() -> Window:
    """Sums over nothing."""
    zero = jnp.zeros((), jnp.float32)
    return Window(zero, zero, jnp.full((), -jnp.inf, jnp.float32), zero, zero, zero)


def no_validation() -> Validation:
    """Before the first metric."""
    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    nan, inf = jnp.full((), jnp.nan, jnp.float32), jnp.full((), jnp.inf, jnp.float32)
    return Validation(
        level=nan,
        best=inf,
        hot=inf,
        read_at=zero,
        worse=zero,
        better=zero,
        climbed=jnp.zeros((), jnp.float32),
        climbed_at=jnp.full((), -1, jnp.int32),
        cools_from=jnp.full((), NEVER, jnp.int32),
        retreats=zero,
        has_fallen=no,
        keeps=no,
        returns=no,
        is_kept=no,
    )


def empty_round(dims: int, index: Array | int) -> Round:
    """A round of which nothing has run yet."""
    nan = jnp.full((), jnp.nan, jnp.float32)
    return Round(
        index=jnp.asarray(index, jnp.int32),
        fork=jnp.zeros((), jnp.int32),
        kept=jnp.full((), -1, jnp.int32),
        has_eval=jnp.zeros((), bool),
        reference=nan,
        x=jnp.zeros((MAX_FORKS, dims), jnp.float32),
        score=jnp.full((MAX_FORKS,), jnp.nan, jnp.float32),
        steps=jnp.zeros((MAX_FORKS,), jnp.int32),
        status=jnp.full((MAX_FORKS,), FORK_UNUSED, jnp.int32),
        p_better=jnp.full((MAX_FORKS,), jnp.nan, jnp.float32),
        lead=jnp.full((MAX_FORKS,), jnp.nan, jnp.float32),
        deviation=jnp.full((MAX_FORKS,), jnp.nan, jnp.float32),
    )


def nothing_to_do(ts: TunerState, verdict: Array | int = loss_monitor.HEALTHY) -> Directive:
    """The directive of a step after which the loop just goes on."""
    no = jnp.zeros((), bool)
    return Directive(
        save=no,
        restore=no,
        keep=no,
        adopt=no,
        evaluate=no,
        data_step=ts.data_step,
        outcome=jnp.zeros((), jnp.int32),
        verdict=jnp.asarray(verdict, jnp.int32),
    )


def later(ts: TunerState, steps: Array) -> TunerState:
    """The state ``steps`` quiet steps later: time passes, and nothing is heard."""
    since = jnp.minimum(ts.health.since_rollback + steps, NEVER)
    return ts._replace(
        step=ts.step + steps,
        data_step=ts.data_step + steps,
        segment_left=ts.segment_left - steps,
        health=ts.health._replace(since_rollback=since),
    )


def position(ts: TunerState) -> Int[Array, ""]:
    """Steps already taken in the running segment."""
    return ts.segment_length - ts.segment_left
