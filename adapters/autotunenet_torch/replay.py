"""A run that was tuned, repeated without the tuner: its rates as a scheduler of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import targets

if TYPE_CHECKING:
    import autotunenet_jax as atn


def replay(history: atn.History, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that gives an optimizer the learning rates that a tuned run kept, step by step.

    Step it after each optimizer step. Steps that were thrown away are left out, so the replay is shorter than the run.
    Groups keep their proportions, as they did. Other hyperparameters are in ``history.schedule()``; where the run had a
    scheduler of its own beside the tuner, the history holds the heights that it was scaled to, without its shape.

    Example:
        >>> import autotunenet_jax as atn
        >>> history = atn.History(("learning_rate",))
        >>> for step, rate in enumerate([0.4, 0.2], start=1):
        ...     history.add({"step": step, "loss": 1.0, "learning_rate": rate})
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> scheduler = replay(history, optimizer)
        >>> optimizer.step(), scheduler.step(), round(optimizer.param_groups[0]["lr"], 3)
        (None, None, 0.2)

    Args:
      history: Of a run that tuned a learning rate, by any of the ways in.
      optimizer: With the groups of that run; at any rate above 0.

    Raises:
      ValueError: No learning rate was tuned, the optimizer has no such group, its rate is 0, or nothing was recorded.
    """
    schedules = history.schedule()
    factors: list[Callable[[int], float]] = [lambda step: 1.0] * len(optimizer.param_groups)
    is_found = False
    for name, schedule in schedules.items():
        scope, _, leaf = name.rpartition("/")
        if leaf not in targets.RATES:
            continue
        indices, is_found = targets.group_indices(optimizer, scope or None), True
        highest = max((float(optimizer.param_groups[index]["lr"]) for index in indices), default=0.0)
        if not highest > 0.0:
            raise ValueError(
                f"{name!r} was tuned, and the optimizer has no group of that name with a rate above 0. "
                "Make it with the groups of the run, each with its name and any positive rate."
            )
        for index in indices:
            factors[index] = _over(schedule, highest)
    if not is_found:
        raise ValueError(
            f"no learning rate was tuned in this run, only {', '.join(history.names)}: set these by history.schedule()."
        )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _over(schedule: Callable[[Any], Any], base: float) -> Callable[[int], float]:
    return lambda step: float(schedule(step)) / base
