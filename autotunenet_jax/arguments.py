"""Checks that many arguments take."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """An argument as an integer; NumPy's integers are as good as Python's.

    Args:
      name: Of the argument.
      value: What was given.
      least: The lowest allowed.
      most: The highest allowed, or None.

    Raises:
      ValueError: It is no integer, or out of range.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < least or (most is not None and int(value) > most):
        extent = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {extent}; got {value!r}.")
    return int(value)


def scalar(name: str, value: Any) -> Array:
    """A loss or a metric as an array; jit-able.

    Raises:
      TypeError: It is no real number.
      ValueError: It is no scalar.
    """
    array = jnp.asarray(value) if hasattr(value, "dtype") or isinstance(value, numbers.Real) else None
    if array is None or jnp.iscomplexobj(array):
        found = type(value).__name__ if array is None else array.dtype
        raise TypeError(f"the {name} must be a real number; got {found}.")
    if array.shape != ():
        raise ValueError(f"the {name} must be a scalar; got shape {array.shape}. Average it over the batch first.")
    return array


def check_takes(function: Callable[..., Any], what: str, usage: str) -> None:
    """Whether a function can be called as it will be; those whose arguments cannot be known pass.

    Args:
      function: Of the user's.
      what: What it is called with, in words.
      usage: How it is to be written, such as ``"batches(step, hp)"``: so many arguments it is called with.

    Raises:
      TypeError: It takes fewer, or asks for more.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*range(usage.count(",") + 1))
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"{what}, which {name}{signature} does not take. Write it as {usage}.") from error
