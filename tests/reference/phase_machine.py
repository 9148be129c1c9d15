"""The controller in plain Python: one `if` for every rule, one object that changes, no arrays where a number will do.

It follows the prose of the design rather than the compiled code, and takes the surrogate's answers from a function, so
that the two can be compared decision by decision.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Only the numbers are shared with what is tested, so that they can be tuned.
from autotunenet_jax import _in_between, _tick, _validation
from autotunenet_jax._plan import FAST, LEAST_EXPLORING, RAISE, SLOW
from tests.reference import first_round
from tests.reference.validation import Metrics
from tests.reference.watch import FIRST, Watch

F = np.float32
ZERO = F(0)
NEVER = 2**30


@dataclasses.dataclass
class Trial:
    """One fork of the round being held."""

    x: np.ndarray
    scores: list[Any] = dataclasses.field(default_factory=list)
    steps: int = 0
    status: str = "running"


@dataclasses.dataclass
class Result:
    """What one step came to; the fields of a directive."""

    save: bool = False
    restore: bool = False
    keep: bool = False
    adopt: bool = False
    evaluate: bool = False
    data_step: int = 0
    outcome: str = "none"


class PhaseMachine:
    """Training, sweep and forks, with everything that is counted along the way.

    Args:
      plan: A plan of NumPy arrays.
      guard: Thresholds of the watch.
      policy: Constants of the decisions.
      start: Where the run starts, unit cube.
      is_rate: Which hyperparameters are rates.
      is_slow: Which are slow.
      decades: How many decades each spans.
      surrogate: ``(observations, runs, lower, upper) -> (mean, variance, proposal)``: the posterior mean as a function
        of a point; the variance of every point, independent of the others'; and the proposal.
    """

    def __init__(
        self,
        plan: Any,
        *,
        guard: Any,
        policy: Any,
        start: np.ndarray,
        is_rate: Any,
        is_slow: Any,
        decades: Any,
        surrogate: Callable[..., Any],
    ):
        self.plan, self.guard, self.policy, self.surrogate = plan, guard, policy, surrogate
        self.is_rate, self.is_slow, self.decades = is_rate, is_slow, decades
        self.incumbent, self.trial = start, start
        self.prior_center = np.where(is_slow, F(policy.slow_center), start)
        self.knows_rate = False
        self.metrics = Metrics()
        self.watch = Watch()
        self.step = self.data_step = self.discarded = self.rollbacks = self.rounds_held = self.retries = 0
        self.relapses = self.probation = self.unmet = 0
        self.is_hot = False
        self.lowest, self.promised, self.reached = F(np.inf), F(np.inf), F(np.inf)
        self.last_rates, self.hold = start, ZERO
        self.since_rollback = NEVER
        self.row = 0
        self.initial_loss, self.best_level, self.eval_level = F(np.nan), F(np.inf), F(np.nan)
        # For each of the two copies: (data step, budget step).
        self.saved, self.kept_copy = (0, 0), (0, 0)
        self.observations: list[tuple[np.ndarray, Any, int]] = []
        self.group = 0
        self.forks: list[Trial] = []
        self.winner: int | None = None
        self.scored_by_eval, self.reference = False, F(np.nan)
        self.sweep = first_round.Sweep()
        starts_now = int(plan.start[0]) == 0
        self.phase = "train" if not starts_now else "sweep" if plan.sweep[0] else "fork"
        self._begin(int(plan.start[0] if not starts_now else plan.sweep[0] or plan.early[0]))
        if self.phase == "fork":
            self.forks = [Trial(start)]

    def _begin(self, length: int) -> None:
        self.length = self.left = length
        self.scored: list[Any] = []
        self.scored_metrics: list[Any] = []

    # Validation.

    def observe_eval(self, metric: Any) -> None:
        if self.phase == "fork" and self.left == 1:
            self.scored_metrics.append(metric)
        if (self.phase == "train" or self.step == 0) and np.isfinite(metric):
            self.eval_level = metric
            is_last = self.phase == "train" and self._only_raises()
            if self.metrics.see(metric, self.watch.short, self.initial_loss, self.step, self.plan.total, is_last):
                self._retreat(_validation._RISE_RETREAT_DECADES)
            if self.metrics.has_stopped:
                self.hold = ZERO

    def _only_raises(self) -> bool:
        """Whether no rounds are to come but such that raise rates."""
        ahead = zip(self.plan.start[self.row :], self.plan.kind[self.row :], strict=True)
        return all(kind == RAISE for start, kind in ahead if start < NEVER)

    def _retreat(self, decades: float) -> None:
        lower = self.incumbent - F(decades) / self.decades
        self.incumbent = np.where(self.is_rate, np.clip(lower, 0, 1), self.incumbent).astype(F)

    # One step.

    def update(self, loss: Any) -> Result:
        result = Result()
        position = self.length - self.left
        is_known = self.phase == "train" and self.watch.count >= FIRST
        if not is_known and abs(loss) >= _tick._LOSS_LIMIT:
            loss = F(np.nan)
        ceiling = F(np.inf)
        if self.step >= FIRST:
            progress = max(self.initial_loss - self.best_level, F(0))
            ceiling = self.initial_loss + F(0.5) * progress + F(6) * self.watch.spread
        before = dataclasses.replace(self.watch)
        verdict = self.watch.see(self.guard, loss, ceiling)
        failed = verdict in ("non-finite", "spike", "diverged")
        climbed = before.short > np.fmax(before.level, self.initial_loss) + F(_tick._CALM_SIGMAS) * before.spread

        if np.isfinite(loss):
            if np.isnan(self.initial_loss):
                self.initial_loss = loss
            elif self.step < FIRST:
                self.initial_loss += (loss - self.initial_loss) / F(self.step + 1)
            if self.watch.count >= FIRST:
                self.best_level = min(self.best_level, self.watch.short)

        due = fork_failed = False
        if self.phase == "sweep":
            blown = bool(np.isfinite(loss)) and self.sweep.see(loss, self.watch.spread)
            due = failed or blown or not np.isfinite(loss)
        elif self.phase == "fork":
            fork_failed = due = failed
            if np.isfinite(loss):
                opening = len(self.forks) == 1 and not self.forks[0].scores
                if opening and position == 0:
                    self.reference = loss
                elif opening and position == 1:
                    self.reference = F(0.5) * (self.reference + loss)
                if position >= self.length - max(round(_tick._SCORED_SHARE * self.length), 2):
                    self.scored.append(loss)
        faulted = (
            self.phase != "train" and verdict == "non-finite" and not climbed and self.retries < _tick._MAX_RETRIES
        )

        self.left -= 1
        self.since_rollback = min(self.since_rollback + 1, NEVER)
        ages = {"saved": self.step - self.saved[1], "kept": self.step - self.kept_copy[1]}
        newer, older = ("saved", "kept") if ages["saved"] < ages["kept"] else ("kept", "saved")
        self.step += 1
        self.data_step += 1
        enough = self.promised + F(_tick._MISSING_SHARE) * (self.initial_loss - self.promised)
        is_met = bool(np.isfinite(loss) and loss <= enough)
        self.unmet = max(self.unmet - 2, 0) if is_met else min(self.unmet + 1, 2 * _tick._UNMET)
        on_probation = self.phase == "train" and self.probation > 0
        if on_probation:
            self.probation -= 1
        is_behind = on_probation and self.probation == 0 and not failed and self._is_behind(ages, result)
        if self.phase == "train" and failed:
            self._train_failed(verdict, loss, ages, newer, older, climbed, result)
            if result.outcome == "rollback" and on_probation:
                self.probation = self._probation_steps()
                self.left = max(self.left, self.probation + 1)
        due = due or self.left <= 0
        is_calm = self.phase == "train" and verdict in ("healthy", "stalled") and not due and self.watch.strikes == 0
        is_calm = is_calm and not is_behind
        here = (self.data_step, self.step)
        if self.phase == "train" and self._only_raises() and (self.metrics.is_kept or self.metrics.keeps):
            if is_calm:
                self._in_last_stretch(here, ages, result, on_probation)
        elif is_calm and min(ages.values()) >= self.plan.save_every:
            if older == "saved" and not on_probation:
                self.saved, result.save = here, True
            else:
                self.kept_copy, result.keep = here, True
        if self.left == 1:
            has_round = self.plan.start[self.row] < NEVER
            result.evaluate = self.phase == "fork" or (self.phase == "train" and bool(has_round))
        if due:
            result = self._decide(fork_failed, faulted)
        result.data_step = self.data_step
        return result

    def _probation_steps(self) -> int:
        late = int(self.plan.late[0])
        return _tick._PROBATION_FORKS * late if late >= _tick._LEAST_PROMISING else 0

    def _is_behind(self, ages: dict[str, int], result: Result) -> bool:
        """Training that began again is not nearly as far as its forks were: it begins once more, at a lower rate."""
        gain = self.initial_loss - self.promised
        is_missing = self.watch.short > self.promised + F(_tick._MISSING_SHARE) * gain
        is_clear = gain > F(_tick.LEAST_GAIN) * self.watch.spread and self.unmet >= _tick._UNMET
        if not (is_missing and is_clear) or self.rollbacks >= self.guard.max_rollbacks:
            return False
        if self.watch.short - self.promised > F(_tick._STILL_MISSING) * (self.reached - self.promised):
            self.incumbent = self.last_rates
            return False
        self.reached, self.last_rates, self.hold = self.watch.short, self.incumbent, ZERO
        result.outcome, result.restore = "rollback", True
        before = self.incumbent
        self._retreat(_tick._PROBATION_RETREAT_DECADES)
        self.probation = 0 if np.all(before == self.incumbent) else self._probation_steps()
        if ages["kept"] < ages["saved"]:
            self.kept_copy = (self.kept_copy[0], self.saved[1] - 1)
        self.watch.strikes, self.watch.short, self.watch.peak, self.watch.count = 0, self.watch.level, ZERO, 0
        self.metrics = Metrics()
        self.rollbacks += 1
        self.relapses = self.since_rollback = 0
        self.left = max(self.left, self.probation + 1)
        return True

    def _in_last_stretch(self, here: tuple[int, int], ages: dict[str, int], result: Result, on_probation: bool) -> None:
        """The kept copy is that of the best metric; the saved one is the newest."""
        if self.metrics.returns and self.metrics.is_kept:
            result.adopt, self.metrics.returns, self.hold = True, False, ZERO
            self.watch.count, self.watch.peak = 0, ZERO
            return
        self.metrics.returns = False
        if ages["saved"] >= self.plan.save_every and not on_probation:
            self.saved, result.save = here, True
        if self.metrics.keeps:
            self.kept_copy, result.keep = here, True
            self.metrics.keeps, self.metrics.is_kept = False, True

    def _train_failed(self, verdict: str, loss: Any, ages: Any, newer: str, older: str, climbed: bool,
                      result: Result) -> None:  # fmt: skip
        is_blue = verdict == "non-finite" and not climbed
        self.hold = self.hold if is_blue else ZERO
        at_once = verdict != "non-finite" and self.watch.strikes >= self.since_rollback
        accepts = at_once and self.relapses > 0
        if accepts or (verdict != "non-finite" and self.rollbacks >= self.guard.max_rollbacks):
            self.watch = dataclasses.replace(
                self.watch, level=loss, short=loss, count=0, strikes=0, peak=ZERO, lowest=loss, since_lowest=0
            )
            self.initial_loss = np.fmax(self.initial_loss, loss)
            if accepts:
                result.outcome, self.relapses = "accepted", 0
                self.metrics = Metrics()
            elif self.guard.max_rollbacks > 0:
                self.plan = self.plan._replace(start=np.full_like(self.plan.start, NEVER))
                self.left = NEVER
            return
        result.outcome = "rollback"
        self.reached = F(np.inf)
        was_damaged = at_once or (verdict == "non-finite" and self.since_rollback == 1)
        is_safe = min(ages.values()) >= (1 if is_blue else _tick._MIN_SNAPSHOT_AGE) and not was_damaged
        target = newer if is_safe else older
        result.restore, result.adopt = target == "saved", target == "kept"
        if not is_safe and newer == "saved":
            self.saved = (self.saved[0], self.kept_copy[1] - 1)
        elif not is_safe and ages["kept"] < ages["saved"]:
            self.kept_copy = (self.kept_copy[0], self.saved[1] - 1)
        within = _tick._BLUE_RETREAT_WITHIN if is_blue else _tick._RATE_RETREAT_WITHIN
        if (self.since_rollback <= within and not was_damaged) or (verdict == "diverged" and not at_once):
            self._retreat(_tick._BLUE_RETREAT_DECADES if is_blue else _tick._RATE_RETREAT_DECADES)
        self.watch.strikes, self.watch.short, self.watch.peak = 0, self.watch.level, ZERO
        self.rollbacks += 1
        self.relapses = self.relapses + 1 if at_once else 0
        self.since_rollback = 0
        self.left = max(self.left, 1)

    # The end of a stretch.

    def _decide(self, fork_failed: bool, faulted: bool) -> Result:
        plan, row = self.plan, self.row
        late, early, kind = int(plan.late[row]), int(plan.early[row]), int(plan.kind[row])
        total, ran = int(plan.total), self.length - self.left
        remaining = total - self.step if total else NEVER
        budget = F((total or max(self.step, 1000)) * plan.share)
        result = Result()

        if faulted and remaining > late + plan.sweep[row]:
            self.retries += 1
            lost = ran
            if self.phase == "fork":
                lost += self.forks[-1].steps
                self.forks[-1] = Trial(self.trial)
            self.discarded += lost
            self.saved = (self.data_step, self.saved[1])
            self._begin(int(plan.sweep[row]) if self.phase == "sweep" else early)
            self._fresh_watch()
            result.restore, result.outcome = True, "retried"
            return result

        if self.phase == "train":
            self._open(remaining, budget, result)
        elif self.phase == "sweep":
            self._learn_from_sweep()
            self.discarded += ran
            # Begun far from where the best rate is expected, the first fork starts there instead.
            is_far = np.abs(self.incumbent - self.prior_center) * self.decades > F(self.policy.plausible_decades)
            opening = np.where(self.is_rate & is_far, self.prior_center, self.incumbent).astype(F)
            self.data_step = self.saved[0]
            self._start_fork(opening, early)
            result.restore, result.outcome = True, "fork started"
        else:
            self._end_of_stretch(fork_failed, ran, late, early, kind, remaining, budget, result)
        return result

    def _fresh_watch(self) -> None:
        self.watch.count = self.watch.strikes = 0

    def _open(self, remaining: int, budget: Any, result: Result) -> None:
        row = self.row
        affordable = self.discarded + int(self.plan.late[row]) <= budget
        can_score = self.plan.kind[row] != SLOW or np.isfinite(self.eval_level)
        raises = self.plan.kind[row] == RAISE
        if raises and (not self._has_room(self.incumbent) or self.metrics.is_worse(self.eval_level)):
            can_score = False
        if not (remaining > self.plan.late[row] and affordable and can_score):
            self.group += 2
            self._to_next_round()
            result.outcome = "skipped"
            return
        if raises and np.isfinite(self.eval_level):
            self.metrics.measure_from(self.eval_level, self.watch.short, self.step, is_kept=False)
        self.saved = (self.data_step, self.step)
        self.probation = 0
        self._new_round()
        result.save, result.outcome = True, "round started"
        if self.plan.sweep[row]:
            self.phase = "sweep"
            self._begin(int(self.plan.sweep[row]))
        else:
            self._start_fork(self.incumbent, int(self.plan.early[row]))

    def _new_round(self) -> None:
        self.forks, self.winner = [], None
        self.scored_by_eval, self.reference, self.lowest = False, F(np.nan), F(np.inf)

    def _start_fork(self, x: np.ndarray, length: int) -> None:
        self.phase, self.trial = "fork", x
        self.forks.append(Trial(x))
        self._begin(length)
        self._fresh_watch()

    def _to_next_round(self) -> None:
        self.row += 1
        self._new_round()
        self.phase = "train"
        start = int(self.plan.start[self.row])
        self._begin(NEVER if start >= NEVER else max(start - self.step, self.probation + 1))

    def _learn_from_sweep(self) -> None:
        middle, end, trust = self.sweep.read(self.length)
        fallen = middle + self.policy.sweep_offset / self.decades
        unknown = end - self.policy.end_offset / self.decades
        center = np.clip(trust * fallen + (1 - trust) * unknown, 0, 1)
        center = np.where(center > 1 - 0.5 * self.policy.spread_decades / self.decades, 1, center)
        self.prior_center = np.where(self.is_rate, center, self.prior_center).astype(F)
        self.knows_rate = True

    def _has_room(self, x: np.ndarray) -> bool:
        """Whether a rate of ``x`` can be raised."""
        return bool(np.any(self.is_rate & (x <= 1 - F(0.5) * F(self.policy.spread_decades) / self.decades)))

    def _box(self, kind: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Where the next fork may be, and whether the first round still goes outward."""
        lower, upper = self.forks[0].x.copy(), self.forks[0].x.copy()
        if kind == RAISE:
            step = F(self.policy.spread_decades) / self.decades
            above = max((fork.x for fork in self.forks), key=lambda x: float(np.sum((x * self.decades)[self.is_rate])))
            above = above + step
            raised = np.where(self.is_rate, np.where(above > 1 - F(0.5) * step, 1, above), lower).astype(F)
            return raised, raised, False
        explores, is_open = self.plan.sweep[self.row] > 0 and self.knows_rate, False
        if explores:
            rung = len(self.forks[-1].scores) - 1
            below, above = first_round.outward(
                self.policy, self.forks, rung, self.reference, self.is_rate, self.decades
            )
            is_open = below is above
        for i in range(len(lower)):
            if bool(self.is_slow[i]) != (kind == SLOW):
                continue
            if explores and self.is_rate[i]:
                lower[i], upper[i] = below[i], above[i]
                continue
            reach = F(self.policy.later_reach) if self.is_rate[i] and self.knows_rate else F(1)
            lower[i], upper[i] = max(self.incumbent[i] - reach, F(0)), min(self.incumbent[i] + reach, F(1))
        return lower, upper, is_open

    def _between(self, mean: Callable[..., Any]) -> np.ndarray | None:
        """The point on the way from the best fork to another one that is best in its surroundings."""
        rung = len(self.forks[-1].scores) - 1
        counts, *_ = first_round.standings(
            self.policy, self.forks, rung, self.reference, self.is_rate, self.decades
        )  # fmt: skip
        scored = [fork.x for fork, count in zip(self.forks, counts, strict=True) if np.isfinite(count)]
        if not scored:
            return None
        pivot = self.forks[int(np.argmin(counts))].x
        step = np.where(self.is_rate, F(self.policy.blur_decades) / self.decades, 0).astype(F)
        reach = np.where(self.is_rate, F(self.policy.reach_decades) / self.decades, np.inf).astype(F)
        best = None
        for share in _in_between.BETWEEN:
            for x in scored:
                way = F(share) * (x - pivot)
                point = (pivot + way / max(np.max(np.abs(way) / reach), 1)).astype(F)
                around = [np.clip(point + sign * step, 0, 1).astype(F) for sign in (-1, 0, 1)]
                value = sum(w * mean(p) for w, p in zip(_in_between.WEIGHTS, around, strict=True))
                value += F(self.policy.tilt) * sum(np.where(self.is_rate, point * self.decades, 0))
                if best is None or value < best[0]:
                    best = (value, point)
        return best[1]

    def _end_of_stretch(self, fork_failed: bool, ran: int, late: int, early: int, kind: int, remaining: int,
                        budget: Any, result: Result) -> None:  # fmt: skip
        number, fork = len(self.forks) - 1, self.forks[-1]
        rung = len(fork.scores)
        if number == 0 and rung == 0:
            self.scored_by_eval = bool(self.scored_metrics)
            if self.scored_by_eval:
                self.reference = self.eval_level
        column = self.scored_metrics if self.scored_by_eval else self.scored
        score = F(sum(column, F(0)) / F(len(column))) if column else F(np.nan)
        if not np.isfinite(self.reference):
            self.reference = score
        fork.steps += ran
        spoils = kind == RAISE and self._spoils(score)
        self.is_hot = fork_failed or spoils
        succeeded = not fork_failed and bool(np.isfinite(score)) and not spoils
        fork.scores.append(score if succeeded else F(np.nan))
        y = score - self.reference if succeeded else None
        self.observations.append((self.trial, y, self.group + rung))

        lower, upper, is_open = self._box(kind)
        runs = [f.status != "failed" for f in self.forks]
        mean_at, variance, proposal = self.surrogate(self.observations, runs, lower, upper)
        mean = [mean_at(x) for x in [*(f.x for f in self.forks), proposal]]
        deviation = math.sqrt(2 * variance)

        def better(gain: Any) -> float:
            return 0.5 * math.erfc(-float(gain) / deviation / math.sqrt(2))

        chance = 1.0 if self.winner is None else better(mean[self.winner] - mean[number])
        is_late = rung == 1 or early >= late
        if succeeded and not is_late and chance >= self.policy.drop_below:
            self._begin(late - early)
            self._fresh_watch()
            result.outcome = "fork continues"
            return
        is_better = chance > self.policy.move
        if kind == RAISE and self.winner is not None:
            lead = self.forks[self.winner].scores[-1] - score
            is_better = lead > 0 and lead > F(self.policy.raise_gain) * abs(self.reference - score)
        wins = succeeded and is_late and (self.winner is None or is_better)
        fork.status = "failed" if not succeeded else "finished" if is_late else "dropped"
        fork_loss = F(sum(self.scored, F(0)) / F(len(self.scored))) if self.scored else F(np.nan)
        if succeeded:
            self.lowest = np.fmin(self.lowest, fork_loss)
        if wins:
            self.discarded += 0 if self.winner is None else self.forks[self.winner].steps
            self.winner, result.keep = number, True
            self.kept_copy = (self.data_step, self.step)
            if kind == RAISE and self.scored_by_eval:
                self.metrics.measure_from(score, fork_loss, self.step, is_kept=True)
        else:
            self.discarded += fork.steps

        if self.winner is None:
            is_worth_it, has_room = True, number + 1 < 8
        else:
            gain = float(mean[self.winner] - mean[-1])
            z = gain / deviation
            density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            improvement = gain * better(gain) + deviation * density
            price = self.policy.price if kind == FAST else self.policy.slow_price
            least = max(int(np.sum(~self.is_slow)), 1) if self.rounds_held == 0 else 0
            is_worth_it = improvement > price or is_open or (kind == FAST and number <= least)
            has_room = number + 1 < self.plan.forks[self.row]
        if kind == RAISE:
            is_worth_it = wins and self._has_room(fork.x)
        is_lost = self.winner is not None and self._is_given_away()
        given_away = late + (self.forks[self.winner].steps if is_lost else 0)
        if has_room and is_worth_it and self.discarded + given_away <= budget and remaining > late:
            self.data_step = self.saved[0]
            self._start_fork(proposal, early)
            result.restore, result.outcome = True, "fork started"
            return
        between = self._between(mean_at) if kind == FAST else None
        self._finish_round(wins, proposal, between, self._is_given_away(), result)

    def _spoils(self, score: Any) -> bool:
        """Whether the fork that ended lost much of what training had gained, by its losses and by its metric."""
        fork_loss = F(sum(self.scored, F(0)) / F(len(self.scored))) if self.scored else F(np.nan)
        share, spread = F(self.policy.lost_share), F(_tick.LEAST_GAIN) * self.watch.spread
        if not fork_loss - self.best_level > max(share * (self.initial_loss - self.best_level), spread):
            return False
        gained = self.metrics.first - self.reference
        return not self.scored_by_eval or bool(gained > 0 and score > self.reference + share * gained)

    def _is_given_away(self) -> bool:
        """Whether the round's winner is lost as well."""
        is_exploring = self.plan.sweep[self.row] > 0 and self.plan.forks[self.row] >= LEAST_EXPLORING
        return bool(is_exploring) and self.policy.starts_afresh

    def _finish_round(
        self, wins: bool, proposal: np.ndarray, between: np.ndarray | None, is_first: bool, result: Result
    ) -> None:
        before = self.incumbent
        if self.winner is None:
            # The data goes on: what every fork failed on is not shown again.
            step = np.where(self.is_rate & self.is_hot, F(self.policy.spread_decades) / self.decades, 0)
            lower = np.maximum(before - step, 0).astype(F)
            self.incumbent = lower if self.plan.kind[self.row] == RAISE else proposal
            result.restore, result.outcome = True, "failed"
        else:
            self.incumbent = self.forks[self.winner].x if between is None else between
            result.restore, result.adopt = is_first, not wins and not is_first
            if is_first:
                # Training begins again from where the round began.
                self.discarded += self.forks[self.winner].steps
                self.data_step = self.saved[0]
                self.probation = self._probation_steps()
                self.promised = self.lowest
                self.kept_copy = (self.kept_copy[0], self.saved[1] - 1)
            elif result.adopt:
                self.data_step = max(self.kept_copy[0], self.saved[0])
            moved = np.any(np.abs(self.incumbent - before) > 1e-6)
            result.outcome = "moved" if moved else "stayed"
        if self.plan.kind[self.row] == RAISE:
            comes_down = self.winner is not None and self.scored_by_eval and self.forks[0].scores[-1] < self.reference
            self.hold = F(self.plan.total - self.step) / F(self.plan.total) if comes_down else ZERO
        self.rounds_held += 1
        self.retries = 0
        self.group += 2
        self._to_next_round()
        self._fresh_watch()
