"""Where a run is, on a terminal as one live line, elsewhere as a line of text now and then."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..history.explain import shown

# Where nobody looks at a terminal, at most one line in so many seconds.
_QUIET_SECONDS = 10.0
# A bar shorter than this says nothing, a longer one nothing more.
_LEAST_BAR, _MOST_BAR = 8, 40
_GAP = "  "


class _Field(NamedTuple):
    """One thing that is shown; the lower its rank, the longer it stays while the line grows narrower."""

    rank: int
    text: str
    style: str = ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Pace:
    """How long the rest of a run will take, by the steps since it was first shown: what was compiled before is over."""

    def __init__(self):
        self._first: tuple[float, int] | None = None
        self._step, self._now = 0, 0.0

    def at(self, step: int, now: float) -> None:
        self._first = self._first or (now, step)
        self._step, self._now = step, now

    def left(self, total: int) -> str:
        if self._first is None or self._step <= self._first[1]:
            return "-"
        began, first = self._first
        return _clock((total - self._step) * (self._now - began) / (self._step - first))


class Progress:
    """A live line: phase, step, loss, time left, values in force, rounds, share of forks not kept, rollbacks.

    On a terminal it fits the width there is: what does not fit is left out whole, the least important first. In a
    notebook, a file, a pipe or CI it is plain text, a line at the start and at the end and one every 10 s at most.

    Args:
      total: Steps of the run.
      is_on: Whether anything is shown.
      console: A ``rich.console.Console`` to show it on; standard output by default.
    """

    def __init__(self, total: int, *, is_on: bool, console: Any = None):
        self._total, self._is_on, self._console = total, is_on, console
        self._live: Any = None
        self._pace = _Pace()
        self._state: dict[str, Any] = {"step": 0, "phase": ""}
        self._waits_for = "compiling (once)"
        self._said: list[str] = []
        self._printed_at, self._printed = float("-inf"), ""

    @property
    def is_on(self) -> bool:
        """Whether anything is shown."""
        return self._is_on

    def open(self) -> None:
        """Shows that the run begins; what comes first is compilation."""
        if not self._is_on or self._live is not None:
            return
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        if self._console.is_interactive and not self._console.is_jupyter:
            from rich.live import Live

            # Drawn where there is something new: a thread of its own would take time from the training.
            self._live = Live(
                console=self._console, auto_refresh=False, get_renderable=self._line, redirect_stderr=False
            )
            with self._writing():
                self._live.start(refresh=True)
        else:
            self._print()

    def wait(self, what: str) -> None:
        """Shows what the run waits for, until `show` shows where it is again."""
        if self._is_on:
            self._waits_for = what
            self._refresh()

    def show(
        self,
        *,
        step: int,
        phase: str,
        loss: float,
        hyperparams: Mapping[str, Any],
        discarded: int,
        rounds: int = 0,
        rollbacks: int = 0,
    ) -> None:
        """Shows where the run is."""
        if not self._is_on:
            return
        if self._waits_for:
            self._pace = _Pace()
        self._waits_for = ""
        self._pace.at(step, time.monotonic())
        self._state = {
            "step": step,
            "phase": phase,
            "loss": loss,
            "values": dict(hyperparams),
            "share": discarded / max(step, 1),
            "rounds": rounds,
            "rollbacks": rollbacks,
        }
        self._refresh()

    def say(self, message: str) -> None:
        """Shows a message that stays: above the line, or at the end of the next line of text."""
        if not self._is_on:
            return
        if self._live is not None:
            with self._writing():
                self._console.print(message, highlight=False, markup=False)
        else:
            self._said.append(message)

    def close(self) -> None:
        """Leaves the line as it is, for good."""
        if not self._is_on:
            return
        self._is_on = False
        if self._live is not None:
            with self._writing():
                self._live.stop()
            self._live = None
        elif self._console is not None:
            self._print()

    def _refresh(self) -> None:
        if self._live is not None:
            with self._writing():
                self._live.refresh()
        elif self._console is not None and time.monotonic() - self._printed_at >= _QUIET_SECONDS:
            self._print()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, or a pipe that nobody reads any more, ends what is shown, and nothing else."""
        try:
            yield
        except (OSError, SystemExit):  # the latter is what rich makes of a broken pipe
            self._is_on, self._live = False, None

    # What is shown.

    def _fields(self) -> list[_Field]:
        """What there is to show, in the order of the line."""
        state = self._state
        fields = [
            _Field(0, self._waits_for or state["phase"], "bold"),
            _Field(1, f"{state['step']}/{self._total}", "cyan"),
        ]
        if "loss" not in state:
            return [field for field in fields if field.text]
        # The first of the values comes before the time left, the others after it.
        named = enumerate(state["values"].items())
        values = [_Field(3 + 2 * (i > 0) + i, f"{name} {shown(value)}") for i, (name, value) in named]
        last = 6 + len(values)
        rollbacks = state["rollbacks"]
        return [
            *fields,
            _Field(2, f"loss {shown(float(state['loss']))}"),
            *values,
            _Field(last, f"{state['rounds']} round{'s' * (state['rounds'] != 1)}"),
            _Field(last + 1, f"{100 * state['share']:.0f} % in lost forks"),
            *[_Field(last + 2, f"{rollbacks} rollback{'s' * (rollbacks != 1)}", "yellow")] * bool(rollbacks),
            _Field(4, f"eta {self._pace.left(self._total)}", "cyan"),
        ]

    def _line(self) -> Any:
        from rich.cells import cell_len
        from rich.text import Text

        fields = _fitting(self._fields(), self._console.width, cell_len)
        room = self._console.width - sum(cell_len(field.text) + len(_GAP) for field in fields)
        line = Text(no_wrap=True, overflow="crop", end="")
        for number, field in enumerate(fields):
            line.append(_GAP * (number > 0)).append(field.text, style=field.style)
            if number == 0 and room >= _LEAST_BAR:
                line.append(_GAP).append(*self._bar(min(room, _MOST_BAR)))
        return line

    def _bar(self, width: int) -> tuple[str, str]:
        full, empty = ("━", "╌") if self._console.encoding.startswith("utf") else ("#", ".")
        done = round(width * min(self._state["step"] / max(self._total, 1), 1.0))
        return full * done + empty * (width - done), "green"

    def _print(self) -> None:
        """A line of text: all there is, and what was said last."""
        texts = [field.text for field in self._fields() if field.text]
        if self._said:
            more = f" (and {len(self._said) - 1} more)" if len(self._said) > 1 else ""
            texts.append(f"last: {self._said[-1]}{more}")
        line = _GAP.join(texts)
        if line != self._printed:
            with self._writing():
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._said.clear()
        self._printed, self._printed_at = line, time.monotonic()


def _fitting(fields: list[_Field], width: int, length: Any) -> list[_Field]:
    """The fields of a line that fit a width, those of lowest rank, each whole or not at all."""
    room, fitting = width, []
    for field in sorted(fields, key=lambda field: field.rank):
        room -= length(field.text) + (len(_GAP) if fitting else 0)
        if room < 0:
            break
        fitting.append(field)
    return [field for field in fields if field in fitting]
