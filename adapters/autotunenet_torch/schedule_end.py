"""Whether schedulers let the rate fall towards the end of a run, as far as that can be known beforehand."""

import bisect
import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch.optim import lr_scheduler

# Of these every rate follows from the place alone, and one asked for too far ahead is no higher.
_CLOSED = (
    lr_scheduler.LinearLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.PolynomialLR,
)

# A rate that ends below this share of its height has fallen.
_FALLEN = 0.5

# All of the first places are looked at, and so many of the others: a scheduler may be stepped once an epoch.
_FIRST, _OTHERS = 256, 256

NOTICE = (
    "Your scheduler does not fall: its factor at the end of the run is {share:.2g} of the highest, and beside a "
    "scheduler the tuner's own decay is off. Leave it out and give AutoTuneNet(..., warmup_steps=N) to have the rate "
    "rise and then fall to zero, or take one that falls, linearly or as a cosine."
)


def share_left(schedulers: Sequence[Any], steps: int) -> float | None:
    """The share of its highest rate that schedulers leave in so many steps; None where they fall, or may.

    Args:
      schedulers: Those of one optimizer.
      steps: Length of the run.

    Cost: some five hundred calls of a user's function.
    """
    first = list(range(min(steps, _FIRST)))
    others = {round(_FIRST * (steps / _FIRST) ** (number / _OTHERS)) for number in range(_OTHERS + 1)}
    heights = []
    try:
        for place in [*first, *sorted(place for place in others if _FIRST <= place < steps), steps]:
            factors = [_factor(scheduler, place) for scheduler in schedulers]
            heights.append(math.prod(factors))
    except Exception:
        # A kind of scheduler that does not tell, or a user's function that does not reach so far.
        return None
    highest = max(heights, default=0.0)
    lowest = min(itertools.islice(heights, heights.index(highest), None), default=0.0)
    return heights[-1] / highest if highest > 0.0 and lowest >= _FALLEN * highest else None


def _factor(scheduler: Any, place: int) -> float:
    """What a scheduler makes of the rates at a place, on the mean over the groups.

    Raises:
      ValueError: It does not tell.
    """
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        number = bisect.bisect_right(scheduler._milestones, place)
        start = scheduler._milestones[number - 1] if number else 0
        return _factor(scheduler._schedulers[number], place - start)
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        return math.prod(_factor(inner, place) for inner in scheduler._schedulers)
    if type(scheduler) is lr_scheduler.LambdaLR:
        factors = [float(function(place)) for function in scheduler.lr_lambdas]
        return sum(factors) / len(factors)
    if type(scheduler) not in _CLOSED:
        raise ValueError(f"{type(scheduler).__name__} does not tell.")
    probe = copy.copy(scheduler)
    probe.last_epoch = place
    return sum(probe._get_closed_form_lr()) / sum(probe.base_lrs)
