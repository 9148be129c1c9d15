"""The costly half of the controller: what to do when a stretch of training ends.

One call scores the fork that ended, refits the surrogate, and either lets the fork run on, starts the next one, or ends
the round. Fit, acquisition and posterior appear once each, so that the whole decision compiles quickly.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from . import _acquisition, _guard, _observations, _surrogate
from ._plan import FAST, MAX_FORKS, MAX_ROUNDS, NEVER, SLOW
from ._space import Choice, SearchSpace
from ._space import Float as FloatParameter
from ._space import Int as IntParameter
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
from ._targets import group_median
from ._tick import position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Constants of the decisions; scores are in units of the progress that the best fork of a round made.

    Args:
      fast_resolution: Shortfall, as a share of the gain of a round's best fork, below which scores of fast rounds count
        in proportion.
      slow_resolution: The same in slow rounds, where small differences say little of what the rest of the run brings.
      drop_below: A fork is dropped at its early score when its probability of beating the kept one is below this.
      move_fast: Probability of being better that a fork of a fast round needs to replace the kept one.
      move_slow: The same in slow rounds.
      price: Least expected improvement worth another fast fork.
      slow_price: The same for a slow fork.
      sweep_offset: How far below the sweep's lowest loss the best rate is expected, in decades.
      cut_offset: The same where the loss was still falling at the upper bound, below that bound.
      sweep_curvature: Expected loss of score at one decade from there, doubled.
      center_decades: Standard deviation of the best rate about where the sweep says it is.
      center_noise: Standard deviation of a score about the prior mean's shape.
      spread_decades: How far below and above its first fork the second and third of the first round are, at least.
      slow_center: Where, in the unit cube, slow hyperparameters are expected to be best before anything is known.
      slow_curvature: Expected loss of score at distance one from there, doubled.
      plausible_decades: A starting rate this close to the expected best is tried first.
      fast_reach_decades: How far from the expected best rate the first round may look.
      blur_decades: How far the best rate of the whole run may lie from that of a fork, to either side: a rate is chosen
        for the scores around it, so that it keeps its distance from where training breaks.
      later_reach: Half-width, in the unit cube, of the trust region of later rounds.
    """

    fast_resolution: float = 0.05
    slow_resolution: float = 1.0
    drop_below: float = 0.4
    move_fast: float = 0.5
    move_slow: float = 0.6
    price: float = 0.003
    slow_price: float = 0.01
    sweep_offset: float = 0.5
    cut_offset: float = 0.15
    sweep_curvature: float = 1.6
    center_decades: float = 0.6
    center_noise: float = 0.08
    spread_decades: float = 0.5
    slow_center: float = 0.5
    slow_curvature: float = 0.6
    plausible_decades: float = 0.3
    fast_reach_decades: float = 1.0
    blur_decades: float = 0.3
    later_reach: float = 0.3


# What a rate lowered, kept and raised weighs where a choice is judged by its surroundings.
_WEIGHTS = (0.25, 0.5, 0.25)

# The posterior of the centre is computed on a grid of offsets, in decades, under Student's t of few degrees of freedom.
_CENTER_REACH, _CENTER_GRID, _CENTER_DEGREES = 1.5, 61, 3.0

# A fork that lost more than this many times what the best one gained is as bad as any.
_WORST_SHARE = 4.0

# Between the best fork and each other one, the points where the choice may fall; 0 is the fork itself.
_BETWEEN = (0.0, 0.25, 0.5, 0.75)


class Directions(NamedTuple):
    """Constants of a search space, as arrays over its dimensions."""

    is_rate: np.ndarray
    is_slow: np.ndarray
    decades: np.ndarray


def directions(space: SearchSpace) -> Directions:
    """Which dimensions are rates or slow, and how many decades each spans (its whole range, when linear, counts 4)."""

    def span(p: FloatParameter | IntParameter | Choice) -> float:
        return math.log10(p.hi / p.lo) if not isinstance(p, Choice) and p.log else 4.0

    roles = space.roles
    return Directions(
        is_rate=np.array([role == "rate" for role in roles]),
        is_slow=np.array([role == "slow" for role in roles]),
        decades=np.array([span(p) for _, p in space.params], np.float32),
    )


