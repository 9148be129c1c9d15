"""The guard in plain Python: what one loss after the other says of the health of training."""

import dataclasses
import math
from typing import Any

import numpy as np

# Only the numbers are shared with what is tested, so that they can be tuned.
from autotunenet_jax import _guard

F = np.float32
ZERO = F(0)
FIRST = 4


@dataclasses.dataclass
class Watch:
    """The guard's running statistics."""

    level: Any = ZERO
    spread: Any = ZERO
    short: Any = ZERO
    count: int = 0
    strikes: int = 0
    peak: Any = ZERO
    lowest: Any = np.finfo(F).max
    since_lowest: int = 0

    def see(self, guard: Any, loss: Any, ceiling: Any) -> str:
        is_warm = self.count >= guard.warmup
        self.since_lowest += is_warm and bool(np.isfinite(loss))
        if not np.isfinite(loss):
            self.strikes = max(self.strikes - 1, 0)
            self.peak = F(_guard._PEAK_MEMORY) * self.peak if is_warm else ZERO
            return "non-finite"
        sigma = self.spread / F(math.sqrt(2 / math.pi))
        slack = F(1e-5) * abs(self.level) + F(1e-12)
        unusual = is_warm and loss > self.level + F(guard.sigmas) * sigma + slack
        reach = self.level + F(_guard._REACH_SIGMAS) * sigma + slack
        clipped = min(loss, reach) if self.count >= FIRST else loss
        self.short += max(F(0.2), F(1 / (self.count + 1))) * (clipped - self.short)
        diverged = self.count >= FIRST and self.short > ceiling
        height = min(loss, ceiling if np.isfinite(ceiling) else reach) - self.level
        is_returning = height < F(_guard._RETURNING_SHARE) * self.peak
        self.peak = max(F(_guard._PEAK_MEMORY) * self.peak, height) if is_warm else ZERO
        if unusual:
            self.strikes += not is_returning
        else:
            self.strikes = max(self.strikes - 1, 0)
            rate = max(F(1 / guard.window), F(1 / (self.count + 1)))
            self.level += rate * (clipped - self.level)
            if self.count > 0:
                self.spread += rate * (abs(clipped - self.level) - self.spread)
            self.count += 1
            if is_warm and self.level < self.lowest - F(_guard._PROGRESS_SIGMAS) * sigma - slack:
                self.lowest, self.since_lowest = self.level, 0
        if diverged:
            return "diverged"
        if self.strikes >= guard.patience:
            return "spike"
        if unusual:
            return "watching"
        return "stalled" if self.since_lowest >= guard.stall_steps else "healthy"
