"""The costly half of the controller: what to do when a stretch of training ends.

One call scores the fork that ended, lets the surrogate judge, and starts the next fork or ends the round. There is one
handler for each kind of stretch, and the surrogate is fitted once, so that the whole decision compiles quickly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..bayesopt import trials
from ..compiler.single_kernel import single_kernel
from ..space.search_space import SearchSpace
from . import fork_round, fork_score, fork_surrogate, loss_monitor, range_test
from .plan import FAST, MAX_FORKS, NEVER
from .roles import roles_of
from .rollback import select
from .state import (
    FORK,
    FORK_FAILED,
    FORK_FINISHED,
    KEY_IMPL,
    OUTCOME_FORK_STARTED,
    OUTCOME_RATE_READ,
    OUTCOME_RETRIED,
    OUTCOME_ROUND_FAILED,
    OUTCOME_ROUND_MOVED,
    OUTCOME_ROUND_SKIPPED,
    OUTCOME_ROUND_STARTED,
    OUTCOME_ROUND_STAYED,
    SWEEP,
    TRAIN,
    Directive,
    Health,
    Round,
    TunerState,
    empty_range_test,
    empty_round,
    empty_window,
    nothing_to_do,
    position,
)

PRICE = 0.03
"""Least expected improvement worth another fast fork, in units of the surrogate; chosen on the bank."""

SLOW_PRICE = 0.01
"""The same for a slow fork."""

UNSEEN_DECADES = 0.25
"""How far below the first winner's rates training goes on where only the training loss judged; chosen on the bank."""

# How far rates are lowered where every fork of a round failed, or made its state worse.
_FAILED_DECADES = 0.5


class _Ended(NamedTuple):
    """What is known when a stretch has ended, before the surrogate is asked.

    Attributes:
      ts: State, with the score of the fork that ended.
      candidates: Where the next fork may go.
      is_retry: Whether the stretch begins again, since it met a bad batch.
    """

    ts: TunerState
    candidates: fork_round.Candidates
    is_retry: Bool[Array, ""]


def _remaining(ts: TunerState) -> Array:
    """Steps left of the budget."""
    return jnp.where(ts.plan.total > 0, ts.plan.total - ts.step, NEVER)


@single_kernel(static_argnums=(0,))
def _end(space: SearchSpace, ts: TunerState) -> _Ended:
    """Scores the stretch that ended."""
    key, turn_key = jax.random.split(jax.random.wrap_key_data(ts.key, impl=KEY_IMPL))
    row, fork = ts.round.index, ts.round.fork
    is_retry = ts.health.has_faulted & (_remaining(ts) > ts.plan.length[row] + ts.plan.range_test[row])
    in_fork = (ts.phase == FORK) & ~is_retry
    held = ts.round
    has_eval, score, reference = fork_score.score(ts, is_opening=in_fork & ~fork_round.finished(held).any())
    succeeded = in_fork & ~ts.health.has_failed & jnp.isfinite(score)
    is_fork = in_fork & (jnp.arange(MAX_FORKS) == fork)
    held = held._replace(
        has_eval=has_eval,
        reference=reference,
        x=jnp.where(is_fork[:, None], ts.trial, held.x),
        score=jnp.where(is_fork, jnp.where(succeeded, score, jnp.nan), held.score),
        steps=jnp.where(is_fork, jnp.maximum(position(ts), 1), held.steps),
        status=jnp.where(is_fork, jnp.where(succeeded, FORK_FINISHED, FORK_FAILED), held.status),
    )
    added = trials.add(
        ts.knowledge.observations,
        ts.trial,
        jnp.where(succeeded, (score - reference) / loss_monitor.magnitude(reference), 0.0),
        time=fork_surrogate.time_of(ts.data_step),
        group=row,
        failed=~succeeded,
    )
    knowledge = ts.knowledge._replace(observations=select(in_fork & ~is_void(ts), added, ts.knowledge.observations))
    ts = ts._replace(key=jax.random.key_data(key), round=held, knowledge=knowledge)
    turn = jax.random.uniform(turn_key, (space.dims,))
    return _Ended(ts, fork_round.candidates(space, ts, turn), is_retry)


def decide(space: SearchSpace, ts: TunerState) -> tuple[TunerState, Directive, Round]:
    """What to do now that a stretch of training has ended.

    Returns:
      The next state, what the loop must do, and the round as it stood when the decision was taken.

    Cost: one fit and one posterior; O(capacity^3), whatever the length of the run.
    """
    ended = _end(space, ts)
    points = jnp.concatenate([ended.ts.round.x, ended.candidates.x])
    judged = fork_surrogate.judge(space, ended.ts, points)
    return _choose(space, ended._replace(ts=_compared(ended.ts, judged)), judged)


