"""The progress line."""

from typing import Any


def _number(value: float) -> str:
    return f"{value:.3g}"


class Progress:
    """A live line: step, loss, hyperparameters in force, phase, share spent on discarded forks, time left.

    Args:
      total: Steps of the run.
      is_on: Whether anything is shown.
    """

    def __init__(self, total: int, *, is_on: bool):
        self._bar: Any = None
        if not is_on:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("[bold]{task.fields[phase]:>5}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[values]}"),
            TextColumn("forks {task.fields[share]}"),
            TimeRemainingColumn(),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, phase="", loss="-", values="", share="0 %")
        self._bar.start()

    @property
    def is_on(self) -> bool:
        """Whether anything is shown."""
        return self._bar is not None

    def show(self, *, step: int, phase: str, loss: float, hyperparams: dict[str, float], discarded: int) -> None:
        """Refreshes the line."""
        if self._bar is None:
            return
        values = "  ".join(f"{name} {_number(value)}" for name, value in hyperparams.items())
        self._bar.update(
            self._task,
            completed=step,
            phase=phase,
            loss=_number(loss),
            values=values,
            share=f"{100 * discarded / max(step, 1):.0f} %",
        )

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False)

    def close(self) -> None:
        """Leaves the line as it is, for good."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
