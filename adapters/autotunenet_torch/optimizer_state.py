"""What an optimizer keeps besides the state of its parameters: inner optimizers, numbers of its own."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import sharding
from .copying import clone, write_back

_BASE = frozenset({"defaults", "state", "param_groups"})
_PLAIN = (bool, int, float, str, type(None))


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that one is made of, at any depth, without itself."""
    found: list[torch.optim.Optimizer] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.optim.Optimizer):
            if value is not optimizer and all(value is not other for other in found):
                found.append(value)
                walk(vars(value))
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)

    walk({name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")})
    return found


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that an optimizer trains, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _mode(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether one that has modes, as schedule-free ones do, stands in that for training; None where it has none."""
    has_modes = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return optimizer.param_groups[0].get("train_mode") if has_modes else None


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it holds other parameters while it is evaluated than while it trains."""
    return _mode(optimizer) is not None


def turn(optimizer: torch.optim.Optimizer, *, trains: bool) -> None:
    """Puts an optimizer that has modes into one of them."""
    if _mode(optimizer) not in (None, trains):
        getattr(optimizer, "train" if trains else "eval")()


@contextlib.contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In its mode for evaluation, and then back in the one it was in."""
    trains = _mode(optimizer)
    turn(optimizer, trains=False)
    try:
        yield
    finally:
        turn(optimizer, trains=bool(trains))


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, nn.Parameter) and not value.requires_grad
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(k, _PLAIN) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple | collections.deque):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Numbers, texts and tensors that an optimizer keeps as attributes."""
    named = {name: value for name, value in vars(optimizer).items() if name not in _BASE}
    # What torch keeps of its own: hooks, and marks of wrappers around `step`.
    return {name: value for name, value in named.items() if not name.startswith("_optimizer_") and _is_plain(value)}


class Whole:
    """An optimizer with those that it is made of.

    Attributes:
      parts: All of them, the outer one first.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.parts = [optimizer, *inner_optimizers(optimizer)]

    def _owns(self, number: int, name: str) -> bool:
        """Whether one of them is the first to have this dictionary or list; inner ones often share the outer one's."""
        mine = getattr(self.parts[number], name)
        return all(mine is not getattr(other, name) for other in self.parts[:number])

    def tensors(self) -> dict[str, Any]:
        """The live state of each parameter, and whatever else is kept, by name."""
        found: dict[str, Any] = {}
        for number, part in enumerate(self.parts):
            if self._owns(number, "state"):
                kept = enumerate(parameters(part))
                found.update({f"{number}/{i}": part.state[p] for i, p in kept if p in part.state})
            found.update({f"{number}/{name}": value for name, value in _own(part).items()})
        return found

    def copy_out(self, device: Any) -> list[dict[str, Any]]:
        """A copy of each: state by the number of its parameter, groups, and what else it keeps."""
        return [_copy_out(part, device, self._owns(number, "state")) for number, part in enumerate(self.parts)]

    def copy_back(self, saved: list[dict[str, Any]], device: Any) -> None:
        """Puts copies back, after the parameters. Groups that were added since stay, without state.

        A mode in which an optimizer holds other parameters than it trains is that of the moment, not of the copy.
        """
        modes = [_mode(part) for part in self.parts]
        owners = [self._owns(number, "state") for number in range(len(self.parts))]
        for part, values, owns in zip(self.parts, saved, owners, strict=True):
            _copy_back(part, values, device, owns)
        for part, mode in zip(self.parts, modes, strict=True):
            turn(part, trains=bool(mode))


def kinds(saved: list[dict[str, Any]]) -> list[str] | None:
    """The names of the classes that copies are of; None where they do not say, as older ones."""
    return [values["kind"] for values in saved] if all("kind" in values for values in saved) else None


def _copy_out(optimizer: torch.optim.Optimizer, device: Any, has_state: bool) -> dict[str, Any]:
    is_own_dict = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
    extra = optimizer.state_dict() if is_own_dict else {}
    # State that the optimizer has not made yet is not made by looking.
    known = [(i, p) for i, p in enumerate(parameters(optimizer)) if has_state and p in optimizer.state]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "kind": type(optimizer).__name__,
        "state": {str(index): clone(dict(optimizer.state[parameter]), device) for index, parameter in known},
        "groups": clone(groups, device),
        "own": clone(_own(optimizer), device),
        "extra": clone({key: value for key, value in extra.items() if key not in _BASE}, device),
    }


def _copy_back(optimizer: torch.optim.Optimizer, saved: dict[str, Any], device: Any, has_state: bool) -> None:
    if len(optimizer.param_groups) < len(saved["groups"]):
        raise ValueError(
            f"the optimizer has {len(optimizer.param_groups)} parameter groups, and had {len(saved['groups'])} when "
            "the state was saved. Groups may be added while a tuner is attached, not taken away."
        )
    if saved["extra"]:
        optimizer.load_state_dict({**optimizer.state_dict(), **clone(saved["extra"])})
    for index, parameter in enumerate(parameters(optimizer) if has_state else ()):
        value = saved["state"].get(str(index))
        if value is None:
            optimizer.state.pop(parameter, None)
        else:
            known = optimizer.state.get(parameter)
            state = write_back(known, value, None if device is None else parameter.device)
            optimizer.state[parameter] = state if known else sharding.assembled(state, parameter)
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=False):
        group.update(write_back(group, values))
    for name, value in saved["own"].items():
        setattr(optimizer, name, write_back(getattr(optimizer, name, None), value))
