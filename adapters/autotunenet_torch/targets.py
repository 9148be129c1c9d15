"""What can be tuned on a PyTorch training, and how it is written."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import BatchSampler

from . import arguments, lr_schedulers, param_groups
from .dropout import DropoutTarget

RATES = ("learning_rate", "lr")
_BETAS = {"beta1": 0, "b1": 0, "beta2": 1, "b2": 1}
# Multiplied in each group by the group's own share, so that groups keep their proportions (and zeros stay zeros).
_PROPORTIONAL = ("lr", "weight_decay")


class Target(Protocol):
    """One tuned hyperparameter on live objects. A setter of the user's needs ``write`` alone.

    Some have more: ``places()``, what tells the numbers that it sets from another's, so that no two names set the same
    one; ``join()``, which takes in parameter groups that were added since; ``in_force(...)``, the value with a
    scheduler's factor; ``is_overwritten()``, whether somebody else has set it.
    """

    def read(self) -> Any:
        """The value in force; None where there is none to read."""

    def write(self, value: Any) -> None:
        """Puts a value in force."""


class GroupTarget:
    """A number in the optimizer's parameter groups.

    Args:
      optimizer: Whose groups.
      key: Of the group's dictionary.
      indices: Which groups.
      position: Index within the value, for betas.
      grows: Whether groups that are added later belong to them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        key: str,
        indices: list[int],
        *,
        position: int | None = None,
        grows: bool = False,
    ):
        self._optimizer, self._key, self._indices, self._position = optimizer, key, indices, position
        values = [self._value(group) for group in self._groups()]
        self._start = top = max(values, key=abs)
        self._is_shared = key not in _PROPORTIONAL or top == 0.0 or not math.isfinite(top)
        self._shares = [1.0 if self._is_shared else value / top for value in values]
        self._first_new = len(optimizer.param_groups) if grows else None
        # What those that were added later hold.
        self._new: dict[int, float] = {}
        self._written: float | None = None

    def is_overwritten(self) -> bool:
        """Whether the first of them is not what was written last, by however little; tensors are not looked at."""
        value = self._optimizer.param_groups[self._indices[0]][self._key]
        value = value if self._position is None else value[self._position]
        return self._written is not None and isinstance(value, float) and value != self._written

    def places(self) -> list[Any]:
        """What it sets, each hashable."""
        return [(id(self._optimizer), index, self._key, self._position) for index in self._indices]

    def _groups(self) -> list[dict[str, Any]]:
        # Loading an optimizer's state replaces the dictionaries: they are looked up each time.
        return [self._optimizer.param_groups[index] for index in self._indices]

    def join(self) -> None:
        """Takes in groups that were added since, in the proportion that they were added in, or are given later."""
        groups = self._optimizer.param_groups
        if self._first_new is None or len(groups) <= self._first_new:
            return
        now = self.read()
        for index in range(self._first_new, len(groups)):
            value = self._value(groups[index])
            if value == self._new.get(index):
                continue
            share = 1.0 if self._is_shared else _share(value, self._start, now)
            if index in self._new:
                self._shares[self._indices.index(index)] = share
            else:
                self._indices, self._shares = [*self._indices, index], [*self._shares, share]
            self._put(index, now * share)

    def _value(self, group: dict[str, Any]) -> float:
        return param_groups.read(group, self._key, self._position)

    def read(self) -> float:
        index = max(range(len(self._shares)), key=lambda number: abs(self._shares[number]))
        return self._value(self._groups()[index]) / self._shares[index]

    def write(self, value: float) -> None:
        self._written = value * self._shares[0]
        for index, share in zip(self._indices, self._shares, strict=True):
            self._put(index, value * share)

    def _put(self, index: int, value: float) -> None:
        group = self._optimizer.param_groups[index]
        param_groups.write(group, self._key, value, self._position)
        if self._first_new is not None and index >= self._first_new:
            self._new[index] = self._value(group)


