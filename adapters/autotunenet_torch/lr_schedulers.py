"""Learning-rate schedulers beside a tuned rate: they keep their shape, the tuner moves its height.

Every scheduler accepted here computes rates in proportion to the numbers it was built with. Scaling those numbers and
the rate in force by one factor scales all rates to come, and touches nothing else of the scheduler.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler

from . import param_groups

_PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SHARED = ("eta_min", "default_min_lr")


def leaves(scheduler: Any) -> Iterator[Any]:
    """A scheduler, or those that it is made of."""
    nested = getattr(scheduler, "_schedulers", None)
    if nested is None:
        yield scheduler
        return
    for inner in nested:
        yield from leaves(inner)


def everything(schedulers: Sequence[Any]) -> Iterator[Any]:
    """All schedulers, those that are made of others and those they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from everything(getattr(scheduler, "_schedulers", ()))


def as_list(scheduler: Any) -> list[Any]:
    """One scheduler, several, or none, as a list; wrappers that other libraries put around them are taken off.

    Raises:
      TypeError: Something else.
      ValueError: A scheduler whose rates a tuner cannot move.
    """
    given = [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    out = []
    for item in given:
        while not isinstance(item, lr_scheduler.LRScheduler) and hasattr(item, "scheduler"):
            item = item.scheduler
        if not isinstance(item, lr_scheduler.LRScheduler):
            raise TypeError(f"scheduler must be one of torch.optim.lr_scheduler, or a list of them; got {item!r}.")
        for leaf in leaves(item):
            _refuse(leaf)
        out.append(item)
    return out


def _refuse(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        raise ValueError(
            "OneCycleLR cannot be tuned: it moves the rate between absolute values planned at its construction, and "
            "the momentum with it, so the rate found by the tuner would not be in force. Leave the scheduler out (the "
            "tuner has a decay of its own), or use CosineAnnealingLR or LambdaLR."
        )
    if isinstance(scheduler, torch.optim.swa_utils.SWALR):
        raise ValueError(
            f"{name} cannot be tuned: it pulls the rate to the absolute swa_lr whatever the tuner finds. Leave it out, "
            "and start it on its own once the tuner's total_steps are over."
        )


def _place(scheduler: Any) -> int | None:
    """How often a scheduler was stepped; None for one that answers to a metric in place of counting."""
    inner = list(leaves(scheduler))
    if any(isinstance(leaf, lr_scheduler.ReduceLROnPlateau) for leaf in inner):
        return None
    return getattr(scheduler, "last_epoch", inner[0].last_epoch)


def places(schedulers: Sequence[Any]) -> list[int | None]:
    """Where each scheduler stands, see `advance`."""
    return [_place(scheduler) for scheduler in schedulers]


def advance(schedulers: Sequence[Any], steps: Sequence[int]) -> None:
    """Steps each scheduler so many times, as if training had.

    Cost: that of the schedulers' own ``step``.
    """
    for scheduler, count in zip(schedulers, steps, strict=True):
        for _ in range(count):
            scheduler.step()


def place(schedulers: Sequence[Any]) -> int:
    """Where all schedulers that count stand together."""
    return sum(at for at in places(schedulers) if at is not None)


def cycles_momentum(schedulers: Sequence[Any]) -> bool:
    """Whether some scheduler writes the momentum too."""
    return any(getattr(item, "cycle_momentum", False) for item in everything(schedulers))


def peak_rates(schedulers: Sequence[Any], groups: Sequence[dict[str, Any]]) -> list[float]:
    """For each group the rate that schedulers start from, or the highest that they go to, before any shaping."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    for item in everything(schedulers):
        if isinstance(item, lr_scheduler.CyclicLR):
            rates = [max(rate, float(peak)) for rate, peak in zip(rates, item.max_lrs, strict=True)]
    return rates


def proportions(schedulers: Sequence[Any], groups: Sequence[dict[str, Any]]) -> list[float]:
    """What schedulers hold each group's rate to be, over what the optimizer does; `scale` leaves it as it is."""
    held = [getattr(item, "base_lrs", ()) for item in everything(schedulers)]
    return [
        float(base) / float(group["initial_lr"])
        for bases in held
        for base, group in zip(bases, groups, strict=False)
        if group.get("initial_lr")
    ]


def scale(schedulers: Sequence[Any], groups: Sequence[dict[str, Any]], factors: Sequence[float]) -> None:
    """Multiplies the rates of each group, those in force and those to come, by the group's factor.

    Cost: a few Python operations per group and scheduler.
    """
    for group, factor in zip(groups, factors, strict=True):
        if factor != 1.0:
            param_groups.write(group, "lr", float(group["lr"]) * factor)
            if "initial_lr" in group:
                param_groups.write(group, "initial_lr", float(group["initial_lr"]) * factor)
    shared = factors[0] if len(set(factors)) == 1 else 1.0
    for item in everything(schedulers):
        for name in _PER_GROUP:
            values = getattr(item, name, None)
            if values is not None and len(values) == len(factors):
                scaled = [
                    float(value) * factor if factor != 1.0 else value
                    for value, factor in zip(values, factors, strict=True)
                ]
                setattr(item, name, type(values)(scaled) if isinstance(values, tuple) else scaled)
        for name in _SHARED:
            value = getattr(item, name, None)
            if value is not None and shared != 1.0:
                setattr(item, name, value * shared)
