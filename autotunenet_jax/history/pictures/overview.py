"""A whole run: the loss, the metric and every hyperparameter over the budget."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..explain import score_of
from .axes import are_numbers, is_log_scale, label_of, spans_decades, written
from .figure import Look, legend_above, new_figure

if TYPE_CHECKING:
    import matplotlib.figure

    from ..history import History

# What is marked of a run's events: the sign, and what it means.
_MARKED = {
    "rollback": ("X", "rollback"),
    "retreat": ("<", "back to the best"),
    "fall": ("v", "rates fell"),
    "climb": ("^", "rates climbed"),
}

# Round numbers closer than this share of the width would run into each other.
_NUMBER_SHARE = 0.03

# Of a log scale at most so many decades below the largest value: the decay ends at zero.
_MOST_DECADES = 4.0


def draw(history: "History", look: Look) -> "matplotlib.figure.Figure":
    """Draws the picture; see `History.plot`."""
    names = list(history.names)
    figure = new_figure(2.8 + 1.25 * len(names))
    ratios = [1.7] + [1.0] * len(names)
    axes = np.atleast_1d(figure.subplots(1 + len(names), 1, sharex=True, height_ratios=ratios))
    has_losses = any(np.isfinite(row.get("loss", np.nan)) for row in history.records)
    for axis in axes:
        _draw_background(axis, history, look)
    if has_losses:
        _draw_column(axes[0], history, look, "loss")
    else:
        _draw_scores(axes[0], history, look)
    for axis, name in zip(axes[1:], names, strict=True):
        if history.records:
            _draw_column(axis, history, look, name)
        else:
            _draw_forks(axis, history, look, name)
        _label_options(axis, history.space.get(name, {}))
    _draw_evals(axes[0], history, look)
    _number_rounds(axes[0], history)
    axes[-1].set_xlabel("training steps (budget spent)")
    figure.align_ylabels(axes)
    legend_above(figure, _handles(axes[0], history, look), columns=7)
    return figure


def _draw_background(axis: Any, history: "History", look: Look) -> None:
    """Rounds, and what was undone."""
    for row in history.rounds:
        axis.axvspan(row["start"], row["end"], color=look.shade, lw=0, zorder=0)
    for event in history.events:
        if event["kind"] in _MARKED:
            axis.axvline(event["step"], color=_ink_of(event["kind"], look), lw=0.8, ls=":", zorder=2)
    axis.grid(True, axis="y")
    axis.set_axisbelow(True)


def _ink_of(kind: str, look: Look) -> str:
    return look.alarm if kind == "rollback" else look.text


def pieces_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
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


def smoothed(values: np.ndarray, memory: float) -> np.ndarray:
    """A running mean that passes over what is not finite."""
    out, average, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            average, weight = memory * average + (1 - memory) * value, memory * weight + (1 - memory)
        out[i] = average / weight if weight else np.nan
    return out


def _draw_column(axis: Any, history: "History", look: Look, column: str) -> None:
    """The loss or one hyperparameter, as recorded."""
    is_loss = column == "loss"
    for piece in pieces_of(history.records):
        steps = np.array([row["step"] for row in piece], float)
        values = np.array([row[column] for row in piece], float)
        is_kept = piece[0]["is_kept"]
        color, width, layer = (look.kept, 1.5, 3) if is_kept else (look.lost, 1.1, 2)
        if is_loss:
            steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
            axis.plot(steps, values, color=color, lw=0.5, alpha=0.35, zorder=1)
            # Losses that were noted now and then only are shown as they are.
            if 2 * len(values) < len(piece):
                axis.plot(steps, values, color=color, ls="none", marker=".", ms=5, zorder=layer)
            else:
                values = smoothed(values, 0.9 if piece[0]["phase"] == "train" else 0.6)
        axis.plot(steps, values, color=color, lw=width, zorder=layer)
    _scale(axis, np.array([row[column] for row in history.records], float), history.space.get(column))
    axis.set_ylabel(_label(history, column))


def _label(history: "History", column: str) -> str:
    is_scheduled = history.space.get(column, {}).get("is_scheduled", False)
    return label_of(column) + (",\nbefore the\nscheduler" if is_scheduled else "")


def _scale(axis: Any, values: np.ndarray, held: Mapping[str, Any] | None) -> None:
    """Log or linear as a hyperparameter's range is; what has none, such as a loss, by its values."""
    finite = values[np.isfinite(values)]
    is_log = spans_decades(finite) if held is None else is_log_scale(held) and bool((finite > 0).any())
    if not is_log:
        return
    axis.set_yscale("log")
    least = finite.max() / 10.0**_MOST_DECADES
    if finite.min() < least:
        axis.set_ylim(bottom=least)