def _share(value: float, start: float, now: float) -> float:
    """A new group's value in proportion to the others': to their first one where it is that, else to the present."""
    is_first = math.isclose(value, start, rel_tol=1e-9)
    return 1.0 if is_first or not now or not math.isfinite(now) else value / now


class RateTarget:
    """The learning rate of some groups, under the shape that schedulers give it.

    Args:
      optimizer: Whose groups.
      indices: Which groups.
      schedulers: Their state is scaled with the rate.
      grows: Whether groups that are added later belong to them.

    Attributes:
      indices: The same groups.
      applied: The value that rates, scheduler and all, now stand in proportion to.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, indices: list[int], schedulers: list[Any], *, grows: bool = False
    ):
        self._optimizer, self.indices, self._schedulers = optimizer, frozenset(indices), schedulers
        self._known = len(optimizer.param_groups) if grows else None
        self.applied = self._peak()
        self._start = self.applied
        self._proportions = lr_schedulers.proportions(schedulers, optimizer.param_groups)
        self._left = self._first_rate()

    def _peak(self) -> float:
        """What `applied` is where the schedulers tell; one that only reduces the rate does not."""
        peaks = lr_schedulers.peak_rates(self._schedulers, self._optimizer.param_groups)
        return max(peaks[index] for index in self.indices)

    def _first_rate(self) -> Any:
        """What schedulers start the first group from; None where there is none."""
        return self._optimizer.param_groups[min(self.indices)].get("initial_lr")

    def stand_at(self, applied: float) -> None:
        """Takes in a copy of optimizer and schedulers that was put back: what its rates stand in proportion to."""
        self.applied, self._left = applied, self._first_rate()

    def _is_loaded(self) -> bool:
        """Whether somebody has put other rates there since the last were written; tensors are not looked at."""
        rate = self._first_rate()
        return isinstance(rate, float) and isinstance(self._left, float) and rate != self._left

    def _is_of_one_moment(self) -> bool:
        """Whether optimizer and schedulers hold rates in the proportion to each other that they were attached in."""
        now = lr_schedulers.proportions(self._schedulers, self._optimizer.param_groups)
        return all(math.isclose(one, other, rel_tol=1e-6) for one, other in zip(now, self._proportions, strict=False))

    def standing(self) -> tuple[float, float]:
        """What rates stand in proportion to, for `loaded`."""
        return self.applied, self._peak()

    def loaded(self, standing: tuple[float, float] | None) -> None:
        """Finds what rates stand in proportion to after optimizer and schedulers were loaded, before attach or since.

        Args:
          standing: What `standing` gave when they were saved.

        Raises:
          ValueError: One of them was, and the other was not.
        """
        if not self._is_of_one_moment():
            raise ValueError(
                "optimizer and scheduler hold the rates of different moments: one of them was loaded after attach, and "
                "the other before it or not at all. Load the model, the optimizer and the scheduler, then attach, then "
                "load the tuner's state."
            )
        applied, peak = standing or (1.0, 1.0)
        self.stand_at(applied * (self._peak() / peak))

    def places(self) -> list[Any]:
        """What it sets, each hashable."""
        return [(id(self._optimizer), index, "lr", None) for index in self.indices]

    def join(self) -> None:
        """Takes in groups that were added since; where they are at the others' first rate, they go to the present."""
        groups = self._optimizer.param_groups
        if self._known is None or len(groups) <= self._known:
            return
        for group in groups[self._known :]:
            if math.isclose(float(group["lr"]), self._start, rel_tol=1e-9):
                param_groups.write(group, "lr", self.applied)
        self.indices |= frozenset(range(self._known, len(groups)))
        self._known = len(groups)

    def read(self) -> float:
        return self.applied

    def in_force(self, raised: Mapping[int, float]) -> float:
        """The highest rate of the groups' next step, whatever schedulers make of it; some are ``raised`` above that."""
        groups = self._optimizer.param_groups
        return max(raised.get(index, float(groups[index]["lr"])) for index in self.indices)

    def write(self, value: float) -> None:
        groups = self._optimizer.param_groups
        # Where they are of two moments, something else has taken a group over, such as weight averaging.
        if self._is_loaded() and self._is_of_one_moment():
            self.stand_at(self._peak())
        if value == self.applied:
            return
        # A rate of zero has no proportion to anything; the least step off it keeps the shape alive.
        value = max(value, 1e-12 * self._start)
        factor = value / self.applied
        factors = [factor if index in self.indices else 1.0 for index in range(len(groups))]
        lr_schedulers.scale(self._schedulers, groups, factors)
        self.stand_at(value)


