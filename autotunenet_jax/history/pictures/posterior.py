"""What the surrogate says of each hyperparameter, round by round."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..explain import varied
from ..posterior import RoundPosterior, encoded, posterior_of, space_of
from .axes import along, is_discrete, label_of, unit_ticks
from .figure import Look, legend_above, new_figure

if TYPE_CHECKING:
    import matplotlib.figure

    from ..history import History

# Of one hyperparameter.
_MOST_ROUNDS = 4
_POINTS = 121
# Shortfalls shown: 0 is the best fork, 1 one that gained nothing.
_LOW, _HIGH = -0.35, 1.75

_SHORTFALL = "shortfall"


def draw(history: "History", look: Look, *, names: Sequence[str], rounds: Sequence[int]) -> "matplotlib.figure.Figure":
    """Draws the picture; see `History.plot`."""
    tried = {
        number: varied(history.rounds[number - 1]) for number in rounds if len(history.rounds[number - 1]["forks"])
    }
    panels = [
        (name, number) for name in names for number in _spread([n for n in tried if name in tried[n]])
    ]  # fmt: skip
    if not panels:
        raise ValueError(f"no round tried more than one value of {', '.join(names)}: there is no posterior to draw.")
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(0.9 + 1.9 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    found = {number: posterior_of(history, number) for number in sorted({number for _, number in panels})}
    for axis, (name, number) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, history, look, name=name, number=number, found=found[number])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(_SHORTFALL)
    axes[0][0].set_ylim(_LOW, _HIGH)
    has_failed = any(np.isnan(part.shortfall).any() for part in found.values())
    legend_above(figure, _handles(axes[0][0], look, has_failed=has_failed), columns=7)
    return figure


def _spread(numbers: list[int]) -> list[int]:
    """As many of them as there is room for, the first and the last among them."""
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), _MOST_ROUNDS)).round().astype(int)
    return [numbers[place] for place in places]


def title_of(number: int, row: dict[str, Any]) -> str:
    """A round in two words: which, and the horizon of its forks."""
    steps = sorted({fork["steps"] for fork in row["forks"]})
    horizon = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
    return f"round {number}: {horizon} steps"


def before(history: "History", number: int) -> dict[str, Any]:
    """What was in force before a round, as its first fork tries it."""
    return history.rounds[number - 1]["forks"][0]["hyperparams"]


def _draw_panel(axis: Any, history: "History", look: Look, *, name: str, number: int, found: RoundPosterior) -> None:
    """One hyperparameter in one round: mean, two standard deviations, the forks and the path."""
    space, row = found.space, history.rounds[number - 1]
    place = space.names.index(name)
    at = along(space, name, _POINTS)
    points = np.repeat(found.x[max(found.best, 0)][None, :], len(at), axis=0)
    points[:, place] = at
    mean, deviation = found.at(points)
    if is_discrete(space, name):
        axis.errorbar(at, mean, 2.0 * deviation, fmt="_", ms=12, color=look.text, lw=1.0, zorder=2)
    else:
        axis.fill_between(at, mean - 2.0 * deviation, mean + 2.0 * deviation, color=look.faint, lw=0, zorder=1)
        axis.plot(at, mean, color=look.text, lw=1.3, zorder=2)
    u = found.x[:, place]
    is_scored = np.isfinite(found.shortfall)
    is_best = np.arange(len(u)) == found.best
    height = np.clip(found.shortfall, _LOW, _HIGH)
    lost = is_scored & ~is_best
    axis.plot(u[lost], height[lost], "o", color=look.lost, mec=look.text, mew=0.5, ms=6, zorder=4)
    axis.plot(u[is_best], height[is_best], "*", color=look.kept, mec=look.text, mew=0.5, ms=12, zorder=5)
    failed = u[~is_scored]
    axis.plot(failed, np.full(len(failed), _HIGH - 0.12), "X", color=look.alarm, ms=7, zorder=4)
    axis.axvline(encoded(space, before(history, number))[place], color=look.text, lw=0.9, ls=":", zorder=3)
    axis.axvline(encoded(space, row["chosen"])[place], color=look.kept, lw=1.2, zorder=3)
    axis.set_xticks(*unit_ticks(space, name))
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel(label_of(name))
    axis.set_title(title_of(number, row))


def _handles(axis: Any, look: Look, *, has_failed: bool) -> list[Any]:
    handles = [
        axis.plot([], [], color=look.text, lw=1.3, label="mean")[0],
        axis.fill([], [], color=look.faint, label="± 2 sd")[0],
        axis.plot([], [], "o", color=look.lost, mec=look.text, mew=0.5, ms=6, label="fork")[0],
        axis.plot([], [], "*", color=look.kept, mec=look.text, mew=0.5, ms=11, label="kept")[0],
        axis.plot([], [], color=look.text, lw=0.9, ls=":", label="before")[0],
        axis.plot([], [], color=look.kept, lw=1.2, label="chosen")[0],
    ]
    if has_failed:
        handles.append(axis.plot([], [], "X", color=look.alarm, ms=7, label="failed")[0])
    return handles


def searched(history: "History") -> list[str]:
    """Hyperparameters of the space, in order, that a picture of the posterior may show.

    Raises:
      ValueError: There was no round, or the history does not know its space.
    """
    if not history.rounds:
        raise ValueError("this history has no finished round of forks, and so no posterior to draw.")
    return list(space_of(history).names)
