"""From what the device logs to a history."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ..controller import loss_monitor
from ..controller.plan import KINDS
from ..controller.state import (
    FORK,
    FORK_FINISHED,
    FORK_STATUSES,
    OUTCOME_ACCEPTED,
    OUTCOME_RATE_READ,
    OUTCOME_RETRIED,
    OUTCOMES,
    PHASES,
    SWEEP,
    TRAIN,
    Directive,
    Round,
)
from ..history.explain import verdict
from ..history.history import HISTORY_NAME, History
from ..space.search_space import SearchSpace

_LOG = logging.getLogger("autotunenet")

# Device scalars waiting to be read are read together once this many have gathered.
_PENDING_LIMIT = 256

# A run that fails at every step has said so often enough by then; the totals go on counting.
_MAX_EVENTS = 1000

# What is read of every step, however few are recorded.
_ALWAYS = ("step", "rewound", "verdict", "outcome", "has_fallen")

_FALLEN = "The training loss did not improve between readings: the rates fell by half a decade, once."
_NO_ROLLBACK = "The loss stays high and the guard has no rollback for that; it is taken as it is."
_BUDGET_SPENT = (
    "The loss stays high and the guard's rollbacks for that are used up; it is taken as it is, and the hyperparameters "
    "in force are held from here on."
)


class Display(Protocol):
    """Where a run is shown while it goes on, such as a progress line."""

    def say(self, message: str) -> None:
        """Shows a message that stays."""
        ...

    def show(self, *, step: int, phase: str, loss: float, hyperparams: dict[str, float], discarded: int) -> None:
        """Shows where the run is."""
        ...


class Recorder:
    """Writes the history of one run.

    Args:
      history: Written to.
      space: What is tuned.
      progress: Where messages are shown.
      callbacks: Called with each round's record.
      undoes: Whether training goes back from what is not kept; else all of it is part of the final state's past.
    """

    def __init__(
        self,
        history: History,
        space: SearchSpace,
        progress: Display,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        *,
        undoes: bool = True,
    ):
        self.history, self.discarded, self._undoes = history, 0, undoes
        history.describe(space)
        self._space, self._progress, self._callbacks = space, progress, tuple(callbacks)
        self._pending: list[tuple[Any, int, int, int]] = []
        self._steps_seen = 0
        self._has_fallen, self._has_written = False, True
        self._round_start = 0
        self._fork_start = 0
        self._sweep: tuple[int, int] | None = None
        self._forks: list[tuple[int, int]] = []

    # Steps.

    def log(self, entry: dict[str, Any], phase: int) -> None:
        """Takes the device scalars of one step; reads them later, many at once."""
        self._steps_seen += 1
        if self._steps_seen % self.history.stride:
            entry = {name: entry[name] for name in _ALWAYS if name in entry}
        self._pending.append((entry, phase, len(self.history.rounds), len(self._forks) if phase == FORK else -1))
        if len(self._pending) >= _PENDING_LIMIT:
            self.flush()

    def flush(self) -> None:
        """Reads everything logged so far."""
        pending, self._pending = self._pending, []
        rows = jax.device_get([entry for entry, *_ in pending])
        for row, (_, phase, number, fork) in zip(rows, pending, strict=True):
            step, rewound = int(row["step"]), int(row["rewound"])
            if "loss" in row:
                values = {name: _plain(value) for name, value in row["hyperparams"].items()}
                self.history.add(
                    {
                        "step": step,
                        "data_step": int(row["data_step"]),
                        "loss": float(row["loss"]),
                        "phase": PHASES[phase],
                        "round": number,
                        "fork": fork,
                        **values,
                    }
                )
            if int(row["verdict"]) in (loss_monitor.SKIPPED, loss_monitor.NON_FINITE):
                self.history.skip(step)
            if not self._has_fallen and bool(row.get("has_fallen", False)):
                self._has_fallen = True
                self.note(step, "fall", _FALLEN)
            if rewound >= 0:
                self.history.discard(rewound, step)
                # Healthy training goes back as well, to the state of its best validation metric.
                if bool(loss_monitor.is_failure(row["verdict"])):
                    self.note(step, "rollback", loss_monitor.MESSAGES[int(row["verdict"])])
            elif int(row["outcome"]) == OUTCOME_ACCEPTED:
                self.note(step, "shift", OUTCOMES[OUTCOME_ACCEPTED])
            elif phase == TRAIN:
                self._tell(step, int(row["verdict"]))

    def _tell(self, step: int, verdict: int) -> None:
        """Notes, once a run each, what the guard saw and nothing was done about."""
        seen = {row["kind"] for row in self.history.events}
        if verdict == loss_monitor.STALLED and "stall" not in seen:
            self.note(step, "stall", loss_monitor.MESSAGES[verdict])
        elif verdict in (loss_monitor.SPIKE, loss_monitor.DIVERGED) and "budget" not in seen:
            self.note(step, "budget", _BUDGET_SPENT if "rollback" in seen else _NO_ROLLBACK)

    def note(self, step: int, kind: str, message: str) -> None:
        """Records something the user should know of."""
        if len(self.history.events) < _MAX_EVENTS:
            self.history.events.append({"step": step, "kind": kind, "message": message})
            self._progress.say(f"step {step}: {message}")

    def retreat(self, step: int, *, is_over: bool) -> None:
        """Training goes back to its best state, by the validation metric."""
        what = "the run ends in" if is_over else "training goes on, at a lower rate, from"
        self.note(step, "retreat", f"The validation metric did not improve: {what} the best state.")

    def add_eval(self, step: int, value: float, *, is_settled: bool) -> None:
        """Records a validation metric; ``is_settled`` where it is not a fork's."""
        self.history.evals.append({"step": step, "value": value, "is_settled": is_settled})

    def show(self, step: int) -> None:
        """Refreshes the progress line with the newest step the device has finished."""
        ready = [entry for entry, *_ in self._pending if "loss" in entry and entry["loss"].is_ready()]
        if ready:
            newest = jax.device_get({"loss": ready[-1]["loss"], "hp": ready[-1]["hyperparams"]})
            loss = float(newest["loss"])
            values = {name: float(value) for name, value in newest["hp"].items()}
        elif self.history.records:
            row = self.history.records[-1]
            loss, values = row["loss"], {name: row[name] for name in self.history.names}
        else:
            return
        phase = PHASES[self._pending[-1][1]] if self._pending else self.history.records[-1]["phase"]
        self._progress.show(step=step, phase=phase, loss=loss, hyperparams=values, discarded=self.discarded)

    # Rounds.

    def begin_round(self, step: int, phase: int) -> None:
        """A round begins, with a range test or with its first fork."""
        self._round_start = self._fork_start = step
        self._sweep, self._forks = None, []
        if phase == SWEEP:
            self._sweep = (step, step)

    def end_sweep(self, step: int) -> None:
        """The range test ended; none of its steps are kept."""
        self._sweep = (self._round_start, step)
        self._fork_start = step
        self._lose(self._round_start, step)

    def end_fork(self, step: int) -> None:
        """A fork ended."""
        self._forks.append((self._fork_start, step))
        self._fork_start = step

    def retry(self, step: int) -> None:
        """The range test or fork that was running begins again; its steps so far are lost."""
        self._lose(self._fork_start, step)
        self._fork_start = step
        self.note(step, "retry", OUTCOMES[OUTCOME_RETRIED])

    def decided(
        self, step: int, before: int, after: int, directive: Directive, report: Round, kind: int, chosen: dict[str, Any]
    ) -> None:
        """A decision was taken.

        Args:
          step: Budget step.
          before: Phase before the decision.
          after: Phase after it.
          directive: What it said, read from the device.
          report: The round as it was decided on, likewise.
          kind: Kind of that round.
          chosen: Hyperparameters in force from now on outside forks.
        """
        outcome = int(directive.outcome)
        if outcome == OUTCOME_RETRIED:
            self.retry(step)
        elif before == TRAIN and after != TRAIN:
            self.begin_round(step, after)
        elif before == SWEEP:
            self.end_sweep(step)
            if outcome == OUTCOME_RATE_READ:
                self.note(step, "rate", OUTCOMES[outcome])
        elif before == FORK and after == FORK and bool(directive.restore):
            self.end_fork(step)
        elif before == FORK and after == TRAIN:
            self.end_fork(step)
            self.end_round(step, directive, kind, report, chosen)

    def end_round(self, step: int, directive: Directive, kind: int, report: Round, chosen: dict[str, Any]) -> None:
        """A round ended; ``report`` is the round as it was decided on."""
        best = int(report.kept)
        forks = []
        for number, (start, end) in enumerate(self._forks):
            score = float(report.score[number])
            is_finished = int(report.status[number]) == FORK_FINISHED
            forks.append(
                {
                    "hyperparams": self._space.to_python(self._space.decode(report.x[number])),
                    "scores": [score] if np.isfinite(score) else [],
                    "status": "kept" if number == best else "lost" if is_finished else
                    FORK_STATUSES[int(report.status[number])],
                    "steps": int(report.steps[number]),
                    "start": start,
                    "end": end,
                    "p_better": float(report.p_better[number]),
                }
            )  # fmt: skip
            if number != best:
                self._lose(start, end)
        row = {
            "start": self._round_start,
            "end": step,
            "kind": KINDS[kind],
            "scored_by": "validation" if bool(report.has_eval) else "training loss",
            "reference": float(report.reference) if np.isfinite(report.reference) else None,
            "sweep": None if self._sweep is None else list(self._sweep),
            "forks": forks,
            "best": best,
            "outcome": OUTCOMES[int(directive.outcome)],
            "chosen": self._space.to_python(chosen),
        }
        row["verdict"] = verdict(row)
        self.history.rounds.append(row)
        values = ", ".join(f"{name} {shown(value)}" for name, value in row["chosen"].items())
        self._progress.say(f"step {step}: round {len(self.history.rounds)}, {len(forks)} forks -> {values}")
        for callback in self._callbacks:
            callback(row)

    def abandon(self, step: int, kept: int) -> None:
        """The run ended inside a round; ``kept`` is the fork whose state is returned, -1 where all started from."""
        if kept != len(self._forks):
            self.discarded += step - self._fork_start
        for number, (start, end) in enumerate([*self._forks, (self._fork_start, step)]):
            if number != kept:
                self._lose(start, end)

    def _lose(self, start: int, end: int) -> None:
        if self._undoes:
            self.history.discard(start, end)

    # Across processes.

    def to_dict(self) -> dict[str, Any]:
        """Everything recorded so far, the unfinished round included, as plain data."""
        open_round = {
            "round_start": self._round_start,
            "fork_start": self._fork_start,
            "sweep": self._sweep,
            "forks": self._forks,
        }
        counts = {"steps_seen": self._steps_seen, "stride": self.history.stride}
        return {"history": self.history.to_dict(), "open_round": open_round, "counts": counts}

    def load(self, data: dict[str, Any]) -> None:
        """Goes on from what `to_dict` gave."""
        self.history.load(data["history"], stride=data["counts"]["stride"])
        self._steps_seen = data["counts"]["steps_seen"]
        self._has_fallen = any(event["kind"] == "fall" for event in self.history.events)
        held = data["open_round"]
        self._round_start, self._fork_start = held["round_start"], held["fork_start"]
        self._sweep = None if held["sweep"] is None else tuple(held["sweep"])
        self._forks = [(start, end) for start, end in held["forks"]]
        self._pending = []

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes the history so far into a run's folder; where that fails, it is said once, and training goes on."""
        self.flush()
        try:
            self.history.to_json(os.path.join(folder, HISTORY_NAME))
        except OSError as error:
            if self._has_written:
                _LOG.warning("The history could not be written to %s: %s", folder, error)
            self._has_written = False
        else:
            self._has_written = True

    def finish(self, step: int, rollbacks: int, *, dropped: int = 0) -> None:
        """The run ended; ``dropped`` decisions before the first recorded one are not known."""
        self.flush()
        self.history.summary = {
            "steps": step,
            "discarded_steps": self.discarded,
            "share_discarded": self.discarded / max(step, 1),
            "rollbacks": rollbacks,
            "rounds": len(self.history.rounds),
            "evals": len(self.history.evals),
            "dropped": dropped,
        }


def _plain(value: Any) -> Any:
    """A scalar array as a Python number; options of a choice are what they are."""
    return np.asarray(value).item() if isinstance(value, np.ndarray | np.generic | jax.Array) else value


def shown(value: Any) -> str:
    """A value as a user is shown it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