class AttributeTarget:
    """An attribute of an object, such as a loss module's label smoothing; None counts as ``start``."""

    def __init__(self, owner: Any, name: str, *, start: Any = None):
        self._owner, self._name, self._start = owner, name, start

    def places(self) -> list[Any]:
        """What it sets, hashable."""
        return [(id(self._owner), self._name)]

    def read(self) -> Any:
        value = getattr(self._owner, self._name)
        return self._start if value is None else value

    def write(self, value: Any) -> None:
        setattr(self._owner, self._name, value)


class SetterTarget:
    """Whatever a function sets, which may be known to start somewhere."""

    def __init__(self, setter: Callable[[Any, Any], Any], model: Any, *, start: Any = None):
        self._setter, self._model, self._start = setter, model, start

    def read(self) -> Any:
        return self._start

    def write(self, value: Any) -> None:
        self._setter(self._model, value)


class _TunedBatches(BatchSampler):
    """Batches whose size may change from one to the next; it takes the place of a batch sampler's class."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        while True:
            size = self.batch_size
            batch = [*itertools.islice(indices, size)]
            if not batch or (self.drop_last and len(batch) < size):
                return
            yield batch


class BatchSizeTarget:
    """The batch size of a data loader, from the next batch on that its workers have not yet begun."""

    def __init__(self, loader: Any):
        if getattr(getattr(loader, "batch_sampler", None), "batch_size", None) is None:
            raise ValueError(
                "batch_size can be tuned on a DataLoader with a batch_sampler that has a batch_size; "
                f"got {type(loader).__name__} without one. Give targets={{'batch_size': your_setter}} instead."
            )
        self._sampler = loader.batch_sampler
        # PyTorch's own takes a new size up at the next pass, if it drops the last batch.
        if type(self._sampler) is BatchSampler:
            self._sampler.__class__ = _TunedBatches

    def read(self) -> int:
        return int(self._sampler.batch_size)

    def write(self, value: int) -> None:
        self._sampler.batch_size = int(value)


def group_indices(optimizer: torch.optim.Optimizer, scope: str | None) -> list[int]:
    """Which groups a scope stands for: a group's name or number; None for all."""
    groups = optimizer.param_groups
    if scope is None:
        return list(range(len(groups)))
    return [i for i, group in enumerate(groups) if scope in (group.get("name"), str(i))]


def _numbers(group: dict[str, Any]) -> list[str]:
    names = [
        key
        for key, value in group.items()
        if isinstance(value, float | int | torch.Tensor) and not isinstance(value, bool)
        if not (isinstance(value, torch.Tensor) and value.numel() != 1) and key not in ("initial_lr", "lr")
    ]
    return ["learning_rate", *names, *(["beta1", "beta2"] if len(group.get("betas", ())) == 2 else [])]


