"""Validation in plain Python: whether training fits what does not generalise."""

import dataclasses
from typing import Any

import numpy as np

# Only the numbers are shared with what is tested, so that they can be tuned.
from autotunenet_jax import _validation

F = np.float32
ZERO, UNKNOWN, LARGE = F(0), F(np.nan), F(np.inf)


@dataclasses.dataclass
class Metrics:
    """The metrics of ordinary training so far: the first, the best and the last one, and what came after the best."""

    first: Any = UNKNOWN
    best: Any = LARGE
    best_short: Any = LARGE
    best_step: int = 0
    mark: Any = UNKNOWN
    marked_step: int = 0
    has_stopped: bool = False
    last: Any = UNKNOWN
    last_change: Any = UNKNOWN
    bends: Any = ZERO
    later: int = 0
    away: Any = ZERO
    later_bends: Any = ZERO
    rises: int = 0
    keeps: bool = False
    returns: bool = False
    is_kept: bool = False
    retreats: int = 0

    def is_worse(self, metric: Any) -> bool:
        """Whether the last metric has risen above the best one, or training went back for such a one before."""
        margin = F(_validation._RISE_SHARE) * max(self.first - self.best, F(0))
        margin += F(_validation._RISE_BENDS) * self.bends
        return bool(metric > self.best + margin) or self.retreats > 0

    def measure_from(self, metric: Any, short: Any, step: int, *, is_kept: bool) -> None:
        """Later metrics are to better this one."""
        self.best, self.best_short = metric, short
        self._count_anew(step)
        self.rises, self.keeps, self.is_kept = 0, False, is_kept

    def see(self, metric: Any, short: Any, initial_loss: Any, step: int, total: int, is_last: bool) -> bool:
        """Takes one in; whether the rates are to be lowered, since it gets worse while training gets better."""
        if np.isnan(self.first):
            self.first = metric
        change = metric - self.last
        bend = abs(change - self.last_change)
        if np.isfinite(bend):
            news = F(_validation._NEWS)
            self.bends = self.bends + news * (bend - self.bends) if self.bends > 0 else bend
        # While there is time to wait, all bends since the best metric count.
        typical = max(self.bends, self.later_bends / F(max(self.later, 1)))
        self.last_change = change
        if step > 0:
            self.last = metric
        # The best metric may be this one: it is compared with the best before it.
        best = self.best
        limit = best + F(_validation._RISE_SHARE) * max(self.first - best, F(0))
        is_above = metric > limit and short < self.best_short and self.bends > 0
        has_risen = is_above and metric > limit + F(_validation._RISE_BENDS) * typical
        fails = False
        if is_last and metric >= best and np.isfinite(best):
            fails = self._fails(metric, bend, short, initial_loss, step, total)
        if metric < best:
            self.best, self.best_short = metric, short
            self._count_anew(step)
            self.keeps, self.is_kept = self.keeps or is_last, False
        self.rises = self.rises + 1 if has_risen else 0
        self.returns = False
        retreats = (self.rises >= _validation._RISES or fails) and is_last
        if retreats:
            self.rises = 0
            self._count_anew(step)
            self.returns = self.is_kept
        elif is_above and is_last and total:
            is_ending = total - step <= F(_validation._ENDING_SHARE) * total
            self.returns = bool(is_ending) and self.is_kept and metric > limit + F(_validation._RISE_BENDS) * self.bends
        self.has_stopped = bool(retreats or self.returns)
        budget = total or step
        if np.isnan(self.mark) or step - self.marked_step >= F(_validation._WAIT_SHARE) * budget:
            self.has_stopped |= bool(metric >= self.mark)
            self.mark, self.marked_step = metric, step
        self.retreats += bool(retreats or self.returns)
        if self.returns:
            self.last = self.last_change = UNKNOWN
            self.bends = ZERO
        return retreats

    def _fails(self, metric: Any, bend: Any, short: Any, initial_loss: Any, step: int, total: int) -> bool:
        """Whether the metrics after the best one do not follow the training loss."""
        self.later += 1
        fell = max(initial_loss - self.best_short, F(1e-12))
        unit = np.clip((self.first - self.best) / fell, 0, F(_validation._LARGEST_UNIT))
        self.away += metric - self.best + F(_validation._FOLLOWING) * unit * (self.best_short - short)
        self.later_bends += bend if np.isfinite(bend) else ZERO
        explained = self.later_bends * (F(_validation._LUCK) + F(_validation._LATER_BENDS) / np.sqrt(F(self.later)))
        span = F(_validation._LATER_SHARE) * (total or step)
        is_long = self.later >= _validation._LATER and step - self.best_step >= span
        return is_long and short < self.best_short and self.away > explained

    def _count_anew(self, step: int) -> None:
        self.later, self.away, self.later_bends, self.best_step = 0, ZERO, ZERO, step
