"""The kinds of pictures there are, and what each is drawn from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from . import fork_round, overview, posterior, surface
from .figure import Style, drawing, write

if TYPE_CHECKING:
    import matplotlib.figure

    from ..history import History

Kind: TypeAlias = Literal["overview", "posterior", "round", "slice"]
KINDS: tuple[str, ...] = get_args(Kind)


def plot(
    history: "History",
    path: Any,
    *,
    kind: Kind,
    style: Style,
    round: int | None,
    names: Sequence[str] | None,
) -> "matplotlib.figure.Figure":
    """Draws a picture; see `History.plot`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    _check(history, kind, round, names)
    with drawing(style) as look:
        match kind:
            case "overview":
                figure = overview.draw(history, look)
            case "posterior":
                rounds = range(1, len(history.rounds) + 1) if round is None else [round]
                figure = posterior.draw(history, look, names=names or posterior.searched(history), rounds=rounds)
            case "round":
                figure = fork_round.draw(history, look, number=round or len(history.rounds))
            case "slice":
                pair = (names[0], names[1]) if names else surface.pair_of(history, posterior.searched(history))
                figure = surface.draw(history, look, names=pair, number=round or len(history.rounds))
        if path is not None:
            write(figure, path)
    return figure


def _check(history: "History", kind: str, number: int | None, names: Sequence[str] | None) -> None:
    if not history.records and not history.rounds:
        raise ValueError("nothing was recorded: run fit first, then plot its history.")
    count = len(history.rounds)
    if kind != "overview" and not count:
        raise ValueError(f"no round of forks has ended, so there is no {kind} to draw; kind='overview' shows the run.")
    if number is not None and (kind == "overview" or isinstance(number, bool) or not 1 <= number <= count):
        what = "has no round to choose" if kind == "overview" else f"takes a round from 1 to {count}"
        raise ValueError(f"kind={kind!r} {what}; got round={number!r}.")
    if names is None:
        return
    unknown = [name for name in names if name not in history.names]
    if isinstance(names, str) or unknown or not names:
        raise ValueError(f"names are hyperparameters of this run, {', '.join(history.names)}; got {names!r}.")
    if kind not in ("posterior", "slice") or (kind == "slice" and len(set(names)) != 2):
        raise ValueError(f"kind='posterior' takes names, and kind='slice' two of them; got {kind!r} with {names!r}.")
