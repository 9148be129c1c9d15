"""Figures: their colours, on light and on dark ground, and how they are written to a file."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import matplotlib.figure

Style: TypeAlias = Literal["light", "dark"] | None

# Of a page or a README; text is of a size to be read there.
_WIDTH_INCHES, _DPI, _FONT_SIZE = 8.0, 120, 9.0

# Below this a ground counts as dark.
_DARK = 0.5


class Look(NamedTuple):
    """Colours that those who are colour-blind can tell apart.

    Attributes:
      ground: Behind everything.
      text: Of text and axes.
      faint: Grid lines, and what is only there to compare with.
      shade: Behind rounds.
      kept: What the run went on with.
      lost: What it did not keep.
      validation: The metric.
      alarm: Rollbacks and failures.
      forks: One for each fork of a round, in turn.
      map: Colour map of a surface.

    Source: the palette of Okabe and Ito (2008), "Color universal design".
    """

    ground: str
    text: str
    faint: str
    shade: str
    kept: str
    lost: str
    validation: str
    alarm: str
    forks: tuple[str, ...]
    map: str


_LIGHT = Look(
    ground="#ffffff",
    text="#222222",
    faint="#d9d9d9",
    shade="#f1efe6",
    kept="#0072b2",
    lost="#e69f00",
    validation="#009e73",
    alarm="#d55e00",
    forks=("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#777777"),
    map="cividis",
)
_DARK_LOOK = Look(
    ground="#15181c",
    text="#e8e8e8",
    faint="#3c4148",
    shade="#24282e",
    kept="#56b4e9",
    lost="#e69f00",
    validation="#2fc79a",
    alarm="#ff7f2a",
    forks=("#e69f00", "#2fc79a", "#cc79a7", "#f0e442", "#d55e00", "#9a9a9a"),
    map="cividis",
)


def _look_of(style: Style, rc: Any) -> Look:
    """The colours of a style; without one, those that fit matplotlib's own settings."""
    from matplotlib.colors import to_hex, to_rgb

    if style is not None:
        return _DARK_LOOK if style == "dark" else _LIGHT
    ground = rc["figure.facecolor"]
    is_dark = sum(to_rgb(ground)) / 3.0 < _DARK
    look = _DARK_LOOK if is_dark else _LIGHT
    return look._replace(ground=to_hex(ground), text=to_hex(rc["text.color"]))


@contextlib.contextmanager
def drawing(style: Style) -> Iterator[Look]:
    """Sets matplotlib up for a picture, and puts its settings back.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: There is no such style.
    """
    if style not in ("light", "dark", None):
        raise ValueError(f'style must be "light", "dark", or None for matplotlib\'s own; got {style!r}.')
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("History.plot needs matplotlib; install autotunenet-jax[plot].") from error
    look = _look_of(style, matplotlib.rcParams)
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(inks, look.text),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), look.ground),
        **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize"), _FONT_SIZE),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), _FONT_SIZE - 1.0),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        "axes.linewidth": 0.7,
        "grid.color": look.faint,
        "grid.linewidth": 0.5,
        "savefig.facecolor": "auto",
    }
    with matplotlib.rc_context(settings):
        yield look


def new_figure(height_inches: float) -> "matplotlib.figure.Figure":
    """An empty figure, which belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(figure: "matplotlib.figure.Figure", path: Any) -> None:
    """Writes a figure to a file; its name tells the format."""
    figure.savefig(path, dpi=_DPI)


def legend_above(figure: "matplotlib.figure.Figure", handles: list[Any], *, columns: int = 5) -> None:
    """Says what is what, above everything, where nothing is drawn."""
    figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)), columnspacing=1.4)


def outlined() -> list[Any]:
    """A dark edge, so that a light line shows on any colour."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=3.2, foreground="black"), Normal()]