def normalised(obs: _observations.Observations, *, resolution: Float[Array, "n"] | float) -> _observations.Observations:
    """Scores as logarithms of how far they are from the best of their group, in shares of what the best one gained.

    Raw scores are differences to the group's reference, so the best one, negated, is the gain over the state they all
    started from. Where there was none, the spread of the group stands in. Shortfalls well below ``resolution`` of the
    gain count in proportion, larger ones by their logarithm: 0 is the best fork, 1 one that gained nothing. Adding a
    constant to the loss changes nothing, nor does scaling it.
    """
    usable = _observations.mask(obs) & ~obs.failed
    same = (obs.group[:, None] == obs.group[None, :]) & usable[None, :]
    lowest = jnp.min(jnp.where(same, obs.y[None, :], jnp.inf), axis=1)
    lowest = jnp.where(jnp.isfinite(lowest), lowest, 0.0)
    excess = obs.y - lowest
    mean_excess = jnp.sum(jnp.where(same, excess[None, :], 0.0), axis=1) / jnp.maximum(jnp.sum(same, axis=1), 1)
    scale = jnp.maximum(jnp.maximum(-lowest, 2.0 * mean_excess), 1e-12)
    share = jnp.clip(excess / scale, 0.0, _WORST_SHARE)
    return obs._replace(y=jnp.where(usable, jnp.log1p(share / resolution) / jnp.log1p(1.0 / resolution), 0.0))


def _expected_improvement(mean: Array, covariance: Array, best: Array) -> Array:
    """Expected improvement of the last point over point ``best``, from their joint posterior."""
    gain = mean[best] - mean[-1]
    variance = covariance[-1, -1] + covariance[best, best] - 2.0 * covariance[best, -1]
    deviation = jnp.sqrt(jnp.maximum(variance, 1e-12))
    z = gain / deviation
    return gain * norm.cdf(z) + deviation * norm.pdf(z)


def _probability_better(mean: Array, covariance: Array, challenger: Array, holder: Array) -> Array:
    gain = mean[holder] - mean[challenger]
    variance = covariance[holder, holder] + covariance[challenger, challenger] - 2.0 * covariance[holder, challenger]
    return norm.cdf(gain / jnp.sqrt(jnp.maximum(variance, 1e-12)))


