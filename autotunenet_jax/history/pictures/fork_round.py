"""One round close up: what every fork made of the same batches, and what it scored."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ...controller.fork_score import scored_from
from ..belief import believed
from ..explain import score_of, varied
from ..posterior import encoded, space_of
from .axes import label_of, spans_decades, unit_ticks, written
from .figure import Look, legend_above, new_figure
from .overview import smoothed
from .posterior import title_of

if TYPE_CHECKING:
    import matplotlib.figure

    from ..history import History

_MEMORY = 0.6
# Letters that a legend has room for, side by side.
_LETTERS = 112


def draw(history: "History", look: Look, *, number: int) -> "matplotlib.figure.Figure":
    """Draws the picture; see `History.plot`."""
    row = history.rounds[number - 1]
    curves = [curve_of(history, number, place) for place in range(len(row["forks"]))]
    labels = [_label(row, place) for place in range(len(curves))]
    columns = max(1, min(len(labels), _LETTERS // (max(map(len, labels)) + 7)))
    figure = new_figure(3.4 + 0.2 * -(-len(labels) // columns))
    if any(len(steps) > 1 for steps, _ in curves):
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
        _draw_curves(left, row, look, curves)
        left.set_xlabel("steps of the fork" + (", on the same batches" if history.is_paired else ""))
    else:
        right = figure.subplots()
    _draw_scores(right, history, row, look)
    figure.axes[0].set_title(f"{title_of(number, row)}, scored by {row['scored_by']}", loc="left")
    inks = colors_of(row, look)
    handles = [
        right.plot([], [], color=ink, lw=2.4 if place == row["best"] else 1.5, label=label)[0]
        for place, (ink, label) in enumerate(zip(inks, labels, strict=True))
    ]
    legend_above(figure, handles, columns=columns)
    return figure


def curve_of(history: "History", number: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps since a fork began, and its losses there, as far as they were recorded."""
    start, tag = history.rounds[number - 1]["forks"][place]["start"], ("fork", number - 1, place)
    rows = [row for row in history.records if (row["phase"], row["round"], row["fork"]) == tag and row["step"] > start]
    finite = [row for row in rows if np.isfinite(row["loss"])]
    # A loss that was noted now and then makes no curve.
    rows = finite if 2 * len(finite) >= len(rows) else []
    steps = np.array([row["step"] - start for row in rows], int)
    return steps, np.array([row["loss"] for row in rows], float)


def colors_of(row: dict[str, Any], look: Look) -> list[str]:
    """One colour for each fork; the winner has that of what is kept."""
    others = iter(range(len(row["forks"])))
    return [
        look.kept if place == row["best"] else look.forks[next(others) % len(look.forks)]
        for place in range(len(row["forks"]))
    ]


def _label(row: dict[str, Any], place: int) -> str:
    """What a fork tried, and what came of it."""
    fork = row["forks"][place]
    tried = ", ".join(f"{label_of(name)} {written(fork['hyperparams'][name])}" for name in varied(row))
    what = f"{place + 1}: {tried}"
    if place == row["best"]:
        what += " (kept)"
    elif not fork["scores"]:
        what += " (failed)"
    elif place == 0:
        what += " (range test)" if row["sweep"] is not None else " (as before)"
    return what


def _draw_curves(axis: Any, row: dict[str, Any], look: Look, curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Losses over steps; the part that a score by the training loss averages is drawn thick."""
    is_by_loss = row["scored_by"] != "validation"
    inks = colors_of(row, look)
    for place, (steps, losses) in enumerate(curves):
        is_best, line = place == row["best"], smoothed(losses, _MEMORY)
        axis.plot(steps, losses, color=inks[place], lw=0.5, alpha=0.4, zorder=1)
        axis.plot(steps, line, color=inks[place], lw=2.2 if is_best else 1.4, zorder=4 if is_best else 3)
        counts = steps > int(scored_from(jnp.int32(row["forks"][place]["steps"])))
        if is_by_loss:
            axis.plot(steps[counts], line[counts], color=inks[place], lw=5.0, alpha=0.45, zorder=2)
    if spans_decades(np.concatenate([losses for _, losses in curves])):
        axis.set_yscale("log")
    axis.set_ylabel("training loss" + ("; thick: scored" if is_by_loss else ""))
    axis.grid(True, axis="y")
    axis.set_axisbelow(True)


def _draw_scores(axis: Any, history: "History", row: dict[str, Any], look: Look) -> None:
    """Scores over what was varied, where that is one hyperparameter, or fork by fork."""
    names, inks = varied(row), colors_of(row, look)
    if len(names) == 1 and history.space:
        space = space_of(history)
        at = [float(encoded(space, fork["hyperparams"])[space.names.index(names[0])]) for fork in row["forks"]]
        axis.set_xticks(*unit_ticks(space, names[0]))
        axis.set_xlim(-0.03, 1.03)
        axis.set_xlabel(label_of(names[0]))
    else:
        at = list(range(1, len(row["forks"]) + 1))
        axis.set_xticks(at)
        axis.set_xlabel("fork")
    believes = [believed(row, place) for place in range(len(at))]
    for place, fork in enumerate(row["forks"]):
        is_best, sign = place == row["best"], "*" if place == row["best"] else "o"
        if fork["scores"]:
            value = score_of(history, row, fork["scores"][0])
            if (held := believes[place]) is not None:
                low, high = (score_of(history, row, end) for end in held)
                axis.plot([at[place]] * 2, [low, high], color=inks[place], lw=1.6)
            axis.plot(at[place], value, sign, color=inks[place], mec=look.text, mew=0.5, ms=13 if is_best else 7)
        else:
            axis.plot(at[place], 0.95, "X", color=look.alarm, ms=8, transform=axis.get_xaxis_transform())
    if row.get("reference") is not None:
        axis.axhline(score_of(history, row, row["reference"]), color=look.text, lw=0.9, ls="--", zorder=1)
        axis.annotate(
            "before the forks", (0.98, score_of(history, row, row["reference"])), xytext=(0, 3),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom", fontsize="small",
        )  # fmt: skip
        axis.margins(y=0.12)
    what = "score" if row["scored_by"] != "validation" else "validation metric"
    axis.set_ylabel(what + ("; bars: ± 2 sd" if any(believes) else ""))
    axis.grid(True, axis="y")
    axis.set_axisbelow(True)
