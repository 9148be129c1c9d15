"""How a hyperparameter is laid out along an axis, and how its values are written there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...space.search_space import Choice, Float, SearchSpace

_MOST_TICKS = 5
# Longest text beside a tick.
_MOST_LETTERS = 12


def written(value: Any) -> str:
    """A value, short."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    text = str(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."


def label_of(name: str) -> str:
    """A hyperparameter's name as a label."""
    return name.replace("_", " ")


def unit_ticks(space: SearchSpace, name: str) -> tuple[list[float], list[str]]:
    """Round values of a hyperparameter, by their coordinates in the unit cube, and their labels."""
    parameter: Any = space[name]
    if isinstance(parameter, Choice):
        values = list(parameter.options)
        values = values[:: math.ceil(len(values) / (2 * _MOST_TICKS))]
    elif not isinstance(parameter, Float):
        values = [int(value) for value in _linear(parameter.lo, parameter.hi) if value == int(value)]
    else:
        values = (_decades if parameter.log else _linear)(parameter.lo, parameter.hi)
    return [float(parameter.encode(value)) for value in values], [written(value) for value in values]


def _linear(lo: float, hi: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (hi - lo) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1.0 - 1e-9))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [float(f"{number * step:.6g}") for number in range(first, last + 1)]


def _decades(lo: float, hi: float) -> list[float]:
    """Powers of ten; within less than two decades 2 and 5 times those too."""
    first, last = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    factors = (1.0,) if hi / lo >= 100.0 else (1.0, 2.0, 5.0)
    found = [float(f"{factor * 10.0**power:.6g}") for power in range(first, last + 1) for factor in factors]
    found = [value for value in found if lo * (1.0 - 1e-6) <= value <= hi * (1.0 + 1e-6)]
    return found[:: math.ceil(len(found) / _MOST_TICKS)]


def is_discrete(space: SearchSpace, name: str) -> bool:
    """Whether a hyperparameter has so few values that each is drawn by itself."""
    parameter: Any = space[name]
    if isinstance(parameter, Choice):
        return True
    return not isinstance(parameter, Float) and parameter.hi - parameter.lo < 3 * _MOST_TICKS


def along(space: SearchSpace, name: str, count: int) -> np.ndarray:
    """Coordinates over the range of a hyperparameter: ``count`` evenly spaced ones, or one for each value."""
    parameter: Any = space[name]
    if not is_discrete(space, name):
        return np.linspace(0.0, 1.0, count)
    values = parameter.options if isinstance(parameter, Choice) else range(parameter.lo, parameter.hi + 1)
    return np.array([float(parameter.encode(value)) for value in values])


def are_numbers(options: Sequence[Any]) -> bool:
    """Whether options are numbers, which have a place on an axis."""
    return all(isinstance(option, int | float) for option in options)


def is_log_scale(held: Mapping[str, Any]) -> bool:
    """Whether a range, as `History.space` describes it, is laid out on a log scale."""
    options = held.get("options")
    if options is None:
        return held["log"]
    return are_numbers(options) and min(options) > 0 and max(options) >= 4 * min(options)


def spans_decades(values: Sequence[float] | np.ndarray) -> bool:
    """Whether values are better shown on a log scale."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    return bool(found.size) and bool((found > 0).all()) and found.max() / found.min() > 30
