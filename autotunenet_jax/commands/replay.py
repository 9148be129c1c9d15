"""``replay``: the values of the steps that were kept, as a table or as code that needs neither tuner nor history."""

import csv
import json
from typing import Any, TextIO

import numpy as np

from ..history.history import History

FORMATS = ("csv", "json", "python")

_CODE = '''"""Replays a tuned run without the tuner: {count} training steps, counted from 0."""

import jax.numpy as jnp

STEPS = {steps}
VALUES = {values}
# These stay till the next entry; the others go in straight lines.
HELD = {held}
OPTIONS = {options}


def schedule(name):
    """An optax schedule; of what is none of numbers it gives the position in OPTIONS."""
    steps, values = jnp.array(STEPS, jnp.float32), jnp.array(VALUES[name])

    def value(count):
        if name in HELD:
            return values[jnp.maximum(jnp.searchsorted(steps, count, side="right") - 1, 0)]
        return jnp.interp(jnp.asarray(count, jnp.float32), steps, values)

    return value


SCHEDULES = {{name: schedule(name) for name in VALUES}}
'''


def replay(history: History, form: str, *, every: int, out: TextIO) -> None:
    """Prints the schedules of a run, every so many kept steps.

    Raises:
      ValueError: Nothing was recorded.
    """
    steps, columns = _sampled(history, every)
    if form == "python":
        held = [name for name in columns if _is_whole(columns[name])]
        values = {name: list(column) for name, column in columns.items()}
        options = {name: held["options"] for name, held in history.space.items() if "options" in held}
        out.write(_CODE.format(count=steps[-1] + 1, steps=steps, values=values, held=held, options=options))
        return
    table = {name: _shown(history, name, column) for name, column in columns.items()}
    rows = [{"step": step, **{name: table[name][i] for name in table}} for i, step in enumerate(steps)]
    if form == "json":
        json.dump(rows, out, indent=1)
        out.write("\n")
        return
    writer = csv.DictWriter(out, ["step", *table], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _sampled(history: History, every: int) -> tuple[list[int], dict[str, list[Any]]]:
    """Kept steps, from 0, and the values in force there, the last one included."""
    schedules = history.schedule()
    last = _kept_steps(history) - 1
    steps = sorted({*range(0, last + 1, every), last})
    columns = {name: np.asarray(schedules[name](np.array(steps, np.int32))) for name in schedules}
    whole = {name for name in columns if _holds_whole(history, name)}
    return steps, {
        name: [round(float(value)) if name in whole else float(str(value)) for value in column]
        for name, column in columns.items()
    }


def _kept_steps(history: History) -> int:
    end = history.summary.get("steps", history.records[-1]["step"] if history.records else 0)
    return end - sum(min(last, end) - first for first, last in history.discarded if first < end)


def _holds_whole(history: History, name: str) -> bool:
    """Whether a hyperparameter's values are whole numbers, positions of options among them."""
    return all(isinstance(row[name], int) for row in history.records) if history.records else False


def _is_whole(column: list[Any]) -> bool:
    return all(isinstance(value, int) for value in column)


def _shown(history: History, name: str, column: list[Any]) -> list[Any]:
    """Values as they were given to the space."""
    options = history.space.get(name, {}).get("options", [])
    if not options or all(isinstance(option, int | float) for option in options):
        return column
    return [options[int(value)] for value in column]
