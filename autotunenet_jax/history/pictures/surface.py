"""What the surrogate says of two hyperparameters together."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from ..explain import varied
from ..posterior import RoundPosterior, encoded, posterior_of
from .axes import along, label_of, unit_ticks
from .figure import Look, legend_above, new_figure, outlined
from .posterior import before, title_of

if TYPE_CHECKING:
    import matplotlib.figure

    from ..history import History

_POINTS = 41


def pair_of(history: "History", names: list[str]) -> tuple[str, str]:
    """The two hyperparameters that most rounds searched together.

    Raises:
      ValueError: There is one hyperparameter only.
    """
    if len(names) < 2:
        raise ValueError(f"a slice is over two hyperparameters, and this run tuned one: {names[0]}.")
    together = [set(varied(row)) for row in history.rounds]
    return max(itertools.combinations(names, 2), key=lambda pair: sum(set(pair) <= found for found in together))


def draw(history: "History", look: Look, *, names: tuple[str, str], number: int) -> "matplotlib.figure.Figure":
    """Draws the picture; see `History.plot`."""
    found = posterior_of(history, number)
    space, places = found.space, [found.space.names.index(name) for name in names]
    first, second = (along(space, name, _POINTS) for name in names)
    mean, deviation = _surfaces(found, places, first, second)
    figure = new_figure(3.7)
    axes = figure.subplots(1, 2, sharey=True)
    when = title_of(number, history.rounds[number - 1])
    for axis, values, what in zip(axes, (mean, deviation), (f"shortfall after {when}", "its sd"), strict=True):
        surface = axis.pcolormesh(_edges(first), _edges(second), values, cmap=look.map)
        figure.colorbar(surface, ax=axis)
        axis.set_title(what, loc="left")
        _draw_forks(axis, history, look, places=places, number=number, found=found)
        axis.set_xticks(*unit_ticks(space, names[0]))
        axis.set_yticks(*unit_ticks(space, names[1]))
        axis.set_xlim(0.0, 1.0)
        axis.set_ylim(0.0, 1.0)
        axis.set_xlabel(label_of(names[0]))
    axes[0].set_ylabel(label_of(names[1]))
    has_failed = any(not fork["scores"] for row in history.rounds[:number] for fork in row["forks"])
    legend_above(figure, _handles(axes[0], look, has_failed=has_failed))
    return figure


def _surfaces(
    found: RoundPosterior, places: list[int], first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over a grid; what is not on an axis is as in the fork that won."""
    x, y = np.meshgrid(first, second)
    points = np.repeat(found.x[max(found.best, 0)][None, :], x.size, axis=0)
    points[:, places[0]], points[:, places[1]] = x.ravel(), y.ravel()
    mean, deviation = found.at(points)
    return mean.reshape(x.shape), deviation.reshape(x.shape)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Bounds of the cells about some coordinates."""
    return np.concatenate([[0.0], 0.5 * (centres[1:] + centres[:-1]), [1.0]])


def _draw_forks(
    axis: Any, history: "History", look: Look, *, places: list[int], number: int, found: RoundPosterior
) -> None:
    """All forks up to the round, and the way from one choice to the next."""
    path = [encoded(found.space, before(history, 1))[places]]
    for row in history.rounds[:number]:
        points = np.stack([encoded(found.space, fork["hyperparams"]) for fork in row["forks"]])[:, places]
        is_scored = np.array([bool(fork["scores"]) for fork in row["forks"]])
        for those, color, sign in ((points[is_scored], look.lost, "o"), (points[~is_scored], look.alarm, "X")):
            if len(those):
                axis.plot(*those.T, sign, color=color, mec="black", mew=0.7, ms=6, clip_on=False, zorder=4)
        path.append(encoded(found.space, row["chosen"])[places])
    line = np.stack(path)
    axis.plot(*line.T, color="white", lw=1.6, marker=".", ms=5, zorder=5, path_effects=outlined())
    axis.plot(*line[-1], "*", color="white", mec="black", mew=0.8, ms=15, clip_on=False, zorder=6)


def _handles(axis: Any, look: Look, *, has_failed: bool) -> list[Any]:
    handles = [
        axis.plot([], [], "o", color=look.lost, mec="black", mew=0.7, ms=6, label="fork")[0],
        axis.plot([], [], color="white", lw=1.6, marker=".", ms=5, label="path", path_effects=outlined())[0],
        axis.plot([], [], "*", color="white", mec="black", mew=0.8, ms=13, ls="none", label="chosen last")[0],
    ]
    if has_failed:
        handles.append(axis.plot([], [], "X", color=look.alarm, mec="black", mew=0.7, ms=7, label="failed")[0])
    return handles
