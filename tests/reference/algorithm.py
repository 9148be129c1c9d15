"""The controller in plain Python: one `if` for every rule, one object that changes, no arrays where a number will do.

It follows the page on how a run tunes itself and what directives mean rather than the compiled code, and takes the
surrogate's answers from a function, so that the two can be compared decision by decision.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Only numbers and names are shared with what is tested, so that they can be tuned.
from autotunenet_jax.controller import (
    decision,
    fork_round,
    fork_surrogate,
    loss_monitor,
    range_test,
    roles,
    rollback,
    schedule,
    tick,
    validation_monitor,
)
from autotunenet_jax.controller import state as names
from autotunenet_jax.controller.plan import FAST, MAX_FORKS, MAX_RANGE_TEST, NEVER

F = np.float32
ZERO, UNKNOWN, LARGE = F(0), F(np.nan), F(np.inf)
TRAIN, SWEEP, FORK = names.TRAIN, names.SWEEP, names.FORK


@dataclasses.dataclass
class Monitor:
    """Running statistics of healthy losses, and what they make of the next one."""

    level: Any = ZERO
    spread: Any = ZERO
    short: Any = ZERO
    count: int = 0
    strikes: int = 0
    peak: Any = ZERO
    lowest: Any = np.finfo(F).max
    since_lowest: int = 0

    def see(self, guard: Any, loss: Any, ceiling: Any, limit: Any, known: Any) -> int:
        """Takes one loss in; the verdict."""
        is_warm = self.count >= guard.warmup
        if not np.isfinite(loss):
            return loss_monitor.SKIPPED
        self.since_lowest += is_warm
        sigma = self.spread / F(math.sqrt(2 / math.pi))
        slack = F(1e-5) * abs(self.level) + F(1e-12)
        unusual = is_warm and loss > max(self.level, known) + F(guard.sigmas) * sigma + slack
        unusual = bool(unusual or loss > min(limit, ceiling))
        reach = self.level + F(loss_monitor._REACH_SIGMAS) * sigma + slack
        is_known = self.count >= loss_monitor.FIRST_VALUES
        clipped = min(max(loss, 2 * self.level - reach), reach) if is_known else loss
        self.short += max(F(0.2), F(1 / (self.count + 1))) * (clipped - self.short)
        diverged = is_known and self.short > ceiling
        height = min(loss, ceiling if np.isfinite(ceiling) else reach) - self.level
        is_returning = height < F(loss_monitor._RETURNING_SHARE) * self.peak
        self.peak = max(F(loss_monitor._PEAK_MEMORY) * self.peak, height) if is_warm else ZERO
        if unusual:
            self.strikes += not is_returning
        else:
            self.strikes = max(self.strikes - 1, 0)
            rate = max(F(1 / guard.window), F(1 / (self.count + 1)))
            self.level += rate * (clipped - self.level)
            if self.count > 0:
                self.spread += rate * (abs(clipped - self.level) - self.spread)
            self.count += 1
            if is_warm and self.level < self.lowest - F(loss_monitor._PROGRESS_SIGMAS) * sigma - slack:
                self.lowest, self.since_lowest = self.level, 0
        if diverged:
            return loss_monitor.DIVERGED
        if self.strikes >= guard.patience:
            return loss_monitor.SPIKE
        if unusual:
            return loss_monitor.WATCHING
        return loss_monitor.STALLED if self.since_lowest >= guard.stall_steps else loss_monitor.HEALTHY

    def start_afresh(self, loss: Any) -> None:
        """What was high is the level from here on."""
        self.level = self.short = self.lowest = loss
        self.count = self.strikes = self.since_lowest = 0
        self.peak = ZERO


class RangeTest:
    """The losses of rates that climb from bound to bound, and where they say training should begin."""

    def __init__(self):
        self.losses, self.count = np.zeros(MAX_RANGE_TEST, F), 0

    def see(self, loss: Any) -> None:
        self.losses[self.count] = loss
        self.count += 1

    def _start(self) -> tuple[Any, Any]:
        """What the loss is before it falls, and its noise."""
        first = self.losses[: range_test._FIRST + 2]
        medians = [np.median(first[i : i + 3]) for i in range(range_test._FIRST)]
        return np.mean(medians, dtype=F), F(np.sqrt(F(0.5) * np.mean(np.square(np.diff(first)), dtype=F)))

    def _limit(self, lowest: Any) -> Any:
        start, noise = self._start()
        return start + max(F(range_test._RISE_SIGMAS) * noise, F(0.5) * max(start - lowest, ZERO))

    def is_blown(self) -> bool:
        """Whether the loss is well above where it began."""
        if self.count <= range_test._FIRST + 2:
            return False
        return bool(np.median(self.losses[self.count - 5 : self.count]) > self._limit(self.losses[: self.count].min()))

    def read(self, length: int, decades: float) -> float:
        """Where to begin, as a share of the range."""
        count = max(self.count, 3)
        medians = [np.median(self.losses[max(min(i, count - 2), 1) - 1 :][:3]) for i in range(count)]
        smooth = [sum(medians[max(min(i + k, count - 1), 0)] for k in (-1, 0, 1)) / F(3) for i in range(count)]
        start, noise = self._start()
        limit = self._limit(min(smooth))
        end = min(max((i + 1 for i in range(count) if smooth[i] <= limit), default=0), count - 1)
        lowest = min(smooth[: max(end, 1)])
        fall = start - lowest
        if fall > F(range_test._FALL_SIGMAS) * noise + F(range_test._ROUNDING) * abs(start):
            done = [next(i for i in range(count) if smooth[i] <= start - F(m) * fall) for m in range_test._MARKS]
            share = sum(done) / 2 / max(length - 1, 1) + range_test.ABOVE_FALL / decades
        else:
            share = end / max(length - 1, 1) - range_test._BELOW_END / decades
        return min(max(share, 0.0), 1.0)


def mean_of_usual(losses: list[Any]) -> Any:
    """The highest loss may be a bad batch's: it counts up to four standard deviations above the others."""
    *others, highest = sorted(losses)
    if len(others) > 1:
        highest = min(highest, F(np.mean(others, dtype=np.float64) + 4 * np.std(others, dtype=np.float64)))
    return F(sum(others, ZERO) + highest) / F(len(losses))