@single_kernel()
def _compared(ts: TunerState, judged: fork_surrogate.Judgement) -> TunerState:
    """With the lead of the fork that ended over the one kept till then, which is told and decides nothing by itself."""
    held = ts.round
    lead, deviation = fork_surrogate.lead(judged, held.fork, jnp.maximum(held.kept, 0))
    is_compared = (ts.phase == FORK) & (held.kept >= 0) & (jnp.arange(MAX_FORKS) == held.fork)
    return ts._replace(
        round=held._replace(
            lead=jnp.where(is_compared, lead, held.lead),
            deviation=jnp.where(is_compared, deviation, held.deviation),
        )
    )


@single_kernel(static_argnums=(0,))
def _choose(space: SearchSpace, ended: _Ended, judged: fork_surrogate.Judgement) -> tuple[TunerState, Directive, Round]:
    """Carries on by the kind of stretch that ended."""
    ts = ended.ts
    after_fork, fork_directive, report = _after_fork(space, ts, ended.candidates, judged)
    results = [
        (ended.is_retry, _again(ts)),
        (ts.phase == FORK, (after_fork, fork_directive)),
        (ts.phase == SWEEP, _after_range_test(space, ts)),
    ]
    new, directive = _after_training(space, ts)
    for condition, result in reversed(results):
        new, directive = select(condition, result, (new, directive))
    # What the monitor knows of the loss belongs to the state it was measured on: it starts afresh with each stretch.
    changes = directive.save | directive.restore | directive.adopt | (ts.phase != TRAIN)
    monitor = new.health.monitor
    fresh = monitor._replace(count=jnp.zeros_like(monitor.count), strikes=jnp.zeros_like(monitor.strikes))
    no = jnp.zeros((), bool)
    health = new.health._replace(
        monitor=select(changes, fresh, monitor),
        has_failed=no,
        has_faulted=no,
        bad_run=jnp.where(changes, 0, new.health.bad_run),
    )
    new = new._replace(outcome=directive.outcome, window=empty_window(), health=health)
    return new, directive._replace(data_step=new.data_step), select(ts.phase == FORK, report, ts.round)


def _stretch(ts: TunerState, phase: int, steps: Array) -> TunerState:
    """The state with another stretch begun."""
    steps = jnp.asarray(steps, jnp.int32)
    return ts._replace(phase=jnp.int32(phase), segment_left=steps, segment_length=steps)


def _said(ts: TunerState, outcome: int) -> Directive:
    return nothing_to_do(ts)._replace(outcome=jnp.int32(outcome))


def _again(ts: TunerState) -> tuple[TunerState, Directive]:
    """The range test or fork begins again from the saved state, on the data after the bad batch."""
    ts = ts._replace(
        segment_left=ts.segment_length,
        discarded=ts.discarded + position(ts),
        slots=ts.slots._replace(saved_data=ts.data_step),
        range_test=empty_range_test(),
        health=ts.health._replace(retries=ts.health.retries + 1),
    )
    return ts, _said(ts, OUTCOME_RETRIED)._replace(restore=jnp.ones((), bool))


def _opened(space: SearchSpace, ts: TunerState) -> TunerState:
    """The state at the beginning of a round's first fork, which tries the hyperparameters in force."""
    held = empty_round(space.dims, ts.round.index)
    held = held._replace(x=jnp.broadcast_to(ts.incumbent, held.x.shape))
    prior = fork_surrogate.prior_about(roles_of(space), ts.incumbent)
    ts = ts._replace(round=held, trial=ts.incumbent, knowledge=ts.knowledge._replace(prior=prior))
    return _stretch(ts, FORK, fork_round.length_at(space, ts, ts.incumbent))


def _training(ts: TunerState) -> TunerState:
    """The state at the beginning of the stretch that leads to the next round."""
    row = ts.round.index + 1
    held = empty_round(ts.round.x.shape[1], row)
    start = ts.plan.start[row]
    ts = ts._replace(round=held, health=ts.health._replace(retries=jnp.zeros_like(ts.health.retries)))
    return _stretch(ts, TRAIN, jnp.where(start >= NEVER, NEVER, jnp.maximum(start - ts.step, 1)))


def _after_range_test(space: SearchSpace, ts: TunerState) -> tuple[TunerState, Directive]:
    """The rates are where the test says; the first fork begins from the state before it."""
    roles, searches = roles_of(space), ts.plan.forks[ts.round.index] > 0
    # Where no fork looks below it, the rate is that of the fall itself.
    lower = jnp.where(searches, 0.0, -range_test.ABOVE_FALL)
    read = space.snap(roles.shifted(range_test.begin_at(roles, ts), lower))
    ts = ts._replace(
        incumbent=jnp.where(is_void(ts), ts.incumbent, read),
        discarded=ts.discarded + position(ts),
        data_step=ts.slots.saved_data,
    )
    has_forks = searches & ~is_void(ts)
    new = select(has_forks, _opened(space, ts), _training(ts))
    outcome = jnp.where(is_void(ts), OUTCOME_ROUND_SKIPPED, OUTCOME_RATE_READ)
    outcome = jnp.where(has_forks, OUTCOME_FORK_STARTED, outcome).astype(jnp.int32)
    return new, nothing_to_do(ts)._replace(restore=jnp.ones((), bool), outcome=outcome)