def found(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, loss_fn: Any = None, loader: Any = None
) -> dict[str, str]:
    """What could be tuned here: names, and where each was found."""
    names: dict[str, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        for name in _numbers(group):
            names.setdefault(name, "optimizer")
            if len(optimizer.param_groups) > 1:
                names[f"{group.get('name', index)}/{name}"] = "optimizer group"
    dropouts = [path for path, module in model.named_modules() if isinstance(module, _DropoutNd)]
    if dropouts:
        names["dropout"] = f"{len(dropouts)} dropout modules"
        names.update({f"{path}/dropout": "dropout module" for path in dropouts[:8] if path})
    if isinstance(getattr(loss_fn, "label_smoothing", None), float):
        names["label_smoothing"] = "loss"
    if loader is not None:
        names["batch_size"] = "loader"
    return names


def find_all(
    space: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedulers: list[Any],
    *,
    setters: Mapping[str, Any],
    loss_fn: Any = None,
    loader: Any = None,
) -> dict[str, Target]:
    """The target of each name of a search space.

    Raises:
      ValueError: A name has none, has values that PyTorch does not take, or sets what another one sets.
    """
    functions = [name for name, setter in setters.items() if not hasattr(setter, "write")]
    arguments.check_bounds(space, functions)
    targets = {
        name: find(name, model, optimizer, schedulers, setters=setters, loss_fn=loss_fn, loader=loader)
        for name in space.names
    }
    arguments.check_places(targets)
    return targets


def find(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedulers: list[Any],
    *,
    setters: Mapping[str, Any],
    loss_fn: Any = None,
    loader: Any = None,
) -> Target:
    """The target that a name of the search space stands for.

    Raises:
      ValueError: There is none; the message lists what was found.
    """
    if name in setters:
        setter = setters[name]
        return setter if hasattr(setter, "write") else SetterTarget(setter, model)
    scope, _, leaf = name.rpartition("/")
    target = _find(scope or None, leaf, model, optimizer, schedulers, loss_fn, loader)
    if target is not None:
        return target
    there = found(model, optimizer, loss_fn=loss_fn, loader=loader)
    for setter_name in setters:
        there.setdefault(setter_name, "training loop")
    listed = ", ".join(f"{key} ({where})" for key, where in there.items())
    how = f"Use one of these, or say how to set it: targets={{{name!r}: lambda model, value: ...}}."
    if leaf == "label_smoothing" and loss_fn is None:
        how = "Label smoothing is the loss's: give attach(..., loss_fn=torch.nn.CrossEntropyLoss()), and train by that."
    if leaf == "batch_size" and loader is None:
        how = "A batch size is the loader's: give attach(..., loader=), or train by Trainer.fit, which knows it."
    raise ValueError(f"param_space names {name!r}, and nothing here goes by that name. Found: {listed}. {how}")


def _find(
    scope: str | None,
    leaf: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedulers: list[Any],
    loss_fn: Any,
    loader: Any,
) -> Target | None:
    indices = group_indices(optimizer, scope)
    groups = [optimizer.param_groups[index] for index in indices]
    if leaf in RATES and groups:
        if schedulers:
            return RateTarget(optimizer, indices, schedulers, grows=scope is None)
        return GroupTarget(optimizer, "lr", indices, grows=scope is None)
    if leaf == "dropout":
        modules = [
            module
            for path, module in model.named_modules()
            if isinstance(module, _DropoutNd) and (scope is None or path == scope or path.startswith(f"{scope}."))
        ]
        if modules:
            return DropoutTarget(modules, model)
    if leaf in _BETAS and groups and all(len(group.get("betas", ())) == 2 for group in groups):
        return GroupTarget(optimizer, "betas", indices, position=_BETAS[leaf], grows=scope is None)
    if groups and all(leaf in _numbers(group) for group in groups):
        if leaf == "momentum" and lr_schedulers.cycles_momentum(schedulers):
            raise ValueError(
                "momentum cannot be tuned beside a scheduler that cycles it: give the scheduler cycle_momentum=False, "
                "or leave momentum out of param_space."
            )
        return GroupTarget(optimizer, leaf, indices, grows=scope is None)
    # Any other number that a module keeps, such as the dropout of an LSTM.
    owner = dict(model.named_modules()).get(scope) if scope else None
    value = getattr(owner, leaf, None)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return AttributeTarget(owner, leaf)
    if scope is None and leaf == "label_smoothing" and isinstance(getattr(loss_fn, leaf, None), float):
        return AttributeTarget(loss_fn, leaf)
    if scope is None and leaf == "batch_size" and loader is not None:
        return BatchSizeTarget(loader)
    return None