def magnitude(value: Any) -> Any:
    """A power of two near a value."""
    exponent = math.frexp(float(value))[1] if np.isfinite(value) and value != 0 else 0
    return F(2.0 ** min(max(exponent, -100), 100))


@dataclasses.dataclass
class Fork:
    """One fork of the round being held."""

    x: np.ndarray
    score: Any = UNKNOWN
    steps: int = 0
    status: int = names.FORK_RUNNING


@dataclasses.dataclass
class Observation:
    """A fork that ended; ``y`` is its score above its round's reference, None where it failed."""

    x: np.ndarray
    y: Any
    time: float
    row: int


@dataclasses.dataclass
class Readings:
    """The validation metric outside rounds."""

    best: Any = LARGE
    hot: Any = LARGE
    read_at: int = 0
    worse: int = 0
    better: int = 0
    is_on_trial: bool = False
    climbed: Any = ZERO
    cools_from: int | None = None
    keeps: bool = False
    returns: bool = False
    is_kept: bool = False


@dataclasses.dataclass
class Copy:
    """Where one of the two copies of the training state was taken."""

    data: int = 0
    step: int = 0


@dataclasses.dataclass
class Said:
    """What one step came to; the fields of a directive."""

    save: bool = False
    restore: bool = False
    keep: bool = False
    adopt: bool = False
    evaluate: bool = False
    data_step: int = 0
    outcome: int = names.OUTCOME_NONE
    verdict: int = loss_monitor.HEALTHY


def hold(spent: float) -> float:
    """The schedule that a run has unless the user wants another."""
    return min(1.0, (1.0 - spent) / (1.0 - schedule.HOLD_SHARE))