def _after_training(space: SearchSpace, ts: TunerState) -> tuple[TunerState, Directive]:
    """A round begins, unless there is nothing to compare by or no budget: one of two forks has to be affordable."""
    row = ts.round.index
    is_blind = (ts.plan.kind[row] != FAST) & ~jnp.isfinite(ts.validation.level)
    length = fork_round.length_at(space, ts, ts.incumbent)
    is_affordable = (ts.discarded + length <= _budget(ts)) & (_remaining(ts) > 2 * length)
    holds = ~is_blind & is_affordable
    slots = ts.slots._replace(saved_data=ts.data_step, saved_step=ts.step)
    opened = _opened(space, ts._replace(slots=slots))
    with_test = _stretch(opened._replace(range_test=empty_range_test()), SWEEP, ts.plan.range_test[row])
    opened = select(ts.plan.range_test[row] > 0, with_test, opened)
    directive = _said(ts, OUTCOME_ROUND_STARTED)._replace(save=jnp.ones((), bool))
    return select(holds, (opened, directive), (_training(ts), _said(ts, OUTCOME_ROUND_SKIPPED)))


def is_void(ts: TunerState) -> Bool[Array, ""]:
    """Whether the stretch that ended met no good batch."""
    return position(ts) == 0


def _budget(ts: TunerState) -> Array:
    """Steps that may be discarded by the end of the round."""
    share = jnp.where(ts.plan.kind[ts.round.index] == FAST, ts.plan.fast_share, ts.plan.share)
    return jnp.where(ts.plan.total > 0, ts.plan.total, jnp.maximum(ts.step, 1000)) * share


def _after_fork(
    space: SearchSpace, ts: TunerState, next_forks: fork_round.Candidates, judged: fork_surrogate.Judgement
) -> tuple[TunerState, Directive, Round]:
    """The fork takes the place of the kept one or is discarded, and the next one begins or the round ends."""
    held, row, fork = ts.round, ts.round.index, ts.round.fork
    succeeded = fork_round.finished(held)[fork]
    holder, has_holder = jnp.maximum(held.kept, 0), held.kept >= 0
    p_better = jnp.where(has_holder, fork_surrogate.probability_better(judged, fork, holder), 1.0)
    wins = succeeded & (~has_holder | (p_better > 0.5))
    lost = jnp.where(wins, jnp.where(has_holder, held.steps[holder], 0), held.steps[fork])
    held = held._replace(
        kept=jnp.where(wins, fork, held.kept),
        p_better=jnp.where(jnp.arange(MAX_FORKS) == fork, p_better, held.p_better),
    )
    slots = ts.slots._replace(
        kept_data=jnp.where(wins, ts.data_step, ts.slots.kept_data),
        kept_step=jnp.where(wins, ts.step, ts.slots.kept_step),
    )
    is_slow = ts.plan.kind[row] != FAST
    health = _held(ts.health, wins, is_slow=is_slow, replaces=is_slow & has_holder)
    ts = ts._replace(round=held, slots=slots, discarded=ts.discarded + lost, health=health)

    best, has_kept = jnp.maximum(held.kept, 0), held.kept >= 0
    gain = jnp.where(next_forks.is_allowed, fork_surrogate.expected_improvement(judged, best)[MAX_FORKS:], -1.0)
    chosen = jnp.argmax(gain)
    # While every fork has failed, and in the first round while none has gained on the state that all began from, lower
    # rates are tried, whatever the surrogate expects.
    has_gained = (fork_round.finished(held) & (held.score <= held.reference)).any()
    seeks = ~has_kept | (~has_gained & (ts.plan.range_test[row] > 0) & next_forks.is_allowed[0])
    chosen = jnp.where(seeks, 0, chosen)
    is_allowed = next_forks.is_allowed[chosen]
    price = jnp.where(ts.plan.kind[row] == FAST, PRICE, SLOW_PRICE)
    is_worth_it = seeks | (fork == 0) | (gain[chosen] > price)
    length = fork_round.length_at(space, ts, next_forks.x[chosen])
    may_fork = fork + 1 < jnp.where(has_kept, ts.plan.forks[row], MAX_FORKS)
    affordable = (ts.discarded + length <= _budget(ts)) & (_remaining(ts) > length)
    again = is_allowed & is_worth_it & may_fork & affordable & ~is_void(ts)
    started, directive = _next_fork(ts, next_forks.x[chosen], length)
    is_spoilt = fork_round.is_spoilt(held)
    ended = _end_round(space, ts, wins, is_spoilt)
    new, directive = select(again, (started, directive), ended)
    held = held._replace(kept=jnp.where(again | ~is_spoilt, held.kept, -1))
    return new, directive._replace(keep=wins), held


