"""The tuned values, for the loggers of a framework."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .engine import atn


class TellsChosen(atn.Callback):
    """Hands on the tuned values that are numbers, at the beginning and wherever they may have changed.

    Args:
      values: Gives the values, by name.
      log: Takes them, each under ``tuner/`` and its name.
    """

    def __init__(self, values: Callable[[], Mapping[str, Any]], log: Callable[[dict[str, float]], Any]):
        self._values, self._log = values, log

    def on_begin(self, history: atn.History) -> None:
        """Hands on what the run starts from."""
        self._tell()

    def on_decision(self, decision: dict[str, Any]) -> None:
        """Hands on what was decided."""
        self._tell()

    def on_rewind(self, rewind: atn.Rewind) -> None:
        """Hands on what is left of it: going back lowers rates."""
        self._tell()

    def _tell(self) -> None:
        numbers = {f"tuner/{name}": value for name, value in self._values().items() if isinstance(value, int | float)}
        self._log({name: float(value) for name, value in numbers.items() if math.isfinite(value)})
