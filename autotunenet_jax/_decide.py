"""The costly half of the controller: what to do when a stretch of training ends.

One call scores the fork that ended, refits the surrogate, and either lets the fork run on, starts the next one, or ends
the round. Fit, acquisition and posterior appear once each, so that the whole decision compiles quickly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from . import _acquisition, _belief, _bracket, _guard, _in_between, _kernels, _observations, _surrogate, _validation
from ._plan import FAST, MAX_FORKS, MAX_ROUNDS, NEVER, RAISE, SLOW
from ._policy import Policy, directions
from ._single_kernel import once, single_kernel
from ._space import SearchSpace
from ._state import (
    FORK,
    FORK_DROPPED,
    FORK_FAILED,
    FORK_FINISHED,
    FORK_RUNNING,
    OUTCOME_FORK_CONTINUES,
    OUTCOME_FORK_STARTED,
    OUTCOME_RETRIED,
    OUTCOME_ROUND_FAILED,
    OUTCOME_ROUND_MOVED,
    OUTCOME_ROUND_SKIPPED,
    OUTCOME_ROUND_STARTED,
    OUTCOME_ROUND_STAYED,
    SWEEP,
    TRAIN,
    Directive,
    Round,
    TunerState,
    empty_round,
    empty_window,
)
from ._tick import LEAST_GAIN, position, probation_steps


def _expected_improvement(mean: Array, covariance: Array, best: Array) -> Array:
    """Expected improvement of the last point over point ``best``, from their joint posterior."""
    gain = mean[best] - mean[-1]
    variance = covariance[-1, -1] + covariance[best, best] - 2.0 * covariance[best, -1]
    deviation = jnp.sqrt(jnp.maximum(variance, 1e-12))
    return deviation * _acquisition.expected_excess(gain / deviation)


def _probability_better(mean: Array, covariance: Array, challenger: Array, holder: Array) -> Array:
    gain = mean[holder] - mean[challenger]
    variance = covariance[holder, holder] + covariance[challenger, challenger] - 2.0 * covariance[holder, challenger]
    return _acquisition.normal_cdf(gain / jnp.sqrt(jnp.maximum(variance, 1e-12)))


def _select(condition: Array, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


class Ended(NamedTuple):
    """What is known when a stretch of training has ended, before the surrogate is asked.

    Attributes:
      ts: The state, with the stretch's score recorded and its group of observations not yet fitted.
      is_retry: Whether the stretch begins again, since it met a bad batch.
      has_score: Whether the stretch was a fork with a usable score.
      is_hot: Whether it was one whose rate is too high: training became unhealthy, or what it had gained was spoilt.
      steps: Steps the fork has run.
      time: When its score was taken, as the surrogate counts time.
      scores: The observations in the unit of the surrogate.
      belief: The surrogate's prior mean.
      lower: Lower corner of the box to look in.
      upper: Its upper corner.
      is_open: Whether forks on either side of the best one are still to be found worse.
      has_room: Whether rates can be raised.
      is_rival: Which forks a proposal has to improve on.
      between: Points between the best fork and the others, where the choice may fall.
      is_between: Which of them exist.
      around: Those points with their rates lowered, kept and raised.
      fit_key: For the fit.
      propose_key: For the proposal.
    """

    ts: TunerState
    is_retry: Array
    has_score: Array
    is_hot: Array
    steps: Array
    time: Array
    scores: _observations.Observations
    belief: _surrogate.PriorMean
    lower: Float[Array, "d"]
    upper: Float[Array, "d"]
    is_open: Array
    has_room: Array
    is_rival: Array
    between: Float[Array, "p d"]
    is_between: Array
    around: Float[Array, "q d"]
    fit_key: PRNGKeyArray
    propose_key: PRNGKeyArray


@single_kernel(static_argnums=(0, 1))
def _end(policy: Policy, space: SearchSpace, ts: TunerState) -> Ended:
    """Scores the stretch that ended."""
    space_of = directions(space)
    key, fit_key, propose_key = jax.random.split(ts.key, 3)
    plan, held = ts.plan, ts.round
    row = held.index
    fork, rung = held.fork, held.rung
    remaining = _remaining(ts)
    retries = ts.has_faulted & (remaining > plan.late[row] + plan.sweep[row])
    in_fork, in_sweep = (ts.phase == FORK) & ~retries, (ts.phase == SWEEP) & ~retries

    # Its score, next to the others of the round.
    loss = ts.window.loss_sum / ts.window.loss_count
    metric = ts.window.eval_sum / ts.window.eval_count
    is_opening = in_fork & (fork == 0) & (rung == 0)
    has_eval = jnp.where(is_opening, ts.window.eval_count > 0, held.has_eval)
    score = jnp.where(has_eval, metric, loss)
    reference = jnp.where(is_opening & has_eval, ts.eval_level, held.reference)
    reference = jnp.where(jnp.isfinite(reference), reference, score)
    succeeded = in_fork & ~ts.has_failed & jnp.isfinite(score)
    # Even where it is the best one, a fork that spoils what training has come to is not gone on from: so says its loss,
    # beyond noise, and the metric where there is one.
    lost = policy.lost_share * (ts.initial_loss - ts.best_level)
    spoils = loss - ts.best_level > jnp.maximum(lost, LEAST_GAIN * ts.guard.spread)
    gained = ts.validation.first - reference
    spoils &= ~has_eval | ((gained > 0.0) & (score > reference + policy.lost_share * gained))
    spoils &= in_fork & (plan.kind[row] == RAISE)
    succeeded &= ~spoils
    in_fork, in_sweep, retries, succeeded, spoils = once(in_fork, in_sweep, retries, succeeded, spoils)
    has_eval, score, reference = once(has_eval, score, reference)
    steps_run = jnp.where(ts.phase == FORK, held.steps[fork], 0) + position(ts)
    is_fork = jnp.arange(MAX_FORKS) == fork
    is_score = in_fork & is_fork[:, None] & (jnp.arange(held.score.shape[1]) == rung)
    held = held._replace(
        has_eval=has_eval,
        reference=reference,
        x=jnp.where(in_fork & is_fork[:, None], ts.trial, held.x),
        score=jnp.where(is_score, jnp.where(succeeded, score, jnp.nan), held.score),
        # A fork that begins again has run no step that counts.
        steps=jnp.where(is_fork & (in_fork | retries), jnp.where(in_fork, steps_run, 0), held.steps),
    )
    # Time is measured along the branch that survives, in logarithms: early steps change the objective most.
    time = jnp.log1p((ts.slots.saved_data + steps_run) / 10.0)
    added = _observations.add(
        ts.observations,
        ts.trial,
        jnp.where(succeeded, score - reference, 0.0),
        time=time,
        group=held.group + rung,
        failed=~succeeded,
    )
    observations = _select(in_fork, added, ts.observations)
    prior = _select(in_sweep, _belief.prior_after_sweep(policy, space_of, ts), ts.prior)
    ts = ts._replace(key=key, round=held, observations=observations, prior=prior)

    # Groups are numbered two to a round.
    is_slow = plan.kind[jnp.clip(observations.group // 2, 0, MAX_ROUNDS - 1)] == SLOW
    resolution = jnp.where(is_slow, policy.slow_resolution, policy.fast_resolution)
    scores = _belief.normalised(observations, resolution=resolution)
    begins = (ts.phase == TRAIN) | in_sweep
    held_now = held._replace(x=jnp.where(begins, ts.incumbent[None, :], held.x))
    known = _bracket.bracket(policy, space_of, held_now)
    lower, upper = _bracket.box(policy, space_of, ts._replace(round=held_now), plan.kind[row], known)
    is_rival = _bracket.is_run(held) & (held.status != FORK_FAILED)
    is_scored = is_rival & jnp.isfinite(held.score[:, rung])
    between, is_between = _in_between.between(policy, space, held.x, known.best, is_scored)
    return Ended(
        ts=ts,
        is_retry=retries,
        has_score=succeeded,
        is_hot=in_fork & (ts.has_failed | spoils),
        steps=steps_run,
        time=time,
        scores=scores,
        belief=_belief.recentred(policy, space_of, scores, prior),
        lower=lower,
        upper=upper,
        is_open=known.is_open_below | known.is_open_above,
        has_room=known.has_room,
        is_rival=is_rival,
        between=between,
        is_between=is_between,
        around=_in_between.around(policy, space_of, between),
        fit_key=fit_key,
        propose_key=propose_key,
    )


def _remaining(ts: TunerState) -> Array:
    """Steps left of the budget."""
    return jnp.where(ts.plan.total > 0, ts.plan.total - ts.step, NEVER)


def decide(
    config: _kernels.SurrogateConfig,
    policy: Policy,
    space: SearchSpace,
    ts: TunerState,
) -> tuple[TunerState, Directive, Round]:
    """What to do now that a stretch of training has ended.

    Returns:
      The next state, what the loop must do, and the round as it stood when the decision was taken.

    Cost: one surrogate fit, one acquisition, one posterior; O(capacity^3), whatever the length of the run.
    """
    ended = _end(policy, space, ts)
    posterior = _surrogate.fit(config, ended.scores, start=ts.hyper, key=ended.fit_key, prior_mean=ended.belief)
    proposal = _acquisition.propose(
        config,
        posterior,
        ended.propose_key,
        lower=ended.lower,
        upper=ended.upper,
        snap=space.snap,
        reference=ended.ts.round.x,
        reference_mask=ended.is_rival,
        time=ended.time,
    )
    points = jnp.concatenate([ended.ts.round.x, proposal[None], ended.around])
    mean, covariance = _surrogate.predict(config, posterior, points, time=ended.time)
    return _choose(policy, space, ended, posterior.hyper, proposal, mean, covariance)


@single_kernel(static_argnums=(0, 1))
def _choose(
    policy: Policy,
    space: SearchSpace,
    ended: Ended,
    hyper: _kernels.Hyper,
    proposal: Float[Array, "d"],
    mean: Float[Array, "m"],
    covariance: Float[Array, "m m"],
) -> tuple[TunerState, Directive, Round]:
    """Lets the fork run on, starts the next one, or ends the round."""
    space_of = directions(space)
    ts, retries, succeeded, steps_run = ended.ts, ended.is_retry, ended.has_score, ended.steps
    plan, held, prior = ts.plan, ts.round, ts.prior
    row, fork, rung = held.index, held.fork, held.rung
    kind, late, remaining = plan.kind[row], plan.late[row], _remaining(ts)
    in_train, in_fork, in_sweep = ts.phase == TRAIN, (ts.phase == FORK) & ~retries, (ts.phase == SWEEP) & ~retries
    robust = jnp.asarray(_in_between.WEIGHTS) @ mean[MAX_FORKS + 1 :].reshape(len(_in_between.WEIGHTS), -1)
    mean, covariance = mean[: MAX_FORKS + 1], covariance[: MAX_FORKS + 1, : MAX_FORKS + 1]

    # Does the fork run on, win, or end?
    holder = jnp.maximum(held.kept, 0)
    has_holder = held.kept >= 0
    p_better = jnp.where(has_holder, _probability_better(mean, covariance, fork, holder), 1.0)
    is_late = (rung == 1) | (plan.early[row] >= late)
    continues = succeeded & ~is_late & (p_better >= policy.drop_below)
    raises = kind == RAISE
    score = held.score[fork, rung]
    lead = held.score[holder, rung] - score
    gains = (lead > 0.0) & (lead > policy.raise_gain * jnp.abs(held.reference - score))
    is_better = jnp.where(raises, gains, p_better > policy.move)
    wins = succeeded & is_late & (~has_holder | is_better)
    ends = in_fork & ~continues
    status = jnp.where(
        continues,
        FORK_RUNNING,
        jnp.where(succeeded, jnp.where(is_late, FORK_FINISHED, FORK_DROPPED), FORK_FAILED),
    )
    is_fork = in_fork & (jnp.arange(MAX_FORKS) == fork)
    lost_steps = jnp.where(wins, jnp.where(has_holder, held.steps[holder], 0), steps_run)
    discarded = ts.discarded + jnp.where(ends, lost_steps, 0) + jnp.where(in_sweep, position(ts), 0)
    discarded = discarded + jnp.where(retries, steps_run, 0)
    held = held._replace(
        kept=jnp.where(wins, fork, held.kept),
        status=jnp.where(is_fork, status, held.status),
        p_better=jnp.where(is_fork, p_better, held.p_better),
    )
    has_kept = held.kept >= 0
    best = jnp.maximum(held.kept, 0)
    fork_loss = ts.window.loss_sum / ts.window.loss_count
    held = held._replace(lowest=jnp.where(ends & succeeded, jnp.fmin(held.lowest, fork_loss), held.lowest))
    report = held

    # Is another fork worth its price, and within the budget?
    budget = jnp.where(plan.total > 0, plan.total, jnp.maximum(ts.step, 1000)) * plan.share
    gives_away = _bracket.gives_away(policy, ts)
    given_away = jnp.where(gives_away & has_kept, held.steps[best], 0)
    affordable = discarded + given_away + late <= budget
    gain = jnp.where(has_kept, _expected_improvement(mean, covariance, best), jnp.inf)
    may_fork = jnp.where(has_kept, fork + 1 < plan.forks[row], fork + 1 < MAX_FORKS)
    # A fast round compares two forks before it weighs any price. The first one looks to both sides, and has a fork more
    # for each further hyperparameter: rates move together until then.
    least = jnp.where(ts.rounds_held == 0, max(int(np.sum(~space_of.is_slow)), 1), 0)
    is_due = (kind == FAST) & (fork <= least) | (_bracket.explores(ts) & ended.is_open)
    is_worth_it = is_due | (gain > jnp.where(kind == FAST, policy.price, policy.slow_price))
    # Upward as long as that gains, and there is room.
    is_worth_it = jnp.where(raises, wins & ended.has_room, is_worth_it)
    forks_again = ends & may_fork & affordable & is_worth_it & (remaining > late)
    finishes = ends & ~forks_again
    has_kept, best, wins, continues = once(has_kept, best, wins, continues)
    forks_again, finishes = once(forks_again, finishes)

    # A round begins with the incumbent, unless the sweep says its rate is far off.
    holds = in_train & (remaining > late) & affordable & ((kind != SLOW) | jnp.isfinite(ts.eval_level))
    # What already gets worse in validation wants no higher rates.
    holds &= ~raises | (ended.has_room & ~_validation.is_worse(ts))
    skips = in_train & ~holds
    starts_sweep = holds & (plan.sweep[row] > 0)
    is_far = jnp.abs(ts.incumbent - prior.center) * space_of.decades > policy.plausible_decades
    opening = space.snap(jnp.where(in_sweep & space_of.is_rate & is_far, prior.center, ts.incumbent))
    starts_fork = (holds & ~starts_sweep) | in_sweep | forks_again
    holds, skips, starts_sweep, starts_fork = once(holds, skips, starts_sweep, starts_fork)
    trial = jnp.where(forks_again, proposal, jnp.where(starts_fork, opening, ts.trial))

    # Fast hyperparameters need not be those of a fork: the best may lie between two.
    tilt = policy.tilt * jnp.where(space_of.is_rate, ended.between * space_of.decades, 0.0).sum(axis=1)
    halfway = ended.between[jnp.argmin(jnp.where(ended.is_between, robust + tilt, jnp.inf))]
    winner = jnp.where((kind == FAST) & jnp.any(ended.is_between), halfway, held.x[best])
    # Where even the fork of the rate in force is too hot, that rate is by now.
    step = jnp.where(space_of.is_rate & ended.is_hot, policy.spread_decades / space_of.decades, 0.0)
    chosen = jnp.where(has_kept, winner, jnp.where(raises, jnp.maximum(ts.incumbent - step, 0.0), proposal))
    incumbent = jnp.where(finishes, chosen, ts.incumbent)
    moved = jnp.any(jnp.abs(incumbent - ts.incumbent) > 1e-6)
    keep = wins
    begins_afresh = finishes & has_kept & gives_away
    probation = jnp.where(begins_afresh, probation_steps(late), jnp.where(holds, 0, ts.probation))
    discarded = discarded + jnp.where(begins_afresh, given_away, 0)
    adopt = finishes & has_kept & ~wins & ~begins_afresh
    restore = in_sweep | forks_again | retries | (finishes & ~has_kept) | begins_afresh
    save = holds

    data_step = jnp.where(restore, ts.slots.saved_data, jnp.where(adopt, ts.slots.kept_data, ts.data_step))
    # A state that every fork spoiled is not shown the same data again, nor is one that met a bad batch.
    data_step = jnp.where((finishes & ~has_kept) | retries, ts.data_step, data_step)
    data_step = jnp.where(adopt, jnp.maximum(data_step, ts.slots.saved_data), data_step)
    slots = ts.slots._replace(
        saved_data=jnp.where(save | retries, ts.data_step, ts.slots.saved_data),
        saved_step=jnp.where(save, ts.step, ts.slots.saved_step),
        kept_data=jnp.where(keep, ts.data_step, ts.slots.kept_data),
        kept_step=jnp.where(keep, ts.step, ts.slots.kept_step),
    )
    # The best fork is not what training goes on from: a rollback prefers the state that it does go on from.
    slots = slots._replace(kept_step=jnp.where(begins_afresh, slots.saved_step - 1, slots.kept_step))

    # A round takes the place of the best state: what it begins from, and then its winner, is what is to be bettered.
    is_won = raises & wins & held.has_eval
    metric = jnp.where(is_won, score, ts.eval_level)
    level = jnp.where(is_won, fork_loss, ts.guard.short)
    measured = _validation.measured_from(ts, metric, level, is_kept=is_won)
    validation = _select(is_won | (holds & raises & jnp.isfinite(ts.eval_level)), measured, ts.validation)

    # A rate that is no longer too low, and from which training still comes down, is worth its height for longer.
    comes_down = has_kept & held.has_eval & (held.score[0, rung] < held.reference)
    waits = jnp.where(comes_down, remaining / jnp.maximum(plan.total, 1), 0.0)

    # The next round, and the segment that leads to it.
    next_row = jnp.where(finishes | skips, row + 1, row)
    opened = empty_round(held.x.shape[1], index=next_row, group=held.group)
    fresh = opened._replace(group=held.group + 2)
    held = _select(finishes | skips, fresh, held)
    held = _select(holds, opened, held)
    held = held._replace(
        fork=jnp.where(forks_again, fork + 1, held.fork),
        rung=jnp.where(continues, 1, jnp.where(starts_fork | retries, 0, held.rung)),
    )
    # No round begins on probation: it would take the place of the state to go back to.
    until_round = jnp.maximum(plan.start[next_row] - ts.step, probation + 1)
    until_round = jnp.where(plan.start[next_row] >= NEVER, NEVER, until_round)
    segment = jnp.where(continues, late - plan.early[row], plan.early[row])
    sweeps = starts_sweep | (retries & (ts.phase == SWEEP))
    segment = jnp.where(sweeps, plan.sweep[row], segment)
    segment = jnp.where(finishes | skips, until_round, segment).astype(jnp.int32)
    phase = jnp.where(starts_sweep, SWEEP, jnp.where(continues | starts_fork, FORK, TRAIN))
    phase = jnp.where(retries, ts.phase, phase).astype(jnp.int32)

    moved_or_not = jnp.where(moved, OUTCOME_ROUND_MOVED, OUTCOME_ROUND_STAYED)
    outcome = jnp.select(
        [retries, finishes & has_kept, finishes, continues, holds, starts_fork],
        [
            OUTCOME_RETRIED,
            moved_or_not,
            OUTCOME_ROUND_FAILED,
            OUTCOME_FORK_CONTINUES,
            OUTCOME_ROUND_STARTED,
            OUTCOME_FORK_STARTED,
        ],
        OUTCOME_ROUND_SKIPPED,
    ).astype(jnp.int32)

    # What the guard knows of the loss belongs to the state it was measured on: it starts afresh with each fork.
    changes_state = continues | starts_fork | finishes | retries
    guard = _select(changes_state, ts.guard._replace(count=jnp.zeros_like(ts.guard.count)), ts.guard)
    guard = guard._replace(strikes=jnp.where(changes_state, 0, guard.strikes))
    new = ts._replace(
        data_step=data_step,
        phase=phase,
        segment_left=segment,
        segment_length=segment,
        incumbent=incumbent,
        trial=trial,
        has_failed=jnp.zeros_like(ts.has_failed),
        has_faulted=jnp.zeros_like(ts.has_faulted),
        retries=jnp.where(finishes, 0, ts.retries + retries),
        discarded=discarded,
        rounds_held=ts.rounds_held + finishes,
        since_restart=jnp.where(begins_afresh, 0, ts.since_restart),
        probation=probation.astype(jnp.int32),
        promised=jnp.where(begins_afresh, report.lowest, ts.promised),
        hold=jnp.where(finishes & raises, waits, ts.hold),
        outcome=outcome,
        validation=validation,
        window=empty_window(),
        round=held,
        slots=slots,
        guard=guard,
        hyper=hyper,
    )
    off = jnp.zeros((), bool)
    return (
        new,
        Directive(
            save=save,
            restore=restore,
            keep=keep,
            adopt=adopt,
            evaluate=off,
            data_step=data_step,
            outcome=outcome,
            verdict=jnp.int32(_guard.HEALTHY),
        ),
        report,
    )
