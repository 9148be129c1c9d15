"""The picture of a run."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import matplotlib.figure

    from .history import History

_KEPT, _DISCARDED, _EVAL, _ROUND = "#1f4e79", "#d08770", "#2e8b57", "#f0ead6"


def _pieces(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs of records that belong together, so that no line is drawn across a jump between forks."""
    pieces: list[list[dict[str, Any]]] = []
    for row in rows:
        tag = (row["phase"], row["round"], row["fork"], row["is_kept"])
        last = pieces[-1][-1] if pieces else None
        if last is not None and (last["phase"], last["round"], last["fork"], last["is_kept"]) == tag:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    return pieces


def _smooth(values: np.ndarray, memory: float) -> np.ndarray:
    out, average, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            average, weight = memory * average + (1 - memory) * value, memory * weight + (1 - memory)
        out[i] = average / weight if weight else np.nan
    return out


def _is_log(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size) and bool((finite > 0).all()) and finite.max() / finite.min() > 30


def _draw_column(axis: Any, history: "History", pieces: list[list[dict[str, Any]]], column: str) -> None:
    """The loss or one hyperparameter, with the rounds and rollbacks behind it."""
    for held in history.rounds:
        axis.axvspan(held["start"], held["end"], color=_ROUND, lw=0, zorder=0)
    for piece in pieces:
        steps = np.array([row["step"] for row in piece], float)
        values = np.array([row[column] for row in piece], float)
        is_kept = piece[0]["is_kept"]
        color = _KEPT if is_kept else _DISCARDED
        if column == "loss":
            axis.plot(steps, values, color=color, lw=0.5, alpha=0.3, zorder=1)
            values = _smooth(values, 0.9 if piece[0]["phase"] == "train" else 0.6)
        axis.plot(steps, values, color=color, lw=1.4 if is_kept else 1.0, zorder=3 if is_kept else 2)
    if _is_log(np.array([row[column] for row in history.records], float)):
        axis.set_yscale("log")
    axis.set_ylabel(column.replace("_", " "))
    axis.grid(True, which="major", color="0.9", lw=0.6, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    for event in history.events:
        if event.get("kind") == "rollback":
            axis.axvline(event["step"], color="crimson", lw=0.8, ls=":", zorder=2)


def plot_history(history: "History", path: Any = None) -> "matplotlib.figure.Figure":
    """Draws a history; see `History.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("History.plot needs matplotlib; install autotunenet-jax[plot].") from error

    names = list(history.names)
    height = 2.6 + 1.7 * len(names)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [1.6] + [1.0] * len(names)
    axes = np.atleast_1d(figure.subplots(1 + len(names), 1, sharex=True, height_ratios=ratios))
    pieces = _pieces(history.records)

    for axis, column in zip(axes, ["loss", *names], strict=True):
        _draw_column(axis, history, pieces, column)
    for number, held in enumerate(history.rounds, start=1):
        label = f"round {number} ({held['kind']}, {len(held['forks'])} forks)"
        axes[0].annotate(label, ((held["start"] + held["end"]) / 2, 1.02), xycoords=("data", "axes fraction"),
                         ha="center", va="bottom", fontsize=8, color="0.35")  # fmt: skip
    if history.evals:
        lost = {row["step"] for row in history.records if not row["is_kept"]}
        shown = [row for row in history.evals if row["step"] not in lost]
        axes[0].plot(
            [row["step"] for row in shown],
            [row["value"] for row in shown],
            color=_EVAL,
            marker="o",
            ms=3,
            lw=1.2,
            zorder=4,
        )
    handles = [
        axes[0].plot([], [], color=_KEPT, lw=1.6, label="kept")[0],
        axes[0].plot([], [], color=_DISCARDED, lw=1.6, label="discarded (sweep and forks)")[0],
    ]
    if history.evals:
        handles.append(axes[0].plot([], [], color=_EVAL, marker="o", ms=3, label="validation")[0])
    axes[0].legend(handles=handles, frameon=False, fontsize=8, loc="upper right")
    axes[-1].set_xlabel("training steps (budget spent)")
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
