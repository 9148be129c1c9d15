"""``export``: a history for other programs."""

import csv
import json
from collections.abc import Mapping
from typing import Any, TextIO

from ..history.history import History

FORMATS = ("json", "csv", "optuna")
TABLES = ("records", "forks", "evals", "events")


def export(history: History, form: str, *, table: str, storage: str | None, out: TextIO) -> None:
    """Prints a history, or puts it into a storage of Optuna.

    Raises:
      ImportError: Optuna is asked for and not installed.
      ValueError: The history cannot be put into a study.
    """
    if form == "optuna":
        study = history.to_optuna(storage=storage)
        out.write(f"{len(study.trials)} trials in study {study.study_name!r} of {storage}\n")
    elif form == "json":
        json.dump(history.to_dict(), out, allow_nan=False)
        out.write("\n")
    else:
        rows = _rows(history, table)
        writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rows(history: History, table: str) -> list[Mapping[str, Any]]:
    """A table of a history, flat."""
    if table != "forks":
        return getattr(history, table)
    return [
        {
            "round": number,
            "fork": place,
            "kind": row["kind"],
            "scored_by": row["scored_by"],
            **fork["hyperparams"],
            "score": fork["scores"][0] if fork["scores"] else "",
            **{name: fork[name] for name in ("status", "start", "end", "steps")},
            **{name: fork.get(name) for name in ("p_better", "lead", "deviation")},
        }
        for number, row in enumerate(history.rounds, start=1)
        for place, fork in enumerate(row["forks"], start=1)
    ]
