"""From what the device logs to a history."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

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
from ..history.explain import settings, verdict
from ..history.history import HISTORY_NAME, History
from ..space.search_space import SearchSpace
from .callbacks import Step
from .feed import Feed
from .progress import Progress

LOGGER = logging.getLogger("autotunenet")
"""Where things go that ask for nothing; notices, which ask for something, are warnings."""

# Device scalars waiting to be read are read together once this many have gathered.
_PENDING_LIMIT = 256

# A run that fails at every step has said so often enough by then; the totals go on counting.
_MAX_EVENTS = 1000

# What is read of every step, however few are recorded.
_ALWAYS = ("step", "rewound", "verdict", "outcome", "has_fallen")

# Verdicts on steps that did not happen.
_NOT_TAKEN = (loss_monitor.SKIPPED, loss_monitor.NON_FINITE)

_CLIMBED = "The validation metric keeps improving: the rates climb, and stay there if it goes on doing so."
_FALLEN = "The training loss did not improve between readings: the rates fell by half a decade, once."
_EXTENDED = "The run was given another budget: {total} steps."
_NO_ROLLBACK = "The loss stays high and the guard has no rollback for that; it is taken as it is."
_BUDGET_SPENT = (
    "The loss stays high and the guard's rollbacks for that are used up; it is taken as it is, and the hyperparameters "
    "in force are held from here on."
)


class Recorder:
    """Writes the history of one run.

    Args:
      history: Written to.
      space: What is tuned.
      progress: Where messages are shown.
      callbacks: Hooks of the user's; see `Callback`. They hear where `deliver` is called.
      loggers: Where the user wants the numbers; see `history.loggers.Writer`.
      log_every: Steps between two rows of the loggers.
      log: Where decisions and what happens are told of, a line each; None for nowhere.
      undoes: Whether training goes back from what is not kept; else all of it is part of the final state's past.

    Attributes:
      history: Of the run.
      discarded_steps: Steps spent so far on range tests and on forks that were not kept.
      rollbacks: How often training went back because it was unhealthy.

    Raises:
      TypeError: A callback or a logger of an unknown kind.
      ValueError: ``log_every`` is out of range.
    """

    def __init__(
        self,
        history: History,
        space: SearchSpace,
        progress: Progress,
        callbacks: Sequence[Any],
        *,
        loggers: Sequence[Any] = (),
        log_every: int = 50,
        log: logging.Logger | None = LOGGER,
        undoes: bool = True,
    ):
        self.history, self.discarded_steps, self.rollbacks, self._undoes = history, 0, 0, undoes
        history.describe(space)
        self._space, self._progress, self._log = space, progress, log
        self._feed = Feed(history, callbacks, loggers, log_every=log_every)
        self._pending: list[tuple[Any, bool, int, int, int]] = []
        self._steps_seen = 0
        self._has_fallen, self._has_written = False, True
        self._round_start = 0
        self._fork_start = 0
        self._range_test: tuple[int, int] | None = None
        self._forks: list[tuple[int, int]] = []

    # Steps.

    def log(self, entry: dict[str, Any], phase: int) -> None:
        """Takes the device scalars of one step; reads them later, many at once. Without a loss they make no record."""
        self._steps_seen += 1
        is_recorded = self._steps_seen % self.history.stride == 0 and "loss" in entry
        if not (is_recorded or self._feed.hears_steps):
            entry = {name: entry[name] for name in _ALWAYS if name in entry}
        fork = len(self._forks) if phase == FORK else -1
        self._pending.append((entry, is_recorded, phase, len(self.history.rounds), fork))
        if len(self._pending) >= _PENDING_LIMIT:
            self.flush()

    def flush(self) -> None:
        """Reads everything logged so far."""
        pending, self._pending = self._pending, []
        rows = _on_host([entry for entry, *_ in pending])
        for row, (_, is_recorded, phase, number, fork) in zip(rows, pending, strict=True):
            step, rewound = int(row["step"]), int(row["rewound"])
            values = {name: _plain(value) for name, value in row.get("hyperparams", {}).items()}
            metrics = {name: float(value) for name, value in row.get("metrics", {}).items()}
            if "loss" in row:
                self._hand_on(step, row, phase, fork, values, metrics)
            if is_recorded:
                self.history.add(
                    {
                        "step": step,
                        "data_step": int(row["data_step"]),
                        "loss": float(row["loss"]),
                        "phase": PHASES[phase],
                        "round": number,
                        "fork": fork,
                        **values,
                        **metrics,
                    }
                )
            if int(row["verdict"]) in _NOT_TAKEN:
                self.history.skip(step)
            if not self._has_fallen and bool(row.get("has_fallen", False)):
                self._has_fallen = True
                self.note(step, "fall", _FALLEN)
            if rewound >= 0:
                # Healthy training goes back as well, to the state of its best validation metric.
                is_rollback = bool(loss_monitor.is_failure(row["verdict"]))
                self.go_back(step, rewound, is_rollback=is_rollback)
                if is_rollback:
                    self.note(step, "rollback", loss_monitor.MESSAGES[int(row["verdict"])])
            elif int(row["outcome"]) == OUTCOME_ACCEPTED:
                self.note(step, "shift", OUTCOMES[OUTCOME_ACCEPTED])
            elif phase == TRAIN:
                self._tell(step, int(row["verdict"]))

    def _hand_on(
        self, step: int, row: Any, phase: int, fork: int, values: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Tells the feed of a step that was taken, and that may be kept."""
        is_undone = int(row["verdict"]) in _NOT_TAKEN or int(row["rewound"]) >= 0
        if self._feed.hears_steps and phase != SWEEP and not is_undone:
            self._feed.step(Step(step, step, float(row["loss"]), metrics, values), fork=fork)

    def go_back(self, step: int, back_to: int, *, is_rollback: bool) -> None:
        """Training is back at an earlier state; what was done since is no part of it."""
        self.history.discard(back_to, step)
        self._feed.rewind(step, back_to, is_rollback=is_rollback)

    def _tell(self, step: int, verdict: int) -> None:
        """Notes, once a run each, what the guard saw and nothing was done about."""
        seen = {row["kind"] for row in self.history.events}
        if verdict == loss_monitor.STALLED and "stall" not in seen:
            self.note(step, "stall", loss_monitor.MESSAGES[verdict])
        elif verdict in (loss_monitor.SPIKE, loss_monitor.DIVERGED) and "budget" not in seen:
            self.note(step, "budget", _BUDGET_SPENT if "rollback" in seen else _NO_ROLLBACK)

    def note(self, step: int, kind: str, message: str, *, level: int = logging.INFO) -> None:
        """Records something the user should know of, and says it."""
        if self.record(step, kind, message):
            self._say(step, message, level=level)

    def record(self, step: int, kind: str, message: str) -> bool:
        """Records something that the user is told of elsewhere; returns whether there was room."""
        self.rollbacks += kind == "rollback"
        has_room = len(self.history.events) < _MAX_EVENTS
        if has_room:
            self.history.events.append({"step": step, "kind": kind, "message": message})
        return has_room

    def _say(self, step: int, message: str, *, level: int = logging.INFO) -> None:
        self._progress.say(f"step {step}: {message}")
        if self._log is not None:
            self._log.log(level, "step %d: %s", step, message)

    def extended(self, step: int, total: int | None) -> None:
        """The run goes on to another budget."""
        self.note(step, "extended", _EXTENDED.format(total=total))

    def retreat(self, step: int, *, is_over: bool) -> None:
        """Training goes back to its best state, by the validation metric."""
        what = "the run ends in" if is_over else "training goes on, at a lower rate, from"
        self.note(step, "retreat", f"The validation metric did not improve: {what} the best state.")

    def climb(self, step: int) -> None:
        """The rates climb, by the validation metric."""
        self.note(step, "climb", _CLIMBED)

    def add_eval(
        self, step: int, value: float, *, is_settled: bool, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Records a validation metric; ``is_settled`` where it is not a fork's, ``metrics`` all that was measured."""
        row: dict[str, Any] = {"step": step, "value": value, "is_settled": is_settled}
        if metrics:
            row["metrics"] = {name: number if math.isfinite(number) else None for name, number in metrics.items()}
        self.history.evals.append(row)
        if is_settled and self._feed.is_open:
            # The steps come first.
            self.flush()
            self._feed.read(step, value, metrics or {})

    # What the user's own objects hear.

    def deliver(self) -> None:
        """Hands on what is known by now to callbacks and loggers; call it where nothing is half done.

        Raises:
          StopTraining: A callback asks for the end of the run.
        """
        if self._feed.is_open:
            if self._feed.hears_steps and len(self._pending) >= self._feed.log_every:
                self.flush()
            self._feed.deliver()

    def wait(self, what: str) -> None:
        """Shows what the run waits for."""
        self._progress.wait(what)

    def show(self, step: int) -> None:
        """Refreshes the progress line with the newest step the device has finished."""
        ready = [entry for entry, *_ in self._pending if "loss" in entry and _is_ready(entry["loss"])]
        if ready:
            newest = jax.device_get({"loss": ready[-1]["loss"], "hp": ready[-1]["hyperparams"]})
            loss = float(newest["loss"])
            values = {name: float(value) for name, value in newest["hp"].items()}
        elif self.history.records:
            row = self.history.records[-1]
            loss, values = row["loss"], {name: row[name] for name in self.history.names}
        else:
            return
        phase = PHASES[self._pending[-1][2]] if self._pending else self.history.records[-1]["phase"]
        self.show_at(step, phase=phase, loss=loss, hyperparams=values)

    def show_at(self, step: int, *, phase: str, loss: float, hyperparams: dict[str, Any]) -> None:
        """Refreshes the progress line with what a loop knows of its newest step."""
        totals = {"discarded": self.discarded_steps, "rounds": len(self.history.rounds), "rollbacks": self.rollbacks}
        self._progress.show(step=step, phase=phase, loss=loss, hyperparams=hyperparams, **totals)

    # Rounds.

    def begin_round(self, step: int, phase: int) -> None:
        """A round begins, with a range test or with its first fork."""
        self._round_start = self._fork_start = step
        self._range_test, self._forks = None, []
        if phase == SWEEP:
            self._range_test = (step, step)

    def end_range_test(self, step: int) -> None:
        """The range test ended; none of its steps are kept."""
        self._range_test = (self._round_start, step)
        self._fork_start = step
        self._lose(self._round_start, step)

    def end_fork(self, step: int) -> None:
        """A fork ended."""
        self._forks.append((self._fork_start, step))
        self._fork_start = step

    def retry(self, step: int) -> None:
        """The range test or fork that was running begins again; its steps so far are lost."""
        self._lose(self._fork_start, step)
        self._feed.drop_fork(len(self._forks))
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
            self.end_range_test(step)
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
                    "lead": _known(report.lead[number]),
                    "deviation": _known(report.deviation[number]),
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
            "sweep": None if self._range_test is None else list(self._range_test),
            "forks": forks,
            "best": best,
            "outcome": OUTCOMES[int(directive.outcome)],
            "chosen": self._space.to_python(chosen),
        }
        row["verdict"] = verdict(row)
        self.history.rounds.append(row)
        self._feed.end_round(best, row, discarded=self.discarded_steps)
        values = settings(row["chosen"], list(row["chosen"]))
        self._say(step, f"round {len(self.history.rounds)}, {len(forks)} forks -> {values}")

    def abandon(self, step: int, kept: int) -> None:
        """The run ended inside a round; ``kept`` is the fork whose state is returned, -1 where all started from."""
        if kept != len(self._forks):
            self.discarded_steps += step - self._fork_start
        for number, (start, end) in enumerate([*self._forks, (self._fork_start, step)]):
            if number != kept:
                self._lose(start, end)
        self._feed.end_round(kept)

    def _lose(self, start: int, end: int) -> None:
        if self._undoes:
            self.history.discard(start, end)

    # Across processes.

    def to_dict(self) -> dict[str, Any]:
        """Everything recorded so far, the unfinished round included, as plain data."""
        open_round = {
            "round_start": self._round_start,
            "fork_start": self._fork_start,
            "sweep": self._range_test,
            "forks": self._forks,
        }
        counts = {"steps_seen": self._steps_seen, "rollbacks": self.rollbacks}
        told = {"feed": self._feed.to_dict()} if self._feed.is_open else {}
        return {"history": self.history.to_dict(), "open_round": open_round, "counts": counts, **told}

    def load(self, data: dict[str, Any], *, step: int) -> None:
        """Goes on, from a budget step on, from what `to_dict` gave."""
        self.history.load(data["history"])
        self._steps_seen, self.rollbacks = data["counts"]["steps_seen"], data["counts"]["rollbacks"]
        self._feed.load(data.get("feed"), step=step)
        self._has_fallen = any(event["kind"] == "fall" for event in self.history.events)
        held = data["open_round"]
        self._round_start, self._fork_start = held["round_start"], held["fork_start"]
        self._range_test = None if held["sweep"] is None else tuple(held["sweep"])
        self._forks = [(start, end) for start, end in held["forks"]]
        self._pending = []

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes the history so far into a run's folder; where that fails, it is said once, and training goes on."""
        self.flush()
        try:
            os.makedirs(folder, exist_ok=True)
            self._so_far().to_json(os.path.join(folder, HISTORY_NAME))
        except OSError as error:
            if self._has_written:
                LOGGER.warning("The history could not be written to %s: %s", folder, error)
            self._has_written = False
        else:
            self._has_written = True

    def _so_far(self) -> History:
        """The history; of a round that is under way only the fork that is, so that what is kept is one training."""
        if not (self._forks and self._undoes):
            return self.history
        history = History.from_dict(self.history.to_dict())
        for start, end in self._forks:
            history.discard(start, end)
        return history

    def finish(self, step: int, rollbacks: int, *, total: int = 0, dropped: int = 0) -> None:
        """The totals of the run up to a step.

        Args:
          step: Budget spent.
          rollbacks: How often training went back because it was unhealthy.
          total: Whole budget; 0 where there is none.
          dropped: Decisions before the first recorded one, which are not known.
        """
        self.flush()
        self.history.summary = {
            "steps": step,
            "total_steps": total or None,
            "discarded_steps": self.discarded_steps,
            "share_discarded": self.discarded_steps / max(step, 1),
            "undone_steps": max(self.history.lost_steps - self.discarded_steps, 0),
            "rollbacks": rollbacks,
            "rounds": len(self.history.rounds),
            "evals": len(self.history.evals),
            "dropped": dropped,
        }

    def end(self) -> None:
        """The run is over, and its history is complete."""
        if self._feed.is_open:
            self._feed.finish(self.history)


def _on_host(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, read from the device in one go where any of it comes from there."""
    is_here = all(isinstance(entry["step"], int) and isinstance(entry["verdict"], int) for entry in entries)
    return entries if is_here else jax.device_get(entries)


def _known(value: Any) -> float | None:
    """A number, or None where there is none."""
    return float(value) if np.isfinite(value) else None


def _is_ready(loss: Any) -> bool:
    """Whether a loss is known without waiting; one that was heard rather than trained for is on the host."""
    return isinstance(loss, np.generic | np.ndarray) or loss.is_ready()


def _plain(value: Any) -> Any:
    """A scalar array as a Python number; options of a choice are what they are."""
    return np.asarray(value).item() if isinstance(value, np.ndarray | np.generic | jax.Array) else value
