"""The first round in plain Python: where a range sweep's loss falls, and which way the next fork goes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from autotunenet_jax import _sweep

F = np.float32


class Sweep:
    """Losses under a rate that climbs from bound to bound."""

    def __init__(self):
        self.losses: list[Any] = []
        self.smooth = self.lowest = F(0)

    def see(self, loss: Any, spread: Any) -> bool:
        """Takes a loss in and says whether the rate has gone too far."""
        position = len(self.losses)
        if position == 0:
            self.smooth = self.lowest = loss
        else:
            clipped = loss
            if position >= 2:
                clipped = min(loss, self.smooth + max(self.losses[0] - self.lowest, F(0)) + F(4) * spread)
            memory = F(_sweep._MEMORY)
            weight = memory * (1 - memory**position) / (1 - memory ** (position + 1))
            self.smooth = F(weight) * self.smooth + F(1 - weight) * clipped
            self.lowest = min(self.lowest, self.smooth)
        self.losses.append(loss)
        limit = self.lowest + F(0.5) * (self.losses[0] - self.lowest) + F(4) * spread
        return position >= 6 and self.smooth > limit

    def read(self, length: int) -> tuple[float, float, float]:
        """Middle of the fall and end of the sweep, as shares of the range, and how far the middle is trusted."""
        losses, n = np.asarray(self.losses, float), len(self.losses)
        early = [losses[i] - losses[i - 1] for i in range(1, n) if i < max(0.5 * n, 3)]
        if n >= 3:
            losses = np.array([np.median(losses[max(min(i, n - 2), 1) - 1 :][:3]) for i in range(n)])
        half = max(round(_sweep._WINDOW_SHARE * n), _sweep._WINDOW_LEAST) / 2
        smooth = [np.mean([losses[j] for j in range(n) if abs(i - j) <= half]) for i in range(n)]
        start = np.mean(losses[: max(round(_sweep._START_SHARE * n), _sweep._START_LEAST)])
        fall = max(start - min(smooth), 0.0)
        marks = []
        for share in _sweep._MARKS:
            there = next((i for i in range(n) if smooth[i] <= start - share * fall), 0)
            marks.append(max(there - 1, 0))
        noise = np.sqrt(np.mean(np.square(early)) / 2) if early else 0.0
        trust = fall**2 / max(fall**2 + (_sweep._DOUBT * noise) ** 2, 1e-30)
        unit = max(length - 1, 1)
        return float(np.mean(marks)) / unit, (n - 1) / unit, float(trust)


def standings(policy: Any, forks: Sequence[Any], rung: int, reference: Any, is_rate: Any, decades: Any) -> Any:
    """What each fork counts for, and what the best one gained; a decade away from the first fork counts against it."""

    def height(fork: Any) -> Any:
        return sum((fork.x[i] * decades[i] for i in range(len(decades)) if is_rate[i]), F(0))

    def score(fork: Any) -> Any:
        is_good = fork.status != "failed" and len(fork.scores) > rung and np.isfinite(fork.scores[rung])
        return fork.scores[rung] if is_good else F(np.inf)

    finite = [score(fork) for fork in forks if np.isfinite(score(fork))]
    gain = max(reference - min(finite), F(0.5) * (max(finite) - min(finite))) if finite else F(np.inf)
    away = [abs(height(fork) - height(forks[0])) for fork in forks]
    pulls = [F(policy.stay) * gain * far if finite else F(0) for far in away]
    counts = [score(fork) + pull for fork, pull in zip(forks, pulls, strict=True)]
    return counts, gain, [height(fork) for fork in forks]


def outward(policy: Any, forks: Sequence[Any], rung: int, reference: Any, is_rate: Any, decades: Any) -> Any:
    """Where the first round's next fork goes: a point, or else the corners of what its forks enclose.

    Args:
      policy: Constants of the decisions.
      forks: The forks so far, each with ``x``, ``scores`` and ``status``.
      rung: Which of their scores to compare.
      reference: Score of the state they started from.
      is_rate: Which hyperparameters are rates; the others do not count.
      decades: How many decades each spans.

    Returns:
      ``(lower, upper)``, equal where the round goes outward.
    """
    counts, gain, heights = standings(policy, forks, rung, reference, is_rate, decades)
    best = int(np.argmin(counts))
    is_worse = [count > counts[best] + F(policy.clearly_worse) * gain for count in counts]
    lowest, highest = forks[int(np.argmin(heights))], forks[int(np.argmax(heights))]
    step = F(policy.spread_decades) / np.asarray(decades, F)
    has_room = [any(is_rate & (lowest.x >= step / 2)), any(is_rate & (highest.x <= 1 - step / 2))]
    # A fork so far below the best one that nothing beyond it would be chosen.
    far = F(policy.reach_decades + policy.spread_decades - 0.01) * F(np.sum(is_rate))
    is_far = any(heights[best] - height > far for height in heights)
    has_worse = any(worse and height < heights[best] for worse, height in zip(is_worse, heights, strict=True))
    opens_below = has_room[0] and not is_far and not has_worse
    is_highest = not any(height > heights[best] for height in heights)
    leads = len(forks) <= 2 or sum(is_worse) == len(forks) - 1
    opens_above = has_room[1] and is_highest and leads
    is_second = len(forks) == 2
    if opens_below and not (is_second and opens_above):
        point = (lowest.x - step).astype(F)
    elif opens_above:
        point = (highest.x + step).astype(F)
    else:
        return lowest.x, highest.x
    # The bound itself, where what is left beyond is not worth another step.
    point = np.where(point < step / 2, 0, np.where(point > 1 - step / 2, 1, point)).astype(F)
    return point, point
