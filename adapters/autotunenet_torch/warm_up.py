"""Forks beside a scheduler that is still warming up: they train at the rate that they claim."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import lr_schedulers, param_groups
from .copying import clone, write_back

# A warm-up is looked for over so many steps, and its end behind so many that change nothing.
_LONGEST, _LONGEST_STAIR = 20_000, 1000

# Rates that differ by more than rounding.
_RISE = 1.0 + 1e-6


class WarmUp:
    """Raises tuned rates, during rounds, that schedulers still hold down on their first way up.

    Forks are compared by the rates they claim, not by what an early step of a warm-up makes of them. The schedulers
    keep their numbers: a rate is raised for the length of the optimizer's own step only.

    Attributes:
      end: Place of the schedulers, see `lr_schedulers.place`, up to which rates only rise.
      in_round: Whether a round is being held.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], indices: Iterable[int], *, steps: int | None
    ):
        self._optimizer, self._schedulers, self._indices = optimizer, schedulers, sorted(indices)
        self._shaped: dict[int, float] = {}
        self._hooks: list[Any] = []
        self.in_round = False
        self.end = 0
        if self._indices and schedulers:
            self.load(_end(schedulers, optimizer.param_groups, min(steps or _LONGEST, _LONGEST)))

    def load(self, end: int) -> None:
        """Takes the end of the warm-up from a checkpoint: a scheduler past it no longer tells."""
        self.end = end
        if end > 0 and not self._hooks:
            self._hooks = [
                self._optimizer.register_step_pre_hook(lambda *_: self._raise()),
                self._optimizer.register_step_post_hook(lambda *_: self._lower()),
            ]

    def release(self) -> None:
        """Leaves the optimizer alone from here on."""
        self._lower()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.in_round = [], False

    def raised(self) -> dict[int, float]:
        """The rates that the next step is taken with, of those groups whose scheduler says less."""
        if not self.in_round or lr_schedulers.place(self._schedulers) >= self.end:
            return {}
        groups = self._optimizer.param_groups
        peaks = lr_schedulers.peak_rates(self._schedulers, groups)
        return {index: peaks[index] for index in self._indices if float(groups[index]["lr"]) < peaks[index]}

    def _raise(self) -> None:
        self._lower()  # after a step that failed
        groups = self._optimizer.param_groups
        for index, rate in self.raised().items():
            self._shaped[index] = float(groups[index]["lr"])
            param_groups.write(groups[index], "lr", rate)

    def _lower(self) -> None:
        for index, rate in self._shaped.items():
            param_groups.write(self._optimizer.param_groups[index], "lr", rate)
        self._shaped = {}


def _end(schedulers: Sequence[Any], groups: Sequence[dict[str, Any]], steps: int) -> int:
    """The place up to which rates only rise; where the schedulers stand if they do not.

    The schedulers are stepped ahead, and put back.

    Cost: that of their own ``step`` for the length of the warm-up.
    """
    movable = [item for item, at in zip(schedulers, lr_schedulers.places(schedulers), strict=True) if at is not None]
    states = [clone(item.state_dict()) for item in movable]
    numbers = [clone({name: value for name, value in group.items() if name != "params"}) for group in groups]
    full = sum(lr_schedulers.peak_rates(schedulers, groups))
    end, highest, flat = lr_schedulers.place(schedulers), _height(groups), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers stepped before the optimizer
            while steps > 0 and movable and highest * _RISE < full and flat < _LONGEST_STAIR:
                for item in movable:
                    item.step()
                height = _height(groups)
                if height * _RISE < highest:
                    break
                flat, steps = flat + 1, steps - 1
                if height > highest * _RISE:
                    end, highest, flat = lr_schedulers.place(schedulers), height, 0
    except Exception:
        # A user's function may not reach so far, where it is asked once an epoch: what was seen counts.
        pass
    finally:
        for group, values in zip(groups, numbers, strict=True):
            group.update(write_back(group, values))
        for item, state in zip(movable, states, strict=True):
            item.load_state_dict(state)
    return end


def _height(groups: Sequence[dict[str, Any]]) -> float:
    return sum(float(group["lr"]) for group in groups)