def _select(condition: Array, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _prior_after_sweep(policy: Policy, space_of: Directions, ts: TunerState) -> _surrogate.PriorMean:
    # A loss still falling at the upper bound has not shown its lowest point: the best rate is near the bound.
    is_cut = ts.sweep.position >= 1.0 - 2.5 / jnp.maximum(ts.segment_length - 1, 1)
    offset = jnp.where(is_cut, policy.cut_offset, policy.sweep_offset) / space_of.decades
    center = jnp.clip(ts.sweep.position - offset, 0.0, 1.0)
    curvature = policy.sweep_curvature * jnp.asarray(space_of.decades) ** 2
    return _surrogate.PriorMean(
        center=jnp.where(space_of.is_rate, center, ts.prior.center),
        curvature=jnp.where(space_of.is_rate, curvature, ts.prior.curvature),
    )


def _recentred(
    policy: Policy, space_of: Directions, obs: _observations.Observations, prior: _surrogate.PriorMean
) -> _surrogate.PriorMean:
    """Moves the centre of the prior mean to where the scores say it is, one rate at a time.

    Scores rise on both sides of the best rate much alike whatever is trained, so forks far from it tell where it is,
    and better than those near it, which noise ranks. Taken is the mean of the centre's posterior under a heavy-tailed
    error, about what the sweep said.

    Cost: O(dims * grid * capacity).
    """
    usable = _observations.mask(obs) & ~obs.failed
    same = (obs.group[:, None] == obs.group[None, :]) & usable[None, :]
    offsets = jnp.linspace(-_CENTER_REACH, _CENTER_REACH, _CENTER_GRID)

    def error(residual: Array) -> Array:
        return jnp.square(residual / policy.center_noise) / _CENTER_DEGREES

    def centre(axis: Array, decades: Array) -> Array:
        def log_posterior(offset: Array) -> Array:
            mean = prior._replace(center=prior.center + axis * offset / decades)
            residual = obs.y - jnp.minimum(_surrogate.bowl(mean, obs.x), 1.0)
            # The group's intercept: a mean of which scores far from the median are no part.
            trust = same / (1.0 + error(residual - group_median(residual, same))[None, :])
            residual -= trust @ residual / jnp.maximum(jnp.sum(trust, axis=1), 1e-6)
            likelihood = -0.5 * (_CENTER_DEGREES + 1.0) * jnp.sum(jnp.where(usable, jnp.log1p(error(residual)), 0.0))
            return likelihood - 0.5 * jnp.square(offset / policy.center_decades)

        weight = jax.nn.softmax(jax.vmap(log_posterior)(offsets))
        return jnp.sum(weight * offsets) / decades

    shift = jax.vmap(centre)(jnp.eye(len(space_of.decades)), jnp.asarray(space_of.decades))
    is_known = space_of.is_rate & (prior.curvature > 0)
    return prior._replace(center=jnp.where(is_known, jnp.clip(prior.center + shift, 0.0, 1.0), prior.center))


def first_prior(policy: Policy, space_of: Directions, incumbent: Float[Array, "d"]) -> _surrogate.PriorMean:
    """What is believed before the run: nothing of the fast hyperparameters, moderate values of the slow ones."""
    return _surrogate.PriorMean(
        center=jnp.where(space_of.is_slow, policy.slow_center, incumbent),
        curvature=jnp.where(space_of.is_slow, policy.slow_curvature, 0.0).astype(jnp.float32),
    )


def _box(policy: Policy, space_of: Directions, ts: TunerState, kind: Array) -> tuple[Array, Array]:
    """Where the round may look: its own kind's dimensions near what is known, the others where they are."""
    is_first = ts.rounds_held == 0
    reach_first = policy.fast_reach_decades / space_of.decades
    knows_rate = ts.prior.curvature > 0
    center = jnp.where(is_first & space_of.is_rate & knows_rate, ts.prior.center, ts.incumbent)
    reach = jnp.where(space_of.is_rate & knows_rate, jnp.where(is_first, reach_first, policy.later_reach), 1.0)
    active = jnp.where(kind == SLOW, space_of.is_slow, ~space_of.is_slow)
    fixed = ts.round.x[0]
    lower = jnp.where(active, jnp.maximum(center - reach, 0.0), fixed)
    upper = jnp.where(active, jnp.minimum(center + reach, 1.0), fixed)
    # The second and third fork of the first round go to either side of the first: far scores tell where the best is.
    spread = policy.spread_decades / space_of.decades
    is_spread = is_first & active & space_of.is_rate & knows_rate
    below = is_spread & (ts.round.fork == 0) & (fixed - spread > lower)
    above = is_spread & (ts.round.fork == 1) & (fixed + spread < upper)
    return jnp.where(above, fixed + spread, lower), jnp.where(below, fixed - spread, upper)


def _between(
    space: SearchSpace, x: Float[Array, "forks d"], score: Float[Array, "forks"], is_run: Array
) -> tuple[Float[Array, "p d"], Array]:
    """Points on the way from the fork with the best score to the other ones, snapped, and which of them exist."""
    is_scored = is_run & jnp.isfinite(score)
    pivot = x[jnp.argmin(jnp.where(is_scored, score, jnp.inf))]
    # Between two options without order there is nothing.
    step = jnp.where(jnp.asarray(space.is_categorical), 0.0, x - pivot)
    points = pivot + jnp.asarray(_BETWEEN, jnp.float32)[:, None, None] * step
    return space.snap(points.reshape(-1, x.shape[1])), jnp.tile(is_scored, len(_BETWEEN))


def _around(policy: Policy, space_of: Directions, x: Float[Array, "p d"]) -> Float[Array, "q d"]:
    """The points with their rates lowered, kept and raised: one after the other, in the order of the weights."""
    step = jnp.where(jnp.asarray(space_of.is_rate), policy.blur_decades / jnp.asarray(space_of.decades), 0.0)
    return jnp.concatenate([jnp.clip(x + sign * step, 0.0, 1.0) for sign in (-1.0, 0.0, 1.0)])


def decide(
    config: _surrogate.SurrogateConfig,
    policy: Policy,
    space: SearchSpace,
    ts: TunerState,
) -> tuple[TunerState, Directive, Round]:
    """What to do now that a stretch of training has ended.

    Returns:
      The next state, what the loop must do, and the round as it stood when the decision was taken.

    Cost: one surrogate fit, one acquisition, one posterior; O(capacity^3), whatever the length of the run.
    """
    space_of = directions(space)
    key, fit_key, propose_key = jax.random.split(ts.key, 3)
    plan, held = ts.plan, ts.round
    row = held.index
    kind, late = plan.kind[row], plan.late[row]
    in_train, in_sweep, in_fork = ts.phase == TRAIN, ts.phase == SWEEP, ts.phase == FORK
    fork, rung = held.fork, held.rung
    remaining = jnp.where(plan.total > 0, plan.total - ts.step, NEVER)
    retries = ts.has_faulted & (remaining > late + plan.sweep[row])
    in_fork, in_sweep = in_fork & ~retries, in_sweep & ~retries

    # The stretch that ended: its score, next to the others of the round.
    ran = position(ts)
    loss = ts.window.loss_sum / ts.window.loss_count
    metric = ts.window.eval_sum / ts.window.eval_count
    is_opening = in_fork & (fork == 0) & (rung == 0)
    has_eval = jnp.where(is_opening, ts.window.eval_count > 0, held.has_eval)
    score = jnp.where(has_eval, metric, loss)
    reference = jnp.where(is_opening & has_eval, ts.eval_level, held.reference)
    reference = jnp.where(jnp.isfinite(reference), reference, score)
    succeeded = in_fork & ~ts.has_failed & jnp.isfinite(score)
    steps_run = jnp.where(ts.phase == FORK, held.steps[fork], 0) + ran
    held = held._replace(
        has_eval=has_eval,
        reference=reference,
        x=jnp.where(in_fork, held.x.at[fork].set(ts.trial), held.x),
        score=jnp.where(in_fork, held.score.at[fork, rung].set(jnp.where(succeeded, score, jnp.nan)), held.score),
        # A fork that begins again has run no step that counts.
        steps=held.steps.at[fork].set(jnp.where(in_fork, steps_run, jnp.where(retries, 0, held.steps[fork]))),
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
    prior = _select(in_sweep, _prior_after_sweep(policy, space_of, ts), ts.prior)
    ts = ts._replace(prior=prior)

    # Groups are numbered two to a round.
    is_slow = plan.kind[jnp.clip(observations.group // 2, 0, MAX_ROUNDS - 1)] == SLOW
    resolution = jnp.where(is_slow, policy.slow_resolution, policy.fast_resolution)
    scores = normalised(observations, resolution=resolution)
    belief = _recentred(policy, space_of, scores, prior)
    posterior = _surrogate.fit(config, scores, start=ts.hyper, key=fit_key, prior_mean=belief)
    held_x = held.x
    is_run = (jnp.arange(MAX_FORKS) <= fork) & (held.steps > 0)
    opens = in_train
    held_now = held._replace(x=jnp.where(opens | in_sweep, ts.incumbent[None, :], held_x))
    lower, upper = _box(policy, space_of, ts._replace(round=held_now), kind)
    proposal = _acquisition.propose(
        config,
        posterior,
        propose_key,
        lower=lower,
        upper=upper,
        snap=space.snap,
        reference=held_x,
        reference_mask=is_run & (held.status != FORK_FAILED),
        time=time,
    )
    between, is_between = _between(space, held_x, held.score[:, rung], is_run & (held.status != FORK_FAILED))
    around = _around(policy, space_of, between)
    mean, covariance = _surrogate.predict(
        config, posterior, jnp.concatenate([held_x, proposal[None], around]), time=time
    )
    robust = jnp.asarray(_WEIGHTS) @ mean[MAX_FORKS + 1 :].reshape(len(_WEIGHTS), -1)
    mean, covariance = mean[: MAX_FORKS + 1], covariance[: MAX_FORKS + 1, : MAX_FORKS + 1]

    # Does the fork run on, win, or end?
    holder = jnp.maximum(held.kept, 0)
    has_holder = held.kept >= 0
    p_better = jnp.where(has_holder, _probability_better(mean, covariance, fork, holder), 1.0)
    is_late = (rung == 1) | (plan.early[row] >= late)
    needed = jnp.where(kind == FAST, policy.move_fast, policy.move_slow)
    continues = succeeded & ~is_late & (p_better >= policy.drop_below)
    wins = succeeded & is_late & (~has_holder | (p_better > needed))
    ends = in_fork & ~continues
    status = jnp.where(
        continues,
        FORK_RUNNING,
        jnp.where(succeeded, jnp.where(is_late, FORK_FINISHED, FORK_DROPPED), FORK_FAILED),
    )
    lost_steps = jnp.where(wins, jnp.where(has_holder, held.steps[holder], 0), steps_run)
    discarded = ts.discarded + jnp.where(ends, lost_steps, 0) + jnp.where(in_sweep, ran, 0)
    discarded = discarded + jnp.where(retries, steps_run, 0)
    held = held._replace(
        kept=jnp.where(wins, fork, held.kept),
        status=jnp.where(in_fork, held.status.at[fork].set(status), held.status),
        p_better=jnp.where(in_fork, held.p_better.at[fork].set(p_better), held.p_better),
    )
    has_kept = held.kept >= 0
    best = jnp.maximum(held.kept, 0)
    report = held

    # Is another fork worth its price, and within the budget?
    budget = jnp.where(plan.total > 0, plan.total, jnp.maximum(ts.step, 1000)) * plan.share
    affordable = discarded + late <= budget
    gain = jnp.where(has_kept, _expected_improvement(mean, covariance, best), jnp.inf)
    may_fork = jnp.where(has_kept, fork + 1 < plan.forks[row], fork + 1 < MAX_FORKS)
    # A fast round looks to either side before it weighs any price.
    is_worth_it = (gain > jnp.where(kind == FAST, policy.price, policy.slow_price)) | (
        (kind == FAST) & (fork <= jnp.where(ts.rounds_held == 0, 1, 0))
    )
    forks_again = ends & may_fork & affordable & is_worth_it & (remaining > late)
    finishes = ends & ~forks_again

    # A round begins with the incumbent, unless the sweep says its rate is far off.
    holds = in_train & (remaining > late) & affordable & ((kind == FAST) | jnp.isfinite(ts.eval_level))
    skips = in_train & ~holds
    starts_sweep = holds & (plan.sweep[row] > 0)
    is_far = jnp.abs(ts.incumbent - prior.center) * space_of.decades > policy.plausible_decades
    opening = space.snap(jnp.where(in_sweep & space_of.is_rate & is_far, prior.center, ts.incumbent))
    starts_fork = (holds & ~starts_sweep) | in_sweep | forks_again
    trial = jnp.where(forks_again, proposal, jnp.where(starts_fork, opening, ts.trial))

    # Fast hyperparameters need not be those of a fork: the best may lie between two.
    halfway = between[jnp.argmin(jnp.where(is_between, robust, jnp.inf))]
    winner = jnp.where((kind == FAST) & jnp.any(is_between), halfway, held.x[best])
    chosen = jnp.where(has_kept, winner, proposal)
    incumbent = jnp.where(finishes, chosen, ts.incumbent)
    moved = jnp.any(jnp.abs(incumbent - ts.incumbent) > 1e-6)
    keep = wins
    adopt = finishes & has_kept & ~wins
    restore = in_sweep | forks_again | retries | (finishes & ~has_kept)
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
    until_round = jnp.maximum(plan.start[next_row] - ts.step, 1)
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
        key=key,
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
        outcome=outcome,
        window=empty_window(),
        round=held,
        slots=slots,
        guard=guard,
        observations=observations,
        hyper=posterior.hyper,
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
