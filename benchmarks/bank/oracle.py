"""The best that a fixed schedule reaches on each task: one whole run per quarter decade of the rate.

python -m benchmarks.bank.oracle 0-200
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank.lab import Lab
from benchmarks.bank.tasks import make

FILE = Path(__file__).with_name("oracles.json")
SCHEDULES = {  # of the share of the steps that is spent
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + np.cos(np.pi * share)),
}
Record = dict[str, Any]


def _runs(lab: Lab, grid: np.ndarray) -> dict[str, np.ndarray]:
    """Validation and test loss at the end, by schedule, one row per rate."""
    steps, found = lab.task.steps, {}
    for name, schedule in SCHEDULES.items():
        rates = 10 ** grid[:, None] * schedule(np.arange(steps) / steps)
        states, _ = lab.run(lab.repeat(lab.start, len(grid)), 0, rates)
        found[name] = lab.evaluate(states)
    return found


def _beyond(grid: np.ndarray, found: dict[str, np.ndarray]) -> np.ndarray:
    """A further decade at the end where the best lies, if it lies at one."""
    values = np.min([rows[:, 0] for rows in found.values()], 0)
    best = int(values.argmin())
    if best == len(grid) - 1:
        return grid[-1] + np.arange(1, 5) / 4
    return grid[0] - np.arange(4, 0, -1) / 4 if best == 0 else np.zeros(0)


def _rounded(values: Any) -> Any:
    """Five significant digits."""
    if isinstance(values, float):
        return float(f"{values:.5g}")
    return [_rounded(value) for value in values]


def _learns(start: np.ndarray, best: np.ndarray) -> bool:
    """Whether the best run beats the start clearly, in validation and test loss."""
    margin = 0.05 * np.maximum(np.abs(start), 0.1) if min(best) < 0 else 0.05 * np.abs(start)
    return bool(np.all(np.isfinite(best)) and max(best) < 1e8 and np.all(start - best >= margin))


def sweep(lab: Lab) -> Record:
    """Losses at the end over a grid of rates and schedules; the best run is the best by validation."""
    low, high = lab.task.decades
    grid = np.arange(low, high + 0.01, 0.25)
    start, found = lab.evaluate(lab.start)[0], _runs(lab, grid)
    further = _beyond(grid, found)
    if len(further):
        more = _runs(lab, further)
        order = np.argsort(np.concatenate([grid, further]))
        grid = np.concatenate([grid, further])[order]
        found = {name: np.concatenate([found[name], more[name]])[order] for name in found}
    schedule = min(found, key=lambda name: found[name][:, 0].min())
    row = int(found[schedule][:, 0].argmin())
    best = found[schedule][row]
    return {
        "name": lab.task.name,
        "family": lab.task.family,
        "optimizer": lab.task.optimizer,
        "signed": lab.task.problem.signed,
        "usable": _learns(start, best),
        "start": _rounded(start.tolist()),
        "best": [*_rounded(best.tolist()), float(grid[row]), schedule],
        "grid": grid.tolist(),
        **{name: _rounded(rows.tolist()) for name, rows in found.items()},
    }


def ratio(value: float, record: Record, part: int = 1) -> float:
    """A loss measured by the oracle's: 1 is as good, more is worse. ``part`` 0 is validation, 1 is test.

    It is (value - floor) / (best - floor). For losses that are positive (cross-entropy, squares) the floor lies below 0
    by a ten-thousandth of the start's loss, so that losses which all but vanish count alike. For losses that may be
    negative it lies below the best by a quarter of the way from the start to the best, so that the start has the ratio
    5; a loss below that floor has a negative ratio.
    """
    start, best = record["start"][part], record["best"][part]
    floor = best - (start - best) / 4 if record["signed"] else -1e-4 * start
    return (value - floor) / (best - floor)


@lru_cache
def load() -> dict[int, Record]:
    """The oracles in the file, by task."""
    return {int(i): record for i, record in read(FILE).items()}


def save(records: Mapping[Any, Record], file: Path) -> None:
    """One line for each, whole or not at all."""
    lines = [f'"{key}": {json.dumps(records[key])}' for key in sorted(records)]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(temporary, file)


def read(file: Path) -> dict[str, Record]:
    """The oracles in a file, by the key that they have there."""
    return json.loads(file.read_text()) if file.exists() else {}


def fill_file(file: Path, keys: Sequence[str], lab_of: Callable[[str], Lab]) -> None:
    """Sweeps what has no oracle in the file yet."""
    records = read(file)
    for key in keys:
        if key not in records:
            began = time.perf_counter()
            records[key] = sweep(lab_of(key))
            save(records, file)
            took = time.perf_counter() - began
            print(f"{key} {took:.1f} s  {records[key]['name']}  {records[key]['best']}", flush=True)


def fill(ids: range) -> None:
    for i in ids:
        load.cache_clear()
        if i in load():
            continue
        began = time.perf_counter()
        record = sweep(Lab(make(i)))
        load.cache_clear()
        save({**load(), i: record}, FILE)
        took = time.perf_counter() - began
        print(
            f"{i:4d} {took:5.1f} s  {record['name']}: {record['start'][1]:.4g} -> {record['best']}", end="", flush=True
        )
        print("" if record["usable"] else "  UNUSABLE", flush=True)


if __name__ == "__main__":
    first, last = map(int, sys.argv[1].split("-"))
    fill(range(first, last))
