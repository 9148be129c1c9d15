"""Which of two metrics is the better one."""

import math
from typing import Any


def is_better(metric: float | None, other: float | None, mode: Any) -> bool:
    """Whether a metric is the better one in the direction of a mode; what is none, or not finite, never is."""
    if metric is None or not math.isfinite(metric):
        return False
    sign = -1.0 if mode == "max" else 1.0
    return other is None or not math.isfinite(other) or sign * metric < sign * other
