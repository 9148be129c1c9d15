"""Loss and metrics of a batch."""

import contextlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def scalar(loss: Any) -> torch.Tensor:
    """A loss as it has to be."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise TypeError(
        f"loss_fn must return a scalar tensor; got {shown}. Average it over the batch, as reduction='mean' does."
    )


def _class_axis(outputs: Any, targets: Any) -> int | None:
    """The axis of the classes, the second or the last one; None where targets are no classes, or both could be it."""
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
        return None
    if targets.is_floating_point() or outputs.ndim != targets.ndim + 1 or outputs.ndim < 2:
        return None
    shape, last = outputs.shape, outputs.ndim - 1
    fitting = [axis for axis in sorted({1, last}) if shape[:axis] + shape[axis + 1 :] == targets.shape]
    return fitting[0] if len(fitting) == 1 else None


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of targets, but for those that cross-entropy ignores (-100), whose class has the highest output."""
    axis, counted = _class_axis(outputs, targets), targets != -100
    right = (outputs.argmax(dim=1 if axis is None else axis) == targets) & counted
    return right.sum() / counted.sum().clamp(min=1)


def metrics_for(given: Mapping[str, Any] | None, outputs: Any, targets: Any) -> Mapping[str, Callable[[Any, Any], Any]]:
    """The metrics given, or by default the accuracy where the targets are classes."""
    if given is not None:
        return given
    return {} if _class_axis(outputs, targets) is None else {"accuracy": accuracy}


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


def default_of(function: Any, argument: str) -> Any:
    """What a function takes for an argument that is not given; None where it has to be."""
    value = inspect.signature(function).parameters[argument].default
    return None if value is inspect.Parameter.empty else value


def number(name: str, value: Any) -> Any:
    """What a metric gave, a number or a tensor of one.

    Raises:
      TypeError: It is something else.
    """
    shape = getattr(value, "shape", None)
    if isinstance(value, numbers.Real) or (shape is not None and math.prod(shape) == 1):
        return value
    shown = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else type(value).__name__
    raise TypeError(f"the metric {name!r} must be a number or a tensor of one; its function returned a {shown}.")


def split(model: Any, batch: Any) -> tuple[Any, Any]:
    """Outputs and targets of a batch whose last entry is the targets."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise TypeError(
            f"a batch must be (inputs, targets) or (inputs, ..., targets); got {type(batch).__name__}. For other "
            "batches give Trainer(forward=lambda model, batch: (outputs, targets))."
        )
    return model(*batch[:-1]), batch[-1]
