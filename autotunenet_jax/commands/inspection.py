"""``inspect``: what happened in a run, whether it is well, and which snapshots there are."""

import datetime
import math
import pathlib
import sys
from collections.abc import Sequence

from ..checkpoint.errors import SnapshotVersionError
from ..checkpoint.index import best_records, live_records
from ..checkpoint.survey import Finding, survey
from ..history.history import History
from .run_folder import NoHistoryError, read_history

# Columns of text that goes into a pipe or a file.
_WIDTH = 120

# Checkpoints that frameworks keep beside a history, found by their names and left unread; and how many are named.
_MOST_NAMES = 3
_FRAMEWORKS = {
    "Lightning": ("checkpoints/*.ckpt", "trainer.fit(..., ckpt_path=...)"),
    "transformers": ("checkpoint-*/trainer_state.json", "trainer.train(resume_from_checkpoint=...)"),
}


def inspect(where: pathlib.Path) -> int:
    """Prints it; changes nothing in the folder.

    Returns:
      1 where something is damaged, or there is nothing to tell; else 0.
    """
    problems: list[str] = []
    history = None
    try:
        history = read_history(where)
    except NoHistoryError as error:
        problems.append(str(error))
    if history is not None:
        print(history.explain())
        print()
        print(_health(history))
    if where.is_dir():
        problems += _show_snapshots(where, history)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _health(history: History) -> str:
    """Where the run stands."""
    kinds = [event["kind"] for event in history.events]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
    lines = []
    if history.records:
        row = history.records[-1]
        values = ", ".join(f"{name} {row[name]:.3g}" for name in history.names)
        where = f"step {row['step']} ({row['phase']})"
        lines.append(f"Health: {where}, loss {row['loss']:.4g}, {values}; the run {_state(history)}.")
    evals = [row for row in history.evals if row.get("is_settled", True)]
    if evals:
        sign = 1.0 if history.mode == "min" else -1.0
        best = min(evals, key=lambda row: sign * row["value"] if math.isfinite(row["value"]) else math.inf)
        lines.append(
            f"Validation: {evals[-1]['value']:.4g} at step {evals[-1]['step']}; the best of {len(evals)} readings was "
            f"{best['value']:.4g} at step {best['step']}."
        )
    return "\n".join([*lines, f"Events: {told}."])


def _state(history: History) -> str:
    """How far the run has come."""
    if not history.summary:
        return "is under way, or ended by force"
    step, total = history.summary["steps"], history.summary.get("total_steps") or 0
    if total and step >= total:
        return "ended"
    # Where a framework owns the loop, a record that breaks off is no sign that nobody goes on with it.
    is_told = any(event["kind"] in ("stop", "data") and event["step"] == step for event in history.events)
    return f"stopped at step {step}{f' of {total}' if total else ''}{'' if is_told else ', or is under way'}"


def _show_snapshots(where: pathlib.Path, history: History | None) -> list[str]:
    """Prints a table of the snapshots; returns what is damaged."""
    try:
        found, messages = survey(where)
    except (SnapshotVersionError, OSError) as error:
        return [str(error)]
    if not found:
        print(f"\nNo snapshots of this library lie here; {_told_of(where)}.")
        return messages
    records = [finding.record for finding in found if finding.record is not None]
    live = live_records(records)
    best = best_records(records, "max" if history is not None and history.mode == "max" else "min")
    marks: dict[int, list[str]] = {}
    for name, those in (("latest", live[-1:]), ("best", best[:1])):
        for record in those:
            marks.setdefault(record.id, []).append(name)
    head = ("snapshot", "step", "metric", "state", "health", "saved (UTC)", "size", "which")
    _show_table(f"Snapshots in {where}", head, [_row(finding, marks) for finding in found])
    damaged = [f"snapshot {finding.name} is damaged: {finding.problem}." for finding in found if finding.problem]
    return [*messages, *damaged]


def _row(finding: Finding, marks: dict[int, list[str]]) -> tuple[str, ...]:
    record = finding.record
    state = "complete" if finding.state == "sound" else finding.state
    if record is None:
        return finding.name, "", "", state, "", "", "", ""
    saved = datetime.datetime.fromtimestamp(record.saved_at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    which = [*marks.get(record.id, []), *(["abandoned"] if record.is_abandoned else [])]
    metric = "-" if record.metric is None else f"{record.metric:.4g}"
    return (
        finding.name, str(record.step), metric, state, record.status, saved, _size(record.size_bytes), ", ".join(which),
    )  # fmt: skip


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.3g} TB"


def _show_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    console.print(table)


def _told_of(where: pathlib.Path) -> str:
    """Where the checkpoints of a framework lie, and what goes on from one; a clause."""
    for name, (pattern, how) in _FRAMEWORKS.items():
        files = sorted(where.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        found = [path if path.suffix == ".ckpt" else path.parent for path in files]
        if found:
            names = ", ".join(path.name for path in found[:_MOST_NAMES])
            more = f" and {len(found) - _MOST_NAMES} older" if len(found) > _MOST_NAMES else ""
            folder = found[0].parent.as_posix()
            return f"{name} keeps its checkpoints in {folder}: {names}{more}. {how} goes on from one"
    return "a loop of Lightning or transformers keeps checkpoints of its own, and none lie here either"