def _held(health: Health, wins: Array, *, is_slow: Array, replaces: Array) -> Health:
    """With the level of a fork whose state is kept.

    Under other regularisation the loss may stand elsewhere for good: by as much as between two forks of equal length,
    where one ``replaces`` the other, all that is remembered of it moves.
    """
    level, spread = health.monitor.short, health.monitor.spread
    is_held = wins & ((level < health.held_level) | is_slow)
    moved = jnp.where(wins & replaces, level - health.held_level, 0.0)
    return health._replace(
        initial_loss=health.initial_loss + moved,
        best_level=health.best_level + moved,
        held_level=jnp.where(is_held, level, health.held_level),
        held_spread=jnp.where(is_held, spread, health.held_spread),
    )


def _next_fork(ts: TunerState, x: Float[Array, "d"], length: Array) -> tuple[TunerState, Directive]:
    held = ts.round._replace(fork=ts.round.fork + 1)
    ts = ts._replace(round=held, trial=x, data_step=ts.slots.saved_data)
    ts = _stretch(ts, FORK, length)
    return ts, _said(ts, OUTCOME_FORK_STARTED)._replace(restore=jnp.ones((), bool))


def _end_round(space: SearchSpace, ts: TunerState, is_current: Array, is_spoilt: Array) -> tuple[TunerState, Directive]:
    """Training goes on from the best fork; where all failed or spoilt their state, from it, at lower rates."""
    roles, held = roles_of(space), ts.round
    best, has_kept = jnp.maximum(held.kept, 0), (held.kept >= 0) & ~is_spoilt
    heights = jnp.where(fork_round.has_run(held)[:, None], held.x, 1.0)
    lowest = jnp.where(is_spoilt, held.x[best], jnp.min(heights, axis=0))
    safer = roles.shifted(jnp.where(roles.is_rate, lowest, ts.incumbent), -_FAILED_DECADES)
    safer = jnp.where(ts.plan.kind[held.index] == FAST, safer, ts.incumbent)
    # Later readings of a metric take hot rates back; without one nothing does.
    is_unseen = (ts.plan.range_test[held.index] > 0) & ~held.has_eval
    won = roles.shifted(held.x[best], jnp.where(is_unseen, -UNSEEN_DECADES, 0.0))
    # A fork that met no good batch says nothing.
    is_nothing = is_void(ts) & ~is_spoilt
    incumbent = space.snap(jnp.where(has_kept, won, jnp.where(is_nothing, ts.incumbent, safer)))
    moved = jnp.any(jnp.abs(incumbent - ts.incumbent) > 1e-6)
    failed = jnp.where(is_nothing, OUTCOME_ROUND_SKIPPED, OUTCOME_ROUND_FAILED)
    outcome = jnp.where(has_kept, jnp.where(moved, OUTCOME_ROUND_MOVED, OUTCOME_ROUND_STAYED), failed)
    # The winner is the state of the best reading from here on, or the one that all began from, which the next step
    # keeps; where all failed the copy that is kept still is what it was. What spoilt a state is not shown to it again.
    is_read = has_kept & held.has_eval
    stays_kept = ~has_kept & ~is_spoilt & ts.validation.is_kept
    reading = jnp.where(is_spoilt, held.reference, held.score[best])
    seen = ts.validation._replace(
        level=jnp.where(is_read, held.score[best], ts.validation.level),
        best=jnp.where(is_read | is_spoilt, reading, jnp.where(stays_kept, ts.validation.best, jnp.inf)),
        hot=jnp.full_like(ts.validation.hot, jnp.inf),
        cools_from=jnp.full_like(ts.validation.cools_from, NEVER),
        read_at=ts.step,
        worse=jnp.zeros_like(ts.validation.worse),
        better=jnp.zeros_like(ts.validation.better),
        keeps=is_spoilt,
        returns=jnp.zeros((), bool),
        is_kept=is_read | stays_kept,
    )
    adopt = has_kept & ~is_current
    data_step = jnp.where(adopt, jnp.maximum(ts.slots.kept_data, ts.slots.saved_data), ts.data_step)
    discarded = ts.discarded + jnp.where(is_spoilt, held.steps[best], 0)
    ts = _training(ts._replace(incumbent=incumbent, validation=seen, data_step=data_step, discarded=discarded))
    directive = nothing_to_do(ts)._replace(restore=~has_kept, adopt=adopt, outcome=outcome.astype(jnp.int32))
    return ts, directive