def _draw_forks(axis: Any, history: "History", look: Look, name: str) -> None:
    """A hyperparameter's forks, and the path it took, where steps were not recorded."""
    steps, path = [0], [history.rounds[0]["forks"][0]["hyperparams"][name]]
    for row in history.rounds:
        for place, fork in enumerate(row["forks"]):
            color = look.kept if place == row["best"] else look.lost
            axis.plot([fork["start"], fork["end"]], [_place(history, name, fork["hyperparams"])] * 2, color=color, lw=3)
        steps.append(row["end"])
        path.append(row["chosen"][name])
    end = max(history.summary.get("steps", 0), steps[-1])
    values = [_place(history, name, {name: value}) for value in (*path, path[-1])]
    axis.plot([*steps, end], values, color=look.kept, lw=1.5, drawstyle="steps-post")
    _scale(axis, np.array(values, float), history.space.get(name))
    axis.set_ylabel(_label(history, name))


def _place(history: "History", name: str, hyperparams: Mapping[str, Any]) -> Any:
    """A value, or the position of an option that is no number, as records hold it."""
    options, value = history.space.get(name, {}).get("options"), hyperparams[name]
    return options.index(value) if options is not None and not are_numbers(options) else value


def _draw_scores(axis: Any, history: "History", look: Look) -> None:
    """The forks' scores, where losses were not recorded."""
    for row in history.rounds:
        for place, fork in enumerate(row["forks"]):
            for score in fork["scores"][:1]:
                value = score_of(history, row, score)
                color = look.kept if place == row["best"] else look.lost
                axis.plot([fork["start"], fork["end"]], [value] * 2, color=color, lw=3)
    axis.set_ylabel("score of forks")


def _label_options(axis: Any, held: Mapping[str, Any]) -> None:
    options = held.get("options")
    if options is None or len(options) > 8:
        return
    places = list(options) if are_numbers(options) else list(range(len(options)))
    axis.set_yticks(places, [written(option) for option in options])
    axis.minorticks_off()


def _draw_evals(axis: Any, history: "History", look: Look) -> None:
    """Readings of the metric outside rounds; hollow where training went back behind them."""
    shown = [row for row in history.evals if row.get("is_settled", True)]
    steps = [row["step"] for row in shown]
    axis.plot(steps, [row["value"] for row in shown], color=look.validation, lw=1.2, zorder=4)
    lost = [row for row in shown if any(start < row["step"] <= end for start, end in history.discarded)]
    for rows, filling in (([row for row in shown if row not in lost], look.validation), (lost, look.ground)):
        axis.plot(
            [row["step"] for row in rows], [row["value"] for row in rows],
            ls="none", marker="o", ms=4, color=look.validation, mfc=filling, zorder=5,
        )  # fmt: skip


def _number_rounds(axis: Any, history: "History") -> None:
    """Numbers above the rounds, as many as there is room for."""
    low, high = axis.get_xlim()
    last = -np.inf
    for number, row in enumerate(history.rounds, start=1):
        middle = 0.5 * (row["start"] + row["end"])
        if middle - last >= _NUMBER_SHARE * (high - low):
            last = middle
            axis.annotate(
                str(number), (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            )  # fmt: skip


def _handles(axis: Any, history: "History", look: Look) -> list[Any]:
    """What the picture shows, and marks of what happened at the top of the loss."""
    handles = [
        axis.plot([], [], color=look.kept, lw=1.8, label="kept")[0],
        axis.plot([], [], color=look.lost, lw=1.8, label="not kept")[0],
    ]
    if history.evals:
        handles.append(axis.plot([], [], color=look.validation, marker="o", ms=3.5, label="validation")[0])
    if history.rounds:
        handles.append(axis.fill([], [], color=look.shade, label="round of forks")[0])
    for kind, (sign, label) in _MARKED.items():
        steps = [event["step"] for event in history.events if event["kind"] == kind]
        if steps:
            (drawn,) = axis.plot(
                steps, [0.96] * len(steps), transform=axis.get_xaxis_transform(), ls="none", marker=sign, ms=6,
                color=_ink_of(kind, look), label=label, zorder=5,
            )  # fmt: skip
            handles.append(drawn)
    return handles
