"""The picture of the stored results: each workload's test loss over the oracle's, ours beside the strongest peers."""

import math
import pathlib
from typing import Any

from benchmarks.quality import report

# Method, name in the legend, colour and marker; the colours are told apart by the colour-blind too.
_SHOWN = (
    ("ours", "ours, all starts", "#d55e00", "D"),
    ("wide_fork", "wide fork round", "#0072b2", "o"),
    ("range_test", "range test", "#56b4e9", "o"),
    ("prodigy_cosine", "Prodigy, cosine", "#009e73", "s"),
    ("schedule_free", "schedule-free AdamW", "#8fbf6a", "s"),
    ("optuna8_half", "Optuna, then a run", "#cc79a7", "^"),
    ("autolrs", "AutoLRS", "#7f5fa8", "^"),
    ("pbt4", "PBT, 4 members", "#8c8c8c", "v"),
    ("pb2_4", "PB2, 4 members", "#4d4d4d", "v"),
)

_LIMITS = (0.6, 2.5)
_TICKS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5)


def plot(path: pathlib.Path) -> None:
    """Draw what is stored; a method or workload without results is left out.

    Args:
      path: Where the picture goes; the ending says in which format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in report.BENCHMARK if report.of_each_run(name, "ours")]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.85 * len(names)), layout="constrained")
    for index, (method, *style) in enumerate(_SHOWN):
        offset = (index - (len(_SHOWN) - 1) / 2) * 0.8 / len(_SHOWN)
        _draw(axes, names, method, offset, *style)
    _finish(axes, names)
    figure.savefig(path, dpi=90, facecolor="white")
    plt.close(figure)


def _draw(axes: Any, names: list[str], method: str, offset: float, title: str, colour: str, marker: str) -> None:
    """One method: a marker and an interval in the row of each workload, at the edge when it lies outside."""
    low, high = _LIMITS
    is_named = False
    for row, name in enumerate(names):
        logs = list(report.of_each_run(name, method).values())
        if not logs:
            continue
        mean, *ends = report.bounds(logs)
        at = min(max(mean, low), high)
        sign = marker if at == mean else (">" if mean > high else "<")
        axes.plot(
            at,
            row + offset,
            sign,
            color=colour,
            markersize=6,
            clip_on=False,
            label=None if is_named else title,
            zorder=3,
        )
        is_named = True
        if not any(map(math.isnan, ends)):
            axes.plot([min(max(end, low), high) for end in ends], [row + offset] * 2, color=colour, linewidth=1.3)


def _finish(axes: Any, names: list[str]) -> None:
    from benchmarks.quality import workloads

    axes.axvline(1.0, color="black", linewidth=0.8)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
    axes.set(xscale="log", xlim=_LIMITS, ylim=(len(names) - 0.5, -0.5))
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS], minor=False)
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), [f"{name}\n{_short(workloads.get(name).title)}" for name in names], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(
        "test loss over the best of seven rates under linear decay; 95 % intervals over seeds; left is better"
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=5, fontsize=8, frameon=False)


def _short(title: str) -> str:
    """A title in two lines at most."""
    first, _, rest = title.partition(", ")
    return f"{first},\n{rest}" if rest else first
