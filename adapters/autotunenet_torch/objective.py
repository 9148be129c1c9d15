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