class Algorithm:
    """A run that tunes itself.

    Args:
      space: What is tuned; `Float` parameters only.
      plan: Of NumPy arrays.
      guard: Thresholds of the monitor.
      start: Where the run starts, unit cube.
      surrogate: ``(observations, points, time) -> (mean, covariance)`` of the shortfall at some points, given forks
        whose ``y`` is their shortfall.
      spread: ``() -> points``: for each decision, what fills the unit cube.
      decay: Factor on the rates over the share of the budget that is spent.
      warmup_steps: Steps over which rates rise at the beginning.
    """

    def __init__(
        self,
        space: Any,
        plan: Any,
        *,
        guard: Any,
        start: np.ndarray,
        surrogate: Callable[..., tuple[np.ndarray, np.ndarray]],
        spread: Callable[[], np.ndarray],
        decay: Callable[[float], float] = hold,
        warmup_steps: int = 0,
    ):
        self.plan, self.guard, self.surrogate, self.spread = plan, guard, surrogate, spread
        self.params, self.decay, self.warmup_steps = space.params, decay, warmup_steps
        self.is_rate = np.array([role == "rate" for role in space.roles])
        self.is_slow = np.array([role == "slow" for role in space.roles])
        self.decades = np.array([math.log10(p.hi / p.lo) if p.log else 4.0 for _, p in space.params], F)
        self.incumbent = self.trial = np.asarray(start, F)
        self.step = self.data_step = self.discarded = self.rollbacks = self.retries = 0
        self.since_rollback = NEVER
        self.monitor, self.initial_loss, self.best_level = Monitor(), UNKNOWN, LARGE
        self.held_level, self.held_spread, self.known_level = LARGE, ZERO, -LARGE
        self.scale, self.bad_run, self.bad_steps, self.lowered = ZERO, 0, 0, 0.0
        self.readings, self.metric_level, self.retreats = Readings(), UNKNOWN, 0
        self.has_fallen = False
        self.saved, self.kept = Copy(), Copy()
        self.observations: list[Observation] = []
        self.row = 0
        self._new_round()
        if plan.start[0] > 0:
            self._begin(TRAIN, int(plan.start[0]))
        elif plan.range_test[0] > 0:
            self._begin(SWEEP, int(plan.range_test[0]))
        else:
            self._start_fork(self.incumbent)

    def _new_round(self) -> None:
        self.forks: list[Fork] = []
        self.winner: int | None = None
        self.has_eval, self.reference = False, UNKNOWN

    def _begin(self, phase: int, length: int) -> None:
        self.phase, self.length, self.left = phase, length, length
        self.scored: list[Any] = []
        self.scored_metrics: list[Any] = []
        self.test = RangeTest()

    def _start_fork(self, x: np.ndarray) -> None:
        self.trial = x
        self.forks.append(Fork(x))
        self._begin(FORK, self._length(x))

    def _length(self, x: np.ndarray) -> int:
        """Steps of a fork: batch sizes are compared at equal samples."""
        planned = int(self.plan.length[self.row])
        for (name, param), u in zip(self.params, x, strict=True):
            if name == "batch_size":
                at = float(u)
                size = param.lo * (param.hi / param.lo) ** at if param.log else param.lo + at * (param.hi - param.lo)
                ratio = min(max(math.sqrt(param.lo * param.hi) / size, 0.25), 4.0)
                return max(round(planned * ratio), 8)
        return planned

    @property
    def _remaining(self) -> int:
        return int(self.plan.total) - self.step if self.plan.total else NEVER

    @property
    def _budget(self) -> Any:
        share = self.plan.fast_share if self.plan.kind[self.row] == FAST else self.plan.share
        return F(self.plan.total or max(self.step, 1000)) * F(share)

    def _shifted(self, x: np.ndarray, decades: float) -> np.ndarray:
        moved = np.where(self.is_rate, x + F(decades) / self.decades, x)
        return np.clip(moved, 0, 1).astype(F)

    # What is in force.

    def hyperparams(self) -> dict[str, float]:
        """Values for the next step, by name."""
        at, x, factor = self.length - self.left, self.incumbent, self._factor()
        if self.phase == SWEEP:
            x, factor = np.where(self.is_rate, at / max(self.length - 1, 1), x), 1.0
        elif self.phase == FORK:
            x = self.trial
            factor *= self._factor_of_fork(at)
        values = {}
        for (name, param), u, is_rate in zip(self.params, x.astype(float), self.is_rate, strict=True):
            value = param.lo * (param.hi / param.lo) ** u if param.log else param.lo + u * (param.hi - param.lo)
            values[name] = value * factor if is_rate else value
        return values

    def _factor(self) -> float:
        spent = min(self.step / self.plan.total, 1.0) if self.plan.total else 0.0
        factor = self.decay(spent) if self.plan.total else 1.0
        rise = (self.since_rollback + 1) / schedule.REWARM_STEPS
        if self.phase != FORK and self.warmup_steps:
            rise = min(rise, (self.data_step + 1) / self.warmup_steps)
        if self.phase != FORK and self.readings.cools_from is not None:
            cooled = (self.step - self.readings.cools_from) / self.plan.check_every
            factor *= max(1.0 - cooled, schedule.COOL_FLOOR)
        return factor * min(rise, 1.0)

    def _factor_of_fork(self, at: int) -> float:
        last = max(round(schedule.COOL_SHARE * self.length), 1)
        factor = min(max((self.length - at) / last, schedule.COOL_FLOOR), 1.0)
        if self.saved.data < self.warmup_steps:
            rise = min(max(round(schedule.FORK_WARMUP_SHARE * self.length), 1), self.warmup_steps)
            factor = min(factor, (at + 1) / rise)
        return factor

    # Validation.

    def observe_eval(self, metric: Any) -> None:
        """Takes a metric in, to be minimised."""
        metric = F(metric)
        if self.phase == FORK and self.left == 1:
            self.scored_metrics.append(metric)
        seen = self.readings
        if (self.phase == TRAIN or self.step == 0) and np.isfinite(metric):
            if not np.isfinite(self.metric_level):
                seen.hot, seen.worse = LARGE, 0
            self.metric_level = metric
        is_last = bool(self.plan.total) and self._remaining <= 1
        is_spaced = self.step - seen.read_at >= F(validation_monitor._SPACING) * F(self.plan.check_every)
        value = metric if np.isfinite(metric) else LARGE
        if self.phase == TRAIN and (is_last or is_spaced):
            self._read(value, is_last)
        elif self.phase == TRAIN and value < seen.best and not seen.returns:
            # However close two readings are, the better state is kept.
            seen.best, seen.keeps, seen.is_kept = value, True, False

    def _read(self, value: Any, is_last: bool) -> None:
        seen = self.readings
        is_best, best, before = value < seen.best, seen.best, self.incumbent
        is_above = value == LARGE or value > best
        returns = False
        seen.read_at = self.step
        if seen.cools_from is not None:
            # The rates have cooled down: was the state only hot?
            seen.cools_from, seen.worse = None, 0
            seen.hot = best if is_above else LARGE
            seen.better = 0
            if is_above and seen.is_kept:
                self.incumbent = self._shifted(self.incumbent, -validation_monitor.BACK_DECADES)
                returns = True
        elif seen.is_on_trial and not is_best and seen.is_kept:
            # The rates climbed too high.
            self.incumbent = self._shifted(self.incumbent, -seen.climbed)
            seen.hot, seen.worse, seen.better, seen.climbed, returns = LARGE, 0, 0, F(-1), True
        else:
            seen.better = seen.better + 1 if is_best else 0
            seen.worse = seen.worse + 1 if value == LARGE or value > seen.hot else 0
            seen.hot = min(seen.hot, value)
            is_ending = self.plan.total and self._remaining < F(validation_monitor.ENDING_SHARE) * F(self.plan.total)
            if seen.worse >= validation_monitor.PATIENCE and not is_ending and np.isfinite(best):
                seen.cools_from, seen.worse = self.step, 0
        gap = -LARGE
        if self.observations and self.plan.range_test[0] > 0 and self.is_rate.any():
            gap = np.max(((self.observations[0].x - before) * self.decades)[self.is_rate])
        is_far = gap > validation_monitor.FAR_DECADES
        climb = F(0.5) * gap if is_far else F(validation_monitor.CLIMB_DECADES)
        seen.is_on_trial = self._may_climb(seen, climb, is_far)
        if seen.is_on_trial:
            seen.better, seen.climbed = 0, climb
            self.incumbent = self._shifted(self.incumbent, climb)
        if is_last and is_above and seen.is_kept:
            returns = True
        if is_best:
            seen.best, seen.keeps, seen.is_kept = value, True, False
        seen.returns = returns
        if returns:
            seen.keeps = False
            self.retreats += 1

    def _may_climb(self, seen: Readings, climb: Any, is_far: bool) -> bool:
        until = F(1) - F(validation_monitor.ENDING_SHARE) if is_far else F(schedule.HOLD_SHARE)
        has_time = self.step < until * F(self.plan.total) and self.left > self.plan.check_every
        is_unhurt = (self.retreats == 0 and self.rollbacks == 0) or (is_far and seen.climbed >= 0)
        room = self.is_rate & (self.incumbent + climb / self.decades <= 1)
        return bool(seen.better >= validation_monitor.PATIENCE and has_time and is_unhurt and room.any())

    def _limit(self) -> Any:
        if self.phase != TRAIN or self.held_level == LARGE:
            return LARGE
        reach = F(self.guard.sigmas / math.sqrt(2 / math.pi))
        half_way = self.held_level + F(0.5) * max(self.initial_loss - self.held_level, ZERO)
        known = self.known_level + reach * max(self.held_spread, self.monitor.spread)
        return max(half_way, self.held_level + reach * self.held_spread, known)

    def _hear_training(self, loss: Any, is_finite: bool, failed: bool) -> None:
        """Without a metric, the mean training loss between two readings is one."""
        if is_finite:
            self.scored.append(loss)
        is_over = self.step % self.plan.check_every == 0
        has_enough = len(self.scored) >= F(validation_monitor._SPACING) * F(self.plan.check_every)
        if is_over and has_enough and self.plan.total and not np.isfinite(self.metric_level):
            value, seen = F(sum(self.scored, ZERO)) / F(len(self.scored)), self.readings
            seen.worse = 0 if value < seen.hot else seen.worse + 1
            seen.hot = min(seen.hot, value)
            is_ending = self._remaining < F(validation_monitor.ENDING_SHARE) * F(self.plan.total)
            if seen.worse >= validation_monitor.PATIENCE and not is_ending and not self.has_fallen:
                seen.hot, seen.worse = LARGE, 0
                self.has_fallen = True
                self.incumbent = self._shifted(self.incumbent, -validation_monitor.BACK_DECADES)
        if is_over or failed:
            self.scored = []

    # One step.

    def update(self, loss: Any) -> Said:
        """Takes the loss of a step in."""
        said, loss = Said(), F(loss)
        is_known = self.phase == TRAIN and self.monitor.count >= loss_monitor.FIRST_VALUES
        if self.scale == 0 and np.isfinite(loss) and loss != 0:
            self.scale = magnitude(loss)
        loss = loss / (self.scale or F(1))
        if not is_known and abs(loss) >= loss_monitor._LOSS_LIMIT:
            loss = UNKNOWN
        is_finite = bool(np.isfinite(loss))
        usual = self._limit()
        verdict, is_blue = self._see(loss, is_finite, usual)
        failed = verdict in (loss_monitor.NON_FINITE, loss_monitor.SPIKE, loss_monitor.DIVERGED)
        at = self.length - self.left
        waits = self.phase != TRAIN and at == 0 and not is_finite
        self.left -= not waits
        self.step += 1
        self.data_step += 1
        if waits and (self.phase == SWEEP or len(self.forks) == 1):
            self.saved.data = self.data_step
        is_over = False
        if self.phase == SWEEP:
            if not waits:
                self.test.see(loss if is_finite else self.test.losses[max(self.test.count - 1, 0)])
            is_over = failed or self.test.is_blown()
        elif self.phase == FORK:
            is_over = failed
            if is_finite:
                self._hear_fork(loss * self.scale, at)
            said.evaluate = self.left == 1
        else:
            self._hear_training(loss, is_finite, failed)
            is_last = bool(self.plan.total) and self.step >= self.plan.total
            if is_last and not failed and is_finite and loss > usual and np.isnan(self.metric_level):
                verdict, failed = loss_monitor.SPIKE, True
            if failed:
                self._unhealthy(loss, verdict, is_blue, said)
        if self.phase == TRAIN and self.readings.returns and self.readings.is_kept:
            # No round begins before the way back has been taken.
            self.left = max(self.left, 1)
        if self.phase == TRAIN and not is_finite:
            self.left = max(self.left, 1)
        due = is_over or self.left <= 0
        if self.phase == TRAIN:
            is_well = verdict in (loss_monitor.HEALTHY, loss_monitor.STALLED)
            if (is_well and not due and self.monitor.strikes == 0) or (is_last and not failed):
                self._snapshots(said)
            said.evaluate = self._wants_reading()
        self.since_rollback = min(self.since_rollback + 1, NEVER)
        if due:
            may_retry = self.phase != TRAIN and self.retries < loss_monitor.MAX_RETRIES
            said = self._decide(self.phase == FORK and failed, is_blue and may_retry)
        said.data_step, said.verdict = self.data_step, verdict
        return said

    def _see(self, loss: Any, is_finite: bool, usual: Any) -> tuple[int, bool]:
        """The monitor's verdict, and whether a loss that is not finite came out of the blue."""
        ceiling = LARGE
        good_steps = self.step - self.bad_steps
        # In forks of a slow round the loss may stand elsewhere, whatever the training's health.
        is_judged = self.phase != FORK or self.plan.kind[self.row] == FAST
        if good_steps >= tick.FIRST_LOSSES and is_judged:
            progress = max(self.initial_loss - self.best_level, ZERO)
            doubt = max(F(1), F(tick._SPREAD_VALUES) / F(max(self.monitor.count, 1)))
            ceiling = self.initial_loss + F(0.5) * progress + F(6) * doubt * self.monitor.spread
        limit = np.fmax(self.monitor.level, self.initial_loss) + F(loss_monitor._CALM_SIGMAS) * self.monitor.spread
        has_climbed = self.monitor.short > limit
        is_new = bool(np.isnan(self.initial_loss))
        verdict = self.monitor.see(self.guard, loss, ceiling, usual, self.known_level)
        self.bad_run = 0 if is_finite else self.bad_run + 1
        self.bad_steps += not is_finite
        if self.bad_run >= loss_monitor.BAD_RUN and not is_new:
            verdict = loss_monitor.NON_FINITE
        is_blue = verdict == loss_monitor.NON_FINITE and not has_climbed
        if is_finite:
            if np.isnan(self.initial_loss):
                self.initial_loss = loss
            elif good_steps < tick.FIRST_LOSSES:
                self.initial_loss += (loss - self.initial_loss) / F(good_steps + 1)
            if self.monitor.count >= tick.FIRST_LOSSES:
                self.best_level = min(self.best_level, self.monitor.short)
                is_lowest = self.monitor.short < self.held_level
                if self.phase == TRAIN and verdict == loss_monitor.HEALTHY and is_lowest:
                    self.held_level, self.held_spread = self.monitor.short, self.monitor.spread
        return verdict, is_blue

    def _wants_reading(self) -> bool:
        has_round = self.plan.start[self.row] < NEVER
        is_due = self.step % self.plan.check_every == 0
        return bool(is_due or (has_round and self.left == 1) or self.plan.total - self.step == 1)

    def _hear_fork(self, loss: Any, at: int) -> None:
        if at >= self.length - max(round(schedule.COOL_SHARE * self.length), 2):
            self.scored.append(loss)
        if len(self.forks) == 1 and at == 0:
            self.reference = loss
        elif len(self.forks) == 1 and at == 1:
            self.reference = F(0.5) * (self.reference + loss)

    def _snapshots(self, said: Said) -> None:
        seen = self.readings
        if seen.returns and seen.is_kept:
            seen.returns = False
            said.adopt = True
            self.monitor.count, self.monitor.peak = 0, ZERO
            return
        seen.returns = False
        saved_age, kept_age = self.step - 1 - self.saved.step, self.step - 1 - self.kept.step
        if seen.is_kept or seen.keeps:
            # The kept copy is that of the best reading; the saved one is the newest.
            if saved_age >= self.plan.save_every:
                self.saved, said.save = Copy(self.data_step, self.step), True
            if seen.keeps:
                self.kept, said.keep = Copy(self.data_step, self.step), True
                seen.keeps, seen.is_kept = False, True
        elif min(saved_age, kept_age) >= self.plan.save_every:
            if saved_age >= kept_age:
                self.saved, said.save = Copy(self.data_step, self.step), True
            else:
                self.kept, said.keep = Copy(self.data_step, self.step), True

    def _unhealthy(self, loss: Any, verdict: int, is_blue: bool, said: Said) -> None:
        is_finite = verdict != loss_monitor.NON_FINITE
        at_once = (self.monitor.strikes if is_finite else self.bad_run) > self.since_rollback
        if at_once and not is_finite:
            return
        if at_once:
            # As high on a snapshot that good losses had been heard from: the data has changed.
            self._take_as_it_is(loss)
            self.readings, self.metric_level = Readings(), UNKNOWN
            self.retreats = self.has_fallen = False
            self.incumbent, self.lowered = self._shifted(self.incumbent, self.lowered), 0.0
            said.outcome = names.OUTCOME_ACCEPTED
            return
        if is_finite and self.rollbacks >= self.guard.max_rollbacks:
            self._take_as_it_is(loss)
            if self.guard.max_rollbacks > 0:
                self.plan = self.plan._replace(start=np.full_like(self.plan.start, NEVER))
                self.left = NEVER
            return
        said.outcome = names.OUTCOME_ROLLBACK
        age = self.step - 1
        saved_age, kept_age = age - self.saved.step, age - self.kept.step
        saved_is_newer = saved_age < kept_age
        is_safe = min(saved_age, kept_age) >= rollback._MIN_SNAPSHOT_AGE
        said.restore = saved_is_newer == is_safe
        said.adopt = not said.restore
        if not is_safe and saved_is_newer:
            self.saved.step = self.kept.step - 1
        elif not is_safe:
            self.kept.step = self.saved.step - 1
        within = rollback._BLUE_RETREAT_WITHIN if is_blue else rollback._RETREAT_WITHIN
        is_repeated = self.since_rollback < within
        is_to_blame = is_repeated or verdict == loss_monitor.DIVERGED
        self.lowered = rollback._RETREAT_DECADES if is_to_blame else 0.0
        self.incumbent = self._shifted(self.incumbent, -self.lowered)
        self.bad_run = 0
        self.monitor.strikes, self.monitor.peak = 0, ZERO
        self.monitor.short = np.fmin(self.monitor.level, self.initial_loss)
        self.rollbacks += 1
        self.since_rollback = -1
        self.left = max(self.left, 1)

    def _take_as_it_is(self, loss: Any) -> None:
        self.monitor.start_afresh(loss)
        self.initial_loss = np.fmax(self.initial_loss, loss)
        self.known_level = np.fmax(self.known_level, loss)

    # The end of a stretch.

    def _decide(self, fork_failed: bool, is_bad_batch: bool) -> Said:
        row, said, phase = self.row, Said(), self.phase
        ran = self.length - self.left
        points = self.spread()
        if is_bad_batch and self._remaining > self.plan.length[row] + self.plan.range_test[row]:
            # It begins again on the data after it.
            self.retries += 1
            self.discarded += ran
            self.saved.data = self.data_step
            self._begin(phase, self.length)
            said.restore, said.outcome = True, names.OUTCOME_RETRIED
        elif phase == SWEEP:
            width = float(np.mean(self.decades[self.is_rate]))
            is_void = ran == 0
            if not is_void:
                share = self.test.read(self.length, width)
                self.incumbent = np.where(self.is_rate, F(share), self.incumbent)
                if self.plan.forks[row] == 0:
                    self.incumbent = self._shifted(self.incumbent, -range_test.ABOVE_FALL)
            self.discarded += ran
            self.data_step = self.saved.data
            said.restore = True
            if is_void:
                said.outcome = names.OUTCOME_ROUND_SKIPPED
                self._to_next_round()
            elif self.plan.forks[row] > 0:
                said.outcome = names.OUTCOME_FORK_STARTED
                self._start_fork(self.incumbent)
            else:
                said.outcome = names.OUTCOME_RATE_READ
                self._to_next_round()
        elif phase == TRAIN:
            self._open(said)
        else:
            self._fork_ended(fork_failed, ran, points, said)
        if phase != TRAIN or said.save:
            self.bad_run = 0
            self.monitor.count = self.monitor.strikes = 0
        return said

    def _to_next_round(self) -> None:
        self.row += 1
        self.retries = 0
        self._new_round()
        start = int(self.plan.start[self.row])
        self._begin(TRAIN, NEVER if start >= NEVER else max(start - self.step, 1))

    def _open(self, said: Said) -> None:
        length = self._length(self.incumbent)
        is_blind = self.plan.kind[self.row] != FAST and not np.isfinite(self.metric_level)
        is_affordable = self.discarded + length <= self._budget and self._remaining > 2 * length
        if is_blind or not is_affordable:
            said.outcome = names.OUTCOME_ROUND_SKIPPED
            self._to_next_round()
            return
        said.save, said.outcome = True, names.OUTCOME_ROUND_STARTED
        self.saved = Copy(self.data_step, self.step)
        if self.plan.range_test[self.row] > 0:
            self._begin(SWEEP, int(self.plan.range_test[self.row]))
        else:
            self._start_fork(self.incumbent)

    def _fork_ended(self, fork_failed: bool, ran: int, points: np.ndarray, said: Said) -> None:
        row, kind, fork = self.row, self.plan.kind[self.row], self.forks[-1]
        # It met no good batch, and says nothing.
        self.is_void = ran == 0
        if not any(earlier.status == names.FORK_FINISHED for earlier in self.forks[:-1]):
            self.has_eval = bool(self.scored_metrics) and bool(np.isfinite(self.scored_metrics[-1]))
            if self.has_eval:
                self.reference = self.metric_level
        score = UNKNOWN
        if self.has_eval and self.scored_metrics:
            score = self.scored_metrics[-1]
        elif not self.has_eval and kind == FAST and self.scored:
            score = mean_of_usual(self.scored)
        if not np.isfinite(self.reference):
            self.reference = score
        succeeded = not fork_failed and bool(np.isfinite(score))
        fork.steps = max(ran, 1)
        fork.score = score if succeeded else UNKNOWN
        fork.status = names.FORK_FINISHED if succeeded else names.FORK_FAILED
        time = math.log1p(self.data_step / 10)
        if not self.is_void:
            y = (score - self.reference) / magnitude(self.reference) if succeeded else None
            self.observations.append(Observation(self.trial, y, time, row))

        candidates = self._candidates(points)
        places = np.stack([f.x for f in self.forks] + [x for x, _ in candidates])
        mean, covariance = self.surrogate(self._shortfalls(), places, time)

        last = len(self.forks) - 1
        if succeeded and self.winner is not None:
            gain, deviation = lead(mean, covariance, last, self.winner)
            wins = normal_cdf(gain / deviation) > 0.5
        else:
            wins = succeeded
        if wins:
            self.discarded += 0 if self.winner is None else self.forks[self.winner].steps
            if self.winner is not None and self.plan.kind[self.row] != FAST:
                self.initial_loss += self.monitor.short - self.held_level
                self.best_level += self.monitor.short - self.held_level
            self.winner, said.keep = last, True
            if self.monitor.short < self.held_level or self.plan.kind[self.row] != FAST:
                self.held_level, self.held_spread = self.monitor.short, self.monitor.spread
            self.kept = Copy(self.data_step, self.step)
        else:
            self.discarded += ran

        x, goes_on = self._next(candidates, mean, covariance)
        length = self._length(x)
        if goes_on and not self.is_void and self.discarded + length <= self._budget and self._remaining > length:
            self.data_step = self.saved.data
            self._start_fork(x)
            said.restore, said.outcome = True, names.OUTCOME_FORK_STARTED
        else:
            self._end_round(wins, said)

    def _next(
        self, candidates: list[tuple[np.ndarray, bool]], mean: np.ndarray, covariance: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """The next fork's place, and whether there should be one."""
        kind, most = self.plan.kind[self.row], self.plan.forks[self.row]
        has_gained = any(f.status == names.FORK_FINISHED and f.score <= self.reference for f in self.forks)
        if self.winner is None:
            # While all have failed, lower rates are tried.
            x, is_allowed = candidates[0]
            return x, is_allowed and len(self.forks) < MAX_FORKS
        if self.plan.range_test[self.row] > 0 and not has_gained and candidates[0][1]:
            # And while none has gained, in the first round.
            return candidates[0][0], len(self.forks) < most
        gains = []
        for number, (_, is_allowed) in enumerate(candidates):
            gain, deviation = lead(mean, covariance, len(self.forks) + number, self.winner)
            gains.append(expected_improvement(gain, deviation) if is_allowed else -1.0)
        chosen = int(np.argmax(gains))
        x, is_allowed = candidates[chosen]
        price = decision.PRICE if kind == FAST else decision.SLOW_PRICE
        is_worth_it = len(self.forks) == 1 or gains[chosen] > price
        return x, is_allowed and is_worth_it and len(self.forks) < most

    def _shortfalls(self) -> list[Observation]:
        """What the surrogate is told: how far each fork is from the best of its round."""
        told = []
        for observation in self.observations:
            y = None
            if observation.y is not None:
                scores = [float(o.y) for o in self.observations if o.row == observation.row and o.y is not None]
                y = shortfall(float(observation.y), scores, is_fast=self.plan.kind[observation.row] == FAST)
            told.append(dataclasses.replace(observation, y=y))
        return told

    def _height(self, x: np.ndarray) -> float:
        return float(sum(np.where(self.is_rate, x * self.decades, 0)))

    def _candidates(self, points: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """Where the next fork may go, and whether it may."""
        is_fast = self.plan.kind[self.row] == FAST
        step = (F(roles.LINE_STEP_DECADES) / self.decades).astype(F)
        lowest = min((f.x for f in self.forks), key=self._height)
        highest = max((f.x for f in self.forks), key=self._height)
        below = np.where(self.is_rate, np.maximum(lowest - step, 0), lowest).astype(F)
        above = np.where(self.is_rate, np.minimum(highest + step, 1), highest).astype(F)
        least = 0.2 * float(step.min())
        has_below, has_above = max(lowest - below) > least, max(above - highest) > least
        line = [(below, has_below and is_fast), (above, has_above and is_fast)]
        if len(self.is_rate) == 1 and self.is_rate[0]:
            return line
        finished = [f for f in self.forks if f.status == names.FORK_FINISHED]
        centre = min(finished, key=lambda f: f.score).x if finished else self.forks[0].x
        may_search = True
        if is_fast and self.is_rate.any():
            height = self._height(centre)
            has_lower = any(self._height(f.x) < height - 0.01 for f in self.forks)
            has_higher = any(self._height(f.x) > height + 0.01 for f in self.forks)
            may_search = (has_lower or not has_below) and (has_higher or not has_above)
        active = ~self.is_slow if is_fast else self.is_slow
        others = fork_round._REACH if is_fast else 1.0
        reach = np.where(self.is_rate, F(fork_round._REACH_DECADES) / self.decades, F(others)).astype(F)
        lower, upper = np.maximum(centre - reach, F(0)), np.minimum(centre + reach, F(1))
        spread = np.where(active, lower + (upper - lower) * points, centre).astype(F)
        return [*line, *((x, may_search) for x in spread)]

    def _is_spoilt(self) -> bool:
        """Whether a metric puts all forks further above the state they began from than they lie apart."""
        scores = [f.score for f in self.forks if f.status == names.FORK_FINISHED]
        return self.has_eval and len(scores) > 1 and min(scores) - self.reference > max(scores) - min(scores)

    def _end_round(self, is_current: bool, said: Said) -> None:
        before, is_fast = self.incumbent, self.plan.kind[self.row] == FAST
        past, self.readings = self.readings, Readings(read_at=self.step)
        is_spoilt = self._is_spoilt()
        if is_spoilt:
            # The best state is the one that all began from; the next step keeps it.
            assert self.winner is not None
            best = self.forks[self.winner]
            self.readings.best, self.readings.keeps = self.reference, True
            self.discarded += best.steps
            said.restore, said.outcome = True, names.OUTCOME_ROUND_FAILED
            if is_fast:
                self.incumbent = self._shifted(np.where(self.is_rate, best.x, before), -decision._FAILED_DECADES)
        elif self.winner is None:
            if past.is_kept:
                # Nothing has taken the place of the best state.
                self.readings.best, self.readings.is_kept = past.best, True
            # The data goes on: what every fork failed on is not shown again.
            said.restore = True
            said.outcome = names.OUTCOME_ROUND_SKIPPED if self.is_void else names.OUTCOME_ROUND_FAILED
            if is_fast and not self.is_void:
                lowest = np.min([f.x for f in self.forks], axis=0)
                self.incumbent = self._shifted(np.where(self.is_rate, lowest, before), -decision._FAILED_DECADES)
        else:
            best = self.forks[self.winner]
            is_unseen = self.plan.range_test[self.row] > 0 and not self.has_eval
            self.incumbent = self._shifted(best.x, -decision.UNSEEN_DECADES) if is_unseen else best.x
            if not is_current:
                said.adopt = True
                self.data_step = max(self.kept.data, self.saved.data)
            if self.has_eval:
                self.readings.best, self.readings.is_kept = best.score, True
                self.metric_level = best.score
            has_moved = np.any(np.abs(self.incumbent - before) > 1e-6)
            said.outcome = names.OUTCOME_ROUND_MOVED if has_moved else names.OUTCOME_ROUND_STAYED
        self._to_next_round()


def shortfall(y: float, scores: list[float], *, is_fast: bool) -> float:
    """How far a score is from the best of its round, on a logarithmic scale: 0 the best, 1 what gained nothing."""
    lowest = min(scores)
    excesses = sorted(score - lowest for score in scores)
    median, mean = excesses[(len(scores) - 1) // 2], sum(excesses) / len(scores)
    unit = max(-lowest, median) if lowest < 0 else 2 * mean
    share = min((y - lowest) / max(unit, fork_surrogate._ROUNDING), fork_surrogate.WORST)
    resolution = fork_surrogate._RESOLUTION if is_fast else fork_surrogate._SLOW_RESOLUTION
    return math.log1p(share / resolution) / math.log1p(1 / resolution)


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def lead(mean: np.ndarray, covariance: np.ndarray, of: int, over: int) -> tuple[float, float]:
    """How much lower the shortfall of one place is than another's, and the standard deviation of that."""
    variance = covariance[of, of] + covariance[over, over] - 2 * covariance[of, over]
    return mean[over] - mean[of], math.sqrt(max(variance, 1e-12))


def expected_improvement(gain: float, deviation: float) -> float:
    """Of a normal variable over zero."""
    z = gain / deviation
    return gain * normal_cdf(z) + deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
