"""One cell of the benchmark: a workload, a method, a start and a seed; and where its result is kept."""

import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from benchmarks.quality.task import Workload

RESULTS = pathlib.Path(__file__).parent / "results"

# Half a decade apart and three decades wide, around the default rate.
ORACLE_RATES = ("lr0.0316", "lr0.1", "lr0.316", "lr1", "lr3.16", "lr10", "lr31.6")
ORACLE_DECAYS = ("wd0.1", "wd0.3", "wd1")
ORACLE_DROPOUTS = ("do0", "do0.25", "do0.5")

_PART = re.compile(r"(lr|wd|do)([0-9.eE+-]+)")


class Cell(NamedTuple):
    """Names one run. ``start`` is made of ``lr`` (a factor of the default rate), ``wd`` and ``do`` (values)."""

    workload: str
    method: str
    start: str
    seed: int
    steps: int | None = None

    @property
    def path(self) -> pathlib.Path:
        """The file of the result."""
        budget = "" if self.steps is None else f"@T{self.steps}"
        return RESULTS / self.workload / f"{self.method}@{self.start}{budget}@s{self.seed}.json"

    def load(self) -> dict[str, Any] | None:
        """The stored result, or None."""
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def save(self, result: dict[str, Any]) -> None:
        """Store a result; the file appears whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**self._asdict(), **_rounded(result)}) + "\n")
        partial.replace(self.path)


def start_values(task: Workload, start: str) -> dict[str, float]:
    """The hyperparameters that a start names, moved to the edge of the task's space when they lie outside.

    Example:
        >>> from benchmarks.quality import workloads
        >>> start_values(workloads.get("W1"), "lr10")
        {'learning_rate': 0.01}

    Raises:
      ValueError: ``start`` is not made of ``lr``, ``wd`` and ``do`` parts.
      KeyError: The task does not have a hyperparameter that ``start`` names.
    """
    parts = dict(_PART.findall(start))
    if "".join(name + value for name, value in parts.items()) != start:
        raise ValueError(f"a start is made of lr<factor>, wd<value>, do<value>; got {start!r}.")
    values = {}
    if "lr" in parts:
        factor = float(parts["lr"])
        # "lr3.16" means half a decade exactly.
        decades = round(2 * math.log10(factor)) / 2
        factor = 10**decades if abs(math.log10(factor) - decades) < 1e-3 else factor
        values["learning_rate"] = task.defaults["learning_rate"] * factor
    if "wd" in parts:
        values["weight_decay"] = float(parts["wd"])
    if "do" in parts:
        values["dropout"] = float(parts["do"])
    # A start outside the space begins at its edge: decay 0 is the smallest decay of a log scale.
    return {name: min(max(value, task.space[name][0]), task.space[name][1]) for name, value in values.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
