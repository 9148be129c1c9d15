"""Small parts of the training loop: budget, default batches and metrics, what it lets be tuned."""

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

import autotunenet_jax as atn

from . import _reduce
from ._given import slow_names
from ._tuner import AutoTuneNet


def budget(
    loader: Iterable[Any], *, steps: int | None, epochs: int | None, accumulate: int, planned: int | None
) -> int:
    """Optimizer steps of the whole run: those asked for, or in so many passes over a loader.

    Raises:
      ValueError: The loader's length is unknown, and the tuner's own ``total_steps`` too.
    """
    total = steps
    if total is None:
        try:
            total = (epochs or 1) * len(loader) // accumulate  # type: ignore[arg-type]
        except TypeError:
            total = planned
    if total is None:
        raise ValueError(
            "the length of train_loader is unknown, so epochs are no budget. Give Trainer(steps=...) or "
            "AutoTuneNet(total_steps=...): the number of optimizer steps of the whole run."
        )
    if planned is not None and planned != total:
        warnings.warn(
            f"the tuner was given total_steps={planned}, and this training takes {total} optimizer steps: it is "
            f"planned for {total}. Leave total_steps out beside a Trainer, or give Trainer(steps={planned}).",
            stacklevel=3,
        )
    return total


def scalar(loss: Any) -> torch.Tensor:
    """A loss as it has to be.

    Raises:
      TypeError: Not a tensor of one number.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise TypeError(
        f"loss_fn must return a scalar tensor; got {shown}. Average it over the batch, as reduction='mean' does."
    )


def accuracy(outputs: Any, targets: Any) -> torch.Tensor:
    """Share of rows whose highest output is the target's class."""
    return (outputs.argmax(dim=1) == targets).float().mean()


def metrics_for(given: Mapping[str, Any] | None, outputs: Any, targets: Any) -> Mapping[str, Callable[[Any, Any], Any]]:
    """The metrics given, or by default the accuracy where the targets are classes."""
    if given is not None:
        return given
    is_tensor = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    is_classes = is_tensor and not targets.is_floating_point() and outputs.ndim == targets.ndim + 1
    return {"accuracy": accuracy} if is_classes else {}


@contextlib.contextmanager
def unsmoothed(loss_fn: Any, options: Mapping[str, Any], *, is_tuned: bool) -> Iterator[dict[str, Any]]:
    """Arguments under which losses of two settings can be compared: a smoothed loss always asks for less smoothing."""
    if not is_tuned:
        yield dict(options)
        return
    before = getattr(loss_fn, "label_smoothing", None)
    if before is None:
        yield {name: 0.0 if name == "label_smoothing" else value for name, value in options.items()}
        return
    loss_fn.label_smoothing = 0.0
    try:
        yield dict(options)
    finally:
        loss_fn.label_smoothing = before


def takes(function: Any, argument: str) -> bool:
    """Whether a function has an argument of that name; an object with an attribute of it has its own way."""
    if hasattr(function, argument):
        return False
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def open_store(snapshots: Any, tuner: AutoTuneNet) -> tuple[atn.Snapshots | None, bool]:
    """The folder of snapshots, one per process, and whether it was opened here."""
    if snapshots is None or isinstance(snapshots, atn.Snapshots):
        return snapshots, False
    folder = os.fspath(snapshots)
    if _reduce.is_distributed():
        folder = os.path.join(folder, f"rank{_reduce.rank()}")
    return atn.Snapshots(folder, mode=tuner.mode, space=tuner.space), True


class Field:
    """A tuned attribute of the loop."""

    def __init__(self, owner: Any, name: str, start: Any):
        self._owner, self._name, self._start = owner, name, start

    def read(self) -> Any:
        return self._start

    def write(self, value: Any) -> None:
        setattr(self._owner, self._name, value)


class Entry:
    """A tuned keyword argument of the loss."""

    def __init__(self, options: dict[str, Any], name: str):
        self._options, self._name = options, name

    def read(self) -> None:
        return None

    def write(self, value: Any) -> None:
        self._options[self._name] = value


def split(model: Any, batch: Any) -> tuple[Any, Any]:
    """Outputs and targets of a batch whose last entry is the targets."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise TypeError(
            f"a batch must be (inputs, targets) or (inputs, ..., targets); got {type(batch).__name__}. For other "
            "batches give Trainer(forward=lambda model, batch: (outputs, targets))."
        )
    return model(*batch[:-1]), batch[-1]


def check_slow(space: atn.SearchSpace, *, has_validation: bool) -> None:
    """Says before training when slow hyperparameters cannot be tuned.

    Raises:
      ValueError: Nothing else is tuned.
    """
    slow = slow_names(space)
    if has_validation or not slow:
        return
    names = ", ".join(slow)
    if len(slow) == len(space.names):
        raise ValueError(
            f"{names} can be tuned on validation data only, and nothing else is in param_space. Give fit a val_loader: "
            "the training loss would always ask for less regularisation."
        )
    warnings.warn(
        f"{names} stay at their initial values: without a val_loader there is nothing to tune them by, since the "
        "training loss always asks for less regularisation. Give fit a val_loader to tune them.",
        stacklevel=3,
    )
